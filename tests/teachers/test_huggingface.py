"""Vision models of transformers: their folder says what they are, and their features are those timm's classes give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from valr_ops.recipe.recipe import TeacherRecipe
from valr_ops.teachers.encoders import Teacher, TeacherError, load_teacher
from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

import timm  # noqa: E402
import transformers  # noqa: E402

WIDTHS = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "projection_dim": 8,
}
PREFIX_TOKENS = {
    "dinov2": 1,
    "dinov2_with_registers": 5,
    "dinov3_vit": 5,
    "siglip_vision_model": 0,
    "clip_vision_model": 1,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that gives the checkpoint of a model type: two narrow blocks, every parameter random."""
    made: dict[str, Path] = {}

    def folder(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp(model_type)
            registers = {"num_register_tokens": 4} if PREFIX_TOKENS[model_type] == 5 else {}
            config = transformers.AutoConfig.for_model(model_type, **WIDTHS, **registers)
            write(transformers.AutoModel.from_config(config), made[model_type])
        return made[model_type]

    return folder


def write(model: Any, folder: Path) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    processor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def recipe(model: str, folder: Path, **changes: Any) -> TeacherRecipe:
    values = {"architecture": "transformers", "model": model, "weights": str(folder), "image_pixels": 32}
    return TeacherRecipe.model_validate(values | changes)


def teacher(model: str, folder: Path, **changes: Any) -> Teacher:
    return load_teacher("seen", recipe(model, folder, **changes), seed=0)


def pictures(count: int = 2, side: int = 32) -> list[PIL.Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return [PIL.Image.fromarray(image) for image in pixels]


def normalised(images: list[PIL.Image.Image]) -> Tensor:
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255
    return (pixels - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)


@pytest.mark.parametrize("model", PREFIX_TOKENS)
def test_features_are_the_models_last_tokens_after_its_final_norm_and_without_prefix(
    folders: Callable[[str], Path], model: str
) -> None:
    seen, images = teacher(model, folders(model)), pictures()
    with torch.no_grad():
        tokens = seen.model(normalised(images)).last_hidden_state
        if model == "clip_vision_model":
            tokens = seen.model.post_layernorm(tokens)  # type: ignore[operator]
    assert tokens.shape[1] == PREFIX_TOKENS[model] + 16
    assert seen.grid == (4, 4) and seen.dim == 16 and seen.preprocessing["mean"] == [0.5, 0.4, 0.3]
    torch.testing.assert_close(seen(images), tokens[:, PREFIX_TOKENS[model] :].unflatten(1, (4, 4)))


@pytest.mark.parametrize("model", PREFIX_TOKENS)
def test_every_model_takes_sizes_it_was_not_trained_at_and_keeps_its_patches_in_place(
    folders: Callable[[str], Path], model: str
) -> None:
    seen = teacher(model, folders(model), image_pixels=48)
    plain = np.full((48, 48, 3), 128, np.uint8)
    marked = plain.copy()
    marked[8:16, 40:48] = (255, 0, 0)
    features = seen(torch.from_numpy(np.stack([plain, marked])))
    assert features.shape == (2, 6, 6, 16)
    assert divmod(int((features[1] - features[0]).norm(dim=-1).argmax()), 6) == (1, 5)


def test_in_bfloat16_dinov3_turns_its_patches_by_the_same_angles(folders: Callable[[str], Path]) -> None:
    exact, rounded = (teacher("dinov3_vit", folders("dinov3_vit"), precision=one) for one in ("float32", "bfloat16"))
    given = torch.zeros(1, 3, 32, 32)
    angles = [one.model.rope_embeddings(given) for one in (exact, rounded)]  # type: ignore[operator]
    torch.testing.assert_close(*angles, rtol=0, atol=0)
    assert {one.dtype for one in rounded.model.state_dict().values()} == {torch.bfloat16}


def test_clip_gives_what_timms_class_gives_with_the_same_weights(folders: Callable[[str], Path]) -> None:
    """The target of the recipes is timm's: OpenAI's CLIP, after the norm that transformers gives to the class token."""
    folder = folders("clip_vision_model")
    weights = {
        key.removeprefix("vision_model."): value for key, value in load_file(folder / "model.safetensors").items()
    }
    model = timm.create_model(
        "vit_large_patch14_clip_quickgelu_224", embed_dim=16, depth=2, num_heads=2, img_size=32, patch_size=8,
        mlp_ratio=2, num_classes=0,
    ).eval()  # fmt: skip
    named = {
        "cls_token": weights["embeddings.class_embedding"].view(1, 1, -1),
        "pos_embed": weights["embeddings.position_embedding.weight"][None],
        "patch_embed.proj.weight": weights["embeddings.patch_embedding.weight"],
    }
    for ours, theirs in (("norm_pre", "pre_layrnorm"), ("norm", "post_layernorm")):
        named |= {f"{ours}.{kind}": weights[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    for block in range(2):
        ours, theirs = f"blocks.{block}", f"encoder.layers.{block}"
        for kind in ("weight", "bias"):
            parts = [weights[f"{theirs}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            named[f"{ours}.attn.qkv.{kind}"] = torch.cat(parts)
            named[f"{ours}.attn.proj.{kind}"] = weights[f"{theirs}.self_attn.out_proj.{kind}"]
            for number in (1, 2):
                named[f"{ours}.norm{number}.{kind}"] = weights[f"{theirs}.layer_norm{number}.{kind}"]
                named[f"{ours}.mlp.fc{number}.{kind}"] = weights[f"{theirs}.mlp.fc{number}.{kind}"]
    model.load_state_dict(named)
    images = pictures()
    with torch.no_grad():
        expected = model.forward_features(normalised(images))[:, 1:]  # type: ignore[operator]
    torch.testing.assert_close(
        teacher("clip_vision_model", folder)(images).flatten(1, 2), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("pair", "model"), [("CLIP", "clip_vision_model"), ("Siglip", "siglip_vision_model")])
def test_of_a_pair_of_vision_and_text_model_only_the_vision_model_is_used(
    pair: str, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = getattr(transformers, f"{pair}Config")(text_config=TEXT, vision_config=WIDTHS, projection_dim=8)
    whole = getattr(transformers, f"{pair}Model")(config).eval()
    write(whole, tmp_path)
    capfd.readouterr()
    seen, images = teacher(model, tmp_path), pictures()
    assert not any("text" in key for key in seen.model.state_dict())
    with torch.no_grad():
        pooled = whole.vision_model(normalised(images)).last_hidden_state[:, PREFIX_TOKENS[model] :]
        pooled = whole.vision_model.post_layernorm(pooled) if pair == "CLIP" else pooled
    torch.testing.assert_close(seen(images).flatten(1, 2), pooled)
    assert capfd.readouterr() == ("", ""), "the text model is no news"


def test_a_checkpoint_in_shards_is_read_whole(folders: Callable[[str], Path], tmp_path: Path) -> None:
    model = transformers.AutoModel.from_pretrained(folders("dinov2"))
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    processor = folders("dinov2") / "preprocessor_config.json"
    (tmp_path / "preprocessor_config.json").write_bytes(processor.read_bytes())
    assert teacher("dinov2", tmp_path).fingerprint == teacher("dinov2", folders("dinov2")).fingerprint
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(TeacherError, match=r"^teachers.seen.weights=.* lacks model-00002-of"):
        teacher("dinov2", tmp_path)


def test_the_fingerprint_follows_what_no_weight_shows(folders: Callable[[str], Path], tmp_path: Path) -> None:
    plain = teacher("dinov2", folders("dinov2"))
    for file in folders("dinov2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-3}))
    assert teacher("dinov2", tmp_path).fingerprint != plain.fingerprint
    (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_version": "4.0.0"}))
    assert teacher("dinov2", tmp_path).fingerprint == plain.fingerprint


def test_missing_unexpected_and_misshapen_weights_are_named(folders: Callable[[str], Path], tmp_path: Path) -> None:
    for file in folders("dinov2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["embeddings.cls_token"]
    weights |= {"neck.weight": torch.zeros(1), "layernorm.bias": torch.zeros(3)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TeacherError) as caught:
        teacher("dinov2", tmp_path)
    for part in (
        "1 missing (embeddings.cls_token)",
        "1 unexpected (neck.weight)",
        "layernorm.bias [3] instead of [16]",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("model", "file", "content", "message"),
    [
        ("resnet", "", None, r"teachers.seen.model='resnet' is no vision model .* choose dinov2, "),
        ("dinov3_vit", "", None, r"holds 'dinov2'; set teachers.seen.model to that"),
        ("dinov2", "config.json", None, r"has no config.json; give the folder of a checkpoint"),
        ("dinov2", "config.json", b"{", r"is no whole checkpoint"),
        ("dinov2", "config.json", b'{"model_type": "x", "auto_map": {"AutoConfig": "x.X"}}', r"is no whole checkpoint"),
        ("dinov2", "preprocessor_config.json", None, r"has no preprocessor_config.json, which holds mean"),
        ("dinov2", "preprocessor_config.json", b"{}", r"preprocessor_config.json gives no image_mean"),
        ("dinov2", "model.safetensors", None, r"lacks model.safetensors; copy the checkpoint again, as safetensors"),
        ("dinov2", "model.safetensors", b"x" * 64, r"is no whole checkpoint"),
    ],
)
def test_a_folder_that_does_not_hold_the_model_says_what_to_change(
    folders: Callable[[str], Path], tmp_path: Path, model: str, file: str, content: bytes | None, message: str
) -> None:
    for source in folders("dinov2").iterdir():
        if source.name != file or content is not None:
            (tmp_path / source.name).write_bytes(content if content and source.name == file else source.read_bytes())
    with pytest.raises(TeacherError, match=message):
        teacher(model, tmp_path)


def test_a_size_that_the_patch_does_not_divide_names_one_that_it_does(folders: Callable[[str], Path]) -> None:
    with pytest.raises(TeacherError, match=r"image_pixels=36 is no multiple .* 8 px; set it to 32"):
        teacher("dinov2", folders("dinov2"), image_pixels=36)
