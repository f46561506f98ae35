"""The one verb that does work: run a stage, or say that there is nothing to do.

In: a stage's name and overrides of the recipe. Out: a published, recorded artifact and an `Outcome`. ``valr run``,
``dvc repro`` and a Dagster materialization all end here. Always: write to a staging folder, audit it with the stage's
expectations, and only then publish, record and report it; a stage that dies leaves the artifact as it was.
"""

from __future__ import annotations

import errno
import functools
import importlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from filelock import FileLock

from valr_ops.recipe import price, recipes
from valr_ops.recipe.recipe import Recipe, read
from valr_ops.stages import RECIPE_FILE, STAGES, Stage, stage, upstream
from valr_ops.store import lineage
from valr_ops.store.artifacts import (
    ArtifactError,
    Check,
    Ledger,
    StageContext,
    StageReport,
    State,
    directory_digest,
    folder,
    project_root,
    published,
    read_manifest,
    write_manifest,
)
from valr_ops.store.objects import DiskFullError, disk_full
from valr_ops.store.progress import Progress, ShowingProgress, open_progress


class CheckFailedError(RuntimeError):
    """A blocking expectation failed: the staged artifact was kept aside and the published one is as it was."""


@dataclass(frozen=True)
class Outcome:
    """What became of one stage."""

    stage: str
    how: Literal["made", "hit", "restored"]
    digest: str
    reasons: tuple[str, ...]
    """Why it was not a hit."""
    seconds: float
    report: StageReport
    input_digests: Mapping[str, str]


class PartError(ValueError):
    """A part of a stage that has no parts."""


def run(
    name: str, overrides: Mapping[str, Any] | None = None, *, force: bool = False, recorded: bool = True
) -> Outcome:
    """Make the artifact of one stage, unless what it depends on stands unchanged in dvc.lock.

    Args:
        name: of the stage.
        overrides: dotted names and values that go before params.yaml.
        force: make it even so.
        recorded: False leaves DVC's and MLflow's part to an orchestrator on another machine: the artifact is made
            whatever dvc.lock says, and its measurements stay in the spool.

    Raises:
        RecipeError: params.yaml or an override is wrong.
        ArtifactError: an input is missing, edited or out of date.
        CheckFailedError: an expectation failed on what the stage made.
        DiskFullError: there was no room; the same call goes on once there is.
        Any error of the stage function, with everything left as it was.
    """
    started = time.monotonic()
    root = project_root()
    row = stage(name)
    with FileLock(_state(root, "locks") / f"{name}.lock"):
        progress = open_progress(root, name)
        with _failure_told(root, name, progress):
            if not recorded:
                why = ("an orchestrator asked for it",)
                return _make(root, row, _recipe_of_artifact(root, row), None, why, progress, started, delivers=False)
            return _run(root, row, overrides or {}, force, progress, started)


def run_part(
    name: str, part: tuple[int, int], overrides: Mapping[str, Any] | None = None, *, force: bool = False
) -> Outcome:
    """Do the i-th of n parts of a stage, beside the others; `run` then finds them done and makes the artifact.

    Parts meet in ``.valr/work`` of the project folder, which they share; any number may run at a time. An artifact that
    is up to date needs no part.

    Raises:
        PartError: the stage can't be divided. Otherwise as `run`.
    """
    started, root, row = time.monotonic(), project_root(), stage(name)
    if not row.splits:
        able = ", ".join(one.name for one in STAGES if one.splits)
        raise PartError(f"{name} has no parts; --part is for {able}")
    progress = open_progress(root, f"{name}.{part[0]}")
    with _failure_told(root, name, progress):
        refresh_recipe(root, overrides or {})
        ledger, recipe = Ledger(root), _recipe_of_artifact(root, row)
        states = ledger.states([*row.inputs, name])
        for needed in row.inputs:
            _require(needed, name, states[needed])
        if not force and not _reasons(root, row, recipe, states[name]):
            return _found(root, row, ledger, "hit", (), progress, started)
        context = _context(root, row, recipe, progress, out=root, part=part)
        report: StageReport = row.load()(context)
    progress.finished("made", f"part {part[0]} of {part[1]}")
    return Outcome(name, "made", "", (), time.monotonic() - started, report, {})


def _run(
    root: Path, row: Stage, overrides: Mapping[str, Any], force: bool, progress: ShowingProgress, started: float
) -> Outcome:
    names = (*row.inputs, row.name)
    if _runs_under_dvc():
        # DVC keeps others from the inputs, has decided that the stage must run, and records the result itself.
        ledger = Ledger(root)
        _tidy_what_is_recorded(root, ledger, names)
        if not ledger.bring_back(row.name, _state(root, "staging") / row.name):
            progress.say("the version before is not in DVC's cache any more: there is nothing to compare with")
        return _make(root, row, _recipe_of_artifact(root, row), None, ("DVC found it out of date",), progress, started)
    if row.name != "recipe":
        refresh_recipe(root, overrides)
    ledger = Ledger(root)
    states = ledger.states(names)
    _tidy_what_is_recorded(root, ledger, [name for name in names if not states[name].edited])
    recipe = _recipe_of_artifact(root, row, overrides)
    # Before its inputs are asked for: a model that the recipe does not have will not come of making them.
    _of_variant(recipe, row)
    for needed in row.inputs:
        _require(needed, row.name, states[needed])
    reasons = _reasons(root, row, recipe, states[row.name]) + (("it was forced",) if force else ())
    if not reasons:
        return _found(root, row, ledger, "hit", (), progress, started)
    if not force and row.name != "recipe" and ledger.restore(row.name) and not _changed_outside(root, row, recipe):
        _tidy_what_is_recorded(root, ledger, (row.name,))
        return _found(root, row, ledger, "restored", reasons, progress, started)
    record = functools.partial(ledger.commit, row.name, ledger.start(row.name))
    # Read again behind that: what is recorded may be older than what the artifact is made from, and never newer.
    return _make(root, row, _recipe_of_artifact(root, row, overrides), record, reasons, progress, started)


def _runs_under_dvc() -> bool:
    return bool(os.environ.get("DVC_STAGE"))


def _reasons(root: Path, row: Stage, recipe: Recipe, state: State) -> tuple[str, ...]:
    """Why the stage has to run; empty for a hit."""
    if state.reasons:
        return state.reasons
    if state.edited:
        return (f"{folder(root, row.name).relative_to(root)} was edited after it was made",)
    if not state.exists:
        return (f"{folder(root, row.name).relative_to(root)} was deleted",)
    if row.name == "recipe" and _resolved(root) != recipe:
        return ("params.yaml or an override gives other values",)
    changed = _changed_outside(root, row, recipe)
    return (changed,) if changed else ()


def _of_variant(recipe: Recipe, row: Stage) -> Recipe:
    return recipe.for_variant(row.variant) if row.variant else recipe


def _changed_outside(root: Path, row: Stage, recipe: Recipe) -> str | None:
    """What changed outside of the project since the artifact was made."""
    return _function(row.external_inputs)(recipe, folder(root, row.name)) if row.external_inputs else None


def refresh_recipe(root: Path, overrides: Mapping[str, Any]) -> bool:
    """Bring ``artifacts/recipe`` up to params.yaml and the overrides; whether it had to be made.

    Every stage reads its parameters from there.
    """
    if (folder(root, "recipe") / "manifest.json").is_file() and _resolved(root) == recipes.load(root, overrides):
        return False
    run("recipe", overrides)
    return True


def out_of_date(root: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    """The named stages that are not hits, and those of them downstream of one, in the order of the table.

    Raises:
        RecipeError: one of them is a model that the recipe does not have.
    """
    recipe = read_recipe(root)
    for name in names:
        _of_variant(recipe, stage(name))
    states = Ledger(root).states(names)
    waiting: list[str] = []
    for name in names:
        row = stage(name)
        above = {needed.name for needed in upstream(row.inputs)}
        if _reasons(root, row, recipe, states[name]) or above.intersection(waiting):
            waiting.append(name)
    return tuple(waiting)


def _make(
    root: Path,
    row: Stage,
    recipe: Recipe,
    record: Callable[[], str] | None,
    reasons: tuple[str, ...],
    progress: ShowingProgress,
    started: float,
    *,
    delivers: bool = True,
) -> Outcome:
    """Make, publish, record (by `record`, which returns the digest, unless somebody else does that) and report."""
    # As they are now: what changes while the stage runs has no part in it.
    input_digests, code_digest, git_commit = _recorded(root, row.inputs), row.code_digest(root), _git_commit(root)
    planned = _planned(recipe, row, root)
    _require_room(root, row, planned, progress)
    staged = _fresh(_state(root, "staging") / row.name)
    progress.say(f"running because {'; '.join(reasons)}")
    context = _context(root, row, recipe, progress, staged)
    went_on, began = any(context.work.iterdir()), time.monotonic()
    report: StageReport = row.load()(context)
    # Training says it itself. The seconds of a run that went on are not those of the whole stage.
    if row.resources == "gpu" and planned is not None and not went_on and "actual_seconds" not in report.timings:
        took = price.against_plan(planned, time.monotonic() - began)
        report = replace(report, timings={**report.timings, **took})
    _audit(root, row, staged, report, progress)
    write_manifest(staged, row.name, report)
    shutil.copyfile(staged / "manifest.json", _made(root, row.name))
    with published(staged, folder(root, row.name), _state(root, "trash") / row.name):
        digest = record() if record else directory_digest(folder(root, row.name))
    if not _runs_under_dvc():
        _tidy(root, row.name)
    elif row.code_digest(root) != code_digest:
        progress.say(
            f"the code of {row.name} was edited while it ran, and DVC records the edited code as what made it; if the "
            f"edit matters, make it again with: valr run {row.name} --force"
        )
    outcome = Outcome(row.name, "made", digest, reasons, time.monotonic() - started, report, input_digests)
    url = lineage.record(
        root,
        lineage.RunRecord(
            stage=row.name,
            group=row.group,
            recipe_fingerprint=recipe.fingerprint,
            git_commit=git_commit,
            code_digest=code_digest,
            output_digest=digest,
            input_digests=input_digests,
            # The variant's own values: by the others' every cell of an ablation would look the same in charts.
            parameters=_parameters(context.recipe, row),
            summary=report.summary,
            timings={**report.timings, "seconds": outcome.seconds},
            metrics_file=progress.metrics_file,
            artifact=folder(root, row.name),
            plots=report.plots,
            tables=report.tables,
            report=report.report,
            tags=_tags(context.recipe, row),
            datasets=[needed for needed in row.inputs if "parquet" in stage(needed).kinds],
        ),
        delivers=delivers,
    )
    progress.finished(outcome.how, digest)
    progress.materialized(report, digest, folder(root, row.name), how="made", tracking_url=url)
    return outcome


def _planned(recipe: Recipe, row: Stage, root: Path) -> price.Price | None:
    """What the stage is said to cost, or None where that is not known."""
    try:
        return price.price(recipe, row.name, root)
    except price.PriceError:
        return None


def _require_room(root: Path, row: Stage, planned: price.Price | None, progress: Progress) -> None:
    """Raise `DiskFullError` before hours are spent on what will not fit; only tell where its size is an assumption."""
    if planned is None:
        return
    left = (_state(root, "work") / row.name).rglob("*")
    needed = planned.written_bytes - sum(path.stat().st_size for path in left if path.is_file())
    free = shutil.disk_usage(root).free
    if needed <= free:
        return
    if row.resources == "gpu":
        raise disk_full(root, f"{row.name} with its checkpoints", needed)
    progress.say(
        f"about {needed / 2**30:,.0f} GiB will be written by the recipe's assumptions (price.image_bytes), and "
        f"{free / 2**30:,.0f} GiB are free"
    )


def _context(
    root: Path, row: Stage, recipe: Recipe, progress: Progress, out: Path, part: tuple[int, int] | None = None
) -> StageContext:
    work, published = _state(root, "work") / row.name, folder(root, row.name)
    work.mkdir(parents=True, exist_ok=True)
    return StageContext(
        stage=row.name,
        recipe=_of_variant(recipe, row),
        inputs={needed: folder(root, needed) for needed in row.inputs},
        out=out,
        work=work,
        progress=progress,
        cache=_state(root, "cache") / row.name,
        previous=published if published.is_dir() else None,
        part=part,
    )


def _found(
    root: Path,
    row: Stage,
    ledger: Ledger,
    how: Literal["hit", "restored"],
    reasons: tuple[str, ...],
    progress: ShowingProgress,
    started: float,
) -> Outcome:
    manifest = read_manifest(folder(root, row.name))
    report = StageReport(
        summary=manifest["summary"],
        tables=manifest["tables"],
        plots=tuple(manifest["plots"]),
        report=manifest["report"],
        checks=tuple(Check(**check) for check in manifest["checks"]),
    )
    digest = ledger.digest(row.name) or ""
    input_digests = {needed: ledger.digest(needed) or "" for needed in row.inputs}
    outcome = Outcome(row.name, how, digest, reasons, time.monotonic() - started, report, input_digests)
    progress.finished(how, digest)
    url = lineage.recorded_url(root, row.name, digest)
    progress.materialized(report, digest, folder(root, row.name), how=how, tracking_url=url)
    return outcome


def _audit(root: Path, row: Stage, staged: Path, report: StageReport, progress: ShowingProgress) -> None:
    missing = set(row.checks) - {check.name for check in report.checks}
    if missing:
        raise CheckFailedError(f"{row.name} reported no result for its check {', '.join(sorted(missing))}")
    for check in report.checks:
        progress.checked(check)
    failed = [check for check in report.checks if not check.passed]
    if failed:
        refused = _fresh(_state(root, "refused") / row.name)
        refused.rmdir()
        staged.rename(refused)
        raise CheckFailedError(
            f"{row.name}: {'; '.join(f'{check.name}: {check.detail}' for check in failed)}. "
            f"Nothing was published; what was refused is in {refused.relative_to(root)}"
        )


@contextmanager
def _failure_told(root: Path, name: str, progress: ShowingProgress) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        full = _disk_full(root, name, error)
        progress.failed(_sentence(full or error))
        if full is not None:
            raise full from error
        raise


def _disk_full(root: Path, name: str, error: BaseException) -> DiskFullError | None:
    """The error of a stage that found no room; what it had half written is removed, so that there is some again."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    if isinstance(error, DiskFullError) or not any(_wants_room(one, root) for one in chain):
        return None
    named = next((one.filename for one in chain if isinstance(one, OSError) and isinstance(one.filename, str)), "")
    disk = Path(named).absolute().parent if named else root
    free = shutil.disk_usage(disk if disk.is_dir() else root).free / 2**20
    shutil.rmtree(root / ".valr" / "staging" / name, ignore_errors=True)
    return DiskFullError(
        f"{name}: the disk of {disk} is full ({free:,.1f} MiB were free at the end); make room there, for instance by "
        "`dvc gc --workspace`, which deletes older versions of artifacts, and run the same command again. The artifact "
        "and its record are as they were, and nothing half-written stays"
    )


def _wants_room(error: BaseException, root: Path) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # Libraries in other languages, SQLite and child processes tell by words.
    said = str(error)
    if any(words in said for words in ("No space left on device", "disk is full", "Disk quota exceeded")):
        return True
    return "disk I/O error" in said and shutil.disk_usage(root).free < 2**20


def _require(needed: str, by: str, state: State) -> None:
    mend = f"valr materialize +{by}"
    if not state.exists:
        raise ArtifactError(f"{by} needs artifacts/{needed}, which is not there; make it with: {mend}")
    if state.edited:
        raise ArtifactError(
            f"artifacts/{needed} was edited after it was made (its digest differs); "
            f"bring it back with: dvc checkout {needed}, or make it again with: valr run {needed} --force"
        )
    if state.reasons:
        raise ArtifactError(
            f"{by} needs artifacts/{needed}, which is out of date: {'; '.join(state.reasons)}; make it with: {mend}"
        )


def _state(root: Path, name: str) -> Path:
    path = root / ".valr" / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def _tidy_what_is_recorded(root: Path, ledger: Ledger, names: Iterable[str]) -> None:
    """`_tidy` where the recorded artifact's own run could not; what a later run needs stays.

    It was killed before it could, or DVC started it, which records only what has ended.
    """
    for name, made in ((name, _made(root, name)) for name in names):
        if made.is_file() and made.read_bytes() == ledger.read(ledger.digest(name) or "", "manifest.json"):
            _tidy(root, name)


def _made(root: Path, name: str) -> Path:
    """Holds the manifest of a version from when it is whole to when it is recorded."""
    return _state(root, "work") / f"{name}.made"


def _tidy(root: Path, name: str) -> None:
    """Remove what a stage needs until its artifact is recorded: its checkpoints and the older version."""
    for state in ("work", "trash"):
        shutil.rmtree(root / ".valr" / state / name, ignore_errors=True)
    _made(root, name).unlink(missing_ok=True)


def _fresh(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def _function(dotted: str) -> Any:
    module, name = dotted.split(":")
    return getattr(importlib.import_module(module), name)


def _resolved(root: Path) -> Recipe | None:
    try:
        return read_recipe(root)
    except (ValueError, OSError):
        return None


def read_recipe(root: Path) -> Recipe:
    """The resolved recipe that all stages read. Raises `OSError` or `RecipeError` where it is missing or damaged."""
    return read(_yaml(root / RECIPE_FILE))


def _yaml(path: Path) -> Any:
    # The parser in C, where there is one, takes a tenth of the time.
    return yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _recipe_of_artifact(root: Path, row: Stage, overrides: Mapping[str, Any] | None = None) -> Recipe:
    return recipes.load(root, overrides or {}) if row.name == "recipe" else read_recipe(root)


def _recorded(root: Path, names: tuple[str, ...]) -> dict[str, str]:
    """The recorded digests of the named artifacts; empty for one that has none."""
    lock = root / "dvc.lock"
    stages = (_yaml(lock) or {}).get("stages", {}) if names and lock.is_file() else {}
    outs = {name: stages.get(name, {}).get("outs", []) for name in names}
    return {name: str(found[0].get("md5", "")) if found else "" for name, found in outs.items()}


def _parameters(recipe: Recipe, row: Stage) -> dict[str, Any]:
    values = recipe.model_dump(mode="json")
    found = {}
    for key in row.parameters:
        here: Any = values
        for part in key.split("."):
            here = here[part]
        found[key] = here
    return found


def _tags(recipe: Recipe, row: Stage) -> dict[str, str]:
    tags: dict[str, str] = {"scale": recipe.scale}
    if row.variant:
        tags |= {
            "variant": row.variant,
            "teachers": "+".join(recipe.alignment.teachers),
            "alignment.weight": str(recipe.alignment.weight),
            "alignment.block": str(recipe.alignment.block),
            "latents.slots": str(recipe.latents.slots),
        }
    if row.cell:
        # The table or figure of the paper, whose cells belong into one chart.
        tags["ablation.group"] = row.cell.partition("_")[0]
    return tags


def _git_commit(root: Path) -> str:
    answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    # An image has no history, but says what it was built from.
    return answer.stdout.strip() if answer.returncode == 0 else os.environ.get("VALR_REVISION") or "none"


def _sentence(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; nothing was lost, the same command goes on"
    return f"{error}" if type(error).__module__.startswith("valr_ops") else f"{type(error).__name__}: {error}"
