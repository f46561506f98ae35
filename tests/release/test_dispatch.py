"""A stage's Job: what is sent to the cluster, and that each end of it is named in a sentence that says what to do.

Most of it runs the real Kubernetes client against tests/release/stub.py, and, marked `cluster`, unchanged against the
cluster that KUBECONFIG names. No image is needed where a node runs the Pod's command by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from assets.dispatch import _Job
from tests.project import CHECKOUT
from tests.release.stub import StubCluster
from valr_ops.__main__ import main
from valr_ops.recipe import recipes
from valr_ops.recipe.recipe import Recipe, RecipeError, override
from valr_ops.release.dispatch import Cluster, ClusterAwayError, ClusterError
from valr_ops.release.endings import Ending, Pace, ending
from valr_ops.release.manifest import (
    DATA_FOLDER,
    MEMBER,
    LocalPathError,
    documents,
    refuse_local_paths,
    request,
)
from valr_ops.stages import STAGES, stage

SMALL = {"cpu": "10m", "memory": "64Mi", "shared_memory": "1Mi", "scratch": "10Mi", "image": "busybox:1.37"}


@dataclass
class Place:
    """A namespace of a cluster in which a test makes its Jobs."""

    namespace: str
    pace: Pace
    said: list[str] = field(default_factory=list)
    heard: list[str] = field(default_factory=list)

    def recipe(self, **cluster: Any) -> Recipe:
        values = {"namespace": self.namespace, "grace_seconds": 5, **SMALL, **cluster}
        return override(recipes.tiny(), {"cluster": values, "runtime.processes": values.get("nodes", 1)})

    def cluster(self, recipe: Recipe, pace: Pace | None = None) -> Cluster:
        return Cluster(recipe.cluster, self.said.append, pace or self.pace)

    def run(self, command: str, url: str | None = None, pace: Pace | None = None, **settings: Any) -> Work:
        recipe = self.recipe(**settings)
        url = url or f"s3://valr/jobs/{uuid.uuid4().hex[:16]}"
        made = documents(stage("stage2_valr_m"), recipe, url, command=["sh", "-c", command])
        cluster = self.cluster(recipe, pace)
        try:
            return Work(self, cluster, made[-1], url, cluster.start(made))
        except ClusterError as error:
            if self.namespace != "default" and "knows no JobSets" in str(error):
                pytest.skip(str(error))
            raise


@dataclass
class Work:
    place: Place
    cluster: Cluster
    job: dict[str, Any]
    url: str
    how: str

    @property
    def name(self) -> str:
        return str(self.job["metadata"]["name"])

    def wait(self) -> Ending:
        return self.cluster.wait(self.job, lambda pod, line: self.place.heard.append(line))

    def meanwhile(self, seconds: float = 60) -> Callable[[], Ending]:
        """Wait in another thread; what is returned gives its ending."""
        found: list[Ending] = []
        thread = threading.Thread(target=lambda: found.append(self.wait()), daemon=True)
        thread.start()

        def ended() -> Ending:
            thread.join(seconds)
            assert found, "the wait did not end"
            return found[0]

        return ended

    def pod(self) -> str:
        """The name of its running Pod."""
        return until(lambda: [one["metadata"]["name"] for one in self.cluster.pods(self.job) if _runs(one)])[0]


def _runs(pod: dict[str, Any]) -> bool:
    return pod.get("status", {}).get("phase") == "Running"


def until(look: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
    return found


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubCluster]:
    cluster = StubCluster()
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(tmp_path / "kubeconfig")))
    yield cluster
    cluster.close()


@pytest.fixture
def here(stub: StubCluster) -> Place:
    """The stub."""
    return Place("default", Pace(poll_seconds=0.05, longest_pause_seconds=0.1))


@pytest.fixture(params=["stub", pytest.param("cluster", marks=pytest.mark.cluster)])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """The stub, or a namespace of the real cluster that is made for the test."""
    if request.param == "stub":
        yield request.getfixturevalue("here")
        return
    from kubernetes import client, config

    config.load_kube_config(os.environ["KUBECONFIG"])
    name = f"valr-test-{uuid.uuid4().hex[:8]}"
    core = client.CoreV1Api()
    core.create_namespace({"metadata": {"name": name}})
    yield Place(name, Pace(poll_seconds=0.2))
    core.delete_namespace(name)


# -------------------------------------------------------------------------------------------------- on any cluster


def test_a_job_that_ends_well_is_heard_and_is_complete(place: Place) -> None:
    work = place.run("for word in one two three; do echo $word; sleep 0.2; done")
    assert work.how == "started"
    assert work.wait().kind == "succeeded"
    assert place.heard == ["one", "two", "three"]


def test_who_comes_second_attaches_to_the_same_job(place: Place, tmp_path: Path) -> None:
    command = f"echo begun >> {tmp_path}/begun; sleep 1"
    first = place.run(command)
    second = place.run(command, first.url)
    assert (first.how, second.how) == ("started", "attached")
    assert second.wait().kind == first.wait().kind == "succeeded"
    assert (tmp_path / "begun").read_text() == "begun\n"


@pytest.mark.parametrize(
    ("command", "kind", "sentence"),
    [
        ("exit 42", "configuration", "status 42"),
        ("exit 75", "resume", "stopped when it was told to"),
        ("exit 1", "failed", "ended with status 1"),
        ("exit 137", "killed", "SIGKILL"),
    ],
)
def test_each_exit_status_has_its_sentence(place: Place, command: str, kind: str, sentence: str) -> None:
    ended = place.run(command).wait()
    assert ended.kind == kind and sentence in ended.sentence
    assert ended.can_be_retried == (kind != "configuration")


def test_an_evicted_pod_is_replaced_and_goes_on(place: Place, tmp_path: Path) -> None:
    stop = f"touch {tmp_path}/checkpoint; sleep 1; exit 75"
    work = place.run(f"test -e {tmp_path}/checkpoint && exit 0; trap '{stop}' TERM; while true; do sleep 0.1; done")
    ended = work.meanwhile()
    pod = work.pod()
    time.sleep(0.3)
    work.cluster._core.create_namespaced_pod_eviction(
        pod, place.namespace, {"metadata": {"name": pod, "namespace": place.namespace}}
    )
    assert ended().kind == "succeeded"
    assert any(f"Pod {pod} was taken from" in line and "starts another one by itself" in line for line in place.said)


def test_a_cancelled_job_writes_its_checkpoint_and_is_gone(place: Place, tmp_path: Path) -> None:
    work = place.run(f"trap 'touch {tmp_path}/checkpoint; exit 75' TERM; while true; do sleep 0.1; done")
    work.pod()
    time.sleep(0.3)
    work.cluster.cancel(work.job)
    assert (tmp_path / "checkpoint").exists()
    assert work.cluster.job(work.job) is None and not work.cluster.pods(work.job)


def test_a_job_that_somebody_deletes_is_said_to_be_deleted(place: Place) -> None:
    work = place.run("sleep 60")
    ended = work.meanwhile()
    work.pod()
    work.cluster.cancel(work.job)
    found = ended()
    assert found.kind == "deleted" and "by somebody" in found.sentence and not found.can_be_retried


def test_a_job_that_runs_too_long_is_stopped_and_says_what_to_raise(place: Place) -> None:
    ended = place.run("sleep 60", deadline_hours=1 / 3600).wait()
    assert ended.kind == "deadline" and "cluster.deadline_hours" in ended.sentence


def test_a_job_in_a_queue_is_suspended_and_not_waited_for_endlessly(place: Place) -> None:
    work = place.run("true", queue="gpus", wait_hours=1 / 3600)
    job = work.cluster.job(work.job)
    assert job is not None and job["spec"]["suspend"] and not work.cluster.pods(work.job)
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    ended = work.wait()
    assert ended.kind == "queue" and "cluster.wait_hours" in ended.sentence
    assert work.cluster.job(work.job) is not None, "it keeps its place in the queue"


def test_a_job_that_failed_is_started_again_under_its_name(place: Place, tmp_path: Path) -> None:
    command = f"test -e {tmp_path}/once && exit 0; touch {tmp_path}/once; exit 1"
    first = place.run(command)
    assert first.wait().kind == "failed"
    second = place.run(command, first.url)
    assert second.how == "started" and second.name == first.name
    assert second.wait().kind == "succeeded"


def test_two_that_begin_at_once_share_one_job(place: Place, tmp_path: Path) -> None:
    command, url = f"echo begun >> {tmp_path}/begun; sleep 0.5", f"s3://valr/jobs/{uuid.uuid4().hex[:16]}"
    place.run("exit 1", url).wait()
    works: list[Work] = []
    threads = [threading.Thread(target=lambda: works.append(place.run(command, url))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(work.how for work in works) == ["attached", "attached", "attached", "started"]
    assert {work.wait().kind for work in works} == {"succeeded"}
    assert (tmp_path / "begun").read_text() == "begun\n"


@pytest.mark.parametrize("gang", ["indexed_job", "jobset"])
def test_every_pod_of_several_nodes_knows_its_number(place: Place, gang: str) -> None:
    assert place.run("echo I am $JOB_COMPLETION_INDEX", nodes=2, gang=gang).wait().kind == "succeeded"
    assert sorted(place.heard) == ["I am 0", "I am 1"]


@pytest.mark.parametrize(
    ("gang", "status", "kind"),
    [
        ("indexed_job", 42, "configuration"),
        ("jobset", 42, "configuration"),
        ("jobset", 75, "resume"),
        ("jobset", 1, "failed"),
    ],
)
def test_a_failing_pod_of_several_ends_the_job_and_the_first_cause_is_said(
    place: Place, gang: str, status: int, kind: str
) -> None:
    others = "trap 'exit 75' TERM; while true; do sleep 0.1; done"
    work = place.run(f"test $JOB_COMPLETION_INDEX = 1 && exit {status}; {others}", nodes=2, gang=gang)
    assert work.wait().kind == kind
    again = place.run("true", work.url, nodes=2, gang=gang)
    assert again.how == "started" and again.wait().kind == "succeeded"


def test_pods_that_start_again_together_are_one_job_for_who_waits(place: Place, tmp_path: Path) -> None:
    stop = f"touch {tmp_path}/checkpoint; exit 75"
    command = f"test -e {tmp_path}/checkpoint && exit 0; trap '{stop}' TERM; while true; do sleep 0.1; done"
    work = place.run(command, nodes=2, gang="jobset")
    assert place.run(command, work.url, nodes=2, gang="jobset").how == "attached"
    ended = work.meanwhile()
    until(lambda: sum(map(_runs, work.cluster.pods(work.job))) == 2)
    time.sleep(0.3)
    pod = work.pod()
    work.cluster._core.create_namespaced_pod_eviction(
        pod, place.namespace, {"metadata": {"name": pod, "namespace": place.namespace}}
    )
    assert ended().kind == "succeeded"
    assert any("all of its Pods are started again together, time 1" in line for line in place.said)


def test_a_cancelled_set_of_pods_is_gone(place: Place) -> None:
    work = place.run("sleep 60", nodes=2, gang="jobset")
    work.pod()
    work.cluster.cancel(work.job)
    assert work.cluster.job(work.job) is None and not work.cluster.pods(work.job)


# ----------------------------------------------------------------------------------------- faults, on the stub only


def test_an_api_server_that_is_away_is_waited_for_and_no_second_job_is_made(stub: StubCluster, here: Place) -> None:
    work = here.run("sleep 0.5")
    with stub.away():
        ended = work.meanwhile()
        until(lambda: stub.refused >= 5)
    assert ended().kind == "succeeded"
    assert stub.created == [work.name]
    assert sum("does not answer" in line for line in here.said) == 1


@pytest.mark.slow
def test_an_api_server_that_is_away_for_a_minute_costs_half_a_minute_at_most(stub: StubCluster, here: Place) -> None:
    """At the pace of production: the Job ends meanwhile, and is found ended."""
    work = here.run("sleep 30", pace=Pace())
    ended = work.meanwhile(120)
    until(stub.running)
    with stub.away():
        time.sleep(60)
    back = time.monotonic()
    assert ended().kind == "succeeded"
    print(f"away for 60 s with {stub.refused} questions, seen {time.monotonic() - back:.1f} s after it was back")
    assert stub.created == [work.name]
    assert sum("does not answer" in line for line in here.said) == 1


def test_a_job_can_be_made_while_the_api_server_restarts(stub: StubCluster, here: Place) -> None:
    works: list[Work] = []
    with stub.away():
        thread = threading.Thread(target=lambda: works.append(here.run("true")))
        thread.start()
        until(lambda: stub.refused >= 3)
    thread.join()
    assert works[0].wait().kind == "succeeded" and len(stub.created) == 1


def test_an_api_server_that_stays_away_ends_the_wait_and_not_the_job(stub: StubCluster, here: Place) -> None:
    work = here.run("sleep 1", pace=Pace(poll_seconds=0.05, longest_pause_seconds=0.1, away_seconds=0.5))
    with stub.away(), pytest.raises(ClusterAwayError, match="it attaches to its Job"):
        work.wait()
    again = here.run("sleep 1", work.url)
    assert again.how == "attached" and again.wait().kind == "succeeded"


def test_a_busy_api_server_is_given_the_time_it_asks_for(stub: StubCluster, here: Place) -> None:
    stub.busy(1)
    assert here.run("true").wait().kind == "succeeded"
    assert stub.asked_at[1] - stub.asked_at[0] >= 1.0


def test_an_orchestrator_that_is_killed_leaves_its_job_to_the_next(
    stub: StubCluster, here: Place, tmp_path: Path
) -> None:
    url = f"s3://valr/jobs/{uuid.uuid4().hex[:16]}"
    command = f"until test -e {tmp_path}/go; do sleep 0.05; done"
    script = (
        "import sys\nfrom tests.release.test_dispatch import Place\nfrom valr_ops.release.endings import Pace\n"
        "Place('default', Pace(poll_seconds=0.05)).run(sys.argv[1], sys.argv[2]).wait()"
    )
    orchestrator = subprocess.Popen([sys.executable, "-c", script, command, url])
    until(stub.running)
    orchestrator.send_signal(signal.SIGKILL)
    orchestrator.wait()
    work = here.run(command, url)
    (tmp_path / "go").touch()
    assert work.how == "attached" and work.wait().kind == "succeeded"
    assert stub.created == [work.name]


def test_a_log_that_breaks_off_is_taken_up_where_it_stopped(stub: StubCluster, here: Place) -> None:
    stub.cut_logs(3)
    work = here.run("for n in 1 2 3 4 5 6; do echo line $n; sleep 0.2; done")
    assert work.wait().kind == "succeeded"
    assert here.heard == [f"line {number}" for number in range(1, 7)]


def test_what_a_stage_said_last_is_the_sentence(stub: StubCluster, here: Place) -> None:
    words = "echo working; echo valr: data/monet does not exist, correct data.sources; echo '{}'; exit 42"
    ended = here.run(words).wait()
    assert ended.sentence == "data/monet does not exist, correct data.sources"


def test_a_pod_without_memory_says_which_setting_was_too_small(stub: StubCluster, here: Place) -> None:
    work = here.run("sleep 60")
    ended = work.meanwhile()
    stub.out_of_memory(work.pod())
    found = ended()
    assert found.kind == "memory" and "cluster.memory=64Mi" in found.sentence and not found.can_be_retried


def test_one_of_several_pods_that_is_taken_away_is_the_cause(stub: StubCluster, here: Place) -> None:
    work = here.run("trap 'exit 75' TERM; while true; do sleep 0.1; done", nodes=2)
    ended = work.meanwhile()
    until(lambda: len(stub.running()) == 2)
    time.sleep(0.3)
    stub.evict(stub.running()[1], "PreemptionByScheduler", "preempted by a pod of higher priority")
    found = ended()
    assert found.kind == "evicted" and "PreemptionByScheduler" in found.sentence and found.can_be_retried


def test_a_lost_node_is_named_with_the_command_that_gives_it_up(stub: StubCluster, here: Place) -> None:
    work = here.run("sleep 60", grace_seconds=1, pace=Pace(poll_seconds=0.05, lost_seconds=0.2))
    ended = work.meanwhile()
    stub.lose_node(work.pod())
    found = ended()
    assert found.kind == "node_lost" and "kubectl taint nodes node-1" in found.sentence
    assert stub.removed == [], "the Job is left as it is"


def test_an_image_that_can_not_be_pulled_is_not_waited_for_all_night(stub: StubCluster, here: Place) -> None:
    stub.hold("ImagePullBackOff", "manifest unknown")
    ended = here.run("true", pace=Pace(poll_seconds=0.05, start_seconds=0.3)).wait()
    assert ended.kind == "image" and "busybox:1.37" in ended.sentence and "manifest unknown" in ended.sentence


def test_a_job_that_never_began_is_replaced_when_the_settings_were_corrected(stub: StubCluster, here: Place) -> None:
    stub.hold("ImagePullBackOff", "manifest unknown")
    wrong = here.run("true", pace=Pace(poll_seconds=0.05, start_seconds=0.1), image="busybox:1.3")
    assert wrong.wait().kind == "image"
    right = here.run("true", wrong.url, image="busybox:1.37")
    assert right.how == "started" and len(stub.created) == 2
    stub.hold(None)
    assert right.wait().kind == "succeeded"


def test_a_missing_secret_is_said(stub: StubCluster, here: Place) -> None:
    stub.hold("CreateContainerConfigError", 'secret "valr-bucket" not found')
    ended = here.run("true", pace=Pace(poll_seconds=0.05, start_seconds=0.1), secrets=["valr-bucket"]).wait()
    assert ended.kind == "start" and 'secret "valr-bucket" not found' in ended.sentence


def test_a_pod_without_a_gpu_waits_says_so_and_starts_when_there_is_one(stub: StubCluster, here: Place) -> None:
    stub.hold("Unschedulable", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")
    work = here.run("true")
    ended = work.meanwhile()
    until(lambda: any("3 Insufficient nvidia.com/gpu" in line for line in here.said))
    stub.hold(None)
    assert ended().kind == "succeeded"


def test_a_pod_that_finds_no_node_at_all_ends_the_wait(stub: StubCluster, here: Place) -> None:
    stub.hold("Unschedulable", "0/3 nodes are available")
    assert here.run("true", wait_hours=0.2 / 3600).wait().kind == "unschedulable"


def test_a_queued_job_runs_once_it_is_admitted(stub: StubCluster, here: Place) -> None:
    work = here.run("true", queue="gpus")
    ended = work.meanwhile()
    until(lambda: any("waits in the queue gpus" in line for line in here.said))
    stub.admit(work.name)
    assert ended().kind == "succeeded"


def test_a_queued_set_of_pods_runs_once_it_is_admitted(stub: StubCluster, here: Place) -> None:
    work = here.run("true", queue="gpus", nodes=2, gang="jobset")
    ended = work.meanwhile()
    until(lambda: any("waits in the queue gpus" in line for line in here.said))
    stub.admit(work.name)
    assert ended().kind == "succeeded"


def test_a_cluster_without_jobsets_is_told_apart_from_one_without_the_namespace(stub: StubCluster, here: Place) -> None:
    stub.has_jobsets = False
    with pytest.raises(
        ClusterError, match=r"install JobSet \(jobset.sigs.k8s.io\), or set cluster.gang to indexed_job"
    ):
        here.run("true", nodes=2, gang="jobset")


POD = 'pods "valr-x-abc" is forbidden: '


@pytest.mark.parametrize("gang", ["indexed_job", "jobset"])
def test_a_pod_above_the_quota_waits_for_room_and_says_so(stub: StubCluster, here: Place, gang: str) -> None:
    stub.forbid(f"{POD}exceeded quota: valr, requested: requests.memory=64Mi, used: requests.memory=1Gi")
    work = here.run("true", nodes=2, gang=gang)
    ended = work.meanwhile()
    until(lambda: any("exceeded quota: valr, requested: requests.memory=64Mi" in line for line in here.said))
    stub.forbid(None)
    assert ended().kind == "succeeded"


@pytest.mark.parametrize(
    ("message", "mend"),
    [
        (f'{POD}violates PodSecurity "restricted:latest": unrestricted capabilities', "valr plan --manifest"),
        (
            f'{POD}error looking up service account valr/none: serviceaccount "none" not found',
            "cluster.service_account",
        ),
        (f"{POD}no PriorityClass with name night was found", "cluster.priority_class"),
        ('admission webhook "policy" denied the request: no', "the rule of the cluster that refuses it"),
    ],
)
def test_a_pod_that_is_refused_ends_the_wait_with_the_reason(
    stub: StubCluster, here: Place, message: str, mend: str
) -> None:
    stub.forbid(message)
    ended = here.run("true", pace=Pace(poll_seconds=0.05, start_seconds=0.2)).wait()
    assert ended.kind == "forbidden" and not ended.can_be_retried
    assert message.removeprefix(POD) in ended.sentence and mend in ended.sentence
    assert "valr-x-abc" not in ended.sentence, "each attempt has another name, and would be told again"


def test_a_job_whose_controller_sleeps_is_not_waited_for_all_night(stub: StubCluster, here: Place) -> None:
    stub.forbid("nobody is told")
    work = here.run("true", pace=Pace(poll_seconds=0.05, start_seconds=0.2))
    stub.events.clear()
    ended = work.wait()
    assert ended.kind == "start" and "no event says why" in ended.sentence


def test_without_a_cluster_the_error_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(ClusterError, match="set KUBECONFIG"):
        Cluster(recipes.tiny().cluster, print)


# ---------------------------------------------------------------------------------------------------- what it says


def failed(message: str, *pods: dict[str, Any]) -> str:
    condition = {"type": "Failed", "status": "True", "reason": "PodFailurePolicy", "message": message}
    job = {"metadata": {"name": "valr-x"}, "status": {"conditions": [condition]}}
    found = ending(job, pods, recipes.tiny().cluster)
    assert found is not None
    return found.kind


def test_the_rule_that_ended_a_job_counts_where_the_pod_it_was_is_gone() -> None:
    ended = {"name": "stage", "state": {"terminated": {"exitCode": 1, "reason": "Error"}}}
    peer = {"metadata": {"name": "valr-x-0"}, "status": {"phase": "Failed", "containerStatuses": [ended]}}
    assert failed("Pod valr/x-1 has condition DisruptionTarget matching FailJob rule at index 0", peer) == "evicted"
    assert failed("Job has reached the specified backoff limit", peer) == "failed"


def test_a_killed_rank_is_the_cause_and_not_the_peers_that_could_not_reach_it() -> None:
    def ended(number: int, code: int, message: str) -> dict[str, Any]:
        state = {"terminated": {"exitCode": code, "reason": "Error", "message": message}}
        containers = [{"name": "stage", "state": state}]
        return {
            "metadata": {"name": f"valr-x-{number}"},
            "status": {"phase": "Failed", "containerStatuses": containers},
        }

    job = {"metadata": {"name": "valr-x"}, "status": {"conditions": [{"type": "Failed", "status": "True"}]}}
    peer = ended(0, 1, "valr: RuntimeError: Connection closed by peer\nE1126 failed (exitcode: 1) local_rank: 0\n")
    killed = ended(1, 137, "valr: rank 1 was killed by SIGKILL\n")
    found = ending(job, [peer, killed], recipes.tiny().cluster)
    assert found is not None and found.kind == "killed"
    assert "in Pod valr-x-1 rank 1 was killed by SIGKILL" in found.sentence
    alone = ending(job, [peer], recipes.tiny().cluster)
    assert alone is not None and alone.sentence.endswith("status 1: RuntimeError: Connection closed by peer")


def test_a_failed_job_without_pods_is_explained_by_its_condition() -> None:

    said = "Container stage for pod valr/valr-x-abc failed with exit code {} matching FailJob rule at index 1"
    assert failed(said.format(42)) == "configuration"
    assert failed(said.format(75)) == "resume"
    assert failed("Pod valr/x has condition DisruptionTarget matching FailJob rule at index 0") == "evicted"
    assert failed("Job has reached the specified backoff limit") == "failed"


# ------------------------------------------------------------------------------------------------------- manifests

MANY = [
    (row.name, scale, changes)
    for row in STAGES
    if row.resources == "gpu"
    for scale, changes in (
        ("tiny", {}),
        (
            "small",
            {
                "cluster.secrets": ["valr-bucket"],
                "cluster.service_account": "valr-stage",
                "cluster.data_claim": "valr-data",
            },
        ),
        ("paper", {"cluster.queue": "gpus", "cluster.priority_class": "valr-stages"}),
        ("paper", {"cluster.nodes": 2, "runtime.processes": 8}),
        ("paper", {"cluster.nodes": 2, "runtime.processes": 8, "cluster.gang": "jobset", "cluster.queue": "gpus"}),
    )
]


def documents_of(name: str, scale: str, changes: dict[str, Any]) -> list[dict[str, Any]]:
    return documents(stage(name), override(recipes.scale(scale), changes), "s3://valr/prod/jobs/0123456789abcdef")


@pytest.mark.parametrize("kind", ["batch/v1 Job", "v1 Service"])
def test_manifests_fit_the_schema(kind: str) -> None:
    import kubernetes_validate

    seen = set()
    for name, scale, changes in MANY:
        for document in documents_of(name, scale, changes):
            shape = (scale, str(changes), stage(name).group)
            if document["kind"] == "JobSet":
                # Nobody brings its schema; most of it is that of a Job.
                document = job_in(document)
            if f"{document['apiVersion']} {document['kind']}" == kind and shape not in seen:
                seen.add(shape)
                kubernetes_validate.validate(document, "1.36", strict=True)
    assert seen


@pytest.mark.parametrize(("name", "scale", "changes"), MANY)
def test_manifests_keep_the_rules_that_no_schema_knows(name: str, scale: str, changes: dict[str, Any]) -> None:
    recipe = override(recipes.scale(scale), changes)
    *services, job = documents_of(name, scale, changes)
    spec = job_in(job)["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert len(f"{job['metadata']['name']}-{MEMBER}-0-0-abcde") <= 63, "the name of a Pod in a JobSet"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert pod["restartPolicy"] == "Never" and spec["backoffLimit"] == 0
    assert spec["podReplacementPolicy"] == "Failed", "what podFailurePolicy asks for"
    assert all(
        rule["onExitCodes"]["containerName"] == container["name"] for rule in spec["podFailurePolicy"]["rules"][1:]
    )
    requests, limits = container["resources"]["requests"], container["resources"]["limits"]
    assert all(isinstance(amount, str) for amount in (*requests.values(), *limits.values()))
    assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu")
    assert ("nvidia.com/gpu" in limits) == (recipe.runtime.device == "cuda")
    if stage(name).group == "training" and recipe.runtime.device == "cuda":
        assert int(limits["nvidia.com/gpu"]) * spec["completions"] == recipe.runtime.processes
    if stage(name).group == "teachers" and recipe.runtime.device == "cuda":
        assert spec["completions"] == 1
        assert int(limits["nvidia.com/gpu"]) * recipe.cluster.nodes == recipe.runtime.processes, "as many as a node has"
    memory = {volume["name"]: volume.get("emptyDir", {}) for volume in pod["volumes"]}["shared-memory"]
    assert memory["medium"] == "Memory" and _bytes(memory["sizeLimit"]) < _bytes(limits["memory"])
    assert (
        pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    )
    assert container["securityContext"]["readOnlyRootFilesystem"]
    written = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    variables = {one["name"]: one["value"] for one in container["env"]}
    assert {variables["TMPDIR"], "/tmp"} <= written, "what torch.compile and Triton build; /tmp is the image's HOME"
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert pod["automountServiceAccountToken"] is False
    assert job["spec"]["suspend"] == (recipe.cluster.queue is not None)
    assert ("kueue.x-k8s.io/queue-name" in job["metadata"]["labels"]) == (recipe.cluster.queue is not None)
    assert spec["activeDeadlineSeconds"] > pod["terminationGracePeriodSeconds"]
    several = stage(name).group == "training" and recipe.cluster.nodes > 1
    assert several == (spec["completionMode"] == "Indexed")
    assert bool(services) == ("subdomain" in pod) == (several and recipe.cluster.gang == "indexed_job")
    for service in services:
        assert service["metadata"]["name"] == pod["subdomain"]
        assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()


CLAIM = {"name": "data", "persistentVolumeClaim": {"claimName": "valr-data", "readOnly": True}}


@pytest.mark.parametrize(
    ("name", "mounted"),
    [
        ("teacher_features_dinov3", True),
        ("teacher_features_qwen", False),
        ("stage2_valr_s", True),
        ("scores_base", True),
        ("stage1_sft", False),
        ("base_model", False),
    ],
)
def test_a_pod_that_reads_local_paths_gets_the_claim_read_only(name: str, mounted: bool) -> None:
    pod = job_in(documents_of(name, "paper", {"cluster.data_claim": "valr-data"})[-1])["spec"]["template"]["spec"]
    mount = {"name": "data", "mountPath": DATA_FOLDER, "readOnly": True}
    assert (CLAIM in pod["volumes"]) == (mount in pod["containers"][0]["volumeMounts"]) == mounted
    without = job_in(documents_of(name, "paper", {})[-1])["spec"]["template"]["spec"]
    assert [volume for volume in without["volumes"] if "persistentVolumeClaim" in volume] == []


CLAIMED = {"cluster.data_claim": "valr-data"}
OWN = {"scenes": {"format": "jsonl", "path": "data/own"}, "far": {"format": "jsonl", "path": "s3://bucket/own"}}
HUB = {"weights": None, "hub_id": "timm/x", "revision": "0" * 40}


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        (
            "teacher_features_dinov3",
            {},
            r"teachers\.dinov3\.weights=weights/dinov3\.safetensors, .*cluster\.data_claim",
        ),
        ("teacher_features_dinov3", {}, r"or set teachers\.dinov3\.hub_id and revision instead"),
        ("teacher_features_dinov3", CLAIMED, None),
        ("teacher_features_dinov3", {"teachers.dinov3": HUB}, None),
        (
            "teacher_features_dinov3",
            {**CLAIMED, "teachers.dinov3.weights": "/mnt/x.safetensors"},
            "to the claim valr-data",
        ),
        (
            "teacher_features_dinov3",
            {**CLAIMED, "teachers.dinov3.weights": "../x.safetensors"},
            "to the claim valr-data",
        ),
        ("teacher_features_qwen", {}, None),
        ("stage2_valr_s", {}, r"teachers\.dinov3\.weights"),
        ("stage2_valr_s", {"teachers.dinov3.features": "stored"}, None),
        ("alignment_maps", {}, r"teachers\.dinov3\.weights=.* and 2 more"),
        ("scores_base", {}, r"evaluation\.benchmarks\.blink\.path=data/benchmarks/blink and 5 more, and its Pod has"),
        ("scores_base", {"evaluation.benchmarks": {}}, None),
        (
            "scores_base",
            {"evaluation.benchmarks": {}, "data.sources": OWN},
            r"sources\.scenes\.path=data/own, .*s3://bucket",
        ),
        ("base_model", {}, None),
        ("base_model", {"base.hub_id": None, "base.path": "weights/qwen"}, r"base\.path=weights/qwen.*base\.hub_id"),
        ("stage1_sft", {}, None),
    ],
)
def test_what_a_pod_would_not_find_is_refused_before_it_takes_a_gpu(
    name: str, changes: dict[str, Any], said: str | None, tmp_path: Path
) -> None:
    row, recipe = stage(name), override(recipes.paper(), changes)
    if said is None:
        refuse_local_paths(row, recipe, tmp_path)
        return
    with pytest.raises(LocalPathError, match=rf"^{name} is not dispatched: .*{said}"):
        refuse_local_paths(row, recipe, tmp_path)


@pytest.mark.parametrize(("mode", "refused"), [("stored", False), ("online", True)])
def test_training_reads_the_weights_of_a_teacher_whose_features_it_computes(
    mode: str, refused: bool, tmp_path: Path
) -> None:
    index = tmp_path / "artifacts" / "teacher_features_dinov3" / "index.json"
    index.parent.mkdir(parents=True)
    index.write_text(json.dumps({"mode": mode}))
    with pytest.raises(LocalPathError) if refused else contextlib.nullcontext():
        refuse_local_paths(stage("stage2_valr_s"), recipes.paper(), tmp_path)


def test_dagster_is_told_what_a_pod_would_not_find(tmp_path: Path) -> None:
    job = _Job(stage("teacher_features_dinov3"), recipes.paper(), tmp_path)
    with pytest.raises(dg.Failure, match=r"weights/dinov3\.safetensors") as failed:
        job.submit(print)
    assert failed.value.metadata["exit_status"].value == 42 and not failed.value.allow_retries


def test_exchanged_weights_are_other_work(tmp_path: Path) -> None:
    weights = tmp_path / "dinov3.safetensors"
    recipe, row = override(recipes.paper(), {"teachers.dinov3.weights": str(weights)}), stage("teacher_features_dinov3")
    asked = [request(row, recipe, CHECKOUT)]
    for content in (b"one", b"two"):
        weights.write_bytes((8).to_bytes(8, "little") + b"{}      " + content)
        asked.append(request(row, recipe, CHECKOUT))
    assert asked[0].weights is None and len({one.key for one in asked}) == 3
    assert {request(stage("stage1_sft"), one, CHECKOUT).weights for one in (recipe, recipes.paper())} == {None}


def job_in(document: dict[str, Any]) -> dict[str, Any]:
    """The Job that it is, or that its controller would make."""
    if document["kind"] != "JobSet":
        return document
    (made,) = document["spec"]["replicatedJobs"]
    name = f"{document['metadata']['name']}-{made['name']}-0"
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": made["template"]["spec"]}


def test_a_jobset_starts_again_what_was_taken_away_and_nothing_else() -> None:
    (jobset,) = documents_of("stage2_valr_m", *MANY[4][1:])
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(jobset["spec"]) == {"suspend", "ttlSecondsAfterFinished", "network", "failurePolicy", "replicatedJobs"}
    job = job_in(jobset)
    assert [rule["action"] for rule in job["spec"]["podFailurePolicy"]["rules"]] == ["FailJob", "FailJob"]
    assert not {"suspend", "ttlSecondsAfterFinished"} & set(job["spec"]), "the JobSet's"
    taken_away = "Pod valr/x has condition DisruptionTarget matching FailJob rule at index 0"
    said = {
        taken_away: "RestartJobSetAndIgnoreMaxRestarts",
        "Container stage for pod valr/x failed with exit code 42 matching FailJob rule at index 1": "FailJobSet",
        "Container stage for pod valr/x failed with exit code 75 matching FailJob rule at index 1": "FailJobSet",
        "Job has reached the specified backoff limit": None,
    }
    rules = jobset["spec"]["failurePolicy"]["rules"]
    for message, action in said.items():
        found = [
            one["action"] for one in rules if any(re.search(it, message) for it in one["onJobFailureMessagePatterns"])
        ]
        assert found == ([action] if action else [])
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 0
    network, (container,) = jobset["spec"]["network"], job["spec"]["template"]["spec"]["containers"]
    first = f"{job['metadata']['name']}-0.{network['subdomain']}"
    assert f"--master-addr={first}" in container["command"] and network["publishNotReadyAddresses"]


def _bytes(quantity: str) -> float:
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return float(quantity[:-2]) * units[quantity[-2:]]


@pytest.mark.parametrize(("gang", "kinds"), [("indexed_job", ["Service", "Job"]), ("jobset", ["JobSet"])])
def test_plan_prints_the_manifest_without_a_cluster(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gang: str, kinds: list[str]
) -> None:
    monkeypatch.chdir(CHECKOUT)
    changes = ["--set", "cluster.nodes=2", "--set", f"cluster.gang={gang}"]
    assert main(["plan", "--manifest", "stage1_sft", "--scale", "paper", *changes]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    printed = list(yaml.safe_load_all("\n".join(text)))
    assert [one["kind"] for one in printed] == kinds
    job = printed[-1]
    told = json.loads(last)
    assert told["job"] == job["metadata"]["name"] and told["location"] in job["metadata"]["annotations"].values()


def test_equal_work_has_one_name_and_only_the_environment_may_differ() -> None:
    recipe, row, url = recipes.small(), stage("stage2_valr_m"), "s3://valr/jobs/0123456789abcdef"
    first, second = (documents(row, recipe, url, environment={"VALR_DAGSTER_RUN_ID": one})[0] for one in "ab")
    assert first != second and first["metadata"] == second["metadata"]
    other = documents(row, override(recipe, {"cluster.image": "valr-ops:0.2.0"}), url)[0]["metadata"]
    assert other["name"] == first["metadata"]["name"]
    assert other["annotations"] != first["metadata"]["annotations"]


def test_the_cluster_section_makes_nothing_out_of_date() -> None:
    assert not [row.name for row in STAGES for field in row.parameters if field.split(".")[0] == "cluster"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cluster.image": "valr-ops:latest"}, "tag other than latest"),
        ({"cluster.image": "registry:5000/valr-ops"}, "tag other than latest"),
        ({"cluster.bucket": "/data"}, "cluster.bucket"),
        ({"cluster.memory": "64 GB"}, "cluster.memory"),
        ({"cluster.nodes": 3, "runtime.processes": 4}, "don't divide among cluster.nodes=3"),
    ],
)
def test_a_wrong_cluster_section_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        override(recipes.paper(), changes)
