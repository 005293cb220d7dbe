"""Ranks that do not come, come twice, or would look for each other at the wrong place."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest

from megamoe.errors import DistributedError
from megamoe.parallel.launch import Launch, _require_no_hidden_gpus
from megamoe.parallel.meeting import Present, find_problem, join
from megamoe.parallel.network import advertised_address, is_loopback, own_address, require_interfaces
from tests.environment import environment
from tests.launchers import require_mpirun
from tests.processes import PATIENCE_SECONDS, free_port

PROGRAM = """
import sys
from datetime import timedelta
from megamoe.errors import DistributedError
from megamoe.parallel.launch import read_launch, start
try:
    world = start(read_launch(), timedelta(seconds=float(sys.argv[1])))
    print("sum", int(world.sum(__import__("torch").ones(1))))
    world.shutdown()
except DistributedError as error:
    print(error)
"""


def start_ranks(
    ranks: Sequence[dict[str, str]], prefixes: Sequence[Sequence[str]] = (), seconds: float = 120
) -> list[str]:
    """What each rank prints; all meet at one free port."""
    base = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [*(prefixes[index] if prefixes else ()), sys.executable, "-c", PROGRAM, str(seconds)],
            env=base | rank, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index, rank in enumerate(ranks)
    ]  # fmt: skip
    try:
        return [process.communicate(timeout=PATIENCE_SECONDS)[0].strip() for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_a_rank_that_does_not_come_is_named() -> None:
    ranks = [{"RANK": rank, "WORLD_SIZE": "4", "LOCAL_RANK": rank} for rank in ("0", "2")]
    said = start_ranks(ranks, seconds=8)
    assert "2 ranks (1, 3) of 4 did not come within 8 s; see whether they started, or unset RANK" in said[0]
    assert said[1] == said[0]


def test_one_local_rank_for_two_ranks_is_refused_on_both() -> None:
    ranks = [{"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": "1"} for rank in ("0", "1")]
    said = start_ranks(ranks)
    assert said[0].startswith(f"LOCAL_RANK = 1: ranks 0 and 1 on {socket.gethostname()} both have it")
    assert said[1] == said[0]


def on_node(name: str) -> list[str]:
    """Run what follows on a machine of that name, which resolves to nothing."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", "--uts", *user, "sh", "-c", 'hostname "$0"; exec "$@"', name]


def test_nodes_whose_names_lead_gloo_astray_are_refused_until_it_is_told_an_interface() -> None:
    prefixes = [on_node("megamoe-node-a"), on_node("megamoe-node-b")]
    if not shutil.which("unshare") or subprocess.run([*prefixes[0], "true"], capture_output=True).returncode:
        pytest.skip("needs unshare(1) and the right to make a UTS namespace")
    ranks = [{"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"} for rank in ("0", "1")]
    said = start_ranks(ranks, prefixes)
    assert said[0].startswith("megamoe-node-a (and 1 more): its own name resolves to 127.0.0.1, so other")
    assert "export GLOO_SOCKET_IFNAME=" in said[0]
    assert said[1] == said[0]
    with_interface = [environ | {"GLOO_SOCKET_IFNAME": "lo"} for environ in ranks]
    assert start_ranks(with_interface, prefixes) == ["sum 2", "sum 2"]


def node(name: str, local_rank: int = 0, address: str = "") -> Present:
    return Present(name, name, local_rank, address)


def test_what_a_roll_call_finds() -> None:
    assert find_problem([node("a", 0), node("a", 1), node("b", 0), node("b", 1)]) == ""
    assert find_problem([node("a", 0, "127.0.1.1"), node("a", 1, "127.0.1.1")]) == ""
    astray = find_problem([node("a"), node("b", 0, "127.0.1.1")])
    assert astray.startswith("b: its own name resolves to 127.0.1.1, so other nodes would look for it")
    assert find_problem([node("a"), node("b"), node("a")]).startswith("LOCAL_RANK = 0: ranks 0 and 2 on a")


@pytest.mark.parametrize(
    ("backend", "value", "refused"),
    [
        ("gloo", "lo", ""),
        ("gloo", "", ""),
        ("gloo", "ib7", "'ib7'"),
        ("gloo", "lo,ib7", "'ib7'"),
        ("nccl", "l", ""),
        ("nccl", "ib7,lo", ""),
        ("nccl", "=l", "'l'"),
        ("nccl", "^docker0", ""),
        ("nccl", "ib7", "'ib7'"),
    ],
)
def test_an_interface_that_is_not_there_is_refused_by_name(backend: str, value: str, refused: str) -> None:
    environ = {f"{backend.upper()}_SOCKET_IFNAME": value}
    if not refused:
        require_interfaces(environ, backend)
        return
    with pytest.raises(DistributedError, match=rf"_SOCKET_IFNAME = '.*has no interface {refused}; name one"):
        require_interfaces(environ, backend)


def test_a_wrong_interface_is_refused_before_ranks_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    with pytest.raises(DistributedError, match="GLOO_SOCKET_IFNAME = 'ib7'"):
        join(Launch(0, 2, 0, 2), "gloo", timedelta(minutes=10))


def test_addresses_of_this_host() -> None:
    assert own_address().count(".") == 3
    assert advertised_address()
    assert [is_loopback(host) for host in ("127.0.1.1", "::1", "localhost", "10.0.0.1", "node1")] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_a_list_of_gpus_that_hides_all_is_refused_unless_on_purpose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for gpu in ("0000:17:00.0", "0000:65:00.0"):
        (tmp_path / gpu).mkdir()
    monkeypatch.setattr("torch.version.cuda", "12.8")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with pytest.raises(
        DistributedError, match=r"CUDA_VISIBLE_DEVICES = '7': names none of this node's 2 GPUs"
    ):
        _require_no_hidden_gpus("7", tmp_path)
    for purpose in (None, "", "-1"):
        _require_no_hidden_gpus(purpose, tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    _require_no_hidden_gpus("7", tmp_path)


def test_mpi_tells_the_address_of_rank_0() -> None:
    """The launcher has told none, so two ranks ask a real MPI; without mpi4py they say what is missing."""
    program = (
        "from megamoe.parallel.launch import read_launch as r; import json; print(json.dumps(r().address))"
    )
    done = under_mpirun(program)
    assert done.returncode == 0, done.stderr
    # mpirun may join two lines.
    addresses = [json.loads(printed) for printed in re.findall(r"\[.*?\]", done.stdout)]
    assert len(addresses) == 2
    assert addresses[0] == addresses[1]
    assert addresses[0][0] == own_address()
    missing = under_mpirun("import sys; sys.modules['mpi4py'] = None\n" + program)
    assert "MASTER_ADDR: not set, and the launcher does not tell; export the host of rank 0" in missing.stderr


def under_mpirun(program: str) -> subprocess.CompletedProcess[str]:
    command = [*require_mpirun(), "-n", "2", sys.executable, "-c", program]
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
