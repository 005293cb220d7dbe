"""S-BASE: experts are chosen from a balanced transport plan in training.

    z = x W^T,  r_te = exp(z_te + a_t + b_e),  with a and b found by Sinkhorn's iteration
        b_e = ln(T / E) - ln sum_t exp(z_te + a_t),  a_t = -ln sum_e exp(z_te + b_e)
    training: S = top-k of r,  evaluation: S = top-k of z
    w_j = sigmoid(z_j)  for j in S

so in r every token gives 1 and every expert gets T / E. T are the tokens of one sequence: the choice does
not depend on how sequences are spread over batches and ranks. The weights are not made to sum to 1.

Paper: Clark et al., "Unified Scaling Laws for Routed Language Models", ICML 2022, arXiv 2202.01169,
appendix B.
"""

from dataclasses import dataclass

import torch

from megamoe.config.schema import option, require_positive
from megamoe.moe.routers.linear import LinearRouter
from megamoe.moe.routing import RouterContext, Routing
from megamoe.moe.selection import choose, sequences


class SinkhornRouter(LinearRouter):
    """Sigmoid weights, choices balanced in training by Sinkhorn's iteration."""

    summary = "sigmoid weights, choices balanced in training by optimal transport"
    paper = "Clark et al., ICML 2022, arXiv 2202.01169"
    causal = "evaluation"

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of `SinkhornRouter`."""

        iterations: int = option(10, "of Sinkhorn's algorithm")

        def __post_init__(self) -> None:
            require_positive("moe.router", self, "iterations")

    options: Options

    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """Choose from the transport plan in training, from the logits in evaluation."""
        logits_TE = self.logits(x_TD)
        scores_TE = logits_TE.detach()
        if self.training:
            sequence_T, lengths_B = sequences(context, len(x_TD), x_TD.device)
            scores_TE = balanced(scores_TE, sequence_T, lengths_B, self.options.iterations)
        _, ids_TK = choose(scores_TE, context.top_k)
        return Routing(ids_TK, logits_TE.gather(1, ids_TK).sigmoid(), logits_TE)


def balanced(
    scores_TE: torch.Tensor, sequence_T: torch.Tensor, lengths_B: torch.Tensor, iterations: int
) -> torch.Tensor:
    """z + b [T, E], which orders the experts of a token as the transport plan of its sequence does."""
    n_experts = scores_TE.shape[1]
    share_B1 = (lengths_B.to(scores_TE.dtype) / n_experts).log()[:, None]
    a_T1 = torch.zeros_like(scores_TE[:, :1])
    b_BE = scores_TE.new_zeros(len(lengths_B), n_experts)
    for _ in range(iterations):
        b_BE = share_B1 - _logsumexp_by_sequence(scores_TE + a_T1, sequence_T, len(lengths_B))
        a_T1 = -(scores_TE + b_BE[sequence_T]).logsumexp(-1, keepdim=True)
    return scores_TE + b_BE[sequence_T]


def _logsumexp_by_sequence(
    values_TE: torch.Tensor, sequence_T: torch.Tensor, n_sequences: int
) -> torch.Tensor:
    """ln sum exp over the tokens of each sequence, [B, E]."""
    index_TE = sequence_T[:, None].expand_as(values_TE)
    lowest_BE = values_TE.new_full((n_sequences, values_TE.shape[1]), -torch.inf)
    largest_BE = lowest_BE.scatter_reduce(0, index_TE, values_TE, "amax")
    powers_TE = (values_TE - largest_BE[sequence_T]).exp()
    return torch.zeros_like(largest_BE).index_add(0, sequence_T, powers_TE).log() + largest_BE
