"""Expert choice: experts take tokens, not tokens experts.

    p = softmax(x W^T) over experts
    expert e takes the ceil(capacity T / E) tokens of a sequence with the largest p_te, weighted by p_te

with T the length of the sequence. A token may be taken by any number of experts, on average `capacity`.
Which tokens are taken depends on later ones, so a language model with it cannot be sampled from, and its
scores are no perplexities. Tokens compete within their own sequence, which makes the choice independent of
how sequences are spread over batches and ranks.

Paper: Zhou et al., "Mixture-of-Experts with Expert Choice Routing", NeurIPS 2022, arXiv 2202.09368.
"""

from dataclasses import dataclass

import torch

from megamoe.config.schema import option, require_positive
from megamoe.moe.routers.linear import LinearRouter
from megamoe.moe.routing import RouterContext, Routing
from megamoe.moe.selection import NO_EXPERT, capacities, places, sequences


class ExpertChoiceRouter(LinearRouter):
    """Each expert takes its best tokens of each sequence."""

    summary = "experts choose their tokens; balanced, but no language model"
    paper = "Zhou et al., NeurIPS 2022, arXiv 2202.09368"
    cost = "capacity/k"
    causal = "never"

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of `ExpertChoiceRouter`."""

        capacity: float = option(2.0, "experts per token on average")

        def __post_init__(self) -> None:
            require_positive("moe.router", self, "capacity")

    options: Options

    @classmethod
    def experts_per_token(cls, top_k: int, n_experts: int) -> int:
        """Up to all."""
        return n_experts

    @classmethod
    def experts_computed(cls, options: Options, top_k: int, n_experts: int) -> float:
        """The capacity."""
        return min(options.capacity, float(n_experts))

    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """Rank the tokens of each sequence for each expert."""
        n_tokens, n_experts = x_TD.shape[0], self.spec.n_experts
        logits_TE = self.logits(x_TD)
        p_TE = logits_TE.softmax(-1)
        sequence_T, lengths_B = sequences(context, n_tokens, x_TD.device)
        capacity_B = capacities(lengths_B, self.options.capacity, 1, n_experts)
        order_TE = torch.sort(p_TE, dim=0, descending=True, stable=True).indices
        # One line for each expert and sequence, in which the tokens stand from best to worst.
        expert_E = torch.arange(n_experts, device=x_TD.device)
        line_TE = expert_E * len(lengths_B) + sequence_T[order_TE]
        place_TE = places(line_TE.t().flatten()).view(n_experts, n_tokens).t()
        place_TE = torch.empty_like(place_TE).scatter_(0, order_TE, place_TE)
        taken_TE = place_TE < capacity_B[sequence_T][:, None]
        return Routing(expert_E.where(taken_TE, NO_EXPERT), p_TE * taken_TE, logits_TE)
