import errno
from pathlib import Path

import pytest

from megamoe.checkpoint.folder import clear_leftovers, remove, temporary
from megamoe.checkpoint.reader import CheckpointReader
from tests.checkpoint.small import write_small, write_step


def names(folder):
    return sorted(path.name for path in folder.iterdir())


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
