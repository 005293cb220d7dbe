"""Settings of the whole suite."""

import pytest
from hypothesis import settings

# Examples take as long as a busy machine lets them.
settings.register_profile("suite", deadline=None, max_examples=50)
settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest test first, so that the others run beside it."""
    items.sort(key=lambda item: "demo" not in item.nodeid)
