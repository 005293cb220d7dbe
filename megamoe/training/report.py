"""Figures as people read them: the table of test figures by k, and any table in Markdown."""

from collections.abc import Sequence

from rich.table import Table

from megamoe.training.evaluation import NO_EXPERTS, Evaluation


def figures_table(evaluation: Evaluation, *, n_experts: int, top_k: int) -> Table:
    """Figures of one split at each number of active experts, under the corpus' honest name."""
    table = Table(
        title=f"{evaluation.split} figures on {evaluation.corpus}",
        caption=f"{evaluation.tokens:,} predictions each",
        title_style="bold",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("active experts k", justify="right")
    for title in evaluation.cells(max(evaluation.nats)):
        table.add_column(title, justify="right", style="bold" if title == evaluation.metric else "")
    table.add_column("")
    for k in evaluation.nats:
        active = f"{k} of {n_experts}" if k != NO_EXPERTS else "no experts"
        remark = {top_k: "moe.top_k", n_experts: "all experts"}.get(k, "")
        table.add_row(active, *evaluation.cells(k).values(), remark)
    return table


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
