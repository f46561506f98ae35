"""Artifacts: what a stage is given, what it gives back, and how its folder becomes a version.

In: a staged folder that a stage function filled. Out: ``artifacts/<stage>/`` with a ``manifest.json``, published by a
rename, recorded in dvc.lock under the digest that DVC computes. Always: readers see the old artifact, the new one or
none, never half of one; DVC alone decides what an artifact is and whether it is up to date.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from valr_ops.recipe.recipe import Recipe
from valr_ops.stages import REQUESTED_PIPELINE, dvc_target
from valr_ops.store.progress import Progress

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.repo.stage import StageLoad
    from dvc.stage import Stage

_FLUSHING_THREADS = 8


class ArtifactError(RuntimeError):
    """An artifact that is missing, edited, out of date or refused; the message ends with the command that mends it."""


@dataclass(frozen=True)
class StageContext:
    """Everything a stage function may look at."""

    stage: str
    """Name of the stage."""
    recipe: Recipe
    """The recipe, with the stage's variant already applied."""
    inputs: Mapping[str, Path]
    """Folder of each input artifact, by stage name. Read only."""
    out: Path
    """An empty folder to write the artifact into. It is published by a rename after the function returned."""
    work: Path
    """A folder that survives a kill, for checkpoints from which the next run of the same stage goes on."""
    progress: Progress
    """Bars, lines, metrics."""
    cache: Path | None = None
    """A folder that survives success as well, for what was paid for; nothing in `out` may depend on what it holds."""
    previous: Path | None = None
    """The published artifact that this one will replace, for comparing with; nothing in `out` may depend on it."""
    part: tuple[int, int] | None = None
    """(i, n) for a run that does one of n parts in `work`, where the one that makes the artifact finds it; or None."""


@dataclass(frozen=True)
class Check:
    """The outcome of one blocking expectation on the staged artifact."""

    name: str
    passed: bool
    detail: str
    """One sentence; for a failure what is wrong, where, and what to do."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Failing rows and figures, JSON values only."""


@dataclass(frozen=True)
class StageReport:
    """What a stage function returns beside the files it wrote."""

    summary: Mapping[str, int | float | str]
    """Counts and scores: on the asset, in manifest.json and as MLflow metrics. Deterministic: no clocks in here."""
    tables: Mapping[str, str] = field(default_factory=dict)
    """Markdown tables by title, previews for people."""
    plots: tuple[str, ...] = ()
    """PNG files, relative to the artifact."""
    checks: tuple[Check, ...] = ()
    """All of the stage's blocking expectations; one that did not pass keeps the artifact from being published."""
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds and rates: to MLflow and the asset, never into the artifact."""
    report: str | None = None
    """HTML page inside the artifact, if there is one."""


def project_root(start: Path | None = None) -> Path:
    """The folder with dvc.yaml at or above `start` (default: the working directory), else the checkout of this package.

    Raises:
        ArtifactError: neither has a dvc.yaml.
    """
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[2]):
        if (folder / "dvc.yaml").is_file() and (folder / "params.yaml").is_file():
            return folder
    raise ArtifactError(f"no dvc.yaml with a params.yaml at or above {here}; run the command inside the project folder")


def folder(root: Path, stage: str) -> Path:
    """Where the artifact of `stage` is, or will be; that of ``stage@cell`` below the other cells' folder."""
    return root.joinpath("artifacts", *stage.split("@"))


def model_folder(path_or_stage: str) -> Path:
    """The folder at that path, or the artifact of the stage of that name.

    Raises:
        ArtifactError: neither has a config.json.
    """
    path = Path(path_or_stage)
    candidates = [path] if len(path.parts) != 1 else [path, folder(project_root(), path_or_stage)]
    for found in candidates:
        if (found / "config.json").is_file():
            return found
    raise ArtifactError(
        f"--model {path_or_stage}: neither a folder with a config.json nor a stage whose artifact is a model; "
        "give the folder of a model, or make one first: valr materialize +stage2_valr_m"
    )


def directory_digest(path: Path) -> str:
    """The digest that DVC gives to a folder: MD5 of the sorted (md5, relpath) list of its files, with ``.dir`` behind.

    Computed here so that a process without DVC (a pod) can report it; a test holds it against DVC's.
    """
    entries = []
    for file in path.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "md5").hexdigest()
            entries.append({"md5": digest, "relpath": file.relative_to(path).as_posix()})
    entries.sort(key=lambda entry: entry["relpath"])
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode()).hexdigest() + ".dir"


def write_manifest(staged: Path, stage: str, report: StageReport) -> None:
    """Add ``manifest.json``: what the artifact is, its counts, its checks and its files. No clocks, no host names."""
    files = {
        file.relative_to(staged).as_posix(): file.stat().st_size for file in sorted(staged.rglob("*")) if file.is_file()
    }
    manifest = {
        "stage": stage,
        "summary": dict(report.summary),
        "tables": dict(report.tables),
        "plots": list(report.plots),
        "report": report.report,
        "checks": [{"name": check.name, "passed": check.passed, "detail": check.detail} for check in report.checks],
        "files": files,
    }
    (staged / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_manifest(artifact: Path) -> dict[str, Any]:
    """The manifest of a published artifact.

    Raises:
        ArtifactError: there is none, or it can't be read.
    """
    try:
        manifest: dict[str, Any] = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{artifact.name} has no readable manifest.json ({error}); make it again: valr run {artifact.name} --force"
        ) from None
    return manifest


@contextmanager
def published(staged: Path, final: Path, trash: Path) -> Iterator[None]:
    """A complete staged folder at its final place, within a block that records it: an error there puts the older back.

    Every file is flushed to disk before the rename, so that a power cut leaves the old artifact, the new one or none.
    """
    # Side by side the disk takes many at once: 0.5 s for two thousand small files instead of up to 10 s.
    with ThreadPoolExecutor(_FLUSHING_THREADS) as threads:
        list(threads.map(_flush, [*staged.rglob("*"), staged]))
    final.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(trash, ignore_errors=True)
    if final.exists():
        trash.parent.mkdir(parents=True, exist_ok=True)
        final.rename(trash)
    staged.rename(final)
    try:
        yield
    except BaseException:
        shutil.rmtree(final)
        if trash.exists():
            trash.rename(final)
        raise
    shutil.rmtree(trash, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class State:
    """What DVC knows about one stage's artifact."""

    exists: bool
    edited: bool
    """The folder's content is not what was recorded when it was made."""
    reasons: tuple[str, ...]
    """What changed since it was made: inputs, code, recipe fields. Empty for an artifact that is up to date."""

    @property
    def up_to_date(self) -> bool:
        return self.exists and not self.edited and not self.reasons


class Ledger:
    """DVC seen from a stage: is an artifact up to date, record it, fetch back what an earlier run made."""

    def __init__(self, root: Path) -> None:
        # 0.2 s, needed by the verbs that touch artifacts only.
        from dvc.repo import Repo

        logging.getLogger("dvc").setLevel(logging.ERROR)
        if not (root / ".dvc").is_dir():
            raise ArtifactError("this folder is not a DVC project yet (no .dvc folder); run: dvc init, or make setup")
        self.root = root
        self.repo: Repo = Repo(str(root), _wait_for_lock=True)
        self.repo.stage = _stages_parsed_once(self.repo)
        _write_lock_files_whole(Path(self.repo.tmp_dir))
        _remove_dead_rwlock(Path(self.repo.tmp_dir))

    def states(self, stages: Iterable[str]) -> dict[str, State]:
        """The state of each named stage, from DVC's own comparison of dvc.lock with the files."""
        names = list(stages)
        status = self.repo.status(targets=[dvc_target(name) for name in names])
        recorded = self.recorded()
        return {name: self._state(name, status.get(dvc_target(name), []), recorded.get(name)) for name in names}

    def digest(self, stage: str) -> str | None:
        """The recorded digest of the stage's artifact."""
        outs = self.recorded().get(stage, {}).get("outs", [])
        return outs[0].get("md5") if outs else None

    def start(self, stage: str) -> Stage:
        """The stage with its inputs, code and parameters as they are now, for `commit` to record once it is made."""
        started = self._stage(stage)
        started.save_deps()
        return started

    def requested(self, stage: str, inputs: Mapping[str, str], recipe: Mapping[str, Any], *, same_code: bool) -> Stage:
        """As `start` gives it, for an artifact that was asked for earlier and made elsewhere.

        Args:
            stage: its name.
            inputs: digest of each input artifact, by stage name.
            recipe: all recipe fields, as JSON values.
            same_code: whether the stage's code is still that; else its files are recorded without a digest, as changed.
        """
        from dvc.dependency import ParamsDependency
        from dvc.dependency.base import DependencyDoesNotExistError
        from dvc.dependency.param import MissingParamsError
        from dvc_data.hashfile.hash_info import HashInfo
        from dvc_data.hashfile.meta import Meta

        asked = self._stage(stage)
        digests = {f"artifacts/{name}": digest for name, digest in inputs.items()}
        for one in asked.deps:
            # What is as it was then is recorded to the same bytes, sizes included.
            with suppress(DependencyDoesNotExistError, MissingParamsError):
                one.save()
            if isinstance(one, ParamsDependency):
                fields = {key: value_at(recipe, key) for key in one.params}
                if one.hash_info.value != fields:
                    one.hash_info = HashInfo(one.hash_name, fields)  # type: ignore[arg-type]  # as DVC itself does
            elif one.def_path in digests:
                if one.hash_info.value != digests[one.def_path]:
                    one.hash_info, one.meta = HashInfo(one.hash_name, digests[one.def_path]), Meta(isdir=True)
            elif not same_code:
                one.hash_info, one.meta = HashInfo(), Meta()
        return asked

    def commit(self, stage: str, started: Stage | None = None) -> str:
        """Record the artifact as it stands on disk; return its digest.

        Args:
            stage: its name.
            started: what it was made from, by `start` or `requested`; by default what is there now.
        """
        from dvc.repo import lock_repo

        made = started or self.start(stage)
        with lock_repo(self.repo):
            # As `dvc commit` does it, but that takes what changed since the start for what the artifact was made from.
            made.save_outs()
            self.repo.stage_cache.save(made)
            made.commit()
            made.dvcfile.dump_stages([made], update_pipeline=False)
        digest = self.digest(stage)
        if digest is None:
            raise ArtifactError(
                f"DVC recorded no digest for {stage}; is the stage in dvc.yaml? Run: valr stages --write"
            )
        return digest

    def restore(self, stage: str) -> bool:
        """Bring back what an earlier run made from the same inputs, code and parameters; False if there was none."""
        from dvc.stage.cache import RunCacheNotFoundError

        restored = self._stage(stage)
        try:
            with self.repo.lock:
                _remove_empty_runs(Path(self.repo.stage_cache.cache_dir))
                self.repo.stage_cache.restore(restored)
        except RunCacheNotFoundError:
            return False
        if not (folder(self.root, stage) / "manifest.json").is_file():
            return False
        self.commit(stage, restored)
        return True

    def bring_back(self, stage: str, staged: Path) -> bool:
        """Put the recorded version of an artifact that is not there back, by way of the folder `staged`.

        DVC removes an artifact before it makes it again. False if DVC's cache does not have that version any more.
        """
        from dvc.exceptions import CheckoutError

        final, (out,) = folder(self.root, stage), self._stage(stage).outs
        if final.exists() or not out.hash_info:
            return True
        shutil.rmtree(staged, ignore_errors=True)
        out.fs_path = str(staged)
        try:
            out.checkout()
        except CheckoutError:
            return False
        final.parent.mkdir(parents=True, exist_ok=True)
        staged.rename(final)
        return True

    def push(self, stages: Iterable[str]) -> int:
        """Copy the named artifacts to the default remote; the number of files that were new there."""
        return int(self.repo.push(targets=[dvc_target(name) for name in stages]))

    def has_remote(self) -> bool:
        """Whether a default remote is configured."""
        return bool(self.repo.config["core"].get("remote"))

    def read(self, digest: str, name: str) -> bytes | None:
        """A file of the version `digest` of an artifact, from DVC's cache; None where that is not on this machine."""
        cache = Path(self.repo.cache.local.path)
        listed = cache / digest[:2] / digest[2:]
        for entry in json.loads(listed.read_bytes()) if listed.is_file() else ():
            cached = cache / entry["md5"][:2] / entry["md5"][2:]
            if entry["relpath"] == name and cached.is_file():
                return cached.read_bytes()
        return None

    def recorded(self) -> dict[str, Any]:
        """What dvc.lock says of every stage that was made: its inputs, code, recipe fields and artifact."""
        recorded: dict[str, Any] = {}
        for path in (self.root / "dvc.lock", (self.root / REQUESTED_PIPELINE).with_suffix(".lock")):
            if path.is_file():
                recorded |= (yaml.load(path.read_text(encoding="utf-8"), Loader=_YamlLoader) or {}).get("stages") or {}
        return recorded

    def _stage(self, name: str) -> Stage:
        # DVC's own commands write the lock file in place.
        with self.repo.lock:
            return self.repo.stage.get_target(dvc_target(name))

    def _state(self, name: str, changes: list[Any], recorded: Mapping[str, Any] | None) -> State:
        exists = (folder(self.root, name) / "manifest.json").is_file()
        if recorded is None:
            return State(exists=exists, edited=False, reasons=("it was not made yet",))
        edited, reasons = False, []
        for change in changes:
            if change == "always changed":
                continue
            if change == "changed command":
                reasons.append("its command in dvc.yaml changed")
                continue
            for path, how in change.get("changed outs", {}).items():
                edited |= how == "modified"
                if how == "deleted":
                    reasons.append(f"{path} was deleted")
            for path, how in change.get("changed deps", {}).items():
                reasons += self._reasons(path, how, recorded)
        return State(exists=exists, edited=edited, reasons=tuple(reasons))

    def _reasons(self, path: str, how: Any, recorded: Mapping[str, Any]) -> list[str]:
        if isinstance(how, Mapping):
            before = recorded.get("params", {}).get(path, {})
            now = yaml.load((self.root / path).read_text(encoding="utf-8"), Loader=_YamlLoader)
            return [
                line
                for key in how
                for line in _differences(f"recipe field {key}", before.get(key), value_at(now, key))
                or [f"recipe field {key}"]
            ]
        if path.startswith("artifacts/"):
            return [f"input {path.removeprefix('artifacts/')} {'changed' if how == 'modified' else how}"]
        return [f"{'code' if path.endswith('.py') else 'file'} {path} {'changed' if how == 'modified' else how}"]


def _stages_parsed_once(repo: Repo) -> StageLoad:
    """DVC's own loader of stages, which parses a pipeline and its lock again only when one of them has changed.

    DVC's parses both for every name, in pure Python: 0.6 s a name when everything is made, twice that in a push.
    """
    from dvc.dvcfile import load_file
    from dvc.repo.stage import PROJECT_FILE, StageLoad

    parsed: dict[str, tuple[Any, Any]] = {}

    class ParsedOnce(StageLoad):
        def load_all(
            self, path: str | None = None, name: str | None = None, accept_group: bool = True, glob: bool = False
        ) -> list[Stage]:
            if path not in (None, PROJECT_FILE, REQUESTED_PIPELINE):
                return super().load_all(path, name, accept_group, glob)
            file = Path(repo.root_dir, path or PROJECT_FILE)
            # Looked at before the parse, so that a change during it is seen the next time.
            seen = [_seen(file), _seen(file.with_suffix(".lock"))]
            if seen != parsed.get(str(file), (None, None))[0]:
                parsed[str(file)] = seen, load_file(repo, str(file)).stages
            stages = parsed[str(file)][1]
            return [stages[key] for key in self._get_keys(stages, name, accept_group, glob)]

        def load_one(self, path: str | None = None, name: str | None = None) -> Stage:
            (stage,) = self.load_all(path, name, accept_group=False)
            return stage

    return ParsedOnce(repo)


def _seen(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _write_lock_files_whole(partial: Path) -> None:
    """Let DVC fill a lock file in the folder `partial` and rename it.

    By itself it empties the file and fills it for up to half a second, in which a kill or a full disk costs the records
    of all stages. It also parses and writes those of all stages for one that changed, in pure Python: two seconds a
    stage once all of them are made. Here the lines of the others stay, to the same bytes.
    """
    from dvc import dvcfile
    from dvc.utils.serialize import dumps_yaml, parse_yaml_for_update

    @contextmanager
    def modified(path: str, fs: Any = None) -> Iterator[Any]:
        file, filled = Path(path), partial / Path(path).name
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        if _AS_DVC_WRITES.fullmatch(text):
            data = yaml.load(text, Loader=_YamlLoader)
            before = dict(data["stages"])
            yield data
            for name, entry in data["stages"].items():
                if entry is not before.get(name):
                    text = _with_entry(text, name, dumps_yaml({"stages": {name: entry}}).partition("\n")[2])
        else:
            data = parse_yaml_for_update(text, path)
            yield data
            text = dumps_yaml(data)
        filled.write_text(text, encoding="utf-8")
        _flush(filled)
        filled.replace(file)

    dvcfile.modify_yaml = modified


_AS_DVC_WRITES = re.compile(r"schema: '2\.0'\nstages:\n(?:  .*\n|\n)+")


def _with_entry(text: str, name: str, entry: str) -> str:
    """The text of a lock file, of whose stages `name` has the lines `entry`."""
    older = re.search(rf"^  {re.escape(name)}:\n(?:    .*\n|\n)+", text, re.MULTILINE)
    start, end = older.span() if older else (len(text), len(text))
    return text[:start] + entry + text[end:]


def _remove_empty_runs(runs: Path) -> None:
    """Remove what a kill or a full disk left of DVC's memory of earlier runs: folders in which nothing was written.

    DVC fails at such a folder whenever the same inputs come again. Who calls has DVC's lock, so none is being filled.
    """
    for run in runs.glob("*/*"):
        with suppress(OSError):
            # Only of a folder that is empty.
            run.rmdir()


def _remove_dead_rwlock(folder: Path) -> None:
    """Remove DVC's list of who uses which path where nobody in it lives.

    A kill or a full disk may leave it torn, and a process number in it may be another one's by now: DVC would refuse to
    work until a person deletes the file.
    """
    import psutil
    from dvc.lock import make_lock
    from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK

    file = folder / RWLOCK_FILE
    with make_lock(str(folder / RWLOCK_LOCK), tmp_dir=str(folder)):
        try:
            written, known = file.stat().st_mtime, json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        except ValueError:
            file.unlink()
            return
        users = [*known.get("write", {}).values(), *itertools.chain(*known.get("read", {}).values())]
        for pid in {int(user["pid"]) for user in users}:
            with suppress(psutil.NoSuchProcess):
                if psutil.Process(pid).create_time() <= written:
                    return
        file.unlink()


_YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def value_at(values: Any, key: str) -> Any:
    """The value below a dotted `key`, None where there is none."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _differences(where: str, before: Any, now: Any) -> list[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = sorted({*before, *now})
        return [line for key in keys for line in _differences(f"{where}.{key}", before.get(key), now.get(key))]
    return [] if before == now else [f"{where}: {json.dumps(before)} -> {json.dumps(now)}"]
