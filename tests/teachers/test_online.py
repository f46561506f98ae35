"""Features that are computed while training goes on are those that would have been stored, each computed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.teachers.inputs import (
    BOXES,
    boxes_corpus,
    computed,
    corpus,
    damaged,
    image,
    recipe_with,
    stage_context,
    teacher_recipe,
)
from tests.training.inputs import Listening, context, write_inputs
from valr_ops.data.batching import Collator
from valr_ops.data.corpus import CorpusError, ImageStore
from valr_ops.data.sequences import Region, Sequences
from valr_ops.recipe.recipe import Recipe
from valr_ops.teachers.encoders import Teacher, load_teacher
from valr_ops.teachers.extraction import Extractor
from valr_ops.teachers.features import build_teacher_features, read_wanted
from valr_ops.teachers.online import OnlineFeatures
from valr_ops.teachers.stored import FeatureError, FeatureStore
from valr_ops.training.engine import Ranks
from valr_ops.training.loop import build_stage2
from valr_ops.training.windows import Windows


@pytest.fixture(scope="module")
def dinov3(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return load_teacher("dinov3", teacher_recipe("dinov3", tmp_path_factory.mktemp("dinov3")), seed=0)


def test_they_come_in_the_order_asked_for_and_each_is_computed_once(
    tmp_path: Path, dinov3: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ImageStore(boxes_corpus(tmp_path, images=3)["cot_corpus"])
    targets = [Region(digest, box) for box in BOXES for digest in images]
    asked = [*targets, *targets[::-1], targets[0]]
    counts, source = computed(monkeypatch), OnlineFeatures(Extractor(dinov3, images))
    given = source.features(asked)
    assert counts == [12] and source.dim == 16
    exact = dinov3([images.load(target.digest, target.box) for target in asked])
    torch.testing.assert_close(torch.stack(given), exact)
    assert source.features([]) == [] and not any(one.requires_grad for one in given)


def test_they_are_the_stored_ones_before_rounding_of_joint_views_too(tmp_path: Path) -> None:
    recipe, drawn = teacher_recipe("pi3", tmp_path / "pi3"), [image(seed, 56, 56) for seed in range(5)]
    digests = [one.digest for one in drawn]
    rows = [(tuple(shown), [(digest, None) for digest in shown]) for shown in (digests[:3], digests[3:], digests[:1])]
    inputs = corpus(tmp_path / "in", drawn, rows)  # type: ignore[arg-type]
    build_teacher_features(stage_context(inputs, tmp_path, recipe_with("pi3", recipe), teacher="pi3"))
    store = FeatureStore(tmp_path / "out")
    source = OnlineFeatures(Extractor(load_teacher("pi3", recipe, seed=0), ImageStore(inputs["cot_corpus"])))
    targets = read_wanted(inputs["latent_corpus"], joint=True).targets[::-1]
    assert len(targets) == 6 and sum(bool(target.views) for target in targets) == 5
    online, stored = torch.stack(source.features(targets)), torch.stack(store.features(targets))
    # A batch of another size may be summed in another order.
    torch.testing.assert_close(online, stored.float(), rtol=2**-8, atol=1e-4)
    together, alone = (source.features([Region(digests[0], None, views)])[0] for views in (targets[1].views, ()))
    assert torch.equal(alone, source.features([Region(digests[0])])[0]) and not torch.equal(together, alone)


def test_views_are_seen_one_by_one_where_the_recipe_says_so(
    tmp_path: Path, dinov3: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ImageStore(boxes_corpus(tmp_path, images=2)["cot_corpus"])
    views = tuple(images)
    counts, source = computed(monkeypatch), OnlineFeatures(Extractor(dinov3, images))
    of_scene, alone = source.features([Region(views[0], None, views), Region(views[0])])
    assert counts == [1] and torch.equal(of_scene, alone)


def test_a_damaged_image_is_named(tmp_path: Path, dinov3: Teacher) -> None:
    bad = damaged(1)
    images = ImageStore(corpus(tmp_path, [image(0), bad], [])["cot_corpus"])
    source = OnlineFeatures(Extractor(dinov3, images))
    message = (
        rf"the image of {bad.digest[:12]}\[0, 0, 8, 8\] can't be decoded \(OSError: .*; build the stage cot_corpus"
    )
    with pytest.raises(FeatureError, match=message):
        source.features([Region(image(0).digest), Region(bad.digest, (0, 0, 8, 8))])
    with pytest.raises(CorpusError, match=f"has no image {'0' * 64}"):
        source.features([Region("0" * 64)])
    assert len(source.features([Region(image(0).digest)])) == 1, "and nothing is blocked afterwards"


# ------------------------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Recipe, dict[str, Path], dict[int, dict[str, float]]]]:
    """Of a short stage 2 with stored and with online features the recipe, the inputs and the log."""
    root = tmp_path_factory.mktemp("trained")
    inputs = write_inputs(root / "inputs", teachers=())
    runs: dict[str, Any] = {}
    for mode in ("stored", "online"):
        teacher = teacher_recipe("dinov3", root / "weights", features=mode)
        recipe = tiny.recipe(**{"stage2.max_updates": 3, "stage2.epochs": 9})
        recipe = recipe.model_copy(update={"teachers": {"dinov3": teacher}})
        build_teacher_features(stage_context(inputs, root / mode, recipe))
        folders = {**inputs, "teacher_features_dinov3": root / mode / "out"}
        listening = Listening()
        build_stage2(context("stage2_valr_s", recipe, folders, root / f"{mode}-training", listening))
        runs[mode] = recipe, folders, listening.logged
    return runs


def test_training_has_the_same_losses_with_stored_and_with_online_features(trained: dict[str, Any]) -> None:
    stored, online = (trained[mode][2] for mode in ("stored", "online"))
    assert stored.keys() == online.keys() == {1, 2, 3}
    for update, expected in stored.items():
        for name in ("loss", "ce", "alignment/dinov3", "control/dinov3"):
            assert online[update][name] == pytest.approx(expected[name], abs=2e-3), (update, name)
    assert stored[1]["ce"] == online[1]["ce"] and stored[1]["alignment/dinov3"] != online[1]["alignment/dinov3"]
    assert online[3]["alignment/dinov3"] > online[1]["alignment/dinov3"] + 0.01, "there was something to learn"


def test_a_window_computes_each_of_its_targets_once(trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, folders, _ = trained["online"]
    images = ImageStore(folders["cot_corpus"])
    teacher = load_teacher("dinov3", recipe.teachers["dinov3"], seed=0)
    windows = Windows(
        Sequences(folders["latent_corpus"], "train"),
        Collator(images, tiny.processor(), recipe.latents),
        {"dinov3": OnlineFeatures(Extractor(teacher, images))},
        micro_batch=2,
        accumulation=4,
        seed=0,
        ranks=Ranks(0, 1, torch.device("cpu")),
    )
    counts = computed(monkeypatch)
    window = windows.window(0)
    asked = [target for share in window.shares for target in share.batch.targets]
    distinct = {target.seen(joint=False) for target in asked if target is not None}
    assert len(window.shares) == 4 and sum(counts) == len(distinct) < sum(target is not None for target in asked)
    for share in window.shares:
        for target, features in zip(share.batch.targets, share.features["dinov3"], strict=True):
            assert (features is None) == (target is None)
            if target is not None:
                exact = teacher([images.load(target.digest, target.box)])[0]
                torch.testing.assert_close(features, exact)
