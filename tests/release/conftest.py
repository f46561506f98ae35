"""One real bucket for all tests of Jobs, and what training in a Pod reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.store.weed import Weed, shared
from tests.store.weed import environment as keys


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Weed:
    return shared(request.config)


@pytest.fixture
def store(server: Weed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """An empty store; and this process as a pod of its own."""
    for name, value in keys(server).items():
        monkeypatch.setenv(name, value)
    # Measurements then wait for the orchestrator, and nothing waits for them.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "node"))
    (tmp_path / "node").mkdir()
    return f"s3://test/{tmp_path.name}"


@pytest.fixture(scope="session")
def trained_from(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from tests.training.inputs import write_inputs

    return write_inputs(tmp_path_factory.mktemp("inputs"))
