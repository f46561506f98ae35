from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests import tiny
from valr_ops.data import expectations
from valr_ops.data.batching import read_sequences
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
    write_sequences,
)
from valr_ops.model.qwen import train_tokenizer
from valr_ops.store.artifacts import Check, StageContext
from valr_ops.store.progress import Progress


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


def test_sequences_survive_the_parquet_file_and_equal_ones_give_equal_bytes(tmp_path: Path) -> None:
    written = tiny.sequences()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_sequences(written, tmp_path / name / "sequences.parquet", rows_per_group=3)
    read = read_sequences(tmp_path / "one", "train")
    assert len(read) == len(written)
    for before, after in zip(written, read, strict=True):
        assert after.input_ids.tolist() == before.input_ids.tolist()
        for field in dataclasses.fields(before):
            if field.name != "input_ids":
                assert getattr(after, field.name) == getattr(before, field.name)
    one, two = (tmp_path / name / "sequences.parquet" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_the_stage_writes_sequences_rejects_and_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expectations, "latent_expectations", lambda *_: Check("latent", True, "seen"))
    corpus, base, out = (tmp_path / name for name in ("cot_corpus", "base_model", "out"))
    for folder in (corpus, base, out):
        folder.mkdir()
    tiny.processor().save_pretrained(base)
    long = record(id="tiny/1", steps=tuple(Step(text) for text in tiny.STEPS * 10))
    write_records(corpus / "records.parquet", [record(), long])
    inputs = {"cot_corpus": corpus, "base_model": base}
    context = StageContext("latent_corpus", tiny.recipe(), inputs, out, tmp_path / "work", Progress())
    report = build_latent_corpus(context)
    assert report.summary["sequences"] == 1 and report.summary["segments"] == 3 and report.summary["targets"] == 2
    assert json.loads((out / "rejects.jsonl").read_text())["reason"] == "too_long"
    assert pq.read_table(out / "sequences.parquet").num_rows == 1
    assert "image_pad" in report.tables["One sequence"] and "x 16" in report.tables["One sequence"]
    assert (out / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert report.checks[0].detail == "seen"
