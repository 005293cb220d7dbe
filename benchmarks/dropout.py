"""Dropout drawn from tokens beside torch's, forward and backward, at the shapes of the published presets.

First alone, at every shape that the model drops at; then in whole training steps of a preset (forward pass,
backward pass, Adam) without dropout, with torch's in all places, and with ours. Ways take turns, round by
round, and medians count; of CPU time on a CPU, so that other jobs of the machine count little.

    OMP_NUM_THREADS=1 python -m benchmarks.dropout --output benchmarks/results/2026-11-26-dropout
    python -m benchmarks.dropout --device cuda --dtype bfloat16 --batch_size 22
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.functional import dropout

from benchmarks.record import add_output, facts, keep
from megamoe.config import RunConfig, load_config
from megamoe.models.transformer_xl import TransformerXL
from megamoe.moe import mixture
from megamoe.moe.dropout import Dropout
from megamoe.moe.randomness import draw

PRESETS = ("small_enwik8", "large_enwik8")
VOCAB_SIZE = 205
Times = dict[str, float]


def medians(ways: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device) -> Times:
    """Median seconds of each way, after one round that does not count."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, action in ways.items():
            _wait_for(device)
            begin = clock()
            action()
            _wait_for(device)
            seconds[name].append(clock() - begin)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def shapes(run: RunConfig, batch_size: int) -> dict[str, tuple[int, ...]]:
    """Where a model drops, and what."""
    model, moe = run.model, run.moe
    n_tokens = batch_size * model.segment_len
    context_len = model.segment_len + model.memory_len
    return {
        "embedding, sublayers": (n_tokens, model.d_model),
        "dense hidden units": (n_tokens, model.d_inner),
        f"experts' hidden units, k = {moe.top_k}": (n_tokens * moe.top_k, moe.d_expert),
        f"experts' hidden units, k = {moe.n_experts}": (n_tokens * moe.n_experts, moe.d_expert),
        "attention probabilities": (model.n_heads * n_tokens, context_len),
    }


def alone(shape: tuple[int, ...], p: float, rounds: int, device: torch.device, dtype: torch.dtype) -> Times:
    """Forward and backward pass at one shape."""
    x = torch.rand(shape, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.rand_like(x)
    keys = draw(1, torch.arange(shape[0], device=device))
    ours = Dropout(p, "here")
    return medians(
        {
            "torch": lambda: torch.autograd.grad(dropout(x, p), x, gradient),
            "ours": lambda: torch.autograd.grad(ours(x, keys), x, gradient),
        },
        rounds, device,
    )  # fmt: skip


@contextmanager
def torch_dropout() -> Iterator[None]:
    """The model draws by torch's dropout, outside its keys, which it still makes."""

    def drop(self: Dropout, x: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        return dropout(x, self.p, self.training)

    def drop_hidden(x: torch.Tensor, keep: torch.Tensor, p: float) -> torch.Tensor:
        return dropout(x, p, inplace=True)

    nothing = patch.object(mixture, "keep_mask", lambda *_: None)
    with patch.object(Dropout, "forward", drop), nothing, patch.object(mixture, "drop_", drop_hidden):
        yield


class Step:
    """Whole training steps of a model at all its experts, always of the same batch."""

    def __init__(self, run: RunConfig, batch_size: int, device: torch.device, dtype: torch.dtype) -> None:
        config = replace(run.model, vocab_size=VOCAB_SIZE)
        self.model = TransformerXL(config, run.moe, seed=1).to(device)
        for parameter in self.model.parameters():
            parameter.data = parameter.to(dtype)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-5)
        self.rate = config.dropout
        self.dropouts = [
            module for module in self.model.modules() if isinstance(module, Dropout) and module.p > 0
        ]
        self.tokens_BS = torch.randint(VOCAB_SIZE, (batch_size, config.segment_len + 1), device=device)
        self.top_k = run.moe.n_experts
        with torch.no_grad():
            self.memory = self.model(self.tokens_BS[:, :-1]).memory

    def with_ours(self) -> None:
        """One step with our dropout."""
        output = self.model(self.tokens_BS[:, :-1], self.tokens_BS[:, 1:], self.memory, top_k=self.top_k)
        self.optimizer.zero_grad()
        output.loss_BS.mean().backward()
        self.optimizer.step()

    def with_torch(self) -> None:
        """One step with torch's dropout."""
        with torch_dropout():
            self.with_ours()

    def without(self) -> None:
        """One step without dropout."""
        for module in self.dropouts:
            module.p = 0.0
        self.with_ours()
        for module in self.dropouts:
            module.p = self.rate


def in_steps(run: RunConfig, batch_size: int, rounds: int, device: torch.device, dtype: torch.dtype) -> Times:
    """Whole steps."""
    step = Step(run, batch_size, device, dtype)
    ways = {"none": step.without, "torch": step.with_torch, "ours": step.with_ours}
    return medians(ways, rounds, device)


REPORT = """\
# Dropout drawn from tokens

{date}, `{command}`, {machine}.
{dtype}, batch of {batch_size}, p = {p}. Medians of {rounds} interleaved rounds, {clock}.

Forward and backward pass alone, ms:

| | shape | torch's | ours | ratio |
|---|---|---|---|---|
{alone}

Whole steps with all 16 experts per token, which draw most, ms:

| | no dropout | torch's | ours | ours / torch's | ours / none |
|---|---|---|---|---|---|
{steps}
"""


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    alone = [
        f"| {name} | {' x '.join(map(str, row['shape']))} | {1e3 * row['torch']:.2f}"
        f" | {1e3 * row['ours']:.2f} | {row['ours'] / row['torch']:.2f} |"
        for name, row in result["alone"].items()
    ]
    steps = [
        f"| {name} | {1e3 * row['none']:.0f} | {1e3 * row['torch']:.0f} | {1e3 * row['ours']:.0f}"
        f" | {row['ours'] / row['torch']:.3f} | {row['ours'] / row['none']:.3f} |"
        for name, row in result["steps"].items()
    ]
    return REPORT.format(**result | {"alone": "\n".join(alone), "steps": "\n".join(steps)})


def main() -> int:
    """Measure, print, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16 (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=2, help="streams of a batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default: %(default)s)")
    add_output(parser)
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    runs = {name: load_config(preset=name) for name in PRESETS}
    first = runs[PRESETS[0]]
    p = first.model.dropout
    result: dict[str, Any] = facts("benchmarks.dropout", device) | {
        "dtype": args.dtype, "batch_size": args.batch_size, "rounds": args.rounds, "p": p,
    }  # fmt: skip
    result["alone"] = {
        name: {"shape": shape} | alone(shape, p, args.rounds, device, dtype)
        for name, shape in shapes(first, args.batch_size).items()
    }
    result["steps"] = {
        name: in_steps(run, args.batch_size, args.rounds, device, dtype) for name, run in runs.items()
    }
    print(report(result))
    keep(result, report(result), args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
