"""What only MPI itself knows of a launch: where rank 0 runs, if the launcher exports no address."""

import socket
from functools import cache

from megamoe.errors import DistributedError
from megamoe.parallel.network import own_address


@cache
def rank_0_address(world_size: int) -> tuple[str, int]:
    """Host and free port of rank 0, which it broadcasts; every rank must call this.

    MPI is left again at once, so that no rank that fails later waits in MPI_Finalize for the others.

    Args:
        world_size: processes that the launcher has started.

    Raises:
        DistributedError: mpi4py is missing or without a library, or its MPI is not the launcher's.
    """
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise DistributedError(
            "MASTER_ADDR: not set, and the launcher does not tell; export the host of rank 0 and MASTER_PORT,"
            f" or install mpi4py, by which ranks ask each other ({str(error).splitlines()[0]})"
        ) from None
    if MPI.Is_finalized():
        raise DistributedError("MASTER_ADDR: not set, and MPI has been left; export it and MASTER_PORT")
    ours = not MPI.Is_initialized()
    if ours:
        MPI.Init()
    try:
        if world_size != MPI.COMM_WORLD.size:
            library = MPI.Get_library_version().split(",")[0]
            raise DistributedError(
                f"mpi4py sees {MPI.COMM_WORLD.size} of {world_size} processes: its library ({library}) is not"
                " that of this launcher; export MASTER_ADDR and MASTER_PORT"
            )
        return MPI.COMM_WORLD.bcast((own_address(), _free_port()))
    finally:
        if ours:
            MPI.Finalize()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
