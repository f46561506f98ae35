"""Stored features are the teacher's, one grid a target, the same bytes every time, and never silently missing."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from valr_ops.data.corpus import ImageStore, write_images
from valr_ops.data.records import Box, Image
from valr_ops.data.sequences import Segment, batch_of, write_sequences
from valr_ops.model.qwen import save_model
from valr_ops.recipe import recipes
from valr_ops.recipe.recipe import Recipe, override
from valr_ops.store.artifacts import StageContext, StageReport
from valr_ops.store.progress import Progress
from valr_ops.teachers import features
from valr_ops.teachers.encoders import Teacher, load_teacher, read_teacher
from valr_ops.teachers.features import FeatureError, FeatureStore, build_teacher_features, open_stores, read_targets

SMALL = {
    "teachers.dinov3.arguments": {"embed_dim": 16, "depth": 1, "num_heads": 2, "img_size": 64},
    "teachers.dinov3.pretraining_steps": 2,
}
BOXES: tuple[Box | None, ...] = (None, (0, 0, 64, 16), (0, 16, 64, 32), (16, 0, 32, 64))


def draw_image(seed: int) -> Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    stream = io.BytesIO()
    PIL.Image.fromarray(pixels).save(stream, "PNG")
    data = stream.getvalue()
    return Image(data, hashlib.sha256(data).hexdigest(), 64, 64, "input")


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    """Twelve images with four targets each, every target named twice, and a segment without a target."""
    folders = {name: tmp_path / name for name in ("cot_corpus", "latent_corpus")}
    for folder in folders.values():
        folder.mkdir()
    images = [draw_image(seed) for seed in range(12)]
    write_images(folders["cot_corpus"], images)
    segments = [[segment(image.digest, box) for box in BOXES] for image in images]
    write_segments(folders["latent_corpus"], [*segments, *segments, [segment(None, None)], []])
    return folders


def segment(digest: str | None, box: Box | None) -> Segment:
    return Segment(3, digest, box, 0)


def write_segments(folder: Path, segments: list[list[Segment]]) -> None:
    """A corpus of sequences with these segments, five a block."""
    any_one = tiny.sequence("any", (), ())
    rows = [replace(any_one, id=f"scenes/{row}", segments=tuple(part)) for row, part in enumerate(segments)]
    write_sequences(folder, (batch_of(rows[start : start + 5]) for start in range(0, len(rows), 5)), {})


def small_recipe(**changes: Any) -> Recipe:
    return override(recipes.tiny(), SMALL | changes)


def context(
    inputs: dict[str, Path], place: Path, *, recipe: Recipe | None = None, teacher: str = "dinov3", **changes: Any
) -> StageContext:
    for folder in ("out", "work"):
        (place / folder).mkdir(parents=True, exist_ok=True)
    stage = f"teacher_features_{teacher}"
    progress = changes.get("progress", Progress())
    return StageContext(stage, recipe or small_recipe(), inputs, place / "out", place / "work", progress)


def build(inputs: dict[str, Path], place: Path, **changes: Any) -> StageReport:
    return build_teacher_features(context(inputs, place, **changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_distinct_target_is_stored_with_the_features_of_its_own_crop(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    report = build(inputs, tmp_path / "run")
    store, images = FeatureStore(tmp_path / "run/out"), ImageStore(inputs["cot_corpus"])
    teacher = load_teacher("dinov3", small_recipe().teachers["dinov3"], seed=0)
    assert list(store) == read_targets(inputs["latent_corpus"]) and len(store) == 48
    assert (store.dim, store.fingerprint, store.teacher) == (16, teacher.fingerprint, "dinov3")
    for digest, box in store:
        stored, exact = store.get(digest, box), teacher([images.load(digest, box)])[0]
        assert stored.shape == (4, 4, 16) and stored.dtype == torch.bfloat16
        torch.testing.assert_close(stored.float(), exact, rtol=1e-2, atol=1e-2)
    assert report.checks[0].name == "features_are_whole" and report.checks[0].passed
    assert report.summary["targets"] == 48 and report.summary["images"] == 12
    assert report.timings["images_per_second"] > 0


def test_the_same_inputs_give_the_same_bytes(inputs: dict[str, Path], tmp_path: Path) -> None:
    first, second = (build(inputs, tmp_path / run) for run in ("one", "two"))
    assert contents(tmp_path / "one/out") == contents(tmp_path / "two/out")
    assert first.summary == second.summary and first.tables == second.tables


def test_the_artifact_is_few_files_and_names_no_place_of_this_machine(inputs: dict[str, Path], tmp_path: Path) -> None:
    build(inputs, tmp_path / "run")
    written = contents(tmp_path / "run/out")
    names = {"features-00000.safetensors", "index.json", "pca.png", "teacher.json", "teacher.safetensors"}
    assert set(written) == names
    assert not any(str(tmp_path).encode() in data for data in written.values())
    index = json.loads(written["index.json"])
    assert index["dtype"] == "bfloat16" and index["license"] == small_recipe().teachers["dinov3"].license
    first = index["targets"][0]
    assert (first["shard"], first["row"], first["grid"], first["box"]) == (
        "features-00000.safetensors",
        0,
        [4, 4],
        None,
    )


def test_the_kept_teacher_gives_the_stored_features(inputs: dict[str, Path], tmp_path: Path) -> None:
    build(inputs, tmp_path / "run")
    store = FeatureStore(tmp_path / "run/out")
    digest, box = list(store)[5]
    again = read_teacher(tmp_path / "run/out")([ImageStore(inputs["cot_corpus"]).load(digest, box)])[0]
    torch.testing.assert_close(store.get(digest, box).float(), again, rtol=1e-2, atol=1e-2)


class KilledAfter(Progress):
    """Stops the run after so many batches of features."""

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.already_done = 0

    def track(self, items: Iterable[Any], description: str, total: int | None = None, done: int = 0) -> Iterator[Any]:
        for count, item in enumerate(items):
            if "features" in description:
                self.already_done = done
                if count == self.batches:
                    raise KeyboardInterrupt
            yield item


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 14 or fewer targets of 512 bytes, batches of 4."""
    monkeypatch.setattr(features, "SHARD_BYTES", 14 * 512)
    monkeypatch.setattr(features, "_BATCH_IMAGES", 4)


@pytest.mark.usefixtures("small_shards")
def test_a_killed_run_goes_on_from_its_finished_shards_to_the_same_bytes(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    whole = build(inputs, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        build(inputs, tmp_path / "killed", progress=KilledAfter(batches=7))
    assert not contents(tmp_path / "killed/out"), "nothing is put into the artifact before all shards are there"
    resumed = KilledAfter(batches=10**6)
    report = build(inputs, tmp_path / "killed", progress=resumed)
    assert report.summary["shards"] == 4 and resumed.already_done == 6, "two shards of three batches were finished"
    assert contents(tmp_path / "killed/out") == contents(tmp_path / "whole/out")
    assert report.summary == whole.summary


@pytest.mark.usefixtures("small_shards")
def test_shards_of_another_teacher_are_not_used(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(inputs, tmp_path / "run", progress=KilledAfter(batches=7))
    other = small_recipe(seed=1)
    build(inputs, tmp_path / "run", recipe=other)
    build(inputs, tmp_path / "fresh", recipe=other)
    assert contents(tmp_path / "run/out") == contents(tmp_path / "fresh/out")
    assert len(list((tmp_path / "run/work").iterdir())) == 1, "they are removed: at scale paper they fill the disk"


@pytest.mark.usefixtures("small_shards")
def test_a_shard_that_a_power_cut_left_half_written_is_made_again(inputs: dict[str, Path], tmp_path: Path) -> None:
    build(inputs, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        build(inputs, tmp_path / "killed", progress=KilledAfter(batches=7))
    shard = next((tmp_path / "killed/work").rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    build(inputs, tmp_path / "killed")
    assert contents(tmp_path / "killed/out") == contents(tmp_path / "whole/out")


def test_a_target_that_is_not_stored_is_an_error_that_names_it(inputs: dict[str, Path], tmp_path: Path) -> None:
    build(inputs, tmp_path / "run")
    store = FeatureStore(tmp_path / "run/out")
    digest, _ = next(iter(store))
    assert (digest, (0, 0, 64, 16)) in store and (digest, (0, 0, 64, 17)) not in store
    with pytest.raises(FeatureError, match=rf"no features of image {digest[:12]} box \(0, 0, 64, 17\)"):
        store.get(digest, (0, 0, 64, 17))
    with pytest.raises(FeatureError, match=r"index.json does not exist; make the features with `valr run elsewhere`"):
        FeatureStore(tmp_path / "elsewhere")


def test_a_truncated_shard_is_an_error_that_names_the_file(inputs: dict[str, Path], tmp_path: Path) -> None:
    build(inputs, tmp_path / "run")
    shard = tmp_path / "run/out/features-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    store = FeatureStore(tmp_path / "run/out")
    with pytest.raises(FeatureError, match=r"features-00000.safetensors can't be read"):
        store.get(*next(iter(store)))


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "16 not finite"), (1.0, "16 the same at every patch")],
    ids=["nan", "constant"],
)
def test_spoiled_features_are_not_published(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, message: str
) -> None:
    honest = Teacher.__call__

    def spoiled(self: Teacher, images: Any) -> torch.Tensor:
        result = honest(self, images)
        result[::3] = value
        return result

    monkeypatch.setattr(Teacher, "__call__", spoiled)
    check = build(inputs, tmp_path / "run").checks[0]
    assert not check.passed and message in check.detail


def test_a_box_outside_of_its_image_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    digest = draw_image(0).digest
    write_segments(inputs["latent_corpus"], [[segment(digest, (0, 0, 65, 16))]])
    with pytest.raises(FeatureError, match=r"box \[0, 0, 65, 16\] of image .* lies outside of 64 x 64 px"):
        build(inputs, tmp_path / "run")


def test_a_corpus_without_targets_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    write_segments(inputs["latent_corpus"], [[segment(None, None)], []])
    with pytest.raises(FeatureError, match=r"no segment in .* has a target"):
        build(inputs, tmp_path / "run")


def test_a_teacher_that_the_recipe_does_not_have_is_named(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match=r"needs teachers.dinov9, but the recipe has dinov3"):
        build(inputs, tmp_path / "run", teacher="dinov9")


def test_the_base_models_own_tower_is_a_teacher_like_any_other(inputs: dict[str, Path], tmp_path: Path) -> None:
    base_model = tmp_path / "base_model"
    save_model(tiny.model(seed=3), tiny.processor(), base_model, {})
    report = build(inputs | {"base_model": base_model}, tmp_path / "run", teacher="qwen")
    store = open_stores("stage2_mine", ["qwen"], {"teacher_features_qwen": tmp_path / "run/out"})["qwen"]
    assert report.checks[0].passed and (len(store), store.dim) == (48, 32)
    digest, box = list(store)[5]
    crop = ImageStore(inputs["cot_corpus"]).load(digest, box)
    teacher = load_teacher("qwen", small_recipe().teachers["qwen"], seed=0, base_model=base_model)
    torch.testing.assert_close(store.get(digest, box).float(), teacher([crop])[0], rtol=1e-2, atol=1e-2)
    assert not (tmp_path / "run/out/teacher.safetensors").exists(), "its weights are kept in base_model"


def test_a_stage_without_the_features_of_its_teacher_is_told_where_to_get_them(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    build(inputs, tmp_path / "run")
    reads = {"cot_corpus": inputs["cot_corpus"], "teacher_features_dinov3": tmp_path / "run/out"}
    assert list(open_stores("stage2_valr_s", ["dinov3"], reads)) == ["dinov3"]
    with pytest.raises(
        FeatureError, match=r"stage2_valr_s aligns to qwen, but reads features of dinov3 only; add teach"
    ):
        open_stores("stage2_valr_s", ["dinov3", "qwen"], reads)
    with pytest.raises(
        FeatureError, match=r"reads features of no teacher only; add teacher_features_dinov3 to its inp"
    ):
        open_stores("stage2_valr_s", ["dinov3"], inputs)
    with pytest.raises(
        FeatureError, match=r"holds features of dinov3, not of siglip2; .* `valr run teacher_features_s"
    ):
        open_stores("stage2_valr_s", ["siglip2"], {"teacher_features_siglip2": tmp_path / "run/out"})
    with pytest.raises(FeatureError, match=r"index.json does not exist; make the features with `valr run teacher_feat"):
        open_stores("stage2_valr_s", ["dinov3"], {"teacher_features_dinov3": tmp_path / "teacher_features_dinov3"})


def test_one_target_is_enough(inputs: dict[str, Path], tmp_path: Path) -> None:
    write_segments(inputs["latent_corpus"], [[segment(draw_image(0).digest, None)]])
    report = build(inputs, tmp_path / "run")
    assert report.checks[0].passed and len(FeatureStore(tmp_path / "run/out")) == 1


def test_each_image_is_decoded_once(inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load = ImageStore.load

    def counted(self: ImageStore, digest: str, box: Box | None = None) -> PIL.Image.Image:
        loaded.append(digest)
        return load(self, digest, box)

    monkeypatch.setattr(ImageStore, "load", counted)
    monkeypatch.setattr(features, "_draw_features", lambda *_: None)
    monkeypatch.setattr(features, "_BATCH_IMAGES", 3)
    build(inputs, tmp_path / "run")
    assert sorted(loaded) == sorted(set(loaded)) and len(loaded) == 12


def test_a_shard_is_one_tensor_in_the_order_of_the_targets(inputs: dict[str, Path], tmp_path: Path) -> None:
    build(inputs, tmp_path / "run")
    store = FeatureStore(tmp_path / "run/out")
    stored = load_file(tmp_path / "run/out/features-00000.safetensors")["features"]
    assert torch.equal(stored, torch.stack([store.get(*target) for target in store]))
