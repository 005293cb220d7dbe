"""The centre of the experts of a layer, hidden units in the best order.

    minimise over M and permutations P_e   (1/E) sum_e ||P_e W_e - M||^2

M is the free-support Wasserstein barycenter of the experts, each the uniform measure on its rows, and the
objective F times their mean squared distance to it. It is found by turns: with M fixed every P_e is an
assignment, solved exactly, and with the P_e fixed M is a mean. Neither raises the objective, and there are
finitely many permutations; which minimum is reached depends on the start.

Paper: Ai et al., "ResMoE", KDD 2025, arXiv 2503.06881, section 3.1. The solver is not the paper's, which is
approximate.

Shapes: E experts, F hidden units, C numbers of a unit.
"""

from dataclasses import dataclass

import torch

from megamoe.convert.alignment import align

_TOLERANCE = 1e-9
"""Share of the first objective below which a drop ends the search."""


@dataclass(frozen=True)
class Barycenter:
    """A local minimum.

    Attributes:
        centre_FC: M, float64.
        orders_EF: the permutations: unit orders_EF[e, f] of expert e stands at f.
        objectives: after each round, never rising; the last is that of this minimum.
    """

    centre_FC: torch.Tensor
    orders_EF: torch.Tensor
    objectives: tuple[float, ...]


def barycenter(experts_EFC: torch.Tensor, n_starts: int) -> Barycenter:
    """The lowest of the minima reached from `n_starts` starts, so never above the plain mean.

    The starts are the plain mean of the experts as they are, then the first experts.
    """
    starts = [experts_EFC.mean(0), *experts_EFC[: n_starts - 1]]
    return min((alternate(experts_EFC, start) for start in starts), key=lambda found: found.objectives[-1])


def alternate(experts_EFC: torch.Tensor, centre_FC: torch.Tensor) -> Barycenter:
    """The minimum that is reached from one start."""
    orders_EF = torch.full(experts_EFC.shape[:2], -1)
    objectives: list[float] = []
    while True:
        previous_EF = orders_EF
        orders_EF = torch.stack([align(expert_FC, centre_FC) for expert_FC in experts_EFC])
        aligned_EFC = reordered(experts_EFC, orders_EF)
        centre_FC = aligned_EFC.mean(0)
        objectives.append(float((aligned_EFC - centre_FC).square().sum()) / len(experts_EFC))
        drop = objectives[-2] - objectives[-1] if len(objectives) > 1 else objectives[0]
        if torch.equal(orders_EF, previous_EF) or drop <= _TOLERANCE * objectives[0]:
            return Barycenter(centre_FC, orders_EF, tuple(objectives))


def reordered(experts_EFC: torch.Tensor, orders_EF: torch.Tensor) -> torch.Tensor:
    """The experts with their units in these orders."""
    return experts_EFC.gather(1, orders_EF[:, :, None].expand_as(experts_EFC))
