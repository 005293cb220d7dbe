"""On what a run runs: versions, devices, launch. For environment.json, `megamoe env` and bug reports."""

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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import megamoe

if TYPE_CHECKING:
    from rich.table import Table

PACKAGES = (
    "torch", "deepspeed", "mpi4py", "numpy", "safetensors", "scipy", "sentencepiece", "psutil", "tensorboard",
    "wandb",
)  # fmt: skip
LAUNCH_PREFIXES = (
    "SLURM_", "OMPI_COMM_", "PMI_", "PMIX_", "TORCHELASTIC_", "NCCL_", "TORCH_NCCL_", "GLOO_", "DS_",
)  # fmt: skip
LAUNCH_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "CROSS_RANK", "CROSS_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS", "TORCHDYNAMO_DISABLE", "TORCH_EXTENSIONS_DIR",
)  # fmt: skip
SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "JWT")
COMMAND_SECONDS = 10

# Loading MPI can disturb a process (it may replace malloc) or end it, so another one does it.
_MPI_LIBRARY = (
    "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
)


def describe_environment(config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything worth knowing when a run must be explained or repeated; plain JSON values.

    What cannot be found out, because something is missing or broken, is "unknown" with the reason.

    Args:
        config: the resolved run config, whose hash is added.
    """
    facts: dict[str, Any] = {"megamoe": megamoe.__version__, "git_commit": _fact(_git_commit)}
    if config is not None:
        facts["config_sha256"] = config_hash(config)
    return facts | {
        "command": sys.argv,
        "python": f"{platform.python_version()} at {sys.executable}",
        "system": _system(),
        "devices": _fact(_devices),
        "packages": {name: _version(name) for name in PACKAGES},
        "apex": _fact(_apex),
        "deepspeed_ops": _fact(_deepspeed_ops),
        "mpi": {"library": _fact(_mpi_library), "launcher": _program("mpirun")},
        "slurm": _program("srun"),
        "launched_as": _fact(_launched_as),
        "launch": launch_variables(os.environ),
    }


def machine_line(facts: Mapping[str, Any]) -> str:
    """What was measured on, for reports: machine, torch and deepspeed of `describe_environment`."""
    system, versions = facts["system"], facts["packages"]
    machine = f"{system['cpu']}, {system['usable_cores']} cores, {system['memory_gib']} GiB"
    return f"{machine}, torch {versions['torch']}, deepspeed {versions['deepspeed']}"


def environment_table(facts: Mapping[str, Any]) -> "Table":
    """The facts of `describe_environment` for people; lists are joined, empty facts left out."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for overflow in ("ellipsis", "ellipsis", "fold"):
        table.add_column(overflow=overflow)
    for section, content in facts.items():
        title = section.replace("_", " ")
        for name, value in content.items() if isinstance(content, Mapping) else [("", content)]:
            if value not in ("", [], {}):
                shown_name = name if section == "launch" else name.replace("_", " ")
                # As text, because Slurm's lists of nodes look like markup.
                table.add_row(title, shown_name, Text(_shown(value)))
                title = ""
    return table


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


def _fact(look: Callable[[], Any]) -> Any:
    """What `look` finds. A broken machine is what this module is there to describe."""
    try:
        return look()
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        return f"unknown: {type(error).__name__}: {reason}"


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _system() -> dict[str, Any]:
    return {
        "os": _fact(lambda: platform.freedesktop_os_release()["PRETTY_NAME"]),
        "kernel": platform.platform(),
        "host": platform.node(),
        "cpu": _fact(_cpu_model),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_gib": _fact(_memory_gib),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float:
    import psutil

    return round(psutil.virtual_memory().total / 2**30, 1)


def _devices() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {"accelerator": "cpu", "cuda": torch.version.cuda or "torch is built without"}
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "accelerator": "cuda",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "gpus": [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in found],
    }


def _apex() -> str:
    """NVIDIA's Apex is told by its own modules: the index has another package of that name."""
    if importlib.util.find_spec("apex") is None:
        return "not installed"
    try:
        normalization = importlib.import_module("apex.normalization")
    except ImportError:
        return "not NVIDIA Apex: the package installed under this name is another one"
    return "NVIDIA Apex" if hasattr(normalization, "FusedLayerNorm") else "not NVIDIA Apex"


def _deepspeed_ops() -> dict[str, list[str]]:
    """DeepSpeed's compiled operators by what it would do with them here."""
    importlib.import_module("megamoe.parallel")  # sets what DeepSpeed reads while it is imported
    import deepspeed.git_version_info
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    ops: dict[str, list[str]] = {"built_in": [], "compiled_at_first_use": [], "not_possible_here": []}
    for name, builder in ALL_OPS.items():
        if deepspeed.git_version_info.installed_ops.get(name):
            ops["built_in"].append(name)
        elif name != "deepspeed_not_implemented":
            possible = builder.is_compatible(verbose=False)
            ops["compiled_at_first_use" if possible else "not_possible_here"].append(name)
    return ops


def _mpi_library() -> str | None:
    """The library that mpi4py loads; None without mpi4py."""
    if importlib.util.find_spec("mpi4py") is None:
        return None
    done = subprocess.run(
        [sys.executable, "-c", _MPI_LIBRARY], capture_output=True, text=True, timeout=COMMAND_SECONDS
    )
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip("\0 \n").splitlines()
    return lines[-1 if done.returncode else 0] if lines else f"unknown: ended with {done.returncode}"


def _program(name: str) -> str | None:
    """Version and place of a program; None if there is none."""
    place = shutil.which(name)
    if place is None:
        return None
    lines = (_output(name, "--version") or f"{name}, which does not tell its version,").splitlines()
    return f"{lines[0]} at {place}"


def _launched_as() -> dict[str, Any] | str:
    """How `megamoe.parallel.launch.read_launch` understands the variables; or why it refuses them."""
    from megamoe.errors import DistributedError
    from megamoe.parallel.launch import read_launch

    try:
        # Whoever asks for facts may be one rank alone, and must not wait for the others.
        launch = read_launch(os.environ, discover=lambda world_size: ("agreed over MPI", 0))
    except DistributedError as error:
        return f"refused: {error}"
    host, port = launch.address
    return {
        "launcher": launch.launcher,
        "rank": f"{launch.rank} of {launch.world_size}",
        "local_rank": f"{launch.local_rank} of {launch.local_size}",
        "meeting_point": "" if launch.world_size == 1 else f"{host}:{port}" if port else host,
    }


def _git_commit() -> str | None:
    """Commit of the checkout megamoe is imported from, "+" if changed since; None if it is installed."""
    package = Path(megamoe.__file__)
    git = ("git", "-C", str(package.parent))
    if _output(*git, "ls-files", "--error-unmatch", package.name) is None:
        return None
    commit = _output(*git, "rev-parse", "HEAD")
    changed = _output(*git, "status", "--porcelain", "--untracked-files=no")
    return commit and commit + ("+" if changed else "")


def _output(*command: str) -> str | None:
    """What a command prints; None if it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
