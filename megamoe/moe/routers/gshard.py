"""GShard: the best expert, and often the second best.

    p = softmax(x W^T),  e1 = argmax p,  e2 = argmax of the rest
    w1 = p_e1 / (p_e1 + p_e2),  w2 = p_e2 / (p_e1 + p_e2)

In training the second choice is kept with probability min(1, 2 w2), and of each sequence of T tokens an
expert takes the first ceil(2 capacity_factor T / E) choices that come to it, all first choices before
all second ones, so that a second choice depends on later tokens. In evaluation both are always kept.

Its loss ``first_choice`` is E sum_e f_e P_e with f the shares of the first choices alone.

Paper: Lepikhin et al., "GShard: Scaling Giant Models with Conditional Computation and Automatic
Sharding", ICLR 2021, arXiv 2006.16668, algorithm 1.
"""

from dataclasses import dataclass

import torch

from megamoe.config.schema import option, require_not_negative
from megamoe.errors import ConfigError
from megamoe.moe.losses import balance_loss, load_shares
from megamoe.moe.routers.linear import LinearRouter
from megamoe.moe.routing import LayerSpec, RouterContext, Routing
from megamoe.moe.selection import NO_EXPERT, choose, within_capacity


class GShardRouter(LinearRouter):
    """Two experts, the second at random in training."""

    summary = "the best two experts, the second one kept at random in training"
    paper = "Lepikhin et al., ICLR 2021, arXiv 2006.16668"
    cost = "2/k"
    causal = "evaluation"

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of `GShardRouter`."""

        capacity_factor: float = option(
            1.0, "an expert's choices of a sequence in training, in units of an even share; 0: no limit"
        )
        first_choice_loss: float = option(0.01, "weight of the balance loss on first choices")

        def __post_init__(self) -> None:
            require_not_negative("moe.router", self, "capacity_factor", "first_choice_loss")

    options: Options

    def __init__(self, spec: LayerSpec, options: Options) -> None:
        if spec.n_experts < 2:
            raise ConfigError(f"moe.n_experts = {spec.n_experts}: policy 'gshard' needs 2 or more")
        super().__init__(spec, options)

    @classmethod
    def experts_per_token(cls, top_k: int, n_experts: int) -> int:
        """Two."""
        return 2

    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """Choose the best two."""
        logits_TE = self.logits(x_TD)
        top_TK, ids_TK = choose(logits_TE.softmax(-1), 2)
        weights_TK = top_TK / top_TK.sum(-1, keepdim=True)
        routing = Routing(ids_TK, weights_TK, logits_TE)
        return self._in_training(routing, logits_TE, context) if self.training else routing

    def _in_training(self, routing: Routing, logits_TE: torch.Tensor, context: RouterContext) -> Routing:
        n_experts, ids_TK, weights_TK = self.spec.n_experts, routing.expert_ids_TK, routing.weights_TK
        shares_E = context.ranks.mean(load_shares(Routing(ids_TK[:, :1], weights_TK[:, :1]), n_experts))
        losses = {"first_choice": balance_loss(logits_TE, shares_E)}
        chance_T1 = self.spec.uniform("second choice", context, 1)
        kept_TK = torch.cat(
            [torch.ones_like(chance_T1, dtype=torch.bool), chance_T1 < 2 * weights_TK[:, 1:]], 1
        )
        ids_TK, weights_TK = ids_TK.where(kept_TK, NO_EXPERT), weights_TK * kept_TK
        drawn = Routing(ids_TK, weights_TK, logits_TE, losses)
        return within_capacity(drawn, self.options.capacity_factor, context, n_experts)
