"""Figures as people read them: one number with its unit, and the table of test figures by k."""

from rich.table import Table

from megamoe.training.evaluation import NO_EXPERTS, Evaluation


def format_figure(value: float, metric: str) -> str:
    """ "1.2345 bpc" or "23.45 ppl"."""
    return f"{value:.4f} {metric}" if metric == "bpc" else f"{value:.2f} {metric}"


def figures_table(evaluation: Evaluation, *, n_experts: int, top_k: int) -> Table:
    """Loss of one split at each number of active experts, under the corpus' honest name."""
    table = Table(
        title=f"{evaluation.split} figures on {evaluation.corpus}",
        caption=f"{evaluation.tokens:,} predictions each",
        title_style="bold",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("active experts k", justify="right")
    table.add_column(evaluation.metric, justify="right", style="bold")
    table.add_column("nats per token", justify="right")
    if evaluation.words_per_token is not None:
        table.add_column("ppl per word", justify="right")
    table.add_column("")
    for k, nats in evaluation.nats.items():
        cells = [f"{k} of {n_experts}" if k != NO_EXPERTS else "no experts"]
        cells += [format_figure(evaluation.figure(k), evaluation.metric).split()[0], f"{nats:.4f}"]
        per_word = evaluation.word_perplexity(k)
        cells += [] if per_word is None else [f"{per_word:.2f}"]
        table.add_row(*cells, {top_k: "moe.top_k", n_experts: "all experts"}.get(k, ""))
    return table
