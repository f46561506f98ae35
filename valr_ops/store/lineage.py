"""Lineage: what was measured while an artifact was made, in MLflow, next to where the artifact came from.

In: a `RunRecord` from the runner. Out: one flat MLflow run named ``stage@digest`` with parameters, metrics and their
history, plots, and as tags the digests of inputs, code and recipe, the git commit and the Dagster run.
Always: a record is first spooled to ``.valr/spool`` and leaves it only when the server has all of it, so that a server
that is away costs nothing but time; one record makes one run however often it is delivered; a tracking problem never
fails a stage; only fields of the allow-list ``mlflow/fields.yaml`` leave the process. The only importer of mlflow,
which takes 1.5 s and is therefore imported only to deliver; who starts many stages opens a `courier` for all of them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

import yaml
from filelock import FileLock, Timeout

from valr_ops.recipe.secrets import redacted

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT = "valr_ops"
FIELDS = Path(__file__).resolve().parents[2] / "mlflow" / "fields.yaml"
"""The allow-list: part of the code, so that a workspace can't widen it."""
SERVER_ENV = FIELDS.with_name("server.env")
LOCAL_PAGES = "http://127.0.0.1:5000"
"""Where `server_command` serves the pages of the local database unless told otherwise."""

_MAX_SPOOLED_FILE_BYTES = 5_000_000
_LOCK_SECONDS = 60.0
_ABANDONED_SECONDS = 3600.0
_PROBE_SECONDS = 3.0
_COURIER_POLL_SECONDS = 0.05
_MAX_NOTE_CHARACTERS = 5000
_METRICS_PER_CALL, _PARAMETERS_PER_CALL = 1000, 100
_LOG = logging.getLogger(__name__)


class LineageError(RuntimeError):
    """The tracking server or the allow-list can't be used; says which and how to mend it."""


class RegistryAwayError(LineageError):
    """The registry did not answer; the same again may find it there."""

    exit_status = 1


class ChampionChangedError(LineageError):
    """Another machine made a champion while this one decided; the same again decides anew."""

    exit_status = 1


@dataclass(frozen=True)
class RunRecord:
    """Everything that is known about one making of one artifact."""

    stage: str
    """Name of the stage; also its Dagster asset key."""
    group: str
    """The stage's group, e.g. ``training``."""
    output_digest: str
    """DVC digest of the artifact."""
    input_digests: Mapping[str, str]
    """DVC digest of each input artifact, by stage name."""
    recipe_fingerprint: str
    git_commit: str
    code_digest: str
    parameters: Mapping[str, Any]
    """Recipe fields that the stage depends on, dotted or nested."""
    summary: Mapping[str, int | float | str]
    """Counts and scores, logged under their own names; words become tags ``summary.NAME``."""
    timings: Mapping[str, float]
    """Seconds and rates, logged as ``timings/NAME``."""
    artifact: Path
    """Folder of the published artifact."""
    metrics_file: Path | None = None
    """Metrics of every step as `ShowingProgress` wrote them, logged as ``steps/NAME``."""
    plots: Sequence[str] = ()
    """PNG files, relative to the artifact."""
    tables: Mapping[str, str] = field(default_factory=dict)
    """Markdown tables by title."""
    report: str | None = None
    """HTML page, relative to the artifact."""
    files: Sequence[str] = ()
    """Other small files to be kept with the run, relative to the artifact."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """What charts group by: variant, teachers, ``ablation.group`` and the like."""
    datasets: Sequence[str] = ()
    """Which of `input_digests` are data sets (not models); logged as MLflow dataset inputs with their digests."""
    dagster_run_id: str | None = field(default_factory=lambda: os.environ.get("VALR_DAGSTER_RUN_ID"))
    command: str = field(default_factory=lambda: os.environ.get("VALR_COMMAND", ""))
    """What a person typed. Of its words only stages, options and fields of the allow-list are logged."""
    person: str = field(default_factory=lambda: os.environ.get("LOGNAME") or os.environ.get("USER") or "")
    """Who typed it: the login name."""
    ended: float = field(default_factory=time.time)
    """Seconds since 1970. The begin follows from ``timings["seconds"]``."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """What makes a second delivery of this record find the run of the first."""

    @property
    def run_name(self) -> str:
        """``stage@`` and the first ten digits of the artifact's digest."""
        return f"{self.stage}@{self.output_digest[:10]}"


def record(
    root: Path, run: RunRecord, warn: Callable[[str], None] = _LOG.warning, *, delivers: bool = True
) -> str | None:
    """Spool `run`, deliver what is spooled, and return the address of its MLflow run; None if that has to wait.

    Where another process has a `courier`, that one delivers; the process that has one does not wait for it. A process
    that only works for another one, on a machine from which the spool is fetched, does not deliver.
    Raises nothing: what goes wrong is one line to `warn`.
    """
    try:
        entry = spool(run, root)
    except (OSError, TypeError, ValueError, LineageError) as error:
        warn(redacted(f"the measurements of {run.stage} could not be kept for MLflow: {error}"))
        return None
    if _has_courier.get() or not delivers:
        return None
    if _carried(root, entry):
        return recorded_url(root, run.stage, run.output_digest)
    delivered = dict(deliver(root, warn=warn))
    # Another process may have delivered it while this one waited for its turn.
    return delivered.get(run.id) or recorded_url(root, run.stage, run.output_digest)


def spool(run: RunRecord, root: Path, fields: Path = FIELDS) -> Path:
    """Write `run` with copies of its small files to ``.valr/spool/<id>/``, whole or not at all; return that folder.

    Raises:
        OSError: it can't be written.
        TypeError, ValueError: a field holds what JSON can't.
        LineageError: the allow-list is missing or broken.
    """
    entry = root / ".valr" / "spool" / run.id
    if entry.exists():
        return entry
    partial = entry.with_name(f".{run.id}")
    shutil.rmtree(partial, ignore_errors=True)
    for left in entry.parent.glob(".*"):
        # By a kill; one that is being written is younger, and may be renamed at any moment.
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        values = asdict(replace(_allowed(run, fields), metrics_file=None, artifact=Path()))
        del values["metrics_file"], values["artifact"]
        (partial / "record.json").write_text(json.dumps(values, sort_keys=True), encoding="utf-8")
        if run.metrics_file is not None and run.metrics_file.is_file():
            shutil.copyfile(run.metrics_file, partial / "steps.jsonl")
        for name in (*run.plots, *run.files, *([run.report] if run.report else [])):
            source, copy = run.artifact / name, partial / "files" / name
            if source.is_file() and source.stat().st_size <= _MAX_SPOOLED_FILE_BYTES:
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, copy)
        partial.rename(entry)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return entry


def deliver(
    root: Path, limit: int = 100, fields: Path = FIELDS, warn: Callable[[str], None] = _LOG.warning
) -> list[tuple[str, str]]:
    """Log spooled records to the tracking server, the newest first, and remove from the spool what has arrived.

    The server is the one that ``MLFLOW_TRACKING_URI`` names, else SQLite in ``.valr/mlflow.db``. Several processes may
    deliver at once; they take turns.

    Args:
        root: the project.
        limit: at most so many records, so that a long outage does not hold up the stage that comes after it.
        fields: the allow-list.
        warn: gets one line for what could not be delivered and stays in the spool.

    Returns:
        (id of the record, address of its run) for each that arrived.
    """
    if not _spooled(root):
        return []
    try:
        with FileLock(root / ".valr" / "lineage.lock", timeout=_LOCK_SECONDS):
            return list(_deliver(root, limit, fields, warn))
    except Timeout:
        warn("another process is still delivering to MLflow; what this stage measured goes out with the next one")
        return []


_has_courier: ContextVar[bool] = ContextVar("has_courier", default=False)


@contextmanager
def courier(root: Path) -> Iterator[None]:
    """Inside the block a thread delivers what all processes of the project record, so that none of them imports mlflow.

    It ends at the first record that it can't deliver: from then on every process delivers, and warns, for itself. What
    is spooled when the block ends is delivered before it is left. Where another process has a courier, that one does.
    """
    lock = _courier_lock(root)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        yield
        return
    ending = threading.Event()
    # What stayed from before goes out with the first record that is new, as it does without a courier.
    carry = threading.Thread(target=_carry, args=(root, set(_spooled(root)), lock, ending), name="courier", daemon=True)
    carry.start()
    token = _has_courier.set(True)
    try:
        yield
    finally:
        _has_courier.reset(token)
        ending.set()
        carry.join()


def _carry(root: Path, stayed: set[Path], lock: FileLock, ending: threading.Event) -> None:
    try:
        while True:
            last_look = ending.wait(_COURIER_POLL_SECONDS)
            if not stayed.issuperset(_spooled(root)):
                stayed.clear()
                # Silent, because the process whose record stays tries by itself and warns.
                if not deliver(root, warn=lambda _: None) and _spooled(root):
                    return
            elif last_look:
                return
    finally:
        lock.release()


def _carried(root: Path, entry: Path) -> bool:
    """Wait while the courier of another process has a spooled record; False if there is none that takes it."""
    lock = _courier_lock(root)
    while entry.exists():
        try:
            with lock.acquire(timeout=0):
                return False
        except Timeout:
            time.sleep(_COURIER_POLL_SECONDS)
    return True


def _courier_lock(root: Path) -> FileLock:
    """Held by the process that has a courier as long as it delivers; the system frees it where that process dies."""
    path = root / ".valr" / "courier.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path, thread_local=False)


def recorded_url(root: Path, stage: str, output_digest: str) -> str | None:
    """Address of the MLflow run that made this version of the artifact, without asking the server; None if unknown."""
    path = _receipt(root, stage, output_digest)
    if not path.is_file() and not _has_courier.get():
        # A courier may be about to write it.
        for entry in _spooled(root):
            if not _carried(root, entry):
                break
    try:
        receipt = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return run_url(root, receipt["run_id"], receipt["experiment_id"])


@dataclass(frozen=True)
class RecordedRun:
    """What the tracking server knows about one making of one artifact. A word that it doesn't know is empty."""

    stage: str
    output_digest: str
    input_digests: Mapping[str, str]
    """DVC digest of each input artifact, by stage name."""
    recipe_fingerprint: str
    git_commit: str
    code_digest: str
    parameters: Mapping[str, str]
    """The recipe fields that were logged, as text."""
    command: str
    person: str
    dagster_run_id: str
    ended: float
    """Seconds since 1970."""
    url: str
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds and rates of the stage, by the names under which it reported them."""


def find_runs(root: Path, tag: str, values: Iterable[str]) -> dict[str, list[RecordedRun]]:
    """The finished runs whose `tag` is one of `values`, by that value, the latest first.

    A project that has recorded nothing has none, and no database is made for it.

    Raises:
        LineageError: the tracking server is away, or refuses.
    """
    uri, found = tracking_uri(root), {}
    if uri == f"sqlite:///{_database(root)}" and not _database(root).is_file():
        return {}
    try:
        client, experiment_id = _connect(root)
        for value in values:
            runs = client.search_runs(
                [experiment_id],
                f"tags.`{tag}` = '{value}' AND attributes.status = 'FINISHED'",
                order_by=["end_time DESC"],
            )
            found[value] = [_recorded(root, run) for run in runs]
    except Exception as error:
        raise LineageError(
            f"MLflow at {_shown(uri)} can't be asked ({_reason(error)}); set MLFLOW_TRACKING_URI, or start the server"
        ) from None
    return found


def _recorded(root: Path, run: Run) -> RecordedRun:
    tags = run.data.tags
    return RecordedRun(
        stage=tags.get("stage", ""),
        output_digest=tags.get("output.digest", ""),
        input_digests={
            name.removeprefix("input."): digest for name, digest in tags.items() if name.startswith("input.")
        },
        recipe_fingerprint=tags.get("recipe.fingerprint", ""),
        git_commit=tags.get("mlflow.source.git.commit", ""),
        code_digest=tags.get("code.digest", ""),
        parameters=dict(run.data.params),
        command=tags.get("command", ""),
        person=tags.get("mlflow.user", ""),
        dagster_run_id=tags.get("dagster.run_id", ""),
        ended=(run.info.end_time or 0) / 1000,
        url=run_url(root, run.info.run_id, run.info.experiment_id),
        timings={
            name.removeprefix("timings/"): value
            for name, value in run.data.metrics.items()
            if name.startswith("timings/")
        },
    )


MODEL = "valr"
"""The registered model whose versions are all trained models of the project."""
CHAMPION, CHALLENGER = "champion", "challenger"
"""Aliases: the version that serves, and the one that was last put forward to take its place."""
_MOVES = "promotion."
"""Begin of the tags that hold the history, one a move: ``promotion.NUMBER.ID``."""


@dataclass(frozen=True)
class Promotion:
    """One move of the alias `champion`."""

    version: str
    how: str
    """`gate`, `overruled` or `rolled back`."""
    reason: str
    """What a person gave; empty where the gate decided alone."""
    evidence: str
    """Digest of the decision's folder; empty for a roll-back."""
    person: str
    """From git's settings, else the login name."""
    at: float
    """Seconds since 1970."""


@dataclass(frozen=True)
class Registered:
    """What the registry knows about the model."""

    aliases: Mapping[str, str]
    """Version by alias: `champion`, `challenger`."""
    digests: Mapping[str, str]
    """DVC digest of the weights' folder by version, the oldest version first."""
    stages: Mapping[str, str]
    """Stage that made it, by version."""
    history: Sequence[Promotion]
    """The oldest first."""
    scores: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By version, DVC digest of the scores that it was last registered with, by name."""

    @property
    def champion(self) -> str | None:
        """The version that has the alias; None while none has."""
        return self.aliases.get(CHAMPION)

    @property
    def champion_digest(self) -> str | None:
        """DVC digest of the champion's weights; None while there is no champion."""
        return self.digests.get(self.champion or "")

    @property
    def before(self) -> str | None:
        """The version that was champion before the present one; a version that was rolled back is none."""
        stack: list[str] = []
        for move in self.history:
            if move.how == "rolled back" and move.version in stack:
                del stack[len(stack) - stack[::-1].index(move.version) :]
            elif not stack or stack[-1] != move.version:
                stack.append(move.version)
        # The alias is what counts: its last move may have been cut off before it was written down.
        if stack and stack[-1] == self.champion:
            stack.pop()
        return stack[-1] if stack else None

    @property
    def withdrawn(self) -> Mapping[str, str]:
        """The reason, maybe empty, by version that a person rolled back and that was not promoted since."""
        found: dict[str, str] = {}
        for last, move in zip([None, *self.history], self.history, strict=False):
            if move.how == "rolled back" and last:
                found[last.version] = move.reason
            found.pop(move.version, None)
        return found


def registered(root: Path) -> Registered:
    """Versions, aliases and history of the model. Raises `LineageError` where the server is away."""
    with _asking(root) as (client, _):
        return _registered(client)


def release_lock(root: Path) -> FileLock:
    """Held by whoever decides on the champion and moves the alias: on this machine one after the other."""
    path = root / ".valr" / "locks" / "release.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)


def register(root: Path, stage: str, digest: str, scores: Mapping[str, str]) -> str:
    """The version of the model with this digest, registered if there is none yet; it is `challenger` from now on.

    The champion stays what it is, and does not challenge itself.

    Args:
        stage: that made it.
        digest: of its folder, as DVC gives it; it is also where the weights are found.
        scores: DVC digest of its scores, by stage name; they take the place of those of an earlier registration.

    Raises:
        LineageError: the server is away, or refuses.
    """
    with _asking(root) as (client, experiment):
        known = _registered(client)
        version = next((version for version, one in known.digests.items() if one == digest), None)
        if version is None:
            if not client.search_registered_models(f"name = '{MODEL}'"):
                client.create_registered_model(MODEL)
            runs = client.search_runs(
                [experiment], f"tags.`output.digest` = '{digest}'", max_results=1, order_by=["end_time DESC"]
            )
            made = client.create_model_version(
                MODEL,
                f"dvc:{digest}",
                run_id=runs[0].info.run_id if runs else None,
                tags={"stage": stage, "output.digest": digest},
            )
            version = str(made.version)
        if scores:
            client.set_model_version_tag(MODEL, version, "scores", json.dumps(dict(scores), sort_keys=True))
        if known.champion != version:
            client.set_registered_model_alias(MODEL, CHALLENGER, version)
        return version


def show_decision(root: Path, version: str, page: str, evidence: str) -> None:
    """Put what was decided on a version onto its page in the registry.

    Args:
        page: in Markdown; the page takes its beginning.
        evidence: digest of the decision's folder.

    Raises:
        LineageError: the server is away, or refuses.
    """
    with _asking(root) as (client, _):
        client.update_model_version(MODEL, version, redacted(page)[:_MAX_NOTE_CHARACTERS])
        client.set_model_version_tag(MODEL, version, "decision", evidence)


def promote(
    root: Path, version: str, how: str, reason: str = "", evidence: str = "", seen: Registered | None = None
) -> Promotion:
    """Move the alias `champion` to `version`, and write down who did it, when and why; nothing else changes.

    MLflow can't compare an alias and set it in one step. Two machines that move it within the same moment both do, and
    at least one of them is told by the history that both have written.

    Args:
        seen: what the registry said when this was decided; nothing is moved where the champion is another one now.

    Raises:
        ChampionChangedError: another champion than `seen`.
        LineageError: no such version, another move at the same moment, or the server is away.
    """
    with _asking(root) as (client, _):
        known = _registered(client)
        if version not in known.digests:
            raise LineageError(f"there is no version {version} of {MODEL}; `valr release show` lists them")
        if seen is not None and known.champion != seen.champion:
            raise ChampionChangedError(
                f"nothing was moved: when this was decided the champion was {_named(seen)}, and now it is "
                f"{_named(known)}; give the command again, and it is decided about that one"
            )
        move = Promotion(version, how, redacted(reason), evidence, _person(root), time.time())
        number = f"{_MOVES}{len(known.history):06d}."
        own = f"{number}{uuid.uuid4().hex[:8]}"
        client.set_registered_model_alias(MODEL, CHAMPION, version)
        if known.aliases.get(CHALLENGER) == version:
            client.delete_registered_model_alias(MODEL, CHALLENGER)
        client.set_registered_model_tag(MODEL, own, json.dumps(asdict(move)))
        tags = client.get_registered_model(MODEL).tags
        rivals = [value for name, value in tags.items() if name.startswith(number) and name != own]
        if rivals:
            rival = Promotion(**json.loads(rivals[0]))
            raise LineageError(
                f"version {version} was made champion by {move.person}, and at the same moment version {rival.version} "
                f"by {rival.person}; the champion is now {_named(_registered(client))}. If it should be the other one, "
                "promote that again"
            )
        return move


def _named(known: Registered) -> str:
    """The champion in words."""
    return f"version {known.champion}" if known.champion else "nobody"


def roll_back(root: Path, reason: str = "") -> Promotion:
    """Move the alias `champion` to the version that had it before the present one.

    Raises:
        LineageError: there was none before, or the server is away.
    """
    with release_lock(root):
        known = registered(root)
        if known.before is None:
            raise LineageError("no version was champion before the present one; `valr release show` tells the history")
        return promote(root, known.before, "rolled back", reason, seen=known)


def _registered(client: MlflowClient) -> Registered:
    found = client.search_registered_models(f"name = '{MODEL}'")
    if not found:
        return Registered({}, {}, {}, ())
    versions = sorted(client.search_model_versions(f"name = '{MODEL}'"), key=lambda one: int(one.version))
    aliases = {alias: str(version) for alias, version in client.get_registered_model(MODEL).aliases.items()}
    moves = [
        (name.rpartition(".")[0], Promotion(**json.loads(value)))
        for name, value in found[0].tags.items()
        if name.startswith(_MOVES)
    ]
    # Of two moves at one moment the one whose alias stands counts as the later.
    moves.sort(key=lambda row: (row[0], row[1].version == aliases.get(CHAMPION), row[1].at))
    return Registered(
        aliases=aliases,
        digests={str(one.version): one.tags.get("output.digest", "") for one in versions},
        stages={str(one.version): one.tags.get("stage", "") for one in versions},
        history=[move for _, move in moves],
        scores={str(one.version): json.loads(one.tags.get("scores", "{}")) for one in versions},
    )


@contextmanager
def _asking(root: Path) -> Iterator[tuple[MlflowClient, str]]:
    try:
        yield _connect(root)
    except LineageError:
        raise
    except Exception as error:
        raise RegistryAwayError(
            f"the registry at {_shown(tracking_uri(root))} can't be asked ({_reason(error)}); set MLFLOW_TRACKING_URI, "
            "or start the server, and give the command again"
        ) from None


def _person(root: Path) -> str:
    asked = subprocess.run(["git", "config", "user.name"], cwd=root, capture_output=True, text=True, check=False)
    return asked.stdout.strip() or os.environ.get("LOGNAME") or os.environ.get("USER") or ""


def tracking_uri(root: Path) -> str:
    """``MLFLOW_TRACKING_URI``, else the SQLite database of the project."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{_database(root)}"


def run_url(root: Path, run_id: str, experiment_id: str) -> str:
    """Address of a run's page.

    It is on ``VALR_MLFLOW_PAGES`` where people reach the server under another address than programs do, else on the
    tracking server, else (a local database) on `LOCAL_PAGES`.
    """
    uri = urlsplit(tracking_uri(root))
    server = urlunsplit((uri.scheme, uri.netloc.rpartition("@")[2], uri.path, "", ""))
    pages = os.environ.get("VALR_MLFLOW_PAGES") or (server if uri.scheme in ("http", "https") else LOCAL_PAGES)
    # Without the workflow type MLflow opens the run in its GenAI view, where training charts are missing.
    return f"{pages.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def runs_page(root: Path, port: int) -> str:
    """Address of the list of runs on a local server, in the training view; of all experiments before the first run."""
    receipts = sorted((root / ".valr" / "tracked").glob("*.json"))
    which = f"/{json.loads(receipts[0].read_text(encoding='utf-8'))['experiment_id']}/runs" if receipts else ""
    return f"http://127.0.0.1:{port}/#/experiments{which}?workflowType=machine_learning"


def server_command(root: Path, host: str = "127.0.0.1", port: int = 5000) -> list[str]:
    """The command that serves the pages and the API of the project's own database.

    The database is made first if there is none, because the server and the first stage must not both make it.
    """
    _make_database(root)
    return [
        *(sys.executable, "-m", "mlflow", "--env-file", str(SERVER_ENV), "server"),
        *("--backend-store-uri", f"sqlite:///{_database(root)}"),
        *("--artifacts-destination", _artifacts(root).as_uri()),
        *("--host", host, "--port", str(port), "--workers", "1"),
    ]


# ---------------------------------------------------------------------------------------------------- the allow-list


def _allowed(run: RunRecord, fields: Path) -> RunRecord:
    """`run` with nothing in it but what the allow-list names; parameters come out flat."""
    lists = _read_fields(fields)

    def keep(kind: str, names: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        def passes(name: str) -> bool:
            return any(fnmatchcase(name, line) for line in lists[kind]) and not any(
                fnmatchcase(name.lower(), line) for line in lists["never"]
            )

        return {name: _unsecret(value) for name, value in names.items() if passes(prefix + name)}

    def shown(word: str) -> str:
        """A word of the command; values of fields that are not logged, and places on this machine, are left out."""
        name, assigned, value = word.strip("'\"").partition("=")
        if assigned:
            return f"{name}={value if keep('parameters', {name: ''}) and redacted(word) == word else '...'}"
        return word if re.fullmatch(r"[\w+,@-]+", word) and redacted(word) == word else "..."

    numbers = {name: value for name, value in run.summary.items() if not isinstance(value, str)}
    words = {name: value for name, value in run.summary.items() if isinstance(value, str)}
    return replace(
        run,
        parameters=keep("parameters", dict(_flat(run.parameters))),
        summary=keep("metrics", numbers) | keep("tags", words, "summary."),
        timings=keep("metrics", run.timings, "timings/"),
        tags=keep("tags", run.tags),
        tables={title: redacted(table) for title, table in run.tables.items()},
        command=" ".join(map(shown, run.command.split())),
    )


def _unsecret(value: Any) -> Any:
    return redacted(value) if isinstance(value, str) else value


def _read_fields(path: Path) -> dict[str, list[str]]:
    try:
        lists = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {kind: [str(line) for line in lists[kind]] for kind in ("parameters", "metrics", "tags", "never")}
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise LineageError(
            f"the allow-list {path.parent.name}/{path.name} can't be read ({type(error).__name__}: {error}); it needs "
            "the lists parameters, metrics, tags and never; bring it back with: git checkout mlflow/fields.yaml"
        ) from None


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


# --------------------------------------------------------------------------------------------------------- delivery


def _spooled(root: Path) -> list[Path]:
    """Spooled records, the newest first."""
    folder = root / ".valr" / "spool"
    written: dict[Path, float] = {}
    for entry in folder.iterdir() if folder.is_dir() else ():
        # Another process that delivers removes it at any moment.
        with suppress(FileNotFoundError):
            if not entry.name.startswith("."):
                written[entry] = entry.stat().st_mtime
    return sorted(written, key=written.__getitem__, reverse=True)


def _deliver(root: Path, limit: int, fields: Path, warn: Callable[[str], None]) -> Iterator[tuple[str, str]]:
    entries = _spooled(root)
    if not entries:
        return
    stays = "what was measured stays in .valr/spool and goes out with the next stage"
    # Whatever goes wrong from here on, from a missing package to a full disk on the server, must not fail the stage.
    try:
        client, experiment_id = _connect(root)
    except Exception as error:
        warn(f"MLflow at {_shown(tracking_uri(root))} is away ({_reason(error)}); {stays}")
        return
    for entry in entries[:limit]:
        try:
            run = _read_spooled(entry, fields)
        except (OSError, ValueError, TypeError) as error:
            warn(f".valr/spool/{entry.name} can't be read ({_reason(error)}); delete that folder")
            continue
        except LineageError as error:
            warn(f"{error}; until then {stays}")
            return
        try:
            run_id = _log_run(client, experiment_id, run, entry)
            _write_receipt(root, run, run_id, experiment_id)
            shutil.rmtree(entry)
        except Exception as error:
            warn(f"MLflow did not take the run of {run.stage} ({_reason(error)}); {stays}")
            if not _is_refusal(error):
                return
            continue
        yield run.id, run_url(root, run_id, experiment_id)


def _read_spooled(entry: Path, fields: Path) -> RunRecord:
    steps = entry / "steps.jsonl"
    values = json.loads((entry / "record.json").read_text(encoding="utf-8"))
    run = RunRecord(**values, artifact=entry / "files", metrics_file=steps if steps.is_file() else None)
    return _allowed(run, fields)


def _log_run(client: MlflowClient, experiment_id: str, run: RunRecord, entry: Path) -> str:
    """Write all of `run`; everything in here may be repeated after a delivery that broke off half-way."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunStatus, RunTag

    ended = round(run.ended * 1000)
    began = ended - round(run.timings.get("seconds", 0.0) * 1000)
    found = client.search_runs([experiment_id], f"tags.`valr.record` = '{run.id}'", max_results=1)
    if found:
        run_id: str = found[0].info.run_id
        if found[0].info.status == RunStatus.to_string(RunStatus.FINISHED):
            return run_id
    else:
        created = client.create_run(
            experiment_id, start_time=began, run_name=run.run_name, tags={"valr.record": run.id}
        )
        run_id = created.info.run_id

    parameters = [Param(name, _text(value)) for name, value in run.parameters.items()]
    for batch in _batches(parameters, _PARAMETERS_PER_CALL):
        client.log_batch(run_id, params=batch)
    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in _tags(run).items()])

    figures = {name: value for name, value in run.summary.items() if not isinstance(value, str)}
    figures |= {f"timings/{name}": value for name, value in run.timings.items()}
    metrics = [Metric(_metric_name(name), float(value), ended, 0) for name, value in figures.items()]
    if run.metrics_file is not None:
        metrics += [
            Metric(_metric_name(f"steps/{name}"), value, round(at * 1000), step)
            for step, name, value, at in steps(run.metrics_file)
        ]
    for batch in _batches(metrics, _METRICS_PER_CALL):
        client.log_batch(run_id, metrics=batch)

    datasets = [
        DatasetInput(
            Dataset(name, run.input_digests[name], "local", json.dumps({"uri": f"artifacts/{name}"})),
            [InputTag("mlflow.data.context", run.group)],
        )
        for name in run.datasets
    ]
    if datasets:
        client.log_inputs(run_id, datasets)
    for name in run.plots:
        if (entry / "files" / name).is_file():
            client.log_artifact(run_id, str(entry / "files" / name), "plots")
    for name in run.files:
        if (entry / "files" / name).is_file():
            client.log_artifact(run_id, str(entry / "files" / name))
    if run.report and (entry / "files" / run.report).is_file():
        client.log_artifact(run_id, str(entry / "files" / run.report), "report")
    if run.tables:
        client.log_text(run_id, _tables(run), "table.md")
    client.set_terminated(run_id, RunStatus.to_string(RunStatus.FINISHED), ended)
    return run_id


def _tags(run: RunRecord) -> dict[str, str]:
    tags = {
        "stage": run.stage,
        "group": run.group,
        "output.digest": run.output_digest,
        "code.digest": run.code_digest,
        "recipe.fingerprint": run.recipe_fingerprint,
        "mlflow.source.name": f"valr run {run.stage}",
        "mlflow.source.git.commit": run.git_commit,
        "dagster.asset_key": run.stage.partition("@")[0],
        **{f"input.{name}": digest for name, digest in run.input_digests.items()},
        **{f"summary.{name}": value for name, value in run.summary.items() if isinstance(value, str)},
        **run.tags,
        "dagster.run_id": run.dagster_run_id or "",
        "command": run.command,
        "mlflow.user": run.person,
        # What MLflow shows as the run's description.
        "mlflow.note.content": _tables(run)[:_MAX_NOTE_CHARACTERS] if run.tables else "",
    }
    return {name: value for name, value in tags.items() if value}


def _tables(run: RunRecord) -> str:
    return "\n\n".join(f"## {title}\n\n{table}" for title, table in run.tables.items()) + "\n"


def steps(metrics_file: Path) -> list[tuple[int, str, float, float]]:
    """Rows (step, name, value, seconds since 1970) of a metrics file, in the order of steps.

    A step that comes again takes back everything from it on: a run that goes on after a kill starts from its last
    checkpoint, and what came after that checkpoint happened twice. A last line that a kill cut short is left out.
    """
    known: dict[str, dict[int, tuple[float, float]]] = {}
    for line in metrics_file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        for name, value in row["metrics"].items():
            series = known.setdefault(name, {})
            if series and next(reversed(series)) >= row["step"]:
                series = known[name] = {step: point for step, point in series.items() if step < row["step"]}
            series[row["step"]] = (float(value), row["time"])
    return sorted((step, name, *point) for name, series in known.items() for step, point in series.items())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _metric_name(name: str) -> str:
    """MLflow takes letters, digits, ``_-. :/``."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _batches(rows: Sequence[Any], size: int) -> Iterator[list[Any]]:
    remaining = iter(rows)
    while batch := list(islice(remaining, size)):
        yield batch


def _receipt(root: Path, stage: str, digest: str) -> Path:
    return root / ".valr" / "tracked" / f"{stage}@{digest}.json"


def _write_receipt(root: Path, run: RunRecord, run_id: str, experiment_id: str) -> None:
    path = _receipt(root, run.stage, run.output_digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps({"run_id": run_id, "experiment_id": experiment_id}), encoding="utf-8")
    partial.replace(path)


# ------------------------------------------------------------------------------------------------------- the server


def _connect(root: Path) -> tuple[MlflowClient, str]:
    """A client of the tracking server and the id of the experiment there."""
    uri = tracking_uri(root)
    if uri.startswith("sqlite:///") and Path(uri.removeprefix("sqlite:///")).resolve() == _database(root):
        _make_database(root)
    elif uri.startswith(("http://", "https://")):
        _probe(uri)
    mlflow = _import_mlflow()
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        return client, client.create_experiment(EXPERIMENT)
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return client, found.experiment_id


def _import_mlflow() -> Any:
    # Read while mlflow is imported. A stage does not wait long for a server, and standard output is the verb's.
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }.items():
        os.environ.setdefault(name, value)
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return mlflow


def _probe(uri: str) -> None:
    """Whether anything answers at `uri`, before 1.5 s are spent on importing mlflow.

    Raises:
        OSError: nothing does.
    """
    parts = urlsplit(uri)
    address = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], f"{parts.path.rstrip('/')}/health", "", ""))
    try:
        urllib.request.urlopen(address, timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return
    except urllib.error.URLError as error:
        # Certificates are mlflow's own business: it has settings for them.
        if not isinstance(error.reason, ssl.SSLError):
            raise


def _database(root: Path) -> Path:
    return root.resolve() / ".valr" / "mlflow.db"


def _artifacts(root: Path) -> Path:
    return root.resolve() / ".valr" / "mlartifacts"


def _make_database(root: Path) -> None:
    """Make the SQLite database with our experiment in it, unless it is there.

    One process at a time, aside and then renamed: two processes that migrate an empty database at once break each
    other, and one that is killed leaves half of it.
    """
    final = _database(root)
    if final.is_file():
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(final.with_suffix(".lock")):
        if final.is_file():
            return
        _import_mlflow()
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        partial = final.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        store = SqlAlchemyStore(f"sqlite:///{partial}", _artifacts(root).as_uri())
        store.create_experiment(EXPERIMENT, artifact_location=_artifacts(root).as_uri())
        store.engine.dispose()
        partial.rename(final)


def _is_refusal(error: Exception) -> bool:
    """Whether the server is there and refuses this very record, so that the others are worth trying."""
    status = getattr(error, "get_http_status_code", None)
    return status is not None and 400 <= status() < 500


def _shown(uri: str) -> str:
    """The address without user and password."""
    parts = urlsplit(uri)
    if parts.scheme.startswith("sqlite"):
        return "the local database"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _reason(error: Exception) -> str:
    """The first line of `error`."""
    line = next(iter(redacted(str(error)).splitlines()), "")[:200]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
