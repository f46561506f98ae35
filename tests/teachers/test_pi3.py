"""π³ has the public checkpoint's parameters, computes what its description says, and prefers no view."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from valr_ops.teachers.encoders import TeacherError, load_strictly
from valr_ops.teachers.pi3 import HEAD_PREFIXES, Pi3


def tiny_pi3(dtype: torch.dtype = torch.float64) -> Pi3:
    """Two heads of eight, two encoder blocks, four decoder blocks, a 4 x 4 position table; every parameter matters."""
    torch.manual_seed(0)
    model = Pi3(embed_dim=16, depth=2, num_heads=2, img_size=56, decoder_depth=4).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def views(*shape: int) -> Tensor:
    """Views as they are after normalisation."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_parameter_counts_are_those_of_the_public_checkpoint() -> None:
    with torch.device("meta"):
        model = Pi3()
    assert sum(parameter.numel() for parameter in model.encoder.parameters()) == 304_371_712
    assert sum(parameter.numel() for parameter in model.decoder.parameters()) == 453_547_008
    assert model.register_token.numel() == 5_120


def test_names_and_shapes_are_those_of_the_public_checkpoint() -> None:
    def block(prefix: str, **extra: list[int]) -> dict[str, list[int]]:
        shapes = {
            **{f"norm{part}.{kind}": [1024] for part in (1, 2) for kind in ("weight", "bias")},
            **{f"ls{part}.gamma": [1024] for part in (1, 2)},
            "attn.qkv.weight": [3072, 1024],
            "attn.qkv.bias": [3072],
            "attn.proj.weight": [1024, 1024],
            "attn.proj.bias": [1024],
            "mlp.fc1.weight": [4096, 1024],
            "mlp.fc1.bias": [4096],
            "mlp.fc2.weight": [1024, 4096],
            "mlp.fc2.bias": [1024],
            **{f"attn.{name}.{kind}": shape for name, shape in extra.items() for kind in ("weight", "bias")},
        }
        return {prefix + name: shape for name, shape in shapes.items()}

    published = {
        "encoder.cls_token": [1, 1, 1024],
        "encoder.pos_embed": [1, 1370, 1024],
        "encoder.register_tokens": [1, 4, 1024],
        "encoder.patch_embed.proj.weight": [1024, 3, 14, 14],
        "encoder.patch_embed.proj.bias": [1024],
        "encoder.norm.weight": [1024],
        "encoder.norm.bias": [1024],
        "register_token": [1, 1, 5, 1024],
        "image_mean": [1, 3, 1, 1],
        "image_std": [1, 3, 1, 1],
    }
    for index in range(24):
        published |= block(f"encoder.blocks.{index}.")
    for index in range(36):
        published |= block(f"decoder.{index}.", q_norm=[64], k_norm=[64])
    with torch.device("meta"):
        model = Pi3()
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == published


def test_permuting_the_views_permutes_the_features() -> None:
    model, images = tiny_pi3(), views(2, 3, 3, 28, 42)
    order = [2, 0, 1]
    torch.testing.assert_close(model.joint(images[:, order]), model.joint(images)[:, order], rtol=0, atol=1e-12)


def test_a_scene_does_not_depend_on_the_other_scenes_of_the_batch() -> None:
    model, images = tiny_pi3(), views(2, 3, 3, 28, 28)
    torch.testing.assert_close(model.joint(images)[1:], model.joint(images[1:]), rtol=0, atol=1e-12)


def test_a_view_seen_with_copies_of_itself_is_the_view_seen_alone() -> None:
    model, images = tiny_pi3(), views(1, 1, 3, 28, 28)
    alone = model.joint(images)
    # Attention over identical copies of all keys and values is attention over one copy.
    torch.testing.assert_close(model.joint(images.repeat(1, 3, 1, 1, 1))[:, 1:2], alone, rtol=0, atol=1e-12)


def test_other_views_change_the_features_of_a_view() -> None:
    model, images = tiny_pi3(), views(1, 2, 3, 28, 28)
    together, alone = model.joint(images)[:, :1], model.joint(images[:, :1])
    assert (together - alone).norm() > 1e-3 * alone.norm()


def test_the_first_half_of_the_channels_never_saw_the_last_global_block() -> None:
    model, images = tiny_pi3(), views(1, 2, 3, 28, 28)
    before = model.joint(images)
    with torch.no_grad():
        model.decoder[-1].ls1.gamma.mul_(2.0)  # type: ignore[union-attr,operator]
    after = model.joint(images)
    assert torch.equal(before[..., :16], after[..., :16])
    assert not torch.allclose(before[..., 16:], after[..., 16:])


@pytest.mark.parametrize(("height", "width"), [(56, 56), (28, 42)])
def test_features_equal_a_slow_formulation_token_by_token(height: int, width: int) -> None:
    model, images = tiny_pi3(), views(1, 2, 3, height, width)
    torch.testing.assert_close(model.joint(images), slow_pi3(model, images), rtol=0, atol=1e-10)


def slow_pi3(model: Pi3, images: Tensor) -> Tensor:
    """The description of the architecture, one token and head at a time, rotations as complex numbers."""
    weights = dict(model.state_dict())
    _, count, _, height, width = images.shape
    rows, columns = height // 14, width // 14
    scene = []
    for view in images[0]:
        tokens = slow_encoder(weights, view, rows, columns)
        scene.append([*weights["register_token"][0, 0], *tokens])
    places = [(0, 0)] * 5 + [(row + 1, column + 1) for row in range(rows) for column in range(columns)]
    kept = []
    for index in range(4):
        if index % 2 == 0:
            scene = [slow_block(weights, f"decoder.{index}.", view, places) for view in scene]
        else:
            joined = slow_block(
                weights, f"decoder.{index}.", [token for view in scene for token in view], places * count
            )
            scene = [joined[start : start + len(places)] for start in range(0, len(joined), len(places))]
        kept.append([torch.stack(view[5:]) for view in scene])
    features = [torch.cat([frame, both], dim=-1) for frame, both in zip(kept[-2], kept[-1], strict=True)]
    return torch.stack(features).reshape(1, count, rows, columns, -1)


def slow_encoder(weights: dict[str, Tensor], view: Tensor, rows: int, columns: int) -> list[Tensor]:
    """Patch tokens of one normalised view, row-major."""
    kernel = weights["encoder.patch_embed.proj.weight"].flatten(1)
    table = weights["encoder.pos_embed"][0]
    grid = table[1:].float().reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    if (rows, columns) != (4, 4):
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", antialias=True)
        grid = grid.double()
    else:
        grid = table[1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    tokens = [weights["encoder.cls_token"][0, 0] + table[0], *weights["encoder.register_tokens"][0]]
    for row in range(rows):
        for column in range(columns):
            patch = view[:, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14].reshape(-1)
            tokens.append(kernel @ patch + weights["encoder.patch_embed.proj.bias"] + grid[0, :, row, column])
    for index in range(2):
        tokens = slow_block(weights, f"encoder.blocks.{index}.", tokens, places=None)
    return [normed(token, weights, "encoder.norm", 1e-6) for token in tokens[5:]]


def slow_block(
    weights: dict[str, Tensor], prefix: str, tokens: list[Tensor], places: list[tuple[int, int]] | None
) -> list[Tensor]:
    """One transformer block; with `places`, queries and keys are normed and turned."""
    projected = []
    for token in tokens:
        qkv = weights[prefix + "attn.qkv.weight"] @ normed(token, weights, prefix + "norm1", 1e-6)
        projected.append((qkv + weights[prefix + "attn.qkv.bias"]).reshape(3, 2, 8))
    heads: list[list[Tensor]] = [[] for _ in tokens]
    for head in range(2):
        queries, keys = ([each[kind, head] for each in projected] for kind in (0, 1))
        if places is not None:
            queries = [
                turned(normed(q, weights, prefix + "attn.q_norm", 1e-5), *at)
                for q, at in zip(queries, places, strict=True)
            ]
            keys = [
                turned(normed(k, weights, prefix + "attn.k_norm", 1e-5), *at)
                for k, at in zip(keys, places, strict=True)
            ]
        for position, query in enumerate(queries):
            scores = torch.stack([query @ key / math.sqrt(8) for key in keys]).exp()
            total = sum(
                (score * each[2, head] for score, each in zip(scores, projected, strict=True)), torch.zeros(8).double()
            )
            heads[position].append(total / scores.sum())
    after = []
    for token, parts in zip(tokens, heads, strict=True):
        attended = weights[prefix + "attn.proj.weight"] @ torch.cat(parts) + weights[prefix + "attn.proj.bias"]
        token = token + weights[prefix + "ls1.gamma"] * attended
        wide = weights[prefix + "mlp.fc1.weight"] @ normed(token, weights, prefix + "norm2", 1e-6)
        wide = wide + weights[prefix + "mlp.fc1.bias"]
        wide = wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2)))
        narrow = weights[prefix + "mlp.fc2.weight"] @ wide + weights[prefix + "mlp.fc2.bias"]
        after.append(token + weights[prefix + "ls2.gamma"] * narrow)
    return after


def normed(vector: Tensor, weights: dict[str, Tensor], name: str, eps: float) -> Tensor:
    centred = vector - vector.mean()
    return centred / (centred.square().mean() + eps).sqrt() * weights[name + ".weight"] + weights[name + ".bias"]


def turned(vector: Tensor, row: int, column: int) -> Tensor:
    """Eight channels: pairs (0, 2), (1, 3) turn with the row, (4, 6), (5, 7) with the column; frequencies 1, 1/10."""
    result = vector.clone()
    for half, position in ((0, row), (4, column)):
        for j, frequency in enumerate((1.0, 100.0 ** (-2 / 4))):
            pair = complex(vector[half + j], vector[half + j + 2]) * complex(
                math.cos(position * frequency), math.sin(position * frequency)
            )
            result[half + j], result[half + j + 2] = pair.real, pair.imag
    return result


def test_the_public_checkpoint_loads_without_its_geometry_heads() -> None:
    source, model = tiny_pi3(), Pi3(embed_dim=16, depth=2, num_heads=2, img_size=56, decoder_depth=4).double()
    heads = {f"{prefix}0.weight": torch.zeros(1) for prefix in HEAD_PREFIXES}
    load_strictly(model, source.state_dict() | heads, ignored_prefixes=HEAD_PREFIXES, where="test")
    images = views(1, 1, 3, 28, 28)
    assert torch.equal(model.eval().joint(images), source.joint(images))


@pytest.mark.parametrize("other", ["depth_encoder.0.weight", "ray_embed.weight", "metric_token"])
def test_a_parameter_of_another_model_is_refused(other: str) -> None:
    model = tiny_pi3()
    with pytest.raises(TeacherError, match=rf"1 unexpected \({other}\)"):
        load_strictly(model, model.state_dict() | {other: torch.zeros(1)}, ignored_prefixes=HEAD_PREFIXES, where="test")


def test_an_odd_number_of_decoder_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="decoder_depth=3 must be even"):
        Pi3(embed_dim=16, depth=1, num_heads=2, img_size=56, decoder_depth=3)
