from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.made import context, digests, jsonl_source, png, recipe, row
from valr_ops.data import synthetic
from valr_ops.data.corpus import CorpusError, CorpusRecord, ImageReference, ImageStore, read_records
from valr_ops.data.curation import CurationError, build_cot_corpus, split_by_image
from valr_ops.recipe.recipe import Recipe
from valr_ops.store.artifacts import StageReport

NLVR = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "nlvr"


def built(folder: Path, made: Recipe) -> tuple[Path, StageReport]:
    synthetic.build_sources(context(folder, "sources", made))
    report = build_cot_corpus(context(folder, "cot_corpus", made, sources=folder / "sources"))
    return folder / "cot_corpus", report


def given(folder: Path, **data: Any) -> Recipe:
    return recipe({"mine": {"format": "jsonl", "path": str(folder)}}, **data)


def record(number: int, images: list[str], split: str = "train") -> CorpusRecord:
    shown = tuple(ImageReference(digest, "input", 8, 8) for digest in images)
    return CorpusRecord(f"m/{number}", "m", "CC0-1.0", split, "single_view", "q", "a", shown, ())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StageReport]:
    return built(tmp_path_factory.mktemp("drawn"), recipe())


def test_two_builds_give_the_same_bytes_and_all_drawn_records_are_kept(
    drawn: tuple[Path, StageReport], tmp_path: Path
) -> None:
    once, report = drawn
    again, _ = built(tmp_path, recipe())
    assert digests(once) == digests(again)
    assert (report.summary["records"], report.summary["rejected"], report.summary["test"]) == (96, 0, 16)
    assert all(check.passed for check in report.checks)
    assert set(report.plots) <= set(digests(once)) and report.report in digests(once)
    assert (once / "rejects.jsonl").read_text() == ""


def test_nothing_in_the_artifact_names_the_folder_it_was_made_in(drawn: tuple[Path, StageReport]) -> None:
    corpus = drawn[0]
    made_in = str(corpus.parent).encode()
    assert not [path for path in corpus.rglob("*") if path.is_file() and made_in in path.read_bytes()]
    assert list((corpus.parent / "cot_corpus.work").iterdir()) == []


def test_the_corpus_gives_back_texts_targets_and_pixels(drawn: tuple[Path, StageReport]) -> None:
    made, corpus = recipe(), drawn[0]
    read = {one.id: one for one in read_records(corpus)}
    store = ImageStore(corpus / "images.parquet")
    for number, scene in enumerate(synthetic.scenes(0, "scenes/train", 32, made.data.synthetic)):
        one = read[f"scenes/train/{number:05d}"]
        assert (one.answer, one.steps[-1].text) == (scene.answer, scene.sentence(scene.last_row))
        target = one.steps[-1].target
        assert target is not None and target.box is not None
        crop = store.load(one.images[target.image].digest, target.box)
        assert crop.tobytes() == scene.pixels[16 * scene.last_row : 16 * (scene.last_row + 1)].tobytes()
    assert sorted({image.digest for one in read.values() for image in one.images}) == list(store)
    assert len(read_records(corpus, "validation")) == 5  # of 96, five per cent
    with pytest.raises(CorpusError, match="has no image 00"):
        store.get("00")


def test_duplicates_benchmark_images_and_broken_records_are_named_in_the_rejects(tmp_path: Path) -> None:
    same_content = row(0, id="other")
    rows = [row(0), same_content, row(1, id="r0"), row(2), b"{", *(row(n) for n in range(3, 9))]
    folder = jsonl_source(tmp_path / "mine", train=rows, test=[row(2, id="t")])
    corpus, report = built(tmp_path, given(folder))
    rejects = [json.loads(line) for line in (corpus / "rejects.jsonl").read_text().splitlines()]
    assert [(one["id"], one["reason"], one["split"]) for one in rejects] == [
        ("mine/other", "duplicate_content", "train"),
        ("mine/r0", "duplicate_id", "train"),
        ("mine/r2", "benchmark_image", "train"),
        ("mine/train.jsonl line 5", "not_json", "train"),
    ]
    counts = json.loads((corpus / "report.json").read_text())["sources"]["mine"]
    assert (counts["read"], counts["kept"], counts["duplicates"]) == (11, 7, 2)
    assert counts["test"] == {"read": 1, "kept": 1, "rejected": {}, "duplicates": 0, "images": 1, "steps": 1}
    assert counts["read"] == counts["kept"] + sum(counts["rejected"].values())
    assert "mine/t" not in {one.id for one in read_records(corpus)}
    assert "benchmark_image" in report.tables["Rejected"]


def test_a_source_that_loses_too_much_stops_the_run_and_names_the_reasons(tmp_path: Path) -> None:
    bad = [row(number, answer="") for number in range(4)] + [b"{"] * 2
    folder = jsonl_source(tmp_path / "mine", train=[row(9), *bad])
    with pytest.raises(
        CurationError, match=r"keeps 1 of 7 train .*empty_answer 4 \(first: train.jsonl line 2"
    ) as error:
        built(tmp_path, given(folder))
    assert "not_json 2" in str(error.value)
    assert len((tmp_path / "cot_corpus.work" / "rejects.jsonl").read_text().splitlines()) == 6


def test_a_corpus_without_training_records_stops_the_run(tmp_path: Path) -> None:
    folder = jsonl_source(tmp_path / "mine", test=[row(0)])
    with pytest.raises(CurationError, match="no source has a training record: mine"):
        built(tmp_path, given(folder))


def test_records_of_a_validation_file_are_validation_records(tmp_path: Path) -> None:
    train = [row(number) for number in range(8)]
    folder = jsonl_source(tmp_path / "mine", train=train, validation=[row(0, question="And now?", id="v")])
    corpus, _ = built(tmp_path, given(folder, validation_fraction=0.0))
    assert [one.id for one in read_records(corpus, "validation")] == ["mine/r0", "mine/v"]


def test_text_of_a_record_stays_text_in_the_tables(tmp_path: Path) -> None:
    nasty = row(0, question="a | b\n<script>alert(1)</script>")
    _, report = built(tmp_path, given(jsonl_source(tmp_path / "mine", train=[nasty, row(1)])))
    assert "<script>" not in report.tables["First records"]
    assert all(line.count("|") == 5 for line in report.tables["First records"].splitlines())


def test_no_image_stands_on_both_sides_of_the_split() -> None:
    # A chain 0-1-2 through shared images, and loners.
    records = [record(0, ["a", "b"]), record(1, ["b", "c"]), record(2, ["d", "c"])]
    records += [record(number, [f"x{number}"]) for number in range(3, 40)]
    for seed in range(30):
        split = [one.split for one in split_by_image(records, 0.25, seed)]
        assert len({split[0], split[1], split[2]}) == 1
        assert 8 <= split.count("validation") <= 10


def test_the_split_depends_on_the_seed_and_not_on_the_order() -> None:
    records = [record(number, [f"x{number}"]) for number in range(40)]
    by_id = {one.id: one.split for one in split_by_image(records, 0.25, 0)}
    assert {one.id: one.split for one in split_by_image(records[::-1], 0.25, 0)} == by_id
    assert {one.id: one.split for one in split_by_image(records, 0.25, 1)} != by_id
    assert list(by_id.values()).count("validation") == 10


def test_one_group_of_images_is_never_torn_and_a_fraction_of_zero_takes_nothing() -> None:
    together = [record(number, ["a"]) for number in range(10)]
    apart = [record(number, [f"x{number}"]) for number in range(10)]
    assert {one.split for one in split_by_image(together, 0.5, 0)} == {"train"}
    assert {one.split for one in split_by_image(apart, 0.0, 0)} == {"train"}
    assert [one.split for one in split_by_image(apart, 0.01, 0)].count("validation") == 1


def test_an_image_of_many_records_is_stored_once(tmp_path: Path) -> None:
    folder = jsonl_source(tmp_path / "mine", train=[row(0, id=str(n), question=f"{n}?") for n in range(5)] + [row(1)])
    corpus, report = built(tmp_path, given(folder))
    assert (report.summary["records"], report.summary["images"]) == (6, 2)
    store = ImageStore(corpus)
    assert {store.get(digest) for digest in store} == {png(colour=(20 * n, 30, 30)) for n in (0, 1)}


@pytest.mark.skipif(not NLVR.is_dir(), reason="shared/data/nlvr is not here")
def test_nlvr_loses_only_duplicates_and_images_of_its_own_test_split(tmp_path: Path) -> None:
    corpus, report = built(tmp_path, given(NLVR))
    counts = json.loads((corpus / "report.json").read_text())["sources"]["mine"]
    assert counts["rejected"] == {"benchmark_image": 15, "duplicate_content": 3}
    assert (counts["kept"], counts["test"]["kept"]) == (1960, 990)
    assert report.checks[0].passed
