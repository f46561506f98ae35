"""Is a release bundle whole, and does its model answer as its scores say? Nothing but the bundle is needed.

In: a folder that somebody gave you. Out: a `Verdict` with every file that is not what it was, what differs in this
environment, and every packed question that is answered otherwise.
Always: digests first, and nothing is opened that fails them; scores have to be the mean of their own answers and of
this very model; a path, a picture and a text are bounded before they are read. Who remakes all digests still has to
answer the questions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from valr_ops.data.images import ImageLimits, check_image
from valr_ops.data.records import BadRecord, Image
from valr_ops.evaluation.benchmarks import Item
from valr_ops.evaluation.models import TRANSFORMERS, Budget, open_answerer
from valr_ops.evaluation.questions import Benchmark, Showing
from valr_ops.evaluation.run import (
    PREDICTIONS,
    SCORES,
    ask,
    read_predictions,
    read_scores,
    require_answers,
    scored_rows,
)
from valr_ops.evaluation.scoring import JUDGED_BY
from valr_ops.recipe.recipe import Recipe, override, read
from valr_ops.release.bundle import (
    ASKED,
    LOCK,
    MODEL_FOLDER,
    QUESTIONS,
    QUESTIONS_FOLDER,
    RECIPE,
    SCORES_FOLDER,
    BundleError,
    Row,
    file_problems,
    installed_version,
    locked_versions,
    read_manifest,
    require_small,
    text_of,
)
from valr_ops.release.card import TOLERATED
from valr_ops.store.artifacts import directory_digest
from valr_ops.store.progress import Progress


@dataclass(frozen=True)
class Difference:
    """A question that is answered otherwise than the scores say."""

    benchmark: str
    id: str
    scored: str
    """The answer behind the scores."""
    now: str


@dataclass(frozen=True)
class Verdict:
    """What `verify` found."""

    name: str
    files: int
    problems: tuple[str, ...]
    """Files that are missing, altered or additional, and what does not fit together; nothing was asked then."""
    packages: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """(packed version, installed version) by package where they differ."""
    budget: tuple[str, ...] = ()
    """Half a sentence for each way in which the questions were asked otherwise than for the scores."""
    asked: int = 0
    differing: tuple[Difference, ...] = ()

    @property
    def agreed(self) -> int:
        """Questions that are answered as the scores say."""
        return self.asked - len(self.differing)

    @property
    def passes(self) -> bool:
        """Whether the bundle is whole, and at most one answer in `TOLERATED` is another one."""
        return not self.problems and self.asked > 0 and len(self.differing) * TOLERATED <= self.asked


def verify(bundle: Path, progress: Progress | None = None) -> Verdict:
    """Check every digest, compare the packed lock with this environment, and ask the packed questions again.

    Raises:
        BundleError: no bundle, or one whose files can't be read as what they are.
        AnswererError, ModelError: the weights are whole and can't be opened all the same.
    """
    progress = progress or Progress()
    manifest = read_manifest(bundle)
    name, files = str(manifest.get("name")), len(manifest["files"]) + 1
    problems = file_problems(bundle)
    if problems:
        return Verdict(name, files, tuple(problems))
    scores, rows = _packed_scores(bundle)
    recipe = _packed_recipe(bundle, scores)
    problems = [*_scored_otherwise(scores, rows), *_of_another_model(bundle, scores)]
    if problems:
        return Verdict(name, files, tuple(problems))
    packages = _differing_packages(bundle / LOCK)
    scored = {(row["benchmark"], row["id"]): row for row in rows}
    questions = _packed(bundle, scores, scored, recipe)
    progress.say(f"{files} files are whole; asking {len(questions)} questions again")
    budget = Budget(**scores["budget"])
    answerer = open_answerer(
        name, bundle / MODEL_FOLDER, recipe, TRANSFORMERS if budget.engine == TRANSFORMERS else None
    )
    with TemporaryDirectory() as work:
        journal, batch = Path(work) / "answers.jsonl", recipe.evaluation.batch_size
        predictions = ask(questions, {}, answerer, journal, batch, progress)
    require_answers(predictions)
    now = scored_rows(questions, predictions)
    then = [scored[row["benchmark"], row["id"]] for row in now]
    differing = [
        Difference(row["benchmark"], row["id"], _answer(before), _answer(row))
        for row, before in zip(now, then, strict=True)
        if _read_as(row, scores) != _read_as(before, scores)
    ]
    otherwise = budget.differences(answerer.budget, ("the scores", "this machine"))
    return Verdict(name, files, (), packages, tuple(otherwise.values()), len(now), tuple(differing))


def lines(verdict: Verdict) -> Iterator[str]:
    """What a person reads of a verdict, the most important last."""
    if verdict.problems:
        yield from verdict.problems
        yield f"{verdict.name} is not whole, so nothing was asked: {len(verdict.problems)} things are wrong"
        return
    yield f"{verdict.files} files: every one has its size and digest, and none is more or less"
    if verdict.packages:
        shown = ", ".join(f"{name} {there} (packed {packed})" for name, (packed, there) in verdict.packages.items())
        yield f"warning: this environment is another one than {LOCK} has: {shown}"
    if verdict.budget:
        yield f"warning: asked under another budget than the scores: {'; '.join(verdict.budget)}"
    for one in verdict.differing:
        yield f"{one.benchmark}/{one.id}: {one.now[:80]!r} instead of {one.scored[:80]!r}"
    allowed = verdict.asked // TOLERATED
    yield (
        f"{verdict.name} {'passes' if verdict.passes else 'fails'}: {verdict.agreed} of {verdict.asked} questions are "
        f"answered as the scores say, and at least {verdict.asked - allowed} have to be; answers that are equal to the "
        "last bit are not promised from one machine to another"
    )


def _read_as(row: Row, scores: Mapping[str, Any]) -> tuple[Any, ...]:
    """What has to be the same: the answer as the profile reads it, and its score.

    Where a judge settled the scores, or nothing could be read, the words of the answer count.
    """
    if JUDGED_BY in scores["benchmarks"][row["benchmark"]]["profile"]:
        return (row["isolated"],)
    return row["resolved"], row["score"], row["extracted"] if row["resolved"] else row["isolated"]


def _answer(row: Row) -> str:
    return str(row["extracted"] if row["resolved"] else row["isolated"])


def _packed(
    bundle: Path, scores: Mapping[str, Any], scored: Mapping[tuple[str, str], Row], recipe: Recipe
) -> list[tuple[Benchmark, Item]]:
    """The questions of a bundle, with their pictures checked; each is one that was scored."""
    limits = ImageLimits(1, recipe.data.max_image_pixels)
    items: dict[str, list[Item]] = {}
    # Not str.splitlines: it also splits at line separators that stand inside a JSON string.
    for number, line in enumerate(text_of(bundle / ASKED).removesuffix("\n").split("\n"), start=1):
        where = f"{ASKED}, line {number}"
        try:
            told = json.loads(line)
            images = tuple(_picture(bundle, name, limits, where) for name in told.pop("pictures"))
            item = Item(**told | {"options": tuple(told["options"]), "images": images})
            row = scored[item.benchmark, item.id]
            if (item.question, item.gold) != (row["question"], row["gold"]):
                raise ValueError(f"{item.benchmark}/{item.id} was scored with other words")
            items.setdefault(item.benchmark, []).append(item)
        except BadRecord as error:
            raise BundleError(f"{error.detail} ({error.reason})") from None
        except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise BundleError(f"{where} is no question ({error}); `valr release build` made another one") from None
    if sum(map(len, items.values())) > QUESTIONS:
        raise BundleError(f"{ASKED} has more than {QUESTIONS} questions; `valr release build` made another one")
    found = []
    for name, its in items.items():
        told = scores["benchmarks"][name]
        profile = told["profile"].partition(JUDGED_BY)[0]
        showing = Showing(limits, recipe.evaluation.frames, bundle)
        benchmark = Benchmark(name, told["format"], profile, told["revision"], its, (), showing, told["drawn"])
        found += [(benchmark, item) for item in its]
    return found


def _picture(bundle: Path, name: str, limits: ImageLimits, where: str) -> Image:
    path = bundle / QUESTIONS_FOLDER / name
    if Path(name).name != name:
        raise ValueError(f"{name!r} is no file beside it")
    # No encoding of an allowed picture needs more, so a larger file is not even read.
    if path.stat().st_size > 8 * limits.max_pixels + 2**20:
        raise ValueError(f"{name} has more bytes than a picture of {limits.max_pixels:,} pixels")
    return check_image(path.read_bytes(), "input", limits, f"{where}, {name}")


def _packed_scores(bundle: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    for file in (SCORES, PREDICTIONS):
        require_small(bundle / SCORES_FOLDER / file)
    scores = read_scores(bundle / SCORES_FOLDER)
    try:
        Budget(**scores["budget"])
        # All that is read of them.
        for entry in scores["benchmarks"].values():
            entry["format"], entry["profile"], entry["revision"], entry["drawn"], entry["accuracy"]
        rows = read_predictions(bundle / SCORES_FOLDER)
        for row in rows:
            {row[name] for name in ("question", "gold", "score", "extracted", "resolved", "isolated")}
        return scores, rows
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise BundleError(
            f"{SCORES_FOLDER} of the bundle can't be read ({error}); it was made by another version"
        ) from None


def _packed_recipe(bundle: Path, scores: Mapping[str, Any]) -> Recipe:
    """The recipe of the bundle with the budget of its scores, for the device on which that can be kept."""
    budget = Budget(**scores["budget"])
    try:
        text = text_of(bundle / RECIPE)
        # A few lines of them can stand for gigabytes, and `build` writes none.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise BundleError(f"{RECIPE} of the bundle has aliases; `valr release build` writes none")
        values = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise BundleError(f"{RECIPE} of the bundle is no YAML ({error})") from None
    limits = ("max_new_tokens", "max_segments", "force_first_latent", "frames", "latent_settle")
    changes: dict[str, Any] = {f"evaluation.{name}": getattr(budget, name) for name in limits}
    return override(read(values), changes | {"seed": budget.seed, "runtime.device": _device(budget)})


def _device(budget: Budget) -> str:
    if budget.precision != "bfloat16":
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _scored_otherwise(scores: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    """Scores that are not the mean of their own rows."""
    for name, entry in scores["benchmarks"].items():
        of_items = [row["score"] for row in rows if row["benchmark"] == name]
        mean = round(sum(of_items) / len(of_items), 6) if of_items else None
        if mean != entry["accuracy"]:
            yield f"{SCORES_FOLDER}/{SCORES} gives {entry['accuracy']} for {name}, but its answers make {mean}"


def _of_another_model(bundle: Path, scores: Mapping[str, Any]) -> Iterator[str]:
    digest = directory_digest(bundle / MODEL_FOLDER)
    if digest != scores["model"]["digest"]:
        yield f"{SCORES_FOLDER} are of the model {scores['model']['digest']}, but {MODEL_FOLDER} is {digest}"


def _differing_packages(lock: Path) -> dict[str, tuple[str, str]]:
    """What is installed here in another version than was packed; a package that is not installed is not needed."""
    found = {}
    for one in locked_versions(lock):
        installed = installed_version(one.name)
        if installed is not None and not one.specifier.contains(installed, prereleases=True):
            found[one.name] = (str(one.specifier).removeprefix("=="), installed)
    return found
