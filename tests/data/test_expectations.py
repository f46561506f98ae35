from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.made import context, digests, recipe
from valr_ops.data import synthetic
from valr_ops.data.corpus import IMAGE_SCHEMA, RECORD_SCHEMA
from valr_ops.data.curation import build_cot_corpus
from valr_ops.data.expectations import corpus_expectations, latent_expectations
from valr_ops.recipe.recipe import Recipe
from valr_ops.store.artifacts import Check

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    synthetic.build_sources(context(folder, "sources", recipe()))
    build_cot_corpus(context(folder, "cot_corpus", recipe(), sources=folder / "sources"))
    return folder / "cot_corpus"


def damaged(corpus: Path, to: Path, change: Callable[[Rows, Rows], Any]) -> Path:
    """A copy of the corpus whose records or images were changed."""
    shutil.copytree(corpus, to)
    records, images = (pq.read_table(to / f"{name}.parquet").to_pylist() for name in ("records", "images"))
    change(records, images)
    pq.write_table(pa.Table.from_pylist(records, schema=RECORD_SCHEMA), to / "records.parquet")
    pq.write_table(pa.Table.from_pylist(images, schema=IMAGE_SCHEMA), to / "images.parquet")
    return to


def failing(check: Check, rule: str) -> list[str]:
    """Ids under the failed expectation whose rule contains `rule`."""
    (found,) = [one for one in check.metadata["failed"] if rule in one["rule"]]
    return list(found["ids"])


def test_a_good_corpus_passes_and_its_page_has_no_clock(corpus: Path) -> None:
    before = digests(corpus)
    check = corpus_expectations(corpus, recipe())
    assert check.passed and check.name == "corpus_expectations" and check.metadata["failed"] == []
    assert check.metadata["rows"]["records"] == 96
    assert digests(corpus) == before
    assert "All expectations hold" in (corpus / "data_docs" / "index.html").read_text()


def set_id(records: Rows, images: Rows) -> None:
    records[3]["id"] = records[2]["id"]


def set_split(records: Rows, images: Rows) -> None:
    records[3]["split"] = "test"


def empty_question(records: Rows, images: Rows) -> None:
    records[3]["question"] = " "


def no_steps(records: Rows, images: Rows) -> None:
    records[3]["steps"] = []


def other_source(records: Rows, images: Rows) -> None:
    records[3]["source"] = "unknown"


def no_such_target(records: Rows, images: Rows) -> None:
    records[3]["steps"][0]["image"] = 7


def box_outside(records: Rows, images: Rows) -> None:
    records[3]["steps"][0]["box"] = [0, 0, 65, 16]


def box_inverted(records: Rows, images: Rows) -> None:
    records[3]["steps"][0]["box"] = [0, 16, 64, 16]


def lost_image(records: Rows, images: Rows) -> None:
    images[:] = [one for one in images if one["digest"] != records[3]["images"][0]["digest"]]


def spoiled_image(records: Rows, images: Rows) -> None:
    for image in images:
        if image["digest"] == records[3]["images"][0]["digest"]:
            image["data"] = b"spoiled"


DAMAGES = [
    (set_id, "same id", "{other}"),
    (set_split, "No test record", "{id}"),
    (empty_question, "No question is empty", "{id}"),
    (no_steps, "Records have 1 to", "{id}"),
    (other_source, "source is in the recipe", "{id}"),
    (no_such_target, "target is one of its record's images", "{id}#step0"),
    (box_outside, "Boxes end inside the image (right)", "{id}#step0"),
    (box_inverted, "inverted or empty (height)", "{id}#step0"),
    (lost_image, "image of a record is in images.parquet", "{id}"),
    (spoiled_image, "stored bytes have the digest", "{digest}"),
]


@pytest.mark.parametrize(("damage", "rule", "named"), DAMAGES)
def test_a_damaged_corpus_is_blocked_and_the_failing_rows_are_named(
    corpus: Path, tmp_path: Path, damage: Callable[[Rows, Rows], None], rule: str, named: str
) -> None:
    records = pq.read_table(corpus / "records.parquet").to_pylist()
    names = {"id": records[3]["id"], "other": records[2]["id"], "digest": records[3]["images"][0]["digest"]}
    folder = damaged(corpus, tmp_path / "damaged", damage)
    check = corpus_expectations(folder, recipe())
    assert not check.passed
    assert named.format(**names) in failing(check, rule)
    assert "not published" in check.detail
    page = (folder / "data_docs" / "index.html").read_text()
    assert "Not published" in page and named.format(**names) in page


def test_an_image_on_both_sides_of_the_split_is_blocked(corpus: Path, tmp_path: Path) -> None:
    def share(records: Rows, images: Rows) -> None:
        first = next(one for one in records if one["split"] == "train")
        second = next(one for one in records if one["split"] == "validation")
        second["images"] = first["images"]

    check = corpus_expectations(damaged(corpus, tmp_path / "damaged", share), recipe())
    assert len(failing(check, "training and the validation split")) >= 1


def test_a_stricter_recipe_blocks_what_a_looser_one_let_through(corpus: Path) -> None:
    check = corpus_expectations(corpus, recipe(max_steps=2))
    assert not check.passed and failing(check, "data.max_steps")
    corpus_expectations(corpus, recipe())


LATENT, LATENT_END = 90, 91
SEQUENCE_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("id", "source", "split", "kind", "question", "answer")]
    + [
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
    ]
)


def sequences(corpus: Path) -> Rows:
    """Five good sequences of eleven tokens with two segments each."""
    digests_there = pq.read_table(corpus / "images.parquet").to_pylist()
    whole = [one["digest"] for one in digests_there if one["height"] == 64]
    return [
        {
            "id": f"s/{number}",
            "source": "s",
            "split": "train",
            "kind": "single_view",
            "question": "q",
            "answer": "a",
            "input_ids": [1, 2, 3, LATENT, LATENT_END, 4, 5, LATENT, LATENT_END, 6, 7],
            "prompt_length": 3,
            "segments": [
                {"position": 3, "digest": whole[number], "box": [0, 0, 64, 16], "step": 0},
                {"position": 7, "digest": None, "box": None, "step": 1},
            ],
            "image_digests": [whole[number]],
            "image_grids": [[1, 8, 8]],
        }
        for number in range(5)
    ]


def latent_check(folder: Path, rows: Rows, corpus: Path | None, made: Recipe) -> Check:
    pq.write_table(pa.Table.from_pylist(rows, schema=SEQUENCE_SCHEMA), folder / "sequences.parquet")
    return latent_expectations(folder, made, corpus)


def test_good_sequences_pass_with_and_without_the_corpus_at_hand(corpus: Path, tmp_path: Path) -> None:
    assert latent_check(tmp_path, sequences(corpus), corpus, recipe()).passed
    assert latent_check(tmp_path, sequences(corpus), None, recipe()).passed
    assert (tmp_path / "data_docs" / "index.html").is_file()


def test_reserved_slots_count_towards_the_longest_sequence(corpus: Path, tmp_path: Path) -> None:
    # Eleven tokens and two segments of 25 reserved slots.
    assert latent_check(tmp_path, sequences(corpus), corpus, recipe(max_length=61)).passed
    check = latent_check(tmp_path, sequences(corpus), corpus, recipe(max_length=60))
    assert failing(check, "data.max_length") == [f"s/{number}" for number in range(5)]


def move_segment(one: dict[str, Any]) -> None:
    one["segments"][1]["position"] = 5


def stray_marker(one: dict[str, Any]) -> None:
    one["input_ids"][10] = LATENT


def in_prompt(one: dict[str, Any]) -> None:
    one["prompt_length"] = 4


def unknown_target(one: dict[str, Any]) -> None:
    one["segments"][0]["digest"] = "0" * 64


def large_box(one: dict[str, Any]) -> None:
    one["segments"][0]["box"] = [0, 0, 64, 65]


def no_grid(one: dict[str, Any]) -> None:
    one["image_grids"] = []


def same_id(one: dict[str, Any]) -> None:
    one["id"] = "s/3"


@pytest.mark.parametrize(
    ("damage", "rule", "named"),
    [
        (move_segment, "position is that of <latent>", "s/2#segment1"),
        (stray_marker, "Control tokens stand at the segments", "s/2"),
        (in_prompt, "behind the prompt", "s/2#segment0"),
        (unknown_target, "target is an image of the corpus", "s/2#segment0"),
        (large_box, "box has an area inside", "s/2#segment0"),
        (no_grid, "patch grid", "s/2"),
        (same_id, "same id", "s/3"),
    ],
)
def test_a_damaged_sequence_is_blocked_and_named(
    corpus: Path, tmp_path: Path, damage: Callable[[dict[str, Any]], None], rule: str, named: str
) -> None:
    rows = sequences(corpus)
    damage(rows[2])
    check = latent_check(tmp_path, rows, corpus, recipe())
    assert not check.passed
    assert named in failing(check, rule)
