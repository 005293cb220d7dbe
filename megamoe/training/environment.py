"""On what a run ran: versions, devices, launch variables. For environment.json and `megamoe env`."""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import megamoe

PACKAGES = ("torch", "deepspeed", "numpy", "safetensors", "sentencepiece", "mpi4py", "wandb")
LAUNCH_PREFIXES = ("SLURM_", "OMPI_COMM_", "PMI_", "NCCL_", "GLOO_", "DS_")
LAUNCH_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR",
)  # fmt: skip
SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "JWT")


def describe_environment(config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything worth knowing when a run must be explained or repeated; plain JSON values.

    Args:
        config: the resolved run config, whose hash is added.
    """
    facts: dict[str, Any] = {
        "megamoe": megamoe.__version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "command": sys.argv,
        "packages": {name: _version(name) for name in PACKAGES},
        "apex": _apex(),
        "devices": _devices(),
        "mpi": shutil.which("mpirun"),
        "launch": launch_variables(os.environ),
    }
    if config is not None:
        facts["config_sha256"] = config_hash(config)
    return facts


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of a resolved config, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def launch_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that say which rank this is and how ranks talk, without anything secret."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if (name in LAUNCH_VARIABLES or name.startswith(LAUNCH_PREFIXES))
        and not any(word in name for word in SECRET_WORDS)
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _apex() -> str:
    """NVIDIA's Apex is told by its own modules: the index has another package of that name."""
    if importlib.util.find_spec("apex") is None:
        return "not installed"
    try:
        normalization = importlib.import_module("apex.normalization")
    except ImportError:
        return "not NVIDIA Apex: the package installed under this name is another one"
    return "NVIDIA Apex" if hasattr(normalization, "FusedLayerNorm") else "not NVIDIA Apex"


def _devices() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        facts["cuda"] = torch.version.cuda
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts


def _git_commit() -> str | None:
    """Commit of the checkout megamoe is imported from, "+" if changed since; None if it is installed."""
    package = Path(megamoe.__file__)
    if _git(package.parent, "ls-files", "--error-unmatch", package.name) is None:
        return None
    commit = _git(package.parent, "rev-parse", "HEAD")
    changed = _git(package.parent, "status", "--porcelain", "--untracked-files=no")
    return commit and commit + ("+" if changed else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
