"""What the report of a corpus says: counts by source, tables, histograms and a picture of the first records.

In: Arrow batches of the records that stay, and every rejection, as curation goes through them. Out: JSON values,
Markdown tables and PNG files.
Always: memory holds counts only; texts of records appear escaped; no clock and no path.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
import PIL.ImageDraw
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from valr_ops.data.corpus import CorpusRecord, ImageStore
from valr_ops.data.records import CHOICES, REASONS

DUPLICATES = ("duplicate_id", "duplicate_content", "near_duplicate")
OVERLAPS = ("benchmark_image", "benchmark_question", "benchmark_scene")
PREVIEW_RECORDS = 8

_BYTES_A_TOKEN = 4
_PARTS = ("question", "reasoning", "answer")
_LENGTH_EDGES = np.unique(np.geomspace(1, 100_000, 41).round().astype(int))
"""Characters; the histograms' bins."""


@dataclass
class SourceCount:
    """What became of the rows of one source, those of the test split or the others."""

    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """The first detail of each reason."""
    steps: int = 0
    images: set[int] = field(default_factory=set)
    """Numbers of the images shown."""
    text_bytes: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    licenses: Counter[str] = field(default_factory=Counter)
    origins: Counter[str] = field(default_factory=Counter)
    """Of the steps' targets, ``matched by ...`` where somebody matched them; steps without one are ``none``."""
    inputs: int = 0
    """Targets that are an input image."""
    steps_per_record: Counter[int] = field(default_factory=Counter)
    lengths: dict[str, np.ndarray] = field(
        default_factory=lambda: {part: np.zeros(len(_LENGTH_EDGES) + 1, dtype=np.int64) for part in _PARTS}
    )
    """Histogram of characters of each part, by `_LENGTH_EDGES`."""

    @property
    def read(self) -> int:
        """All rows."""
        return self.kept + self.rejected.total()

    @property
    def left_by_choice(self) -> int:
        """Rows that the recipe did not want, and that say nothing about the reader."""
        return sum(self.rejected[reason] for reason in CHOICES)

    def reject(self, reason: str, detail: str) -> None:
        """One more row that is left out."""
        self.rejected[reason] += 1
        self.examples.setdefault(reason, detail)

    def keep(self, batch: pa.RecordBatch, shown: Iterable[Iterable[int]]) -> None:
        """More rows that stay: a batch with the columns of `RECORD_SCHEMA`, and the numbers of their images."""
        self.kept += len(batch)
        for numbers in shown:
            self.images.update(numbers)
        for name, counter in (("split", self.splits), ("kind", self.kinds), ("license", self.licenses)):
            for entry in pc.value_counts(batch.column(name)).to_pylist():
                counter[entry["values"]] += entry["counts"]
        steps = batch.column("steps")
        per_record = pc.list_value_length(steps).to_numpy(zero_copy_only=False)
        self.steps += int(per_record.sum())
        for number, times in zip(*np.unique(per_record, return_counts=True), strict=True):
            self.steps_per_record[int(number)] += int(times)
        self._count_lengths(batch, per_record)
        self._count_targets(batch)

    def _count_lengths(self, batch: pa.RecordBatch, per_record: np.ndarray) -> None:
        texts = pc.struct_field(pc.list_flatten(batch.column("steps")), "text")
        of_steps = pc.utf8_length(texts).to_numpy(zero_copy_only=False)
        owners = np.repeat(np.arange(len(batch)), per_record)
        lengths = {
            "question": pc.utf8_length(batch.column("question")).to_numpy(zero_copy_only=False),
            "reasoning": np.bincount(owners, weights=of_steps, minlength=len(batch)),
            "answer": pc.utf8_length(batch.column("answer")).to_numpy(zero_copy_only=False),
        }
        for part, values in lengths.items():
            bins = np.digitize(values, _LENGTH_EDGES)
            self.lengths[part] += np.bincount(bins, minlength=len(_LENGTH_EDGES) + 1)
        for column in (batch.column("question"), texts, batch.column("answer")):
            self.text_bytes += pc.sum(pc.binary_length(column)).as_py() or 0

    def _count_targets(self, batch: pa.RecordBatch) -> None:
        steps = pc.list_flatten(batch.column("steps"))
        origins, matchers, images = (pc.struct_field(steps, name) for name in ("origin", "by", "image"))
        named = pc.fill_null(pc.if_else(pc.equal(origins, "matched"), matchers, origins), "none")
        for entry in pc.value_counts(named).to_pylist():
            self.origins[entry["values"]] += entry["counts"]
        owners = pc.list_parent_indices(batch.column("steps")).to_numpy(zero_copy_only=False)
        image_starts = batch.column("images").offsets.to_numpy()[:-1] - batch.column("images").offsets[0].as_py()
        has_target = images.is_valid().to_numpy(zero_copy_only=False)
        places = (image_starts[owners] + pc.fill_null(images, 0).to_numpy(zero_copy_only=False))[has_target]
        roles = pc.struct_field(pc.list_flatten(batch.column("images")), "role")
        self.inputs += int((roles.to_numpy(zero_copy_only=False)[places] == "input").sum())

    def as_json(self) -> dict[str, Any]:
        """Counts that every split has."""
        return {
            "read": self.read,
            "kept": self.kept,
            "rejected": dict(sorted(self.rejected.items())),
            "duplicates": sum(self.rejected[reason] for reason in DUPLICATES),
            "overlaps": sum(self.rejected[reason] for reason in OVERLAPS),
            "images": len(self.images),
            "steps": self.steps,
        }

    def in_full(self) -> dict[str, Any]:
        """Everything but the histograms of lengths."""
        return {
            **self.as_json(),
            "splits": dict(sorted(self.splits.items())),
            "kinds": dict(sorted(self.kinds.items())),
            "licenses": dict(sorted(self.licenses.items())),
            "targets": dict(sorted(self.origins.items())),
            "targets_among_inputs": self.inputs,
            "steps_per_record": {str(steps): number for steps, number in sorted(self.steps_per_record.items())},
            # The tokenizer is made later and for scale tiny from this corpus: latent_corpus counts tokens exactly.
            "text_tokens_estimated": self.text_bytes // _BYTES_A_TOKEN,
        }


def source_table(by_source: Mapping[str, Any]) -> str:
    """One line a source, from ``report["sources"]``."""
    lines = [
        "| source | format | read | kept | rejected | duplicates | overlaps | by choice | train | validation | images "
        "| steps | text tokens, about | test kept | licences |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, row in by_source.items():
        splits = row["splits"]
        chosen = sum(row["rejected"].get(reason, 0) for reason in CHOICES)
        lines.append(
            f"| {cell(name)} | {row['format']} | {row['read']} | {row['kept']} | {row['read'] - row['kept']} "
            f"| {row['duplicates']} | {row['overlaps']} | {chosen} "
            f"| {splits.get('train', 0)} | {splits.get('validation', 0)} | {row['images']} | {row['steps']} "
            f"| {row['text_tokens_estimated']} | {row['test']['kept']} of {row['test']['read']} "
            f"| {cell(', '.join(row['licenses']))} |"
        )
    return "\n".join(lines)


def reject_table(counts: Mapping[str, SourceCount], tests: Mapping[str, SourceCount]) -> str:
    """One line for each source, split and reason, with the rule and the first example."""
    lines = ["| source | split | reason | records | rule | first |", "| --- | --- | --- | ---: | --- | --- |"]
    for split, by_source in (("train", counts), ("test", tests)):
        for name, count in by_source.items():
            for reason, number in sorted(count.rejected.items()):
                cells = (cell(name), split, reason, str(number), REASONS[reason], cell(count.examples[reason]))
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else "No record was rejected."


def record_table(records: Sequence[CorpusRecord]) -> str:
    """The first records, texts cut."""
    lines = ["| id | question | steps | answer |", "| --- | --- | --- | --- |"]
    for record in records:
        steps = "<br>".join(cell(step.text) for step in record.steps[:4])
        lines.append(f"| {cell(record.id)} | {cell(record.question)} | {steps} | {cell(record.answer)} |")
    return "\n".join(lines)


def cell(text: str, limit: int = 160) -> str:
    """Text of a record inside a Markdown table: no markup of its own gets through."""
    cut = text if len(text) <= limit else f"{text[: limit - 1]}…"
    return html.escape(" ".join(cut.split()), quote=False).replace("|", "&#124;").replace("`", "&#96;")


def _colours(names: Iterable[str]) -> dict[str, Any]:
    palette = matplotlib.colormaps["tab10"]
    return {name: palette(number % 10) for number, name in enumerate(names)}


def plot_steps(counts: Mapping[str, SourceCount], path: Path) -> None:
    """Records by number of steps, sources stacked."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    bottom: Counter[int] = Counter()
    colours = _colours(sorted(counts))
    for name in sorted(counts):
        numbers = counts[name].steps_per_record
        steps = sorted(numbers)
        axes.bar(steps, [numbers[n] for n in steps], bottom=[bottom[n] for n in steps], label=name, color=colours[name])
        bottom.update(numbers)
    axes.set(xlabel="reasoning steps", ylabel="records")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def plot_lengths(counts: Mapping[str, SourceCount], path: Path) -> None:
    """Lengths of question, reasoning and answer in characters, sources stacked."""
    names = sorted(counts)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    colours = _colours(names)
    edges = np.r_[0.7, _LENGTH_EDGES, _LENGTH_EDGES[-1] * 1.3]
    for axes, part in zip(figure.subplots(1, len(_PARTS)), _PARTS, strict=True):
        bottom = np.zeros(len(edges) - 1)
        for name in names:
            heights = counts[name].lengths[part]
            axes.bar(edges[:-1], heights, np.diff(edges), bottom, align="edge", label=name, color=colours[name])
            bottom += heights
        filled = np.flatnonzero(bottom)
        axes.set(xlabel=f"{part}, characters", ylabel="records", xscale="log")
        axes.set_xlim(edges[filled[0]], edges[filled[-1] + 1])
        ticks = edges[[filled[0], (filled[0] + filled[-1] + 1) // 2, filled[-1] + 1]]
        axes.minorticks_off()
        axes.set_xticks(ticks, labels=[f"{tick:,.0f}" for tick in ticks])
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper center", ncols=min(4, len(names)), frameon=False
    )
    figure.savefig(path, dpi=110, metadata={"Software": None})


def preview(records: Sequence[CorpusRecord], images: ImageStore, side: int = 192, gap: int = 6) -> PIL.Image.Image:
    """The first records' first input image, with the regions that their steps look at outlined."""
    sheet = PIL.Image.new("RGB", (gap + len(records) * (side + gap), side + 2 * gap), "white")
    for place, record in enumerate(records):
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
