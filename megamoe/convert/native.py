"""DeepSpeed's native layout of a model with mixture layers: names of tensors and files.

| neutral                       | native                                                        |
|-------------------------------|---------------------------------------------------------------|
| ``PATH.experts.LEAF[e]``      | ``PATH.deepspeed_moe.experts.deepspeed_experts.e.LEAF``       |
| ``PATH.router.REST``          | ``PATH.deepspeed_moe.gate.REST``                              |
| everything else               | the same name                                                 |

Experts are counted over all ranks in the files of weights, and from 0 on each rank in optimizer shards.
"""

import re

LATEST = "latest"
"""File that names the newest tag, which is the folder with the files."""
MODEL_FILE = "mp_rank_00_model_states.pt"
PARTITIONED_FILE = "zero_pp_rank_0_mp_rank_00_model_states.pt"
"""What rank 0 writes instead at ZeRO stage 3."""
OURS = "megamoe"
"""Key in the model file under which `to-deepspeed` puts config, state and memory."""

_EXPERT = re.compile(r"(.+)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d{1,9})\.(.+)")
_EXPERT_FILE = re.compile(r"layer_(\d{1,9})_expert_(\d{1,9})_mp_rank_00_model_states\.pt")


def expert_file(layer: int, expert: int) -> str:
    """File of one expert; `layer` counts mixture layers only."""
    return f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt"


def parse_expert_file(name: str) -> tuple[int, int] | None:
    """Mixture layer and expert of a file's name, or None for other files."""
    match = _EXPERT_FILE.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def shard_file(rank: int, *, bf16: bool) -> str:
    """File of the optimizer shard of a rank."""
    return f"{'bf16_' if bf16 else ''}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def expert_name(path: str, expert: int, leaf: str) -> str:
    """Native name of tensor `leaf` of an expert of the mixture layer at `path`."""
    return f"{path}.deepspeed_moe.experts.deepspeed_experts.{expert}.{leaf}"


def parse_expert(name: str) -> tuple[str, int, str] | None:
    """Path, expert and leaf of a native name, or None if it is not of an expert."""
    match = _EXPERT.fullmatch(name)
    return (match[1], int(match[2]), match[3]) if match else None


def native_name(name: str) -> str:
    """Native name of a neutral tensor that is not of experts."""
    return name.replace(".moe.router.", ".moe.deepspeed_moe.gate.")


def neutral_name(name: str) -> str:
    """Neutral name of a native tensor that is not of an expert."""
    return name.replace(".deepspeed_moe.gate.", ".router.")
