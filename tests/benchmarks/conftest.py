"""A process group of one rank, which is gone afterwards."""

from collections.abc import Iterator

import pytest

from megamoe.parallel.launch import Launch, World, start


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    for name, value in Launch().environment().items():
        monkeypatch.setenv(name, value)
    world = start(Launch())
    yield world
    world.shutdown()
