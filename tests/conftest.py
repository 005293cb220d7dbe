"""Settings of the whole suite."""

import os
import signal

import pytest
from hypothesis import settings

# One thread for each rank is fastest on few cores. And some tests fork: a child that wants the threads of its
# parent's OpenMP waits for ever. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Examples take as long as a busy machine lets them.
settings.register_profile("suite", deadline=None, max_examples=50)
settings.load_profile("suite")

# What a shell starts in its background ignores SIGINT, and so would the processes under test.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest test first, so that the others run beside it."""
    items.sort(key=lambda item: "demo" not in item.nodeid)
