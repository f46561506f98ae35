"""Settings that must stand before anything is imported."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.store.weed import Weed

# Tests run on as many workers as there are cores; more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Started by a script with `&`, SIGINT would be ignored, and with Dagster SIGTERM too, by all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


LONGEST = ("test_pipeline.py", "test_loop.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no worker waits for another's at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture
def s3_store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Weed:
    """The S3 server of this test process, with its address and keys in the environment."""
    from tests.store.weed import environment, shared

    server = shared(request.config)
    for name, value in environment(server).items():
        monkeypatch.setenv(name, value)
    return server
