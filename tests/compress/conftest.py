"""One small trained run for all tests of this folder."""

from pathlib import Path

import pytest

from megamoe.data.datasets import open_text
from megamoe.data.prepare import prepare
from tests.cli.conftest import CONFIG, megamoe


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its ``best`` folder; the text is found through an absolute path."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "fox.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 150)
    prepare(open_text([text], "the fox", by_lines=False), folder / "data", "bytes")
    (folder / "toy.toml").write_text(CONFIG)
    # Experts far from zero, so that what is lost of them shows.
    options = (f"data.path={folder / 'data'}", "training.max_steps=40", "model.init_std=0.2")
    done = megamoe("train", "--config", "toy.toml", *options, folder=folder)
    assert done.code == 0, done.errors
    return folder / "runs" / "toy" / "best"
