"""The variables by which launchers tell each process which one it is.

`megamoe.parallel.launch` reads a launch from them. Who has to know its rank before torch is there, or
without it, asks here.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Variables:
    """The names one launcher uses."""

    launcher: str
    rank: str
    size: str
    local_rank: str
    local_size: tuple[str, ...]


EXPORTED = Variables("environment", "RANK", "WORLD_SIZE", "LOCAL_RANK", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
OPEN_MPI = Variables(
    "Open MPI",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    ("OMPI_COMM_WORLD_LOCAL_SIZE",),
)
MPI = Variables("MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", ("MPI_LOCALNRANKS",))
# The number of tasks in the step tells srun from the batch shell, which has a SLURM_PROCID too.
SRUN = Variables("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ())

TORCHRUN, DEEPSPEED = "TORCHELASTIC_RUN_ID", "CROSS_SIZE"
"""Set by launchers that start the processes of a node, and may be started by another one on each."""

UNREAD = ("PMIX_RANK", "MV2_COMM_WORLD_RANK", "FLUX_TASK_RANK", "PALS_RANKID", "JSM_NAMESPACE_RANK")
"""Of launchers that are not known, the variable that each sets for all of its processes."""


def counted_by(environ: Mapping[str, str] = os.environ) -> Variables | None:
    """Whose variables number this process; None if it is a single one.

    `EXPORTED` are RANK and WORLD_SIZE where nobody else has started this very process. They may also be
    left over in a shell, equal in all processes.
    """
    launcher = _started_by(environ)
    if not is_exported(environ):
        return launcher
    in_a_shell = launcher is SRUN and environ[SRUN.size] == "1"
    by_node = TORCHRUN in environ or DEEPSPEED in environ
    return EXPORTED if launcher is None or in_a_shell or by_node else launcher


def is_exported(environ: Mapping[str, str]) -> bool:
    """Whether RANK or WORLD_SIZE is set."""
    return EXPORTED.rank in environ or EXPORTED.size in environ


def rank_and_size(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Number of this process and of all, as far as they can be read; 0 and 1 otherwise."""
    names = counted_by(environ)
    if names is None:
        return 0, 1
    rank, size = environ.get(names.rank, ""), environ.get(names.size, "")
    return int(rank) if rank.isdigit() else 0, int(size) if size.isdigit() else 1


def _started_by(environ: Mapping[str, str]) -> Variables | None:
    """The launcher that started each process by itself."""
    # mpirun inside a Slurm step leaves the variables of its daemons' step in place, so MPI's count first.
    # srun --mpi=pmi2 sets PMI's beside its own, which say more.
    present = [names for names in (OPEN_MPI, MPI, SRUN) if {names.rank, names.size} <= environ.keys()]
    if present == [MPI, SRUN]:
        mpi, srun = ([environ[names.rank], environ[names.size]] for names in present)
        return SRUN if mpi == srun else MPI
    return present[0] if present else None
