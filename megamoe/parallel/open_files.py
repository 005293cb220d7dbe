"""How many files a process may have open; each connection is one."""

import resource

from megamoe.errors import DistributedError

AT_START = 2
"""Connections of rank 0 to each rank while a run starts: to its store, and to a `tie`."""
LATER = 4
"""Of any rank to each other over gloo, which has one in each of its groups."""
SPARE = 512
"""What a rank has open besides."""


def allow_connections(rank: int, world_size: int) -> None:
    """Raise this process's limit of open files, often 1024, to what the ranks of a run need, if it may.

    Raises:
        DistributedError: rank 0 may not have as many as there are connections at the start.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = LATER * world_size + SPARE
    if hard != resource.RLIM_INFINITY:
        if rank == 0 and hard < AT_START * world_size:
            raise DistributedError(
                f"ulimit -Hn = {hard}: rank 0 keeps {AT_START} connections to each of {world_size} ranks"
                f" while they start; allow {wanted} open files on its node"
            )
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
