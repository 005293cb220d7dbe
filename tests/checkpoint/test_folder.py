import errno
import os
import signal
import sys
from pathlib import Path

import pytest

from megamoe.checkpoint.folder import clear_leftovers, remove, temporary
from megamoe.checkpoint.reader import CheckpointReader, find_latest
from tests.checkpoint.small import some_tensors, write_small, write_step

CUTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def killed_at(event_number, action):
    """Run `action` in a process that dies at its n-th change of the file system; True if it did."""
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event, _arguments):
            nonlocal count
            if event in CUTS:
                count += 1
                if count == event_number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_a_writer_killed_anywhere_leaves_the_previous_one(tmp_path):
    previous = write_step(tmp_path, 1)
    cut = 0
    while killed_at(cut + 1, lambda: write_step(tmp_path, 2)):
        cut += 1
        latest = find_latest(tmp_path)
        CheckpointReader(latest).verify()
        assert latest in (previous, tmp_path / "step-000000002")
    assert cut > 5
    write_step(tmp_path, 3)
    assert names(tmp_path) == ["step-000000001", "step-000000002", "step-000000003"]


def test_a_writer_killed_while_replacing_leaves_the_old_or_the_new(tmp_path):
    best = tmp_path / "best"
    value = ("weight", "output.bias")
    cut = 0
    while True:
        write_small(best, some_tensors())
        if not killed_at(
            cut + 1, lambda: write_small(best, some_tensors() | {value: some_tensors()[value] + 1})
        ):
            break
        cut += 1
        clear_leftovers(tmp_path)
        assert names(tmp_path) == ["best"]
        reader = CheckpointReader(best)
        reader.verify()
        assert reader.tensor(*value)[0] in (0, 1)
    assert cut > 8


def test_leftovers_of_killed_runs_are_cleared(tmp_path):
    write_step(tmp_path, 1)
    for name in (".step-000000002.tmp", ".best.tmp", ".step-000000001.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard").touch()
    mine = [tmp_path / name for name in (".something.tmp", ".metrics.jsonl.tmp")]
    for path in mine:
        path.mkdir()
    clear_leftovers(tmp_path)
    assert names(tmp_path) == [".metrics.jsonl.tmp", ".something.tmp", "step-000000001"]


def test_a_failed_rename_keeps_the_former_folder(tmp_path, monkeypatch):
    best = write_small(tmp_path / "best")
    rename = Path.rename

    def full(path, target):
        if path == temporary(best):
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        write_small(best)
    CheckpointReader(best).verify()
    assert names(tmp_path) == [".best.tmp", "best"]


def test_remove_deletes_everything(tmp_path):
    remove(write_step(tmp_path, 1))
    assert names(tmp_path) == []
