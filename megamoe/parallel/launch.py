"""The launch environment, read in one place, and the process group that follows from it."""

import logging
import os
import re
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.rendezvous import rendezvous

from megamoe.errors import DistributedError

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 29500
GROUP_TIMEOUT = timedelta(minutes=30)
"""How long ranks wait for each other to come up, and in any collective."""


@dataclass(frozen=True)
class Launch:
    """Who this process is among the processes of a run.

    Attributes:
        rank: 0 to world_size - 1 over all nodes.
        world_size: processes of the run.
        local_rank: 0 to local_size - 1 on this node; also the index of its GPU.
        local_size: processes on this node.
        launcher: what started them, for people.
        address: host and port where rank 0 listens; unused by a single process.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = "single process"
    address: tuple[str, int] = (LOOPBACK, DEFAULT_PORT)

    def environment(self) -> dict[str, str]:
        """The variables by which torch and DeepSpeed know the same."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_SIZE": str(self.local_size),
            "MASTER_ADDR": self.address[0],
            "MASTER_PORT": str(self.address[1]),
        }


@dataclass(frozen=True)
class _Variables:
    """The names one launcher uses."""

    launcher: str
    rank: str
    size: str
    local_rank: str
    local_size: tuple[str, ...]


_EXPLICIT = _Variables("environment", "RANK", "WORLD_SIZE", "LOCAL_RANK", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
_OPEN_MPI = _Variables(
    "Open MPI",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    ("OMPI_COMM_WORLD_LOCAL_SIZE",),
)
_MPI = _Variables("MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", ("MPI_LOCALNRANKS",))
# The number of tasks in the step tells srun from the batch shell, which has a SLURM_PROCID too.
_SRUN = _Variables("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ())


def read_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Find out how this process was started.

    RANK and WORLD_SIZE, which the deepspeed launcher and torchrun set, come first; then the
    variables of Open MPI, of MPICH and Intel MPI, and of a Slurm step; else it is a single process.
    MASTER_ADDR and MASTER_PORT count under every launcher.

    Raises:
        DistributedError: a variable is missing, is no number, is out of range, or contradicts
            another launcher's.
    """
    started_by = _started_by(environ)
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        return _launch(started_by, environ) if started_by else Launch()
    explicit = _launch(_EXPLICIT, environ)
    one_launcher_per_node = "TORCHELASTIC_RUN_ID" in environ or "CROSS_SIZE" in environ
    if started_by and not one_launcher_per_node:
        _require_same_size(explicit, started_by, environ)
    return explicit


def _started_by(environ: Mapping[str, str]) -> _Variables | None:
    """The launcher that started each process by itself."""
    # mpirun inside a Slurm step leaves the variables of its daemons' step in place, so MPI's count first.
    # srun --mpi=pmi2 sets PMI's beside its own, which say more.
    present = [names for names in (_OPEN_MPI, _MPI, _SRUN) if {names.rank, names.size} <= environ.keys()]
    if present == [_MPI, _SRUN]:
        mpi, srun = ([environ[names.rank], environ[names.size]] for names in present)
        return _SRUN if mpi == srun else _MPI
    return present[0] if present else None


def _require_same_size(explicit: Launch, names: _Variables, environ: Mapping[str, str]) -> None:
    size = _number(environ, names.size)
    if size != explicit.world_size:
        raise DistributedError(
            f"WORLD_SIZE = {explicit.world_size}: {names.launcher} started {size} processes"
            f" ({names.size}); unset RANK and WORLD_SIZE, or start {explicit.world_size}"
        )


def _launch(names: _Variables, environ: Mapping[str, str]) -> Launch:
    world_size = _number(environ, names.size)
    rank = _number(environ, names.rank)
    _require_below(names.rank, rank, names.size, world_size)
    local_rank = _number(environ, names.local_rank) if world_size > 1 else 0
    local_size = _local_size(names, environ, world_size)
    _require_below(names.local_rank, local_rank, "the processes on this node", local_size)
    return Launch(
        rank,
        world_size,
        local_rank,
        local_size,
        _launcher(names, environ),
        _address(names, environ, one_node=local_size == world_size),
    )


def _number(environ: Mapping[str, str], name: str) -> int:
    if name not in environ:
        raise DistributedError(f"{name}: not set, though other variables of its launcher are; export it")
    try:
        number = int(environ[name])
    except ValueError:
        number = -1
    if number < 0:
        raise DistributedError(f"{name} = {environ[name]!r}: give a whole number, 0 or more")
    return number


def _require_below(name: str, value: int, limit_name: str, limit: int) -> None:
    if value >= limit:
        raise DistributedError(f"{name} = {value}: must be below {limit_name} = {limit}")


def _local_size(names: _Variables, environ: Mapping[str, str], world_size: int) -> int:
    for name in names.local_size:
        if name in environ:
            return _number(environ, name)
    tasks_per_node = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    if names is not _EXPLICIT and tasks_per_node:
        return _tasks_on_node(tasks_per_node, _number(environ, "SLURM_NODEID"))
    return world_size


def _tasks_on_node(tasks_per_node: str, node: int) -> int:
    """Entry `node` of Slurm's run-length list, such as "2(x3),1"."""
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks_per_node)
    tasks = [int(count) for count, repeats in runs for _ in range(int(repeats or 1))]
    if node >= len(tasks):
        raise DistributedError(
            f"SLURM_NODEID = {node}: SLURM_STEP_TASKS_PER_NODE = {tasks_per_node} is shorter"
        )
    return tasks[node]


def _launcher(names: _Variables, environ: Mapping[str, str]) -> str:
    if names is not _EXPLICIT:
        return names.launcher
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    return "deepspeed" if "CROSS_SIZE" in environ else names.launcher


def _address(names: _Variables, environ: Mapping[str, str], *, one_node: bool) -> tuple[str, int]:
    """Where rank 0 listens: as exported, else its node by the launcher's word and a port per job."""
    nodes = environ.get("SLURM_STEP_NODELIST" if names.launcher == "srun" else "SLURM_JOB_NODELIST", "")
    host = environ.get("MASTER_ADDR") or (LOOPBACK if one_node else _first_host(nodes))
    if not host:
        raise DistributedError(
            "MASTER_ADDR: not set, and the launcher does not tell; export the host of rank 0 and MASTER_PORT"
        )
    if "MASTER_PORT" in environ:
        return host, _number(environ, "MASTER_PORT")
    job = environ.get("PMIX_NAMESPACE") or environ.get("SLURM_JOB_ID")
    step = environ.get("SLURM_STEP_ID", "")
    return host, 20_000 + zlib.crc32(f"{job}.{step}".encode()) % 10_000 if job else DEFAULT_PORT


def _first_host(nodes: str) -> str:
    """The first name of a Slurm node list, such as "gpu[03-05,9],login1"."""
    match = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in match.groups()) if match else ""


@dataclass(frozen=True)
class World:
    """The ranks of a run and what they do together; every rank must make the same calls."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes and prints for all."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, without gradient."""
        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over ranks, without gradient."""
        return self.sum(values) / self.world_size

    def max(self, value: int) -> int:
        """The largest `value` of any rank. One rank alone communicates nothing."""
        if self.world_size == 1:
            return value
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def gather_objects(self, value: Any) -> list[Any]:
        """The picklable `value` of every rank, in order of rank."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        dist.barrier()

    def shutdown(self) -> None:
        """Leave the process group, and DeepSpeed's memory of it, so that another can be started."""
        import deepspeed.comm.comm

        forget_groups()
        deepspeed.comm.comm.cdb = None
        dist.destroy_process_group()


def start(launch: Launch, timeout: timedelta = GROUP_TIMEOUT) -> World:
    """Join the process group of a run: NCCL on GPUs, else gloo. A group that exists is used as it is.

    Raises:
        DistributedError: there are fewer GPUs than processes on this node, the other ranks cannot
            be reached in time, or the existing group is another one than `launch` describes.
    """
    os.environ.update(launch.environment())
    _quiet(launch)
    _share_cores(launch)
    device = _device(launch)
    if not dist.is_initialized():
        _join(launch, device, timeout)
    if (dist.get_rank(), dist.get_world_size()) != (launch.rank, launch.world_size):
        raise DistributedError(
            f"rank {dist.get_rank()} of {dist.get_world_size()}: the running process group is not the"
            f" launch's, rank {launch.rank} of {launch.world_size}; leave it first"
        )
    import deepspeed
    import deepspeed.ops

    # DeepSpeed would compile this op for minutes; it serves tensor-parallel inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return World(launch.rank, launch.world_size, device)


def forget_groups() -> None:
    """Drop DeepSpeed's cached process groups; it would use those of an earlier engine."""
    from deepspeed.utils import groups

    for cache in (
        groups._EXPERT_PARALLEL_GROUP,
        groups._EXPERT_PARALLEL_GROUP_RANKS,
        groups._EXPERT_DATA_PARALLEL_GROUP,
        groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
        groups._ALL_TO_ALL_GROUP,
    ):
        cache.clear()
    groups._WORLD_GROUP = None


def _device(launch: Launch) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if launch.local_rank >= torch.cuda.device_count():
        raise DistributedError(
            f"LOCAL_RANK = {launch.local_rank}: this process sees {torch.cuda.device_count()} GPUs; start one"
            " process per GPU, and let each see all GPUs of its node (Slurm: --gpus-per-node)"
        )
    torch.cuda.set_device(launch.local_rank)
    return torch.device("cuda", launch.local_rank)


def _join(launch: Launch, device: torch.device, timeout: timedelta) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if launch.world_size == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    host, port = launch.address
    place = f"MASTER_ADDR = {host}, MASTER_PORT = {port}"
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        # Two jobs at one port would mix their ranks and wait for each other for ever.
        if store.add(f"megamoe/rank {rank}", 1) > 1:
            raise DistributedError(
                f"{place}: another job is using this port, its rank {rank} was here first; choose another one"
                " (--master_port)"
            )
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"{place}: {launch.world_size} processes could not meet there ({str(error).splitlines()[0]})"
        ) from error


def _share_cores(launch: Launch) -> None:
    """Divide the cores of a node among its processes where nobody else has; each would use all of them."""
    n_cores = os.cpu_count() or 1
    bound = hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < n_cores
    if launch.local_size > 1 and not bound and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, n_cores // launch.local_size))


def _quiet(launch: Launch) -> None:
    """Let rank 0 speak for DeepSpeed: warnings there, errors elsewhere."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING if launch.rank == 0 else logging.ERROR)
    # DeepSpeed calls functions of torch under their former names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if launch.rank != 0:
        warnings.simplefilter("ignore")
