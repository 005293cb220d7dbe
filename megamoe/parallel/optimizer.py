"""Parameters in named groups, and the Adam that updates them.

Groups are named by what they hold: router, shared or experts, with weight decay or without. Weight
decay is for matrices; biases and norms go without.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from megamoe.config.schema import OptimizerConfig
from megamoe.moe.experts import Experts
from megamoe.moe.routing import Router
from megamoe.parallel.device import Device
from megamoe.parallel.ds_config import offloads_optimizer, uses_torch_adam

Group = dict[str, Any]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[Group]:
    """The trained parameters of `model` in groups for the optimizer, empty groups left out.

    Each group has a unique ``role`` such as "experts_decay". For DeepSpeed, a group also has a
    ``name``: the role, except that expert-parallel groups carry ``moe = True`` and the name of the
    process group that reduces them.
    """
    groups: dict[str, Group] = {}
    for part, parameter, decays in _parts(model):
        role = f"{part}_decay" if decays else f"{part}_no_decay"
        if role not in groups:
            groups[role] = {
                "role": role, "name": role, "params": [], "weight_decay": weight_decay if decays else 0.0,
            }  # fmt: skip
            if getattr(parameter, "allreduce", True) is False:
                groups[role] |= {"name": parameter.group_name, "moe": True}  # type: ignore[attr-defined]
        groups[role]["params"].append(parameter)
    return list(groups.values())


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Every trained parameter with the part of the model it belongs to, and whether it decays."""
    owner: dict[nn.Parameter, str] = {}
    undecayed: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, Router):
            undecayed.update(getattr(module, name) for name in module.undecayed)
        if isinstance(module, Router | Experts):
            part = "router" if isinstance(module, Router) else "experts"
            owner.update(dict.fromkeys(module.parameters(), part))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = owner.get(parameter, "shared")
            n_dims = parameter.dim() - (part == "experts")
            yield part, parameter, n_dims > 1 and "bias" not in name and parameter not in undecayed


def build_optimizer(
    groups: list[Group], config: OptimizerConfig, ds: Mapping[str, Any], device: Device
) -> torch.optim.Optimizer:
    """Adam: torch's fused one, DeepSpeed's for states offloaded from a GPU, or Apex's on request."""
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    decoupled = config.name == "adamw"
    if uses_torch_adam(ds, device):
        kind = torch.optim.AdamW if decoupled else torch.optim.Adam
        return kind(groups, fused=True, **settings)
    if offloads_optimizer(ds):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=decoupled, **settings)
    from apex.optimizers import FusedAdam

    return FusedAdam(groups, adam_w_mode=decoupled, **settings)
