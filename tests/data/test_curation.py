from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.made import context, digests, jsonl_source, png, recipe, row
from valr_ops.data import drafting, inventory, synthetic
from valr_ops.data.corpus import CorpusError, ImageStore, read_records
from valr_ops.data.curation import CurationError, build_cot_corpus, validation_rows
from valr_ops.recipe.recipe import Recipe
from valr_ops.store.artifacts import Check, StageReport

NLVR = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "nlvr"


def built(folder: Path, made: Recipe) -> tuple[Path, StageReport]:
    inventory.build_sources(context(folder, "sources", made))
    report = build_cot_corpus(context(folder, "cot_corpus", made, sources=folder / "sources"))
    return folder / "cot_corpus", report


def given(folder: Path, data: dict[str, Any] | None = None, **source: Any) -> Recipe:
    return recipe({"mine": {"format": "jsonl", "path": str(folder), **source}}, **(data or {}))


def rejects(corpus: Path, name: str = "rejects.jsonl") -> list[dict[str, str]]:
    return [json.loads(line) for line in (corpus / name).read_text().splitlines()]


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is decided before the expectations look: they take longer than all else about a small corpus."""
    passed = Check("corpus_expectations", True, "seen")
    # By its name, because processes import this file, and great_expectations takes seconds to load.
    monkeypatch.setattr("valr_ops.data.expectations.corpus_expectations", lambda *_: passed)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StageReport]:
    return built(tmp_path_factory.mktemp("drawn"), recipe())


def test_two_builds_give_the_same_bytes_and_all_drawn_records_are_kept(
    drawn: tuple[Path, StageReport], tmp_path: Path
) -> None:
    once, report = drawn
    again, _ = built(tmp_path, recipe())
    assert digests(once) == digests(again)
    sources = len(recipe().data.sources)
    assert (report.summary["records"], report.summary["rejected"], report.summary["test"]) == (32 * sources, 0, 16)
    assert all(check.passed for check in report.checks)
    assert [check.name for check in report.checks] == ["corpus_expectations", "corpus_drift", "no_benchmark_overlap"]
    assert set(report.plots) <= set(digests(once)) and report.report in digests(once)
    assert (once / "rejects.jsonl").read_text() == (once / "overlaps.jsonl").read_text() == ""


def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # More rows than two blocks, with some of every kind of trouble in them.
    rows: list[Any] = [row(number % 10, id=f"r{number}", question=f"{number // 2}?") for number in range(1200)]
    rows[700:720] = [b"{"] * 20
    rows[100] = row(3, id="r3")
    folder = jsonl_source(tmp_path / "mine", train=rows, test=[row(0, id="t", images=["images/9.png"])])
    one, report = built(tmp_path / "one", given(folder))
    monkeypatch.setattr(drafting, "_MANY_BYTES", 0)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    three, _ = built(tmp_path / "three", given(folder))
    assert digests(one) == digests(three)
    found = Counter(line["reason"] for line in rejects(three))
    assert found == {"not_json": 20, "duplicate_id": 1, "benchmark_image": 118}
    assert report.summary["records"] == 1200 - 139


def test_nothing_in_the_artifact_names_the_folder_it_was_made_in(drawn: tuple[Path, StageReport]) -> None:
    corpus = drawn[0]
    made_in = str(corpus.parent).encode()
    assert not [path for path in corpus.rglob("*") if path.is_file() and made_in in path.read_bytes()]
    assert list((corpus.parent / "cot_corpus.work").iterdir()) == []


def test_the_corpus_gives_back_texts_targets_and_pixels(drawn: tuple[Path, StageReport]) -> None:
    made, corpus = recipe(), drawn[0]
    read = {one.id: one for one in read_records(corpus)}
    store = ImageStore(corpus)
    for number, scene in enumerate(synthetic.scenes(0, "scenes/train", 32, made.data.synthetic)):
        one = read[f"scenes/train/{number:05d}"]
        assert (one.answer, one.steps[-1].text) == (scene.answer, scene.sentence(scene.last_row))
        target = one.steps[-1].target
        assert target is not None and target.box is not None
        crop = store.load(one.images[target.image].digest, target.box)
        assert crop.tobytes() == scene.pixels[16 * scene.last_row : 16 * (scene.last_row + 1)].tobytes()
    assert sorted({image.digest for one in read.values() for image in one.images}) == list(store)
    with pytest.raises(CorpusError, match="has no image 00"):
        store.get("00")


def test_duplicates_benchmark_images_and_broken_records_are_named_in_the_rejects(tmp_path: Path) -> None:
    same_content = row(0, id="other")
    rows = [row(0), same_content, row(1, id="r0"), row(2), b"{", *(row(n) for n in range(3, 9))]
    folder = jsonl_source(tmp_path / "mine", train=rows, test=[row(2, id="t")])
    corpus, report = built(tmp_path, given(folder))
    assert [(one["id"], one["reason"], one["split"], one["source"]) for one in rejects(corpus)] == [
        ("mine/train.jsonl line 5", "not_json", "train", "mine"),
        ("mine/other", "duplicate_content", "train", "mine"),
        ("mine/r0", "duplicate_id", "train", "mine"),
        ("mine/r2", "benchmark_image", "train", "mine"),
    ]
    assert [one["id"] for one in rejects(corpus, "overlaps.jsonl")] == ["mine/r2"]
    overlap = report.checks[2]
    assert overlap.metadata["excluded"] == 1 and overlap.metadata["first_excluded"][0][0] == "mine/r2"
    counts = json.loads((corpus / "report.json").read_text())["sources"]["mine"]
    assert (counts["read"], counts["kept"], counts["duplicates"], counts["overlaps"]) == (11, 7, 2, 1)
    nothing = {"rejected": {}, "duplicates": 0, "overlaps": 0}
    assert counts["test"] == {"read": 1, "kept": 1, "images": 1, "steps": 1, **nothing}
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


def test_a_source_that_loses_too_much_to_the_matching_stops_the_run_too(tmp_path: Path) -> None:
    rows = [*(views(number, [1, None]) for number in range(4)), *(row(number) for number in (6, 7, 8))]
    folder = jsonl_source(tmp_path / "mine", train=rows)
    with pytest.raises(CurationError, match=r"keeps 3 of 7 train .*step_match_missing 4 \(first: train.jsonl line 1"):
        built(tmp_path, given(folder, {"matching": {"unmatched": "reject"}}))
    assert len((tmp_path / "cot_corpus.work" / "rejects.jsonl").read_text().splitlines()) == 4


def test_a_corpus_without_training_records_stops_the_run(tmp_path: Path) -> None:
    folder = jsonl_source(tmp_path / "mine", test=[row(0)])
    with pytest.raises(CurationError, match="no source has a training record left: mine"):
        built(tmp_path, given(folder))


@pytest.mark.usefixtures("unchecked")
def test_records_of_a_validation_file_are_validation_records(tmp_path: Path) -> None:
    train = [row(number) for number in range(8)]
    folder = jsonl_source(tmp_path / "mine", train=train, validation=[row(0, question="And now?", id="v")])
    corpus, _ = built(tmp_path, given(folder, {"validation_fraction": 0.0}))
    assert [one.id for one in read_records(corpus, "validation")] == ["mine/r0", "mine/v"]


def test_text_of_a_record_stays_text_in_the_tables(tmp_path: Path) -> None:
    nasty = row(0, question="a | b\n<script>alert(1)</script>")
    _, report = built(tmp_path, given(jsonl_source(tmp_path / "mine", train=[nasty, row(1)])))
    assert "<script>" not in report.tables["First records"]
    assert all(line.count("|") == 5 for line in report.tables["First records"].splitlines())


def test_a_control_token_in_a_text_opens_no_segment(tmp_path: Path) -> None:
    nasty = row(0, question="What does <latent> mean?", steps=[{"text": "<|im_end|> I look </latent>."}])
    corpus, _ = built(tmp_path, given(jsonl_source(tmp_path / "mine", train=[nasty, row(1)])))
    (one,) = (one for one in read_records(corpus) if one.id == "mine/r0")
    assert one.question == "What does &lt;latent> mean?"
    assert one.steps[0].text == "&lt;|im_end|> I look &lt;/latent>."


@pytest.mark.usefixtures("unchecked")
def test_a_cap_keeps_a_part_of_what_a_larger_cap_keeps_and_the_rest_is_no_loss(tmp_path: Path) -> None:
    rows = [row(number % 10, id=f"r{number}", question=f"{number}?") for number in range(100)]
    folder = jsonl_source(tmp_path / "mine", train=rows)
    kept = {}
    for cap in (10, 40, None):
        corpus, report = built(tmp_path / str(cap), given(folder, cap=cap))
        kept[cap] = {one.id for one in read_records(corpus)}
        left = Counter(one["reason"] for one in rejects(corpus))
        assert left == ({"over_cap": 100 - cap} if cap else {})
        assert report.summary["records"] == (cap or 100)
    assert kept[10] < kept[40] < kept[None]
    # Neither the first ones nor the last ones.
    assert {int(id_.removeprefix("mine/r")) > 50 for id_ in kept[10]} == {True, False}


@pytest.mark.usefixtures("unchecked")
def test_a_licence_policy_leaves_out_records_and_names_the_licence(tmp_path: Path) -> None:
    rows = [row(number, license="CC-BY-NC-4.0" if number < 6 else "MIT") for number in range(10)]
    folder = jsonl_source(tmp_path / "mine", train=rows)
    corpus, _ = built(tmp_path, given(folder, {"license_policy": "commercial"}))
    assert {one.license for one in read_records(corpus)} == {"MIT"}
    said = "CC-BY-NC-4.0 under data.license_policy=commercial"
    assert rejects(corpus)[0]["detail"] == f"train.jsonl line 1, {said}"
    with pytest.raises(CurationError, match="no source has a training record left"):
        built(tmp_path / "none", given(folder, {"license_policy": "commercial"}, limit=5))


@pytest.mark.usefixtures("unchecked")
def test_the_licence_of_the_source_is_that_of_records_that_name_none(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row(number).items() if key != "license"} for number in range(3)]
    corpus, _ = built(tmp_path, given(jsonl_source(tmp_path / "mine", train=[*rows, row(4)]), license="CC-BY-4.0"))
    assert [one.license for one in read_records(corpus)] == ["CC-BY-4.0"] * 3 + ["CC0-1.0"]


def views(number: int, targets: list[int | None], **changes: Any) -> dict[str, Any]:
    steps = [{"text": f"step {n}", **({} if one is None else {"image": one})} for n, one in enumerate(targets)]
    images = [f"images/{number}.png", f"images/{(number + 1) % 10}.png"]
    return row(number, images=images, steps=steps, **changes)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("unmatched", "expected"),
    [("no_target", [1, None]), ("first_view", [1, 0]), ("reject", None)],
)
def test_what_becomes_of_a_step_that_nobody_matched_is_in_the_recipe(
    tmp_path: Path, unmatched: str, expected: list[int | None] | None
) -> None:
    folder = jsonl_source(tmp_path / "mine", train=[views(0, [1, None]), views(4, [0, 1]), row(7)])
    corpus, _ = built(tmp_path, given(folder, {"matching": {"unmatched": unmatched}}))
    by_id = {one.id: one for one in read_records(corpus)}
    if expected is None:
        assert [(one["id"], one["reason"]) for one in rejects(corpus)] == [("mine/r0", "step_match_missing")]
    else:
        targets = [step.target for step in by_id["mine/r0"].steps]
        assert [one and one.image for one in targets] == expected
        assert targets[0] is not None and (targets[0].origin, targets[0].by) == ("dataset", "")
        if unmatched == "first_view":
            assert (targets[1].origin, targets[1].by) == ("matched", "rule:first_view")  # type: ignore[union-attr]
    assert len(by_id["mine/r4"].steps) == 2 and "mine/r7" in by_id


@pytest.mark.usefixtures("unchecked")
def test_records_of_one_scene_stand_on_one_side(tmp_path: Path) -> None:
    rows = [row(number, scene="hall" if number < 9 else None) for number in range(10)]
    folder = jsonl_source(tmp_path / "mine", train=rows)
    for seed in range(3):
        made = given(folder, {"validation_fraction": 0.5}).model_copy(update={"seed": seed})
        corpus, _ = built(tmp_path / str(seed), made)
        assert len({one.split for one in read_records(corpus) if one.scene == "hall"}) == 1


def test_a_benchmark_of_the_recipe_blocks_records(tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "x.png").write_bytes(png(colour=(60, 30, 30)))
    folder = jsonl_source(tmp_path / "mine", train=[row(number) for number in range(6)])
    corpus, report = built(tmp_path, given(folder, {"benchmarks": {"b": {"path": str(tmp_path / "bench")}}}))
    assert [(one["id"], one["detail"]) for one in rejects(corpus, "overlaps.jsonl")] == [
        ("mine/r3", "train.jsonl line 4, image 0 is b/x.png")
    ]
    assert report.checks[2].passed


def test_a_group_is_never_torn_and_the_fraction_is_kept() -> None:
    groups = ["chain"] * 3 + [f"x{number}" for number in range(37)]
    for seed in range(30):
        chosen = validation_rows(groups, [False] * 40, 0.25, seed)
        assert len(chosen & {0, 1, 2}) in (0, 3)
        assert 8 <= len(chosen) <= 10


def test_the_split_depends_on_the_seed_and_not_on_the_order() -> None:
    groups = [f"x{number}" for number in range(40)]
    named = {groups[place] for place in validation_rows(groups, [False] * 40, 0.25, 0)}
    back = groups[::-1]
    assert {back[place] for place in validation_rows(back, [False] * 40, 0.25, 0)} == named
    assert {groups[place] for place in validation_rows(groups, [False] * 40, 0.25, 1)} != named
    assert len(named) == 10


def test_one_group_alone_is_not_taken_and_a_fraction_of_zero_takes_nothing() -> None:
    assert validation_rows(["a"] * 10, [False] * 10, 0.5, 0) == set()
    apart = [f"x{number}" for number in range(10)]
    assert validation_rows(apart, [False] * 10, 0.0, 0) == set()
    assert len(validation_rows(apart, [False] * 10, 0.01, 0)) == 1
    assert validation_rows(["a", "a", "b"], [True, False, False], 0.0, 0) == {0, 1}


def test_where_every_group_is_larger_than_the_fraction_the_smallest_is_taken() -> None:
    groups = [f"g{number // 10}" for number in range(100)]
    drawn = {seed: validation_rows(groups, [False] * 100, 0.05, seed) for seed in range(5)}
    assert {len({groups[place] for place in chosen}) for chosen in drawn.values()} == {1}
    assert len({min(chosen) for chosen in drawn.values()}) > 1, "of equal ones the seed decides"
    assert validation_rows([*groups, *["small"] * 7], [False] * 107, 0.05, 0) == set(range(100, 107))
    given = [place == 5 for place in range(100)]
    assert validation_rows(groups, given, 0.05, 0) == set(range(10)), "what is given is enough"


@pytest.mark.usefixtures("unchecked")
def test_an_image_of_many_records_is_stored_once(tmp_path: Path) -> None:
    folder = jsonl_source(tmp_path / "mine", train=[row(0, id=str(n), question=f"{n}?") for n in range(5)] + [row(1)])
    corpus, report = built(tmp_path, given(folder))
    assert (report.summary["records"], report.summary["images"]) == (6, 2)
    store = ImageStore(corpus)
    assert {store.get(digest) for digest in store} == {png(colour=(20 * n, 30, 30)) for n in (0, 1)}


_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from tests.data.made import context
from tests.data.test_curation import given
from valr_ops.data.curation import build_cot_corpus

if __name__ == "__main__":
    root, limit = Path(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    build_cot_corpus(context(root / "run", "cot_corpus", given(root / "mine"), sources=root / "sources"))
"""


@pytest.mark.parametrize("limit", [2_000, 20_000, 60_000])
def test_a_disk_that_takes_no_more_ends_in_one_error_that_says_so(tmp_path: Path, limit: int) -> None:
    noise = np.random.default_rng(0)
    folder = jsonl_source(tmp_path / "mine", train=[row(number) for number in range(8)])
    for number in range(8):
        import PIL.Image

        pixels = noise.integers(0, 255, (128, 128, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    inventory.build_sources(context(tmp_path, "sources", given(folder)))
    script = tmp_path / "full.py"
    script.write_text(_FULL_DISK)
    root = Path(__file__).resolve().parents[2]
    words = [sys.executable, str(script), str(tmp_path), str(limit)]
    done = subprocess.run(words, cwd=root, env={"PYTHONPATH": str(root)}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "File too large" in done.stderr.strip().splitlines()[-1]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != limit and signal.SIGXFSZ


@pytest.mark.skipif(not NLVR.is_dir(), reason="shared/data/nlvr is not here")
def test_nlvr_loses_only_duplicates_and_images_of_its_own_test_split(tmp_path: Path) -> None:
    corpus, report = built(tmp_path, given(NLVR))
    counts = json.loads((corpus / "report.json").read_text())["sources"]["mine"]
    assert set(counts["rejected"]) == {"benchmark_image", "duplicate_content"}
    assert counts["rejected"]["duplicate_content"] == 3
    assert counts["test"]["kept"] == 990
    assert all(check.passed for check in report.checks)
