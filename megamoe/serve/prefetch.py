"""A predictor beside the model: what it expects of the next tokens is loaded ahead, or replaces the router.

Shapes besides the common ones: L mixture layers.
"""

from collections import deque
from collections.abc import Sequence

import torch
from torch import nn

from megamoe.models.transformer_xl import TransformerXL
from megamoe.moe.routing import Mixture, RouterContext, Routing
from megamoe.moe.selection import top_k_softmax
from megamoe.serve.predictor import Predictor, PredictorState
from megamoe.serve.slots import ExpertSlots


class Prefetcher:
    """Reads what the model is about to read, and announces the experts that it will need.

    Args:
        predictor: of the model.
        model: whose embedding both read.
        slots: of its mixture layers, from below; none announces nothing.
        top_k: experts per token.
        state: what was read before.
    """

    def __init__(
        self,
        predictor: Predictor,
        model: TransformerXL,
        slots: Sequence[ExpertSlots],
        top_k: int,
        state: PredictorState | None = None,
    ) -> None:
        self.predictor, self.model, self.slots, self.top_k, self.state = predictor, model, slots, top_k, state

    @torch.no_grad()
    def read(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """Tokens that the model reads in the call after those already announced.

        Returns:
            scores [L, T, E].
        """
        logits_BSLE, self.state = self.predictor(self.model.embedding(ids_BS), self.state)
        logits_LTE = logits_BSLE.flatten(0, 1).transpose(0, 1)
        for slots, logits_TE in zip(self.slots, logits_LTE, strict=False):
            slots.expect(rank_experts(logits_TE, self.top_k))
        return logits_LTE


def rank_experts(logits_TE: torch.Tensor, top_k: int) -> list[int]:
    """Experts among the k best of any token, by the sum of their probabilities there, the largest first."""
    p_TK, ids_TK = logits_TE.softmax(-1).topk(min(top_k, logits_TE.shape[1]))
    wanted_E = p_TK.new_zeros(logits_TE.shape[1]).scatter_add(0, ids_TK.flatten(), p_TK.flatten())
    order_E = wanted_E.argsort(descending=True)
    return order_E[: int((wanted_E > 0).sum())].tolist()


class PredictedRouter(nn.Module):
    """SiDA's replacement of a router: the k best guesses of the predictor, weighted by the softmax over them.

    That is what HyperRouter and SMoE do with their own scores. It changes what the model says.

    Paper: Du et al., MLSys 2024, arXiv 2310.18859, section 3.4.
    """

    def __init__(self) -> None:
        super().__init__()
        self.upcoming: deque[torch.Tensor] = deque()

    def mix(
        self, x_TD: torch.Tensor, context: RouterContext, mixture: Mixture
    ) -> tuple[torch.Tensor, Routing]:
        """As `Router.mix`, from the scores of the call that comes first in `upcoming`."""
        routing = top_k_softmax(self.upcoming.popleft(), context.top_k)
        return mixture.combine(x_TD, routing.expert_ids_TK, routing.weights_TK), routing
