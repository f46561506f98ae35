"""What a Job's container runs, as a process of a test; and requests small enough for one."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import tiny
from tests.project import CHECKOUT
from valr_ops.recipe import recipes
from valr_ops.recipe.recipe import override
from valr_ops.release.pod import Request
from valr_ops.stages import stage
from valr_ops.store.objects import S3Files
from valr_ops.store.remote import Remote

RECIPE = override(recipes.load(CHECKOUT, {"scale": "tiny"}), {"data.synthetic.train_records": 16})
TRAINING = {"stage1.max_updates": 40, "stage1.epochs": 90, "stage1.checkpoint_every": 1}


def request_for(name: str = "sources", store: str = "s3://test/store", **changes: Any) -> Request:
    """A request for a stage without inputs."""
    recipe = override(RECIPE, changes).model_dump(mode="json")
    return Request(store, name, recipe, inputs={}, code=stage(name).code_digest(CHECKOUT))


def training_request(store: str, inputs: dict[str, Path], **changes: Any) -> Request:
    """Stage 1 of a very small model, whose inputs are in the store."""
    remote, row = Remote(store), stage("stage1_sft")
    digests = {name: remote.push(inputs[name]).digest for name in row.inputs}
    recipe = tiny.recipe(**{**TRAINING, **changes}).model_dump(mode="json")
    return Request(store, row.name, recipe, digests, row.code_digest(CHECKOUT))


def copied(url: str) -> list[str]:
    """Names of the checkpoints in the mirror of a job."""
    return [name for name in S3Files(f"{url}/checkpoints").names(".json") if "/" not in name]


class Pod:
    """The verb in a process that has a node's disk to itself.

    It starts with its imports done, which take ten times as long as such a small stage.
    """

    def __init__(self, url: str, node: Path, stage: str = "sources", **variables: str) -> None:
        node.mkdir(exist_ok=True)
        self._out, self._errors = node / "stdout", node / "stderr"
        environment = {**os.environ, "TMPDIR": str(node), "OMP_NUM_THREADS": "1", **variables}
        # A pod is not told where MLflow is, and reaches none.
        del environment["MLFLOW_TRACKING_URI"]
        words = ["run", stage, "--job", url]
        self._process = _WARM.Process(target=_contain, args=(words, environment, self._out, self._errors))
        self._process.start()

    def kill(self) -> None:
        """As if its node went away."""
        self._process.kill()
        self._process.join()

    def terminate(self) -> None:
        """As if it were evicted."""
        self._process.terminate()

    def runs(self) -> bool:
        return self._process.is_alive()

    def wait(self) -> int:
        """Its exit status."""
        self._process.join(240)
        assert self._process.exitcode is not None, f"it does not end:\n{self.errors()}"
        return self._process.exitcode

    def errors(self) -> str:
        """What it said to people."""
        return self._errors.read_text()

    def ended(self) -> dict[str, Any]:
        """The JSON document with which it ends well."""
        assert self.wait() == 0, self.errors()
        said: dict[str, Any] = json.loads(self._out.read_text().strip().splitlines()[-1])
        return said


_WARM = multiprocessing.get_context("forkserver")
_WARM.set_forkserver_preload(["valr_ops.release.pod", "valr_ops.training.loop", "valr_ops.data.sources"])


def _contain(words: list[str], environment: dict[str, str], out: Path, errors: Path) -> None:
    for number, path in ((1, out), (2, errors)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115 - to its end
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(CHECKOUT)
    tempfile.tempdir = None
    from valr_ops.__main__ import main

    sys.exit(main(words))


def until(true: Callable[[], Any], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)
