"""The writer cut at every system call that changes a file: what was saved before always loads."""

import os
import resource
import shutil
import signal
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from megamoe.checkpoint.folder import clear_leftovers
from megamoe.checkpoint.format import step_folder
from megamoe.checkpoint.reader import CheckpointReader, find_latest, locate
from megamoe.config import RunConfig
from megamoe.training.run_folder import RunFolder
from megamoe.training.session import _checkpoint_to_resume
from tests.checkpoint.faults import cut_at, fail, in_child, join_alone, kill, save_and_train_on, warm_up

# Both ways write by the same functions, so a part of the cuts is enough for one of them.
CUTS_APART = {False: 4, True: 1}
MODES = pytest.mark.parametrize("background", [False, True], ids=["waiting", "in the background"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run that has saved its first step, which is its best."""
    warm_up()
    root = tmp_path_factory.mktemp("saved")
    folders = [root / "best", root / "checkpoints" / step_folder(1)]
    assert in_child(lambda: save_and_train_on(folders, 1, background=True)) == (False, "")
    return root


@pytest.fixture
def scratch():
    """A folder in memory where there is such a file system: hundreds of syncs are slow elsewhere."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture
def run(saved, scratch):
    return shutil.copytree(saved, scratch / "run")


def save(run, step, background, **options):
    folders = [run / "best", run / "checkpoints" / step_folder(step)]
    save_and_train_on(folders, step, background=background, **options)


def save_cut_at(run, number, cut, background):
    return in_child(lambda: save(run, 2, background, before=lambda: cut_at(number, cut)))


def value_of(folder):
    """The value that every weight of a whole checkpoint has."""
    reader = CheckpointReader(folder)
    reader.verify()
    values = {float(reader.tensor("weight", name).unique()) for name in reader.names("weight")}
    assert values == {reader.state.step}
    return values.pop()


def require_loadable(run):
    """The newest step and the best are whole, be they the former or the new ones."""
    assert value_of(find_latest(run)) in (1, 2)
    assert value_of(locate(run / "best")) in (1, 2)


def recover(run):
    for parent in (run, run / "checkpoints"):
        clear_leftovers(parent)
    require_loadable(run)
    assert not [path for path in run.rglob(".*") if path.is_dir()]


@MODES
def test_killed_at_any_call_it_leaves_what_was_saved_before(run, background, scratch):
    number, outcomes = 0, set()
    while True:
        number += CUTS_APART[background]
        here = shutil.copytree(run, scratch / str(number))
        killed, problem = save_cut_at(here, number, kill, background)
        assert problem == ""
        require_loadable(here)
        recover(here)
        outcomes.add((value_of(find_latest(here)), value_of(here / "best")))
        shutil.rmtree(here)
        if not killed:
            break
    assert outcomes == {(1, 1), (1, 2), (2, 2)}
    assert number > 30


@MODES
def test_refused_at_any_call_it_says_so_and_leaves_what_was_saved_before(run, background, scratch):
    number = refused = 0
    while True:
        number += CUTS_APART[background]
        here = shutil.copytree(run, scratch / str(number))
        killed, problem = save_cut_at(here, number, fail, background)
        assert not killed
        require_loadable(here)
        refused += bool(problem)
        if problem:
            assert problem.startswith("CheckpointError: saving best and step-000000002: failed on rank 0: ")
            assert problem.endswith("No space left on device")
        elif value_of(find_latest(here)) == 2 and not list(here.rglob(".*")):
            break
        shutil.rmtree(here)
    assert refused * CUTS_APART[background] > 30


@MODES
def test_a_full_disk_leaves_what_was_saved_before(saved, tmp_path, background):
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        here = shutil.copytree(saved, disk / "run")
        killed, problem = in_child(lambda: save(here, 2, background, n_elements=20_000))
        assert not killed
        assert "failed on rank 0: OSError: [Errno 28] No space left on device" in problem
        assert not list(here.rglob(".*"))
        assert (value_of(find_latest(here)), value_of(here / "best")) == (1, 1)
        assert in_child(lambda: save(here, 2, background)) == (False, "")
        assert (value_of(find_latest(here)), value_of(here / "best")) == (2, 2)
    finally:
        subprocess.run(["umount", disk], check=True)


@MODES
def test_a_shard_cut_in_its_middle_leaves_what_was_saved_before(run, background):
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        save(run, 2, background, n_elements=20_000)

    killed, problem = in_child(limited)
    assert not killed
    assert "OSError: [Errno 27] File too large" in problem
    assert not list(run.rglob(".*"))
    assert (value_of(find_latest(run)), value_of(run / "best")) == (1, 1)


def test_a_session_starts_by_clearing_what_killed_ones_left(run):
    for leftover in (run / ".best.tmp", run / "checkpoints" / f".{step_folder(2)}.tmp"):
        leftover.mkdir()
        (leftover / "shard-00000-of-00001.safetensors").touch()
    (run / "best").rename(run / ".best.old")

    def start_session():
        config = replace(RunConfig(), output_dir=str(run.parent), name=run.name)
        found = _checkpoint_to_resume(config, RunFolder.of(config), join_alone())
        assert found == run / "checkpoints" / step_folder(1)

    assert in_child(start_session) == (False, "")
    assert sorted(path.name for path in run.rglob("*") if path.is_dir()) == [
        "best", "checkpoints", step_folder(1),
    ]  # fmt: skip
