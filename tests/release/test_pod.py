"""A stage carried out by a pod: the same bytes as at home, whatever happens to the pod."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.project import CHECKOUT, copy_project, digests, last_line, valr
from tests.release.pods import Pod, copied, request_for, training_request, until
from tests.store.proxy import between
from tests.store.weed import Weed
from valr_ops.model import checkpoint
from valr_ops.recipe.recipe import read
from valr_ops.release import pod
from valr_ops.release.pod import FailedError, JobError, Result
from valr_ops.stages import RECIPE_FILE, Stage
from valr_ops.store import objects
from valr_ops.store.artifacts import Ledger, directory_digest
from valr_ops.store.objects import S3Files, TakenError, UnreachableError
from valr_ops.store.remote import Remote
from valr_ops.teachers.weights import weights_sample
from valr_ops.training.stop import TrainingInterrupted


def test_a_request_has_the_key_of_what_decides_its_artifact() -> None:
    one = request_for()
    assert one.url == f"s3://test/store/jobs/{one.key}" and len(one.key) == 16
    assert request_for(**{"stage2.learning_rate": 1e-3}).key == one.key, "sources do not depend on it"
    assert replace(one, store="s3://elsewhere").key == one.key
    others = [
        request_for(seed=1),
        replace(one, code="0"),
        replace(one, attempt=1),
        replace(one, inputs={"sources": "0.dir"}),
    ]
    others += [replace(one, weights=sample) for sample in ("first", "second")]
    assert len({one.key, *(other.key for other in others)}) == 7
    third = replace(one, attempt=2)
    assert third.checkpoints == [f"{replace(one, attempt=number).url}/checkpoints" for number in (2, 1, 0)]


@pytest.mark.parametrize("url", ["s3://test/x", "s3://test/jobs/a/b", "http://test/jobs/a", "/jobs/a"])
def test_what_is_no_job_is_said(url: str) -> None:
    with pytest.raises(JobError, match="is no job; write s3://bucket/prefix/jobs/KEY"):
        pod.run_job(url, "sources")


@pytest.mark.parametrize("given", [["--force"], ["--quick"], ["--part", "0/2"], ["--set", "seed=1"]])
def test_a_job_takes_nothing_from_the_command_line(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from valr_ops.__main__ import main

    with pytest.raises(SystemExit):
        main(["run", "sources", "--job", "s3://test/jobs/a", *given])
    assert "leave out --set, --force, --part and --quick" in capsys.readouterr().err


class Away:
    """A store that loses what it is sent at first, and then its own answer."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {"00000000.json": b"of a pod before"}
        self.coming = ["lost", "lost", "unanswered"]

    def names(self) -> list[str]:
        return sorted(self.objects)

    def put(self, name: str, data: bytes, *, only_new: bool) -> None:
        comes = self.coming.pop(0) if self.coming else "answered"
        if comes != "lost" and name in self.objects:
            raise TakenError(name)
        if comes != "lost":
            self.objects[name] = data
        if comes != "answered":
            raise UnreachableError(comes)

    def read(self, name: str, at_most: int) -> bytes:
        return self.objects[name]


def test_messages_leave_no_gap_and_results_go_last_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_PIPES_CONTEXT", "something")
    monkeypatch.setattr(objects, "_PATIENT_ATTEMPTS", 1)
    monkeypatch.setattr(pod, "_LOOK_SECONDS", 0.01)
    methods = ["opened", "report_asset_check", "log", "report_asset_materialization", "closed"]
    for results in (True, False):
        store, file = Away(), tmp_path / f"{results}.jsonl"
        mail = pod._Mail(file, store)  # type: ignore[arg-type]
        with mail.collecting():
            file.write_text("".join(f"{json.dumps({'method': method})}\n" for method in methods))
            until(lambda store=store: len(store.objects) == 3)
        mail.finish(results)
        assert store.names() == [f"{number:08d}.json" for number in range(len(store.objects))]
        told = [json.loads(store.objects[name])["method"] for name in store.names()[1:]]
        reported = ["report_asset_check", "report_asset_materialization"] if results else []
        assert told == ["opened", "log", *reported, "closed"]


def test_what_the_claim_holds_stands_in_the_project_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (
        "image/dvc.yaml",
        "image/valr_ops/stages.py",
        "claim/weights/a.safetensors",
        "claim/valr_ops/stages.py",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    (tmp_path / "job").mkdir()
    monkeypatch.setattr(pod, "project_root", lambda: tmp_path / "image")
    monkeypatch.setattr(pod, "DATA_FOLDER", str(tmp_path / "claim"))
    pod._lay_out(request_for(), tmp_path / "job")
    assert (tmp_path / "job" / "weights" / "a.safetensors").read_text() == "claim/weights/a.safetensors"
    assert (tmp_path / "job" / "valr_ops" / "stages.py").read_text() == "image/valr_ops/stages.py", (
        "code is the image's"
    )


def test_a_pod_with_other_weights_than_the_orchestrator_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "dinov3.safetensors"
    weights.write_bytes(bytes(16))
    changes = {"teachers.dinov3.weights": weights.name, "teachers.dinov3.pretraining_steps": 0}
    request = request_for("teacher_features_dinov3", **changes)
    sample = weights_sample("dinov3", read(request.recipe).teachers["dinov3"])
    for same in (None, sample):
        pod._refuse_other_weights(replace(request, weights=same))
    with pytest.raises(JobError, match=r"teachers\.dinov3 that this Pod has are others.*cluster\.data_claim"):
        pod._refuse_other_weights(replace(request, weights="other"))


FIRST_OF_A_CONTAINER = """
import os, sys, time
from valr_ops.__main__ import main
from valr_ops.release import pod
from valr_ops.training.stop import StopSignals

def request(url):
    with StopSignals():
        pass  # training has come to its end
    print(os.getpid(), flush=True)
    time.sleep(300)

pod._request = request
sys.exit(main(["run", "scores_base", "--job", "s3://test/jobs/a"]))
"""


def test_the_first_process_of_a_container_ends_when_it_is_told_to() -> None:
    words = ["unshare", "-Urpf", "--mount-proc", "--kill-child", sys.executable, "-c", FIRST_OF_A_CONTAINER]
    with subprocess.Popen(words, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as container:
        try:
            assert container.stdout is not None and container.stderr is not None
            said = container.stdout.readline()
            if not said and re.search("unshare failed|not permitted", told := container.stderr.read()):
                pytest.skip(f"this machine allows no container: {told}")
            assert said == "1\n"
            (first,) = psutil.Process(container.pid).children()
            first.terminate()
            assert container.wait(60) == 75, "the kernel drops what the first process has no handler for"
        finally:
            container.kill()


@pytest.mark.parametrize(
    ("changed", "reasons"),
    [
        (None, ()),
        ("input", ("input cot_corpus changed",)),
        ("recipe", ("recipe field seed: 0 -> 7",)),
        ("code", ("code code.py changed",)),
    ],
)
def test_what_changed_at_home_while_a_job_was_out_is_not_recorded_as_what_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str | None, reasons: tuple[str, ...]
) -> None:
    from dvc.repo import Repo

    def write(path: str, content: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        # A published folder is replaced, and never written into.
        (tmp_path / path).unlink(missing_ok=True)
        (tmp_path / path).write_text(content)

    class Store:
        def __init__(self, url: str) -> None:
            pass

        def fetch(self, digest: str, to: Path) -> None:
            to.mkdir(parents=True)
            (to / "manifest.json").write_text("made")

    Repo.init(str(tmp_path), no_scm=True).close()
    stages = {
        "cot_corpus": {"cmd": "make", "deps": ["code.py"], "outs": ["artifacts/cot_corpus"]},
        "sources": {
            "cmd": "make",
            "deps": ["artifacts/cot_corpus", "code.py"],
            "params": [{RECIPE_FILE: ["seed"]}],
            "outs": ["artifacts/sources"],
        },
    }
    write("dvc.yaml", yaml.safe_dump({"stages": stages}))
    write("code.py", "first")
    write(RECIPE_FILE, "seed: 0\n")
    write("artifacts/cot_corpus/manifest.json", "first")
    monkeypatch.chdir(tmp_path)
    asked = replace(request_for(seed=0), inputs={"cot_corpus": Ledger(tmp_path).commit("cot_corpus")}, code="first")
    monkeypatch.setattr(Stage, "code_digest", lambda self, root: (root / "code.py").read_text())
    Store("").fetch("", tmp_path / "away")
    monkeypatch.setattr(pod, "result", lambda url: Result(directory_digest(tmp_path / "away")))
    monkeypatch.setattr(pod, "_request", lambda url: asked)
    monkeypatch.setattr(pod, "Remote", Store)
    monkeypatch.setattr(pod, "_take_over_spool", lambda *_: None)
    if changed == "input":
        write("artifacts/cot_corpus/manifest.json", "second")
        Ledger(tmp_path).commit("cot_corpus")
    elif changed == "recipe":
        write(RECIPE_FILE, "seed: 7\n")
    elif changed == "code":
        write("code.py", "second")
    pod.collect(asked.url, tmp_path)
    state = Ledger(tmp_path).states(["sources"])["sources"]
    assert (state.exists, state.edited, state.reasons) == (True, False, reasons)


# ------------------------------------------------------------------------------------------------- on a real S3 server


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Any]:
    """What a pod said in whose way nothing came, and for how many seconds it ran; filled by the first that asks."""
    return {}


def made_undisturbed(store: str, undisturbed: dict[str, Any], node: Path) -> dict[str, Any]:
    if not undisturbed:
        url = pod.submit(request_for(store=f"{store}/undisturbed"))
        began = time.monotonic()
        said = Pod(url, node).ended()
        undisturbed.update(said, url=url, seconds=time.monotonic() - began)
    return undisturbed


@pytest.mark.services
@pytest.mark.timeout(300)
def test_a_pod_makes_what_the_verb_makes_and_the_orchestrator_brings_it_home(
    store: str, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    home = copy_project(tmp_path / "home", {"scale": "tiny", "data.synthetic.train_records": 16})
    valr(home, "run", "sources")
    here = digests(home)["sources"]
    # As if it had never been made here.
    for made in ("artifacts/sources", ".dvc/cache", ".valr/spool"):
        shutil.rmtree(home / made)
    lock = yaml.safe_load((home / "dvc.lock").read_text())
    del lock["stages"]["sources"]
    (home / "dvc.lock").write_text(yaml.safe_dump(lock))

    url = pod.submit(request_for(store=store))
    assert pod.result(url) is None
    with pytest.raises(JobError, match="has no result yet"):
        pod.collect(url, home)
    said = made_undisturbed(store, undisturbed, tmp_path / "node")
    found = pod.collect(said["url"], home)
    assert said["digest"] == found.digest == here == digests(home)["sources"]
    assert (found.size, found.files) == (said["size"], said["files"])
    again = last_line(valr(home, "run", "sources"))
    assert again["how"] == "hit" and found.report["summary"] == again["summary"]
    measured = [json.loads(one.read_text())["output_digest"] for one in home.glob(".valr/spool/*/record.json")]
    assert measured == [here], "what the pod measured waits here for MLflow"
    assert not list((tmp_path / "node" / "valr" / "jobs").glob("*/*")), "a finished job leaves nothing on the node"


@pytest.mark.services
def test_the_same_request_is_one_job_until_it_failed_for_good(store: str) -> None:
    one = request_for(store=store)
    url = pod.submit(one)
    assert pod.submit(replace(one, recipe={**one.recipe, "runtime": {}})) == url
    S3Files(url).put("result.json", pod._json(pod.asdict(Result(error="no", exit_status=42))))
    assert pod.submit(one) == replace(one, attempt=1).url
    with pytest.raises(FailedError, match="no") as error:
        pod.run_job(url, "sources")
    assert error.value.exit_status == 42
    with pytest.raises(FailedError):
        pod.collect(url, CHECKOUT)


@pytest.mark.services
def test_what_no_retry_can_mend_is_the_result_of_the_job(store: str, tmp_path: Path) -> None:
    wrong = {"data.sources": {"mine": {"format": "jsonl", "path": str(tmp_path / "nowhere")}}}
    url = pod.submit(request_for(store=store, **wrong))
    with pytest.raises(Exception, match="nowhere"):
        pod.run_job(url, "sources")
    found = pod.result(url)
    assert found is not None and "nowhere" in found.error and found.exit_status == 42
    again = Pod(url, tmp_path / "another")
    assert again.wait() == 42 and again.errors().strip().endswith(found.error)


@pytest.mark.services
@pytest.mark.parametrize("error", [TrainingInterrupted("stopped"), UnreachableError("away"), MemoryError()])
def test_what_a_retry_may_mend_leaves_no_result(store: str, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*_: Any) -> Result:
        raise error

    url = pod.submit(request_for(store=store))
    monkeypatch.setattr(pod, "_carry_out", fails)
    with pytest.raises(type(error)):
        pod.run_job(url, "sources")
    assert pod.result(url) is None
    monkeypatch.setattr(pod, "_carry_out", lambda *_: Result("made.dir"))
    assert pod.run_job(url, "sources").digest == "made.dir"
    assert pod.run_job(url, "sources").digest == "made.dir", "what is done is not done again"


@pytest.mark.services
def test_a_job_for_another_stage_or_of_another_version_is_refused(store: str) -> None:
    one = request_for(store=store)
    with pytest.raises(JobError, match=r"has no request\.json; the job was never submitted"):
        pod.run_job(one.url, "sources")
    url = pod.submit(one)
    with pytest.raises(JobError, match="asks for sources, not for cot_corpus"):
        pod.run_job(url, "cot_corpus")
    request = json.loads(S3Files(url).read("request.json", 1 << 20))
    assert request == {
        "stage": "sources",
        "recipe": dict(one.recipe),
        "inputs": {},
        "code": one.code,
        "weights": None,
        "attempt": 0,
    }
    S3Files(url).put("request.json", json.dumps({**request, "code": "other"}).encode())
    with pytest.raises(JobError, match="altered, or comes from another version"):
        pod.run_job(url, "sources")
    other = pod.submit(replace(one, code="other"))
    with pytest.raises(JobError, match=r"of code other, and this is \w{12}; set cluster.image"):
        pod.run_job(other, "sources")
    S3Files(url).put("request.json", b"{")
    with pytest.raises(JobError, match="can't be read"):
        pod.run_job(url, "sources")


@pytest.mark.services
def test_of_two_pods_of_one_job_one_counts_and_the_other_is_told(
    store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = pod.submit(request_for(store=store))

    def other_wins(*_: Any) -> Result:
        pod._write_result(url, Result("theirs.dir"))
        return Result("ours.dir")

    monkeypatch.setattr(pod, "_carry_out", other_wins)
    assert pod.run_job(url, "sources").digest == "theirs.dir"
    assert "another pod finished this job first, with theirs.dir" in capsys.readouterr().err
    found = pod.result(url)
    assert found is not None and found.digest == "theirs.dir"


@pytest.mark.services
@pytest.mark.timeout(400)
def test_a_pod_killed_at_any_moment_is_followed_by_one_that_goes_on(
    store: str, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    expected = made_undisturbed(store, undisturbed, tmp_path / "first")
    url = pod.submit(request_for(store=f"{store}/killed"))
    for moment in (0.5, 0.8):
        killed = Pod(url, tmp_path / f"node-{moment}")
        time.sleep(expected["seconds"] * moment)
        killed.kill()
    assert Pod(url, tmp_path / "last").ended()["digest"] == expected["digest"]
    Remote(f"{store}/killed").fetch(expected["digest"], tmp_path / "back")


def pipes(name: str) -> dict[str, str]:
    """What Dagster gives a process that it starts."""
    from dagster_pipes import encode_param

    data = {
        "asset_keys": [name],
        "code_version_by_asset_key": {name: "1"},
        "provenance_by_asset_key": {name: None},
        "partition_key": None,
        "partition_key_range": None,
        "partition_time_window": None,
        "run_id": "run",
        "job_name": None,
        "retry_number": 0,
        "extras": {},
    }
    return {"DAGSTER_PIPES_CONTEXT": encode_param({"data": data}), "DAGSTER_PIPES_MESSAGES": encode_param({})}


def messages(url: str) -> list[dict[str, Any]]:
    told = S3Files(f"{url}/messages")
    names = told.names()
    assert names == [f"{number:08d}.json" for number in range(len(names))]
    return [json.loads(told.read(name, 1 << 20)) for name in names]


@pytest.mark.services
@pytest.mark.timeout(300)
def test_what_dagster_is_told_arrives_in_order_and_results_once(store: str, tmp_path: Path) -> None:
    url = pod.submit(request_for(store=store))
    first = Pod(url, tmp_path / "first", **pipes("sources"))
    until(lambda: S3Files(f"{url}/messages").names())
    first.kill()
    found = Pod(url, tmp_path / "second", **pipes("sources")).ended()
    methods = [message["method"] for message in messages(url)]
    assert methods[0] == "opened" and methods.count("opened") == 2 and methods[-1] == "closed"
    assert methods.count("report_asset_materialization") == 1
    told = next(one for one in messages(url) if one["method"] == "report_asset_materialization")
    assert told["params"]["data_version"] == found["digest"]
    assert any("running because" in one["params"]["message"] for one in messages(url) if one["method"] == "log")


@pytest.mark.services
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_a_store_that_goes_away_in_the_middle_of_an_upload_costs_a_pod_time_only(
    s3_store: Weed, store: str, undisturbed: dict[str, Any], tmp_path: Path, seconds: int
) -> None:
    expected = made_undisturbed(store, undisturbed, tmp_path / "first")
    url = pod.submit(request_for(store=f"{store}/away"))
    went: list[float] = []
    with between(s3_store.endpoint) as proxy:

        def go_away() -> None:
            s3_store.kill()
            went.append(time.monotonic())

        proxy.after_bytes = (expected["size"] // 2, go_away)
        working = Pod(url, tmp_path / "node", AWS_ENDPOINT_URL=proxy.endpoint, **pipes("sources"))
        try:
            until(lambda: went)
            time.sleep(seconds)
            assert working.runs()
        finally:
            s3_store.start()
        back = time.monotonic()
        assert working.ended()["digest"] == expected["digest"]
    assert seconds < 10 or "the store is asked again for some minutes: s3://test/" in working.errors()
    print(f"store away for {back - went[0]:.1f} s, the pod ended {time.monotonic() - back:.1f} s after")
    assert (pod.result(url) or Result()).digest == expected["digest"]
    assert [one["method"] for one in messages(url)][-1] == "closed"
    Remote(f"{store}/away").fetch(expected["digest"], tmp_path / "back")


@pytest.mark.services
@pytest.mark.timeout(900)
def test_training_on_a_machine_that_goes_away_goes_on_on_another(
    store: str, trained_from: dict[str, Path], tmp_path: Path
) -> None:
    # A fast machine makes forty updates in less time than passes between two copies.
    long = {"stage1.max_updates": 160}
    whole = training_request(f"{store}/undisturbed", trained_from, **long)
    undisturbed = Pod(pod.submit(whole), tmp_path / "1", "stage1_sft")
    url = pod.submit(training_request(f"{store}/lost", trained_from, **long))
    killed = Pod(url, tmp_path / "2", "stage1_sft")
    until(lambda: copied(url))
    killed.kill()
    reached = copied(url)[-1]
    evicted = Pod(url, tmp_path / "3", "stage1_sft")
    until(lambda: copied(url)[-1] > reached)
    evicted.terminate()
    assert evicted.wait() == 75 and "going on after update" in evicted.errors()
    stopped_at = re.search(r"stopped by a signal after update (\d+)", evicted.errors())
    assert stopped_at and copied(url)[-1] == f"checkpoint-{int(stopped_at[1]):08d}.json"
    last = Pod(url, tmp_path / "4", "stage1_sft")
    said = last.ended()
    assert f"going on after update {stopped_at[1]}" in last.errors()
    assert said["digest"] == undisturbed.ended()["digest"]
    assert S3Files(f"{url}/checkpoints").names() == [], "a finished job needs none"


def test_the_last_checkpoint_is_copied_even_where_a_second_signal_comes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The Pods of a Job are told to stop once one of them has ended, which was the first to be told."""
    copied: list[str] = []

    class Mirror:
        def __init__(self, *_: Any) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *error: Any) -> None:
            signal.raise_signal(signal.SIGTERM)
            copied.append("whole")

    monkeypatch.setattr(checkpoint, "Mirror", Mirror)
    request = request_for("stage1_sft")
    with pytest.raises(TrainingInterrupted), pod._checkpoints_mirrored(request, tmp_path, print):
        raise TrainingInterrupted("stopped")
    assert copied == ["whole"]


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.timeout(600)
def test_ranks_of_one_pod_make_one_artifact_together(
    store: str, trained_from: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = {"runtime.processes": 2, "stage1.max_updates": 3, "stage1.accumulation": 1}
    request = training_request(store, trained_from, **two)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    verb = ("-m", "valr_ops", "run", "stage1_sft", "--job", pod.submit(request))
    command = [sys.executable, "-m", "valr_ops.release.ranks", "--standalone", "--nproc-per-node=2", *verb]
    process = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=500, check=False)
    assert process.returncode == 0, process.stderr
    found = pod.result(request.url)
    assert found is not None and found.report["summary"]["updates"] == 3
    assert found.digest in process.stdout
    Remote(store).fetch(found.digest, tmp_path / "model")
    assert {"model.safetensors", "training_log.parquet"} <= {path.name for path in (tmp_path / "model").iterdir()}
