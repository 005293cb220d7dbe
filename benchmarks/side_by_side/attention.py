"""Relative attention with its projections, forward and backward.

Shapes: B batch, S segment, M memory, C = M + S, D model width.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import nn

from benchmarks.side_by_side import products
from benchmarks.side_by_side.ours import OurAttention, one_rank, with_kernels
from benchmarks.side_by_side.peers.classic_attention import ClassicAttention, PlainAttention
from benchmarks.side_by_side.sizes import Sizes
from benchmarks.side_by_side.timing import DTYPES, Case, Way, cast, clock_of, deviation, forget_gradients
from megamoe.config import RunConfig
from megamoe.moe.initialization import normal

SECTION = "attention"
OURS, CLASSIC, PLAIN = "ours", "classic form", "SDPA without distances"
COMPILED = "ours, compiled kernels"
FLOOR = "bare products"
PROJECTIONS, CLASSIC_PROJECTIONS = "projections alone", "projections of the classic form"
MOST = {"fp32": 1e-5, "bf16": 3e-2}


class Classic(nn.Module):
    """The classic form with the weights of ours; batch and time change places outside the measured call."""

    def __init__(self, run: RunConfig, ours: OurAttention) -> None:
        super().__init__()
        model = run.model
        self.attention = ClassicAttention(model.d_model, model.n_heads, model.d_head)
        self.attention.load_state_dict(ours.attention.state_dict())
        self.bias_u, self.bias_v = nn.Parameter(ours.bias_u.detach()), nn.Parameter(ours.bias_v.detach())
        # Ours has one more distance in front.
        self.distances_CD = ours.distances_PD[1:]
        self.hidden_SC = ours.hidden_SC

    def forward(self, context_CBD: torch.Tensor) -> torch.Tensor:
        """[S, B, D]."""
        output: torch.Tensor = self.attention(
            context_CBD, self.distances_CD, self.hidden_SC, self.bias_u, self.bias_v
        )
        return output


class Plain(nn.Module):
    """`PlainAttention` under the same mask."""

    def __init__(self, run: RunConfig, ours: OurAttention) -> None:
        super().__init__()
        model = run.model
        self.attention = PlainAttention(model.d_model, model.n_heads, model.d_head)
        self.hidden_SC = ours.hidden_SC

    def forward(self, context_BCD: torch.Tensor) -> torch.Tensor:
        """[B, S, D]."""
        output: torch.Tensor = self.attention(context_BCD, self.hidden_SC)
        return output


def ways_of(run: RunConfig, dtype: torch.dtype) -> dict[str, nn.Module]:
    """All forms of the attention, by name."""
    ours = OurAttention(run, dtype)
    found = {OURS: ours, CLASSIC: Classic(run, ours), PLAIN: Plain(run, ours)}
    return {name: cast(form, dtype) for name, form in found.items()}


def draw(run: RunConfig, batch: int, way: str, number: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Memory [B, M, D] and segment [B, S, D] of call `number`; time comes first for the classic form."""
    model = run.model
    parts = [
        normal((batch, length, model.d_model), 1.0, number, way, length, i).to(dtype)
        for i, length in enumerate((model.memory_len, model.segment_len))
    ]
    return [x.transpose(0, 1).contiguous() for x in parts] if way == CLASSIC else parts


def way_of(name: str, form: nn.Module, make: Callable[[int], list[torch.Tensor]]) -> Way:
    """Forward and backward pass; memory gets no gradient."""

    def fresh(number: int) -> tuple[torch.Tensor, ...]:
        forget_gradients(form)
        memory, x = make(number)
        return memory, x.requires_grad_(), torch.ones_like(x) / x.numel()

    def run(memory: torch.Tensor, x: torch.Tensor, gradient: torch.Tensor) -> None:
        form(torch.cat([memory, x], dim=0 if name == CLASSIC else 1)).backward(gradient)

    return Way(name, run, fresh)


@torch.no_grad()
def agreement(ways: dict[str, nn.Module], context_BCD: torch.Tensor, dtype: str) -> dict[str, float]:
    """How far the classic form deviates from ours."""
    classic = ways[CLASSIC](context_BCD.transpose(0, 1).contiguous()).transpose(0, 1)
    return {CLASSIC: deviation(classic, ways[OURS](context_BCD), MOST[dtype], CLASSIC)}


def measure(sizes: Sizes, threads: int) -> Iterator[Case]:
    """fp32 and bf16."""
    one_rank()  # with its settings of the allocator, for all alike
    run, batch = sizes.small.run(), sizes.attention_batch
    for name, dtype in DTYPES.items():
        forms = ways_of(run, dtype)
        found = agreement(forms, torch.cat(draw(run, batch, OURS, -1, dtype), dim=1), name)

        def make(way: str, dtype: torch.dtype = dtype) -> Callable[[int], list[torch.Tensor]]:
            return lambda number: draw(run, batch, way, number, dtype)

        ways = [way_of(way, form, make(way)) for way, form in forms.items()]
        compiled = way_of(COMPILED, forms[OURS], make(COMPILED))
        ways.append(replace(compiled, run=with_kernels(compiled.run)))
        bare = {
            FLOOR: [*products.projections(run, batch), *products.attention(run, batch)],
            PROJECTIONS: products.projections(run, batch),
            CLASSIC_PROJECTIONS: products.projections(run, batch, queries_of_memory=True),
        }
        ways += [Way(way, products.Products(shapes, dtype)) for way, shapes in bare.items()]
        settings = {"batch": batch, "dtype": name, "threads": threads}
        yield Case(SECTION, settings, sizes.turns.take(ways, clock_of(threads)), agreement=found)
