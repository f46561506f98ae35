"""Two Pods of one Job, each with torchrun, train together as two processes of one machine would."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.project import CHECKOUT
from tests.release.pods import Pod, copied, training_request, until
from tests.release.stub import StubCluster
from valr_ops.recipe.recipe import read
from valr_ops.release import pod
from valr_ops.release.dispatch import Cluster
from valr_ops.release.endings import Ending, Pace
from valr_ops.release.manifest import documents
from valr_ops.stages import stage

TWO = {"runtime.processes": 2, "stage1.accumulation": 1, "stage1.max_updates": 20}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubCluster]:
    """A cluster whose Pods run this checkout."""
    made = StubCluster(cwd=CHECKOUT, disk=tmp_path / "disk")
    monkeypatch.setenv("KUBECONFIG", str(made.kubeconfig(tmp_path / "kubeconfig")))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.timeout(1800)
def test_two_pods_train_what_one_machine_would_even_if_a_rank_is_killed(
    store: str, trained_from: dict[str, Path], cluster: StubCluster, tmp_path: Path
) -> None:
    request = training_request(store, trained_from, **TWO)
    alone = replace(request, store=f"{store}/alone")
    training_request(alone.store, trained_from)
    expected = Pod(pod.submit(alone), tmp_path / "alone", "stage1_sft").ended()["digest"]

    url, said, heard = pod.submit(request), list[str](), list[str]()
    settings = {"namespace": "default", "nodes": 2, "grace_seconds": 60}
    recipe = read({**request.recipe, "cluster": {**request.recipe["cluster"], **settings}})
    made = documents(stage("stage1_sft"), recipe, url)
    jobs = Cluster(recipe.cluster, said.append, Pace(poll_seconds=0.2))

    def wait() -> Ending:
        assert jobs.start(made) == "started"
        return jobs.wait(made[-1], lambda pod, line: heard.append(line))

    found: list[Ending] = []
    thread = threading.Thread(target=lambda: found.append(wait()))
    thread.start()
    until(lambda: copied(url) or found)
    (second,) = [one for one in cluster.running() if "-1-p" in one]
    process = cluster.pods[second].process
    assert process is not None
    (rank,) = psutil.Process(process.pid).children()
    rank.kill()
    thread.join()
    assert found[0].kind == "killed" and found[0].can_be_retried, found[0]
    assert f"in Pod {second} rank 1 was killed by SIGKILL" in found[0].sentence

    heard.clear()
    assert wait().kind == "succeeded", heard
    assert any(re.search(r"going on after update \d+", line) for line in heard)
    result = pod.result(url)
    assert result is not None and result.digest == expected
    assert cluster.created == [made[-1]["metadata"]["name"]] * 2
