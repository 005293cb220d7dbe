"""The mixture layer whose experts are spread over ranks, in the form DeepSpeed's engine recognises."""

from collections.abc import Callable
from typing import Any

from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import nn

from megamoe.config.schema import MoEConfig
from megamoe.moe.exchange import LocalExchange
from megamoe.moe.layer import MoELayer
from megamoe.moe.routers import router_class
from megamoe.parallel.ds_config import Layout
from megamoe.parallel.exchange import AllToAllExchange


class _DeepSpeedMoE(MoE):
    """DeepSpeed's layer as a mark: the engine looks for the type; none of its parts are built."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


class ExpertParallelMoELayer(MoELayer, _DeepSpeedMoE):
    """A `MoELayer` that holds E / ep_size experts, those of place rank % ep_size in its group.

    Groups are ranks in a row, 0 to ep_size - 1 and so on. DeepSpeed reduces a parameter marked
    ``allreduce = False`` over the ranks that hold the same experts only, and divides by the world
    size, so gradients do not depend on ep_size. Rows can be exchanged once
    `set_deepspeed_parallelism` has run, which `deepspeed.initialize` or `connect_experts` calls.

    Args:
        ep_size: ranks that share one set of experts; divides E and the world size.
        rank: this process's rank in the world.
        settings: what `MoELayer` takes.

    Attributes:
        num_experts: E, by the name DeepSpeed reads.
        expert_group_name: DeepSpeed's key of the process groups of this ep_size.
    """

    def __init__(self, d_model: int, moe: MoEConfig, *, ep_size: int, rank: int, **settings: Any) -> None:
        n_local = moe.n_experts // ep_size
        first = rank % ep_size * n_local
        super().__init__(d_model, moe, local_experts=range(first, first + n_local), **settings)
        self.ep_size = ep_size
        self.num_experts = moe.n_experts
        self.expert_group_name = f"ep_size_{ep_size}"
        for parameter in self.experts.parameters() if self.experts is not None else ():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = self.expert_group_name  # type: ignore[attr-defined]

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Create the process groups where no other layer has, and exchange rows over them.

        Args:
            use_data_before_expert_parallel_: DeepSpeed's other order of ranks; always False here.
        """
        if self.expert_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(self.ep_size)
        group = groups._get_expert_parallel_group(self.expert_group_name)
        self.exchange = AllToAllExchange(group) if self.ep_size > 1 else LocalExchange()


def moe_layer_builder(layout: Layout, rank: int) -> Callable[..., MoELayer]:
    """How the model's mixture layers are built under `layout`: the `build_moe_layer` of the model.

    At ZeRO stage 3 experts are ordinary parameters, which DeepSpeed shards like all others. A policy that
    has no experts has nothing to spread.
    """
    if layout.zero_stage == 3:
        return MoELayer

    def build(d_model: int, moe: MoEConfig, **settings: Any) -> MoELayer:
        if router_class(moe.router.name).owns_feed_forward:
            return MoELayer(d_model, moe, **settings)
        return ExpertParallelMoELayer(d_model, moe, ep_size=layout.ep_size, rank=rank, **settings)

    return build


def connect_experts(model: nn.Module) -> None:
    """Let the expert-parallel layers of a model exchange rows without a DeepSpeed engine, to evaluate it."""
    for module in model.modules():
        if isinstance(module, ExpertParallelMoELayer):
            module.set_deepspeed_parallelism()
