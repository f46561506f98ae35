"""Teachers see on a GPU what they see on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.teachers.inputs import image, teacher_recipe
from valr_ops.data.corpus import ImageStore, write_images
from valr_ops.data.sequences import Region
from valr_ops.model.qwen import save_model
from valr_ops.recipe.recipe import QWEN_TOWER, TeacherRecipe
from valr_ops.teachers.encoders import Teacher, load_teacher
from valr_ops.teachers.extraction import Extractor, arranged, extract, finished_path, plan
from valr_ops.teachers.online import OnlineFeatures
from valr_ops.teachers.stored import Shard, Storage

pytestmark = pytest.mark.gpu

NARROW = {"embed_dim": 16, "depth": 2, "num_heads": 2}
RECIPES: dict[str, dict[str, Any]] = {
    "dinov3": {"architecture": "timm", "model": "vit_large_patch16_dinov3", "image_pixels": 64},
    "siglip2": {"architecture": "timm", "model": "vit_large_patch16_siglip_256", "image_pixels": 64},
    "pi3": {"architecture": "pi3", "model": "vit_large_patch14_reg4_dinov2", "image_pixels": 56},
    "qwen": {"architecture": "qwen2_5_vl", "model": QWEN_TOWER, "image_pixels": 64},
}


def teacher(name: str, folder: Path, device: str) -> Teacher:
    """The real class with two narrow blocks; on both devices with the same weights, from a file."""
    given = RECIPES[name]
    if name == "qwen":
        save_model(tiny.model(), tiny.processor(), folder, {})
        return load_teacher(name, TeacherRecipe.model_validate(given), 0, device=device, base_model=folder)
    arguments = NARROW | {"img_size": given["image_pixels"]} | ({"decoder_depth": 2} if name == "pi3" else {})
    trained = TeacherRecipe.model_validate({**given, "arguments": arguments, "pretraining_steps": 1})
    load_teacher(name, trained, 0).save(folder)
    kept = {"pretraining_steps": 0, "weights": str(folder / "teacher.safetensors")}
    return load_teacher(name, trained.model_copy(update=kept), 0, device=device)


@pytest.mark.parametrize("name", RECIPES)
def test_features_are_those_of_the_cpu_and_so_is_the_fingerprint(name: str, device: str, tmp_path: Path) -> None:
    pictures = [tiny.image(number, 64 + 8 * number, 64) for number in range(3)]
    on_cpu, on_device = teacher(name, tmp_path, "cpu"), teacher(name, tmp_path, device)
    wanted, found = on_cpu(pictures), on_device(pictures)
    assert found.device.type == on_device.device.type == torch.device(device).type
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-4)
    assert on_device.fingerprint == on_cpu.fingerprint


def test_convolutions_in_reduced_precision_turn_no_feature_by_more_than_storing_it_does(
    device: str, tmp_path: Path
) -> None:
    """What cuDNN does unless told not to."""
    torch.backends.cudnn.allow_tf32 = True
    pictures = [tiny.image(number) for number in range(3)]
    wanted = teacher("dinov3", tmp_path, "cpu")(pictures)
    found = teacher("dinov3", tmp_path, device)(pictures).cpu()
    assert torch.cosine_similarity(found, wanted, dim=-1).min() > 0.999


@pytest.mark.parametrize("name", ["dinov3", "pi3"])
@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_shards_and_online_features_made_on_a_gpu_are_those_of_the_cpu(
    name: str, storage: Storage, device: str, tmp_path: Path
) -> None:
    images = [image(seed) for seed in range(12)]
    write_images(tmp_path, images)
    views = tuple(sorted(one.digest for one in images[:3]))
    together = [Region(digest, None, views) for digest in views] if name == "pi3" else []
    targets = arranged([*(Region(one.digest) for one in images), *together])
    recipe = teacher_recipe(name, tmp_path / "weights", storage=storage)
    kept = []
    for where in ("cpu", device):
        extractor = Extractor(load_teacher(name, recipe, 0, device=where), ImageStore(tmp_path))
        (tmp_path / where).mkdir()
        shards = plan(targets, extractor.teacher)
        assert sum(extract(extractor, shards, tmp_path / where)) == len(targets)
        shard = Shard(finished_path(tmp_path / where, shards[0]), "")
        assert shard.facts.rows == len(targets)
        kept.append(torch.stack([shard[row].float() for row in range(len(targets))]))
    assert torch.cosine_similarity(kept[0], kept[1], dim=-1).min() > 0.9999
    found = OnlineFeatures(extractor).features([*targets, targets[0]])
    assert found[0].device.type == torch.device(device).type and torch.equal(found[0], found[-1])
    online = torch.stack(found[:-1]).float().cpu()
    assert torch.cosine_similarity(online, kept[0], dim=-1).min() > 0.999


def test_a_compiled_bfloat16_encoder_gives_nearly_the_features_of_float32(device: str, tmp_path: Path) -> None:
    recipe = teacher_recipe("dinov3", tmp_path / "weights")
    fast = recipe.model_copy(update={"precision": "bfloat16", "compile": True})
    exact, compiled = (load_teacher("dinov3", one, 0, device=device) for one in (recipe, fast))
    squashed = exact.squash([tiny.image(number % 7) for number in range(300)])
    found = compiled.features(squashed)
    assert found.dtype == torch.bfloat16 and len(found) == 300
    assert torch.cosine_similarity(found.float(), exact.features(squashed), dim=-1).mean() > 0.99
