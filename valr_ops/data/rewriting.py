"""From chain-of-thought records to token ids with latent segments: ``v, q -> (segment, r(i)) x N -> answer``.

In: the checked corpus and the base model's processor (tokenizer, chat template, image grid). Out: the shards of
`valr_ops.data.sequences`, one row a record: ids with every image already expanded to its pads, each segment as the two
adjacent tokens ``<latent>`` ``</latent>``, and what each segment looks at. Slots are inserted when batching, so K is no
property of the artifact; without the marker pairs a row is the sequence of stage 1.
Always: interleaved step images are targets, never inputs; a record that does not fit is a line in `rejects.jsonl`;
the prompt is made by `prompt_messages`, which generation uses as well; the bytes do not depend on the number of
processes, nor the memory on the number of records.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from valr_ops.data.corpus import CorpusRecord, Records, record_of
from valr_ops.data.records import Box, Rejection, shortened
from valr_ops.data.sequences import (
    ROWS_A_BLOCK,
    Segment,
    Sequence,
    batch_of,
    sequence_of,
    targets_of,
    write_sequences,
)
from valr_ops.recipe.recipe import DataRecipe
from valr_ops.store.artifacts import StageContext, StageReport
from valr_ops.torchvision_guard import ensure_torchvision
from valr_ops.workers import workers

ensure_torchvision()

from transformers import PreTrainedTokenizerBase, Qwen2_5_VLProcessor  # noqa: E402
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize  # noqa: E402

LATENT, LATENT_END, LATENT_PAD = "<latent>", "</latent>", "<|latent_pad|>"
CONTROL_STRINGS = (LATENT, LATENT_END, LATENT_PAD)
IMAGE_PAD = "<|image_pad|>"
TURN_END = "<|im_end|>"
ANSWER_CUE = "Answer:"
INSTRUCTION = f"Reason step by step, then write '{ANSWER_CUE}'."

_MOST_PROCESSES = 8
_RECORDS_WORTH_PROCESSES = 20_000
"""Rewriting so many takes one process about as long as starting several, which load transformers each."""
_HISTOGRAM_BINS = 40


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
    return [*(f"{step.strip()}\n" for step in steps), f"{ANSWER_CUE} {answer.strip()}{TURN_END}"]


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
        self._special = frozenset([*self.tokenizer.all_special_ids, self._image_pad, *vars(self.control).values()])
        self._turn_end = self._special_in(self._encode([TURN_END])[0])
        self._prompt_special = functools.cache(self._special_of_prompt)

    def __call__(self, record: CorpusRecord) -> Sequence | Rejection:
        """The sequence of one record, or why there is none.

        Reasons: `reserved_token_in_text` (this tokenizer reads a special token), `image_aspect`, `too_long`.
        """
        return self.all([record])[0]

    def all(self, records: Iterable[CorpusRecord]) -> list[Sequence | Rejection]:
        """What `__call__` says of each; the tokenizer is called once for all, which is what makes it fast."""
        drafts = []
        for record in records:
            prompt = self._rendered(record.question, sum(image.role == "input" for image in record.images))
            # Pieces are encoded one by one, so that taking a marker pair out leaves exactly the text without markers.
            pieces = response_pieces((step.text for step in record.steps), record.answer)
            drafts.append((record, [prompt, *pieces]))
        encoded = iter(self._encode([text for _, texts in drafts for text in texts]))
        return [self._finished(record, [next(encoded) for _ in texts]) for record, texts in drafts]

    def _finished(self, record: CorpusRecord, encoded: list[list[int]]) -> Sequence | Rejection:
        """The sequence of a record whose prompt and pieces are ids."""
        prompt, *pieces = encoded
        shown = [image for image in record.images if image.role == "input"]
        texts = [record.question, *(step.text for step in record.steps), record.answer]
        allowed = [self._prompt_special(len(shown)), *([[]] * len(record.steps)), self._turn_end]
        for text, ids, special in zip(texts, encoded, allowed, strict=True):
            if self._special_in(ids) != special:
                return self._reject(record, "reserved_token_in_text", f"a special token in {shortened(text)!r}")
        try:
            grids = tuple(image_grid(image.width, image.height, self.processor) for image in shown)
        except ValueError as error:
            return self._reject(record, "image_aspect", str(error))
        input_ids = self._expanded(prompt, grids)
        prompt_length = len(input_ids)
        before = {step: (digest, box) for step, digest, box in segment_targets(record, self.data.placement)}
        segments = []
        for index, piece in enumerate(pieces):
            if index in before:
                segments.append(Segment(len(input_ids), *before[index], step=index))
                input_ids += [self.control.latent, self.control.latent_end]
            input_ids += piece
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

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]

    def _rendered(self, question: str, image_count: int) -> str:
        messages = prompt_messages(question, image_count)
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def _special_in(self, ids: list[int]) -> list[int]:
        return [] if self._special.isdisjoint(ids) else [token for token in ids if token in self._special]

    def _special_of_prompt(self, image_count: int) -> list[int]:
        """The special tokens that the chat template itself writes."""
        return self._special_in(self._encode([self._rendered("?", image_count)])[0])

    def _expanded(self, prompt: list[int], grids: tuple[tuple[int, int, int], ...]) -> list[int]:
        """The prompt's ids; each image pad of the template becomes as many as the image has merged patches."""
        merged = self.processor.image_processor.merge_size**2
        ids: list[int] = []
        done = 0
        for _, height, width in grids:
            pad = prompt.index(self._image_pad, done)
            ids += prompt[done:pad]
            ids += [self._image_pad] * (height * width // merged)
            done = pad + 1
        return ids + prompt[done:]

    def _reject(self, record: CorpusRecord, reason: str, detail: str) -> Rejection:
        return Rejection(record.id, record.source, reason, detail)


# --------------------------------------------------------------------------------------------------------- the stage


def build_latent_corpus(context: StageContext) -> StageReport:
    """Rewrite the corpus; writes the shards, rejects.jsonl, report.json and lengths.png.

    The weight of each source is written with its sequences, so that training depends on it through this artifact and
    not on the rest of what the recipe says of sources, where they lie for example.

    Raises:
        RewritingError: the base model has no usable processor, or no record is left.
        ShardError: the corpus is damaged.
    """
    data = context.recipe.data
    rewriter = Rewriter(load_processor(context.inputs["base_model"]), data)
    records = Records(context.inputs["cot_corpus"])
    weights = {name: source.weight for name, source in data.sources.items()}
    tally = _Tally()
    many = len(records) >= _RECORDS_WORTH_PROCESSES
    processes = min(_MOST_PROCESSES, os.cpu_count() or 1) if many else 1
    blocks = _rewritten(records, rewriter, context.inputs["base_model"], processes)

    with (context.out / "rejects.jsonl").open("w", encoding="utf-8") as rejects:

        def kept() -> Iterator[pa.RecordBatch]:
            for batches, rejections in context.progress.track(blocks, "rewriting, blocks", total=records.blocks):
                for rejection in rejections:
                    tally.reject(rejection)
                    rejects.write(json.dumps(asdict(rejection), sort_keys=True) + "\n")
                for batch in batches:
                    tally.add(batch)
                    yield batch

        write_sequences(context.out, kept(), weights)

    if tally.telling is None:
        raise RewritingError(
            f"none of {len(records)} records is left ({dict(tally.reasons())}); raise data.max_length="
            f"{data.max_length} or look at the corpus"
        )
    report = tally.report(weights)
    (context.out / "report.json").write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
    _plot(tally, context.out / "lengths.png")
    context.progress.say(
        f"{report['sequences']} sequences, {report['rejected']} rejected, {report['targets']} distinct targets"
    )
    # Imported here because everything that makes a prompt imports this module, and expectations takes seconds to load.
    from valr_ops.data.expectations import latent_expectations

    return StageReport(
        summary={key: value for key, value in report.items() if isinstance(value, int | float)},
        tables={
            "Sequences by source": _source_table(report["sources"]),
            "One sequence": _example_table(tally.telling, rewriter.processor),
        },
        plots=("lengths.png",),
        checks=(latent_expectations(context.out, context.recipe, context.inputs["cot_corpus"]),),
    )


_Block = tuple[list[pa.RecordBatch], list[Rejection]]
"""What became of a block of the corpus: sequences, `ROWS_A_BLOCK` a batch, and rejections."""


def _rewritten(records: Records, rewriter: Rewriter, base_model: Path, processes: int) -> Iterator[_Block]:
    """What became of every block of the corpus, in its order, a few in memory at a time.

    Raises:
        WorkerLostError: a process was killed.
    """
    if processes == 1:
        for batch in records.batches():
            yield _rewrite(rewriter, batch)
        return
    with workers(processes, __name__, _start, (base_model, rewriter.data)) as pool:
        coming: deque[Any] = deque()
        for batch in records.batches():
            coming.append(pool.submit(_rewrite_here, batch))
            if len(coming) > 2 * processes:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


_here: Rewriter
"""The rewriter of this process, where it is one of several."""


def _start(base_model: Path, data: DataRecipe) -> None:
    global _here
    # The processes are as many as there are cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _here = Rewriter(load_processor(base_model), data)


def _rewrite_here(batch: pa.RecordBatch) -> _Block:
    return _rewrite(_here, batch)


def _rewrite(rewriter: Rewriter, batch: pa.RecordBatch) -> _Block:
    made = rewriter.all(map(record_of, batch.to_pylist()))
    sequences = [one for one in made if isinstance(one, Sequence)]
    starts = range(0, len(sequences), ROWS_A_BLOCK)
    batches = [batch_of(sequences[start : start + ROWS_A_BLOCK]) for start in starts]
    return batches, [one for one in made if isinstance(one, Rejection)]


# -------------------------------------------------------------------------------------------------------- the report


@dataclass
class _OfSource:
    """Counts of one source."""

    splits: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    segments: int = 0
    segments_without_target: int = 0


class _Tally:
    """Counts over a stream of sequences and rejections."""

    def __init__(self) -> None:
        self.lengths: Counter[int] = Counter()
        """Number of sequences by number of tokens."""
        self.segments: Counter[int] = Counter()
        """Number of sequences by number of segments."""
        self.telling: Sequence | None = None
        """The first sequence with the most segments that have a target: the one that shows most of the format."""
        self._shown = -1
        self._sources: defaultdict[str, _OfSource] = defaultdict(_OfSource)
        # Sixteen bytes a target; the targets themselves would take ten times as much.
        self._targets = bytearray()

    def reject(self, rejection: Rejection) -> None:
        """One more record that was left out."""
        self._sources[rejection.source].rejected[rejection.reason] += 1

    def add(self, batch: pa.RecordBatch) -> None:
        """Some more sequences, as `SEQUENCE_SCHEMA`."""
        lengths, segments = (pc.list_value_length(batch[name]).to_pylist() for name in ("input_ids", "segments"))
        aimed = np.cumsum([0, *batch["segments"].flatten().field("digest").is_valid().to_pylist()])
        ends = np.cumsum([0, *segments])
        with_target = aimed[ends[1:]] - aimed[ends[:-1]]
        self.lengths.update(lengths)
        self.segments.update(segments)
        words = (batch[name].to_pylist() for name in ("source", "split", "kind"))
        for name, split, kind, tokens, number, aims in zip(*words, lengths, segments, with_target.tolist()):
            source = self._sources[name]
            source.splits[split] += 1
            source.kinds[kind] += 1
            source.tokens += tokens
            source.segments += number
            source.segments_without_target += number - aims
        for _, target in targets_of(batch):
            self._targets += blake2b(f"{target.digest} {target.box}".encode(), digest_size=16).digest()
        best = int(with_target.argmax())
        if with_target[best] > self._shown:
            self.telling, self._shown = sequence_of(batch.slice(best, 1)), int(with_target[best])

    def reasons(self) -> Counter[str]:
        """Rejections of all sources by reason."""
        return sum((source.rejected for source in self._sources.values()), Counter())

    def report(self, weights: dict[str, float]) -> dict[str, Any]:
        """Counts in all and by source; `targets` are the distinct (image, box) pairs that teachers have to look at."""
        sources = {
            name: {
                "weight": weights.get(name, 1.0),
                "sequences": sum(source.splits.values()),
                "splits": dict(sorted(source.splits.items())),
                "kinds": dict(sorted(source.kinds.items())),
                "tokens": source.tokens,
                "segments": source.segments,
                "segments_without_target": source.segments_without_target,
                "rejected": dict(sorted(source.rejected.items())),
            }
            for name, source in sorted(self._sources.items())
        }
        longest, per_bin = max(self.lengths), -(-(max(self.lengths) + 1) // _HISTOGRAM_BINS)
        bins = [0] * (longest // per_bin + 1)
        for length, count in self.lengths.items():
            bins[length // per_bin] += count
        return {
            "sequences": self.lengths.total(),
            "rejected": self.reasons().total(),
            "tokens": sum(length * count for length, count in self.lengths.items()),
            "longest": longest,
            "segments": sum(number * count for number, count in self.segments.items()),
            "most_segments": max(self.segments),
            "segments_without_target": sum(source.segments_without_target for source in self._sources.values()),
            "targets": len(np.unique(np.frombuffer(self._targets, dtype="<u8").reshape(-1, 2), axis=0)),
            "sources": sources,
            "histograms": {
                "tokens": {"bin_width": per_bin, "sequences": bins},
                "segments": {"bin_width": 1, "sequences": [self.segments[n] for n in range(max(self.segments) + 1)]},
            },
        }


def _plot(tally: _Tally, path: Path) -> None:
    # Imported here because everything that makes a prompt imports this module, and few of them draw.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    lengths, segments = figure.subplots(1, 2)
    lengths.hist([*tally.lengths], weights=[*tally.lengths.values()], bins=_HISTOGRAM_BINS, color="#4477aa")
    lengths.set(xlabel="tokens, images and markers included, slots not", ylabel="sequences")
    numbers = sorted(tally.segments)
    segments.bar(numbers, [tally.segments[number] for number in numbers], color="#66aa77")
    segments.set(xlabel="latent segments", ylabel="sequences")
    segments.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _source_table(sources: dict[str, Any]) -> str:
    lines = [
        "| source | weight | sequences | kinds | tokens | segments | without target | rejected |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for name, row in sources.items():
        kinds = ", ".join(f"{kind} {count}" for kind, count in row["kinds"].items())
        rejected = ", ".join(f"{reason} {count}" for reason, count in row["rejected"].items()) or "none"
        lines.append(
            f"| {name} | {row['weight']:g} | {row['sequences']} | {kinds} | {row['tokens']} | {row['segments']} "
            f"| {row['segments_without_target']} | {rejected} |"
        )
    return "\n".join(lines)


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
