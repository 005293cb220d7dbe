"""What a token costs while text is generated, by how many came before, in three ways.

    cache       keys and values of the positions in sight are kept, and one token is projected; what is used
    memory      hidden states are kept, and all in sight are projected again for each token
    rescoring   nothing is kept: one pass over all that is in sight

The preset's model has random weights, which compute as trained ones do, and byte vocabulary. Before the time
is taken the three are shown to score alike. Ways and positions take turns, round by round, and medians count;
of CPU time on a CPU, so that other jobs of the machine count little.

    OMP_NUM_THREADS=1 python -m benchmarks.generation --output benchmarks/results/2026-11-28-generation
    python -m benchmarks.generation --device cuda --preset large_enwik8
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.testing import assert_close

from benchmarks.dropout import medians
from benchmarks.record import add_output, facts, keep
from megamoe.config import RunConfig, load_config
from megamoe.models.decoding import Decoder, read_text
from megamoe.models.transformer_xl import TransformerXL
from megamoe.serve.generation import text_span

POSITIONS = (64, 256, 1024, 4096)
BATCH_SIZES = (1, 8)
VOCAB_SIZE = 256
IN_A_ROW = 8
"""Tokens of one round with the cache: while text is generated nothing stands between them."""


class Reader:
    """A model that has read random texts as far as a position, and can read their next token in each way."""

    def __init__(self, model: TransformerXL, run: RunConfig, ids_BS: torch.Tensor) -> None:
        self.model, self.span, self.ids_BS = model, text_span(run), ids_BS
        self.how: dict[str, Any] = {"span": self.span, "top_k": run.moe.top_k, "step": 0}
        pasts = [read_text(model, ids_S, **self.how) for ids_S in ids_BS[:, :-1]]
        self.decoder = Decoder(model, pasts, **self.how)
        self.memory = tuple(map(torch.cat, zip(*(past.memory for past in pasts), strict=True)))

    def with_cache(self) -> torch.Tensor:
        """Scores of the token after the next; the first call reads it, further ones go on with the same."""
        return self.decoder.read(self.ids_BS[:, -1])

    @torch.no_grad()
    def with_memory(self) -> torch.Tensor:
        """The same, always of the first."""
        output = self.model(self.ids_BS[:, -1:], memory=self.memory, return_logits=True, **self.how)
        return output.logits_BSV[:, -1]

    @torch.no_grad()
    def with_rescoring(self) -> torch.Tensor:
        """The same from what is in sight."""
        hidden_BSD = self.model(self.ids_BS[:, -self.span.memory_len :], **self.how).hidden_BSD[:, -1:]
        embedding = self.model.embedding
        tables, projections = list(embedding.weights), list(embedding.projections)
        return self.model.output(hidden_BSD, None, tables, projections, return_logits=True)[1][:, -1]

    def ways(self) -> dict[str, Callable[[], Any]]:
        """What is timed, by name."""
        return {
            "cache": lambda: [self.with_cache() for _ in range(IN_A_ROW)],
            "memory": self.with_memory,
            "rescoring": self.with_rescoring,
        }


def measure(
    model: TransformerXL, run: RunConfig, batch_size: int, rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """At each position median seconds of a token in each way, in `batch_size` rows at once."""
    draws = torch.Generator().manual_seed(1)
    ids_BS = torch.randint(VOCAB_SIZE, (batch_size, max(POSITIONS) + 1), generator=draws).to(device)
    actions: dict[str, Callable[[], Any]] = {}
    for position in POSITIONS:
        reader = Reader(model, run, ids_BS[:, : position + 1])
        require_same_scores(reader, position)
        actions |= {f"{way} {position}": action for way, action in reader.ways().items()}
    seconds = medians(actions, rounds, device)
    return [
        {
            "batch_size": batch_size, "position": position,
            "cache": seconds[f"cache {position}"] / IN_A_ROW,
            "memory": seconds[f"memory {position}"], "rescoring": seconds[f"rescoring {position}"],
        }
        for position in POSITIONS
    ]  # fmt: skip


def require_same_scores(reader: Reader, position: int) -> None:
    """Stop where the ways differ that compute the same."""
    expected_BV = reader.with_memory()
    assert_close(reader.with_cache(), expected_BV, atol=1e-4, rtol=1e-4)
    if position < reader.span.memory_len:
        assert_close(reader.with_rescoring(), expected_BV, atol=1e-4, rtol=1e-4)


REPORT = """\
# What a token costs while text is generated

{date}, `{command}`, {machine}.
{preset} with random weights in fp32, vocabulary {vocab_size}, k = {top_k};
a token sees the {window} latest positions. Medians of {rounds} interleaved rounds, {clock};
with the cache a round is of {in_a_row} tokens. ms for one token in each row:

| rows | tokens before | cache | memory | scored again | memory / cache | scored again / cache |
|---|---|---|---|---|---|---|
{rows}

Cache: what `megamoe generate` does. Memory: hidden states are kept and all projected again.
Scored again: what is in sight; from {window} tokens on that is no longer the same function, because
what is in sight had seen more.
"""


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = [
        f"| {row['batch_size']} | {row['position']:,} | {1e3 * row['cache']:.1f} | {1e3 * row['memory']:.1f}"
        f" | {1e3 * row['rescoring']:.1f} | {row['memory'] / row['cache']:.1f}"
        f" | {row['rescoring'] / row['cache']:.1f} |"
        for row in result["rows"]
    ]
    return REPORT.format(**result | {"rows": "\n".join(rows)})


def main() -> int:
    """Measure, print, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--preset", default="small_enwik8", help="the model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds (default: %(default)s)")
    add_output(parser)
    args = parser.parse_args()
    device, run = torch.device(args.device), load_config(preset=args.preset)
    model = TransformerXL(replace(run.model, vocab_size=VOCAB_SIZE), run.moe, seed=1).to(device).eval()
    result: dict[str, Any] = facts("benchmarks.generation", device) | {
        "preset": args.preset, "vocab_size": VOCAB_SIZE, "top_k": run.moe.top_k,
        "window": text_span(run).memory_len, "rounds": args.rounds, "in_a_row": IN_A_ROW,
    }  # fmt: skip
    result["rows"] = [
        row for batch_size in BATCH_SIZES for row in measure(model, run, batch_size, args.rounds, device)
    ]
    print(report(result))
    keep(result, report(result), args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
