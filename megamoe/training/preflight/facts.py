"""What one rank finds out about its node."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megamoe
from megamoe.config.schema import RunConfig
from megamoe.training.environment import config_hash, describe_environment


@dataclass(frozen=True)
class Facts:
    """What one rank measured. Speeds in bytes/s, sizes in bytes, the clock in seconds ahead of rank 0's.

    Attributes:
        host_free: memory of the node, or what the job may take of it.
        ranks_on_host: processes that share it.
        gpu_free: memory of its GPU; None on a CPU.
        flops: operations/s of a product of large matrices in the run's dtype.
        link: of its best pair with a rank elsewhere: a slow node has no fast pair; 0 without a pair.
        shared_folder: whether this rank sees what rank 0 wrote into the checkpoint folder.
        disk_error: why the checkpoint folder cannot be used; empty if it can.
    """

    rank: int
    host: str
    host_free: int = 0
    ranks_on_host: int = 1
    gpu_free: int | None = None
    flops: float = 0.0
    link: float = 0.0
    clock: float = 0.0
    disk_write: float = 0.0
    disk_read: float = 0.0
    disk_free: int = 0
    shared_folder: bool = True
    disk_error: str = ""


def versions(run: RunConfig, ds: Mapping[str, Any]) -> dict[str, str]:
    """What must be equal on all ranks of `run`."""
    environment = describe_environment()
    code = hashlib.sha256()
    package = Path(megamoe.__file__).parent
    for path in sorted(package.rglob("*.py")):
        code.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return {
        "python": str(environment["python"]).partition(" ")[0],
        "torch": str(environment["packages"]["torch"]),
        "deepspeed": str(environment["packages"]["deepspeed"]),
        "megamoe": megamoe.__version__,
        "code of megamoe": code.hexdigest()[:12],
        "config": config_hash(run.to_dict())[:12],
        "DeepSpeed config": hashlib.sha256(json.dumps(ds, sort_keys=True).encode()).hexdigest()[:12],
    }
