"""A stage that is carried out on another machine, with nothing between it and the orchestrator but one S3 prefix.

In: a `Request`, which `submit` writes below ``jobs/<key>`` of the store; Out: the artifact in the same store, in DVC's
layout, and a `Result`. `run_job` is the pod's side (``valr run STAGE --job URL``), `collect` brings what it made home.
Below ``jobs/<key>``: request.json, messages/NNNNNNNN.json (what Dagster Pipes is told, one message each), checkpoints/,
spool/ (measurements for MLflow, which only the orchestrator reaches) and result.json, the last to be written and only
where there is none.
Always: the same request has the same key, so that nothing is started twice; a pod that is killed at any moment is
followed by one that goes on; one that is told to stop ends at once, in training at the next checkpoint; what a retry
may mend leaves no result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from filelock import FileLock

from valr_ops import runner
from valr_ops.exits import EXIT_AT_CHECKPOINT, EXIT_CONFIGURATION, exit_status
from valr_ops.recipe.cost_artifacts import FEATURES
from valr_ops.recipe.recipe import read
from valr_ops.recipe.secrets import redacted
from valr_ops.release.manifest import DATA_FOLDER
from valr_ops.stages import RECIPE_FILE, stage
from valr_ops.store.artifacts import Ledger, StageContext, folder, project_root, published, value_at
from valr_ops.store.objects import Cache, MissingError, S3Files, StorageError, TakenError, patiently
from valr_ops.store.progress import Progress, open_progress, reporting_to_dagster
from valr_ops.store.remote import Remote
from valr_ops.training.stop import StopSignals

_REQUEST, _RESULT = "request.json", "result.json"
_MAX_BYTES = 64 << 20
_CACHED_FRACTION = 0.5
"""Part of the disk that inputs of earlier jobs may take."""
_LOOK_SECONDS = 1.0


class JobError(RuntimeError):
    """A job that can't be carried out or collected: which, why, and what to do."""


class FailedError(JobError):
    """The job ended with an error that a retry can't mend."""


class _ToldToStop(SystemExit):
    """A signal ends the process wherever it is: no `Exception`, which a stage may take for a fault of a record."""

    def __str__(self) -> str:
        return "stopped by a signal; the same job can be started again"


@dataclass(frozen=True)
class Request:
    """What a pod is asked to make."""

    store: str
    """``s3://bucket/prefix``, the URL of the DVC remote; jobs are below it as well."""
    stage: str
    recipe: Mapping[str, Any]
    """The whole resolved recipe, as `Recipe.model_dump(mode="json")` gives it."""
    inputs: Mapping[str, str]
    """DVC digest of each input artifact, by stage name; all are in the store."""
    code: str
    """`Stage.code_digest`."""
    weights: str | None = None
    """`weights_sample` of a teacher's weights, where the orchestrator can read them: others at the same path are other
    work."""
    attempt: int = 0
    """Distinguishes a try after a failure from the failed one."""

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits over all that decides the artifact, and the attempt."""
        fields = {name: value_at(self.recipe, name) for name in stage(self.stage).parameters}
        decides = [self.stage, fields, dict(self.inputs), self.code, self.attempt]
        decides += [self.weights] if self.weights else []
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def url(self) -> str:
        """The job's prefix."""
        return f"{self.store.rstrip('/')}/jobs/{self.key}"

    @property
    def checkpoints(self) -> list[str]:
        """Mirrors of this attempt's checkpoints and of those before it."""
        attempts = range(self.attempt, -1, -1)
        return [f"{replace(self, attempt=number).url}/checkpoints" for number in attempts]


@dataclass(frozen=True)
class Result:
    """How a job ended: with an artifact, or with an error that a retry can't mend."""

    digest: str = ""
    """DVC digest of the artifact, which is in the store."""
    size: int = 0
    """Bytes."""
    files: int = 0
    report: Mapping[str, Any] = field(default_factory=dict)
    """The stage's `StageReport`, as plain values."""
    error: str = ""
    """The sentence that says what went wrong; empty for an artifact."""
    exit_status: int = 0


def submit(request: Request) -> str:
    """Write the request, unless it was written before, and return the URL of its job.

    An attempt that failed for good stays as it is; the request then becomes the next attempt.

    Raises:
        StorageError: the store can't be written.
    """
    while (known := result(request.url)) is not None and known.error:
        request = replace(request, attempt=request.attempt + 1)
    values = {name: value for name, value in asdict(request).items() if name != "store"}
    values["inputs"] = {name: {"digest": digest} for name, digest in request.inputs.items()}
    with contextlib.suppress(TakenError):
        patiently(S3Files(request.url).put, _REQUEST, _json(values), only_new=True)
    return request.url


def result(url: str) -> Result | None:
    """How the job ended, or None as long as it has not. Raises `StorageError`."""
    try:
        values = json.loads(patiently(S3Files(url).read, _RESULT, _MAX_BYTES))
    except MissingError:
        return None
    return Result(**values)


def collect(url: str, root: Path) -> Result:
    """Bring a job's artifact into the project at `root`, record it in dvc.lock, and take over its measurements.

    Raises:
        FailedError: the job ended with an error. JobError: it has not ended, or DVC finds another digest.
        StorageError: as `Remote.fetch`.
    """
    ended = result(url)
    if ended is None:
        raise JobError(f"{url} has no result yet; wait for the job, or start it again with the same request")
    if ended.error:
        raise _failed(ended)
    request, state = _request(url), root / ".valr"
    staged = state / "staging" / f"{request.stage}.{request.key}"
    shutil.rmtree(staged, ignore_errors=True)
    Remote(request.store).fetch(ended.digest, staged)
    ledger, same_code = Ledger(root), stage(request.stage).code_digest(root) == request.code
    # What changed here while the job was out has no part in what it made.
    asked = ledger.requested(request.stage, request.inputs, request.recipe, same_code=same_code)
    with published(staged, folder(root, request.stage), state / "trash" / request.stage):
        recorded = ledger.commit(request.stage, asked)
    if recorded != ended.digest:
        raise JobError(
            f"DVC recorded {recorded} for {request.stage}, but the job made {ended.digest}; did something write into "
            f"artifacts/{request.stage}? Bring it back with: dvc checkout {request.stage}"
        )
    _take_over_spool(S3Files(f"{url}/spool"), state / "spool")
    return ended


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """Within it SIGTERM ends the process; where training waits for the signal instead, `StopSignals` takes its place.

    The first process of a container has no handlers but its own: without one the kernel drops the signal, and the GPU
    is held for the whole grace period. Ranks are not the first: torchrun is, and waits for them.
    """
    if "RANK" in os.environ or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: FrameType | None) -> None:
    raise _ToldToStop(EXIT_AT_CHECKPOINT)


@_stopping()
def run_job(url: str, name: str) -> Result:
    """The pod's side: fetch the inputs, make the artifact of stage `name`, store it, and write the result.

    Raises:
        JobError: there is no such request, or it is for another stage or other code.
        FailedError: the job failed before, and a retry can't mend it.
        Any error of the stage; one that a retry can't mend is the job's result then.
    """
    request = _request(url)
    if request.stage != name:
        raise JobError(f"{url} asks for {request.stage}, not for {name}; give the stage that the request names")
    code = stage(name).code_digest(project_root())
    if code != request.code:
        raise JobError(
            f"{url} was submitted with {name} of code {request.code}, and this is {code}; set cluster.image to an "
            "image of the orchestrator's version"
        )
    root = Path(tempfile.gettempdir(), "valr", "jobs", request.key)
    root.mkdir(parents=True, exist_ok=True)
    if os.environ.get("RANK", "0") != "0":
        return _follow(request, root)
    with FileLock(f"{root}.lock"):
        if (known := result(url)) is not None:
            if known.error:
                raise _failed(known)
            return known
        mail = _Mail(root / "messages.jsonl", S3Files(f"{url}/messages"))
        try:
            with mail.collecting(), reporting_to_dagster():
                made = _carry_out(request, root)
        except BaseException as error:
            _end(url, mail, error)
            raise
        mail.finish(results=True)
        written = _write_result(url, made)
        _tidy(request, root)
        return written


def _follow(request: Request, root: Path) -> Result:
    """A process that torchrun started beside the first of all: it computes, and the first one does all else.

    The first of each node brings the node what the job reads.
    """
    if result(request.url) is None:
        if os.environ["LOCAL_RANK"] == "0":
            _bring(request, root, Progress())
        else:
            while not _brought(root).exists():
                time.sleep(_LOOK_SECONDS)
        row = stage(request.stage)
        recipe = read(request.recipe)
        with tempfile.TemporaryDirectory() as unused, contextlib.chdir(root):
            row.load()(
                StageContext(
                    stage=row.name,
                    recipe=recipe.for_variant(row.variant) if row.variant else recipe,
                    inputs={needed: folder(root, needed) for needed in row.inputs},
                    out=Path(unused),
                    work=_work(request, root),
                    progress=Progress(),
                )
            )
    return Result()


def _carry_out(request: Request, root: Path) -> Result:
    progress = open_progress(root, request.stage)
    _bring(request, root, progress)
    with contextlib.chdir(root), _checkpoints_mirrored(request, root, progress.say):
        _refuse_other_weights(request)
        made = runner.run(request.stage, recorded=False)
        stored = _remote(request).push(folder(root, request.stage))
    if not stored.first:
        progress.say(f"{stored.digest} was in the store already: another writer made the same artifact first")
    _store_spool(root / ".valr" / "spool", S3Files(f"{request.url}/spool"))
    return Result(stored.digest, stored.size, stored.files, asdict(made.report))


def _refuse_other_weights(request: Request) -> None:
    """Else the features would be out of date as soon as they are home. In the job's project, after its layout."""
    if request.weights is None:
        return
    from valr_ops.teachers.weights import weights_sample

    name = request.stage.removeprefix(FEATURES)
    if weights_sample(name, read(request.recipe).teachers[name]) != request.weights:
        raise JobError(
            f"{request.stage}: the weights of teachers.{name} that this Pod has are others than the orchestrator's; "
            "copy them to the claim in cluster.data_claim again"
        )


def _bring(request: Request, root: Path, progress: Progress) -> None:
    """Everything that the job reads, to this machine."""
    _lay_out(request, root)
    remote = _remote(request)
    for needed, digest in request.inputs.items():
        progress.say(f"fetching {needed} ({digest[:10]})")
        remote.fetch(digest, folder(root, needed))
    if stage(request.stage).group == "training":
        from valr_ops.model import checkpoint

        checkpoint.restore(_work(request, root), request.checkpoints, progress.say)
    _brought(root).touch()


def _brought(root: Path) -> Path:
    """Mark for the other processes of this node that all is there; torchrun, their parent, starts them together."""
    return root / f".brought-{os.getppid()}"


def _remote(request: Request) -> Remote:
    inputs = Path(tempfile.gettempdir(), "valr", "inputs")
    inputs.mkdir(parents=True, exist_ok=True)
    return Remote(request.store, Cache(inputs, int(shutil.disk_usage(inputs).total * _CACHED_FRACTION)))


def _work(request: Request, root: Path) -> Path:
    """Where the runner lets the stage keep what survives a kill."""
    return root / ".valr" / "work" / request.stage


@contextlib.contextmanager
def _checkpoints_mirrored(request: Request, root: Path, say: Any) -> Iterator[None]:
    """Within it checkpoints of training are copied to the store."""
    if stage(request.stage).group != "training":
        yield
        return
    from valr_ops.model import checkpoint

    mirror, stopping = checkpoint.Mirror(_work(request, root), request.checkpoints[0], say), StopSignals()
    mirror.__enter__()
    try:
        yield
    except BaseException:
        # Where one Pod of several was taken away, the others are told to stop once it has ended: during this copy.
        with stopping:
            mirror.__exit__(*sys.exc_info())
        raise
    mirror.__exit__(None, None, None)


def _end(url: str, mail: _Mail, error: BaseException) -> None:
    """Tell how the job failed; it has a result only where a retry can't mend it."""
    status = exit_status(error)
    # The store itself may be what failed; then `error` is raised, not that it can't be told.
    with contextlib.suppress(StorageError):
        mail.finish(results=status == EXIT_CONFIGURATION)
        if status == EXIT_CONFIGURATION:
            _write_result(url, Result(error=redacted(str(error)), exit_status=status))


def _tidy(request: Request, root: Path) -> None:
    """A finished job needs neither its checkpoints nor the disk. What fails here costs room, not the job."""
    shutil.rmtree(root, ignore_errors=True)
    if stage(request.stage).group == "training":
        from valr_ops.model import checkpoint

        for location in request.checkpoints:
            with contextlib.suppress(StorageError):
                checkpoint.discard(location)


def _lay_out(request: Request, root: Path) -> None:
    """A project folder of the job's own: the code and settings of this machine's, the recipe and inputs of the request.

    Beside them what the claim holds. What an earlier container of the same pod left of the work stays.
    """
    shutil.rmtree(root / "artifacts", ignore_errors=True)
    claim = Path(DATA_FOLDER)
    for path in [*project_root().iterdir(), *(claim.iterdir() if claim.is_dir() else ())]:
        link = root / path.name
        if not path.name.startswith(".") and path.name not in ("artifacts", "dvc.lock") and not link.is_symlink():
            link.symlink_to(path)
    recipe = root / RECIPE_FILE
    recipe.parent.mkdir(parents=True)
    recipe.write_text(yaml.safe_dump(dict(request.recipe), sort_keys=False), encoding="utf-8")
    outs = {name: {"outs": [{"path": f"artifacts/{name}", "md5": md5}]} for name, md5 in request.inputs.items()}
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": outs}), encoding="utf-8")


def _write_result(url: str, ended: Result) -> Result:
    """Write the result, or return what another pod of the same job wrote first."""
    try:
        patiently(S3Files(url).put, _RESULT, _json(asdict(ended)), only_new=True)
    except TakenError:
        winner = result(url) or ended
        if winner.digest != ended.digest:
            print(
                f"valr: another pod finished this job first, with {winner.digest or winner.error}; that counts, and "
                f"what this one made ({ended.digest or ended.error}) is not recorded",
                file=sys.stderr,
            )
        return winner
    return ended


def _request(url: str) -> Request:
    store, jobs, key = url.rstrip("/").rpartition("/jobs/")
    if not jobs or not store.startswith("s3://") or "/" in key:
        raise JobError(f"{url} is no job; write s3://bucket/prefix/jobs/KEY")
    try:
        values = json.loads(patiently(S3Files(url).read, _REQUEST, _MAX_BYTES))
        inputs = {name: str(given["digest"]) for name, given in values.pop("inputs").items()}
        request = Request(store=store, inputs=inputs, **values)
    except MissingError:
        raise JobError(f"{url} has no {_REQUEST}; the job was never submitted, or was deleted") from None
    except (ValueError, KeyError, TypeError) as error:
        raise JobError(f"{url}/{_REQUEST} can't be read ({type(error).__name__}: {error}); submit it again") from None
    if request.key != key:
        raise JobError(
            f"{url}/{_REQUEST} has the key {request.key}: it was altered, or comes from another version of valr_ops; "
            "use the image of the orchestrator's version, and submit again"
        )
    return request


def _failed(ended: Result) -> FailedError:
    error = FailedError(ended.error)
    error.exit_status = ended.exit_status  # type: ignore[attr-defined]
    return error


# ------------------------------------------------------------------------------------------------------------ messages


class _Mail:
    """What the stage tells Dagster, on its way: into a file at once, from there into the store, in order.

    The work never waits for the store. Lines go out while the stage works; what Dagster takes as a result goes out with
    the job's, because after a kill another pod reports it again.
    """

    def __init__(self, spool: Path, to: S3Files) -> None:
        self._spool, self._to = spool, to
        self._waiting: list[bytes] = []
        self._read = 0
        self._next = 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._deliver_lines, name="mail", daemon=True)

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Where an orchestrator started this process, Pipes writes to the file, and its lines go out."""
        if "DAGSTER_PIPES_CONTEXT" not in os.environ:
            yield
            return
        from dagster_pipes import DAGSTER_PIPES_MESSAGES_ENV_VAR, encode_param

        self._spool.unlink(missing_ok=True)
        os.environ[DAGSTER_PIPES_MESSAGES_ENV_VAR] = encode_param({"path": str(self._spool)})
        # A pod that was killed has written the first ones.
        self._next = len(patiently(self._to.names))
        self._thread.start()
        yield

    def finish(self, results: bool) -> None:
        """Send what is left; results of the stage only if they are the job's."""
        if self._thread.ident is None:
            return
        self._ending.set()
        self._thread.join()
        self._look()
        for message in self._waiting:
            if results or _method(message) not in _RESULTS:
                self._send(message)
        self._waiting.clear()

    def _deliver_lines(self) -> None:
        while not self._ending.wait(_LOOK_SECONDS):
            self._look()
            try:
                while line := next((one for one in self._waiting if _method(one) in ("opened", "log")), None):
                    self._send(line)
                    self._waiting.remove(line)
            except StorageError:
                # They stay, and the next look tries again.
                continue

    def _look(self) -> None:
        """Take the whole lines that are new in the file."""
        if not self._spool.is_file():
            return
        with self._spool.open("rb") as file:
            file.seek(self._read)
            lines = file.read().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        self._read += sum(map(len, whole))
        self._waiting += [line.strip() for line in whole]

    def _send(self, message: bytes) -> None:
        arrived = False
        while not arrived:
            name = f"{self._next:08d}.json"
            try:
                patiently(self._to.put, name, message, only_new=True)
                arrived = True
            except TakenError:
                # Its answer was lost on the way, or a pod that was given up still writes.
                arrived = patiently(self._to.read, name, _MAX_BYTES) == message
            # Only now: a number without a message would be waited for by whoever reads them.
            self._next += 1


_RESULTS = ("report_asset_materialization", "report_asset_check")


def _method(message: bytes) -> str:
    return str(json.loads(message)["method"])


# ----------------------------------------------------------------------------------------------------------- measures


def _store_spool(spool: Path, to: S3Files) -> None:
    """What MLflow did not take travels with the job; a record's own file is the last of each."""
    files = [path for path in spool.rglob("*") if path.is_file()] if spool.is_dir() else []
    for path in sorted(files, key=lambda path: (path.name == "record.json", path)):
        patiently(to.upload, path.relative_to(spool).as_posix(), path)


def _take_over_spool(stored: S3Files, spool: Path) -> None:
    names = patiently(stored.names)
    for name in (name for name in names if name.count("/") == 1 and name.endswith("/record.json")):
        entry = spool / name.partition("/")[0]
        partial = entry.with_name(f".{entry.name}")
        if entry.exists():
            continue
        for part in (part for part in names if part.startswith(f"{entry.name}/")):
            target = partial / part.partition("/")[2]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(patiently(stored.read, part, _MAX_BYTES))
        partial.rename(entry)


def _json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, indent=1, sort_keys=True).encode()
