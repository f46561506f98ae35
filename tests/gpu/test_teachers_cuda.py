"""Teachers see on a GPU what they see on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from valr_ops.model.qwen import save_model
from valr_ops.recipe.recipe import QWEN_TOWER, TeacherRecipe
from valr_ops.teachers.encoders import Teacher, load_teacher

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
