"""megamoe itself, by the contracts that models and training use.

Shapes: T tokens, B batch, C context, D model width.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

from megamoe import kernels
from megamoe.config import RunConfig
from megamoe.config.schema import MoEConfig, RouterConfig
from megamoe.models.attention import (
    AttentionInputs,
    AttentionSpan,
    RelativeAttention,
    encode_distances,
    hide_keys,
)
from megamoe.models.transformer_xl import TransformerXL
from megamoe.moe.auxiliary import auxiliary_loss
from megamoe.moe.dropout import Dropout
from megamoe.moe.layer import MoELayer
from megamoe.moe.randomness import token_keys
from megamoe.moe.routing import RouterContext
from megamoe.moe.updates import update_routers
from megamoe.parallel.device import Device
from megamoe.parallel.ds_config import resolve_ds_config
from megamoe.parallel.engine import Engine
from megamoe.parallel.launch import World, read_launch, start

Memory = tuple[torch.Tensor, ...]


def ds_config(stage: int, dtype: str) -> dict[str, Any]:
    """A DeepSpeed config of a ZeRO stage and a precision."""
    return {"zero_optimization": {"stage": stage}, "bf16": {"enabled": dtype == "bf16"}}


def one_rank() -> World:
    """This process as the only rank of a group, or as one of those that it is started as."""
    return start(read_launch())


def with_kernels(work: Callable[..., object]) -> Callable[..., object]:
    """`work` with the compiled kernels, which nothing else uses."""

    def run(*inputs: Any) -> object:
        kernels.use(compiled=True)
        try:
            return work(*inputs)
        finally:
            kernels.use(compiled=False)

    return run


class OurLayer(nn.Module):
    """`MoELayer` under a learned linear router, for tokens of one sequence."""

    def __init__(self, run: RunConfig, top_k: int, dropout: float) -> None:
        super().__init__()
        moe = MoEConfig(
            n_experts=run.moe.n_experts,
            d_expert=run.moe.d_expert,
            top_k=top_k,
            router=RouterConfig(name="smoe"),
        )
        self.moe = MoELayer(run.model.d_model, moe, layer=0, seed=1, dropout=dropout, init_std=0.02)
        self.top_k, self.passes = top_k, 0

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """[T, D]; every pass in training draws other dropout."""
        self.passes += 1
        keys_BS = token_keys(1, self.passes, range(1), len(x_TD)) if self.training else None
        context = RouterContext(
            step=self.passes, seed=1, top_k=self.top_k,
            token_keys_T=None if keys_BS is None else keys_BS.flatten(),
        )  # fmt: skip
        output: torch.Tensor = self.moe(x_TD[None], context)[0]
        return output[0]


class OurAttention(nn.Module):
    """`RelativeAttention` with what all layers share."""

    def __init__(self, run: RunConfig, dtype: torch.dtype) -> None:
        super().__init__()
        model = run.model
        self.attention = RelativeAttention(
            model.d_model, model.n_heads, model.d_head, Dropout(0.0, "attention")
        )
        for parameter in self.attention.parameters():
            nn.init.normal_(parameter, std=0.1)
        self.bias_u = nn.Parameter(0.1 * torch.randn(model.n_heads, model.d_head))
        self.bias_v = nn.Parameter(0.1 * torch.randn(model.n_heads, model.d_head))
        context_len = model.segment_len + model.memory_len
        self.distances_PD = encode_distances(context_len, model.d_model, 0, like=torch.empty(0, dtype=dtype))
        self.hidden_SC = hide_keys(
            model.segment_len, context_len, AttentionSpan(model.memory_len), torch.device("cpu")
        )

    def forward(self, context_BCD: torch.Tensor) -> torch.Tensor:
        """Attend from the last S positions, [B, S, D]."""
        inputs = AttentionInputs(
            self.distances_PD, self.hidden_SC, self.bias_u, self.bias_v, hides_later_only=True
        )
        output: torch.Tensor = self.attention(context_BCD, inputs)
        return output


class OurTraining:
    """Training steps under megamoe's engine, as its trainer does them, within a ``with`` block."""

    def __init__(self, run: RunConfig, top_k: int, world: World, stage: int = 1, dtype: str = "fp32") -> None:
        self.run, self.top_k, self.world = run, top_k, world
        resolved = resolve_ds_config(run, ds_config(stage, dtype), world.world_size, Device.detect())
        self.engine = Engine(run, resolved, world, run.model.vocab_size)
        self.memory: Memory | None = None
        self.steps = 0

    def step(self, tokens_BN: torch.Tensor) -> float:
        """One step on [B, S + 1] tokens of the global batch; the loss of this rank's rows."""
        engine, rows = self.engine, self.engine.micro_batch_rows(0)
        mine_BN = tokens_BN[rows.start : rows.stop]
        output = engine.forward(
            mine_BN[:, :-1], mine_BN[:, 1:], self.memory, top_k=self.top_k, step=self.steps, rows=rows
        )
        self.memory = output.memory
        loss = output.loss_BS.mean()
        auxiliary, _ = auxiliary_loss(output.routings, self.run.moe, self.world.mean)
        engine.backward(loss + auxiliary)
        engine.step()
        routers = [layer.router for layer in engine.model.moe_layers]
        update_routers(routers, [output.routings], self.world, self.steps)
        self.steps += 1
        return float(loss.detach())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.engine.close()


class PlainTraining:
    """The same model in a plain torch loop with the same fused Adam and clipping, in fp32."""

    def __init__(self, run: RunConfig, top_k: int) -> None:
        self.clip, self.top_k = run.training.grad_clip, top_k
        self.model = TransformerXL(run.model, run.moe, seed=run.training.seed)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=run.optimizer.lr, fused=True)
        self.memory: Memory | None = None
        self.steps = 0

    def step(self, tokens_BN: torch.Tensor) -> float:
        """One step on [B, S + 1] tokens; its loss."""
        self.optimizer.zero_grad()
        output = self.model(
            tokens_BN[:, :-1], tokens_BN[:, 1:], self.memory, top_k=self.top_k, step=self.steps
        )
        self.memory = output.memory
        loss: torch.Tensor = output.loss_BS.mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.steps += 1
        return float(loss.detach())
