"""Training a model whose mixture layers are laid out as DeepSpeed's own, and saving it as DeepSpeed does.

The layer has the native names: ``deepspeed_moe.gate`` and ``deepspeed_moe.experts.deepspeed_experts.E``.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.moe.experts import Experts as NativeExperts
from deepspeed.moe.layer import MoE
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import nn

from megamoe.config.load import merge
from megamoe.config.schema import MoEConfig
from megamoe.models.feed_forward import FeedForward
from megamoe.models.transformer_xl import TransformerXL
from megamoe.moe.dropout import Dropout
from megamoe.moe.exchange import Exchange, LocalExchange
from megamoe.moe.experts import Experts
from megamoe.moe.routers import build_router
from megamoe.moe.routing import LayerSpec, RouterContext, Routing
from megamoe.parallel.exchange import AllToAllExchange
from megamoe.parallel.launch import forget_groups, read_launch, start
from tests.checkpoint.runs import VOCAB_SIZE, run_config

RUN: dict[str, Any] = {
    "model": {"dropout": 0.0}, "moe": {"layers": "0,1"}, "optimizer": {"name": "adamw", "weight_decay": 0.01},
}  # fmt: skip
BATCH, SEGMENT = 2, 6


class NativeMoE(MoE):
    """What `MoELayer` computes, from one module per expert; initial values are `MoELayer`'s."""

    def __init__(
        self, d_model: int, moe: MoEConfig, *, layer: int, seed: int, dropout: float, init_std: float,
        ep_size: int, rank: int, **sizes: Any,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.use_residual = self.enable_expert_tensor_parallelism = False
        self.ep_size, self.num_experts = ep_size, moe.n_experts
        self.num_local_experts = moe.n_experts // ep_size
        self.expert_group_name = f"ep_size_{ep_size}"
        first = rank % ep_size * self.num_local_experts
        values = Experts(
            moe.n_experts, d_model, moe.d_expert, dropout=dropout, init_std=init_std, seed=seed, layer=layer,
            local=range(first, first + self.num_local_experts),
        )  # fmt: skip
        experts = NativeExperts(
            FeedForward(d_model, moe.d_expert, Dropout(dropout, "unused")),
            self.num_local_experts,
            self.expert_group_name,
        )
        with torch.no_grad():
            for local, expert in enumerate(experts.deepspeed_experts):
                for name, parameter in expert.named_parameters():
                    parameter.copy_(getattr(values, name)[local])
        spec = LayerSpec(d_model=d_model, n_experts=moe.n_experts, layer=layer, seed=seed, init_std=init_std)
        router = build_router(moe.router, spec)
        self.deepspeed_moe = _Parts(router, experts)

    @property
    def router(self) -> Any:
        return self.deepspeed_moe.gate

    def forward(self, x_BSD: torch.Tensor, context: RouterContext) -> tuple[torch.Tensor, Routing]:
        parts = self.deepspeed_moe
        x_TD = x_BSD.flatten(0, -2)
        routing = parts.gate(x_TD, context)
        sent = parts.exchange.dispatch(
            x_TD, routing.expert_ids_TK, routing.weights_TK, self.num_experts, None
        )
        y_ND = torch.zeros_like(sent.x_ND, dtype=torch.float32)
        for e, expert in enumerate(parts.experts.deepspeed_experts):
            chosen = sent.expert_P == e
            tokens = sent.token_P[chosen]
            y_ND = y_ND.index_add(0, tokens, expert(sent.x_ND[tokens]) * sent.weights_P[chosen, None])
        return parts.exchange.bring_home(y_ND.to(x_TD.dtype), sent).view_as(x_BSD), routing


class _Parts(nn.Module):
    def __init__(self, gate: nn.Module, experts: NativeExperts) -> None:
        super().__init__()
        self.gate, self.experts = gate, experts
        self.exchange: Exchange = LocalExchange()

    def _set_ep_group(self, group: Any) -> None:
        self.exchange = AllToAllExchange(group)


class NativeRun:
    """A DeepSpeed engine around `TransformerXL` with native layers."""

    def __init__(self, ep_size: int, ds: dict[str, Any], **updates: Any) -> None:
        forget_groups()
        self.world = start(read_launch())
        run = run_config(**merge(RUN, updates))
        self.run = replace(run, model=replace(run.model, vocab_size=VOCAB_SIZE))
        self.ep_size = ep_size
        layer = partial(NativeMoE, ep_size=ep_size, rank=self.world.rank)
        model = TransformerXL(
            self.run.model, self.run.moe, seed=self.run.training.seed, build_moe_layer=layer  # type: ignore[arg-type]
        )  # fmt: skip
        adam = {"lr": 1e-2, "weight_decay": 0.01, "torch_adam": True}
        settings = {
            "train_micro_batch_size_per_gpu": BATCH, "gradient_clipping": self.run.training.grad_clip,
            "optimizer": {"type": "AdamW", "params": adam},
        }  # fmt: skip
        self.engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            config=settings | ds,
        )

    def loss(self, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(10 * step + self.world.rank)
        tokens_BS = torch.randint(VOCAB_SIZE, (BATCH, SEGMENT + 1), generator=generator)
        return self.engine(tokens_BS[:, :-1], tokens_BS[:, 1:], top_k=2).loss_BS.mean()

    def train(self, n_steps: int) -> list[float]:
        losses = []
        for _ in range(n_steps):
            loss = self.loss(self.engine.global_steps)
            self.engine.backward(loss)
            self.engine.step()
            losses.append(loss.item())
        return losses

    def save(self, folder: Path) -> None:
        """Save as DeepSpeed does; beside it config.json, and what each rank holds as ``live-RANK.pt``."""
        self.engine.save_checkpoint(str(folder), tag="saved")
        torch.save(self.live(), folder / f"live-{self.world.rank}.pt")
        if self.world.is_main:
            (folder / "config.json").write_text(json.dumps(self.run.to_dict()))

    def load(self, folder: Path, **options: Any) -> None:
        path, _ = self.engine.load_checkpoint(str(folder), **options)
        assert path is not None

    def live(self) -> dict[tuple[str, str], torch.Tensor]:
        """By kind and native name with global ids: what this rank trains and keeps."""
        optimizer = self.engine.optimizer
        if not self.engine.zero_optimization_stage():
            return self._unpartitioned()
        if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()
        held = {}
        for name, parameter in self.engine.module.named_parameters():
            name = self.globalise(name)
            held["weight", name] = safe_get_full_fp32_param(parameter).clone()
            for kind in ("exp_avg", "exp_avg_sq"):
                held[kind, name] = safe_get_full_optimizer_state(parameter, kind).clone()
        return held | self._buffers()

    def _unpartitioned(self) -> dict[tuple[str, str], torch.Tensor]:
        """The same at ZeRO stage 0, where the optimizer holds whole tensors."""
        optimizer = self.engine.optimizer
        masters = {parameter: parameter for parameter in self.engine.module.parameters()}
        for trained, fp32 in zip(
            getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=True
        ):
            masters |= dict(zip(trained, fp32, strict=True))
        held = {}
        for name, parameter in self.engine.module.named_parameters():
            name, master = self.globalise(name), masters[parameter]
            state = self.engine.basic_optimizer.state[master]
            held["weight", name] = master.detach().clone()
            held |= {(kind, name): state[kind].clone() for kind in ("exp_avg", "exp_avg_sq")}
        return held | self._buffers()

    def _buffers(self) -> dict[tuple[str, str], torch.Tensor]:
        return {("buffer", name): buffer for name, buffer in self.engine.module.named_buffers()}

    def globalise(self, name: str) -> str:
        before, found, after = name.partition(".deepspeed_experts.")
        if not found:
            return name
        local, rest = after.split(".", 1)
        n_local = self.run.moe.n_experts // self.ep_size
        return f"{before}{found}{int(local) + self.world.rank % self.ep_size * n_local}.{rest}"
