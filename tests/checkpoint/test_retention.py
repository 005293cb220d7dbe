import pytest

from megamoe.checkpoint.retention import prune
from tests.checkpoint.small import write_small, write_step


@pytest.fixture
def run(tmp_path):
    for step in (10, 20, 30, 40, 50):
        write_step(tmp_path / "checkpoints", step)
    write_small(tmp_path / "best")
    return tmp_path


def kept(run):
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "expected"),
    [
        (1, 0, [50]),
        (2, 0, [40, 50]),
        (2, 20, [20, 40, 50]),
        (1, 10, [10, 20, 30, 40, 50]),
        (9, 0, [10, 20, 30, 40, 50]),
    ],
)
def test_newest_and_multiples_stay(run, keep_last, keep_every, expected):
    deleted = prune(run / "checkpoints", keep_last, keep_every)
    assert kept(run) == expected
    assert len(deleted) == 5 - len(expected)
    assert (run / "best" / "manifest.json").exists()


def test_torn_ones_do_not_count(run):
    for step in (40, 50):
        (run / "checkpoints" / f"step-{step:09d}" / "state.json").unlink()
    prune(run / "checkpoints", keep_last=1)
    assert kept(run) == [30, 40, 50]


def test_nothing_to_prune(tmp_path):
    assert prune(tmp_path / "checkpoints", keep_last=1) == []
