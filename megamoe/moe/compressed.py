"""The experts of one mixture layer, computed from a compressed form; for evaluation.

Expert e has the design matrix (see `megamoe.moe.neurons`) M + D_e: a centre M that all share, or none,
and a coded residual D_e. Centre and residual are never two networks whose outputs are added: the ReLU
stands between w_in and w_out of their sum.

Paper: Ai et al., "ResMoE", KDD 2025, arXiv 2503.06881.

Shapes: E experts, F hidden units, D model width, C = 2 D + 1, R rank; N tokens, P choices, n choices of one
expert.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear

from megamoe.moe.codings import Coding, LowRank
from megamoe.moe.dropout import Dropout
from megamoe.moe.exchange import Arrived
from megamoe.moe.mixture import Weights
from megamoe.moe.neurons import split
from megamoe.moe.precision import at_least_fp32


class Compressed(NamedTuple):
    """The experts of a layer.

    Attributes:
        centre_FC: M; None where there is none.
        coding: the residuals D_e.
        b_out_ED: the output biases, which are not compressed; equal for experts that share their matrix.
    """

    centre_FC: torch.Tensor | None
    coding: Coding
    b_out_ED: torch.Tensor

    def weights(self) -> Weights:
        """The restored weights of all experts, stacked."""
        experts = range(len(self.b_out_ED))
        designs_EFC = torch.stack([restored(self.centre_FC, self.coding, expert) for expert in experts])
        w_in_EFD, b_in_EF, w_out_EDF = (part.contiguous() for part in split(designs_EFC))
        return Weights(w_in_EFD, b_in_EF, w_out_EDF, self.b_out_ED)


class CompressedExperts(nn.Module, ABC):
    """Stands in a `MoELayer` where `megamoe.moe.experts.Experts` would; arguments as `Compressed`."""

    centre: torch.Tensor | None

    def __init__(self, centre_FC: torch.Tensor | None, coding: Coding, b_out_ED: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("centre", centre_FC, persistent=False)
        self.coding = coding
        self.b_out = nn.Parameter(b_out_ED)
        self.dropout = Dropout(0.0, "")

    @abstractmethod
    def one(self, expert: int, x_nD: torch.Tensor) -> torch.Tensor:
        """The outputs [n, D] of an expert for any tokens."""

    def forward(self, arrived: Arrived) -> torch.Tensor:
        """The weighted sum of the experts' outputs for each token, [N, D]; see `Experts.forward`.

        Choices of one token that come to the same matrix are computed once, with the sum of their weights.
        """
        assert arrived.weights_P is not None and not self.training
        n_experts = len(self.b_out)
        chosen_P = arrived.expert_P < n_experts
        expert_P, token_P = self.coding.same_as(arrived.expert_P[chosen_P]), arrived.token_P[chosen_P]
        pair_Q, place_P = (token_P * n_experts + expert_P).unique(return_inverse=True)
        weights_P = arrived.weights_P[chosen_P]
        weights_Q = weights_P.new_zeros(len(pair_Q)).index_add_(0, place_P, weights_P)
        y_ND = torch.zeros_like(arrived.x_ND, dtype=weights_Q.dtype)
        for expert, places_n in _by_expert(pair_Q % n_experts, n_experts):
            token_n = pair_Q[places_n] // n_experts
            y_nD = self.one(expert, arrived.x_ND[token_n])
            y_ND.index_add_(0, token_n, y_nD * weights_Q[places_n, None])
        return y_ND.to(arrived.x_ND.dtype)

    def outputs(self, arrived: Arrived) -> torch.Tensor:
        """The output for each choice, [P, D]; zero where it names no expert."""
        rows_PD = arrived.x_ND.new_zeros(len(arrived.expert_P), arrived.x_ND.shape[1])
        for expert, places_n in _by_expert(arrived.expert_P, len(self.b_out)):
            rows_PD[places_n] = self.one(expert, arrived.x_ND[arrived.token_P[places_n]])
        return rows_PD

    def responses(self, x_ND: torch.Tensor, response: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """`response` of every expert's output for every token, [N, E] fp32; see `Experts.responses`."""
        scores = [response(at_least_fp32(self.one(expert, x_ND))) for expert in range(len(self.b_out))]
        return torch.stack(scores, dim=1)


class OnTheFlyExperts(CompressedExperts):
    """Restores the weights of an expert when it is used, and forgets them."""

    def one(self, expert: int, x_nD: torch.Tensor) -> torch.Tensor:
        """The network of the restored weights."""
        w_in_FD, b_in_F, w_out_DF = split(restored(self.centre, self.coding, expert))
        return linear(linear(x_nD, w_in_FD, b_in_F).relu_(), w_out_DF, self.b_out[expert])


class FactoredExperts(CompressedExperts):
    """Never builds the weights of an expert. With D_e = A B and B = [B1 | b | B2] by columns,

        h = relu(x W1^T + b1 + (x B1^T + b^T) A^T)
        y = h W2^T + (h A) B2 + b2

    where W1, b1 and W2 are those of the centre and b2 is the expert's.

    Args:
        coding: of low rank.
    """

    coding: LowRank

    def one(self, expert: int, x_nD: torch.Tensor) -> torch.Tensor:
        """The centre's network with products of rank R beside each of its own, inside the ReLU."""
        left_FR, right_RC = self.coding.left[expert], self.coding.right[expert]
        w_in_RD, b_in_R, w_out_DR = split(right_RC)
        centre = None if self.centre is None else split(self.centre)
        hidden_nF = linear(linear(x_nD, w_in_RD, b_in_R), left_FR)
        if centre is not None:
            hidden_nF += linear(x_nD, centre[0], centre[1])
        hidden_nF.relu_()
        y_nD = linear(linear(hidden_nF, left_FR.t()), w_out_DR, self.b_out[expert])
        return y_nD if centre is None else y_nD.add_(linear(hidden_nF, centre[2]))


def restored(centre_FC: torch.Tensor | None, coding: Coding, expert: int) -> torch.Tensor:
    """The design matrix [F, C] of an expert."""
    matrix_FC = coding.matrix(expert)
    return matrix_FC if centre_FC is None else centre_FC + matrix_FC


def _by_expert(expert_P: torch.Tensor, n_experts: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Each expert that is chosen, and the places of its choices; those of none are left out."""
    for expert in expert_P.unique().tolist():
        if expert < n_experts:
            yield expert, (expert_P == expert).nonzero().flatten()
