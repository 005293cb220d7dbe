"""What the device of this machine can compute with."""

import importlib
import platform
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Device:
    """The accelerator a run would use here.

    Attributes:
        kind: "cuda" where a GPU is visible, else "cpu".
        bf16: bfloat16 arithmetic in hardware.
        fp16: float16 arithmetic in hardware; few CPUs have it.
        apex: NVIDIA Apex's FusedAdam can be imported. It is looked for by its own names, since the
            package called apex on the index is something else.
    """

    kind: Literal["cpu", "cuda"]
    bf16: bool
    fp16: bool
    apex: bool = False

    @classmethod
    def detect(cls) -> "Device":
        """The device of this process."""
        return cls.of("cuda" if torch.cuda.is_available() else "cpu")

    @classmethod
    def of(cls, kind: Literal["cpu", "cuda"]) -> "Device":
        """This machine's of that kind; where it has no GPU, one that has bf16 and fp16."""
        if kind == "cpu":
            return cls("cpu", bf16=_cpu_has_bf16(), fp16=torch.ops.mkldnn._is_mkldnn_fp16_supported())
        bf16 = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
        return cls("cuda", bf16=bf16, fp16=True, apex=_has_apex())


def _cpu_has_bf16() -> bool:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    # On x86 the library also answers yes for AVX512 without bf16, where it computes in fp32 and rounds.
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return not x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _has_apex() -> bool:
    try:
        return hasattr(importlib.import_module("apex.optimizers"), "FusedAdam")
    except ImportError:
        return False
