"""A real Slurm cluster on one Linux machine, for tests: ``python -m tests.slurm.cluster`` opens a shell.

A node is a set of Linux namespaces with its own host name, network address, process tree, shared memory
and slurmd; all nodes see the file system of the machine, but for /run. The cluster holds nothing outside
its namespaces but an empty cgroup, and lives as long as a pipe from this process is open: it ends with
it, however that ends.
"""

import argparse
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.environment import environment

SCRIPT = Path(__file__).with_name("namespaces.sh")
TOOLS = (
    "slurmctld", "slurmd", "sbatch", "srun", "munged", "mpirun",
    "unshare", "nsenter", "setpriv", "ip", "mount", "mknod", "find", "xargs",
)  # fmt: skip
NAMESPACES = ("--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
START_SECONDS = 60
# What an idle machine does in a second, a busy one does in this.
PATIENCE_SECONDS = 60


class UnavailableError(Exception):
    """This machine cannot run a cluster; the message is one line and says why."""


class ClusterError(Exception):
    """A command, a job or a node did not do what was asked of it."""


class Cluster:
    """Nodes ``node1``, ``node2``, ... and a login node, on which commands run; a context manager.

    Every node claims 128 CPUs, 1 TB and 8 GPUs. Jobs go to the partition ``main``; those of the
    partition ``urgent`` preempt them. Settings are in ``etc/slurm.conf``.

    Args:
        nodes: how many, 1 to 64.

    Raises:
        UnavailableError: this machine cannot run a cluster.
        ClusterError: the nodes were not ready within a minute.
    """

    def __init__(self, nodes: int = 2) -> None:
        self.nodes = [f"node{i}" for i in range(1, nodes + 1)]
        self._holder: subprocess.Popen[bytes] | None = None
        self._namespaces: list[str] = []

    def __enter__(self) -> Self:
        require_able_machine()
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._holder = subprocess.Popen(
            ["bash", SCRIPT, "hold", str(len(self.nodes))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            env=_variables(), start_new_session=True,
        )  # fmt: skip
        assert self._holder.stdout is not None
        ready, _, _ = select.select([self._holder.stdout], [], [], START_SECONDS)
        process = self._holder.stdout.readline().decode().strip() if ready else ""
        if not process:
            raise ClusterError(f"the login node did not start\n{self.logs()}")
        self._namespaces = [f"--{kind}=/proc/{process}/ns/{name}" for kind, name in (
            ("net", "net"), ("uts", "uts"), ("ipc", "ipc"), ("mount", "mnt"), ("pid", "pid_for_children"),
        )]  # fmt: skip
        self._until(lambda: "is UP" in self.run("scontrol", "ping", check=False).stdout, "slurmctld answers")
        for node in self.nodes:
            self.repair_node(node, wait=False)
        for node in self.nodes:
            self._until(lambda node=node: self.node_state(node) == "idle", f"{node} is idle")

    def stop(self) -> None:
        """End every process of the cluster at once; jobs are killed."""
        if self._holder is None:
            return
        holder, self._holder = self._holder, None
        assert holder.stdin is not None and holder.stdout is not None
        holder.stdin.close()
        try:
            holder.wait(START_SECONDS)
        finally:
            holder.kill()
            holder.stdout.close()
            self._errors.close()

    def run(
        self,
        *command: str | Path,
        folder: Path | None = None,
        variables: dict[str, str] | None = None,
        check: bool = True,
        timeout: float = PATIENCE_SECONDS,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node, in `folder` with a user's environment and `variables`.

        Raises:
            ClusterError: it failed, unless `check` is false, or took longer than `timeout` seconds.
        """
        words = [str(word) for word in command]
        try:
            done = subprocess.run(
                self.on_login(*words, folder=folder), env=_variables() | (variables or {}),
                stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout,
            )  # fmt: skip
        except subprocess.TimeoutExpired as late:
            raise ClusterError(f"{words}: not done after {timeout} s\n{late.output}{late.stderr}") from None
        if check and done.returncode:
            raise ClusterError(f"{words}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def on_login(self, *command: str, folder: Path | None = None) -> list[str]:
        """The command line that runs `command` on the login node, and ends it when that line is killed."""
        enter = ["nsenter", *self._namespaces, "env", f"--chdir={folder or Path.cwd()}"]
        return [*enter, "setpriv", "--pdeathsig", "KILL", *command]

    def submit(
        self, *arguments: str | Path, folder: Path | None = None, variables: dict[str, str] | None = None
    ) -> str:
        """``sbatch ARGUMENTS``; gives the id of the job."""
        done = self.run("sbatch", "--parsable", *arguments, folder=folder, variables=variables)
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` tells: ``JobState``, ``Restarts``, ``NodeList``, ``StdOut``, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "-o", job).stdout))

    def wait(
        self, job: str, state: str = "COMPLETED", *, restarts: int = 0, timeout: float = PATIENCE_SECONDS
    ) -> dict[str, str]:
        """Wait until a job is in `state` after at least so many restarts; what `job` then tells.

        Raises:
            ClusterError: it ended otherwise, or not within `timeout` seconds; with the end of its output.
        """
        told: dict[str, str] = {}

        def there() -> bool:
            told.update(self.job(job))
            arrived = told["JobState"] == state and int(told["Restarts"]) >= restarts
            if told["JobState"] in ENDED and not arrived:
                raise ClusterError(
                    f"job {job} is {told['JobState']}, exit code {told['ExitCode']}, after {told['Restarts']}"
                    f" restarts; expected {state} after {restarts}\n{_end_of(Path(told['StdOut']))}"
                )
            return arrived

        self._until(there, f"job {job} is {state} after {restarts} restarts", timeout, lambda: (
            f"{told}\n{_end_of(Path(told['StdOut']))}"
        ))  # fmt: skip
        return told

    def node_state(self, node: str) -> str:
        """``idle``, ``allocated``, ``down``, ..., with a ``*`` when the node does not answer."""
        return self.run("sinfo", "-h", "-p", "main", "-n", node, "-o", "%T").stdout.strip()

    def fail_node(self, node: str, *, notice: bool = True) -> None:
        """Cut a node's power: its processes are gone, and its peers hear nothing more from it.

        Slurm takes half a minute to find out; with `notice` it is told at once.
        """
        self.run("bash", SCRIPT, "cut", node)
        if notice:
            self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=power")

    def repair_node(self, node: str, *, wait: bool = True) -> None:
        """Switch a node on, and `wait` until jobs can run on it."""
        self.run("bash", SCRIPT, "boot", node)
        if wait:
            self._until(
                lambda: self.node_state(node) in ("idle", "allocated", "mixed"), f"{node} is ready for jobs"
            )

    def logs(self) -> str:
        """The end of every log of the cluster, and what was printed where there is no log yet."""
        self._errors.seek(0)
        printed = self._errors.read().decode(errors="replace")
        if not self._namespaces:
            return printed
        return printed + self.run("bash", "-c", "tail -n 20 /run/slurm/log/*", check=False).stdout

    def _until(
        self,
        condition: Callable[[], bool],
        what: str,
        timeout: float = PATIENCE_SECONDS,
        details: Callable[[], str] | None = None,
    ) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if self._holder is None or self._holder.poll() is not None:
                raise ClusterError(f"waiting until {what}: the cluster has ended\n{self.logs()}")
            if time.monotonic() > deadline:
                raise ClusterError(f"not within {timeout} s: {what}\n{(details or self.logs)()}")
            time.sleep(0.1)


def require_able_machine() -> None:
    """Check that a cluster can run here.

    Raises:
        UnavailableError: not as root, without Slurm, or on a kernel without namespaces and bridges.
    """
    if sys.platform != "linux":
        raise UnavailableError(f"a test cluster needs Linux, this is {sys.platform}")
    missing = [tool for tool in TOOLS if shutil.which(tool, path=_variables()["PATH"]) is None]
    if missing:
        raise UnavailableError(
            f"a test cluster needs {', '.join(missing)}: tests/slurm/install.sh brings them, on Debian"
        )
    if os.geteuid() != 0:
        raise UnavailableError("a test cluster needs root, for its network namespaces")
    probe = subprocess.run(
        ["unshare", *NAMESPACES, "ip", "link", "add", "probe", "type", "bridge"],
        env=_variables(), capture_output=True, text=True, timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    if probe.returncode:
        reason = " ".join(probe.stderr.split())
        raise UnavailableError(f"a test cluster needs namespaces with a bridge, refused here: {reason}")


def _variables() -> dict[str, str]:
    user = environment()
    return user | {
        "PATH": f"{user['PATH']}:/usr/sbin:/sbin",
        "SLURM_CONF": "/run/slurm/slurm.conf",
        # Open MPI keeps a job's sockets in a folder called after the host, in the /tmp that all nodes share.
        "OMPI_MCA_orte_tmpdir_base": "/run",
        "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }  # fmt: skip


def _end_of(output: Path) -> str:
    lines = output.read_text(errors="replace").splitlines() if output.exists() else ["(no output)"]
    return "\n".join(lines[-30:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Open a shell on the login node of a cluster that ends with it."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.slurm.cluster",
        description="A Slurm cluster on this machine, and a shell or COMMAND on its login node.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--nodes", type=int, default=2, help="number of nodes")
    parser.add_argument("command", nargs="*", default=["bash"], help="what runs on the login node")
    chosen = parser.parse_args(arguments)
    try:
        with Cluster(chosen.nodes) as cluster:
            return subprocess.run(cluster.on_login(*chosen.command), env=_variables()).returncode
    except UnavailableError as reason:
        print(f"tests.slurm.cluster: error: {reason}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
