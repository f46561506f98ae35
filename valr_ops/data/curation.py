"""One checked corpus from all sources: read, reject with reasons, remove duplicates, split by image, write.

In: the artifact `sources` and the recipe. Out: `records.parquet`, `images.parquet` (each distinct image once),
`rejects.jsonl`, `report.json`, plots and data docs.
Always: every record read is either in the corpus or a line of the rejects; no image stands on both sides of the
split, and none of the test split's stands in the corpus; a source that loses too much stops the run. Memory holds
texts, never pixels: image bytes go through a scratch file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import html
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import PIL.Image
import PIL.ImageDraw
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from valr_ops.data import sources
from valr_ops.data.corpus import CorpusRecord, ImageSpool, ImageStore, without_bytes, write_records
from valr_ops.data.expectations import corpus_expectations
from valr_ops.data.records import REASONS, Record, Rejection, SourceError, Split
from valr_ops.recipe.recipe import Recipe
from valr_ops.store.artifacts import StageContext, StageReport

_DUPLICATES = ("duplicate_id", "duplicate_content")
_PREVIEW_RECORDS = 6


class CurationError(ValueError):
    """A source that lost too many records, or a corpus without any; names the most frequent reasons."""


@dataclass
class _Count:
    """What became of the records of one source, in one split."""

    read: int = 0
    kept: int = 0
    steps: int = 0
    images: set[str] = field(default_factory=set)
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, item: Record | Rejection) -> None:
        self.read += 1
        if isinstance(item, Rejection):
            self.rejected[item.reason] += 1
            self.examples.setdefault(item.reason, item.detail)
        else:
            self.kept += 1
            self.steps += len(item.steps)
            self.images |= {image.digest for image in item.images}

    def as_json(self) -> dict[str, Any]:
        return {
            "read": self.read,
            "kept": self.kept,
            "rejected": dict(sorted(self.rejected.items())),
            "duplicates": sum(self.rejected[reason] for reason in _DUPLICATES),
            "images": len(self.images),
            "steps": self.steps,
        }


def build_cot_corpus(context: StageContext) -> StageReport:
    """Stage `cot_corpus`: see the module.

    Raises:
        SourceError: a source in which there is nothing to read.
        CurationError: a source keeps less than ``data.min_kept_fraction``, or no training record is left.
    """
    recipe = context.recipe
    artifact = context.inputs["sources"]
    tests: dict[str, _Count] = {}
    counts: dict[str, _Count] = {}
    rejections: list[tuple[Split, Rejection]] = []
    kept: list[CorpusRecord] = []
    spool = ImageSpool(context.work / "images.spool")

    screen = sources.Screen()
    for split in sources.SPLITS:
        for name in sorted(recipe.data.sources):
            count = (tests if split == "test" else counts).setdefault(name, _Count())
            items = map(screen.check, sources.read_source(name, recipe, artifact, split))
            for item in context.progress.track(items, f"reading {name}, {split}"):
                count.add(item)
                if isinstance(item, Rejection):
                    rejections.append((split, item))
                elif split != "test":
                    spool.add(item.images)
                    kept.append(without_bytes(item))
    for name, count in counts.items():
        context.progress.say(f"source {name}: kept {count.kept} of {count.read} records")

    _write_rejects(context.work / "rejects.jsonl", rejections)
    _refuse_losses(counts, tests, recipe, context.work / "rejects.jsonl")
    (context.work / "rejects.jsonl").unlink()

    records = split_by_image(kept, recipe.data.validation_fraction, recipe.seed)
    write_records(context.out / "records.parquet", records)
    spool.write_parquet(context.out / "images.parquet")
    _write_rejects(context.out / "rejects.jsonl", rejections)
    report = _report(records, counts, tests, len(spool), recipe)
    (context.out / "report.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    _plot_steps(records, context.out / "steps.png")
    _plot_lengths(records, context.out / "lengths.png")
    _preview(records, ImageStore(context.out)).save(context.out / "preview.png")
    return StageReport(
        summary={key: value for key, value in report.items() if isinstance(value, int | float)},
        tables={
            "Sources": _source_table(report["sources"]),
            "Rejected": _reject_table(counts, tests),
            "First records": _record_table(records),
        },
        plots=("preview.png", "steps.png", "lengths.png"),
        checks=(corpus_expectations(context.out, recipe),),
        report="data_docs/index.html",
    )


def split_by_image(records: Sequence[CorpusRecord], fraction: float, seed: int) -> list[CorpusRecord]:
    """The records with `split` set to train or validation, in their order.

    Records that share an image, directly or through others, form a group, and a group is never torn. Groups are taken
    in an order that depends on the seed and their images only, until `fraction` of the records is reached; records
    that came from a validation file count towards it.

    Args:
        records: of the splits train and validation.
        fraction: wanted share of validation records; at least one record if it is not zero and there are two groups.
        seed: the recipe's.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, root in enumerate(_image_groups(records)):
        groups[root].append(index)
    validation = {
        index
        for members in groups.values()
        if any(records[index].split == "validation" for index in members)
        for index in members
    }
    wanted = max(1, round(fraction * len(records))) if fraction > 0 and len(groups) > 1 else 0
    for root in sorted(groups, key=lambda root: hashlib.sha256(f"{seed} {root}".encode()).digest()):
        members = groups[root]
        if members[0] not in validation and len(validation) + len(members) <= wanted:
            validation.update(members)
    return [
        dataclasses.replace(record, split="validation" if index in validation else "train")
        for index, record in enumerate(records)
    ]


def _image_groups(records: Sequence[CorpusRecord]) -> Iterator[str]:
    """For each record the smallest digest of its group, by union-find over the images."""
    parent: dict[str, str] = {}

    def root(digest: str) -> str:
        while parent.setdefault(digest, digest) != digest:
            parent[digest] = parent[parent[digest]]
            digest = parent[digest]
        return digest

    for record in records:
        first, *others = sorted({root(image.digest) for image in record.images})
        for other in others:
            parent[other] = first
    return (root(record.images[0].digest) for record in records)


def _refuse_losses(counts: dict[str, _Count], tests: dict[str, _Count], recipe: Recipe, rejects: Path) -> None:
    least = recipe.data.min_kept_fraction
    for name in counts:
        if not counts[name].read and not tests[name].read:
            raise SourceError(f"source {name!r} has no record in any split; correct data.sources.{name}")
        for split, count in (("train", counts[name]), ("test", tests[name])):
            if count.read and count.kept < least * count.read:
                reasons = "; ".join(
                    f"{reason} {number} (first: {count.examples[reason]})"
                    for reason, number in count.rejected.most_common(3)
                )
                raise CurationError(
                    f"source {name!r} keeps {count.kept} of {count.read} {split} records, less than "
                    f"data.min_kept_fraction={least}: {reasons}. All rejections are in {rejects}; correct the source, "
                    "its format, or the bound that rejects them"
                )
    if not any(count.kept for count in counts.values()):
        raise CurationError(
            f"no source has a training record: {', '.join(counts)}; add one with train.jsonl or a public layout"
        )


def _write_rejects(path: Path, rejections: Iterable[tuple[Split, Rejection]]) -> None:
    with path.open("w") as file:
        for split, rejection in rejections:
            file.write(json.dumps({**vars(rejection), "split": split}, sort_keys=True) + "\n")


def _report(
    records: Sequence[CorpusRecord], counts: dict[str, _Count], tests: dict[str, _Count], images: int, recipe: Recipe
) -> dict[str, Any]:
    by_source: dict[str, Any] = {}
    for name, count in counts.items():
        own = [record for record in records if record.source == name]
        by_source[name] = {
            "format": recipe.data.sources[name].format,
            **count.as_json(),
            "splits": dict(sorted(Counter(record.split for record in own).items())),
            "kinds": dict(sorted(Counter(record.kind for record in own).items())),
            "licenses": dict(sorted(Counter(record.license for record in own).items())),
            "steps_per_record": {
                str(steps): number for steps, number in sorted(Counter(len(record.steps) for record in own).items())
            },
            "targets_among_inputs": sum(
                record.images[step.target.image].role == "input"
                for record in own
                for step in record.steps
                if step.target is not None
            ),
            "test": tests[name].as_json(),
        }
    splits = Counter(record.split for record in records)
    return {
        "records": len(records),
        "train": splits["train"],
        "validation": splits["validation"],
        "rejected": sum(count.rejected.total() for count in counts.values()),
        "images": images,
        "steps": sum(len(record.steps) for record in records),
        "test": sum(count.kept for count in tests.values()),
        "test_rejected": sum(count.rejected.total() for count in tests.values()),
        "sources": by_source,
    }


def _source_table(by_source: dict[str, Any]) -> str:
    lines = [
        "| source | format | read | kept | rejected | train | validation | images | steps | test kept | licences |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, row in by_source.items():
        splits = row["splits"]
        lines.append(
            f"| {_cell(name)} | {row['format']} | {row['read']} | {row['kept']} | {row['read'] - row['kept']} "
            f"| {splits.get('train', 0)} | {splits.get('validation', 0)} | {row['images']} | {row['steps']} "
            f"| {row['test']['kept']} of {row['test']['read']} | {_cell(', '.join(row['licenses']))} |"
        )
    return "\n".join(lines)


def _reject_table(counts: dict[str, _Count], tests: dict[str, _Count]) -> str:
    lines = ["| source | split | reason | records | rule | first |", "| --- | --- | --- | ---: | --- | --- |"]
    for split, by_source in (("train", counts), ("test", tests)):
        for name, count in by_source.items():
            for reason, number in sorted(count.rejected.items()):
                cells = (_cell(name), split, reason, str(number), REASONS[reason], _cell(count.examples[reason]))
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else "No record was rejected."


def _record_table(records: Sequence[CorpusRecord]) -> str:
    lines = ["| id | question | steps | answer |", "| --- | --- | --- | --- |"]
    for record in _first_of_each_source(records):
        steps = "<br>".join(_cell(step.text) for step in record.steps[:4])
        lines.append(f"| {_cell(record.id)} | {_cell(record.question)} | {steps} | {_cell(record.answer)} |")
    return "\n".join(lines)


def _first_of_each_source(records: Sequence[CorpusRecord]) -> list[CorpusRecord]:
    """A few records, as many of each source as fit, in corpus order."""
    names = dict.fromkeys(record.source for record in records)
    share = max(1, _PREVIEW_RECORDS // len(names))
    shown = [record for name in names for record in [one for one in records if one.source == name][:share]]
    return shown[:_PREVIEW_RECORDS]


def _cell(text: str, limit: int = 160) -> str:
    """Text of a record inside a Markdown table: no markup of its own gets through."""
    cut = text if len(text) <= limit else f"{text[: limit - 1]}…"
    return html.escape(" ".join(cut.split()), quote=False).replace("|", "&#124;").replace("`", "&#96;")


def _colours(names: Iterable[str]) -> dict[str, Any]:
    palette = matplotlib.colormaps["tab10"]
    return {name: palette(number % 10) for number, name in enumerate(names)}


def _plot_steps(records: Sequence[CorpusRecord], path: Path) -> None:
    """Records by number of steps, sources stacked."""
    names = sorted({record.source for record in records})
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    bottom: Counter[int] = Counter()
    colours = _colours(names)
    for name in names:
        numbers = Counter(len(record.steps) for record in records if record.source == name)
        steps = sorted(numbers)
        axes.bar(steps, [numbers[n] for n in steps], bottom=[bottom[n] for n in steps], label=name, color=colours[name])
        bottom.update(numbers)
    axes.set(xlabel="reasoning steps", ylabel="records")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _plot_lengths(records: Sequence[CorpusRecord], path: Path) -> None:
    """Lengths of question, reasoning and answer in characters, sources stacked."""
    names = sorted({record.source for record in records})
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    parts = {
        "question": lambda record: len(record.question),
        "reasoning": lambda record: sum(len(step.text) for step in record.steps),
        "answer": lambda record: len(record.answer),
    }
    colours = _colours(names)
    for axes, (part, length) in zip(figure.subplots(1, len(parts)), parts.items(), strict=True):
        axes.hist(
            [[length(record) for record in records if record.source == name] for name in names],
            bins=20,
            stacked=True,
            label=names,
            color=[colours[name] for name in names],
        )
        axes.set(xlabel=f"{part}, characters", ylabel="records")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _preview(records: Sequence[CorpusRecord], images: ImageStore, side: int = 192, gap: int = 6) -> PIL.Image.Image:
    """The first records' first input image, with the regions that their steps look at outlined."""
    shown = _first_of_each_source(records)
    sheet = PIL.Image.new("RGB", (gap + len(shown) * (side + gap), side + 2 * gap), "white")
    for place, record in enumerate(shown):
        index = next(number for number, image in enumerate(record.images) if image.role == "input")
        picture = images.load(record.images[index].digest)
        scale = side / max(picture.size)
        tile = picture.resize([max(1, round(length * scale)) for length in picture.size], PIL.Image.Resampling.NEAREST)
        draw = PIL.ImageDraw.Draw(tile)
        for step in record.steps:
            if step.target is not None and step.target.image == index and step.target.box is not None:
                x0, y0, x1, y1 = (round(value * scale) for value in step.target.box)
                draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=(230, 0, 160), width=2)
        sheet.paste(tile, (gap + place * (side + gap), gap))
    return sheet
