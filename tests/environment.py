"""The environment that tests start commands in."""

import os
import sys
from pathlib import Path

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHERS = ("SLURM_", "SBATCH_", "SALLOC_", "OMPI_", "PMI_", "PMIX_")


def environment() -> dict[str, str]:
    """As a user's shell has it: nothing of a launcher, one thread per process."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHED and not name.startswith(LAUNCHERS)
    }
    scripts = str(Path(sys.executable).parent)
    return inherited | {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1",
        "PATH": f"{scripts}{os.pathsep}{inherited['PATH']}",
    }  # fmt: skip
