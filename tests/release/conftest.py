"""One real bucket for all tests of Jobs, and what training in a Pod reads."""

from __future__ import annotations

from multiprocessing import util
from pathlib import Path

import pytest

from tests.store.weed import Weed


@pytest.fixture
def store(s3_store: Weed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """An empty store; and this process as a pod of its own."""
    # Measurements then wait for the orchestrator, and nothing waits for them.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    # Pods are forked through sockets in the folder of the first look; below a node their paths would be too long.
    util.get_temp_dir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "node"))
    (tmp_path / "node").mkdir()
    return f"s3://test/{tmp_path.name}"


@pytest.fixture(scope="session")
def trained_from(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from tests.training.inputs import write_inputs

    return write_inputs(tmp_path_factory.mktemp("inputs"))
