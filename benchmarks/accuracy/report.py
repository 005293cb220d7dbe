"""The rows as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.accuracy.rows import ACTIVATIONS, FLOPS, HELD, PARAMETERS, SENT, Claim, Row, table, verdicts

REPORT = """\
# What a plan says, and what runs do

{date}, `{command}`, {machine}.
{policies} policies in {presets} presets; {cases} runs on up to {ranks} ranks over gloo, by the trainer
itself, over {steps} steps when the memory of Transformer-XL is full.

| what | bound | figures | largest deviation | |
|---|---|---|---|---|
{verdicts}

Tables tell what was measured, and in brackets how far the prediction is off: bold where it misses its bound,
in italics where nothing was promised. Figures without brackets are predicted to 0.05 %. Nothing is predicted
of gradients while Adam works, of the two parts of the exchange, of norms and statistics, and of memory before
the peak. Of what is held the rank with the most counts, of the rest the mean of the ranks. What is neither
there nor predicted is left out.

{tables}
"""

HEADINGS: Mapping[Claim, str] = {
    HELD: "Bytes that a rank holds",
    SENT: "Bytes that a rank sends in a step",
    FLOPS: "FLOPs of a step on a rank",
    ACTIVATIONS: "Bytes of activations",
    PARAMETERS: "Numbers in a model",
}

NOTES: Mapping[Claim, str] = {
    HELD: """\
Counted in live engines, each storage once, padding included. Gradients: the most while autograd computes
them and when the update begins; what waits in a bucket to be reduced is in the column with buckets, which
counts flat copies too, and of which the plan gives the sum of two peaks, which is from above. Optimizer
states: moments and fp32 masters.""",
    SENT: """\
Counted where torch hands its collectives to the network: an all-reduce over n ranks of s bytes sends
2 (n - 1) / n s, an all-gather (n - 1) / n s, an all-to-all what is not for the rank itself. Plans take
routing to be even: it is random in `even` and `deep`, and HyperRouter's at the start of a run in `odd`.""",
    FLOPS: """\
By `torch.utils.flop_counter`, with the products that it leaves out; forward and backward. Nothing is promised
where a policy decides as it trains how much it computes, which the plan notes.""",
    ACTIVATIONS: """\
Most resident memory of the forward and backward pass of the second of three micro-batches above what the
process held before it, when gradients are there already: activations, and the memory that the micro-batch
makes. In a process of its own, after warm-up, median of {peak_steps} steps; freed memory goes back to the
kernel at once.""",
    PARAMETERS: "Built; all, frozen ones and those in experts are compared. Sums are over presets.",
}


def report(result: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The whole of it."""
    tables = []
    for claim, heading in HEADINGS.items():
        group = [row for row in rows if row.claim == claim]
        if group:
            tables.append(f"## {heading}\n\n{NOTES[claim].format(**result)}\n\n{table(group)}")
    return REPORT.format(**result, verdicts="\n".join(verdicts(rows)), tables="\n\n".join(tables))
