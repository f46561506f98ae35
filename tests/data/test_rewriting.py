from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny
from tests.data.killed import dies
from valr_ops.data import expectations, rewriting
from valr_ops.data.corpus import CorpusRecord, ImageReference, write_records
from valr_ops.data.records import Rejection, Step, Target
from valr_ops.data.rewriting import (
    ControlTokens,
    Rewriter,
    RewritingError,
    build_latent_corpus,
    image_grid,
    prompt_messages,
    response_pieces,
    segment_targets,
)
from valr_ops.data.sequences import Sequence, Sequences
from valr_ops.data.shards import ShardError, ShardWriter
from valr_ops.model.qwen import train_tokenizer
from valr_ops.store.artifacts import Check, StageContext, StageReport
from valr_ops.store.progress import Progress
from valr_ops.workers import WorkerLostError


def record(kind: str = "interleaved", **changes: object) -> CorpusRecord:
    """An input image, a step image, and three steps: without target, about a region, about the step image."""
    made = CorpusRecord(
        id="tiny/0",
        source="tiny",
        license="CC0-1.0",
        split="train",
        kind=kind,  # type: ignore[arg-type]
        question=tiny.QUESTION,
        answer="blue square",
        images=(ImageReference("a", "input", 64, 64), ImageReference("s", "step", 64, 16)),
        steps=(
            Step(tiny.STEPS[0]),
            Step(tiny.STEPS[1], Target(0, (0, 16, 64, 32))),
            Step(tiny.STEPS[2], Target(1)),
        ),
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def rewriter(**data: object) -> Rewriter:
    return Rewriter(tiny.processor(), tiny.recipe(data=data).data)


def test_every_step_puts_a_segment_before_each_step_and_names_what_it_looks_at() -> None:
    sequence = rewriter()(record())
    assert not isinstance(sequence, Rejection)
    control = tiny.control()
    assert [(s.step, s.digest, s.box) for s in sequence.segments] == [
        (0, None, None),
        (1, "a", (0, 16, 64, 32)),
        (2, "s", None),
    ]
    for segment in sequence.segments:
        assert sequence.input_ids[segment.position : segment.position + 2].tolist() == [
            control.latent,
            control.latent_end,
        ]
    assert sequence.segments[0].position == sequence.prompt_length
    text = tiny.processor().tokenizer.decode(sequence.input_ids[sequence.prompt_length :])
    expected = "".join(f"<latent></latent>{step}\n" for step in tiny.STEPS) + "Answer: blue square<|im_end|>"
    assert text == expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("single_view", [(0, "a", None)]),
        ("multi_view", [(1, "a", (0, 16, 64, 32)), (2, "s", None)]),
        ("interleaved", [(1, "a", (0, 16, 64, 32)), (2, "s", None)]),
    ],
)
def test_appendix_b_places_segments_by_kind(kind: str, expected: list[object]) -> None:
    assert segment_targets(record(kind), "appendix_b") == expected


def test_step_images_are_targets_and_never_inputs() -> None:
    sequence = rewriter()(record())
    assert not isinstance(sequence, Rejection)
    assert sequence.image_digests == ("a",)
    assert "s" in {segment.digest for segment in sequence.segments}


@pytest.mark.parametrize("size", [(64, 64), (400, 100), (37, 250), (8, 8), (700, 300)])
def test_the_image_grid_is_the_one_the_processor_makes(size: tuple[int, int]) -> None:
    made = tiny.processor().image_processor(images=[tiny.image(0, *size)], return_tensors="pt")
    assert [image_grid(*size, tiny.processor())] == [tuple(grid) for grid in made["image_grid_thw"].tolist()]


def test_the_prompt_is_token_for_token_what_the_processor_makes_of_the_images() -> None:
    images = (ImageReference("a", "input", 64, 64), ImageReference("wide", "input", 400, 100))
    sequence = rewriter()(record(images=images, steps=(Step(tiny.STEPS[0]),)))
    assert not isinstance(sequence, Rejection)
    processor = tiny.processor()
    text = processor.apply_chat_template(prompt_messages(tiny.QUESTION, 2), add_generation_prompt=True)
    pictures = [tiny.images().load("a"), tiny.images().load("wide")]
    made = processor(text=[text], images=pictures, return_tensors="pt")
    assert sequence.input_ids[: sequence.prompt_length].tolist() == made["input_ids"][0].tolist()


def test_without_its_marker_pairs_a_sequence_is_the_text_without_markers() -> None:
    sequence = rewriter()(record())
    assert not isinstance(sequence, Rejection)
    control = tiny.control()
    kept = [token for token in sequence.input_ids.tolist() if token not in (control.latent, control.latent_end)]
    whole = "".join(response_pieces(tiny.STEPS, "blue square"))
    assert kept[sequence.prompt_length :] == tiny.processor().tokenizer.encode(whole)


def test_a_sequence_too_long_for_its_reserved_slots_is_rejected_with_its_numbers() -> None:
    fits = rewriter()(record())
    assert not isinstance(fits, Rejection)
    needed = len(fits.input_ids) + 3 * 4
    assert not isinstance(rewriter(max_length=needed)(record()), Rejection)
    rejection = rewriter(max_length=needed - 1)(record())
    assert isinstance(rejection, Rejection) and rejection.reason == "too_long"
    assert str(needed) in rejection.detail


@pytest.mark.parametrize("field", ["question", "answer"])
def test_text_with_a_special_token_is_rejected(field: str) -> None:
    rejection = rewriter()(record(**{field: "see </latent> here"}))
    assert isinstance(rejection, Rejection) and rejection.reason == "reserved_token_in_text"


def test_an_image_with_an_aspect_the_processor_refuses_is_rejected() -> None:
    images = (ImageReference("a", "input", 8, 8 * 250), ImageReference("s", "step", 64, 16))
    rejection = rewriter()(record(images=images))
    assert isinstance(rejection, Rejection) and rejection.reason == "image_aspect"


def test_a_tokenizer_without_control_tokens_is_refused() -> None:
    tokenizer = train_tokenizer(["some text"], 448)
    plain = type(tokenizer)(vocab=json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"], merges=[])
    with pytest.raises(RewritingError, match="run the stage base_model"):
        ControlTokens.of(plain)


@pytest.mark.parametrize("placement", ["every_step", "appendix_b"])
def test_many_views_have_a_segment_before_every_step_that_an_input_image_was_matched_to(placement: str) -> None:
    images = tuple(ImageReference(name, "input", 64, 64) for name in "abc")
    steps = (Step(tiny.STEPS[0], Target(2)), Step(tiny.STEPS[1]), Step(tiny.STEPS[2], Target(0)))
    sequence = rewriter(placement=placement)(record("multi_view", images=images, steps=steps))
    assert isinstance(sequence, Sequence) and sequence.image_digests == ("a", "b", "c")
    found = [(segment.step, segment.digest) for segment in sequence.segments]
    assert found == [(0, "c"), *([(1, None)] if placement == "every_step" else []), (2, "a")]
    for segment in sequence.segments:
        after = tiny.processor().tokenizer.decode(sequence.input_ids[segment.position + 2 :])
        assert after.startswith(tiny.STEPS[segment.step])


@pytest.mark.parametrize("placement", ["every_step", "appendix_b"])
def test_interleaved_step_images_are_never_inputs_and_stand_where_their_step_begins(placement: str) -> None:
    images = (ImageReference("s", "step", 64, 16), ImageReference("a", "input", 64, 64))
    steps = (Step(tiny.STEPS[0], Target(0)), Step(tiny.STEPS[1]), Step(tiny.STEPS[2], Target(0)))
    sequence = rewriter(placement=placement)(record(images=images, steps=steps))
    assert isinstance(sequence, Sequence) and sequence.image_digests == ("a",)
    assert (sequence.input_ids == tiny.processor().image_token_id).sum() == np.prod(sequence.image_grids[0]) // 4
    assert [one.step for one in sequence.segments if one.digest == "s"] == [0, 2]


def test_records_rewritten_together_are_what_each_is_alone() -> None:
    rewrite = rewriter()
    some = [
        record(),
        record("single_view", id="tiny/1", question="And in row 1?", images=record().images[:1], steps=()),
        record(id="tiny/2", answer="<|im_start|>"),
        record(id="tiny/3", steps=tuple(Step(text) for text in tiny.STEPS * 10)),
    ]
    together = rewrite.all(some)
    assert [type(one) for one in together] == [Sequence, Sequence, Rejection, Rejection]
    for one, made in zip(some, together, strict=True):
        alone = rewrite(one)
        if isinstance(made, Sequence):
            assert isinstance(alone, Sequence) and alone.input_ids.tolist() == made.input_ids.tolist()
        else:
            assert alone == made


@pytest.mark.parametrize(
    "text", ["<|image_pad|>", "a<|im_end|>", "<|im_start|>assistant", "<latent>", "<|latent_pad|>"]
)
def test_the_last_gate_finds_what_this_tokenizer_reads_as_special_in_any_text(text: str) -> None:
    step = record(steps=(*record().steps[:2], Step(text, Target(1))))
    for spoiled in (record(question=text), record(answer=text), step):
        rejection = rewriter()(spoiled)
        assert isinstance(rejection, Rejection) and rejection.reason == "reserved_token_in_text"
        assert text[:9] in rejection.detail


def corpus_of(folder: Path, records: list[CorpusRecord]) -> dict[str, Path]:
    """The stage's inputs."""
    inputs = {name: folder / name for name in ("cot_corpus", "base_model")}
    for made in inputs.values():
        made.mkdir(parents=True)
    tiny.processor().save_pretrained(inputs["base_model"])
    write_records(inputs["cot_corpus"], records)
    return inputs


def run(inputs: dict[str, Path], folder: Path, **changes: object) -> tuple[Path, StageReport]:
    """The stage's output and report, without the expectations, which have tests of their own."""
    out = folder / "out"
    out.mkdir(parents=True)
    recipe = tiny.recipe(**changes)
    return out, build_latent_corpus(StageContext("latent_corpus", recipe, inputs, out, folder / "work", Progress()))


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expectations, "latent_expectations", lambda *_: Check("latent", True, "seen"))


@pytest.mark.usefixtures("unchecked")
def test_the_stage_writes_sequences_rejects_and_a_report(tmp_path: Path) -> None:
    long = record(id="tiny/1", steps=tuple(Step(text) for text in tiny.STEPS * 10))
    source = {"tiny": {"format": "jsonl", "weight": 2.0}}
    inputs = corpus_of(tmp_path, [record(), long, record("single_view", id="tiny/2", steps=record().steps[:1])])
    out, report = run(inputs, tmp_path, **{"data.sources": source, "data.placement": "appendix_b"})
    assert report.summary["sequences"] == 2 and report.summary["segments"] == 3 and report.summary["targets"] == 3
    assert json.loads((out / "rejects.jsonl").read_text())["reason"] == "too_long"
    read = Sequences(out, "train")
    assert [one.id for one in read] == ["tiny/0", "tiny/2"] and read.visits(0).per_epoch == 4
    written = json.loads((out / "report.json").read_text())
    of_source = written["sources"]["tiny"]
    assert of_source["tokens"] == sum(read.lengths) == written["tokens"] and of_source["weight"] == 2
    assert of_source["kinds"] == {"interleaved": 1, "single_view": 1} and of_source["rejected"] == {"too_long": 1}
    assert written["histograms"]["segments"] == {"bin_width": 1, "sequences": [0, 1, 1]}
    tokens = written["histograms"]["tokens"]
    expected = np.bincount(read.lengths // tokens["bin_width"])
    assert tokens["sequences"] == expected.tolist() and len(expected) <= 40
    assert "image_pad" in report.tables["One sequence"] and "x 16" in report.tables["One sequence"]
    assert (out / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert report.checks[0].detail == "seen"


@pytest.mark.usefixtures("unchecked")
def test_a_corpus_of_which_nothing_is_left_stops_with_the_reasons(tmp_path: Path) -> None:
    inputs = corpus_of(tmp_path, [record(), record(id="tiny/1", answer="<latent>")])
    with pytest.raises(RewritingError, match=r"none of 2 records is left .*too_long.*raise data\.max_length=40 "):
        run(inputs, tmp_path, **{"data.max_length": 40})


@pytest.fixture(scope="module")
def many() -> list[CorpusRecord]:
    """Three blocks of the corpus, with a rejection in each."""
    reject = {"answer": "see </latent> here"}
    return [record(id=f"tiny/{number}", **(reject if number % 200 == 7 else {})) for number in range(600)]


@pytest.mark.usefixtures("unchecked")
def test_several_processes_write_the_bytes_that_one_writes(
    tmp_path: Path, many: list[CorpusRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = corpus_of(tmp_path, many)
    alone, _ = run(inputs, tmp_path / "alone")
    monkeypatch.setattr(rewriting, "_RECORDS_WORTH_PROCESSES", 600)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(rewriting, "_rewrite", None)  # nothing is rewritten in this process
    together, _ = run(inputs, tmp_path / "together")
    names = sorted(path.name for path in alone.iterdir())
    assert names == sorted(path.name for path in together.iterdir()) and "sequences-00000.arrow" in names
    assert all((alone / name).read_bytes() == (together / name).read_bytes() for name in names)
    rejected = [json.loads(line)["id"] for line in (together / "rejects.jsonl").read_text().splitlines()]
    assert rejected == ["tiny/7", "tiny/207", "tiny/407"]
    assert [one.id for one in Sequences(together)] == [one.id for one in many if one.id not in rejected]


@pytest.mark.usefixtures("unchecked")
def test_a_process_that_is_killed_stops_the_stage_with_the_likely_reason(
    tmp_path: Path, many: list[CorpusRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewriting, "_RECORDS_WORTH_PROCESSES", 600)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(rewriting, "_rewrite_here", dies)
    with pytest.raises(WorkerLostError, match="was killed, most likely for want of memory"):
        run(corpus_of(tmp_path, many), tmp_path)


@pytest.mark.usefixtures("unchecked")
def test_blocks_are_written_while_others_are_still_to_be_read(
    tmp_path: Path, many: list[CorpusRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []

    def noted(what: str, of: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(of)
        def call(*arguments: Any) -> Any:
            happened.append(what)
            return of(*arguments)

        return call

    monkeypatch.setattr(rewriting, "_rewrite", noted("block read", rewriting._rewrite))
    monkeypatch.setattr(ShardWriter, "write", noted("written", ShardWriter.write))
    run(corpus_of(tmp_path, many), tmp_path)
    reads = [at for at, what in enumerate(happened) if what == "block read"][-3:]
    assert len(reads) == 3 and all("written" in happened[before:after] for before, after in pairwise(reads))


@pytest.mark.usefixtures("unchecked")
def test_a_damaged_corpus_stops_the_stage_with_file_and_rows_named(tmp_path: Path, many: list[CorpusRecord]) -> None:
    inputs = corpus_of(tmp_path, many)
    shard = inputs["cot_corpus"] / "records-00000.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ShardError, match=r"records-00000\.arrow is damaged: rows \d+ to \d+"):
        run(inputs, tmp_path)
