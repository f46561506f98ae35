"""The stage gives training each target's features, stored or to be computed, the same bytes every time, never stale."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.teachers.inputs import (
    CLASSES,
    Row,
    boxes_corpus,
    computed,
    contents,
    corpus,
    damaged,
    image,
    recipe_with,
    stage_context,
    teacher_recipe,
    write_rows,
)
from valr_ops import runner
from valr_ops.__main__ import main
from valr_ops.data.corpus import ImageStore
from valr_ops.data.sequences import Region
from valr_ops.model.qwen import save_model
from valr_ops.recipe.recipe import Recipe, TeacherRecipe, override
from valr_ops.stages import stage
from valr_ops.store.artifacts import StageContext, StageReport, State, write_manifest
from valr_ops.store.progress import Progress
from valr_ops.teachers import extraction, features
from valr_ops.teachers.encoders import Teacher, load_teacher, read_teacher
from valr_ops.teachers.features import (
    FeatureError,
    build_teacher_features,
    open_features,
    read_wanted,
    rejected_records,
)
from valr_ops.teachers.online import OnlineFeatures
from valr_ops.teachers.stored import FeatureStore, is_whole
from valr_ops.teachers.weights import changed_weights


@pytest.fixture(scope="module")
def dinov3(tmp_path_factory: pytest.TempPathFactory) -> TeacherRecipe:
    return teacher_recipe("dinov3", tmp_path_factory.mktemp("dinov3"))


@pytest.fixture(scope="module")
def recipe(dinov3: TeacherRecipe) -> Recipe:
    return recipe_with("dinov3", dinov3)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Twelve images with four targets each."""
    return boxes_corpus(tmp_path_factory.mktemp("boxes"))


@pytest.fixture(scope="module")
def built(
    inputs: dict[str, Path], recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> tuple[StageReport, Path]:
    """Report and artifact of a run that nothing disturbs."""
    place = tmp_path_factory.mktemp("built")
    return build_teacher_features(stage_context(inputs, place, recipe)), place / "out"


@pytest.fixture
def drawn() -> None:
    """For tests of the picture, which takes longer than all else."""


@pytest.fixture(autouse=True)
def _undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(features, "_draw_features", lambda *_: None)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four shards of twelve targets, of which each batch has five."""
    monkeypatch.setattr(extraction, "SHARD_BYTES", 12 * 512)
    monkeypatch.setattr(Teacher, "batch_images", property(lambda _: 5, lambda *_: None), raising=False)


class Listening(Progress):
    """Keeps what it is told; in `interrupt_after` targets, stops the run as Ctrl-C would."""

    def __init__(self, interrupt_after: int | None = None) -> None:
        self.said: list[str] = []
        self.logged: dict[int, Mapping[str, float]] = {}
        self.already_done = self.total = -1
        self._interrupt_after = interrupt_after

    def say(self, message: str) -> None:
        self.said.append(message)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.logged[step] = metrics

    def track(self, items: Iterable[Any], description: str, total: int | None = None, done: int = 0) -> Iterator[Any]:
        self.already_done, self.total = done, total or -1
        for count, item in enumerate(items):
            if count == self._interrupt_after:
                raise KeyboardInterrupt
            yield item


def wanted(inputs: dict[str, Path]) -> list[Region]:
    return read_wanted(inputs["latent_corpus"], joint=False).targets


# -------------------------------------------------------------------------------------------------------- the artifact


def test_every_distinct_target_is_stored_with_the_features_of_its_own_crop(
    inputs: dict[str, Path], built: tuple[StageReport, Path], dinov3: TeacherRecipe
) -> None:
    report, artifact = built
    store, images = FeatureStore(artifact), ImageStore(inputs["cot_corpus"])
    teacher = load_teacher("dinov3", dinov3, seed=0)
    assert list(store) == wanted(inputs) and len(store) == 48
    assert (store.dim, store.fingerprint, store.teacher) == (16, teacher.fingerprint, "dinov3")
    exact = teacher([images.load(target.digest, target.box) for target in store])
    stored = torch.stack(store.features(list(store)))
    assert stored.dtype == torch.bfloat16 and torch.equal(stored, exact.bfloat16())
    (check,) = report.checks
    assert check.name == "features_are_whole" and check.passed and "all 48 targets" in check.detail
    assert report.summary["targets"] == 48 and report.summary["images"] == 12 and report.summary["rejected"] == 0
    assert report.timings["images_per_second"] > 0 and report.plots == ("pca.png",)


def test_the_targets_are_counted_as_often_as_an_epoch_asks_for_them(inputs: dict[str, Path]) -> None:
    assert read_wanted(inputs["latent_corpus"], joint=False).visits == 96


@pytest.mark.usefixtures("drawn")
def test_the_same_inputs_give_the_same_bytes_and_the_same_summary(
    inputs: dict[str, Path], recipe: Recipe, built: tuple[StageReport, Path], tmp_path: Path
) -> None:
    again = build_teacher_features(stage_context(inputs, tmp_path, recipe))
    assert contents(tmp_path / "out") == contents(built[1])
    assert again.summary == built[0].summary and again.tables == built[0].tables and again.checks == built[0].checks


def test_the_artifact_is_few_files_and_names_no_place_of_this_machine(
    built: tuple[StageReport, Path], dinov3: TeacherRecipe, inputs: dict[str, Path]
) -> None:
    written = contents(built[1])
    assert set(written) == {"features-00000.safetensors", "index.json", "pca.png", "targets.parquet"}
    for place in (dinov3.weights, str(inputs["cot_corpus"]), str(built[1])):
        assert place and not any(str(Path(place).parent).encode() in data for data in written.values())
    index = json.loads(written["index.json"])
    expected = {"mode": "stored", "storage": "bfloat16", "views": "single", "license": dinov3.license, "grid": [4, 4]}
    assert expected.items() <= index.items()
    (shard,) = index["shards"]
    assert shard["file"] == "features-00000.safetensors" and shard["bytes"] == len(written[shard["file"]])


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_what_storage_costs_is_measured_and_published(
    inputs: dict[str, Path], dinov3: TeacherRecipe, tmp_path: Path, storage: str
) -> None:
    recipe = recipe_with("dinov3", dinov3.model_copy(update={"storage": storage}))
    report = build_teacher_features(stage_context(inputs, tmp_path, recipe))
    assert report.checks[0].passed and 0.999 <= report.checks[0].metadata["min_cosine_to_computed"] <= 1
    assert report.summary["bytes_per_target"] == 16 * (16 * 2 if storage == "float16" else 16 + 4)
    assert FeatureStore(tmp_path / "out").index["storage"] == storage


def test_a_teacher_trained_on_drawn_scenes_is_kept_and_gives_the_stored_features(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    trained = TeacherRecipe.model_validate({**CLASSES["dinov3"], "pretraining_steps": 2, "features": "stored"})
    report = build_teacher_features(stage_context(inputs, tmp_path, recipe_with("dinov3", trained)))
    store, images = FeatureStore(tmp_path / "out"), ImageStore(inputs["cot_corpus"])
    target = list(store)[5]
    again = read_teacher(tmp_path / "out")([images.load(target.digest, target.box)])[0]
    torch.testing.assert_close(store.get(target).float(), again, rtol=1e-2, atol=1e-2)
    assert 0 <= report.summary["held_out_patch_accuracy"] <= 1  # type: ignore[operator]


def test_the_base_models_own_tower_is_a_teacher_like_any_other(inputs: dict[str, Path], tmp_path: Path) -> None:
    base_model = tmp_path / "base_model"
    save_model(tiny.model(seed=3), tiny.processor(), base_model, {})
    own = tiny.recipe().model_copy(update={"teachers": recipe_of("qwen")})
    context = stage_context({**inputs, "base_model": base_model}, tmp_path, own, teacher="qwen")
    report = build_teacher_features(context)
    store = FeatureStore(tmp_path / "out")
    assert report.checks[0].passed and (len(store), store.dim) == (48, 32)
    target = list(store)[5]
    crop = ImageStore(inputs["cot_corpus"]).load(target.digest, target.box)
    teacher = load_teacher("qwen", own.teachers["qwen"], seed=0, base_model=base_model)
    torch.testing.assert_close(store.get(target).float(), teacher([crop])[0], rtol=1e-2, atol=1e-2)
    assert not (tmp_path / "out/teacher.safetensors").exists(), "its weights are kept in base_model"


def recipe_of(name: str) -> dict[str, TeacherRecipe]:
    from valr_ops.recipe import recipes

    return {name: recipes.tiny().teachers[name]}


def test_one_target_is_enough(recipe: Recipe, tmp_path: Path) -> None:
    one = image(0)
    inputs = corpus(tmp_path / "in", [one], [((one.digest,), [(one.digest, None)])])
    assert build_teacher_features(stage_context(inputs, tmp_path, recipe)).checks[0].passed
    assert len(FeatureStore(tmp_path / "out")) == 1


def test_joint_features_are_those_of_scenes(tmp_path: Path) -> None:
    pi3, drawn = teacher_recipe("pi3", tmp_path / "pi3"), [image(seed, 56, 56) for seed in range(3)]
    digests = tuple(one.digest for one in drawn)
    rows: list[Row] = [(digests, [(digest, None) for digest in digests]), ((digests[0],), [(digests[0], None)])]
    inputs = corpus(tmp_path / "in", drawn, rows)
    report = build_teacher_features(stage_context(inputs, tmp_path, recipe_with("pi3", pi3), teacher="pi3"))
    store, teacher = FeatureStore(tmp_path / "out"), load_teacher("pi3", pi3, seed=0)
    views = tuple(sorted(digests))
    scene = teacher.joint(teacher.squash([ImageStore(inputs["cot_corpus"]).load(view) for view in views])[None])[0]
    together = torch.stack(store.features([Region(view, None, views) for view in views]))
    torch.testing.assert_close(together.float(), scene, rtol=1e-2, atol=1e-2)
    alone = teacher([ImageStore(inputs["cot_corpus"]).load(digests[0])])[0]
    torch.testing.assert_close(store.get(Region(digests[0])).float(), alone, rtol=1e-2, atol=1e-2)
    assert (report.summary["targets"], report.summary["joint_targets"], report.summary["images"]) == (4, 3, 3)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "16 not finite"),
        (1.0, "16 the same at every patch"),
        (1e5, "16 not finite, or larger than float1"),
    ],
    ids=["nan", "constant", "overflow"],
)
def test_spoiled_features_are_not_published(
    inputs: dict[str, Path],
    dinov3: TeacherRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    value: float,
    message: str,
) -> None:
    honest = Teacher.features

    def spoiled(self: Teacher, squashed: Tensor) -> Tensor:
        result = honest(self, squashed)
        result[::3] = value
        return result

    monkeypatch.setattr(Teacher, "features", spoiled)
    storage = "float16" if value == 1e5 else "bfloat16"
    recipe = recipe_with("dinov3", dinov3.model_copy(update={"storage": storage}))
    (check,) = build_teacher_features(stage_context(inputs, tmp_path, recipe)).checks
    assert not check.passed and message in check.detail and "look at the weights of teachers.dinov3" in check.detail


def test_storage_that_turns_features_away_is_not_published(
    inputs: dict[str, Path], dinov3: TeacherRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Teacher.features

    monkeypatch.setattr(Teacher, "features", lambda self, squashed: 1e-7 * honest(self, squashed))
    for storage, passed in (("float16", False), ("bfloat16", True)):
        recipe = recipe_with("dinov3", dinov3.model_copy(update={"storage": storage}))
        (check,) = build_teacher_features(stage_context(inputs, tmp_path / storage, recipe)).checks
        assert check.passed == passed
        assert passed or "0.999; set teachers.dinov3.storage to bfloat16" in check.detail


def test_a_box_outside_of_its_image_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    one = image(0)
    inputs = corpus(tmp_path / "in", [one], [((one.digest,), [(one.digest, (0, 0, 65, 16))])])
    with pytest.raises(FeatureError, match=r"box \[0, 0, 65, 16\] of image .* lies outside of 64 x 64 px"):
        build_teacher_features(stage_context(inputs, tmp_path, recipe))


def test_a_corpus_without_targets_is_refused(recipe: Recipe, inputs: dict[str, Path], tmp_path: Path) -> None:
    write_rows(tmp_path / "latent_corpus", [((image(0).digest,), [None]), ((image(0).digest,), [])])
    without = {**inputs, "latent_corpus": tmp_path / "latent_corpus"}
    with pytest.raises(FeatureError, match=r"no segment in .* has a target"):
        build_teacher_features(stage_context(without, tmp_path, recipe))


def test_a_teacher_that_the_recipe_does_not_have_is_named(
    recipe: Recipe, inputs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(FeatureError, match=r"needs teachers.dinov9, but the recipe has clip, dinov2, dinov3,"):
        build_teacher_features(stage_context(inputs, tmp_path, recipe, teacher="dinov9"))


def test_an_image_that_cannot_be_decoded_is_named_with_its_records_and_the_rest_is_made(
    recipe: Recipe, tmp_path: Path
) -> None:
    drawn = [image(0), damaged(1), image(2)]
    good, bad, other = (one.digest for one in drawn)
    rows: list[Row] = [
        ((good,), [(good, None)]),
        ((bad,), [(bad, None), (bad, (0, 0, 8, 8))]),
        ((good, bad), [(good, None)]),
        ((other,), [(other, None), None, (bad, None)]),
        ((bad,), [None]),
    ]
    listening = Listening()
    context = stage_context(corpus(tmp_path / "in", drawn, rows), tmp_path, recipe, progress=listening)
    report = build_teacher_features(context)
    store = FeatureStore(tmp_path / "out")
    assert report.checks[0].passed and report.summary["targets"] == 4 and report.summary["rejected"] == 2
    assert set(store) == {Region(good), Region(other)}
    assert store.rejected == [Region(bad), Region(bad, (0, 0, 8, 8))]
    lines = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert [(line["id"], line["source"], line["reason"]) for line in lines] == [
        ("scenes/1", "scenes", "image_unreadable"),
        ("scenes/1", "scenes", "image_unreadable"),
        ("scenes/3", "scenes", "image_unreadable"),
    ]
    assert lines[1]["detail"].startswith(f"{bad[:12]}[0, 0, 8, 8]: OSError: ") and "truncated" in lines[1]["detail"]
    assert any("2 targets have no features" in said for said in listening.said)
    folders = {"teacher_features_dinov3": tmp_path / "out", "teacher_features_pi3": tmp_path}
    assert rejected_records(folders, ["dinov3", "pi3"]) == {"scenes/1", "scenes/3"}
    with pytest.raises(FeatureError, match=rf"no features of {bad[:12]}"):
        store.get(Region(bad))


def test_a_view_that_cannot_be_decoded_costs_the_records_of_its_scene(tmp_path: Path) -> None:
    drawn = [image(0, 56, 56), damaged(1), image(2, 56, 56)]
    good, bad, other = (one.digest for one in drawn)
    rows: list[Row] = [((good, bad), [(good, None)]), ((good, other), [(good, None)]), ((good,), [(good, None)])]
    pi3 = recipe_with("pi3", teacher_recipe("pi3", tmp_path / "pi3"))
    build_teacher_features(stage_context(corpus(tmp_path / "in", drawn, rows), tmp_path, pi3, teacher="pi3"))
    assert rejected_records({"teacher_features_pi3": tmp_path / "out"}, ["pi3"]) == {"scenes/0"}
    assert FeatureStore(tmp_path / "out").rejected == [Region(good, None, tuple(sorted((good, bad))))]


def test_a_corpus_of_images_that_cannot_be_decoded_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    bad = damaged(1)
    inputs = corpus(tmp_path / "in", [bad], [((bad.digest,), [(bad.digest, None)])])
    with pytest.raises(FeatureError, match=rf"no image of 1 targets can be decoded \(first {bad.digest[:12]}\); make"):
        build_teacher_features(stage_context(inputs, tmp_path, recipe))


# ------------------------------------------------------------------------------------------------- interrupted, shared


@pytest.fixture
def whole(
    inputs: dict[str, Path], recipe: Recipe, small_shards: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[StageReport, dict[str, bytes]]:
    """Report and files of an undisturbed run with small shards."""
    place = tmp_path_factory.mktemp("whole")
    report = build_teacher_features(stage_context(inputs, place, recipe))
    return report, contents(place / "out")


def test_an_interrupted_run_goes_on_from_its_finished_shards_to_the_same_bytes(
    inputs: dict[str, Path],
    recipe: Recipe,
    whole: tuple[StageReport, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The error is still at hand below, as in a debugger; nothing may be locked or open because of it.
    with pytest.raises(KeyboardInterrupt) as interruption:
        build_teacher_features(stage_context(inputs, tmp_path, recipe, progress=Listening(interrupt_after=31)))
    assert not contents(tmp_path / "out"), "nothing is put into the artifact before all shards are there"
    (finished,) = (tmp_path / "work").iterdir()
    kept = [path for path in finished.glob("*.safetensors") if is_whole(path)]
    assert 1 <= len(kept) <= 2 and not list(finished.glob("*.part"))
    counts, resumed = computed(monkeypatch), Listening()
    report = build_teacher_features(stage_context(inputs, tmp_path, recipe, progress=resumed))
    assert (resumed.already_done, resumed.total) == (12 * len(kept), 48)
    assert sum(counts) == 48 - 12 * len(kept) == max(resumed.logged)
    assert len([name for name in contents(tmp_path / "out") if name.startswith("features-")]) == 4
    assert contents(tmp_path / "out") == whole[1] and report.summary == whole[0].summary
    assert interruption.traceback


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("change", ["weights", "image_pixels", "precision", "storage"])
def test_shards_of_another_teacher_are_not_used(
    inputs: dict[str, Path], recipe: Recipe, dinov3: TeacherRecipe, tmp_path: Path, monkeypatch: Any, change: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        build_teacher_features(stage_context(inputs, tmp_path, recipe, progress=Listening(interrupt_after=40)))
    changes: dict[str, Any] = {"image_pixels": 32, "precision": "bfloat16", "storage": "float16"}
    changed = dinov3.model_copy(update={change: changes.get(change)})
    if change == "weights":
        changed = teacher_recipe("dinov3", tmp_path / "other", seed=1)
    listening, counts = Listening(), computed(monkeypatch)
    context = stage_context(inputs, tmp_path, recipe_with("dinov3", changed), progress=listening)
    build_teacher_features(context)
    assert listening.already_done == 0 and sum(counts) >= 48
    assert len(list((tmp_path / "work").iterdir())) == 1, "the others are removed: at scale paper they fill the disk"


def test_joint_and_single_views_are_different_artifacts(tmp_path: Path) -> None:
    pi3, drawn = teacher_recipe("pi3", tmp_path / "pi3"), [image(seed, 56, 56) for seed in range(2)]
    digests = tuple(one.digest for one in drawn)
    inputs = corpus(tmp_path / "in", drawn, [(digests, [(digest, None) for digest in digests])])
    listening = Listening()
    for views in ("joint", "single"):
        recipe = recipe_with("pi3", pi3.model_copy(update={"views": views}))
        context = stage_context(inputs, tmp_path, recipe, teacher="pi3", progress=listening)
        build_teacher_features(replace(context, out=fresh(tmp_path / views)))
        assert listening.already_done == 0
    shards = [contents(tmp_path / views)["features-00000.safetensors"] for views in ("joint", "single")]
    assert shards[0] != shards[1]


def fresh(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_parts_make_shards_that_a_run_only_puts_together(
    inputs: dict[str, Path],
    recipe: Recipe,
    whole: tuple[StageReport, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = computed(monkeypatch)
    context = stage_context(inputs, tmp_path, recipe)
    report = build_teacher_features(replace(context, part=(1, 2)))
    assert report.summary == {"targets": 48} and not contents(tmp_path / "out")
    assert build_teacher_features(replace(context, part=(0, 2))).summary == {"targets": 0}, "part 1 did all there was"
    assert sum(counts) == 48
    assert build_teacher_features(context).checks[0].passed
    assert sum(counts) == 48 and contents(tmp_path / "out") == whole[1]


@pytest.mark.parametrize(("part", "first"), [((0, 2), 0), ((1, 2), 2), ((3, 4), 3), ((1, 3), 1)])
@pytest.mark.usefixtures("small_shards")
def test_a_part_begins_with_its_own_shards(
    inputs: dict[str, Path], recipe: Recipe, tmp_path: Path, part: tuple[int, int], first: int
) -> None:
    context = stage_context(inputs, tmp_path, recipe, progress=Listening(interrupt_after=29))
    with pytest.raises(KeyboardInterrupt):
        build_teacher_features(replace(context, part=part))
    shards = extraction.plan(wanted(inputs), load_teacher("dinov3", recipe.teachers["dinov3"], seed=0))
    (finished,) = context.work.iterdir()
    there = [is_whole(extraction.finished_path(finished, shard)) for shard in shards]
    assert there[first] and sum(there) < 4


def test_a_part_of_features_that_may_be_online_is_refused(
    inputs: dict[str, Path], recipe: Recipe, tmp_path: Path
) -> None:
    context = stage_context(inputs, tmp_path, override(recipe, {"teachers.dinov3.features": "auto"}))
    with pytest.raises(FeatureError, match=r"teachers.dinov3.features=auto; set it to stored, so that all parts agree"):
        build_teacher_features(replace(context, part=(0, 2)))


class WaitingForTheOther(Progress):
    """Lets this process go on from its first batch when another one has finished a shard."""

    def __init__(self, work: Path) -> None:
        self._work = work

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for _ in range(1200):
            if list(self._work.rglob("*.safetensors")):
                return
            threading.Event().wait(0.05)
        raise AssertionError("no other process finished a shard within a minute")


@pytest.mark.parametrize("two", [{"runtime.processes": 2}, {"runtime.processes": 4, "cluster.nodes": 2}])
def test_two_processes_of_a_node_give_the_same_bytes_as_one(
    two: dict[str, int],
    inputs: dict[str, Path],
    recipe: Recipe,
    whole: tuple[StageReport, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fork = multiprocessing.get_context("fork")
    started: list[StageContext] = []

    def process(target: Any, args: tuple[StageContext], daemon: bool) -> Any:
        # A forked process shares the small shards of this test and begins at once; a spawned one is given a copy.
        started.append(pickle.loads(pickle.dumps(args[0])))
        return fork.Process(target=target, args=(started[0],), daemon=daemon)

    monkeypatch.setattr(features.multiprocessing.get_context("spawn"), "Process", process)
    counts = computed(monkeypatch)
    context = stage_context(inputs, tmp_path, override(recipe, two))
    report = build_teacher_features(replace(context, progress=WaitingForTheOther(context.work)))
    assert contents(tmp_path / "out") == whole[1] and report.summary == whole[0].summary
    assert 12 <= sum(counts) <= 36, "the other one computed the rest"
    assert [one.part for one in started] == [(1, 2)] and not multiprocessing.active_children()


# --------------------------------------------------------------------------------------------------- stored or online


def online(recipe: Recipe, **changes: Any) -> Recipe:
    return override(recipe, {"teachers.dinov3.features": "online", **changes})


@pytest.mark.usefixtures("drawn")
def test_an_online_artifact_describes_the_teacher_and_stores_nothing(
    inputs: dict[str, Path], recipe: Recipe, built: tuple[StageReport, Path], tmp_path: Path
) -> None:
    listening = Listening()
    report = build_teacher_features(stage_context(inputs, tmp_path, online(recipe), progress=listening))
    written = contents(tmp_path / "out")
    assert set(written) == {"index.json", "pca.png"}
    index, stored = json.loads(written["index.json"]), json.loads(contents(built[1])["index.json"])
    assert (index["mode"], index["storage"], index["shards"]) == ("online", None, [])
    assert {name for name in index if index[name] != stored[name]} == {"mode", "storage", "shards"}
    assert report.checks[0].passed and report.summary["features"] == "online" and report.summary["targets"] == 48
    assert any("features are online, as the recipe says; 48 images" in said for said in listening.said)
    with pytest.raises(FeatureError, match=r"features of out are computed online; none are stored"):
        FeatureStore(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "mode", "because"),
    [
        ({"runtime.feature_bytes_per_second": 1.0}, "online", "the cheaper way"),
        ({"runtime.feature_bytes_per_second": 1e15}, "stored", "the cheaper way"),
        (
            {"runtime.feature_bytes_per_second": 1e15, "runtime.feature_bytes": 48 * 512 - 1},
            "online",
            "would be larger",
        ),
        ({"runtime.feature_bytes_per_second": 1e15, "stage2.epochs": 0.1}, "online", "the cheaper way"),
        (
            {"runtime.feature_bytes_per_second": 1e15, "stage2.epochs": 0.1, "teachers.dinov3.trainings": 10},
            "stored",
            "",
        ),
    ],
)
def test_the_choice_is_made_by_measured_numbers_and_printed_with_them(
    inputs: dict[str, Path],
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    mode: str,
    because: str,
) -> None:
    monkeypatch.setattr(features, "_MEASURED_SECONDS", 0.0)
    listening = Listening()
    recipe = override(recipe, {"teachers.dinov3.features": "auto", "stage2.epochs": 4.0, **changes})
    report = build_teacher_features(stage_context(inputs, tmp_path, recipe, progress=listening))
    (said,) = (one for one in listening.said if "images/s" in one)
    assert said.startswith(f"dinov3: features are {mode}, ") and because in said and "48 images, 2.46e-05 GB" in said
    assert report.summary["features"] == mode == json.loads(contents(tmp_path / "out")["index.json"])["mode"]
    assert report.timings["online_seconds"] > 0 and report.timings["stored_seconds"] > 0


def test_a_measurement_takes_whole_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_MEASURED_SECONDS", 0.0)
    drawn = [image(seed, 56, 56) for seed in range(10)]
    digests = tuple(one.digest for one in drawn)
    inputs = corpus(tmp_path / "in", drawn, [(digests, [(digest, None) for digest in digests])])
    pi3 = teacher_recipe("pi3", tmp_path / "pi3", features="auto")
    asked: list[int] = []
    honest = extraction.Extractor.batches
    monkeypatch.setattr(
        extraction.Extractor,
        "batches",
        lambda self, groups: honest(self, [asked.append(len(one)) or one for one in groups]),  # type: ignore[func-returns-value]
    )
    build_teacher_features(stage_context(inputs, tmp_path, recipe_with("pi3", pi3), teacher="pi3"))
    assert asked[:2] == [10, 10], "eight of ten views cost as much as ten"


# -------------------------------------------------------------------------------------------------------- for training


def training_context(inputs: dict[str, Path], recipe: Recipe, **artifacts: Path) -> StageContext:
    folders = {f"teacher_features_{name}": folder for name, folder in artifacts.items()}
    return StageContext("stage2_valr_s", recipe, {**inputs, **folders}, Path(), Path(), Listening())


def opened(context: StageContext, *teachers: str) -> dict[str, Any]:
    return dict(open_features(context, teachers, ImageStore(context.inputs["cot_corpus"]), "cpu"))


def test_training_reads_what_is_stored_and_computes_what_is_not(
    inputs: dict[str, Path], recipe: Recipe, built: tuple[StageReport, Path], tmp_path: Path
) -> None:
    stored = opened(training_context(inputs, recipe, dinov3=built[1]), "dinov3")
    assert isinstance(stored["dinov3"], FeatureStore)
    build_teacher_features(stage_context(inputs, tmp_path, online(recipe)))
    context = training_context(inputs, online(recipe), dinov3=tmp_path / "out")
    computing = opened(context, "dinov3")
    assert isinstance(computing["dinov3"], OnlineFeatures) and computing["dinov3"].dim == stored["dinov3"].dim == 16
    assert context.progress.said == ["features of dinov3 are computed online, on cpu"]  # type: ignore[attr-defined]
    assert opened(training_context(inputs, recipe), *()) == {}


def test_an_online_teacher_that_was_trained_on_drawn_scenes_is_not_trained_again(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = TeacherRecipe.model_validate({**CLASSES["dinov3"], "pretraining_steps": 1, "features": "online"})
    recipe = recipe_with("dinov3", trained)
    build_teacher_features(stage_context(inputs, tmp_path, recipe))
    monkeypatch.setattr("valr_ops.teachers.pretraining.pretrain", None)
    assert "dinov3" in opened(training_context(inputs, recipe, dinov3=tmp_path / "out"), "dinov3")


def test_a_stage_without_the_features_of_its_teacher_is_told_where_to_get_them(
    inputs: dict[str, Path], recipe: Recipe, built: tuple[StageReport, Path], tmp_path: Path
) -> None:
    context = training_context(inputs, recipe, dinov3=built[1])
    with pytest.raises(
        FeatureError, match=r"stage2_valr_s aligns to qwen, but reads features of dinov3 only; add teach"
    ):
        opened(context, "dinov3", "qwen")
    with pytest.raises(
        FeatureError, match=r"reads features of no teacher only; add teacher_features_dinov3 to its inp"
    ):
        opened(training_context(inputs, recipe), "dinov3")
    with pytest.raises(
        FeatureError, match=r"holds features of dinov3, not of siglip2; .* `valr run teacher_features_s"
    ):
        opened(training_context(inputs, recipe, siglip2=built[1]), "siglip2")
    missing = tmp_path / "teacher_features_dinov3"
    with pytest.raises(FeatureError, match=r"index.json does not exist; make the features with `valr run teacher_feat"):
        opened(training_context(inputs, recipe, dinov3=missing), "dinov3")


def test_an_online_teacher_of_another_fingerprint_is_refused(
    inputs: dict[str, Path], recipe: Recipe, tmp_path: Path
) -> None:
    build_teacher_features(stage_context(inputs, tmp_path, online(recipe)))
    for field, value in (("image_pixels", 32), ("precision", "bfloat16")):
        changed = online(recipe, **{f"teachers.dinov3.{field}": value})
        with pytest.raises(
            FeatureError, match=r"teachers.dinov3 is another encoder than the one that teacher_features_d"
        ):
            opened(training_context(inputs, changed, dinov3=tmp_path / "out"), "dinov3")


@pytest.fixture
def exchanged(inputs: dict[str, Path], tmp_path: Path) -> tuple[Path, Recipe, dict[str, Path]]:
    """A project whose features were made with weights that were exchanged since then; its recipe and its inputs."""
    root = tmp_path / "project"
    recipe = recipe_with("dinov3", teacher_recipe("dinov3", root / "weights"))
    artifact = root / "artifacts/teacher_features_dinov3"
    artifact.mkdir(parents=True)
    context = stage_context(inputs, tmp_path, recipe)
    write_manifest(artifact, context.stage, build_teacher_features(replace(context, out=artifact)))
    assert changed_weights(recipe, artifact) is None
    teacher_recipe("dinov3", root / "weights", seed=1)
    return root, recipe, inputs


def test_weights_that_were_exchanged_are_noticed_by_the_run_and_by_training(
    exchanged: tuple[Path, Recipe, dict[str, Path]],
) -> None:
    root, recipe, inputs = exchanged
    artifact = root / "artifacts/teacher_features_dinov3"
    row, up_to_date = stage("teacher_features_dinov3"), State(exists=True, edited=False, reasons=())
    reasons = runner._reasons(root, row, recipe, up_to_date)
    assert reasons == ("the weights of teachers.dinov3 are others than those it was made with",)
    with pytest.raises(
        FeatureError, match=r"the weights of teachers.dinov3 are others than .*; make it again with `valr"
    ):
        opened(training_context(inputs, recipe, dinov3=artifact), "dinov3")
    teacher_recipe("dinov3", root / "weights")
    assert runner._reasons(root, row, recipe, up_to_date) == (), "the same weights again are no change"
    opened(training_context(inputs, recipe, dinov3=artifact), "dinov3")
    Path(recipe.teachers["dinov3"].weights or "").unlink()
    assert runner._reasons(root, row, recipe, up_to_date) == (), "a machine without the weights can't tell"
    opened(training_context(inputs, recipe, dinov3=artifact), "dinov3")


def test_looking_for_changed_weights_imports_nothing_heavy(recipe: Recipe, built: tuple[StageReport, Path]) -> None:
    program = (
        "import json, pathlib, sys\n"
        "from valr_ops.recipe.recipe import read\n"
        "from valr_ops.teachers.weights import changed_weights\n"
        "assert changed_weights(read(json.loads(sys.argv[1])), pathlib.Path(sys.argv[2])) is None\n"
        "print(sorted({'torch', 'timm', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    (artifact := built[1].parent / "teacher_features_dinov3").symlink_to(built[1])
    words = [sys.executable, "-c", program, json.dumps(recipe.model_dump(mode="json")), str(artifact)]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "[]\n"


# -------------------------------------------------------------------------------------------------------------- parts


class KnownStates:
    """What DVC would say: all inputs are there, and the artifact is as the test says."""

    artifact = State(exists=False, edited=False, reasons=("it was never made",))

    def __init__(self, root: Path) -> None:
        del root

    def states(self, names: Iterable[str]) -> dict[str, State]:
        there = State(exists=True, edited=False, reasons=())
        return {name: self.artifact if name.startswith("teacher_features") else there for name in names}

    def digest(self, name: str) -> str:
        return f"digest of {name}"


@pytest.fixture
def project(tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, small_shards: None) -> Path:
    """A project with the corpus of `inputs`, whose recipe needs no making."""
    boxes_corpus(tmp_path / "artifacts")
    monkeypatch.setattr(runner, "project_root", lambda: tmp_path)
    monkeypatch.setattr(runner, "refresh_recipe", lambda root, overrides: False)
    monkeypatch.setattr(runner, "read_recipe", lambda root: recipe)
    monkeypatch.setattr(runner, "Ledger", KnownStates)
    return tmp_path


def test_a_part_is_made_where_the_run_looks_for_it(
    project: Path, recipe: Recipe, whole: tuple[StageReport, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = runner.run_part("teacher_features_dinov3", (1, 2))
    assert (outcome.how, dict(outcome.report.summary)) == ("made", {"targets": 48})
    assert not (project / "artifacts/teacher_features_dinov3").exists()
    counts = computed(monkeypatch)
    folders = {name: project / "artifacts" / name for name in ("cot_corpus", "latent_corpus")}
    context = stage_context(folders, project, recipe)
    build_teacher_features(replace(context, work=project / ".valr/work/teacher_features_dinov3"))
    assert not counts and contents(context.out) == whole[1]


def test_an_artifact_that_is_up_to_date_needs_no_part(
    project: Path, built: tuple[StageReport, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = project / "artifacts/teacher_features_dinov3"
    artifact.mkdir()
    for name, data in contents(built[1]).items():
        (artifact / name).write_bytes(data)
    write_manifest(artifact, artifact.name, built[0])
    monkeypatch.setattr(KnownStates, "artifact", State(exists=True, edited=False, reasons=()))
    outcome = runner.run_part("teacher_features_dinov3", (0, 2))
    assert (outcome.how, outcome.report.summary) == ("hit", built[0].summary)
    assert not (project / ".valr/work/teacher_features_dinov3").exists()
    forced = runner.run_part("teacher_features_dinov3", (0, 2), force=True)
    assert (forced.how, dict(forced.report.summary)) == ("made", {"targets": 48})


def test_a_stage_that_cannot_be_divided_says_which_can(project: Path) -> None:
    with pytest.raises(
        runner.PartError, match=r"cot_corpus has no parts; --part is for teacher_features_dinov3, teach"
    ):
        runner.run_part("cot_corpus", (0, 2))


@pytest.mark.parametrize("part", ["5/2", "2/2", "x", "1", "-1/2", "1/2/3", "/", "1/", "0/0", "1.0/2", "0x1/2"])
def test_a_part_that_is_none_is_a_wrong_usage(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", "teacher_features_dinov3", f"--part={part}"])
    assert ended.value.code == 2
    assert f"'{part}' is not I/N with 0 <= I < N, such as 0/4" in capsys.readouterr().err


def test_the_command_line_runs_a_part(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[Any, ...]] = []

    def run_part(name: str, part: tuple[int, int], overrides: Any, *, force: bool) -> runner.Outcome:
        asked.append((name, part, overrides, force))
        return runner.Outcome(name, "made", "", (), 1.0, StageReport(summary={"targets": 7}), {})

    monkeypatch.setattr(runner, "run_part", run_part)
    assert main(["run", "teacher_features_dinov3", "--part", "3/4", "--set", "seed=1", "--force"]) == 0
    assert asked == [("teacher_features_dinov3", (3, 4), {"seed": 1}, True)]
    assert json.loads(capsys.readouterr().out)["summary"] == {"targets": 7}
