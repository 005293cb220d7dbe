"""DeepSpeed's own mixture layer: the real package, `deepspeed.moe.layer.MoE`, at world size 1.

It pads every expert to the same number of rows, the capacity. Without drops that is the largest expert's
count; at a capacity factor of 1 it is T * K / E, and choices beyond it are dropped: another function. Its
random choice of the second expert is off, so that it routes as ours does.
"""

import io
from contextlib import redirect_stdout

import torch
from deepspeed.moe.layer import MoE
from torch import nn

from megamoe.moe.experts import Experts
from megamoe.moe.layer import MoELayer


class DeepSpeedLayer(nn.Module):
    """DeepSpeed's layer with the weights of ours, whose router must have no bias to speak of.

    Args:
        ours: the layer whose weights are taken.
        capacity_factor: None drops nothing.
    """

    def __init__(
        self, ours: MoELayer, top_k: int, dropout: float, capacity_factor: float | None = None
    ) -> None:
        super().__init__()
        assert isinstance(ours.experts, Experts)
        n_experts, d_expert, d_model = ours.experts.w_in.shape
        expert = nn.Sequential(
            nn.Linear(d_model, d_expert), nn.ReLU(), nn.Dropout(dropout), nn.Linear(d_expert, d_model)
        )
        self.moe = MoE(
            d_model, expert, n_experts, k=top_k, capacity_factor=capacity_factor or 1.0,
            drop_tokens=capacity_factor is not None, use_rts=False, top2_2nd_expert_sampling=False,
        )  # fmt: skip
        with redirect_stdout(io.StringIO()):  # it prints which groups it makes
            self.moe.set_deepspeed_parallelism()
        self._take(ours)

    @torch.no_grad()
    def _take(self, ours: MoELayer) -> None:
        stacks = dict(ours.experts.named_parameters()) if ours.experts is not None else {}
        for e, expert in enumerate(self.moe.deepspeed_moe.experts.deepspeed_experts):
            expert[0].weight.copy_(stacks["w_in"][e])
            expert[0].bias.copy_(stacks["b_in"][e])
            expert[3].weight.copy_(stacks["w_out"][e])
            expert[3].bias.copy_(stacks["b_out"][e])
        self.moe.deepspeed_moe.gate.wg.weight.copy_(ours.router.state_dict()["weight"])

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Its output, without its auxiliary loss, which is computed all the same."""
        output: torch.Tensor = self.moe(x_TD)[0]
        return output
