"""How well a predictor does, as people read it."""

from rich.table import Table

from megamoe.serve.predictor_training import Fit


def recall_table(fit: Fit) -> Table:
    """Recall by layer and m, and that of guesses which need no predictor."""
    table = Table(
        title="experts that are among the m best guesses", title_style="bold", title_justify="left",
        caption=f"{fit.tokens:,} tokens that it did not learn from, after {fit.epochs} epochs",
        caption_justify="left",
    )  # fmt: skip
    table.add_column("mixture layer", justify="right")
    for m in fit.recalls[0]:
        table.add_column(f"m = {m}" + (" = k" if m == fit.top_k else ""), justify="right")
    table.add_column("most frequent, m = k", justify="right")
    table.add_column("token before, m = k", justify="right")
    for layer, recalls in enumerate(fit.recalls):
        found = [*recalls.values(), fit.frequent[layer][fit.top_k], fit.previous[layer][fit.top_k]]
        table.add_row(str(layer), *(f"{100 * value:.1f} %" for value in found))
    return table
