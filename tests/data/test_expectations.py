from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.data.made import digests, png, recipe
from valr_ops.data.corpus import IMAGE_SCHEMA, RECORD_SCHEMA, CorpusRecord, ImageReference, RecordColumns
from valr_ops.data.expectations import SAMPLED_IMAGES, corpus_expectations, latent_expectations
from valr_ops.data.images import ImageLimits, check_image
from valr_ops.data.records import Step, Target
from valr_ops.data.sequences import OUTLINE_SCHEMA, SEQUENCE_SCHEMA
from valr_ops.data.shards import ShardError, ShardWriter
from valr_ops.recipe.recipe import Recipe
from valr_ops.store.artifacts import Check

Rows = list[dict[str, Any]]
Damage = Callable[[Rows, Rows, int], Any]
"""Spoils the record of a number among all records, or its images, which are 2n and 2n + 1 among all images."""

SOURCES = {"zebra": {"format": "zebra_cot"}, "crops": {"format": "visual_cot"}, "rooms": {"format": "jsonl"}}
BY = "clip 0a1b2c3d"
LIMITS = ImageLimits(8, 10_000)


def rows_of_a_good_corpus(count: int = 12) -> tuple[Rows, Rows]:
    """Records of three sources, two images each, the last two for validation; and their images, two a record."""
    columns = RecordColumns()
    images: Rows = []
    for number in range(count):
        source = list(SOURCES)[number % 3]
        references = []
        for role, (width, height) in (("input", (40, 30)), ("step", (20, 24))):
            image = check_image(png(width, height, (2 * number, 90, width)), role, LIMITS, "made")
            references.append(ImageReference(image.digest, image.role, image.width, image.height))
            images.append({name: getattr(image, name) for name in IMAGE_SCHEMA.names})
        matched = source == "rooms"
        steps = (
            Step("The wall is red.", Target(0, (0, 2, 40, 16), "crop")),
            Step("So is the door.", Target(1, None, "matched", BY) if matched else Target(1)),
            Step("Hence both."),
        )
        columns.add(
            CorpusRecord(
                id=f"{source}/{number}",
                source=source,
                license="CC-BY-4.0",
                split="validation" if number >= count - 2 else "train",
                kind="multi_view" if matched else "interleaved",
                question="Which are red?",
                answer="both",
                images=tuple(references),
                steps=steps,
                scene=f"scannet/room{number}" if matched else None,
                where=f"train.jsonl, line {number + 1}",
            )
        )
    return columns.batch().to_pylist(), images


def write(folder: Path, name: str, rows: Rows, schema: pa.Schema) -> Path:
    """Shards of a few rows a block."""
    folder.mkdir(exist_ok=True, parents=True)
    with ShardWriter(folder, name, schema) as writer:
        for batch in pa.Table.from_pylist(rows, schema=schema).to_batches(max_chunksize=5):
            writer.write(batch)
    return folder


def corpus(folder: Path, damage: Callable[[Rows, Rows], Any] = lambda records, images: None) -> Path:
    """A corpus of twelve records as curation writes it, damaged."""
    records, images = rows_of_a_good_corpus()
    damage(records, images)
    write(folder, "records", records, RECORD_SCHEMA)
    write(folder, "images", images, IMAGE_SCHEMA)
    (folder / "report.json").write_text(json.dumps({"sources": {name: {"kept": 4} for name in SOURCES}}))
    return folder


def check_of(folder: Path, **data: Any) -> Check:
    return corpus_expectations(folder, recipe(SOURCES, **data))


def failing(check: Check, rule: str) -> list[str]:
    """Ids under the failed expectation whose rule contains `rule`."""
    (found,) = [one for one in check.metadata["failed"] if rule in one["rule"]]
    assert found["failing_rows"] >= len(found["ids"])
    return list(found["ids"])


def test_a_good_corpus_passes_and_its_page_has_no_clock(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "corpus")
    check = check_of(folder)
    assert check.passed and check.name == "corpus_expectations" and check.metadata["failed"] == []
    rows = check.metadata["rows"]
    assert rows == dict(zip(rows, (2, 12, 36, 12, 4, 24, 24, 3), strict=True))
    assert list(rows) == ["shards", "records", "steps", "boxes", "scenes", "images", "stored bytes", "sources"]
    before = digests(folder)
    assert check_of(folder) == check and digests(folder) == before


def test_the_page_shows_every_rule_and_links_nothing_outside(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "corpus")
    expectations = check_of(folder).metadata["expectations"]
    page = (folder / "data_docs" / "index.html").read_text()
    assert f"All {expectations} expectations hold" in page
    assert page.count("<code>expect_") == expectations == page.count(">passed<")
    assert "http" not in page and "src=" not in page
    assert all(f'href="#{title}"' in page for title in ("records", "steps", "images", "stored-bytes"))


def test_texts_of_records_get_no_markup_of_their_own_into_the_page(tmp_path: Path) -> None:
    def name_it_script(records: Rows, images: Rows) -> None:
        records[3] |= {"id": "<script>alert(1)</script>", "source": "<b>"}

    folder = corpus(tmp_path / "corpus", name_it_script)
    assert not check_of(folder).passed
    page = (folder / "data_docs" / "index.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "<b>" not in page


def record(**changes: Any) -> Damage:
    return lambda records, images, at: records[at].update(changes)


def step(number: int = 0, **changes: Any) -> Damage:
    return lambda records, images, at: records[at]["steps"][number].update(changes)


def box(*corners: int | None) -> Damage:
    return step(box=list(corners))


def image_of_record(**changes: Any) -> Damage:
    return lambda records, images, at: records[at]["images"][0].update(changes)


def stored_image(**changes: Any) -> Damage:
    return lambda records, images, at: images[2 * at].update(changes)


def upper_case(records: Rows, images: Rows, at: int) -> None:
    records[at]["images"][0]["digest"] = records[at]["images"][0]["digest"].upper()


def repeat_id(records: Rows, images: Rows, at: int) -> None:
    records[-3]["id"] = records[at]["id"]


def lose_image(records: Rows, images: Rows, at: int) -> None:
    images[2 * at].clear()


def store_twice(records: Rows, images: Rows, at: int) -> None:
    images.append(images[2 * at])


def forget_image(records: Rows, images: Rows, at: int) -> None:
    del records[at]["images"][0]


def share_image(records: Rows, images: Rows, at: int) -> None:
    records[-1]["images"][0] = records[at]["images"][0]


def share_scene(records: Rows, images: Rows, at: int) -> None:
    records[-1]["scene"] = records[at]["scene"] = f"scannet/shared{at}"


STORED = "Every image of a record is stored"
STEP0, STEP1, STEP2 = "{id}#step0", "{id}#step1", "{id}#step2"
MATCHED = {"origin": "matched", "by": ""}

DAMAGES: dict[str, tuple[Damage, str, str]] = {
    "no id": (record(id=None), "has an id", "row {at}"),
    "same id": (repeat_id, "same id", "{id}"),
    "no source": (record(source=None), "has a source", "{id}"),
    "unknown source": (record(source="unknown"), "source is in the recipe", "{id}"),
    "test record": (record(split="test"), "No test record", "{id}"),
    "no split": (record(split=None), "has a split", "{id}"),
    "unknown kind": (record(kind="double_view"), "kind of record is known", "{id}"),
    "no kind": (record(kind=None), "has a kind", "{id}"),
    "empty licence": (record(license=" "), "carries a licence", "{id}"),
    "no licence": (record(license=None), "carries a licence", "{id}"),
    "empty question": (record(question=" \n"), "No question is empty", "{id}"),
    "no question": (record(question=None), "No question is empty", "{id}"),
    "empty answer": (record(answer=""), "No answer is empty", "{id}"),
    "token in question": (record(question="What is <Latent> here?"), "question or answer holds", "{id}"),
    "token in answer": (record(answer="<|im_end|>"), "question or answer holds", "{id}"),
    "no steps": (record(steps=[]), "Records have 1 to", "{id}"),
    "null steps": (record(steps=None), "Records have 1 to", "{id}"),
    "too many steps": (lambda records, _, at: records[at].update(steps=22 * records[at]["steps"]), "1 to", "{id}"),
    "no images": (record(images=[], steps=[]), "shows an image", "{id}"),
    "null images": (record(images=None, steps=[]), "shows an image", "{id}"),
    "only step images": (image_of_record(role="step"), "shows an image", "{id}"),
    "unknown role": (image_of_record(role="thumbnail"), "Images are shown", "{id}"),
    "unknown image": (image_of_record(digest="0" * 64), STORED, "{id}"),
    "no digest": (image_of_record(digest="../../etc/passwd"), STORED, "{id}"),
    "digest of other characters": (image_of_record(digest="g" * 64), STORED, "{id}"),
    "digest in upper case": (upper_case, STORED, "{id}"),
    "null digest": (image_of_record(digest=None), STORED, "{id}"),
    "other width": (image_of_record(width=41), STORED, "{id}"),
    "no height": (image_of_record(height=None), STORED, "{id}"),
    "lost image": (lose_image, STORED, "{id}"),
    "empty step": (step(text=" "), "No step is empty", STEP0),
    "token in step": (step(1, text="<|image_pad|>"), "No step holds", STEP1),
    "no such target": (step(1, image=7), "target is one of", STEP1),
    "another record's image": (step(1, image=2), "target is one of", STEP1),
    "negative target": (step(1, image=-1), "target is one of", STEP1),
    "three corners": (box(0, 0, 40), "four numbers", STEP0),
    "box of nothing": (step(2, box=[0, 0, 9, 9]), "four numbers", STEP2),
    "unknown origin": (step(1, origin="guessed"), "says how it is known", STEP1),
    "no origin": (step(1, origin=None), "says how it is known", STEP1),
    "origin of nothing": (step(2, origin="crop"), "says how it is known", STEP2),
    "matched by nobody": (step(1, origin="matched", by=""), "names what matched it", STEP1),
    "matched by null": (step(1, origin="matched", by=None), "names what matched it", STEP1),
    "matcher without a match": (step(0, by=BY), "names what matched it", STEP0),
    "box begins left": (box(-1, 2, 40, 16), "inside the image (left)", STEP0),
    "box begins above": (box(0, -1, 40, 16), "inside the image (top)", STEP0),
    "box with a null": (box(None, 2, 40, 16), "inside the image (left)", STEP0),
    "box ends right": (box(0, 2, 41, 16), "inside the image (right)", STEP0),
    "box ends below": (box(0, 2, 40, 31), "inside the image (bottom)", STEP0),
    "box of another image": (step(1, box=[0, 0, 21, 24]), "inside the image (right)", STEP1),
    "box without width": (box(16, 2, 16, 16), "empty (width)", STEP0),
    "box upside down": (box(0, 16, 40, 2), "empty (height)", STEP0),
    "scene on both sides": (share_scene, "No scene stands in both", "scannet/shared{at}"),
    "image on both sides": (share_image, "No image stands in both", "{digest}"),
    "image twice": (store_twice, "distinct image stands once", "{digest}"),
    "unused image": (forget_image, "belongs to a record", "{digest}"),
    "narrow image": (stored_image(width=7), "min_image_side wide", "{digest}"),
    "low image": (stored_image(height=7), "min_image_side high", "{digest}"),
    "huge image": (stored_image(width=50_000, height=50_000), "at most data.max_image_pixels", "{digest}"),
    "other bytes": (stored_image(data=b"spoiled"), "bytes have the digest", "{digest}"),
    "no bytes": (stored_image(data=None), "bytes have the digest", "{digest}"),
}
"""What is done to a record, the rule that it breaks, and what the failing row is called."""


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Check, str, list[dict[str, Any]]]:
    """One record for each damage and six sound ones: the check, its page, and what the rows are called."""
    folder = tmp_path_factory.mktemp("damaged")
    records, images = rows_of_a_good_corpus(len(DAMAGES) + 6)
    names = [{"at": at, "id": one["id"], "digest": one["images"][0]["digest"]} for at, one in enumerate(records)]
    for at, (damage, _, _) in enumerate(DAMAGES.values()):
        damage(records, images, at)
    write(folder, "records", records, RECORD_SCHEMA)
    write(folder, "images", [image for image in images if image], IMAGE_SCHEMA)
    check = check_of(folder)
    return check, (folder / "data_docs" / "index.html").read_text(), names


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_record_is_blocked_and_named_under_the_rule_that_it_breaks(
    damaged: tuple[Check, str, list[dict[str, Any]]], name: str
) -> None:
    check, page, names = damaged
    _, rule, named = DAMAGES[name]
    row = named.format(**names[list(DAMAGES).index(name)])
    assert row in failing(check, rule)
    assert f"<code>{row}</code>" in page


def test_no_sound_record_is_named_beside_the_damaged_ones(damaged: tuple[Check, str, list[dict[str, Any]]]) -> None:
    check, page, names = damaged
    assert not check.passed and "not published" in check.detail and "failed: not published" in page
    named = {row.split("#")[0] for one in check.metadata["failed"] for row in one["ids"]}
    assert not named & {one["id"] for one in names[len(DAMAGES) :]}
    # The metadata is what reaches the check in Dagster, as JSON.
    assert json.loads(json.dumps(check.metadata)) == check.metadata


def test_every_rule_about_rows_of_a_corpus_was_broken_by_a_damage(
    damaged: tuple[Check, str, list[dict[str, Any]]],
) -> None:
    check, page, _ = damaged
    broken = {one["rule"] for one in check.metadata["failed"]}
    assert check.metadata["expectations"] - len(broken) == page.count(">passed<") == 3
    assert not any(rule in one for one in broken for rule in ("at least one", "exactly the columns", "license_policy"))


def test_a_corpus_with_fewer_records_than_reported_or_none_is_blocked(tmp_path: Path) -> None:
    def lose_record(records: Rows, images: Rows) -> None:
        del records[3], images[6:8]

    check = check_of(corpus(tmp_path / "fewer", lose_record))
    assert failing(check, "as many records of every source") == ["zebra"] and len(check.metadata["failed"]) == 1
    empty = check_of(corpus(tmp_path / "none", lambda records, images: (records.clear(), images.clear())))
    assert failing(empty, "at least one record") == []


def test_a_box_with_a_wrong_number_of_corners_hides_no_other_box(tmp_path: Path) -> None:
    def damage(records: Rows, images: Rows) -> None:
        records[2]["steps"][0]["box"] = [1, 2]
        records[8]["steps"][0]["box"] = [0, 0, 99, 9]

    check = check_of(corpus(tmp_path / "corpus", damage))
    assert failing(check, "four numbers") == ["rooms/2#step0"]
    assert failing(check, "(right)") == ["rooms/8#step0"]


def test_what_was_found_stands_beside_the_failing_rows(damaged: tuple[Check, str, list[dict[str, Any]]]) -> None:
    found = {one["rule"]: one["observed"] for one in damaged[0].metadata["failed"]}
    assert found["Every source is in the recipe."] == "unknown"
    assert found["No step is empty."] == "0"
    assert found["No step holds a control token."] == found["No two records have the same id."] == ""


def test_a_licence_that_the_policy_does_not_allow_is_blocked(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "corpus", lambda records, images: records[3].update(license="CC-BY-NC-4.0"))
    assert check_of(folder).passed and check_of(folder, license_policy="non_commercial_ok").passed
    check = check_of(folder, license_policy="commercial")
    assert failing(check, "data.license_policy=commercial allows") == ["zebra/3"]


def test_a_stricter_recipe_blocks_what_a_looser_one_let_through(tmp_path: Path) -> None:
    check = check_of(corpus(tmp_path / "corpus"), max_steps=2)
    assert not check.passed and len(failing(check, "data.max_steps")) == 12


def test_a_missing_column_is_named_and_nothing_else_is_looked_at(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "corpus")
    records, _ = rows_of_a_good_corpus()
    schema = pa.schema([field for field in RECORD_SCHEMA if field.name != "scene"] + [pa.field("room", pa.string())])
    write(folder, "records", records, schema)
    check = check_of(folder)
    assert failing(check, "exactly the columns") == ["records (scene is missing or of another type) (room is unknown)"]
    assert check.metadata["rows"] == {"shards": 2}


def test_only_a_few_of_many_failing_rows_are_listed_and_all_are_counted(tmp_path: Path) -> None:
    def empty_all(records: Rows, images: Rows) -> None:
        for one in records:
            for number in one["steps"]:
                number["text"] = ""

    folder = corpus(tmp_path / "corpus", empty_all)
    (found,) = check_of(folder).metadata["failed"]
    assert found["failing_rows"] == 36 and len(found["ids"]) == 20
    assert "the first 20 of 36" in (folder / "data_docs" / "index.html").read_text()


def test_stored_bytes_are_digested_for_a_sample_from_the_first_image_to_the_last(tmp_path: Path) -> None:
    records, images = rows_of_a_good_corpus()
    many = [dict(images[0], digest=f"{number:064x}") for number in range(2 * SAMPLED_IMAGES)]
    folder = write(write(tmp_path, "records", records, RECORD_SCHEMA), "images", many, IMAGE_SCHEMA)
    check = check_of(folder)
    assert check.metadata["rows"]["stored bytes"] == SAMPLED_IMAGES
    (found,) = [one for one in check.metadata["failed"] if "bytes have the digest" in one["rule"]]
    assert found["failing_rows"] == SAMPLED_IMAGES and found["ids"][0] == f"{0:064x}"


def test_a_shard_that_is_gone_or_damaged_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "corpus")
    shard = folder / "records-00000.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 255
    shard.write_bytes(data)
    with pytest.raises(ShardError, match=r"records-00000\.arrow is damaged.*valr run cot_corpus"):
        check_of(folder)
    (folder / "images-00000.arrow").unlink()
    with pytest.raises(ShardError, match=r"images-00000\.arrow can't be read.*valr run cot_corpus"):
        check_of(folder)


# -------------------------------------------------------------------------------------------------------- sequences

LATENT, LATENT_END = 90, 91


def sequences(count: int = 12) -> Rows:
    """Good sequences of eleven tokens with two segments each, of the good corpus' records."""
    records, _ = rows_of_a_good_corpus(count)
    return [
        {
            "id": one["id"],
            "source": one["source"],
            "split": one["split"],
            "kind": one["kind"],
            "question": "q",
            "answer": "a",
            "input_ids": [1, 2, 3, LATENT, LATENT_END, 4, 5, LATENT, LATENT_END, 6, 7],
            "prompt_length": 3,
            "segments": [
                {"position": 3, "digest": one["images"][0]["digest"], "box": [0, 2, 40, 16], "step": 0},
                {"position": 7, "digest": None, "box": None, "step": 1},
            ],
            "image_digests": [one["images"][0]["digest"]],
            "image_grids": [[1, 8, 8]],
        }
        for one in records
    ]


def write_sequences(folder: Path, rows: Rows, **outlined: Any) -> Path:
    """Sequences with their outline; `outlined` replaces what it says of the third one."""
    outline = [
        {
            **{name: one[name] for name in ("id", "source", "split")},
            "weight": 1.0,
            "length": len(one["input_ids"]),
            "segments": len(one["segments"]),
        }
        for one in rows
    ]
    if outlined:
        outline[2].update(outlined)
    return write(write(folder, "sequences", rows, SEQUENCE_SCHEMA), "outline", outline, OUTLINE_SCHEMA)


def latent_check(folder: Path, rows: Rows, with_corpus: bool = True, made: Recipe | None = None) -> Check:
    write_sequences(folder / "latent", rows)
    return latent_expectations(
        folder / "latent", made or recipe(SOURCES), corpus(folder / "corpus") if with_corpus else None
    )


def test_good_sequences_pass_with_and_without_the_corpus_at_hand(tmp_path: Path) -> None:
    check = latent_check(tmp_path, sequences())
    assert check.passed and check.metadata["rows"] == {"shards": 2, "sequences": 12, "segments": 24}
    assert latent_check(tmp_path, sequences(), with_corpus=False).passed
    assert (tmp_path / "latent" / "data_docs" / "index.html").is_file()


def test_reserved_slots_count_towards_the_longest_sequence(tmp_path: Path) -> None:
    # Eleven tokens and two segments of 25 reserved slots.
    assert latent_check(tmp_path, sequences(), made=recipe(SOURCES, max_length=61)).passed
    check = latent_check(tmp_path, sequences(), made=recipe(SOURCES, max_length=60))
    assert failing(check, "data.max_length") == [one["id"] for one in sequences()]


def test_sequences_without_any_segment_pass_and_a_corpus_without_sequences_does_not(tmp_path: Path) -> None:
    rows = sequences()
    for one in rows:
        one.update(segments=[], input_ids=[1, 2, 3, 4, 5])
    assert latent_check(tmp_path, rows).passed
    assert failing(latent_check(tmp_path, []), "at least one sequence") == []


def test_sequences_that_hold_no_token_are_named_not_stumbled_over(tmp_path: Path) -> None:
    rows = sequences()
    for one in rows:
        one.update(input_ids=[])
    check = latent_check(tmp_path, rows)
    assert len(failing(check, "Something follows the prompt")) == 12
    assert len(failing(check, "inside the sequence")) == 20


def sequence(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda one: one.update(changes)


def segment(number: int, **changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda one: one["segments"][number].update(changes)


def stray_marker(one: dict[str, Any]) -> None:
    one["input_ids"][10] = LATENT


def torn_pair(one: dict[str, Any]) -> None:
    one["input_ids"][8] = 6


def swapped(one: dict[str, Any]) -> None:
    one["segments"].reverse()


SEGMENT0, SEGMENT1 = "{id}#segment0", "{id}#segment1"
SEQUENCE_DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str, str]] = {
    "segment elsewhere": (segment(1, position=5), "position is that of <latent>", SEGMENT1),
    "segment one too late": (segment(1, position=8), "position is that of <latent>", SEGMENT1),
    "segment at the end": (segment(1, position=10), "inside the sequence", SEGMENT1),
    "segment before the beginning": (segment(1, position=-1), "inside the sequence", SEGMENT1),
    "segment behind the end": (segment(1, position=200), "Control tokens stand at the segments", "{id}"),
    "marker without a segment": (stray_marker, "Control tokens stand at the segments", "{id}"),
    "half a pair": (torn_pair, "position is that of <latent>", SEGMENT1),
    "segments swapped": (swapped, "reading order", SEGMENT1),
    "segment in the prompt": (sequence(prompt_length=4), "behind the prompt", SEGMENT0),
    "no prompt": (sequence(prompt_length=0), "begins with a prompt", "{id}"),
    "only a prompt": (sequence(prompt_length=11), "Something follows", "{id}"),
    "too long": (sequence(input_ids=[1, 2, 3, *[4] * 9000], segments=[]), "data.max_length", "{id}"),
    "unknown target": (segment(0, digest="0" * 64), "target is an image of the corpus", SEGMENT0),
    "target without a digest": (segment(0, digest="no digest"), "target is an image of the corpus", SEGMENT0),
    "box below the image": (segment(0, box=[0, 0, 40, 31]), "box has an area inside", SEGMENT0),
    "box without width": (segment(0, box=[9, 0, 9, 16]), "box has an area inside", SEGMENT0),
    "three corners": (segment(0, box=[0, 0, 9]), "box has an area inside", SEGMENT0),
    "box of nothing": (segment(1, box=[0, 0, 9, 9]), "box has an area inside", SEGMENT1),
    "no grid": (sequence(image_grids=[]), "patch grid", "{id}"),
    "grid of two numbers": (sequence(image_grids=[[1, 8]]), "patch grid", "{id}"),
    "same id": (sequence(id="zebra/30"), "same id", "zebra/30"),
    "no id": (sequence(id=None), "has an id", "row {at}"),
    "unknown record": (sequence(id="rooms/99"), "is a record of the corpus", "rooms/99"),
    "other split": (sequence(split="validation"), "is a record of the corpus", "{id}"),
    "test record": (sequence(split="test"), "No test record", "{id}"),
    "no split": (sequence(split=None), "has a split", "{id}"),
}
"""What is done to a sequence, the rule that it breaks, and what the failing row is called."""


@pytest.fixture(scope="module")
def damaged_sequences(tmp_path_factory: pytest.TempPathFactory) -> Check:
    """The check of a corpus with one sequence for each damage and ten sound ones."""
    folder = tmp_path_factory.mktemp("damaged")
    count = len(SEQUENCE_DAMAGES) + 10
    records, images = rows_of_a_good_corpus(count)
    write(write(folder / "corpus", "records", records, RECORD_SCHEMA), "images", images, IMAGE_SCHEMA)
    rows = sequences(count)
    for at, (damage, _, _) in enumerate(SEQUENCE_DAMAGES.values()):
        damage(rows[at])
    write_sequences(folder / "latent", rows, length=12)
    return latent_expectations(folder / "latent", recipe(SOURCES), folder / "corpus")


@pytest.mark.parametrize("name", SEQUENCE_DAMAGES)
def test_a_damaged_sequence_is_blocked_and_named_under_the_rule_that_it_breaks(
    damaged_sequences: Check, name: str
) -> None:
    _, rule, named = SEQUENCE_DAMAGES[name]
    at = list(SEQUENCE_DAMAGES).index(name)
    assert named.format(at=at, id=f"{list(SOURCES)[at % 3]}/{at}") in failing(damaged_sequences, rule)


def test_every_rule_about_sequences_was_broken_and_no_sound_one_is_named(damaged_sequences: Check) -> None:
    failed = damaged_sequences.metadata["failed"]
    # There are sequences, and with the right columns.
    assert damaged_sequences.metadata["expectations"] - len(failed) == 2
    sound = {one["id"] for one in sequences(len(SEQUENCE_DAMAGES) + 10)[len(SEQUENCE_DAMAGES) :]}
    assert {row.split("#")[0] for one in failed for row in one["ids"]} & sound == {"zebra/30"}
    assert json.loads(json.dumps(damaged_sequences.metadata)) == damaged_sequences.metadata


@pytest.mark.parametrize(
    "outlined", [{"id": "rooms/99"}, {"split": "validation"}, {"length": 12}, {"segments": 1}], ids=repr
)
def test_an_outline_that_says_something_else_of_a_sequence_is_blocked(tmp_path: Path, outlined: dict[str, Any]) -> None:
    folder = write_sequences(tmp_path, sequences(), **outlined)
    assert failing(latent_expectations(folder, recipe(SOURCES)), "outline says") == ["rooms/2"]


def test_an_outline_of_another_length_says_nothing_of_any_sequence(tmp_path: Path) -> None:
    folder = write_sequences(tmp_path, sequences())
    write(folder, "sequences", sequences()[:11], SEQUENCE_SCHEMA)
    assert len(failing(latent_expectations(folder, recipe(SOURCES)), "outline says")) == 11


def test_sequences_of_another_schema_are_named_and_nothing_else_is_looked_at(tmp_path: Path) -> None:
    folder = write_sequences(tmp_path, sequences())
    wide = [pa.field("prompt_length", pa.int64()) if one.name == "prompt_length" else one for one in SEQUENCE_SCHEMA]
    write(folder, "sequences", sequences(), pa.schema(wide))
    check = latent_expectations(folder, recipe(SOURCES))
    assert failing(check, "exactly the columns") == ["sequences (prompt_length is missing or of another type)"]


def test_without_the_corpus_a_target_has_to_be_a_digest_and_a_box_to_have_an_area(tmp_path: Path) -> None:
    rows = sequences()
    rows[2]["segments"][0]["digest"] = "0" * 64
    rows[3]["segments"][0]["digest"] = "no digest"
    rows[4]["segments"][0]["box"] = [0, 0, 4000, 4000]
    rows[5]["segments"][0]["box"] = [5, 0, 4, 4]
    check = latent_check(tmp_path, rows, with_corpus=False)
    assert failing(check, "target is an image") == ["zebra/3#segment0"]
    assert failing(check, "box has an area") == ["rooms/5#segment0"]
