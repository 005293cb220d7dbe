"""Saving while training goes on, on two ranks, of which one is slower or fails."""

import errno
import filecmp
import threading
from pathlib import Path
from typing import Any

import pytest

from megamoe.checkpoint import writer as writer_module
from megamoe.checkpoint.reader import CheckpointReader
from megamoe.checkpoint.shard import write_shard
from megamoe.checkpoint.writer import CheckpointWriter
from megamoe.errors import CheckpointError
from tests.checkpoint.runs import BF16, SmallRun, differing
from tests.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("checkpoint")]


class Disk:
    """`write_shard`, which waits until it is let go and may find no room."""

    def __init__(self, *, full: bool = False) -> None:
        self.gate, self.full = threading.Event(), full

    def __call__(self, *args: Any) -> Any:
        assert self.gate.wait(60)
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_shard(*args)


def two_ranks(root: str) -> dict[str, Any]:
    run, folder = SmallRun(1, 2, BF16), Path(root)
    run.train(2)
    run.save(folder / "waiting" / "best")
    results: dict[str, Any] = {}
    writer = CheckpointWriter(run.world, background=True)
    folders = [folder / "best", folder / "step-000000002"]
    results["save"] = save_slowly(run, writer, folders)
    results["second"] = second_save(run, writer, folder)
    results["failures"] = [
        failure(run, writer, folder / "step-000000009", name) for name in ("poll", "wait", "save")
    ]
    writer_module.write_shard = write_shard
    results["afterwards"] = [*run.start_save(writer, [folder / "step-000000010"]), *writer.wait()]
    return results


def save_slowly(run: SmallRun, writer: CheckpointWriter, folders: list[Path]) -> dict[str, Any]:
    """Rank 1's disk takes until after two more steps of training."""
    disk = Disk()
    writer_module.write_shard = disk if run.world.rank == 1 else write_shard
    told = {"save": run.start_save(writer, folders)}
    run.train(2, writer)
    told["poll while rank 1 writes"] = writer.poll()
    told["there while rank 1 writes"] = [folder for folder in folders if folder.exists()]
    disk.gate.set()
    writer._pending.shards.result()  # type: ignore[union-attr]
    told["poll"] = writer.poll()
    told["poll without a save"] = writer.poll() + writer.wait()
    return told


def second_save(run: SmallRun, writer: CheckpointWriter, folder: Path) -> list[Path]:
    """A save completes the one before; the same host memory serves both."""
    writer_module.write_shard = write_shard
    run.start_save(writer, [folder / "step-000000004"])
    run.train(1, writer)
    return [*run.start_save(writer, [folder / "step-000000005"]), *writer.wait()]


def failure(run: SmallRun, writer: CheckpointWriter, folder: Path, found_by: str) -> str:
    """What this rank is told by the next call when rank 1's disk is full."""
    disk = Disk(full=run.world.rank == 1)
    writer_module.write_shard = disk
    run.start_save(writer, [folder])
    disk.gate.set()
    try:
        if found_by == "poll":
            writer._pending.shards.exception()  # type: ignore[union-attr]
            writer.poll()
        elif found_by == "wait":
            writer.wait()
        else:
            run.start_save(writer, [folder])
    except CheckpointError as error:
        return str(error)
    return "nothing"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("writer")


@pytest.fixture(scope="module")
def two(root: Path) -> list[dict[str, Any]]:
    return run_ranks(two_ranks, 2, str(root))


def test_training_goes_on_while_a_rank_writes(two, root):
    folders = [root / "best", root / "step-000000002"]
    for rank in two:
        assert rank["save"] == {
            "save": [],
            "poll while rank 1 writes": [],
            "there while rank 1 writes": [],
            "poll": folders,
            "poll without a save": [],
        }


def test_both_ways_write_the_same_bytes(two, root):
    waited = root / "waiting" / "best"
    names = sorted(path.name for path in waited.iterdir())
    assert len(names) == 5
    for folder in (root / "best", root / "step-000000002"):
        assert filecmp.cmpfiles(waited, folder, names, shallow=False) == (names, [], [])


def test_a_save_completes_the_one_before(two, root):
    for rank in two:
        assert rank["second"] == [root / "step-000000004", root / "step-000000005"]
    assert len(differing(root / "step-000000004", root / "step-000000005")) > 40
    for step in (4, 5):
        CheckpointReader(root / f"step-{step:09d}").verify()


def test_a_failure_is_told_to_all_ranks_by_the_next_call(two, root):
    expected = "saving step-000000009: failed on rank 1: OSError: [Errno 28] No space left on device"
    for rank in two:
        assert rank["failures"] == [expected] * 3
        assert rank["afterwards"] == [root / "step-000000010"]
    assert not [path for path in root.iterdir() if path.name.startswith(".") or path.name == "step-000000009"]
