"""From chain-of-thought records to token ids with latent segments: ``v, q -> (segment, r(i)) x N -> answer``.

In: the checked corpus and the base model's processor (tokenizer, chat template, image grid). Out: `sequences.parquet`,
one row a record: ids with every image already expanded to its pads, each segment as the two adjacent tokens
``<latent>`` ``</latent>``, and what each segment looks at. Slots are inserted when batching, so K is no property of
the artifact; without the marker pairs a row is the sequence of stage 1.
Always: interleaved step images are targets, never inputs; a record that does not fit is a line in `rejects.jsonl`;
the prompt is made by `prompt_messages`, which generation uses as well.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from valr_ops.data.corpus import CorpusRecord, read_records
from valr_ops.data.records import Box, Rejection, shortened
from valr_ops.recipe.recipe import DataRecipe
from valr_ops.store.artifacts import StageContext, StageReport
from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

from transformers import PreTrainedTokenizerBase, Qwen2_5_VLProcessor  # noqa: E402
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize  # noqa: E402

LATENT, LATENT_END, LATENT_PAD = "<latent>", "</latent>", "<|latent_pad|>"
CONTROL_STRINGS = (LATENT, LATENT_END, LATENT_PAD)
IMAGE_PAD = "<|image_pad|>"
TURN_END = "<|im_end|>"
INSTRUCTION = "Reason step by step, then write 'Answer:'."


class RewritingError(ValueError):
    """The corpus can't be rewritten with this processor; the message says what to build again."""


@dataclass(frozen=True)
class ControlTokens:
    """Ids of the three control tokens; each string is exactly one id."""

    latent: int
    latent_end: int
    latent_pad: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
        """The ids in `tokenizer`.

        Raises:
            RewritingError: one of the strings is not a single special token.
        """
        ids = []
        for string in CONTROL_STRINGS:
            encoded = tokenizer.encode(string, add_special_tokens=False)
            if len(encoded) != 1 or tokenizer.convert_ids_to_tokens(encoded[0]) != string:
                raise RewritingError(
                    f"the tokenizer has no single token {string!r} (it reads it as {len(encoded)} tokens); "
                    "run the stage base_model, which adds the control tokens, and use its folder"
                )
            ids.append(encoded[0])
        return cls(*ids)


@dataclass(frozen=True)
class Segment:
    """One latent segment of a sequence."""

    position: int
    """Index of ``<latent>`` in `Sequence.input_ids`; ``</latent>`` is the next one."""
    digest: str | None
    """The image it looks at; None for a step without a target, which has cross-entropy only."""
    box: Box | None
    """A region of that image, or all of it."""
    step: int
    """Index of the step that follows."""


@dataclass(frozen=True, eq=False)
class Sequence:
    """One row of `sequences.parquet`."""

    id: str
    source: str
    split: str
    kind: str
    input_ids: np.ndarray
    """[length] int32, with image pads expanded and every segment as two adjacent tokens without slots."""
    prompt_length: int
    """Ids before this index are not supervised."""
    segments: tuple[Segment, ...]
    """In reading order."""
    image_digests: tuple[str, ...]
    """Input images in the order of their pads."""
    image_grids: tuple[tuple[int, int, int], ...]
    """(1, height, width) of each input image in patches, as in `image_grid_thw`."""
    question: str
    answer: str


SEQUENCE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("split", pa.string()),
        ("kind", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("prompt_length", pa.int32()),
        (
            "segments",
            pa.list_(
                pa.struct(
                    [
                        ("position", pa.int32()),
                        ("digest", pa.string()),
                        ("box", pa.list_(pa.int32())),
                        ("step", pa.int32()),
                    ]
                )
            ),
        ),
        ("image_digests", pa.list_(pa.string())),
        ("image_grids", pa.list_(pa.list_(pa.int32()))),
        ("question", pa.string()),
        ("answer", pa.string()),
    ]
)


def prompt_messages(question: str, image_count: int) -> list[dict[str, Any]]:
    """The chat messages of a prompt: one user turn with all images, the question and the format's instruction.

    The one place where a prompt is worded; training and generation both call it. Paper silent on the format: we ask
    for an explicit answer line so that the answer can be isolated without a judge. The instruction is short because
    every token of it stands between the image and the reasoning of a tiny model.
    """
    images = [{"type": "image"} for _ in range(image_count)]
    return [{"role": "user", "content": [*images, {"type": "text", "text": f"{question}\n{INSTRUCTION}"}]}]


def response_pieces(steps: Iterable[str], answer: str) -> list[str]:
    """The response cut before every step and before the answer; its concatenation is what the model writes."""
    return [*(f"{step.strip()}\n" for step in steps), f"Answer: {answer.strip()}{TURN_END}"]


def load_processor(folder: Path) -> Qwen2_5_VLProcessor:
    """Tokenizer, chat template and image processor of a checkpoint folder; never touches the network.

    Raises:
        RewritingError: the folder has no usable processor.
    """
    try:
        return Qwen2_5_VLProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RewritingError(
            f"{folder} holds no Qwen2.5-VL processor ({str(error).splitlines()[0]}); it needs "
            "tokenizer.json, processor_config.json and a chat template, as the stage base_model writes them"
        ) from error


def image_grid(width: int, height: int, processor: Qwen2_5_VLProcessor) -> tuple[int, int, int]:
    """(1, height, width) in patches that the processor makes of an image of `width` x `height` pixels.

    Raises:
        ValueError: the image is more than 200 times longer than wide, which the processor refuses.
    """
    images = processor.image_processor
    resized_height, resized_width = smart_resize(
        height,
        width,
        factor=images.patch_size * images.merge_size,
        min_pixels=images.size["shortest_edge"],
        max_pixels=images.size["longest_edge"],
    )
    return 1, resized_height // images.patch_size, resized_width // images.patch_size


def segment_targets(record: CorpusRecord, placement: str) -> list[tuple[int, str | None, Box | None]]:
    """Where segments stand: (index of the step that follows, image digest or None, box or None), in reading order.

    `every_step` puts one before every step (paper, section 3). `appendix_b`: single view, one before the first step,
    about the only input image; multi-view, before every step an input image was matched to; interleaved, wherever an
    image stood.
    """
    steps: list[tuple[int, str | None, Box | None]] = [
        (index, None, None)
        if step.target is None
        else (index, record.images[step.target.image].digest, step.target.box)
        for index, step in enumerate(record.steps)
    ]
    if placement == "every_step":
        return steps
    if record.kind == "single_view":
        shown = [image.digest for image in record.images if image.role == "input"]
        return [(0, shown[0], None)] if shown and steps else []
    return [step for step in steps if step[1] is not None]


class Rewriter:
    """Turns records into sequences with one processor and one placement.

    Args:
        processor: the base model's.
        data: placement and limits.

    Raises:
        RewritingError: the tokenizer lacks a control token.
    """

    def __init__(self, processor: Qwen2_5_VLProcessor, data: DataRecipe) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.data = data
        self.control = ControlTokens.of(self.tokenizer)
        self._image_pad = self.tokenizer.convert_tokens_to_ids(IMAGE_PAD)
        self._special = set(self.tokenizer.all_special_ids)

    def __call__(self, record: CorpusRecord) -> Sequence | Rejection:
        """The sequence of one record, or why there is none.

        Reasons: `reserved_token_in_text` (this tokenizer reads a special token), `image_aspect`, `too_long`.
        """
        for text in (record.question, record.answer, *(step.text for step in record.steps)):
            if self._special.intersection(self._encode(text)):
                return self._reject(record, "reserved_token_in_text", f"a special token in {shortened(text)!r}")
        shown = [image for image in record.images if image.role == "input"]
        try:
            grids = tuple(image_grid(image.width, image.height, self.processor) for image in shown)
        except ValueError as error:
            return self._reject(record, "image_aspect", str(error))
        input_ids = self._prompt(record.question, grids)
        prompt_length = len(input_ids)
        before = {step: (digest, box) for step, digest, box in segment_targets(record, self.data.placement)}
        segments = []
        # Pieces are encoded one by one, so that taking a marker pair out leaves exactly the text without markers.
        for index, piece in enumerate(response_pieces((step.text for step in record.steps), record.answer)):
            if index in before and index < len(record.steps):
                segments.append(Segment(len(input_ids), *before[index], step=index))
                input_ids += [self.control.latent, self.control.latent_end]
            input_ids += self._encode(piece)
        length = len(input_ids) + self.data.reserved_slots * len(segments)
        if length > self.data.max_length:
            return self._reject(
                record,
                "too_long",
                f"{len(input_ids)} tokens ({prompt_length} of them prompt) and {len(segments)} segments of "
                f"{self.data.reserved_slots} slots are {length} positions, data.max_length={self.data.max_length}",
            )
        return Sequence(
            id=record.id,
            source=record.source,
            split=record.split,
            kind=record.kind,
            input_ids=np.array(input_ids, dtype=np.int32),
            prompt_length=prompt_length,
            segments=tuple(segments),
            image_digests=tuple(image.digest for image in shown),
            image_grids=grids,
            question=record.question,
            answer=record.answer,
        )

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _prompt(self, question: str, grids: tuple[tuple[int, int, int], ...]) -> list[int]:
        """Ids of the chat prompt; each image pad of the template becomes as many as the image has merged patches."""
        messages = prompt_messages(question, len(grids))
        rendered = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        merged = self.processor.image_processor.merge_size**2
        counts = iter(height * width // merged for _, height, width in grids)
        ids: list[int] = []
        for token in self._encode(rendered):
            ids += [token] * (next(counts) if token == self._image_pad else 1)
        return ids

    def _reject(self, record: CorpusRecord, reason: str, detail: str) -> Rejection:
        return Rejection(record.id, record.source, reason, detail)


def build_latent_corpus(context: StageContext) -> StageReport:
    """Rewrite the corpus; writes sequences.parquet, rejects.jsonl, report.json and lengths.png.

    Raises:
        RewritingError: the base model has no usable processor, or no record is left.
    """
    data = context.recipe.data
    rewrite = Rewriter(load_processor(context.inputs["base_model"]), data)
    records = read_records(context.inputs["cot_corpus"])
    sequences: list[Sequence] = []
    rejections: list[Rejection] = []
    for record in context.progress.track(records, "rewriting", total=len(records)):
        made = rewrite(record)
        (rejections if isinstance(made, Rejection) else sequences).append(made)  # type: ignore[arg-type]
    if not sequences:
        reasons = dict(Counter(rejection.reason for rejection in rejections))
        raise RewritingError(
            f"none of {len(records)} records is left ({reasons}); raise data.max_length={data.max_length} "
            "or look at the corpus"
        )
    write_sequences(sequences, context.out / "sequences.parquet")
    with (context.out / "rejects.jsonl").open("w") as file:
        for rejection in rejections:
            file.write(json.dumps(asdict(rejection), sort_keys=True) + "\n")
    report = _report(sequences, rejections)
    (context.out / "report.json").write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
    _plot(sequences, context.out / "lengths.png")
    context.progress.say(
        f"{len(sequences)} sequences, {len(rejections)} rejected, {report['targets']} distinct targets"
    )
    # Imported here because everything that makes a prompt imports this module, and expectations takes seconds to load.
    from valr_ops.data.expectations import latent_expectations

    return StageReport(
        summary={key: value for key, value in report.items() if isinstance(value, int | float)},
        tables={
            "Sequences by source": _source_table(report["sources"]),
            "One sequence": _example_table(_telling(sequences), rewrite.processor),
        },
        plots=("lengths.png",),
        checks=(latent_expectations(context.out, context.recipe, context.inputs["cot_corpus"]),),
    )


def write_sequences(sequences: Iterable[Sequence], path: Path, rows_per_group: int = 1024) -> None:
    """Write `sequences` in their order; the same sequences give the same bytes."""
    with pq.ParquetWriter(path, SEQUENCE_SCHEMA, compression="zstd") as writer:
        for rows in _groups(sequences, rows_per_group):
            columns = {name: [getattr(row, name) for row in rows] for name in SEQUENCE_SCHEMA.names}
            columns["segments"] = [[asdict(segment) for segment in row.segments] for row in rows]
            writer.write_table(pa.table(columns, schema=SEQUENCE_SCHEMA))


def _groups(sequences: Iterable[Sequence], size: int) -> Iterator[list[Sequence]]:
    group: list[Sequence] = []
    for sequence in sequences:
        group.append(sequence)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _report(sequences: list[Sequence], rejections: list[Rejection]) -> dict[str, Any]:
    """Counts in all and by source; `targets` are the distinct (image, box) pairs that teachers have to look at."""
    sources: dict[str, Any] = {}
    for name in sorted({row.source for row in sequences} | {one.source for one in rejections}):
        rows = [sequence for sequence in sequences if sequence.source == name]
        segments = [segment for row in rows for segment in row.segments]
        sources[name] = {
            "sequences": len(rows),
            "splits": dict(sorted(Counter(row.split for row in rows).items())),
            "kinds": dict(sorted(Counter(row.kind for row in rows).items())),
            "tokens": sum(len(row.input_ids) for row in rows),
            "segments": len(segments),
            "segments_without_target": sum(segment.digest is None for segment in segments),
            "rejected": dict(sorted(Counter(one.reason for one in rejections if one.source == name).items())),
        }
    segments = [segment for sequence in sequences for segment in sequence.segments]
    lengths = [len(sequence.input_ids) for sequence in sequences]
    return {
        "sequences": len(sequences),
        "rejected": len(rejections),
        "tokens": sum(lengths),
        "longest": max(lengths),
        "segments": len(segments),
        "most_segments": max(len(sequence.segments) for sequence in sequences),
        "segments_without_target": sum(segment.digest is None for segment in segments),
        "targets": len({(segment.digest, segment.box) for segment in segments if segment.digest is not None}),
        "sources": sources,
    }


def _plot(sequences: list[Sequence], path: Path) -> None:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    lengths, segments = figure.subplots(1, 2)
    lengths.hist([len(sequence.input_ids) for sequence in sequences], bins=40, color="#4477aa")
    lengths.set(xlabel="tokens, images and markers included, slots not", ylabel="sequences")
    counts = Counter(len(sequence.segments) for sequence in sequences)
    segments.bar([*sorted(counts)], [counts[number] for number in sorted(counts)], color="#66aa77")
    segments.set(xlabel="latent segments", ylabel="sequences")
    segments.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _source_table(sources: dict[str, Any]) -> str:
    lines = [
        "| source | sequences | kinds | tokens | segments | without target | rejected |",
        "| --- | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for name, row in sources.items():
        kinds = ", ".join(f"{kind} {count}" for kind, count in row["kinds"].items())
        rejected = ", ".join(f"{reason} {count}" for reason, count in row["rejected"].items()) or "none"
        lines.append(
            f"| {name} | {row['sequences']} | {kinds} | {row['tokens']} | {row['segments']} "
            f"| {row['segments_without_target']} | {rejected} |"
        )
    return "\n".join(lines)


def _telling(sequences: list[Sequence]) -> Sequence:
    """The first sequence with the most segments that have a target: the one that shows most of the format."""
    return max(sequences, key=lambda sequence: sum(segment.digest is not None for segment in sequence.segments))


def _example_table(sequence: Sequence, processor: Qwen2_5_VLProcessor) -> str:
    """One sequence cut at its markers, ids decoded again, runs of image pads written once with their number."""
    rows = [("prompt", 0, sequence.prompt_length, "")]
    starts = [*(segment.position for segment in sequence.segments), len(sequence.input_ids)]
    if starts[0] > sequence.prompt_length:
        rows.append(("response", sequence.prompt_length, starts[0], ""))
    for segment, end in zip(sequence.segments, starts[1:]):
        region = "no target" if segment.digest is None else f"image {segment.digest[:12]}"
        region += f", box {list(segment.box)}" if segment.box else ""
        rows.append((f"segment, step {segment.step + 1}", segment.position, end, region))
    lines = [f"| {sequence.id} | token ids | text | looks at |", "| --- | --- | --- | --- |"]
    for part, start, end, region in rows:
        text = processor.tokenizer.decode(sequence.input_ids[start:end].tolist())
        pads = re.sub(
            f"(?:{re.escape(IMAGE_PAD)})+", lambda run: f"{IMAGE_PAD} x {len(run[0]) // len(IMAGE_PAD)}", text
        )
        shown = pads.replace("|", "\\|").replace("\n", "⏎").replace("<", "&lt;")
        lines.append(f"| {part} | {start}..{end - 1} | {shown} | {region} |")
    return "\n".join(lines)
