"""One cluster of two nodes for all tests of this folder."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, UnavailableError, require_able_machine

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def able_machine() -> None:
    """Skips where no cluster can run; continuous integration must be able to run one."""
    try:
        require_able_machine()
    except UnavailableError as reason:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(str(reason))


@pytest.fixture(scope="session")
def cluster(able_machine: None) -> Iterator[Cluster]:
    with Cluster(nodes=2) as cluster:
        yield cluster
