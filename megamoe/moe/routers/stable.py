"""StableMoE: a router that learns for a while, is copied into one that looks at token ids alone, and freezes.

    z = x W^T,  w_j = sigmoid(z_j)  for j in S

    stage 1: S = top-k of z, while a light router learns from it:
             q = softmax(H emb[id]),  distill = mean of -ln q_e,  e = argmax z
             load = mean over tokens of sum_{j in S} (E f_j - 1) w_j,  f over the choices of all ranks
    stage 2: S = top-k of H emb[id] as it stands at step `stage_steps`, for ever; W learns on

W starts orthogonal with rows of norm 0.1. The paper takes k = 1. In stage 2 the choice is a table over the
vocabulary, kept in the checkpoint.

Paper: Dai et al., "StableMoE: Stable Routing Strategy for Mixture of Experts", ACL 2022,
arXiv 2204.08396, eqs. 3-9.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional

from megamoe.config.schema import option, require_not_negative, require_positive
from megamoe.errors import ConfigError
from megamoe.moe.losses import load_shares, token_mean
from megamoe.moe.precision import at_least_fp32
from megamoe.moe.products import Product
from megamoe.moe.routers.linear import LinearRouter
from megamoe.moe.routing import LayerSpec, RouterContext, Routing
from megamoe.moe.selection import choose


class StableRouter(LinearRouter):
    """Learned router, then a frozen table over token ids that imitates it."""

    summary = "learned at first, then frozen as a table over token ids"
    paper = "Dai et al., ACL 2022, arXiv 2204.08396"

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of `StableRouter`."""

        stage_steps: int = option(6000, "steps of stage 1")
        light_size: int = option(50, "width of the light router's token embedding")
        distill_loss: float = option(0.3, "weight of the light router's cross entropy")
        load_loss: float = option(0.3, "weight of the load loss of stage 1")

        def __post_init__(self) -> None:
            require_positive("moe.router", self, "stage_steps", "light_size")
            require_not_negative("moe.router", self, "distill_loss", "load_loss")

    options: Options
    table: torch.Tensor
    frozen: torch.Tensor

    def __init__(self, spec: LayerSpec, options: Options) -> None:
        super().__init__(spec, options)
        if not spec.vocab_size:
            raise ConfigError("model.vocab_size = 0: policy 'stable' looks tokens up; give their number")
        vocab_size, n_experts, size = spec.vocab_size, spec.n_experts, options.light_size
        self.light_embedding = nn.Parameter(spec.normal("light_embedding", (vocab_size, size), std=1.0))
        self.light_weight = nn.Parameter(spec.normal("light_weight", (n_experts, size)))
        self.register_buffer("table", torch.zeros(vocab_size, n_experts))
        self.register_buffer("frozen", torch.zeros(1))

    def initial_weight(self) -> torch.Tensor:
        """Orthogonal."""
        return self.spec.orthogonal("weight", (self.spec.n_experts, self.spec.d_model), gain=0.1)

    @classmethod
    def products(cls, options: Options, spec: LayerSpec, n_tokens: int) -> list[Product]:
        """The logits, and in stage 1, which is counted here, the light router of all tokens."""
        light = Product(spec.vocab_size, options.light_size, spec.n_experts)
        return [*super().products(options, spec, n_tokens), light]

    def forward(self, x_TD: torch.Tensor, context: RouterContext) -> Routing:
        """Choose by the stage, weigh by the learned router."""
        assert context.token_ids_T is not None, "policy 'stable' looks at RouterContext.token_ids_T"
        logits_TE, is_frozen = self.logits(x_TD), bool(self.frozen)
        choosing_TE = self.table[context.token_ids_T] if is_frozen else logits_TE
        _, ids_TK = choose(choosing_TE, context.top_k)
        routing = Routing(ids_TK, logits_TE.gather(1, ids_TK).sigmoid(), logits_TE)
        return routing if is_frozen or not self.training else self._first_stage(routing, logits_TE, context)

    def _first_stage(self, routing: Routing, logits_TE: torch.Tensor, context: RouterContext) -> Routing:
        n_experts, weights_TK = self.spec.n_experts, routing.weights_TK
        embedding_VL = at_least_fp32(self.light_embedding)
        light_VE = functional.linear(embedding_VL, at_least_fp32(self.light_weight))
        errors_T = functional.cross_entropy(
            light_VE[context.token_ids_T], logits_TE.argmax(-1), reduction="none"
        )
        shares_E = context.ranks.mean(load_shares(routing, n_experts)).to(weights_TK.dtype)
        excess_TK = (n_experts * shares_E - 1)[routing.expert_ids_TK]
        losses = {"distill": token_mean(errors_T), "load": token_mean((excess_TK * weights_TK).sum(-1))}
        # At the end of the stage, what the light router says of every token travels to `update`.
        is_last = context.step + 1 >= self.options.stage_steps
        return replace(routing, losses=losses, statistics=light_VE.detach().flatten() if is_last else None)

    def update(self, statistics_LN: torch.Tensor, step: int) -> None:
        """Freeze the light router."""
        self.table.copy_(statistics_LN[0].view_as(self.table))
        self.frozen.fill_(1)
