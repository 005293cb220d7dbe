"""Who am I, by the variables of every launcher; and what is refused."""

import os
import re
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from megamoe.errors import DistributedError
from megamoe.parallel.launch import Launch, read_launch, start
from tests.environment import environment
from tests.processes import PATIENCE_SECONDS, free_port, ranks

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n1",
    "MASTER_PORT": "29400", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
DEEPSPEED = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500", "CROSS_RANK": "0", "CROSS_SIZE": "1",
}  # fmt: skip
PLAIN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234"}
SRUN = {
    "SLURM_PROCID": "4", "SLURM_STEP_NUM_TASKS": "5", "SLURM_LOCALID": "0", "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_STEP_NODELIST": "gpu[03-05]", "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


def test_nothing_set_is_a_single_process() -> None:
    assert read_launch({"PATH": "/bin", "MASTER_ADDR": "left over"}) == Launch()


def test_torchrun() -> None:
    assert read_launch(TORCHRUN) == Launch(3, 4, 1, 2, "torchrun", ("n1", 29400))


def test_deepspeed_launcher() -> None:
    assert read_launch(DEEPSPEED) == Launch(1, 2, 1, 2, "deepspeed", ("127.0.0.1", 29500))


def test_exported_variables() -> None:
    assert read_launch(PLAIN) == Launch(0, 2, 0, 2, "environment", ("127.0.0.1", 1234))


def test_srun_step() -> None:
    launch = read_launch(SRUN)
    assert (launch.rank, launch.world_size, launch.local_rank, launch.local_size) == (4, 5, 0, 1)
    assert launch.launcher == "srun"
    assert launch.address[0] == "gpu03"


def test_the_batch_shell_of_slurm_is_no_step() -> None:
    assert read_launch({"SLURM_PROCID": "0", "SLURM_JOB_ID": "77", "SLURM_NTASKS": "8"}) == Launch()


def agreed(world_size: int) -> tuple[str, int]:
    """What MPI would tell."""
    return f"first of {world_size}", 1234


def test_mpi_launchers_leave_the_address_to_mpi() -> None:
    at = ("first of 2", 1234)
    assert read_launch(OPEN_MPI, agreed) == Launch(1, 2, 1, 2, "Open MPI", at)
    assert read_launch(HYDRA, agreed) == Launch(1, 2, 1, 2, "MPI", at)
    assert read_launch(OPEN_MPI | {"MASTER_PORT": "4321"}, agreed).address == ("first of 2", 4321)
    assert read_launch(OPEN_MPI | {"MASTER_ADDR": "head"}, agreed).address == ("head", 1234)


def test_one_process_of_mpi_asks_nobody() -> None:
    alone = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
    assert read_launch(alone) == Launch(launcher="Open MPI")


def test_mpirun_inside_a_slurm_step_counts_by_mpi() -> None:
    assert read_launch(SRUN | OPEN_MPI, agreed).world_size == 2


def test_srun_with_pmi_takes_the_local_rank_from_slurm() -> None:
    launch = read_launch(SRUN | {"PMI_RANK": "4", "PMI_SIZE": "5"})
    assert (launch.rank, launch.local_rank, launch.local_size) == (4, 0, 1)


def test_all_ranks_of_a_job_agree_on_the_port_and_jobs_differ() -> None:
    first, second = read_launch(SRUN), read_launch(SRUN | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"})
    assert first.address == second.address
    assert read_launch(SRUN | {"SLURM_JOB_ID": "78"}).address[1] != first.address[1]
    assert 20_000 <= first.address[1] < 30_000


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n1", "n1"), ("n[08,3]", "n08"), ("a-[1-2]-ib,b", "a-1-ib"), ("login,gpu[1-2]", "login")],
)
def test_rank_0_listens_on_the_first_host(nodes: str, host: str) -> None:
    assert read_launch(SRUN | {"SLURM_STEP_NODELIST": nodes}).address[0] == host


def test_exported_address_wins() -> None:
    exported = {"MASTER_ADDR": "head", "MASTER_PORT": "4321"}
    assert read_launch(SRUN | exported).address == ("head", 4321)
    assert read_launch(OPEN_MPI | exported).address == ("head", 4321)


def test_one_launcher_per_node_under_srun_is_no_contradiction() -> None:
    assert read_launch(SRUN | TORCHRUN).world_size == 4


def test_exported_variables_that_agree_with_the_launcher_are_its_own() -> None:
    agreeing = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "head",
        "MASTER_PORT": "4321",
    }
    assert read_launch(OPEN_MPI | agreeing) == Launch(1, 2, 1, 2, "Open MPI", ("head", 4321))


def test_ranks_started_by_hand_in_a_shell_of_srun_are_no_contradiction() -> None:
    shell = SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert read_launch(shell | PLAIN).world_size == 2


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE: not set, though other variables of its launcher are; export it"),
        ({"WORLD_SIZE": "2"}, "RANK: not set"),
        (PLAIN | {"RANK": "two"}, "RANK = 'two': give a whole number"),
        (PLAIN | {"RANK": "-1"}, "RANK = '-1': give a whole number"),
        (PLAIN | {"RANK": "2"}, "RANK = 2: must be below WORLD_SIZE = 2"),
        (PLAIN | {"LOCAL_RANK": "5"}, "LOCAL_RANK = 5: must be below the processes on this node = 2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "1"}, "LOCAL_RANK: not set"),
        (PLAIN | {"MASTER_PORT": "http"}, "MASTER_PORT = 'http': give a whole number"),
        (
            SRUN | PLAIN,
            "WORLD_SIZE = 2: srun started 5 processes (SLURM_STEP_NUM_TASKS); unset RANK and WORLD_SIZE,"
            " or start 2",
        ),
        (OPEN_MPI | PLAIN | {"WORLD_SIZE": "1"}, "WORLD_SIZE = 1: Open MPI started 2 processes"),
        (OPEN_MPI | PLAIN, "RANK = 0: Open MPI counts this process as 1 (OMPI_COMM_WORLD_RANK); unset"),
        (SRUN | {"SLURM_NODEID": "3"}, "SLURM_NODEID = 3: SLURM_STEP_TASKS_PER_NODE = 2(x2),1 is shorter"),
        (PLAIN | {"MASTER_PORT": "65536"}, "MASTER_PORT = 65536: give a free port"),
        (OPEN_MPI | {"MASTER_PORT": "0"}, "MASTER_PORT = 0: give a free port"),
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_ADDR"}, "MASTER_ADDR: not set, and the launcher"),
        ({"FLUX_TASK_RANK": "1"}, "FLUX_TASK_RANK = 1: set by a launcher whose variables are not read"),
    ],
)
def test_contradictions_are_refused_by_name(environ: dict[str, str], message: str) -> None:
    with pytest.raises(DistributedError, match=f"^{re.escape(message)}") as refusal:
        read_launch(environ)
    assert "\n" not in str(refusal.value)


def test_single_process_starts_without_a_port_and_can_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Launch().environment():
        monkeypatch.setenv(name, "to be replaced")
    for _ in range(2):
        world = start(Launch())
        assert (world.rank, world.world_size, world.is_main) == (0, 1, True)
        with pytest.raises(DistributedError, match=r"rank 0 of 1: the running process group is not"):
            start(Launch(1, 2, 1, 2))
        world.shutdown()
        assert not dist.is_initialized()


def test_ranks_that_never_meet_are_told_where(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Launch(1, 2, 1, 2, "environment", ("127.0.0.1", 9))
    for name in launch.environment():
        monkeypatch.setenv(name, "to be replaced")
    with pytest.raises(
        DistributedError, match=r"^MASTER_ADDR = 127.0.0.1, MASTER_PORT = 9: 2 processes could"
    ):
        start(launch, timeout=timedelta(seconds=1))


def test_two_jobs_at_one_port_are_told_apart() -> None:
    """Rank 1 of another job comes to where ranks 0 and 1 of this one meet."""
    port = str(free_port())
    program = "from megamoe.parallel.launch import read_launch, start; start(read_launch())"
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True,
            env=environment() | PLAIN | {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port},
        )
        for name, rank in {"zero": "0", "one": "1", "stranger": "1"}.items()
    }  # fmt: skip
    try:
        for _ in range(1200):
            ended = [started[name] for name in ("one", "stranger") if started[name].poll() not in (None, 0)]
            if ended:
                break
            time.sleep(0.1)
        assert len(ended) == 1
        assert f"MASTER_PORT = {port}: another job is using this port, its rank 1" in ended[0].stderr.read()
    finally:
        for process in started.values():
            process.kill()
            process.communicate()


def test_a_newcomers_console_stays_clean() -> None:
    """Starting and stopping says nothing, and neither looks for accelerators nor compiles."""
    program = (
        "from megamoe.parallel.launch import read_launch, start; import deepspeed;"
        "start(read_launch()).shutdown(); print(deepspeed.accelerator.get_accelerator().device_name())"
    )
    clean = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    result = subprocess.run(
        [sys.executable, "-c", program], env=clean, capture_output=True, text=True, check=True, timeout=120
    )
    assert (result.stdout, result.stderr) == ("cpu\n", "")


def test_no_thread_of_the_group_outlives_it(tmp_path: Path) -> None:
    """One that still runs when the interpreter ends aborts the process now and then, exit code 134."""
    program = (
        "import pathlib, torch; from megamoe.parallel.launch import read_launch, start;"
        "world = start(read_launch()); world.sum(torch.ones(1));"
        "import torch._dynamo; world.shutdown();"  # as the first tensor without memory does
        "threads = [path.read_text() for path in pathlib.Path('/proc/self/task').glob('*/comm')];"
        "assert not [name for name in threads if 'gloo' in name], threads"
    )
    with ranks(2, folder=tmp_path, program=("-c", program)) as processes:
        for process in processes:
            _, said = process.communicate(timeout=PATIENCE_SECONDS)
            assert process.returncode == 0, said
