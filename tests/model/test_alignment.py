"""The alignment loss against the formula, one segment and one patch at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from valr_ops.data.sequences import Region
from valr_ops.model.alignment import (
    AlignmentError,
    AlignmentOutput,
    Projectors,
    alignment_loss,
    upsampling_matrix,
)
from valr_ops.recipe.recipe import AlignmentRecipe

HIDDEN, SLOTS = 12, 9
KEYS = (Region("a"), Region("a", (0, 0, 8, 8)), None, Region("b"))
GRIDS = ((4, 4), (3, 5), None, (4, 4))


def made(dimensions: dict[str, int], seed: int = 0) -> Projectors:
    torch.manual_seed(seed)
    return Projectors(dimensions, HIDDEN, AlignmentRecipe(teachers=tuple(dimensions), projector_width=10)).double()


def states(segments: int = len(KEYS)) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(segments, SLOTS, HIDDEN, dtype=torch.float64, requires_grad=True)


def targets(dimension: int = 6) -> list[Tensor | None]:
    torch.manual_seed(2)
    return [None if grid is None else torch.randn(*grid, dimension, dtype=torch.float64) for grid in GRIDS]


def upsampled_first(projector: Any, slots: Tensor, grid: tuple[int, int], mode: str) -> Tensor:
    """The paper's order: upsample F, then the whole MLP; [h, w, D]."""
    if mode == "linear_1d":
        resized = F.interpolate(slots.T[None], size=grid[0] * grid[1], mode="linear", align_corners=False)
        features = resized[0].T.view(*grid, -1)
    else:
        image = slots.T.view(1, -1, 3, 3)
        align_corners = None if mode == "nearest" else False
        features = F.interpolate(image, size=grid, mode=mode, align_corners=align_corners)[0].permute(1, 2, 0)
    return projector.rest(projector.first(features))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest", "linear_1d"])
def test_it_is_the_papers_formula_summed_over_segments(mode: str) -> None:
    projectors, slots, features = made({"dinov3": 6}), states(), targets()
    output = alignment_loss(projectors, slots, {"dinov3": features}, KEYS, upsample=mode)
    wanted = torch.zeros((), dtype=torch.float64)
    for segment, target in enumerate(features):
        if target is not None:
            grid = (target.shape[0], target.shape[1])
            predicted = upsampled_first(projectors["dinov3"], slots[segment], grid, mode)
            patches = zip(predicted.flatten(0, 1), target.flatten(0, 1), strict=True)
            wanted = wanted - torch.stack([p @ t / (p.norm() * t.norm()) for p, t in patches]).mean()
    found = output.teachers["dinov3"]
    assert found.segments == 3
    assert torch.allclose(found.loss_sum, wanted, atol=1e-12)
    gradients = [torch.autograd.grad(loss, slots, retain_graph=True)[0] for loss in (found.loss_sum, wanted)]
    assert torch.allclose(*gradients, atol=1e-12)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest", "linear_1d"])
def test_rows_of_the_upsampling_matrix_sum_to_one(mode: str) -> None:
    matrix = upsampling_matrix(SLOTS, 5, 7, mode)
    assert matrix.shape == (35, SLOTS)
    assert torch.allclose(matrix.sum(1), torch.ones(35, dtype=matrix.dtype))


class Copy(nn.Module):
    """A projector that hands its upsampled slots on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, slots: Tensor, upsample: Tensor) -> Tensor:
        return upsample @ slots * self.scale


def aligned(slots: Tensor, features: list[Tensor | None], keys: Any = None) -> AlignmentOutput:
    projectors = made({"dinov3": HIDDEN})
    projectors["dinov3"] = Copy()
    keys = keys or [None if target is None else Region(str(index)) for index, target in enumerate(features)]
    return alignment_loss(projectors, slots, {"dinov3": features}, keys, upsample="bilinear")


def loss_of(slots: Tensor, features: list[Tensor | None]) -> float:
    output = aligned(slots, features)
    return output.loss({"dinov3": output.teachers["dinov3"].segments}).item()


def test_a_perfect_copy_scores_minus_one_and_its_negative_plus_one() -> None:
    slots = states(2).detach()
    copy: list[Tensor | None] = [one.view(3, 3, HIDDEN) * 7.0 for one in slots]
    assert loss_of(slots, copy) == pytest.approx(-1.0, abs=1e-12)
    assert loss_of(-slots, copy) == pytest.approx(1.0, abs=1e-12)


def test_the_cosine_runs_over_features_not_over_patches() -> None:
    slots = states(1).detach()
    copy = slots[0].view(3, 3, HIDDEN)
    channels = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(3))
    assert loss_of(slots[..., channels], [copy[..., channels]]) == pytest.approx(-1.0, abs=1e-12)
    assert loss_of(slots, [copy.flip(0)]) > -0.9
    assert loss_of(slots, [copy.transpose(0, 1)]) > -0.9


def test_half_precision_is_compared_in_float32() -> None:
    slots = states(1).detach().bfloat16()
    projectors = made({"dinov3": HIDDEN}).bfloat16()
    projectors["dinov3"] = Copy().bfloat16()
    target = slots[0].view(3, 3, HIDDEN)
    output = alignment_loss(projectors, slots, {"dinov3": [target]}, [Region("a")], upsample="nearest")
    assert output.teachers["dinov3"].loss_sum.dtype == torch.float32
    assert output.teachers["dinov3"].loss_sum.item() == pytest.approx(-1.0, abs=1e-6)


def test_stored_half_precision_features_are_not_what_the_predictions_are_rounded_to() -> None:
    slots = states(1).detach()
    stored = torch.randn(3, 3, HIDDEN).bfloat16()
    exact = F.cosine_similarity(slots[0], stored.double().flatten(0, 1), dim=-1).mean()
    assert loss_of(slots, [stored]) == pytest.approx(-exact.item(), abs=1e-12)


def test_zero_vectors_give_neither_nan_nor_inf() -> None:
    slots = torch.zeros(1, SLOTS, HIDDEN, dtype=torch.float64, requires_grad=True)
    output = aligned(slots, [torch.zeros(4, 4, HIDDEN, dtype=torch.float64)])
    loss = output.loss({"dinov3": 1})
    (slope,) = torch.autograd.grad(loss, slots)
    assert loss.item() == 0.0
    assert bool(torch.isfinite(slope).all())


def test_segments_without_target_contribute_nothing() -> None:
    slots, features = states(), targets()
    projectors = made({"dinov3": 6})
    output = alignment_loss(projectors, slots, {"dinov3": features}, KEYS, upsample="bilinear")
    (slope,) = torch.autograd.grad(output.loss({"dinov3": 3}), slots)
    assert not bool(slope[2].any())
    assert bool(slope[[0, 1, 3]].flatten(1).any(1).all())


@pytest.mark.parametrize("nothing", [None, "no targets"])
def test_an_unused_projector_gets_a_zero_gradient(nothing: str | None) -> None:
    projectors = made({"dinov3": 6, "siglip2": 4})
    slots = None if nothing is None else states(2)
    empty: list[Tensor | None] = [] if slots is None else [None, None]
    output = alignment_loss(
        projectors, slots, {"dinov3": empty, "siglip2": empty}, [None] * len(empty), upsample="bilinear"
    )
    output.loss({"dinov3": 0, "siglip2": 0}).backward()
    for name, parameter in projectors.named_parameters():
        assert parameter.grad is not None and not bool(parameter.grad.any()), name


def test_batches_normalised_by_the_whole_windows_segments_add_up_to_one_batch() -> None:
    projectors, slots = made({"dinov3": 6, "siglip2": 4}), states()
    features = {"dinov3": targets(), "siglip2": [None, *targets(4)[1:]]}
    totals = {"dinov3": 3, "siglip2": 2}

    def share(part: slice) -> Tensor:
        cut = {name: given[part] for name, given in features.items()}
        return alignment_loss(projectors, slots[part], cut, KEYS[part], upsample="bilinear").loss(totals)

    whole = share(slice(None))
    assert torch.allclose(share(slice(0, 1)) + share(slice(1, None)), whole, atol=1e-12)
    assert -1.0 <= whole.item() <= 1.0


def test_the_control_is_the_cosine_to_the_next_image_on_that_images_grid() -> None:
    slots, features = states(), targets(HIDDEN)
    features[3] = torch.randn(2, 6, HIDDEN, dtype=torch.float64)
    found = aligned(slots, features, KEYS).teachers["dinov3"]
    wanted = 0.0
    for segment, other in ((0, 3), (1, 3), (3, 0)):
        target = features[other]
        assert target is not None
        matrix = upsampling_matrix(SLOTS, target.shape[0], target.shape[1], "bilinear")
        wanted += F.cosine_similarity(matrix @ slots[segment], target.flatten(0, 1), dim=-1).mean().item()
    assert found.control_segments == 3
    assert found.control_sum == pytest.approx(wanted, abs=1e-12)


def test_a_control_changes_no_gradient_and_a_crop_is_no_other_image() -> None:
    slots, features = states(), targets(HIDDEN)
    same = tuple(None if key is None else Region("a", key.box) for key in KEYS)
    alone, compared = aligned(slots, features, same), aligned(slots, features, KEYS)
    assert alone.teachers["dinov3"].control_segments == 0 < compared.teachers["dinov3"].control_segments
    gradients = [torch.autograd.grad(output.loss({"dinov3": 3}), slots)[0] for output in (alone, compared)]
    assert torch.equal(*gradients)


def test_teachers_with_other_grids_and_widths_share_a_batch_without_touching_each_other() -> None:
    projectors, slots = made({"dinov3": 6, "pi3": 10}), states()
    coarse: list[Tensor | None] = [
        torch.randn(2, 7, 10, dtype=torch.float64),
        None,
        None,
        torch.randn(2, 2, 10).double(),
    ]
    both = alignment_loss(projectors, slots, {"dinov3": targets(), "pi3": coarse}, KEYS, upsample="bilinear")
    assert (both.teachers["dinov3"].segments, both.teachers["pi3"].segments) == (3, 2)
    for name, features in (("dinov3", targets()), ("pi3", coarse)):
        one = made({name: 6})
        one[name] = projectors[name]
        alone = alignment_loss(one, slots, {name: features}, KEYS, upsample="bilinear").teachers[name]
        assert torch.equal(both.teachers[name].loss_sum, alone.loss_sum)
    shares = {"dinov3": 3, "pi3": 2}
    means = [both.teachers[name].loss_sum / count for name, count in shares.items()]
    assert torch.allclose(both.loss(shares), (means[0] + means[1]) / 2)


def test_what_does_not_fit_is_refused_by_name() -> None:
    projectors, slots = made({"dinov3": 6}), states()
    with pytest.raises(AlignmentError, match="siglip2"):
        alignment_loss(projectors, slots, {"siglip2": targets()}, KEYS, upsample="bilinear")
    with pytest.raises(AlignmentError, match="dinov3: 3 targets and 4 keys for 4 segments"):
        alignment_loss(projectors, slots, {"dinov3": targets()[:3]}, KEYS, upsample="bilinear")
    with pytest.raises(AlignmentError, match="the projector makes 6 features a patch but the target has 5"):
        alignment_loss(projectors, slots, {"dinov3": targets(5)}, KEYS, upsample="bilinear")
    with pytest.raises(AlignmentError, match="8 slots make no square grid"):
        upsampling_matrix(8, 4, 4, "bilinear")
    assert upsampling_matrix(8, 4, 4, "linear_1d").shape == (16, 8)
    with pytest.raises(AlignmentError, match=r"alignment\.upsample='area'"):
        upsampling_matrix(9, 4, 4, "area")
