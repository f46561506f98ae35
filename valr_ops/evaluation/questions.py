"""Benchmarks ready to be asked: items with their pictures, and the rules by which their answers are scored.

In: the folder of a benchmark in its public layout, or the test records of a source.
Out: prompts with decoded pictures, and cases for the scorer.
Always: a whole data set has the published number of rows of each type, or it is refused; frames of a video are decoded
once for all models and kept by the digest of the video; an item whose pictures can't be decoded is a rejection.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image

from valr_ops.data.images import ImageLimits, check_image, decode
from valr_ops.data.records import Image, Record, Rejection, escaped
from valr_ops.data.videos import read_frames
from valr_ops.evaluation.benchmarks import BenchmarkError, Item, Picture, jsonl
from valr_ops.evaluation.benchmarks.folder import Folder
from valr_ops.evaluation.models import Prompt, digest
from valr_ops.evaluation.scoring import Case, Rules, Scored, ScoringError, Totals, rules_of
from valr_ops.recipe.recipe import Recipe
from valr_ops.store.artifacts import StageContext

FRAME_RULE = "linspace-ends"
"""Frames ``linspace(0, n - 1, N)``, cut to whole numbers, first and last included: as VSI-Bench's authors take them."""


@dataclass(frozen=True)
class Showing:
    """How pictures and frames are shown."""

    limits: ImageLimits
    frames: int
    """Of a video; one that has fewer shows all."""
    cache: Path
    """Folder that keeps decoded frames for the next model."""

    @classmethod
    def of_recipe(cls, recipe: Recipe, cache: Path) -> Showing:
        """As the recipe says."""
        limits = ImageLimits(recipe.data.min_image_side, recipe.data.max_image_pixels)
        return cls(limits, recipe.evaluation.frames, cache)

    @classmethod
    def of(cls, context: StageContext) -> Showing:
        """The same in a stage; all stages share one cache."""
        return cls.of_recipe(context.recipe, (context.cache or context.work).parent / "frames")


@dataclass(frozen=True)
class Benchmark:
    """Questions of one benchmark and how they are scored."""

    name: str
    """As it stands in scores and tables."""
    format: str
    """One of `scoring.BENCHMARKS`: whose rules score it."""
    profile: str
    revision: str
    """Digest of the tables and the list of the media that the items were read from."""
    items: Sequence[Item]
    rejections: Sequence[Rejection]
    """Test records that can't be asked."""
    showing: Showing
    drawn: bool = False
    """Whether a generator drew the questions: then no published score is comparable."""
    folder: Folder | None = field(default=None, compare=False)
    """Where the pictures of the items stand; None for records, which hold them."""

    @property
    def rules(self) -> Rules:
        """Profiles and totals."""
        return rules_of(self.format)

    @property
    def full_score(self) -> float:
        """The best that an item can score: 1, and 6 where a judge rates answers."""
        return float(getattr(self.rules, "FULL_SCORE", 1))

    def comparable(self, item: Item) -> str:
        """The gold in the form in which equal answers are equal strings, for the majority answer."""
        comparable = getattr(self.rules, "comparable", None)
        return comparable(item) if comparable else item.gold

    def prompt(self, item: Item) -> Prompt:
        """Decoded pictures and the question.

        Raises:
            BadRecord: a picture or video that is damaged or too large.
            BenchmarkError: a picture that is not there any more.
        """
        return [decode(image.data) for image in self._shown(item)], escaped(item.question)

    def case(self, item: Item, output: str) -> Case:
        """An isolated answer as the scorer takes it."""
        return Case(
            id=item.id,
            gold=item.gold,
            output=output,
            question_type=item.question_type,
            options=item.options,
            question=item.question,
            where=f"{self.name}/{item.id}",
        )

    def totals(self, items: Sequence[Item], cases: Sequence[Case], scores: Sequence[Scored]) -> Totals:
        """The totals of the profile; for a user's own benchmark those of its groups and pairs too."""
        of_groups = jsonl.group_totals(items, scores) if self.format == "jsonl" else {}
        return {**self.rules.totals(cases, scores, self.profile), **of_groups}

    def _shown(self, item: Item) -> list[Image]:
        where, limits = f"{self.name}/{item.id}", self.showing.limits
        shown: list[Image] = []
        if item.video:
            shown += self._frames(item.video, item.frames or self.showing.frames)
        for number, image in enumerate(item.images, start=1):
            if isinstance(image, Picture):
                image = check_image(self._folder.picture(image), "input", limits, f"{where}, image {number}")
            shown.append(image)
        return shown

    @property
    def _folder(self) -> Folder:
        if self.folder is None:
            raise BenchmarkError(f"benchmark {self.name} has no folder, but its items have pictures in files")
        return self.folder

    def _frames(self, video: str, count: int) -> list[Image]:
        """Frames from the cache, else decoded and put there, whole or not at all."""
        data = self._folder.bytes(video, table=False)
        limits = self.showing.limits
        key = f"{hashlib.sha256(data).hexdigest()[:24]}-{FRAME_RULE}-{count}.zip"
        kept = self.showing.cache / key
        if not kept.is_file():
            frames = read_frames(data, count, limits, video, rule="ends")
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_name(f"{key}.{os.getpid()}.partial")
            with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
                for number, frame in enumerate(frames):
                    archive.writestr(zipfile.ZipInfo(f"{number:05d}.png"), frame.data)
            partial.replace(kept)
            return list(frames)
        with zipfile.ZipFile(kept) as archive:
            return [
                Image(data, hashlib.sha256(data).hexdigest(), *PIL.Image.open(io.BytesIO(data)).size, role="input")
                for data in map(archive.read, archive.namelist())
            ]


def open_benchmark(
    name: str,
    root: Path,
    showing: Showing,
    format: str | None = None,
    profile: str | None = None,
    limit: int | None = None,
    whole: bool = True,
    drawn: bool = False,
) -> Benchmark:
    """The benchmark in the folder `root`.

    Args:
        name: as it shall stand in scores.
        root: folder in the public layout of `format`.
        showing: how its pictures are shown.
        format: one of `scoring.BENCHMARKS`; None where the name is one.
        profile: whose rules score it; None for the benchmark's default.
        limit: the first items only; nothing is counted then.
        whole: whether the rows have to be as many as published.
        drawn: whether a generator wrote them; nothing is counted then.

    Raises:
        BenchmarkError: unknown format or profile; a file or video that is missing; other counts than published.
    """
    try:
        rules = rules_of(format or name)
    except ScoringError as error:
        raise BenchmarkError(f"benchmark {name}: {error}, or say which format it has") from None
    profile = profile_of(rules, name, profile)
    module: Any = importlib.import_module(f"valr_ops.evaluation.benchmarks.{format or name}")
    folder = Folder(root, name, module.SOURCE)
    items: list[Item] = module.read(folder)
    if not items:
        raise folder.error(f"{root} holds no question")
    twice = [one for one, count in Counter(item.id for item in items).items() if count > 1]
    if twice:
        raise folder.error(f"{len(twice)} ids stand twice, such as {twice[0]!r}")
    if whole and not drawn and limit is None and module.COUNTS:
        _verify_counts(folder, items, module.COUNTS)
    media = [picture.file for item in items for picture in item.images if isinstance(picture, Picture)]
    revision = folder.digest([*media, *(item.video for item in items if item.video)])
    return Benchmark(name, format or name, profile, revision, items[:limit], (), showing, drawn, folder)


def benchmark_of_recipe(
    name: str, recipe: Recipe, drawn: Path, showing: Showing, limit: int | None = None
) -> Benchmark:
    """The benchmark that the recipe calls `name`, in its folder or below `drawn`. Raises as `open_benchmark`.

    Args:
        limit: a bound beside the benchmark's own.
    """
    asked = recipe.evaluation.benchmarks[name]
    root = Path(asked.path) if asked.path is not None else drawn / name
    bound = min((one for one in (asked.limit, limit) if one is not None), default=None)
    return open_benchmark(name, root, showing, asked.format, asked.profile, bound, drawn=asked.path is None)


def benchmark_of_records(
    name: str,
    records: Iterable[Record | Rejection],
    showing: Showing,
    limit: int | None = None,
    drawn: bool = False,
    profile: str | None = None,
) -> Benchmark:
    """The test records of a jsonl source as a benchmark.

    Raises:
        BenchmarkError: not one can be asked, or there is no such profile.
    """
    items, rejections = jsonl.from_records(name, records)
    shown = [[image.digest for image in item.images if isinstance(image, Image)] for item in items]
    revision = digest([[one.id, one.question, one.gold, digests] for one, digests in zip(items, shown, strict=True)])
    return Benchmark(
        name, "jsonl", profile_of(rules_of("jsonl"), name, profile), revision, items[:limit], rejections, showing, drawn
    )


def profile_of(rules: Rules, name: str, profile: str | None) -> str:
    """`profile`, or the default of the rules. Raises `BenchmarkError` for one that they have not."""
    if profile is not None and profile not in rules.PROFILES:
        raise BenchmarkError(f"benchmark {name} has no profile {profile!r}; choose one of {', '.join(rules.PROFILES)}")
    return profile or next(iter(rules.PROFILES))


def _verify_counts(folder: Folder, items: Sequence[Item], published: dict[str, int]) -> None:
    if set(published) == {""}:
        found = {"": len(items)}
    else:
        found = dict(Counter(item.question_type for item in items))
    different = [
        f"{kind or 'questions'}: {found.get(kind, 0)} instead of {published.get(kind, 0)}"
        for kind in sorted(found.keys() | published.keys())
        if found.get(kind) != published.get(kind)
    ]
    if different:
        raise folder.error(
            f"{folder.root} is not the whole data set ({', '.join(different[:4])}"
            f"{f' and {len(different) - 4} more' if len(different) > 4 else ''}); to ask only some, "
            "set a limit (valr ask: --limit, or --partial for what is there)"
        )
