"""The test cluster behaves as a site's does, as launch scripts rely on, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.environment import environment
from tests.slurm.cluster import Cluster, ClusterError, UnavailableError, main

REPOSITORY = Path(__file__).parents[2]
FREEZER = Path("/sys/fs/cgroup/freezer")

# As slurm/launch.sh is: tasks in the background of a shell that can be signalled and asks for its requeue.
SIGNALLED = r"""#!/bin/bash
trap 'echo "shell: USR1"' USR1
trap 'echo "shell: TERM"' TERM
if [[ -n ${SLURM_RESTART_COUNT:-} ]]; then echo "restart $SLURM_RESTART_COUNT"; exit 0; fi
srun bash -c '
  trap "echo \$SLURM_PROCID: USR1" USR1
  trap "echo \$SLURM_PROCID: TERM; exit 75" TERM
  echo "$SLURM_PROCID: ready on $(hostname)"
  while :; do sleep 0.1; done' &
until wait $!; code=$?; ! kill -0 $! 2> /dev/null; do :; done
echo "shell: $code"
scontrol requeue "$SLURM_JOB_ID"
sleep 60
"""


def until_printed(output: Path, *lines: str) -> list[str]:
    deadline = time.monotonic() + 60
    printed: list[str] = []
    while not set(lines) <= set(printed):
        assert time.monotonic() < deadline, f"{lines} are not among {printed}"
        time.sleep(0.1)
        printed = output.read_text().splitlines() if output.exists() else []
    return printed


def test_nodes_have_names_addresses_and_gpus_of_their_own(cluster: Cluster) -> None:
    show = 'echo "$(hostname) $(ip -o -4 addr show eth0 | cut -d" " -f7) $CUDA_VISIBLE_DEVICES $$"'
    told = cluster.run(
        "srun", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--cpus-per-task=12", "--exclusive",
        "--mem=0", "bash", "-c", show,
    ).stdout.splitlines()  # fmt: skip
    assert sorted(line.rsplit(" ", 1)[0] for line in told) == [
        "node1 198.51.100.1/24 0,1,2,3,4,5,6,7",
        "node2 198.51.100.2/24 0,1,2,3,4,5,6,7",
    ]
    assert cluster.run("ip", "route", "show", "default").stdout == ""


def test_preemption_signals_the_tasks_alone_and_a_requeued_job_runs_again(
    cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "job.sh").write_text(SIGNALLED)
    output = tmp_path / "job.log"
    job = cluster.submit(
        "--nodes=2", "--ntasks-per-node=1", "--exclusive", "--open-mode=append", f"--output={output}",
        tmp_path / "job.sh",
    )  # fmt: skip
    until_printed(output, "0: ready on node1", "1: ready on node2")
    cluster.run("scancel", "--signal=USR1", job)
    assert not [line for line in until_printed(output, "0: USR1", "1: USR1") if line.startswith("shell")]
    urgent = cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true", folder=tmp_path)
    printed = until_printed(output, "0: TERM", "1: TERM", "shell: 75")
    assert not {"shell: USR1", "shell: TERM"} & set(printed[: printed.index("shell: 75")])
    cluster.wait(urgent)
    cluster.wait(job, restarts=1)
    assert output.read_text().splitlines()[-1] == "restart 1"


def test_a_job_of_a_lost_node_is_requeued_and_the_node_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    script = 'echo "restart ${SLURM_RESTART_COUNT:-0}"; [ $SLURM_RESTART_COUNT ] || srun sleep 600'
    job = cluster.submit("--nodes=2", "--output=job.log", "--wrap", script, folder=tmp_path)
    until_printed(tmp_path / "job.log", "restart 0")
    cluster.fail_node("node2")
    assert cluster.node_state("node2").startswith("down")
    cluster.wait(job, "PENDING", restarts=1)
    cluster.repair_node("node2")
    cluster.wait(job, restarts=1)


def test_a_job_that_ends_otherwise_than_expected_is_an_error_that_shows_its_output(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = cluster.submit("--output=job.log", "--wrap", "echo the reason; exit 3", folder=tmp_path)
    with pytest.raises(ClusterError, match=r"is FAILED, exit code 3:0(.|\n)*the reason"):
        cluster.wait(job)
    assert cluster.wait(job, "FAILED")["ExitCode"] == "3:0"


def test_a_command_that_hangs_is_ended(cluster: Cluster) -> None:
    with pytest.raises(ClusterError, match=r"not done after 0\.5 s"):
        cluster.run("sleep", "1234.5", timeout=0.5)
    deadline = time.monotonic() + 10
    while "1234.5" in cluster.run("ps", "ax").stdout:
        assert time.monotonic() < deadline


def namespaces_of(processes: Iterable[int]) -> set[str]:
    found = set()
    for process in processes:
        for kind in ("net", "pid", "mnt"):
            with suppress(OSError):  # it has ended meanwhile
                found.add(str(Path(f"/proc/{process}/ns/{kind}").readlink()))
    return found


BUSY = """
import sys
from tests.slurm.cluster import Cluster
with Cluster(nodes=1) as cluster:
    job = cluster.submit("--output=/dev/null", "--wrap", "srun sleep 600")
    cluster.wait(job, "RUNNING")
    print("busy", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["stop", "SIGKILL"])
def test_nothing_stays_behind(able_machine: None, end: str) -> None:
    devices = set(Path("/sys/class/net").iterdir())
    ours = namespaces_of([os.getpid()])
    with subprocess.Popen(
        [sys.executable, "-c", BUSY],
        cwd=REPOSITORY, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as owner:  # fmt: skip
        assert owner.stdin is not None and owner.stdout is not None
        assert owner.stdout.readline() == "busy\n"
        family = {process.pid for process in psutil.Process(owner.pid).children(recursive=True)}
        namespaces = namespaces_of(family) - ours
        cgroups = [path for path in FREEZER.glob("*/") if int(path.name.rpartition("-")[2]) in family]
        assert namespaces
        if end == "SIGKILL":
            owner.send_signal(signal.SIGKILL)
        owner.stdin.close()
        assert owner.wait(60) == (0 if end == "stop" else -signal.SIGKILL)
    deadline = time.monotonic() + 60
    while left := namespaces & namespaces_of(psutil.pids()) | {
        str(path) for path in cgroups if path.exists()
    }:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    assert set(Path("/sys/class/net").iterdir()) == devices


def test_it_is_refused_in_one_line_to_a_user_who_is_not_root(
    able_machine: None, capsys: pytest.CaptureFixture[str]
) -> None:
    os.seteuid(65534)
    try:
        with pytest.raises(UnavailableError, match="needs root"), Cluster():
            pass
        assert main([]) == 2
    finally:
        os.seteuid(0)
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        "tests.slurm.cluster: error: a test cluster needs root, for its network namespaces"
    ]
    assert printed.out == ""
