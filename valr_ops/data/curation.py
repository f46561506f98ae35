"""One checked corpus from all sources: read, reject with reasons, cap, match, split by image, write.

In: the artifact `sources` and the recipe. Out: the shards `records` and `images` (each distinct image once),
`rejects.jsonl`, `overlaps.jsonl`, `report.json`, plots and data docs.
Always: every row read is either in the corpus or a line of the rejects; no image and no scene stands on both sides of
the split, and none of the test splits' or of a benchmark's stands in the corpus; a source that loses too much stops the
run. The sources are gone through twice, first for the digests that decide, then for what stays, so memory holds a few
hundred bytes a record and no text and no pixel.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from valr_ops.data import corpus_report as report
from valr_ops.data import sources
from valr_ops.data.corpus import (
    RECORD_SCHEMA,
    RECORDS_A_BLOCK,
    CorpusRecord,
    ImageStore,
    ImageWriter,
    RecordColumns,
    record_of,
)
from valr_ops.data.corpus_report import OVERLAPS, SourceCount
from valr_ops.data.drafting import Draft, draft, in_turn
from valr_ops.data.drift import corpus_drift
from valr_ops.data.matching import Matcher, open_matcher
from valr_ops.data.records import Rejection, SourceError, Split, Step
from valr_ops.data.screening import Benchmarks, Keys, decide, image_groups, read_benchmarks
from valr_ops.data.shards import ShardWriter
from valr_ops.recipe.recipe import Recipe
from valr_ops.store.artifacts import Check, StageContext, StageReport
from valr_ops.store.objects import is_remote
from valr_ops.store.progress import Progress

_MATCHED_TOGETHER = 64


class CurationError(ValueError):
    """A source that lost too many records, or a corpus without any; names the most frequent reasons."""


@dataclass(frozen=True)
class _Place:
    """Where the bytes of an image stand."""

    spool: Path
    offset: int
    length: int
    width: int
    height: int
    look: bytes | None


@dataclass
class _Rows:
    """All records that the readers yielded, by their place in corpus order, and what was decided about them."""

    drafts: dict[str, list[Draft]]
    keys: Keys = field(default_factory=Keys)
    places: dict[bytes, _Place] = field(default_factory=dict)
    splits: list[Split] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    multi_view: list[int] = field(default_factory=list)
    reasons: list[tuple[str, str] | None] = field(default_factory=list)
    steps: dict[int, tuple[Step, ...]] = field(default_factory=dict)
    """Of the records whose steps were matched to images."""

    def batches(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        """The records in blocks, with the place of each block's first."""
        first = 0
        for drafts in self.drafts.values():
            for _, batch in in_turn(drafts, "kept"):
                yield first, batch
                first += len(batch)

    def reject(self, row: int, reason: str, detail: str) -> None:
        self.reasons[row] = reason, detail

    def stays(self, row: int) -> bool:
        return self.reasons[row] is None and self.splits[row] != "test"

    def look(self, digest: str) -> bytes | None:
        """Perceptual hash of an image."""
        return self.places[bytes.fromhex(digest)].look

    def image(self, digest: str) -> bytes:
        """Encoded bytes."""
        place = self.places[bytes.fromhex(digest)]
        with place.spool.open("rb") as spool:
            spool.seek(place.offset)
            return spool.read(place.length)


def build_cot_corpus(context: StageContext) -> StageReport:
    """Stage `cot_corpus`: see the module.

    Raises:
        SourceError: a source or a benchmark in which there is nothing to read.
        CurationError: a source keeps less than ``data.min_kept_fraction``, or no training record is left.
        MatchingError: the endpoint or the model that matches steps to images can't be used, or costs too much.
    """
    recipe, progress = context.recipe, context.progress
    benchmarks = read_benchmarks(recipe.data)
    scratch = context.work / "drafts"
    shutil.rmtree(scratch, ignore_errors=True)
    rows = _read(context, scratch)
    rows.reasons = decide(rows.keys, recipe.data, benchmarks)
    rejected = _Rejects(context.work / "rejects.jsonl")
    # Before anything is asked of an endpoint, and again after what it answered.
    _refuse_losses(rows, rejected, recipe)
    # Capped first, so that nobody is asked about a record that will not stay.
    _cap(rows, recipe)
    _match(rows, open_matcher(recipe.data.matching, context.cache or context.work, progress.say), progress)
    _refuse_losses(rows, rejected, recipe)
    _split(rows, recipe.data.validation_fraction, recipe.seed)
    first, counts = _write(rows, context.out, progress)
    rejected.count_into(rows, counts)
    for name, count in counts["train"].items():
        progress.say(f"source {name}: kept {count.kept} of {count.read} records")
    if not first:
        rejected.write(rejected.path, rows)
        raise CurationError(
            f"no source has a training record left: {', '.join(rows.drafts)}; add one with train.jsonl or a public "
            f"layout, or see why in {rejected.path}"
        )
    rejected.publish(rows, context.out)
    found = _report(counts, len(ImageStore(context.out)), recipe)
    (context.out / "report.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    report.plot_steps(counts["train"], context.out / "steps.png")
    report.plot_lengths(counts["train"], context.out / "lengths.png")
    report.preview(first, ImageStore(context.out)).save(context.out / "preview.png")
    shutil.rmtree(scratch)
    # Imported here because great_expectations takes seconds to load, and most that can go wrong has gone wrong by now.
    from valr_ops.data.expectations import corpus_expectations

    return StageReport(
        summary={key: value for key, value in found.items() if isinstance(value, int | float)},
        tables={
            "Sources": report.source_table(found["sources"]),
            "Rejected": report.reject_table(counts["train"], counts["test"]),
            "First records": report.record_table(first),
        },
        plots=("preview.png", "steps.png", "lengths.png"),
        checks=(
            corpus_expectations(context.out, recipe),
            corpus_drift(context.out, context.previous, recipe),
            _overlap_check(rows, benchmarks),
        ),
        report="data_docs/index.html",
    )


def _read(context: StageContext, scratch: Path) -> _Rows:
    """Read all sources, and collect what decides."""
    recipe, artifact = context.recipe, context.inputs["sources"]
    readings = [sources.opened(name, recipe, artifact) for name in sorted(recipe.data.sources)]
    drafting = draft(readings, scratch, _source_bytes(recipe, artifact))
    ticks = (tick for rows in drafting for tick in range(rows))
    for _ in context.progress.track(ticks, "reading rows"):
        pass
    rows = _Rows(drafting.drafts)
    for drafts in rows.drafts.values():
        for one in drafts:
            for batch in one.images():
                for digest, *place in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    rows.places.setdefault(bytes.fromhex(digest), _Place(one.spool, *place))
    for first, batch in rows.batches():
        _collect(rows, first, batch)
    return rows


def _source_bytes(recipe: Recipe, artifact: Path) -> int | None:
    """Size of the sources' files by the inventory; None where a part is remote, which a file system can't tell."""
    if any(one.path is not None and is_remote(one.path) for one in recipe.data.sources.values()):
        return None
    inventory = json.loads((artifact / "inventory.json").read_text(encoding="utf-8"))
    return sum(file["size"] for entry in inventory.values() for file in entry["files"].values())


def _collect(rows: _Rows, first: int, batch: pa.RecordBatch) -> None:
    keys, images = rows.keys, batch.column("images")
    digests = pc.struct_field(images.flatten(), "digest").to_pylist()
    numbers = [keys.images.number(one, partial(rows.look, one)) for one in digests]
    ends = (images.offsets.to_numpy() - images.offsets[0].as_py()).tolist()
    splits = batch.column("split").to_pylist()
    names = ("id", "source", "license", "scene", "content", "question_digest", "asked")
    ids, of_source, licenses, scenes, *digest_columns = (batch.column(name).to_pylist() for name in names)
    keys.extend(
        (ids, of_source, [split == "test" for split in splits], licenses, scenes),
        digest_columns,
        [tuple(numbers[start:end]) for start, end in pairwise(ends)],
    )
    rows.splits += splits
    rows.where += batch.column("where").to_pylist()
    kinds = pc.equal(batch.column("kind"), "multi_view").to_numpy(zero_copy_only=False)
    rows.multi_view += (first + np.flatnonzero(kinds)).tolist()


def _match(rows: _Rows, matcher: Matcher, progress: Progress) -> None:
    """Let the matcher say what steps of multi-view records look at, where the data does not."""
    wanted = {row for row in rows.multi_view if rows.stays(row)}

    def needing() -> Iterator[tuple[int, CorpusRecord]]:
        for first, batch in rows.batches():
            here = [row for row in range(first, first + len(batch)) if row in wanted]
            for row, values in zip(here, _taken(batch, first, here).to_pylist(), strict=True):
                record = _corpus_record(values)
                if matcher.needs(record):
                    yield row, record

    number = sum(1 for _ in needing())
    if not number:
        return
    progress.say(f"matching the steps of {number} records to images")
    matcher.estimate(record for _, record in needing())
    coming = progress.track(needing(), "matching", total=number)
    while group := list(islice(coming, _MATCHED_TOGETHER)):
        matched = matcher.match([record for _, record in group], rows.image)
        for (row, _), item in zip(group, matched, strict=True):
            if isinstance(item, Rejection):
                rows.reject(row, item.reason, item.detail)
            else:
                rows.steps[row] = item.steps


def _cap(rows: _Rows, recipe: Recipe) -> None:
    """Leave out what is beyond a source's cap: a shuffle by digest, so that a smaller cap is a part of a larger one."""
    by_source: dict[str, list[int]] = defaultdict(list)
    for row, name in enumerate(rows.keys.sources):
        if rows.stays(row):
            by_source[name].append(row)
    for name, members in by_source.items():
        cap = recipe.data.sources[name].cap
        if cap is not None and len(members) > cap:
            shuffled = sorted(members, key=lambda row: _draw(recipe.seed, rows.keys.ids[row]))
            for row in sorted(shuffled[cap:]):
                rows.reject(row, "over_cap", f"data.sources.{name}.cap={cap}")


def _split(rows: _Rows, fraction: float, seed: int) -> None:
    """Move whole groups of records that share an image or a scene to the validation split; see `validation_rows`."""
    staying = [row for row in range(len(rows.keys)) if rows.stays(row)]
    keys = rows.keys
    roots = image_groups([keys.shown[row] for row in staying], [keys.scenes[row] for row in staying], len(keys.images))
    digests = keys.images.digests
    given = [rows.splits[row] == "validation" for row in staying]
    chosen = validation_rows([digests[root].hex() for root in roots], given, fraction, seed)
    for place, row in enumerate(staying):
        rows.splits[row] = "validation" if place in chosen else "train"


def validation_rows(groups: Sequence[str], given: Sequence[bool], fraction: float, seed: int) -> set[int]:
    """Places of the validation records.

    A group is never torn. Groups are taken in an order that depends on the seed and their names only, until `fraction`
    of the records is reached; a group with a record that came from a validation file is on that side and counts. Where
    every group is larger than that, the smallest one is taken.

    Args:
        groups: name of each record's group.
        given: whether each record came from a validation file.
        fraction: wanted share; at least one record if it is not zero and there are two groups.
        seed: the recipe's.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for place, group in enumerate(groups):
        members[group].append(place)
    chosen = {place for places in members.values() if any(given[place] for place in places) for place in places}
    wanted = max(1, round(fraction * len(groups))) if fraction > 0 and len(members) > 1 else 0
    drawn = sorted(members, key=lambda group: _draw(seed, group))
    for group in drawn:
        if members[group][0] not in chosen and len(chosen) + len(members[group]) <= wanted:
            chosen.update(members[group])
    if wanted and not chosen:
        chosen.update(members[min(drawn, key=lambda group: len(members[group]))])
    return chosen


def _draw(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode()).digest()


Counts = dict[str, dict[str, SourceCount]]
"""Under ``train`` (which includes validation) and ``test``, by source."""


def _write(rows: _Rows, out: Path, progress: Progress) -> tuple[list[CorpusRecord], Counts]:
    """Write the shards; the first records of each source, and what there is of each."""
    counts: Counts = {split: {name: SourceCount() for name in rows.drafts} for split in ("train", "test")}
    first: dict[str, list[CorpusRecord]] = {name: [] for name in rows.drafts}
    with ShardWriter(out, "records", RECORD_SCHEMA) as writer, ImageWriter(out) as images:
        waiting: list[pa.RecordBatch] = []
        for start, batch in progress.track(rows.batches(), "writing blocks"):
            here = range(start, start + len(batch))
            tests = [row for row in here if rows.reasons[row] is None and rows.splits[row] == "test"]
            stay = [row for row in here if rows.stays(row)]
            for split, chosen in (("test", tests), ("train", stay)):
                if chosen:
                    name = rows.keys.sources[chosen[0]]
                    part = _chosen(rows, batch, start, chosen)
                    counts[split][name].keep(part, (rows.keys.shown[row] for row in chosen))
                    if split == "train":
                        waiting.append(part)
                        first[name] += _first(part, report.PREVIEW_RECORDS - len(first[name]))
                        _write_images(rows, part, images)
            waiting = _write_blocks(writer, waiting, RECORDS_A_BLOCK)
        _write_blocks(writer, waiting, 1)
    share = max(1, report.PREVIEW_RECORDS // max(1, sum(map(bool, first.values()))))
    return [record for records in first.values() for record in records[:share]][: report.PREVIEW_RECORDS], counts


def _first(part: pa.RecordBatch, count: int) -> list[CorpusRecord]:
    return [record_of(values) for values in part.slice(0, max(0, count)).to_pylist()]


def _chosen(rows: _Rows, batch: pa.RecordBatch, start: int, chosen: Sequence[int]) -> pa.RecordBatch:
    """Some rows of a block with the columns of `RECORD_SCHEMA`, their final split and their matched steps."""
    part = _taken(batch, start, chosen).select(RECORD_SCHEMA.names)
    splits = pa.array([rows.splits[row] for row in chosen], pa.string())
    part = part.set_column(RECORD_SCHEMA.get_field_index("split"), "split", splits)
    if not any(row in rows.steps for row in chosen):
        return part
    columns = RecordColumns()
    for row, values in zip(chosen, part.to_pylist(), strict=True):
        record = record_of(values)
        columns.add(dataclasses.replace(record, steps=rows.steps.get(row, record.steps)))
    return columns.batch()


def _taken(batch: pa.RecordBatch, first: int, rows: Sequence[int]) -> pa.RecordBatch:
    return batch.take(pa.array([row - first for row in rows], pa.int64()))


def _write_images(rows: _Rows, part: pa.RecordBatch, images: ImageWriter) -> None:
    for digest in pc.struct_field(part.column("images").flatten(), "digest").to_pylist():
        if digest not in images:
            place = rows.places[bytes.fromhex(digest)]
            images.add(digest, place.width, place.height, rows.image(digest))


def _write_blocks(writer: ShardWriter, waiting: list[pa.RecordBatch], least: int) -> list[pa.RecordBatch]:
    """Write full blocks; what is left over."""
    if sum(map(len, waiting)) < least:
        return waiting
    table = pa.Table.from_batches(waiting, schema=RECORD_SCHEMA).combine_chunks()
    full = len(table) if least == 1 else len(table) // least * least
    for at in range(0, full, RECORDS_A_BLOCK):
        writer.write(table.slice(at, min(RECORDS_A_BLOCK, full - at)).combine_chunks().to_batches()[0])
    return table.slice(full).to_batches()


def _corpus_record(values: dict[str, Any]) -> CorpusRecord:
    return record_of({name: values[name] for name in RECORD_SCHEMA.names})


class _Rejects:
    """The file of what was left out: first what a source's reader refused, then what was decided, in row order."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self, rows: _Rows) -> Iterator[dict[str, str]]:
        """Every rejection with its source and split."""
        row = 0
        for name, drafts in rows.drafts.items():
            for _, batch in in_turn(drafts, "rejected"):
                yield from ({**values, "source": name} for values in batch.to_pylist())
            while row < len(rows.keys) and rows.keys.sources[row] == name:
                if (reason := rows.reasons[row]) is not None:
                    id_, split = rows.keys.ids[row], rows.splits[row]
                    detail = f"{rows.where[row]}, {reason[1]}"
                    yield {"id": id_, "source": name, "split": split, "reason": reason[0], "detail": detail}
                row += 1

    def count_into(self, rows: _Rows, counts: Counts) -> None:
        for line in self.lines(rows):
            split = "test" if line["split"] == "test" else "train"
            counts[split][line["source"]].reject(line["reason"], line["detail"])

    def write(self, path: Path, rows: _Rows, reasons: Iterable[str] | None = None) -> None:
        with path.open("w", encoding="utf-8") as file:
            for line in self.lines(rows):
                if reasons is None or line["reason"] in reasons:
                    file.write(json.dumps(line, sort_keys=True) + "\n")

    def publish(self, rows: _Rows, out: Path) -> None:
        self.write(out / "rejects.jsonl", rows)
        self.write(out / "overlaps.jsonl", rows, OVERLAPS)
        self.path.unlink(missing_ok=True)


def _refuse_losses(rows: _Rows, rejected: _Rejects, recipe: Recipe) -> None:
    """Stop where a reader, or what matches steps to images, is probably wrong.

    Raises:
        SourceError: a source without any row. CurationError: one that keeps too little.
    """
    counts: Counts = {split: {name: SourceCount() for name in rows.drafts} for split in ("train", "test")}
    rejected.count_into(rows, counts)
    for row, name in enumerate(rows.keys.sources):
        if rows.reasons[row] is None:
            counts["test" if rows.splits[row] == "test" else "train"][name].kept += 1
    least = recipe.data.min_kept_fraction
    for name in rows.drafts:
        if not counts["train"][name].read and not counts["test"][name].read:
            raise SourceError(f"source {name!r} has no record in any split; correct data.sources.{name}")
        for split in ("train", "test"):
            count = counts[split][name]
            if count.kept < least * (count.read - count.left_by_choice):
                rejected.write(rejected.path, rows)
                reasons = "; ".join(
                    f"{reason} {number} (first: {count.examples[reason]})"
                    for reason, number in count.rejected.most_common(3)
                )
                raise CurationError(
                    f"source {name!r} keeps {count.kept} of {count.read} {split} records, less than "
                    f"data.min_kept_fraction={least}: {reasons}. All rejections are in {rejected.path}; correct the "
                    "source, its format, or what in the recipe rejects them"
                )


def _report(counts: Counts, images: int, recipe: Recipe) -> dict[str, Any]:
    train, tests = counts["train"], counts["test"]
    return {
        "records": sum(count.kept for count in train.values()),
        "train": sum(count.splits["train"] for count in train.values()),
        "validation": sum(count.splits["validation"] for count in train.values()),
        "rejected": sum(count.rejected.total() for count in train.values()),
        "images": images,
        "steps": sum(count.steps for count in train.values()),
        "test": sum(count.kept for count in tests.values()),
        "test_rejected": sum(count.rejected.total() for count in tests.values()),
        "sources": {
            name: {"format": recipe.data.sources[name].format, **count.in_full(), "test": tests[name].as_json()}
            for name, count in train.items()
        },
    }


def _overlap_check(rows: _Rows, benchmarks: Benchmarks) -> Check:
    """That nothing of a benchmark or a test split is left, looked up anew among what stays; lists what was excluded."""
    keys = rows.keys
    forbidden = {number for row, test in enumerate(keys.tests) if test for number in keys.shown[row]}
    digests = keys.images.digests
    left = [
        keys.ids[row]
        for row in range(len(keys))
        if rows.stays(row)
        and (
            not forbidden.isdisjoint(keys.shown[row])
            or any(digests[number] in benchmarks.images for number in keys.shown[row])
            or keys.scenes[row] in benchmarks.scenes
        )
    ]
    excluded = [
        (keys.ids[row], reason[0], reason[1])
        for row, reason in enumerate(rows.reasons)
        if reason is not None and reason[0] in OVERLAPS
    ]
    return Check(
        name="no_benchmark_overlap",
        passed=not left,
        detail=f"{len(left)} records show what a benchmark shows, first {left[0]}; exclude them"
        if left
        else f"no record shows an image or a scene of a test split or a benchmark; {len(excluded)} were excluded",
        metadata={"excluded": len(excluded), "first_excluded": excluded[:20], "left": left[:20]},
    )
