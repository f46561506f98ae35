"""The arms: each minimises what its row says, and they differ in nothing else."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.studies.tiny_study import model, recipe, teachers
from valr_ops.data.batching import IGNORED
from valr_ops.studies.arms import ARMS, ArmLoss
from valr_ops.studies.tiles import CORNERS, along_trail, draw


def losses(name: str) -> tuple[ArmLoss, dict[str, float], torch.Tensor]:
    """The arm's loss on three pictures with one model and equal projectors, its row, and its value."""
    one, layout = model()
    torch.manual_seed(5)
    loss_of = ArmLoss(ARMS[name], one, teachers(), layout, recipe()).double()
    loss, row = loss_of(draw((8,), 3, 2, 4))
    return loss_of, row, loss


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_trains_the_decoder_and_its_projectors_and_nothing_else(name: str) -> None:
    loss_of, row, loss = losses(name)
    assert loss.isfinite() and loss.item() == pytest.approx(row["loss"])
    loss.backward()
    trained = {
        key.split(".")[0] if key.startswith("projectors") else key
        for key, parameter in loss_of.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }
    assert ("projectors" in trained) == bool(ARMS[name].teachers)
    assert any("language_model.layers" in key for key in trained) and not any("visual" in key for key in trained)


def test_aligned_weights_the_cosine_by_lambda_and_leaves_the_text_as_it_is() -> None:
    (_, plain, _), (_, aligned, _) = losses("latents"), losses("aligned")
    assert aligned["ce"] == pytest.approx(plain["ce"], rel=1e-12)
    assert aligned["loss"] == pytest.approx(plain["ce"] - 0.5 * aligned["alignment/all"], rel=1e-12)


def test_another_pictures_features_are_the_target_where_the_arm_says_so() -> None:
    _, own, _ = losses("aligned")
    _, another, _ = losses("another")
    # The control of an arm compares with the features of another picture: for one arm the other's own target.
    assert another["alignment/all"] == pytest.approx(own["control/all"], abs=0.05)
    assert another["alignment/all"] != own["alignment/all"]


def test_pads_in_place_of_states_read_neither_the_step_before_nor_the_slot_before() -> None:
    one, layout = model()
    pictures = draw((8,), 2, 2, 4)
    loss_of = ArmLoss(ARMS["pads"], one, teachers(), layout, recipe()).double()
    _, row = loss_of(pictures)
    batch = layout.batch(pictures, 4)
    # Without feedback it is one parallel pass over the pad's own embedding.
    seen = one(
        **{name: getattr(batch, name) for name in ("input_ids", "attention_mask", "mm_token_type_ids")},
        pixel_values=batch.pixel_values.double(),
        image_grid_thw=batch.image_grid_thw,
    )
    supervised = batch.labels[:, 1:] != IGNORED
    ce = F.cross_entropy(seen.logits[:, :-1][supervised], batch.labels[:, 1:][supervised])
    assert row["ce"] == pytest.approx(ce.item(), rel=1e-9)


@pytest.mark.parametrize("name", ["sft_image", "sft_step"])
def test_features_read_elsewhere_leave_the_text_as_it_is(name: str) -> None:
    (_, plain, _), (_, elsewhere, _) = losses("sft"), losses(name)
    assert elsewhere["ce"] == pytest.approx(plain["ce"], rel=1e-9)
    assert elsewhere["loss"] == pytest.approx(plain["ce"] - 0.5 * elsewhere["alignment/all"], rel=1e-9)


def test_the_gradient_of_all_hops_is_the_full_one_and_the_cut_one_is_not() -> None:
    gradients = {}
    for name in ("aligned", "cut", "hops_4"):
        loss_of, _, loss = losses(name)
        loss.backward()
        parameters = dict(loss_of.named_parameters())
        gradients[name] = torch.cat(
            [parameters[key].grad.flatten() for key in sorted(parameters) if parameters[key].grad is not None]
        )
    apart = {name: float((one - gradients["aligned"]).norm()) for name, one in gradients.items()}
    assert apart["cut"] > apart["hops_4"] > 0


def test_a_tile_is_cut_out_where_the_trail_leads() -> None:
    pictures = draw((8,), 2, 3, 2)
    grid = torch.arange(2 * 6 * 6).view(2, 6, 6, 1)
    tiles = along_trail(grid, pictures)
    assert tiles.shape == (4, 2, 2, 1) and tiles[0].numel() == CORNERS
    for row, trail in enumerate(pictures.trail.tolist()):
        for step, tile in enumerate(trail):
            first = 36 * row + 12 * (tile // 3) + 2 * (tile % 3)
            assert tiles[2 * row + step].flatten().tolist() == [first, first + 1, first + 6, first + 7]
