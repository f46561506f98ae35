from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from tests.data.made import png, recipe
from valr_ops.data.images import ImageLimits, check_image
from valr_ops.data.records import Record, SourceError, Step
from valr_ops.data.screening import (
    Benchmarks,
    Keys,
    decide,
    image_groups,
    license_allows,
    normalised_question,
    read_benchmarks,
)
from valr_ops.data.synthetic import draw_scenes
from valr_ops.recipe.recipe import DataRecipe

DRAWN, _ = draw_scenes(0, 12)
LONG = "Which of the four coloured shapes in the second row of the drawn picture stands next to the blue one"


def encoded(number: int, **changes: Any) -> bytes:
    """One drawn picture; `size` and `format` store it in another way."""
    import io

    picture = PIL.Image.fromarray(DRAWN[number])
    if "size" in changes:
        picture = picture.resize((changes["size"], changes["size"]), PIL.Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, format=changes.get("format", "PNG"))
    return file.getvalue()


def record(id_: str, images: list[bytes] | None = None, **changes: Any) -> Record:
    shown = images if images is not None else [encoded(0)]
    values: dict[str, Any] = {
        "source": "m",
        "license": "CC0-1.0",
        "split": "train",
        "kind": "single_view",
        "question": f"{id_}?",
        "steps": (Step("s"),),
        "answer": "a",
        "images": tuple(check_image(one, "input", ImageLimits(1, 10**6), "") for one in shown),
        **changes,
    }
    return Record(id=id_, **values)


def reasons(records: list[Record], benchmarks: Benchmarks | None = None, **data: Any) -> list[str | None]:
    keys = Keys()
    for one in records:
        keys.add(one)
    settings = DataRecipe.model_validate(data)
    return [None if decided is None else decided[0] for decided in decide(keys, settings, benchmarks)]


def test_of_equal_records_the_first_stays() -> None:
    first = record("a", question="q?")
    again = record("b", question="q?")
    same_id = record("a", [encoded(1)])
    assert reasons([first, again, same_id]) == [None, "duplicate_content", "duplicate_id"]


def test_what_was_rejected_makes_no_other_record_a_duplicate() -> None:
    kept, refused, other = record("a"), record("a", question="z?"), record("c", question="z?")
    assert reasons([kept, refused, other]) == [None, "duplicate_id", None]


def test_a_picture_stored_in_another_way_under_the_same_question_is_a_near_duplicate() -> None:
    stored = [record("a", question="What is it?"), record("b", [encoded(0, size=128)], question="what  is it")]
    assert reasons(stored) == [None, "near_duplicate"]
    assert reasons(stored, near_duplicate_bits=None) == [None, None]


@pytest.mark.parametrize(
    "changes",
    [{"question": "Another one?"}, {"answer": "b"}, {"images": [encoded(1)]}, {"images": [encoded(0), encoded(1)]}],
    ids=["question", "answer", "picture", "number of pictures"],
)
def test_records_that_differ_in_one_part_are_no_near_duplicates(changes: dict[str, Any]) -> None:
    given = {"question": "What is it?", "images": [encoded(0, size=128)], **changes}
    images = given.pop("images")
    assert reasons([record("a", question="What is it?"), record("b", images, **given)]) == [None, None]


def test_every_picture_of_near_duplicates_has_to_look_the_same() -> None:
    views = [[encoded(0), encoded(1)], [encoded(0, size=96), encoded(1, size=96)], [encoded(0, size=128), encoded(2)]]
    made = [record(str(number), images, question="What?") for number, images in enumerate(views)]
    assert reasons(made) == [None, "near_duplicate", None]


def test_plain_walls_are_no_near_duplicates_of_each_other() -> None:
    walls = [record(str(shade), [png(colour=(shade, 30, 30))], question="What?") for shade in (10, 120, 250)]
    assert reasons(walls) == [None, None, None]


def test_a_near_duplicate_of_a_rejected_record_stays() -> None:
    blocked = record("a", question="What?", license="CC-BY-NC-4.0")
    other = record("b", [encoded(0, size=128)], question="What?")
    assert reasons([blocked, other], license_policy="commercial") == ["licence_blocked", None]


def test_an_image_of_a_test_record_blocks_training_records_also_when_it_is_stored_in_another_way() -> None:
    made = [
        record("t", split="test"),
        record("same"),
        record("resized", [encoded(5), encoded(0, size=128)]),
        record("other", [encoded(1)]),
    ]
    assert reasons(made) == [None, "benchmark_image", "benchmark_image", None]


def test_a_test_record_is_a_duplicate_of_test_records_only() -> None:
    made = [record("a", split="test"), record("a", [encoded(1)]), record("a", [encoded(2)], split="test")]
    assert reasons(made) == [None, None, "duplicate_id"]


def test_a_question_of_a_test_split_betrays_nothing() -> None:
    made = [record("t", split="test", question=LONG), record("x", [encoded(1)], question=LONG)]
    assert reasons(made) == [None, None]


@pytest.fixture
def benchmark(tmp_path: Path) -> DataRecipe:
    folder = tmp_path / "bench" / "deep"
    folder.mkdir(parents=True)
    (folder / "3.png").write_bytes(encoded(3))
    (tmp_path / "bench" / "scenes.txt").write_text("scannet/scene0011_00\n\n")
    (tmp_path / "bench" / "questions.txt").write_text(f"{LONG}?\nHow many chairs?\n" + 2 * f"{LONG} lamp?\n")
    return recipe(benchmarks={"vsi": {"path": str(tmp_path / "bench")}}).data


def test_images_scenes_and_questions_of_a_benchmark_block_records(benchmark: DataRecipe) -> None:
    found = read_benchmarks(benchmark)
    made = [
        record("image", [encoded(3)]),
        record("jpeg", [encoded(3, format="JPEG")]),
        record("scene", scene="scannet/scene0011_00"),
        record("question", question=f"  {LONG.upper()}"),
        record("template", [encoded(5)], question=f"{LONG} lamp?"),
        record("fine", [encoded(4)], scene="scannet/scene0012_00", question="How many chairs?"),
    ]
    expected = ["benchmark_image", "benchmark_image", "benchmark_scene", "benchmark_question", None, None]
    assert reasons(made, found) == expected


def test_a_benchmark_that_can_not_be_read_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    for name, message in (("missing", "does not exist"), ("empty", "holds no image"), ("broken", "image_unreadable")):
        settings = recipe(benchmarks={"b": {"path": str(tmp_path / name)}}).data
        with pytest.raises(SourceError, match=f"benchmark 'b'.*{message}.*data.benchmarks.b.path"):
            read_benchmarks(settings)


@pytest.mark.parametrize("linked", ["deep/x.PNG", "scenes.txt", "more"])
def test_a_linked_benchmark_file_that_would_be_left_out_stops_the_run(
    benchmark: DataRecipe, tmp_path: Path, linked: str
) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "bench" / linked
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / "elsewhere" if linked == "more" else tmp_path / "elsewhere" / "file")
    with pytest.raises(SourceError, match=rf"'vsi': {linked}/? is a link.*cp -rL.*data\.benchmarks\.vsi\.path"):
        read_benchmarks(benchmark)


def test_a_link_to_what_no_record_is_compared_with_stops_nothing(benchmark: DataRecipe, tmp_path: Path) -> None:
    (tmp_path / "bench" / "README.md").symlink_to(tmp_path / "nothing.md")
    assert len(read_benchmarks(benchmark).images) == 1


def test_a_list_of_a_benchmark_is_utf_8_with_or_without_a_mark(benchmark: DataRecipe, tmp_path: Path) -> None:
    scenes = tmp_path / "bench" / "scenes.txt"
    scenes.write_text("scannet/scene0011_00\n", encoding="utf-8-sig")
    assert set(read_benchmarks(benchmark).scenes) == {"scannet/scene0011_00"}
    scenes.write_text("scannet/scene0011_00\n", encoding="utf-16")
    with pytest.raises(SourceError, match=r"'vsi': scenes\.txt is not UTF-8"):
        read_benchmarks(benchmark)


@pytest.mark.parametrize(
    ("license", "non_commercial_ok", "commercial"),
    [
        ("CC-BY-4.0", True, True),
        ("Apache-2.0", True, True),
        ("cc0-1.0", True, True),
        ("CC-BY-NC-4.0", True, False),
        ("DINOv3", True, False),
        ("CC-BY-ND-4.0", False, False),
        ("unknown", False, False),
        ("", False, False),
        ("not MIT", False, False),
    ],
)
def test_a_licence_policy_lets_in_what_is_known_to_be_allowed(
    license: str, non_commercial_ok: bool, commercial: bool
) -> None:
    assert license_allows(license, "any")
    assert license_allows(license, "non_commercial_ok") == non_commercial_ok
    assert license_allows(license, "commercial") == commercial


def test_questions_are_compared_by_their_words() -> None:
    assert normalised_question("  Is it,\n RED? ") == normalised_question("is it red") == "is it red"


def test_records_that_share_an_image_or_a_scene_form_one_group() -> None:
    shown = [(0, 1), (1, 2), (3,), (4,), (5,), (6, 2)]
    scenes = [None, None, "s", "s", None, None]
    assert image_groups(shown, scenes, 7) == [0, 0, 3, 3, 5, 0]


def test_groups_are_those_of_a_search_through_the_graph() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        shown = [tuple(rng.integers(0, 30, rng.integers(1, 4)).tolist()) for _ in range(25)]
        scenes = [str(one) if one < 3 else None for one in rng.integers(0, 8, 25)]
        group = list(range(25))
        changed = True
        while changed:
            changed = False
            for i in range(25):
                for j in range(i):
                    joined = set(shown[i]) & set(shown[j]) or (scenes[i] is not None and scenes[i] == scenes[j])
                    if joined and group[i] != group[j]:
                        low, high = sorted((group[i], group[j]))
                        group = [low if one == high else one for one in group]
                        changed = True
        found = image_groups(shown, scenes, 30)
        assert all((found[i] == found[j]) == (group[i] == group[j]) for i in range(25) for j in range(i))
