"""How much there is to do: what the corpora and benchmarks of a recipe amount to, counted or assumed.

In: a recipe, and where they were made already the reports of its corpora. Out: a `Corpus`, the means and extremes of
its records, and how many questions are asked. Always: what was made is counted, everything else follows from the
recipe's caps and the means it assumes; nothing is read but reports.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from valr_ops.recipe import cost
from valr_ops.recipe.cost import Shape
from valr_ops.recipe.recipe import BenchmarkRecipe, Recipe, SourceRecipe
from valr_ops.stages import RECIPE_FILE

PUBLISHED_ITEMS = {
    "vsi_bench": 5130,
    "blink": 1901,
    "mmvp": 300,
    "mmstar": 1500,
    "vstar": 191,
    "cv_bench": 2638,
    "math_vista": 1000,
    "math_vision": 3040,
    "realworldqa": 765,
    "hr_bench": 800,
    "mm_halu": 96,
}
"""Questions of each benchmark; a test compares them with the readers' own counts."""


class PriceError(ValueError):
    """A price that can't be computed: the message says what is not known, and how to give it."""


@dataclass(frozen=True)
class Corpus:
    """What a price has to know about the records; figures without a unit are means of a record."""

    records: float
    """In all, held out or not."""
    train: float
    """Records that an epoch visits."""
    validation: float
    """Records held out."""
    positions: float
    """Decoder positions without slots and markers, those of images included."""
    image_positions: float
    supervised: float
    """Positions whose next token is trained on."""
    images: float
    segments: float
    most_segments: int
    """Of any record."""
    longest: int
    """Positions of the longest record, without its slots."""
    aimed: float
    """Share of the segments with a target."""
    targets: float
    """Distinct targets of all records."""
    counted: bool
    """Whether that is by the corpus itself."""
    test: float
    """Test records of the user's own sources, which are asked beside the benchmarks."""
    origin: str
    """Where the figures come from."""

    def shown(self) -> str:
        """A record in words."""
        return (
            f"{self.positions:,.0f} positions, {self.image_positions:,.0f} of them of images; {self.segments:.2g} "
            f"latent segments, {self.most_segments} at most; the longest has {self.longest:,} positions"
        )


def assumed_corpus(recipe: Recipe, model: Shape) -> Corpus:
    """The corpus that the recipe's caps and assumed means let expect.

    Raises:
        PriceError: a source with neither cap nor limit, so that nobody knows how many records there are.
    """
    sources = {name: (_records(recipe, name, source), source.weight) for name, source in recipe.data.sources.items()}
    kept = 1.0 - recipe.data.validation_fraction
    records = sum(count for count, _ in sources.values())
    means = recipe.price
    side = cost.MERGE * model.vision_patch
    pixels = min(max(means.image_pixels, recipe.base.min_pixels), recipe.base.max_pixels)
    image_positions = means.images_per_record * pixels / side**2
    segments = means.segments_per_record
    return Corpus(
        records=records,
        train=kept * sum(count * weight for count, weight in sources.values()),
        validation=records - kept * records,
        positions=min(means.text_tokens + image_positions, recipe.data.max_length),
        image_positions=image_positions,
        supervised=means.supervised_share * means.text_tokens,
        images=means.images_per_record,
        segments=segments,
        most_segments=max(means.most_segments, math.ceil(segments)),
        longest=recipe.data.max_length,
        aimed=1.0,
        targets=records * segments,
        test=sum(
            recipe.data.synthetic.test_records if source.path is None else source.limit or 0
            for source in recipe.data.sources.values()
            if source.format == "jsonl"
        ),
        origin=f"the recipe's caps, {records:,} records, and the means below: there is no corpus of this recipe yet",
        counted=False,
    )


def _records(recipe: Recipe, name: str, source: SourceRecipe) -> int:
    known = [count for count in (source.cap, source.limit) if count is not None]
    if source.path is None:
        known.append(recipe.data.synthetic.train_records)
    if not known:
        raise PriceError(
            f"data.sources.{name} has neither cap nor limit, so its number of records is not known yet; set "
            f"data.sources.{name}.cap, or count them first: valr materialize +latent_corpus"
        )
    return min(known)


def counted_corpus(recipe: Recipe, cot_corpus: Path, latent_corpus: Path) -> Corpus | None:
    """The corpus as its own reports count it, or None where one of them is missing or of another version.

    Args:
        recipe: for the share of the text that is trained on, which no report counts.
        cot_corpus, latent_corpus: folders of the artifacts.
    """
    try:
        read, written = (json.loads((one / "report.json").read_text("utf-8")) for one in (cot_corpus, latent_corpus))
        return _counted(recipe, read, written, latent_corpus.name)
    except (FileNotFoundError, KeyError):
        return None


def _counted(recipe: Recipe, read: Mapping[str, Any], written: Mapping[str, Any], name: str) -> Corpus:
    sequences, segments = written["sequences"], written["segments"]
    sources = written["sources"].values()
    text = sum(source["text_tokens_estimated"] for source in read["sources"].values()) / read["records"]
    positions = (written["tokens"] - 2 * segments) / sequences
    return Corpus(
        records=sequences,
        train=sum(source["splits"].get("train", 0) * source["weight"] for source in sources),
        validation=sum(source["splits"].get("validation", 0) for source in sources),
        positions=positions,
        image_positions=max(positions - text, 0.0),
        supervised=min(recipe.price.supervised_share * text, positions),
        images=max(read["images"] / read["records"], 1.0),
        segments=segments / sequences,
        most_segments=written["most_segments"],
        longest=written["longest"],
        aimed=1 - written["segments_without_target"] / segments if segments else 0.0,
        targets=written["targets"],
        test=sum(source["test"]["kept"] for source in read["sources"].values() if source["format"] == "jsonl"),
        origin=f"counted in {name}: {sequences:,} sequences, {written['tokens']:,} tokens",
        counted=True,
    )


def made_corpus(recipe: Recipe, project: Path | None) -> Corpus | None:
    """The project's corpora, if dvc.lock says that they were made from the recipe's data and its model's tokens.

    In the folder of a Job it names digests only, and what is there was sent with the recipe.
    """
    lock = None if project is None else project / "dvc.lock"
    if lock is None or not lock.is_file():
        return None
    made = yaml.load(lock.read_text("utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["stages"]
    wanted = recipe.model_dump(mode="json")
    if any("params" in one for one in made.values()):
        for name, section in (("cot_corpus", "data"), ("base_model", "base")):
            if made.get(name, {}).get("params", {}).get(RECIPE_FILE, {}).get(section) != wanted[section]:
                return None
    return counted_corpus(recipe, lock.parent / "artifacts" / "cot_corpus", lock.parent / "artifacts" / "latent_corpus")


def questions(recipe: Recipe, corpus: Corpus) -> Iterable[tuple[int, float]]:
    """Of every benchmark, how many questions are asked and how many images each shows."""
    for name, benchmark in recipe.evaluation.benchmarks.items():
        layout = benchmark.format or name
        shown = recipe.evaluation.frames if layout == "vsi_bench" else 2.0 if layout == "blink" else 1.0
        yield _at_most(_items(name, layout, benchmark), recipe.evaluation.limit), shown
    if corpus.test:
        yield _at_most(round(corpus.test), recipe.evaluation.limit), 1.0


def _at_most(items: int, limit: int | None) -> int:
    return items if limit is None else min(items, limit)


def _items(name: str, layout: str, benchmark: BenchmarkRecipe) -> int:
    if benchmark.path is None:
        return _at_most(benchmark.drawn, benchmark.limit)
    known = [count for count in (benchmark.limit, PUBLISHED_ITEMS.get(layout)) if count is not None]
    if not known:
        raise PriceError(f"how many questions evaluation.benchmarks.{name} has is not known; set its limit")
    return min(known)
