"""What the figures were measured on, and with."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("megamoe", "torch", "deepspeed", "transformers", "numpy")
FLAGS = ("amx_tile", "amx_bf16", "avx512f", "avx512_bf16", "avx2")
VARIABLES = (
    "OMP_", "MKL_", "KMP_", "GOMP_", "ONEDNN_", "DNNL_", "GLIBC_TUNABLES", "MALLOC_", "LD_PRELOAD",
    "DS_", "TORCH", "ATEN_", "MEGAMOE_",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """Processor, load, versions, and the variables that change how fast things are."""
    info = _processor()
    flags = info.get("flags", "").split()
    return {
        "processor": info.get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "system": platform.platform(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "versions": {name: _version(name) for name in PACKAGES},
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)
        },
    }


def _processor() -> dict[str, str]:
    """The first entry of /proc/cpuinfo; nothing where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
