"""The launch environment, read in one place, and the process group that follows from it."""

import logging
import os
import re
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megamoe.errors import DistributedError
from megamoe.launchers import (
    DEEPSPEED,
    EXPORTED,
    MPI,
    OPEN_MPI,
    TORCHRUN,
    UNREAD,
    Variables,
    counted_by,
    is_exported,
)
from megamoe.parallel.meeting import join
from megamoe.parallel.memory import keep_freed_memory
from megamoe.parallel.mpi import rank_0_address
from megamoe.parallel.network import LOOPBACK
from megamoe.parallel.open_files import allow_connections

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


Discover = Callable[[int], tuple[str, int]]


def read_launch(environ: Mapping[str, str] = os.environ, discover: Discover = rank_0_address) -> Launch:
    """Find out how this process was started.

    RANK and WORLD_SIZE, which the deepspeed launcher and torchrun set, come first; then the
    variables of Open MPI, of MPICH and Intel MPI, and of a Slurm step; else it is a single process.
    MASTER_ADDR and MASTER_PORT count under every launcher.

    Args:
        environ: the variables.
        discover: tells rank 0's host and port, given the world size, where an MPI launcher has started
            several processes and no address is exported; by default it asks MPI, on all ranks.

    Raises:
        DistributedError: a variable is missing, is no number, is out of range, or contradicts
            another launcher's.
    """
    names = counted_by(environ)
    if names is None:
        _require_known_launcher(environ)
        return Launch()
    if names is EXPORTED or not is_exported(environ):
        return _launch(names, environ, discover)
    _require_same(names, environ)
    return replace(_launch(EXPORTED, environ, discover), launcher=names.launcher)


def _require_known_launcher(environ: Mapping[str, str]) -> None:
    """Refuse to be one of many single processes that do the same work into the same folder."""
    for name in UNREAD:
        if name in environ:
            raise DistributedError(
                f"{name} = {environ[name]}: set by a launcher whose variables are not read; export RANK,"
                " WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or unset it to run one process"
            )


def _require_same(names: Variables, environ: Mapping[str, str]) -> None:
    """Refuse RANK and WORLD_SIZE that say otherwise than the launcher that started this process."""
    exported_size, size = _number(environ, "WORLD_SIZE"), _number(environ, names.size)
    if size != exported_size:
        raise DistributedError(
            f"WORLD_SIZE = {exported_size}: {names.launcher} started {size} processes"
            f" ({names.size}); unset RANK and WORLD_SIZE, or start {exported_size}"
        )
    exported_rank, rank = _number(environ, "RANK"), _number(environ, names.rank)
    if rank != exported_rank:
        raise DistributedError(
            f"RANK = {exported_rank}: {names.launcher} counts this process as {rank} ({names.rank}); unset"
            " RANK and WORLD_SIZE, which may be left over in this shell"
        )


def _launch(names: Variables, environ: Mapping[str, str], discover: Discover) -> Launch:
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
        _address(names, environ, local_size, world_size, discover),
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


def _local_size(names: Variables, environ: Mapping[str, str], world_size: int) -> int:
    for name in names.local_size:
        if name in environ:
            return _number(environ, name)
    tasks_per_node = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    if names is not EXPORTED and tasks_per_node:
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


def _launcher(names: Variables, environ: Mapping[str, str]) -> str:
    if names is not EXPORTED:
        return names.launcher
    if TORCHRUN in environ:
        return "torchrun"
    return "deepspeed" if DEEPSPEED in environ else names.launcher


def _address(
    names: Variables, environ: Mapping[str, str], local_size: int, world_size: int, discover: Discover
) -> tuple[str, int]:
    """Where rank 0 listens: as exported, else as the ranks agree over MPI, else as Slurm tells."""
    host, port = environ.get("MASTER_ADDR", ""), _port(environ)
    if names in (OPEN_MPI, MPI) and world_size > 1 and not (host and port):
        found_host, found_port = discover(world_size)
        return host or found_host, port or found_port
    if not host:
        host = LOOPBACK if local_size == world_size else _first_host(environ.get("SLURM_STEP_NODELIST", ""))
    if not host:
        raise DistributedError(
            "MASTER_ADDR: not set, and the launcher does not tell; export the host of rank 0 and MASTER_PORT"
        )
    return host, port or _port_of_job(environ)


def _port_of_job(environ: Mapping[str, str]) -> int:
    """One port for all ranks of a Slurm step, another for another; they cannot ask each other yet."""
    if "SLURM_JOB_ID" not in environ:
        return DEFAULT_PORT
    step = f"{environ['SLURM_JOB_ID']}.{environ.get('SLURM_STEP_ID', '')}"
    return 20_000 + zlib.crc32(step.encode()) % 10_000


def _port(environ: Mapping[str, str]) -> int | None:
    if "MASTER_PORT" not in environ:
        return None
    port = _number(environ, "MASTER_PORT")
    if not 0 < port < 2**16:
        raise DistributedError(f"MASTER_PORT = {port}: give a free port, 1024 to 65535")
    return port


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

    def gather(self, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The rows of all ranks, in rank order, without gradient, and where this rank's begin.

        Ranks may have different numbers of rows.
        """
        count = torch.tensor([len(rows)], device=rows.device)
        counts_R = count.new_empty(self.world_size)
        dist.all_gather_into_tensor(counts_R, count)
        counts = counts_R.tolist()
        parts = [rows.new_empty(n, *rows.shape[1:]) for n in counts]
        if len(set(counts)) == 1:
            dist.all_gather(parts, rows.detach().contiguous())
        else:
            copies = rows.detach().repeat(self.world_size, *[1] * (rows.dim() - 1))
            gathered = rows.new_empty(sum(counts), *rows.shape[1:])
            dist.all_to_all_single(gathered, copies, counts, [len(rows)] * self.world_size)
            parts = list(gathered.split(counts))
        return torch.cat(parts), sum(counts[: self.rank])

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

    def gather_on_main(self, value: Any) -> list[Any]:
        """On rank 0 the picklable `value` of every rank, in order of rank; on the others nothing."""
        values = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values)
        return values or []

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
        DistributedError: there are fewer GPUs than processes on this node, rank 0 may not open as many files
            as there are connections, the ranks cannot work together (see `megamoe.parallel.meeting`), or the
            existing group is another one than `launch` describes.
    """
    os.environ.update(launch.environment())
    quiet(launch.rank)
    _share_cores(launch)
    allow_connections(launch.rank, launch.world_size)
    device = _device(launch)
    if device.type == "cpu":
        keep_freed_memory()
    import_before_a_group()
    if not dist.is_initialized():
        join(launch, "nccl" if device.type == "cuda" else "gloo", timeout)
    if (dist.get_rank(), dist.get_world_size()) != (launch.rank, launch.world_size):
        raise DistributedError(
            f"rank {dist.get_rank()} of {dist.get_world_size()}: the running process group is not the"
            f" launch's, rank {launch.rank} of {launch.world_size}; leave it first"
        )
    hand_to_deepspeed()
    return World(launch.rank, launch.world_size, device)


def import_before_a_group() -> None:
    """Import what would hold a process group for ever, if there is one, in defaults of its signatures.

    gloo's threads would then still run when the interpreter ends, which now and then aborts the process.
    """
    import deepspeed  # noqa: F401
    from torch.distributed.nn import functional  # noqa: F401


def hand_to_deepspeed() -> None:
    """Let DeepSpeed use the process group that there is."""
    import deepspeed
    import deepspeed.ops

    # DeepSpeed would compile this op for minutes; it serves tensor-parallel inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


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
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        _require_no_hidden_gpus(visible)
        return torch.device("cpu")
    if launch.local_rank >= torch.cuda.device_count():
        shown = "" if visible is None else f" (CUDA_VISIBLE_DEVICES = {visible!r})"
        raise DistributedError(
            f"LOCAL_RANK = {launch.local_rank}: this process sees {torch.cuda.device_count()} GPUs{shown};"
            " start one process per GPU, and let each see all GPUs of its node (Slurm: --gpus-per-node)"
        )
    torch.cuda.set_device(launch.local_rank)
    return torch.device("cuda", launch.local_rank)


def _require_no_hidden_gpus(visible: str | None, driver: Path = Path("/proc/driver/nvidia/gpus")) -> None:
    """Refuse to train on the CPU of a GPU node because a list of GPUs names none of them.

    An empty list, -1 and DS_ACCELERATOR=cpu say that the CPU is meant.
    """
    on_purpose = visible in (None, "", "-1") or os.environ.get("DS_ACCELERATOR") == "cpu"
    if not on_purpose and torch.version.cuda and driver.exists():
        n_gpus = len(list(driver.iterdir()))
        raise DistributedError(
            f"CUDA_VISIBLE_DEVICES = {visible!r}: names none of this node's {n_gpus} GPUs that can be used;"
            " mend or unset it, or set DS_ACCELERATOR=cpu to use the CPU"
        )


def _share_cores(launch: Launch) -> None:
    """Divide the cores of a node among its processes where nobody else has; each would use all of them."""
    n_cores = os.cpu_count() or 1
    bound = hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < n_cores
    if launch.local_size > 1 and not bound and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, n_cores // launch.local_size))


def quiet(rank: int) -> None:
    """Let rank 0 speak for DeepSpeed: warnings there, errors elsewhere."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING if rank == 0 else logging.ERROR)
    # DeepSpeed calls functions of torch under their former names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if rank != 0:
        warnings.simplefilter("ignore")
