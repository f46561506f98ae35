"""One record's whole journey, from its raw file to training tensors: the verb ``trace``.

In: a record's id and the artifacts as they are. Out: the raw row, what the reader made of it, the record of the corpus,
its latent sequence and the tensors of both stages, on the screen, and its images with their targets drawn.
Always: every station is made or read by the code that training uses, none is described from memory; the journey ends
where the record was rejected or where an artifact is missing, and says so; nothing in the artifacts is changed.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import heapq
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any, Literal

import PIL.Image
import pyarrow.compute as pc
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from valr_ops.data import sources
from valr_ops.data.batching import IGNORED, Batch, BatchingError, Collator
from valr_ops.data.corpus import CorpusError, CorpusRecord, ImageStore, Records, record_of
from valr_ops.data.records import BadRecord, Box, Record, Rejection, SourceError
from valr_ops.data.rewriting import IMAGE_PAD, LATENT, LATENT_END, load_processor
from valr_ops.data.sequences import Sequence as LatentSequence
from valr_ops.data.sequences import Sequences
from valr_ops.data.shards import ShardError
from valr_ops.data.showing import describe, shown_text, target_in_words, write_pictures
from valr_ops.data.sources.reading import Reading, Row
from valr_ops.model.qwen import rope_positions
from valr_ops.recipe.recipe import Recipe
from valr_ops.store.artifacts import folder
from valr_ops.teachers.stored import FeatureError, FeatureStore, read_index
from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

from transformers import (  # noqa: E402
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

Station = Literal["rejected", "corpus", "sequence", "tensors"]
"""How far a record came."""

_TEXT_CHARACTERS = 240
_JSON_COLUMNS = 88
_LIST_ENTRIES = 12
_NEAREST = 5
_COMPARED_IDS = 2000
_TABLED_SEGMENTS = 8
_TOKENS_AROUND = 2
# What would move the cursor, reorder the line or not be encodable.
_UNPRINTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class TraceError(ValueError):
    """A record that is nowhere, or artifacts that are not there: what to type instead."""


@dataclass
class Journey:
    """What was found of one record."""

    id: str
    record: CorpusRecord | None
    rejections: list[dict[str, str]]
    """Lines of the rejects files with this id; `stage` says whose."""
    reached: Station = "rejected"
    files: list[Path] = field(default_factory=list)
    """Pictures that were written."""
    numbers: dict[str, int] = field(default_factory=dict)
    """Segments, lengths and supervised positions, for the closing line."""

    @property
    def source(self) -> str:
        """The source that it came from."""
        return self.record.source if self.record is not None else self.rejections[0]["source"]


def trace_and_show(
    identity: str, root: Path, recipe: Recipe, out: Path | None, last_line: Callable[..., None]
) -> Journey:
    """The verb ``trace``: print all stations of one record and write its pictures.

    Args:
        identity: of the record, as in the corpus or a rejects file.
        root: the project.
        recipe: the one that the artifacts were made with.
        out: folder for the pictures; None for ``.valr/trace/<id>`` in the project.
        last_line: prints the closing line of JSON.

    Raises:
        TraceError: no such record.
        ShardError: a damaged corpus.
    """
    corpus = folder(root, "cot_corpus")
    journey = Journey(identity, _in_corpus(corpus, identity), [*_rejections(root, recipe, identity)])
    if journey.record is None and not journey.rejections:
        nearest = _nearest(identity, _ids(root, recipe))
        last_line(id=identity, reached=None, nearest=nearest, files=[])
        raise TraceError(_unknown(identity, nearest, recipe))
    console = Console(highlight=False, emoji=False)
    _show_raw(console, journey, recipe, root)
    _heading(console, "3  In the corpus")
    for rejection in journey.rejections:
        _show_rejection(console, rejection, journey.record is not None)
    if (record := journey.record) is not None:
        journey.reached = "corpus"
        grid = describe(record, digests=True)
        grid.add_row("read from", Text(record.where))
        console.print(grid)
        sequence = _show_sequence(console, journey, record, recipe, root)
        _draw(console, journey, record, sequence, recipe, ImageStore(corpus), out or _picture_folder(root, identity))
    last_line(
        id=identity,
        reached=journey.reached,
        rejected=[f"{one['stage']}: {one['reason']}" for one in journey.rejections],
        **journey.numbers,
        files=[str(file) for file in journey.files],
    )
    return journey


def require_corpus(root: Path) -> None:
    """Raises `TraceError` where the corpus has not been made yet."""
    if not (folder(root, "cot_corpus") / "manifest.json").is_file():
        raise TraceError(
            "artifacts/cot_corpus is not there; make it and what follows with `valr materialize +latent_corpus`. "
            "To look at files before anything is made: `valr check-data FOLDER_OR_JSONL`"
        )


# ------------------------------------------------------------------------------------------------- finding the record


def _in_corpus(corpus: Path, identity: str) -> CorpusRecord | None:
    for batch in Records(corpus).batches():
        place = pc.index(batch.column("id"), identity).as_py()
        if place >= 0:
            return record_of(batch.slice(place, 1).to_pylist()[0])
    return None


def _rejections(root: Path, recipe: Recipe, identity: str) -> Iterator[dict[str, str]]:
    """Lines with this id of the rejects files, in the order of the stages."""
    # Teachers' files have letters beyond ASCII as they are, the others escaped.
    sought = [f'"id": {json.dumps(identity, ensure_ascii=escaped)}' for escaped in (True, False)]
    for stage, path in _rejects_files(root, recipe):
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if any(one in line for one in sought) and (found := json.loads(line))["id"] == identity:
                    yield {**found, "stage": stage}


def _rejects_files(root: Path, recipe: Recipe) -> Iterator[tuple[str, Path]]:
    teachers = (f"teacher_features_{teacher}" for teacher in recipe.alignment.teachers)
    for stage in ("cot_corpus", "latent_corpus", *teachers):
        if (path := folder(root, stage) / "rejects.jsonl").is_file():
            yield stage, path


def _ids(root: Path, recipe: Recipe) -> Iterator[str]:
    for batch in Records(folder(root, "cot_corpus")).batches():
        yield from batch.column("id").to_pylist()
    for _, path in _rejects_files(root, recipe):
        with path.open(encoding="utf-8") as lines:
            yield from (json.loads(line)["id"] for line in lines)


def _nearest(identity: str, ids: Iterable[str]) -> list[str]:
    """Ids that were probably meant: those that end in it, then those that are written alike."""

    def shared(other: str) -> int:
        # Comparing with all of half a million as difflib does would take half a minute.
        return _same_letters(identity, other) + _same_letters(reversed(identity), reversed(other))

    closest = heapq.nlargest(_COMPARED_IDS, ids, key=shared)
    ending = [one for one in closest if one.endswith(f"/{identity}")]
    alike = difflib.get_close_matches(identity, closest, n=_NEAREST, cutoff=0.5)
    return list(dict.fromkeys([*ending, *alike]))[:_NEAREST]


def _same_letters(one: Iterable[str], other: Iterable[str]) -> int:
    """Number of letters before the first difference."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _unknown(identity: str, nearest: Sequence[str], recipe: Recipe) -> str:
    known = ", ".join(recipe.data.sources)
    meant = f"did you mean {', '.join(map(repr, nearest))}? " if nearest else ""
    return (
        f"there is no record {identity!r} in the corpus or among the rejects; {meant}"
        f"Ids begin with the source's name ({known}); records of a test split are not in the corpus. All rejected ids "
        "are in artifacts/cot_corpus/rejects.jsonl and artifacts/latent_corpus/rejects.jsonl"
    )


# ------------------------------------------------------------------------------------------ the raw row and its reader


def _show_raw(console: Console, journey: Journey, recipe: Recipe, root: Path) -> None:
    _heading(console, "1  The raw row")
    try:
        reading = sources.opened(journey.source, recipe, folder(root, "sources"))
        row = _row_again(journey, reading)
    except SourceError as error:
        console.print(Text(f"can't be read again: {error}", style="red"))
        return
    if row is None:
        console.print(Text("is not in the source any more: it has changed since the corpus was made", style="red"))
        return
    settings = reading.settings
    console.print(Text(f"{journey.source} · format {settings.format} · {reading.files.location}"), soft_wrap=True)
    console.print(Text(row.where, style="bold"))
    try:
        raw = row.load()
    except BadRecord as bad:
        console.print(Text("its bytes are no element of this format, see below", style="dim"))
        item: Record | Rejection = Rejection(journey.id, journey.source, bad.reason, f"{row.where}, {bad.detail}")
    else:
        console.print(Text(_raw_in_words(raw)))
        item = sources.item_of(_loaded(row, raw), sources.FORMATS[settings.format], reading)
    _heading(console, "2  What the reader makes of it")
    if isinstance(item, Rejection):
        console.print(Text.assemble((item.reason, "bold yellow"), f": {item.detail}"))
    elif journey.record is None:
        console.print(describe(item))
    else:
        console.print(Text(_compared(item, journey.record)))


def _row_again(journey: Journey, reading: Reading) -> Row | None:
    """The row that the record or its first rejection came from, ready to be loaded; no other one is decoded."""
    form = sources.FORMATS[reading.settings.format]
    where = journey.record.where if journey.record is not None else None
    for row in form.rows(reading, lambda _: False):
        if row.where == where or (where is None and journey.rejections[0]["detail"].startswith(f"{row.where}, ")):
            number = row.number
            rows = form.rows(reading, number.__eq__)
            return _kept_open(next(row for row in rows if row.number == number), rows)
    return None


def _kept_open(row: Row, rows: Iterator[Row]) -> Row:
    """A row can be loaded as long as the iterator that it came from is alive."""

    def load() -> Any:
        assert rows
        return row.load()

    return dataclasses.replace(row, load=load)


def _loaded(row: Row, raw: Any) -> Row:
    return dataclasses.replace(row, load=lambda: raw)


def _raw_in_words(raw: object) -> str:
    """The element as it is stored, as JSON: long texts, lists and bytes shortened, what fits a line on one."""
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", "\n".join(_json_lines(_shorter(raw), "")))


def _json_lines(value: Any, indent: str) -> Iterator[str]:
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or len(indent) + len(line) <= _JSON_COLUMNS:
        yield line
        return
    entries = value.items() if isinstance(value, dict) else ((None, one) for one in value)
    yield "{" if isinstance(value, dict) else "["
    for place, (key, entry) in enumerate(entries, start=1):
        name = "" if key is None else f"{json.dumps(key, ensure_ascii=False)}: "
        first, *rest = _json_lines(entry, f"{indent}  ")
        lines = [f"{indent}  {name}{first}", *rest]
        lines[-1] += "," if place < len(value) else ""
        yield from lines
    yield f"{indent}{'}' if isinstance(value, dict) else ']'}"


def _shorter(value: Any) -> Any:
    if isinstance(value, str):
        beyond = len(value) - _TEXT_CHARACTERS
        return f"{value[:_TEXT_CHARACTERS]}… ({beyond} characters more)" if beyond > 0 else value
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value):,} bytes, {bytes(value[:8])!r}>"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: _shorter(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _shorter(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        rest = [f"… {len(value) - _LIST_ENTRIES} more"] if len(value) > _LIST_ENTRIES else []
        return [*map(_shorter, value[:_LIST_ENTRIES]), *rest]
    return value if value is None or isinstance(value, bool | int | float) else repr(value)


def _compared(read: Record, kept: CorpusRecord) -> str:
    """The reader's record beside the corpus's: what curation added, or what has changed in the source since."""
    lines = [f"{read.kind}, split {read.split}: {len(read.images)} images, {len(read.steps)} steps"]
    if read.id != kept.id:
        return f"{lines[0]}\nThe row now has the id {read.id}: the source has changed since the corpus was made"
    names = ("kind", "license", "question", "answer", "scene")
    changed = [name for name in names if getattr(read, name) != getattr(kept, name)]
    if [image.digest for image in read.images] != [image.digest for image in kept.images]:
        changed.append("images")
    if [step.text for step in read.steps] != [step.text for step in kept.steps]:
        changed.append("steps")
    else:
        for number, (before, after) in enumerate(zip(read.steps, kept.steps, strict=True), start=1):
            if before.target != after.target:
                then, now = target_in_words(before.target), target_in_words(after.target)
                lines.append(f"curation changed step {number}: {then} became {now}")
    if read.split != kept.split:
        lines.append(f"curation moved it to the split {kept.split}")
    if changed:
        lines.append(f"{', '.join(changed)} differ from the corpus: the source has changed since it was made")
    return "\n".join(lines if len(lines) > 1 else [f"{lines[0]}; the corpus holds the same"])


def _show_rejection(console: Console, rejection: dict[str, str], kept: bool) -> None:
    again = "another row with this id was " if kept and rejection["stage"] == "cot_corpus" else ""
    about = Text.assemble(
        f"{again}rejected by {rejection['stage']}: ", (rejection["reason"], "bold yellow"), f"\n{rejection['detail']}"
    )
    console.print(about)


# ---------------------------------------------------------------------------------------- the sequence and its tensors


def _show_sequence(
    console: Console, journey: Journey, record: CorpusRecord, recipe: Recipe, root: Path
) -> LatentSequence | None:
    _heading(console, "4  As a latent sequence")
    for stage in ("latent_corpus", "base_model"):
        if not (folder(root, stage) / "manifest.json").is_file():
            console.print(f"artifacts/{stage} is not there; make it with `valr materialize +latent_corpus`")
            return None
    sequences = Sequences(folder(root, "latent_corpus"), record.split)
    place = next((place for place in range(len(sequences)) if sequences.id(place) == record.id), None)
    if place is None:
        rejected = any(one["stage"] == "latent_corpus" for one in journey.rejections)
        other = "latent_corpus was made of another corpus; make it with `valr run latent_corpus`"
        console.print(f"There is none: {'it was rejected, see above' if rejected else other}")
        return None
    sequence = sequences[place]
    journey.reached = "sequence"
    processor = load_processor(folder(root, "base_model"))
    console.print(_sequence_grid(sequence, record, recipe, processor))
    journey.numbers |= {
        "segments": len(sequence.segments),
        "ids": len(sequence.input_ids),
        "max_length": recipe.data.max_length,
    }
    _show_lengths(console, sequence, recipe)
    _heading(console, "5  As training tensors")
    try:
        images = ImageStore(folder(root, "cot_corpus"))
        batches = [
            Collator(images, processor, latents, max_length=recipe.data.max_length)([sequence])
            for latents in (None, recipe.latents)
        ]
    except (BatchingError, CorpusError, ShardError) as error:
        console.print(Text(str(error), style="red"))
        return sequence
    journey.reached = "tensors"
    supervised = [int((batch.labels[:, 1:] != IGNORED).sum()) for batch in batches]
    journey.numbers |= {
        f"{what}_stage{stage}": number
        for stage, batch, labels in zip((1, 2), batches, supervised, strict=True)
        for what, number in (("positions", batch.input_ids.shape[1]), ("supervised", labels))
    }
    console.print(_tensor_table(batches, supervised))
    positions = _positions(folder(root, "base_model"), batches[1])
    console.print()
    console.print(_segments_table(batches[1], positions, processor))
    console.print()
    console.print(_position_table(batches[1], positions))
    _show_features(console, batches[1], recipe, root)
    return sequence


def _sequence_grid(
    sequence: LatentSequence, record: CorpusRecord, recipe: Recipe, processor: Qwen2_5_VLProcessor
) -> Table:
    """The sequence cut at its segments; columns are counted with the slots of stage 2."""
    slots = recipe.latents.fed_slots
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(style="dim", no_wrap=True, justify="right")
    grid.add_column(overflow="fold")
    column = 0

    def add(name: str, positions: int, shown: Text) -> None:
        nonlocal column
        grid.add_row(name, f"{column}..{column + positions - 1}" if positions else "", shown)
        column += positions

    def text(start: int, end: int) -> Text:
        decoded = processor.tokenizer.decode(sequence.input_ids[start:end].tolist())
        pads = f"(?:{re.escape(IMAGE_PAD)})+"
        return shown_text(re.sub(pads, lambda run: f"{IMAGE_PAD} x {len(run[0]) // len(IMAGE_PAD)} ", decoded), 2000)

    add("prompt", sequence.prompt_length, text(0, sequence.prompt_length))
    done = sequence.prompt_length
    for number, segment in enumerate(sequence.segments, start=1):
        if segment.position > done:
            add("text", segment.position - done, text(done, segment.position))
        looks_at = f"→ {_region(segment.digest, segment.box, record)}"
        marks = Text.assemble(
            (f"{LATENT} [{slots} slots] {LATENT_END}", "bold magenta"),
            f"  before step {segment.step + 1}  ",
            (looks_at, "cyan" if segment.digest else "dim"),
        )
        add(f"segment {number}", slots + 2, marks)
        done = segment.position + 2
    add("text", len(sequence.input_ids) - done, text(done, len(sequence.input_ids)))
    return grid


def _region(digest: str | None, box: Box | None, record: CorpusRecord) -> str:
    if digest is None:
        return "no target, so cross-entropy only"
    places = [number for number, image in enumerate(record.images) if image.digest == digest]
    name = f"image {places[0]}" if places else f"image {digest[:12]}, which the record does not have"
    return f"{name}, box {list(box)}" if box else f"{name}, all of it"


def _show_lengths(console: Console, sequence: LatentSequence, recipe: Recipe) -> None:
    ids, segments, slots = len(sequence.input_ids), len(sequence.segments), recipe.latents.fed_slots
    reserved = ids + recipe.data.reserved_slots * segments
    pads = sum(height * width for _, height, width in sequence.image_grids)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    grid.add_row("ids", f"{ids}, of them {sequence.prompt_length} prompt and {2 * segments} markers")
    grid.add_row("images", f"{len(sequence.image_digests)} shown, {pads} patches: " + _grids(sequence.image_grids))
    grid.add_row("stage 1", f"{ids - 2 * segments} positions: without markers")
    grid.add_row("stage 2", f"{ids + slots * segments} positions: {segments} segments of {slots} slots each")
    most, reserve = recipe.data.max_length, f"data.reserved_slots={recipe.data.reserved_slots}"
    grid.add_row("limit", f"{reserved} with {reserve} a segment, of data.max_length={most} ({reserved / most:.0%})")
    console.print()
    console.print(grid)


def _grids(grids: Iterable[tuple[int, int, int]]) -> str:
    return ", ".join(f"{height} x {width}" for _, height, width in grids) or "none"


def _tensor_table(batches: Sequence[Batch], supervised: Sequence[int]) -> Table:
    """Shapes of both stages beside each other."""
    table = Table("tensor", "stage 1", "stage 2", "holds", box=None, pad_edge=False)
    for name in (one.name for one in dataclasses.fields(Batch)):
        first, second = (getattr(batch, name) for batch in batches)
        if isinstance(second, Tensor):
            holds = str(second.dtype).removeprefix("torch.")
            if name == "labels":
                holds += f", supervised: {supervised[0]} and {supervised[1]}"
            if name == "slot_mask":
                holds += f", true: {int(first.sum())} and {int(second.sum())}"
            if name == "image_grid_thw":
                holds += ", " + _grids(map(tuple, second.tolist()))
            table.add_row(name, str(list(first.shape)), str(list(second.shape)), holds)
    first, second = batches
    with_target = sum(target is not None for target in second.targets)
    table.add_row("targets", str(len(first.targets)), str(len(second.targets)), f"{with_target} with an image")
    return table


def _positions(base_model: Path, batch: Batch) -> Tensor:
    """[3, length]: M-RoPE ids, from the model's own code on a model without weights."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(base_model))
    return rope_positions(model, batch)[:, 0]


def _segments_table(batch: Batch, positions: Tensor, processor: Qwen2_5_VLProcessor) -> Table:
    """Token, label and slot flag in and around each segment of stage 2."""
    table = Table(
        box=None,
        pad_edge=False,
        title="Around the segments, stage 2; labels stand at their own positions",
        title_justify="left",
    )
    for name in ("position", "token", "label", "slot", "M-RoPE"):
        table.add_column(name, justify="right" if name in ("position", "M-RoPE") else "left", no_wrap=True)
    table.add_column("", overflow="fold")
    starts = batch.segment_starts.tolist()
    shown = {*range(_TABLED_SEGMENTS - 1), len(starts) - 1} if len(starts) > _TABLED_SEGMENTS else {*range(len(starts))}
    slots = int(batch.slot_mask.sum()) // max(1, len(starts))

    def add(column: int, note: str = "") -> None:
        is_slot = bool(batch.slot_mask[0, column])
        label = int(batch.labels[0, column])
        table.add_row(
            str(column),
            Text(_token(int(batch.input_ids[0, column]), processor), style="magenta" if is_slot else ""),
            Text("·", style="dim") if label == IGNORED else Text(_token(label, processor), style="green"),
            Text("▪", style="magenta") if is_slot else "",
            _spread(positions[:, column : column + 1]),
            Text(note, style="dim"),
        )

    for number, start in enumerate(starts):
        if number not in shown:
            if number - 1 in shown:
                table.add_row("…", "", "", "", "", f"{len(starts) - len(shown)} more segments")
            continue
        for column in range(max(0, start - 1 - _TOKENS_AROUND), start - 1):
            add(column)
        add(start - 1, f"segment {number + 1} opens")
        add(start, "its input is the state of the position above")
        if slots > 2:
            table.add_row("⋮", "", "", "", "", Text(f"{slots - 2} more slots", style="dim"))
        if slots > 1:
            add(start + slots - 1)
        for column in range(start + slots, min(batch.input_ids.shape[1], start + slots + 1 + _TOKENS_AROUND)):
            add(column, "forced after the last slot" if column == start + slots else "")
        if number < len(starts) - 1:
            table.add_row()
    return table


def _token(number: int, processor: Qwen2_5_VLProcessor) -> str:
    text = processor.tokenizer.decode([number])
    return text if text.strip() == text and text else repr(text)[1:-1].replace(" ", "␣")


def _position_table(batch: Batch, positions: Tensor) -> Table:
    """Ranges of the three M-RoPE ids over every run of text, image and slots."""
    table = Table(box=None, pad_edge=False, title="M-RoPE ids, stage 2", title_justify="left")
    table.add_column("run", no_wrap=True)
    for name in ("positions", "t", "h", "w"):
        table.add_column(name, justify="right", no_wrap=True)
    kinds = [
        "slots" if slot else ("text", "image", "video")[kind]
        for kind, slot in zip(batch.mm_token_type_ids[0].tolist(), batch.slot_mask[0].tolist(), strict=True)
    ]
    counts = {"text": 0, "image": 0, "video": 0, "slots": 0}
    column = 0
    for kind, run in groupby(kinds):
        length = len(list(run))
        here = positions[:, column : column + length]
        counts[kind] += 1
        # Images count from 0, as everywhere.
        name = kind if kind == "text" else f"{kind} {counts[kind] - (kind != 'slots')}"
        table.add_row(name, f"{column}..{column + length - 1}", *(_spread(axis[None]) for axis in here))
        column += length
    return table


def _spread(ids: Tensor) -> str:
    low, high = int(ids.min()), int(ids.max())
    return str(low) if low == high else f"{low}..{high}"


def _show_features(console: Console, batch: Batch, recipe: Recipe, root: Path) -> None:
    """Which features each teacher has for the segments."""
    targets = [target for target in batch.targets if target is not None]
    if not targets:
        return
    console.print()
    for teacher in recipe.alignment.teachers:
        try:
            artifact = folder(root, f"teacher_features_{teacher}")
            index = read_index(artifact)
            if index["mode"] == "stored":
                shapes = sorted({str([*one.shape]) for one in FeatureStore(artifact).features(targets)})
            else:
                shapes = [str([*index["grid"], index["dim"]])]
            about = f"patch features {', '.join(shapes)}, {index['mode']}, for {len(targets)} segments"
        except FeatureError as error:
            about = str(error)
        console.print(Text.assemble((f"aligned to {teacher}  ", "dim"), about))


# ------------------------------------------------------------------------------------------------------------ pictures


def _draw(
    console: Console,
    journey: Journey,
    record: CorpusRecord,
    sequence: LatentSequence | None,
    recipe: Recipe,
    images: ImageStore,
    out: Path,
) -> None:
    """Each image with its targets, and each target as the teachers get it: cut out and squashed to their square."""
    _heading(console, "Pictures")
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("image_*.png"), *out.glob("step_*.png")):
        old.unlink()
    pictures = (images.load(image.digest) for image in record.images)
    journey.files += write_pictures(out, "", pictures, record.steps)
    sides = sorted({recipe.teachers[name].image_pixels for name in recipe.alignment.teachers})
    for number, digest, box in _regions(record, sequence):
        for side in sides:
            squashed = images.load(digest, box).resize((side, side), PIL.Image.Resampling.BICUBIC)
            journey.files.append(out / f"step_{number}_{side}px.png")
            squashed.save(journey.files[-1])
    console.print(Text(f"{out}"), soft_wrap=True)
    console.print("image_*.png: the targets of the steps on it")
    if any(file.name.startswith("step_") for file in journey.files):
        shown = " and ".join(f"{side} x {side}" for side in sides)
        console.print(f"step_*.png: what the teachers see before that step, squashed to {shown}")


def _regions(record: CorpusRecord, sequence: LatentSequence | None) -> Iterator[tuple[int, str, Box | None]]:
    """Number of the step, from 1, digest and box of every target."""
    if sequence is not None:
        yield from ((one.step + 1, one.digest, one.box) for one in sequence.segments if one.digest is not None)
        return
    for number, step in enumerate(record.steps, start=1):
        if step.target is not None:
            yield number, record.images[step.target.image].digest, step.target.box


def _picture_folder(root: Path, identity: str) -> Path:
    """A folder below the project's own, whatever an id may contain."""
    parts = []
    for part in identity.split("/"):
        safe = re.sub(r"[^\w.-]", "_", part)[:80]
        if safe != part or not safe.strip("."):
            safe = f"{safe.strip('.')}-{hashlib.sha256(part.encode()).hexdigest()[:8]}"
        parts.append(safe)
    return Path(os.path.relpath(root / ".valr" / "trace", Path.cwd()), *parts)


def _heading(console: Console, text: str) -> None:
    console.print()
    console.rule(Text(text, style="bold"), align="left", style="dim")
