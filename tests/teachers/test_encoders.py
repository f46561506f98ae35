"""A teacher gives one feature a patch, in the place of the patch, from a whole image, and says what it was made of."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tiny
from valr_ops.model.qwen import save_model
from valr_ops.recipe.recipe import QWEN_TOWER, TeacherRecipe
from valr_ops.teachers import pretraining
from valr_ops.teachers.encoders import Teacher, TeacherError, _build, load_teacher, read_teacher
from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

import timm  # noqa: E402

WIDTHS = {"embed_dim": 16, "depth": 1, "num_heads": 2}
RECIPES = {
    "dinov3": {"architecture": "timm", "model": "vit_large_patch16_dinov3", "image_pixels": 64},
    "siglip2": {"architecture": "timm", "model": "vit_large_patch16_siglip_256", "image_pixels": 64},
    "pi3": {"architecture": "pi3", "model": "vit_large_patch14_reg4_dinov2", "image_pixels": 56},
}


def recipe(name: str, **changes: Any) -> TeacherRecipe:
    """A teacher of the real class with one narrow block, trained for one step."""
    arguments = WIDTHS | {"img_size": RECIPES[name]["image_pixels"]}
    if name == "pi3":
        arguments |= {"decoder_depth": 2}
    return TeacherRecipe.model_validate({"arguments": arguments, "pretraining_steps": 1, **RECIPES[name], **changes})


def untrained(name: str, **changes: Any) -> Teacher:
    torch.manual_seed(0)
    wanted = recipe(name, **changes)
    return Teacher(name, wanted, _build(name, wanted, folder=None))


@pytest.fixture
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that train, but not for what is learned."""
    monkeypatch.setattr(pretraining, "_TRAIN_SCENES", 8)
    monkeypatch.setattr(pretraining, "_HELD_OUT_SCENES", 8)


def picture(width: int, height: int) -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


@pytest.mark.parametrize("name", RECIPES)
def test_a_changed_patch_changes_its_own_feature_most(name: str) -> None:
    teacher = untrained(name)
    patch = teacher.image_pixels // 4
    plain = np.full((teacher.image_pixels, teacher.image_pixels, 3), 128, np.uint8)
    for row, column in ((0, 0), (0, 3), (2, 1), (3, 3)):
        marked = plain.copy()
        marked[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = (255, 0, 0)
        features = teacher(torch.from_numpy(np.stack([plain, marked])))
        change = (features[1] - features[0]).norm(dim=-1)
        assert divmod(int(change.argmax()), 4) == (row, column)


@pytest.mark.parametrize("name", RECIPES)
def test_features_are_float32_one_a_patch_and_without_gradient(name: str) -> None:
    teacher = untrained(name)
    features = teacher([picture(64, 16), picture(30, 50), picture(8, 8)])
    assert features.shape == (3, *teacher.grid, teacher.dim) and teacher.grid == (4, 4)
    assert teacher.dim == (32 if name == "pi3" else 16)
    assert features.dtype == torch.float32 and not features.requires_grad


@pytest.mark.parametrize("name", RECIPES)
def test_the_whole_image_is_seen_up_to_its_border(name: str) -> None:
    teacher = untrained(name)
    image = np.full((128, 256, 3), 128, np.uint8)
    framed = image.copy()
    framed[:4], framed[-4:], framed[:, :8], framed[:, -8:] = 0, 0, 0, 0
    squashed = teacher.squash([PIL.Image.fromarray(framed)])[0]
    assert squashed[0].max() < 64 and squashed[-1].max() < 64
    assert squashed[:, 0].max() < 64 and squashed[:, -1].max() < 64


def test_arrays_and_pictures_give_the_same_features() -> None:
    teacher, image = untrained("dinov3"), picture(40, 24)
    assert torch.equal(teacher([image]), teacher(torch.from_numpy(np.asarray(image)[None].copy())))


def test_small_stripes_average_out_when_an_image_shrinks() -> None:
    stripes = np.zeros((64, 1024, 3), np.uint8)
    stripes[:, ::2] = 255
    squashed = untrained("dinov3").squash([PIL.Image.fromarray(stripes)])
    assert squashed.float().sub(127.5).abs().max() < 4, "a resize without antialiasing keeps single stripes"


@pytest.mark.parametrize(
    ("model", "mean"),
    [
        ("vit_large_patch16_dinov3.lvd1689m", (0.485, 0.456, 0.406)),
        ("vit_large_patch16_dinov3.sat493m", (0.430, 0.411, 0.296)),
        ("vit_large_patch16_siglip_256.v2_webli", (0.5, 0.5, 0.5)),
    ],
)
def test_normalisation_comes_from_the_model(model: str, mean: tuple[float, ...]) -> None:
    teacher = untrained("dinov3", model=model)
    assert teacher.preprocessing["mean"] == list(mean)


def test_a_black_image_enters_the_model_at_minus_mean_over_deviation() -> None:
    teacher = untrained("siglip2")
    expected = teacher.model.forward_features(torch.full((1, 3, 64, 64), -1.0))  # type: ignore[operator]
    torch.testing.assert_close(teacher([PIL.Image.new("RGB", (9, 5))]).flatten(1, 2), expected)


@pytest.mark.parametrize("model", ["vit_large_patch16_dinov3", "vit_large_patch16_siglip_256"])
def test_a_layer_is_what_that_block_hands_on_before_the_final_norm(model: str) -> None:
    arguments = {"embed_dim": 16, "depth": 3, "num_heads": 2, "img_size": 64}
    last, second, first = (untrained("dinov3", model=model, arguments=arguments, layer=at) for at in (-1, 1, 0))
    normed = untrained("dinov3", model=model, arguments=arguments)([picture(64, 64)])
    torch.testing.assert_close(last.model.norm(last([picture(64, 64)])), normed)  # type: ignore[operator]
    block = last.model.blocks[2]  # type: ignore[index]
    assert second.fingerprint != first.fingerprint
    for parameter in block.parameters():  # type: ignore[union-attr]
        parameter.data.zero_()
    assert torch.equal(last([picture(64, 64)]), second([picture(64, 64)])), "a block of zeros adds nothing"


@pytest.mark.parametrize(("layer", "side", "dim"), [(None, 4, 48), (3, 4, 48), (-1, 2, 64), (2, 8, 32)])
def test_a_convolutional_network_gives_the_feature_map_of_a_stage(layer: int | None, side: int, dim: int) -> None:
    teacher = untrained("dinov3", model="test_resnet", arguments={}, layer=layer)
    assert teacher.grid == (side, side) and teacher.model.num_classes == 0
    features = teacher([picture(64, 64), picture(20, 20)])
    assert features.shape == (2, side, side, teacher.dim)
    normalised = (torch.from_numpy(np.asarray(picture(64, 64)).copy()).permute(2, 0, 1) / 255).sub(0.5).div(0.5)
    stages = teacher.model.forward_intermediates(normalised[None], intermediates_only=True)  # type: ignore[operator]
    assert teacher.preprocessing["mean"] == [0.5, 0.5, 0.5]
    torch.testing.assert_close(features[0].permute(2, 0, 1), stages[-2 if layer is None else layer][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rotary_table_is_timms_at_a_size_of_ones_own(dtype: torch.dtype) -> None:
    wanted = recipe("dinov3", image_pixels=96, precision=str(dtype).removeprefix("torch."))
    teacher = Teacher("dinov3", wanted, _build("dinov3", wanted, folder=None))
    stock: Any = timm.create_model(wanted.model, num_classes=0, **wanted.arguments).to(dtype).eval()
    stock.load_state_dict(teacher.model.state_dict())
    pixels = torch.randn(2, 3, 96, 96).to(dtype)
    with torch.no_grad():
        expected = stock.forward_features(pixels)[:, stock.num_prefix_tokens :]
        assert torch.equal(teacher.encoder(pixels).flatten(1, 2), expected)


@pytest.mark.parametrize("name", RECIPES)
def test_bfloat16_gives_nearly_the_same_features_and_another_fingerprint(name: str) -> None:
    exact, rounded = untrained(name), untrained(name, precision="bfloat16")
    images = [picture(64, 16), picture(30, 50)]
    features = rounded(images)
    assert features.dtype == torch.bfloat16 and not torch.equal(features.float(), exact(images))
    assert torch.cosine_similarity(features.float(), exact(images), dim=-1).min() > 0.999
    assert rounded.fingerprint != exact.fingerprint
    weights = {tensor.dtype for tensor in rounded.model.state_dict().values()}
    assert weights == ({torch.float32} if name == "pi3" else {torch.bfloat16}), "π³ keeps its residual stream"


def test_many_images_are_computed_in_batches_and_stay_in_order() -> None:
    teacher = untrained("dinov3")
    squashed = teacher.squash([picture(16 * number, 32) for number in range(1, 8)])
    whole, teacher.batch_images = teacher.features(squashed), 3
    seen: list[int] = []
    teacher.model.patch_embed.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))  # type: ignore[union-attr]
    torch.testing.assert_close(teacher.features(squashed), whole)
    assert seen == [3, 3, 1]
    assert teacher.features(squashed[:0]).shape == (0, 4, 4, 16)


def test_features_can_be_differentiated_in_the_weights() -> None:
    teacher = untrained("dinov3")
    teacher.model.requires_grad_(True)
    teacher.features(teacher.squash([picture(20, 20)])).square().sum().backward()
    assert all(parameter.grad is not None for parameter in teacher.model.blocks.parameters())  # type: ignore[union-attr]


def test_a_compiled_teacher_computes_one_shape_whatever_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[int] = []

    def compile(function: Callable[[Tensor], Tensor], dynamic: bool) -> Callable[[Tensor], Tensor]:
        assert not dynamic

        def run(images: Tensor) -> Tensor:
            shapes.append(len(images))
            return function(images)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    teacher, plain = untrained("dinov3", compile=True), untrained("dinov3")
    assert shapes == [], "nothing is compiled before the first use"
    assert teacher.fingerprint == plain.fingerprint
    teacher.batch_images = 4
    squashed = teacher.squash([picture(16 * number, 32) for number in range(1, 7)])
    torch.testing.assert_close(teacher.features(squashed), plain.features(squashed))
    assert shapes == [4, 4]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_compiled_features_are_those_of_the_plain_encoder(name: str) -> None:
    plain, compiled = untrained(name), untrained(name, compile=True)
    compiled.batch_images = 4
    squashed = plain.squash([picture(16 * number, 32) for number in range(1, 7)])
    torch.testing.assert_close(compiled.features(squashed), plain.features(squashed), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("device", "needed"), [("cpu", "a C++ compiler"), ("cuda", "a C compiler and Python.h")])
def test_the_compiler_that_is_missing_is_that_of_the_device(device: str, needed: str) -> None:
    from torch._inductor.exc import InductorError

    def fails(_: Tensor) -> Tensor:
        raise InductorError(RuntimeError("Failed to find C compiler"), None)

    teacher = untrained("dinov3", compile=True)
    teacher._compiled_encode, teacher.device = fails, torch.device(device)
    with pytest.raises(TeacherError, match=rf"compile=true.*Failed to find C compiler; it needs {re.escape(needed)}"):
        teacher._compiled(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))


@pytest.mark.slow
def test_where_there_is_no_compiler_the_field_is_named(tmp_path: Path) -> None:
    """In a process of its own: torch looks for compilers once."""
    program = """
import torch
from tests.teachers.test_encoders import untrained
teacher = untrained("dinov3", compile=True)
teacher.features(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
"""
    environment = os.environ | {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert "TeacherError: teachers.dinov3.compile=true, but torch.compile failed" in run.stderr
    assert "needs a C++ compiler" in run.stderr


def test_views_are_seen_together_only_if_asked() -> None:
    teacher = untrained("pi3")
    squashed = teacher.squash([picture(16 * number, 32) for number in range(1, 5)]).unflatten(0, (2, 2))
    together = teacher.joint(squashed)
    alone = teacher.features(squashed.flatten(0, 1)).unflatten(0, (2, 2))
    assert together.shape == alone.shape == (2, 2, *teacher.grid, teacher.dim)
    assert not torch.allclose(together, alone)
    one_each = teacher.joint(squashed.reshape(4, 1, 56, 56, 3))
    torch.testing.assert_close(one_each, alone.reshape(one_each.shape), rtol=1e-4, atol=1e-5)


def test_images_of_another_size_or_type_than_squash_makes_are_refused() -> None:
    teacher = untrained("pi3")
    for wrong in (torch.zeros(1, 28, 56, 3, dtype=torch.uint8), torch.zeros(1, 56, 56, 3)):
        with pytest.raises(TeacherError, match=r"teacher pi3 got a .*; give uint8 \[N, 56, 56, 3\], which squash"):
            teacher.features(wrong)
    with pytest.raises(TeacherError, match=r"give uint8 \[N, views, 56, 56, 3\]"):
        teacher.joint(torch.zeros(2, 56, 56, 3, dtype=torch.uint8))
    with pytest.raises(TeacherError, match=r"teachers.dinov3 .*sees one image at a time; only pi3 sees"):
        untrained("dinov3").joint(torch.zeros(1, 2, 64, 64, 3, dtype=torch.uint8))


def test_an_image_that_is_not_rgb_is_refused() -> None:
    with pytest.raises(TeacherError, match="image 1 in mode L"):
        untrained("dinov3")([picture(8, 8), PIL.Image.new("L", (8, 8))])
    with pytest.raises(TeacherError, match=r"float32 tensor of shape \[1, 3, 8, 8\]"):
        untrained("dinov3")(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_pixels": 40}, r"teachers.dinov3.image_pixels=40 is no multiple .* 16 px; set it to 32"),
        ({"image_pixels": 8}, r"teachers.dinov3.image_pixels=8 is no multiple .* 16 px; set it to 16"),
        ({"model": "vit_large_patch16_dinov4"}, r"did you mean 'vit_large_patch16_dinov3'"),
        ({"model": "hf-hub:somebody/something"}, r"is no model of timm"),
        ({"layer": 1}, r"teachers.dinov3.layer=1 of vit_large_patch16_dinov3: it has 1 blocks, so .* -1 and 0"),
        ({"model": "test_resnet", "arguments": {}, "layer": -6}, r"it has 5 stages, so a layer between -5 and 4"),
        (
            {"model": "crossvit_tiny_240", "arguments": {}},
            r"no stage has stride 16; choose one by layer, they have strides \[12, 12, 12, 17",
        ),
        ({"arguments": {"embed_dims": 16}}, r"teachers.dinov3.arguments.*embed_dims.*did you mean embed_dim\?"),
        ({"model": "vit_large_patch16_siglip_256", "image_pixels": 128}, r"takes 64 px only"),
        ({"pretraining_steps": 0}, r"has no weights; set exactly one of weights"),
        ({"weights": "x.safetensors"}, r"has weights and pretraining_steps"),
        ({"weights": "nowhere.safetensors", "pretraining_steps": 0}, r"teachers.dinov3.weights=nowhere.* is no file"),
    ],
)
def test_a_teacher_that_cannot_be_built_says_which_field_to_change(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        load_teacher("dinov3", recipe("dinov3", **changes), seed=0)


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("the pickle was loaded",)


@pytest.mark.parametrize(
    ("suffix", "message"),
    [("pth", "pickles are not read.*convert it"), ("bin", "pickles are not read"), ("safetensors", "can't be read as")],
)
def test_a_pickle_is_refused_and_never_loaded(tmp_path: Path, suffix: str, message: str) -> None:
    path = tmp_path / f"teacher.{suffix}"
    path.write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(TeacherError, match=message):
        load_teacher("dinov3", recipe("dinov3", weights=str(path), pretraining_steps=0), seed=0)


@pytest.mark.parametrize("name", RECIPES)
def test_weights_from_a_file_give_the_features_they_were_saved_with(name: str, tmp_path: Path) -> None:
    teacher = untrained(name)
    save_file(teacher.model.state_dict(), tmp_path / "model.safetensors")
    from_file = recipe(name, weights=str(tmp_path / "model.safetensors"), pretraining_steps=0)
    loaded = load_teacher(name, from_file, seed=5)
    assert torch.equal(loaded([picture(20, 20)]), teacher([picture(20, 20)]))
    assert loaded.fingerprint == teacher.fingerprint


def test_missing_unexpected_and_misshapen_weights_are_named(tmp_path: Path) -> None:
    weights = dict(untrained("dinov3").model.state_dict())
    del weights["cls_token"]
    weights |= {"neck.weight": torch.zeros(1), "reg_token": torch.zeros(1, 4, 8)}
    save_file(weights, tmp_path / "model.safetensors")
    broken = recipe("dinov3", weights=str(tmp_path / "model.safetensors"), pretraining_steps=0)
    with pytest.raises(TeacherError) as caught:
        load_teacher("dinov3", broken, seed=0)
    for part in ("1 missing (cls_token)", "1 unexpected (neck.weight)", "reg_token [1, 4, 8] instead of [1, 4, 16]"):
        assert part in str(caught.value)


def test_a_classifier_in_the_file_is_not_used(tmp_path: Path) -> None:
    weights = dict(untrained("dinov3").model.state_dict()) | {"head.weight": torch.zeros(7, 16)}
    save_file(weights, tmp_path / "model.safetensors")
    wanted = recipe("dinov3", weights=str(tmp_path / "model.safetensors"), pretraining_steps=0)
    assert load_teacher("dinov3", wanted, seed=0).fingerprint == untrained("dinov3").fingerprint


def test_hub_weights_are_fetched_at_the_pinned_revision_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = untrained("dinov3")
    save_file(teacher.model.state_dict(), tmp_path / "model.safetensors")
    asked: list[tuple[str, str]] = []

    def snapshot(repository: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((repository, revision))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    pinned = recipe("dinov3", hub_id="timm/some-teacher", revision="a" * 40, pretraining_steps=0)
    assert load_teacher("dinov3", pinned, seed=0).fingerprint == teacher.fingerprint
    assert asked == [("timm/some-teacher", "a" * 40)]


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(*_: Any, **__: Any) -> str:
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    pinned = recipe("dinov3", hub_id="timm/some-teacher", revision="a" * 40, pretraining_steps=0)
    with pytest.raises(
        TeacherError, match=r"teachers.dinov3.hub_id=timm/some-teacher .*no route.*set teachers.dinov3.weights"
    ):
        load_teacher("dinov3", pinned, seed=0)


def test_the_fingerprint_follows_weights_and_preprocessing() -> None:
    teacher, same = untrained("dinov3"), untrained("dinov3")
    assert teacher.fingerprint == same.fingerprint
    changed = untrained("dinov3")
    changed.model.cls_token.data[0, 0, 0] += 1e-3  # type: ignore[index,operator]
    assert teacher.fingerprint != changed.fingerprint
    assert teacher.fingerprint != untrained("dinov3", layer=0).fingerprint
    assert teacher.fingerprint != untrained("dinov3", image_pixels=32).fingerprint
    assert teacher.fingerprint != untrained("dinov3", model="vit_large_patch16_dinov3.sat493m").fingerprint


@pytest.mark.usefixtures("few_scenes")
@pytest.mark.parametrize("name", RECIPES)
def test_the_same_seed_trains_the_same_teacher_and_another_seed_another(name: str) -> None:
    wanted = recipe(name, pretraining_steps=3)
    first = load_teacher(name, wanted, seed=0)
    state = torch.random.get_rng_state()
    assert load_teacher(name, wanted, seed=0).fingerprint == first.fingerprint
    assert load_teacher(name, wanted, seed=1).fingerprint != first.fingerprint
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers are not touched"


def test_a_short_training_teaches_what_lies_under_a_patch() -> None:
    arguments = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 64, "init_values": 1.0}
    short, longer = (
        load_teacher("dinov3", recipe("dinov3", arguments=arguments, pretraining_steps=steps), seed=0).held_out_accuracy
        for steps in (1, 60)
    )
    assert short is not None and longer is not None
    assert longer > 0.6 > short + 0.1


@pytest.mark.usefixtures("few_scenes")
def test_a_saved_teacher_reads_back_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    teacher = load_teacher("pi3", recipe("pi3"), seed=0)
    teacher.save(tmp_path)
    assert torch.equal(read_teacher(tmp_path)([picture(20, 20)]), teacher([picture(20, 20)]))
    weights = load_file(tmp_path / "teacher.safetensors")
    weights["register_token"] = weights["register_token"] + 1
    save_file(weights, tmp_path / "teacher.safetensors")
    with pytest.raises(TeacherError, match="was changed after it was saved"):
        read_teacher(tmp_path)
    with pytest.raises(TeacherError, match="does not exist"):
        read_teacher(tmp_path / "elsewhere")


@pytest.mark.usefixtures("few_scenes")
def test_a_saved_teacher_reads_back_as_a_recipe_wants_it_if_its_features_stay_the_same(tmp_path: Path) -> None:
    wanted = recipe("dinov3", precision="bfloat16")
    teacher = load_teacher("dinov3", wanted, seed=0)
    assert teacher.dtype == torch.bfloat16 and teacher.held_out_accuracy is not None
    teacher.save(tmp_path)
    changed = wanted.model_copy(update={"compile": True, "license": "MIT"})
    again = read_teacher(tmp_path, recipe=changed)
    assert again.recipe.compile and again.license == "MIT" and again.fingerprint == teacher.fingerprint
    with pytest.raises(TeacherError, match=r"or teachers.dinov3 is another one now"):
        read_teacher(tmp_path, recipe=wanted.model_copy(update={"precision": "float32"}))


# ------------------------------------------------------------------------- the vision tower of Qwen2.5-VL itself


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base_model")
    save_model(tiny.model(seed=3), tiny.processor(), folder, {})
    return folder


def tower_recipe(**changes: Any) -> TeacherRecipe:
    values = {"architecture": "qwen2_5_vl", "model": QWEN_TOWER, "image_pixels": 64}
    return TeacherRecipe.model_validate(values | changes)


def tower(folder: Path | None, **changes: Any) -> Teacher:
    return load_teacher("qwen", tower_recipe(**changes), seed=0, base_model=folder)


def copied(folder: Path, to: Path, file: str = "", **changes: Any) -> Path:
    """A copy of a checkpoint folder; `changes` are made in the JSON `file`, below its key `within`."""
    shutil.copytree(folder, to)
    if file:
        values = json.loads((to / file).read_text())
        values[changes.pop("within")].update(changes)
        (to / file).write_text(json.dumps(values))
    return to


@pytest.mark.parametrize("side", [64, 160], ids=["one window", "four windows"])
def test_qwens_tower_gives_what_the_whole_model_computes_of_the_same_pixels(base_model: Path, side: int) -> None:
    teacher, images = tower(base_model, image_pixels=side), [picture(side, side), tiny.image(1, side, side)]
    seen = tiny.processor().image_processor(images=images, return_tensors="pt")
    assert seen["image_grid_thw"].tolist() == [[1, side // 8, side // 8]] * 2
    whole = tiny.model(seed=3).model.get_image_features(**seen, return_dict=True).pooler_output
    assert teacher.grid == (side // 16, side // 16) and teacher.dim == 32
    torch.testing.assert_close(teacher(images).flatten(1, 2), torch.stack(list(whole)), rtol=0, atol=1e-6)


def test_qwens_tower_sees_the_squashed_image_as_every_teacher_does(base_model: Path) -> None:
    teacher, wide = tower(base_model), picture(200, 40)
    squashed = wide.resize((64, 64), PIL.Image.Resampling.BICUBIC)
    assert torch.equal(teacher([wide]), teacher([squashed])) and teacher([wide]).shape == (1, 4, 4, 32)


def test_only_the_tower_of_a_checkpoint_is_read(base_model: Path, tmp_path: Path) -> None:
    folder = copied(base_model, tmp_path / "sharded")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    # transformers keeps such names in memory; the hub's checkpoints have no model. before them.
    below = {f"model.{key}": tensor.bfloat16() for key, tensor in weights.items() if key.startswith("visual.")}
    save_file(below | {"model.norm.weight": torch.zeros(3)}, folder / "2.safetensors")
    (folder / "1.safetensors").write_bytes(b"the language model, which nobody opens")
    weight_map = {key: "1.safetensors" for key in weights if not key.startswith("visual.")}
    index = {"weight_map": weight_map | dict.fromkeys(below, "2.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    read = tower(None, weights=str(folder))
    assert read.model.state_dict().keys() == tower(base_model).model.state_dict().keys()
    assert all(tensor.dtype == torch.float32 for tensor in read.model.state_dict().values())
    torch.testing.assert_close(read([picture(64, 64)]), tower(base_model)([picture(64, 64)]), rtol=0.1, atol=0.02)


def test_qwens_mean_and_deviation_are_those_of_its_own_processor(base_model: Path, tmp_path: Path) -> None:
    changes = {"within": "image_processor", "image_mean": [0.0] * 3, "image_std": [1.0, 1.0, 0.5]}
    other = tower(copied(base_model, tmp_path / "other", "processor_config.json", **changes))
    assert (other.preprocessing["mean"], other.preprocessing["std"]) == ([0.0] * 3, [1.0, 1.0, 0.5])
    assert other.fingerprint != tower(base_model).fingerprint == tower(base_model).fingerprint


def test_the_fingerprint_of_qwens_tower_follows_what_no_weight_shows(base_model: Path, tmp_path: Path) -> None:
    same = tower(copied(base_model, tmp_path / "same"))
    narrow = tower(copied(base_model, tmp_path / "narrow", "config.json", within="vision_config", window_size=32))
    assert same.fingerprint == tower(base_model).fingerprint != narrow.fingerprint


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, r"has no config.json; give the folder of a Qwen2.5-VL checkpoint"),
        ("config.json", b'{"model_type": "qwen2"}', r"holds a model of type 'qwen2'"),
        ("config.json", b"{", r"is no whole checkpoint"),
        ("model.safetensors", None, r"lacks model.safetensors; copy the checkpoint again"),
        ("model.safetensors", b"x" * 64, r"model.safetensors can't be read as safetensors"),
        ("model.safetensors.index.json", b"{}", r"index.json can't be read"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_named(
    base_model: Path, tmp_path: Path, file: str, content: bytes | None, message: str
) -> None:
    folder = copied(base_model, tmp_path / "broken")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(TeacherError, match=rf"(?s)^teachers.qwen.weights=.*broken.*{message}"):
        tower(None, weights=str(folder))


def test_a_tower_without_its_weights_a_folder_or_a_fitting_size_says_what_to_change(
    base_model: Path, tmp_path: Path
) -> None:
    folder = copied(base_model, tmp_path / "towerless")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {key: value for key, value in weights.items() if "visual.merger" not in key}, folder / "model.safetensors"
    )
    with pytest.raises(TeacherError, match=r"the base model in .*towerless.* 5 missing \(merger.ln_q.weight"):
        tower(folder)
    with pytest.raises(TeacherError, match=r"teachers.qwen has no weights; set weights .*input base_model"):
        tower(None)
    with pytest.raises(TeacherError, match=r"teachers.qwen.image_pixels=72 is no multiple .* 16 px; set it to 64"):
        tower(base_model, image_pixels=72)


def test_qwens_tower_in_bfloat16_turns_its_patches_by_the_same_angles(base_model: Path) -> None:
    exact, rounded = (tower(base_model, precision=one).model for one in ("float32", "bfloat16"))
    found, frequencies = dict(rounded.named_buffers()), dict(exact.named_buffers())
    assert any(name.endswith("inv_freq") for name in frequencies)
    for name, buffer in frequencies.items():
        assert found[name].dtype == buffer.dtype and torch.equal(found[name], buffer)
    assert {tensor.dtype for tensor in rounded.state_dict().values()} == {torch.bfloat16}


def test_qwens_tower_runs_in_bfloat16_and_is_not_saved_without_its_checkpoint(base_model: Path, tmp_path: Path) -> None:
    exact, rounded = tower(base_model), tower(base_model, precision="bfloat16")
    images = [picture(64, 64)]
    assert rounded(images).dtype == torch.bfloat16
    assert torch.cosine_similarity(rounded(images).float(), exact(images), dim=-1).min() > 0.99
    with pytest.raises(TeacherError, match=r"teachers.qwen came with its weights; keep these instead"):
        exact.save(tmp_path)
