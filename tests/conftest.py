"""Settings that must stand before anything is imported."""

import os

import pytest

# Tests run on as many workers as there are cores; more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


LONGEST = ("test_pipeline.py", "test_loop.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no worker waits for another's at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
