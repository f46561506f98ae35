"""The release bundle: one folder with which a stranger can use a model, judge it, and check both.

In: the scores of a model of this project. Out: a folder with weights, recipe, scores and their budget, what it was
trained on and by, environment, cost, fifty questions with their pictures, a card, and the digest of every file.
Always: the same inputs give the same bytes (no clock, no host, no absolute path); the folder is there whole or not at
all, and another one is never overwritten; it holds safetensors and plain data, nothing that runs. `verifying` reads it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from filelock import FileLock
from packaging.requirements import InvalidRequirement, Requirement

from valr_ops.evaluation.ablation import label, model_name
from valr_ops.evaluation.asking import RUN, Asked
from valr_ops.evaluation.benchmarks import Item
from valr_ops.evaluation.models import ENDPOINT
from valr_ops.evaluation.questions import Benchmark
from valr_ops.evaluation.run import (
    EXAMPLES,
    PREDICTIONS,
    SCORES,
    open_benchmarks,
    read_predictions,
    read_scores,
)
from valr_ops.recipe.recipe import Recipe, override, read
from valr_ops.recipe.recipes import ledger
from valr_ops.release.card import CARD, Facts, write_card
from valr_ops.release.gate import DECISION, DECISION_PAGE
from valr_ops.release.provenance import cost_of, data_of, teachers_of
from valr_ops.stages import ABLATION, RECIPE_FILE, UnknownStageError, stage
from valr_ops.store import tree
from valr_ops.store.artifacts import Ledger, StageContext, directory_digest, folder
from valr_ops.store.progress import Progress

MANIFEST, RECIPE, LOCK = "manifest.json", "recipe.yaml", "constraints.txt"
FORMAT = "valr-release-1"
QUESTIONS = 50

_KINDS = frozenset({".jinja", ".json", ".jsonl", ".md", ".parquet", ".png", ".safetensors", ".txt", ".yaml"})
"""Suffixes of files that a bundle may hold: data that is read, nothing that is run."""
MODEL_FOLDER, SCORES_FOLDER, QUESTIONS_FOLDER, DECISION_FOLDER = "model", "scores", "questions", "decision"
ASKED = f"{QUESTIONS_FOLDER}/questions.jsonl"
_MOST_FILES = 100_000
_MOST_BYTES = {MANIFEST: 2**25, RECIPE: 2**22, LOCK: 2**20, "questions.jsonl": 2**25, SCORES: 2**25, PREDICTIONS: 2**30}
"""Of what is read into memory; a picture is bounded by its pixels, and weights by what safetensors maps."""
_FLUSHING_THREADS = 8

Row = Mapping[str, Any]


class BundleError(ValueError):
    """A bundle that can't be built or read: which, why, and what to do."""


@dataclass(frozen=True)
class Built:
    """What `build` left behind."""

    folder: Path
    made: bool
    """False where the very same bundle was there already."""
    files: int
    bytes: int
    warnings: tuple[str, ...]
    """What whoever publishes it has to know: licences that are unknown, what is not on this machine."""


# ------------------------------------------------------------------------------------------------------------ building


@dataclass(frozen=True)
class _Released:
    """A model of the project, its scores, and where both came from."""

    stage: str
    scores: Path
    said: Mapping[str, Any]
    """`scores.json`."""
    recipe: Recipe
    lineage: tree.Lineage

    @property
    def name(self) -> str:
        return model_name(self.said["model"]["artifact"])

    @property
    def digest(self) -> str:
        return str(self.said["model"]["digest"])


def build(
    root: Path,
    scores: Path,
    out: Path | None = None,
    decision: Path | None = None,
    progress: Progress | None = None,
) -> Built:
    """Make the bundle of the model whose scores are in the folder `scores`.

    Args:
        root: the project, which is also the working directory: folders in a recipe are relative to it.
        scores: of a stage `scores_*`, or a run folder that `valr evaluate` scored.
        out: the bundle; ``dist/NAME-DIGEST`` of the project without it.
        decision: folder of the gate's decision about this model; the one in ``.valr/decisions`` without it.
        progress: where to say what is being done.

    Raises:
        BundleError: scores that are not of the model which is there, a recipe that is not the one it was made with,
            questions that are not those that were scored, a decision about another model, or another bundle in `out`.
        ArtifactError, BenchmarkError, PredictionsError, RecipeError: what is needed is missing or damaged.
    """
    progress = progress or Progress()
    released = _released(root, scores)
    decision = _decision(root, released.digest, decision)
    final = (out or root / "dist" / f"{released.name}-{released.digest[:10]}").absolute()
    _require_free(final, released)
    state = root / ".valr"
    state.mkdir(exist_ok=True)
    with FileLock(state / "release.lock"):
        staged = final.with_name(f".{final.name}.partial")
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        try:
            facts = _write(staged, root, released, decision, progress)
            made = _publish(staged, final)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    files = read_manifest(final)["files"]
    warnings = (*facts.unknown_licenses, *released.lineage.missing)
    return Built(final, made, len(files) + 1, sum(entry["bytes"] for entry in files.values()), warnings)


def _released(root: Path, scores: Path) -> _Released:
    said = read_scores(scores)
    if said["budget"]["engine"] == ENDPOINT:
        raise BundleError(
            f"{scores.name} has scores of {said['model']['artifact']}, a model behind an endpoint, whose weights are "
            "not here; release a model of this project"
        )
    made_by = _stage_of(said["model"]["artifact"], scores)
    recorded = Ledger(root).digest(scores.name) if scores.resolve() == folder(root, scores.name).resolve() else None
    if recorded is not None and recorded != directory_digest(scores):
        raise BundleError(f"{scores.name} was edited after it was made; bring it back with: dvc checkout {scores.name}")
    lineage = tree.trace(root, made_by)
    if lineage.version.digest != said["model"]["digest"]:
        raise BundleError(
            f"{scores.name} has scores of {made_by} {said['model']['digest']}, but dvc.lock records "
            f"{lineage.version.digest}: score this model (valr materialize +{scores.name}), or bring the other back "
            f"(git checkout of dvc.lock, then dvc checkout {made_by})"
        )
    values = yaml.safe_load((root / RECIPE_FILE).read_text(encoding="utf-8"))
    _require_recipe(values, (lineage.version, *lineage.upstream))
    return _Released(made_by, scores, said, read(values), lineage)


def _stage_of(artifact: str, scores: Path) -> str:
    """Which stage made the model that scores call `artifact`; a cell of the ablation goes by its own name."""
    for name in (artifact, f"{ABLATION}@{artifact}"):
        try:
            return stage(name).name
        except UnknownStageError:
            continue
    raise BundleError(
        f"{scores.name} has scores of {artifact!r}, which no stage of this project makes; score the model of a stage: "
        "valr ask --model stage2_valr_m ..."
    )


def _require_recipe(values: Mapping[str, Any], versions: Iterable[tree.Version]) -> None:
    """Raise unless the resolved recipe is the one that all of `versions` were made with."""
    for version in versions:
        # A version that dvc.lock has forgotten has its fields as text, from MLflow.
        for name, recorded in version.fields.items() if version.code else ():
            now: Any = values
            for part in name.split("."):
                now = now.get(part) if isinstance(now, Mapping) else None
            if now != recorded:
                raise BundleError(
                    f"{version.stage} was made with another recipe than {RECIPE_FILE} has now ({name} differs); bring "
                    f"params.yaml back and give `valr run recipe`, or make the model again: valr materialize "
                    f"+{version.stage}"
                )


def _decision(root: Path, digest: str, given: Path | None) -> Path | None:
    """The folder of the gate's decision about the model `digest`, if there is one."""
    if given and not (given / DECISION).is_file():
        raise BundleError(f"--decision {given} holds no {DECISION}; give the folder that `valr release promote` wrote")
    paths = [given / DECISION] if given else sorted((root / ".valr" / "decisions").glob(f"[!.]*/{DECISION}"))
    told = {path.parent: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    about = [where for where, one in told.items() if one["challenger"]["digest"] == digest]
    if given and not about:
        raise BundleError(
            f"--decision {given} is about the model {told[given]['challenger']['digest']}, not about {digest}"
        )
    # A model may have been refused before it was promoted.
    found = [where for where in about if told[where]["promotes"]] or about
    if len(found) > 1:
        raise BundleError(
            f"{len(found)} decisions are about this model: {', '.join(one.name for one in found)}; say which is meant "
            "with --decision FOLDER"
        )
    return found[0] if found else None


def _require_free(final: Path, released: _Released) -> None:
    """Raise where something else stands in the bundle's place, before any work."""
    if not final.exists():
        return
    there = read_manifest(final)
    if there.get("model") != {"stage": released.stage, "digest": released.digest}:
        raise BundleError(f"{final} holds the bundle of {there.get('name')}, another model; give another --out")


def _publish(staged: Path, final: Path) -> bool:
    """Move a complete bundle to its place; False where the very same one is there."""
    if final.exists():
        here, there = read_manifest(staged)["files"], read_manifest(final)["files"]
        other = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        if other:
            raise BundleError(
                f"{final} holds another bundle of this model ({', '.join(other[:5])} differ{'' if other[1:] else 's'})"
                "; give another --out, or move it away"
            )
        damaged = file_problems(final)
        if damaged:
            raise BundleError(f"{final} is this bundle, but {damaged[0]}; move it away and build it again")
        return False
    with ThreadPoolExecutor(_FLUSHING_THREADS) as threads:
        list(threads.map(_flush, [*staged.rglob("*"), staged]))
    # Onto a folder that appeared meanwhile, and holds something, the system refuses this.
    staged.rename(final)
    _flush(final.parent)
    return True


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(staged: Path, root: Path, released: _Released, decision: Path | None, progress: Progress) -> Facts:
    """All files of the bundle, the manifest last."""
    progress.say(f"copying {released.stage} and its scores")
    _copy(folder(root, released.stage), staged / MODEL_FOLDER)
    copied = directory_digest(staged / MODEL_FOLDER)
    if copied != released.digest:
        raise BundleError(
            f"the scores are of {released.stage} {released.digest}, but artifacts/{released.stage} is {copied}: it was "
            f"edited, or made again; bring it back with dvc checkout {released.stage}, or score this one"
        )
    # A run folder also has a journal and the folders of its benchmarks, which are the machine's own affair.
    _copy(released.scores, staged / SCORES_FOLDER, {SCORES, PREDICTIONS, EXAMPLES, "examples", MANIFEST})
    if decision:
        _copy(decision, staged / DECISION_FOLDER, {DECISION, DECISION_PAGE})
    recipe = read(_without_places(released.recipe.model_dump(mode="json")))
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=True, allow_unicode=True, width=120)
    heading = (
        f"# The recipe {released.recipe.fingerprint}; folders outside of the project are named by their last part.\n"
    )
    (staged / RECIPE).write_text(heading + text, encoding="utf-8")
    (staged / LOCK).write_text(_locked(root / LOCK), encoding="utf-8")
    config = json.loads((staged / MODEL_FOLDER / "config.json").read_text(encoding="utf-8"))
    facts = Facts(
        name=label(released.name),
        key=released.name,
        digest=released.digest,
        config=config,
        recipe=recipe,
        scores=released.said,
        rows=read_predictions(released.scores),
        data=data_of(released.lineage, released.recipe, released.said),
        teachers=teachers_of(config, recipe),
        cost=cost_of(root, released.recipe, released.lineage),
        decision=json.loads((decision / DECISION).read_text(encoding="utf-8")) if decision else None,
        questions=_pack_questions(staged, root, released, progress),
    )
    for name, document in (
        ("assumptions.json", [asdict(row) for row in ledger(recipe)]),
        ("data.json", facts.data),
        ("teachers.json", facts.teachers),
        ("cost.json", facts.cost),
    ):
        _write_json(staged / name, document)
    write_card(staged / CARD, facts)
    listed = {name: {"bytes": size, "sha256": sha256} for name, size, sha256 in _listing(staged)}
    manifest = {
        "format": FORMAT,
        "name": facts.name,
        "model": {"stage": released.stage, "digest": released.digest},
        "recipe": released.recipe.fingerprint,
        "files": listed,
    }
    _write_json(staged / MANIFEST, manifest)
    return facts


def _copy(source: Path, target: Path, parts: set[str] | None = None) -> None:
    """The files of a folder, or those of its parts that are named."""
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        name = file.relative_to(source)
        if parts is not None and name.parts[0] not in parts:
            continue
        if file.suffix not in _KINDS:
            raise BundleError(
                f"{source.name}/{name} is no file that a bundle may hold (safetensors, JSON, text, pictures, tables); "
                "a pickle can run code: save the model as safetensors, without it"
            )
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / name)


def _without_places(values: Any, name: str = "") -> Any:
    """A recipe without the absolute paths of this machine, which say where somebody works and help nobody else."""
    if isinstance(values, dict):
        return {key: _without_places(value, key) for key, value in values.items()}
    if name in ("path", "weights") and isinstance(values, str) and Path(values).expanduser().is_absolute():
        return Path(values).name
    return values


def _locked(constraints: Path) -> str:
    """The project's lock, with what is installed here instead where that is another version, or not in it at all."""
    pinned = {one.name.lower(): one for one in locked_versions(constraints)}
    needed = {
        Requirement(line).name.lower() for line in importlib.metadata.requires("valr-ops") or () if ";" not in line
    }
    lines = []
    for name in sorted(pinned.keys() | needed):
        installed, one = installed_version(name), pinned.get(name)
        if one is not None and (installed is None or one.specifier.contains(installed, prereleases=True)):
            lines.append(str(one))
        elif installed is not None:
            lines.append(f"{name}=={installed}")
    return "\n".join(["# Exact versions of the environment in which the model was released.", *lines]) + "\n"


def locked_versions(constraints: Path) -> Iterator[Requirement]:
    for number, line in enumerate(text_of(constraints).splitlines(), start=1):
        wanted = line.partition("#")[0].strip()
        if wanted:
            try:
                yield Requirement(wanted)
            except InvalidRequirement:
                raise BundleError(f"{constraints.name}, line {number}: {wanted[:80]!r} names no version") from None


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ------------------------------------------------------------------------------------------------------- the questions


def choose(rows: Sequence[Row], most: int = QUESTIONS) -> list[Row]:
    """At most so many rows: as many of each benchmark as can be, and of each at equal distances."""
    of_benchmark: dict[str, list[Row]] = {}
    for row in rows:
        of_benchmark.setdefault(row["benchmark"], []).append(row)
    taken = dict.fromkeys(of_benchmark, 0)
    for _ in range(min(most, len(rows))):
        taken[min((name for name in taken if taken[name] < len(of_benchmark[name])), key=taken.__getitem__)] += 1
    return [
        of_benchmark[name][place * len(of_benchmark[name]) // count]
        for name, count in taken.items()
        for place in range(count)
    ]


def _pack_questions(staged: Path, root: Path, released: _Released, progress: Progress) -> list[dict[str, Any]]:
    """Write questions with their pictures as they were shown, decoded, in a form without loss."""
    chosen = choose(read_predictions(released.scores))
    progress.say(f"packing {len(chosen)} questions")
    opened = {one.name: one for one in _opened(root, released)}
    (staged / QUESTIONS_FOLDER).mkdir()
    packed = []
    for number, row in enumerate(chosen):
        benchmark, item = _item_of(row, opened, released)
        pictures = []
        for place, picture in enumerate(benchmark.prompt(item)[0]):
            pictures.append(f"{number:02d}-{place:03d}.png")
            picture.save(staged / QUESTIONS_FOLDER / pictures[-1])
        told = {name: getattr(item, name) for name in ("benchmark", "id", "question", "gold", "question_type")}
        packed.append(told | {"options": list(item.options), "pictures": pictures})
    (staged / ASKED).write_text("".join(map(_line, packed)), encoding="utf-8")
    return packed


def _opened(root: Path, released: _Released) -> list[Benchmark]:
    """The benchmarks that were scored, from where they are on this machine."""
    frames = {"evaluation.frames": released.said["budget"]["frames"]}
    recipe, cache = override(released.recipe, frames), root / ".valr" / "cache" / "frames"
    run = released.scores / RUN
    if run.is_file():
        asked = json.loads(run.read_text(encoding="utf-8"))["benchmarks"]
        return [
            Asked(**{name: value for name, value in one.items() if name != "revision"}).open(recipe, cache)
            for one in asked
        ]
    context = StageContext(
        stage=released.scores.name,
        recipe=recipe,
        inputs={name: folder(root, name) for name in ("sources", "benchmarks")},
        out=root,
        work=cache,
        progress=Progress(),
    )
    return open_benchmarks(context)


def _item_of(row: Row, opened: Mapping[str, Benchmark], released: _Released) -> tuple[Benchmark, Item]:
    """The benchmark and the item that a scored row is about."""
    benchmark = opened.get(row["benchmark"])
    items = [item for item in benchmark.items if item.id == row["id"]] if benchmark else []
    scored = released.said["benchmarks"][row["benchmark"]]
    if (
        not benchmark
        or not items
        or benchmark.revision != scored["revision"]
        or (items[0].question, items[0].gold) != (row["question"], row["gold"])
    ):
        raise BundleError(
            f"{row['benchmark']}/{row['id']} is not here as it was asked (revision {scored['revision']}): the files of "
            "the benchmark changed, or the recipe asks fewer; bring them back, or score the model again"
        )
    return benchmark, items[0]


def read_manifest(bundle: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(text_of(bundle / MANIFEST))
        files = manifest["files"]
        if manifest["format"] != FORMAT or len(files) > _MOST_FILES:
            raise ValueError(f"its format is {str(manifest['format'])[:40]!r}, with {len(files)} files")
        for name, entry in files.items():
            if set(entry) != {"bytes", "sha256"}:
                raise ValueError(f"the entry of {name[:80]!r} has no size and digest")
    except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise BundleError(
            f"{bundle} is no release bundle: its {MANIFEST} can't be read ({error}); give a folder that "
            "`valr release build` made"
        ) from None
    return manifest


def file_problems(bundle: Path) -> list[str]:
    """A sentence for every file that is not what the manifest says; reads files inside of the bundle only."""
    listed = read_manifest(bundle)["files"]
    problems = [f"{name!r} leads out of the bundle" for name in sorted(listed) if _leads_out(name)]
    found, strange = _walked(bundle)
    problems += strange
    problems += [f"{name} is missing" for name in sorted(listed.keys() - found - {MANIFEST}) if not _leads_out(name)]
    problems += [f"{name} does not belong to the bundle" for name in sorted(found - listed.keys() - {MANIFEST})]
    for name in sorted(found & listed.keys()):
        if Path(name).suffix not in _KINDS:
            problems.append(f"{name} is of a kind that a bundle may not hold")
        elif (bundle / name).stat().st_size != listed[name]["bytes"]:
            problems.append(f"{name} has {(bundle / name).stat().st_size:,} bytes instead of {listed[name]['bytes']:,}")
        elif _sha256(bundle / name) != listed[name]["sha256"]:
            problems.append(f"{name} was altered: its SHA-256 is another one")
    return problems


def _leads_out(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or str(path) != name


def _walked(bundle: Path) -> tuple[set[str], list[str]]:
    """Names of the regular files, and a sentence for everything that is neither such a file nor a folder."""
    files, strange = set[str](), list[str]()
    for at, folders, names in os.walk(bundle):
        for path in sorted(Path(at) / name for name in (*folders, *names)):
            mode, shown = path.lstat().st_mode, path.relative_to(bundle).as_posix()
            if stat.S_ISREG(mode):
                files.add(shown)
            elif not stat.S_ISDIR(mode):
                strange.append(f"{shown} is {'a link' if stat.S_ISLNK(mode) else 'no ordinary file'}")
    return files, strange


# --------------------------------------------------------------------------------------------------------------- files


def _listing(bundle: Path) -> Iterator[tuple[str, int, str]]:
    """(name, bytes, SHA-256) of every file."""
    for name in sorted(_walked(bundle)[0]):
        yield name, (bundle / name).stat().st_size, _sha256(bundle / name)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_small(path: Path) -> None:
    most = _MOST_BYTES[path.name]
    if path.stat().st_size > most:
        raise BundleError(f"{path.name} has {path.stat().st_size:,} bytes, more than the {most:,} of any bundle")


def text_of(path: Path) -> str:
    require_small(path)
    return path.read_text(encoding="utf-8")


def _line(row: Row) -> str:
    return json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
