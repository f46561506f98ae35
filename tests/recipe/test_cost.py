"""What a step costs: the formulas against published and counted parameters, and against each other."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from tests import tiny
from valr_ops.data.batching import Collator
from valr_ops.model.latents import forward
from valr_ops.recipe import cost, recipes
from valr_ops.recipe.recipe import override
from valr_ops.training.windows import Share


@pytest.mark.parametrize(("shape", "published"), [(cost.QWEN_3B, 3_754_622_976), (cost.QWEN_7B, 8_292_166_656)])
def test_the_published_models_have_their_published_number_of_parameters(shape: cost.Shape, published: int) -> None:
    assert shape.decoder_parameters + shape.vision_parameters == published


def test_the_formula_counts_the_parameters_of_a_real_model() -> None:
    model, shape = tiny.model(), cost.shape(tiny.recipe())
    assert shape is not None
    assert shape.vision_parameters == sum(weight.numel() for weight in model.model.visual.parameters())
    assert shape.decoder_parameters + shape.vision_parameters == sum(weight.numel() for weight in model.parameters())


def test_a_loaded_model_has_the_shape_that_its_recipe_says() -> None:
    assert cost.shape_of(tiny.model().config) == cost.shape(tiny.recipe())


def test_the_formula_counts_what_a_real_step_multiplies() -> None:
    batch = Collator(tiny.images(), tiny.processor(), None)(tiny.sequences())
    model = tiny.model()
    with FlopCounterMode(display=False) as counted:
        forward(model, batch).loss_sum.backward()
    shape = cost.shape_of(model.config)
    # PyTorch doesn't count the CPU's fused attention, so it is left out on both sides.
    rows, images = batch.attention_mask.sum(1).tolist(), batch.image_grid_thw.prod(1).tolist()  # type: ignore[union-attr]
    attention = 3 * 2 * shape.layers * shape.hidden * sum(length * (length + 1) for length in rows)
    attention += (
        4 * shape.vision_hidden * sum(patches * (patches + min(patches, shape.vision_window**2)) for patches in images)
    )
    assert Share(batch, {}).flops(shape) - attention == counted.get_total_flops()


def test_only_known_whole_gpus_have_a_peak() -> None:
    assert cost.peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16") == 312e12
    assert cost.peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert cost.peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert cost.peak_flops("NVIDIA L4", "float32") == 30.3e12
    assert cost.peak_flops("NVIDIA L40S", "bfloat16") == 362e12
    for unknown in ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "NVIDIA H20", "Tesla T4"):
        assert cost.peak_flops(unknown, "bfloat16") is None


def test_a_checkpoint_of_which_only_the_path_is_known_has_no_shape() -> None:
    recipe = override(recipes.tiny(), {"base": {"from_scratch": None, "path": "somewhere"}})
    assert cost.shape(recipe) is None


def test_short_rows_cost_two_flops_a_weight_forward_and_six_in_training() -> None:
    shape = cost.QWEN_7B
    weights_in_blocks = shape.decoder_parameters - 2 * shape.vocabulary * shape.hidden
    assert shape.decoder_flops(1, labelled=0) == pytest.approx(2 * weights_in_blocks, rel=1e-3)
    step = cost.train_step_flops(shape, records=2, positions=1, labelled=0, patches=0)
    assert step == 2 * 3 * shape.decoder_flops(1, labelled=0)


def test_attention_grows_with_the_square_of_the_row_in_the_decoder_and_less_in_the_windowed_tower() -> None:
    def curvature(flops: list[int]) -> int:
        return flops[2] - 2 * flops[1] + flops[0]

    decoder = [cost.QWEN_7B.decoder_flops(length, 0) for length in (1000, 1001, 1002)]
    tower = [cost.QWEN_7B.vision_flops(patches) for patches in (1000, 1004, 1008)]
    assert curvature(decoder) == 2 * cost.QWEN_7B.hidden * cost.QWEN_7B.layers * 2
    assert curvature(tower) == 4 * cost.QWEN_7B.vision_hidden * cost.QWEN_7B.vision_full_layers * 2 * 4 * 4


def test_zero_2_splits_gradients_and_state_but_not_the_weights() -> None:
    stage = recipes.paper().stage2
    one, four = (cost.training_bytes(cost.QWEN_7B, stage, processes) for processes in (1, 4))
    weights = 2 * (cost.QWEN_7B.decoder_parameters + cost.QWEN_7B.vision_parameters)
    assert one == weights + 16 * cost.QWEN_7B.decoder_parameters
    assert four == weights + 16 * cost.QWEN_7B.decoder_parameters // 4
    # Several processes always use ZeRO-2, whatever the engine is called.
    alone = stage.model_copy(update={"engine": "torch"})
    assert cost.training_bytes(cost.QWEN_7B, alone, 4) == four


# --------------------------------------------------------------------------------------------------- stored or online


def choose(**changes: Any) -> cost.FeatureChoice:
    """1,000 images of 0.5 MB, each visited twice, by an encoder of 100 images a second and a disk of 1 GB/s."""
    facts: dict[str, Any] = {
        "wish": "auto",
        "images_per_second": 100.0,
        "image_bytes": 500_000,
        "images": 1000,
        "visits": 2000,
        "bytes_per_second": 1e9,
        "largest_bytes": 1e12,
    }
    return cost.choose_features(**facts | changes)


@pytest.mark.parametrize(
    ("changes", "mode", "online", "stored"),
    [
        # 2,000 images computed; or 1,000 computed, 0.5 GB written and 1 GB read.
        ({}, "stored", 20.0, 11.5),
        ({"visits": 1000}, "online", 10.0, 11.0),
        ({"images_per_second": 1000.0}, "online", 2.0, 2.5),
        ({"bytes_per_second": 1e8}, "online", 20.0, 25.0),
        ({"image_bytes": 5_000_000}, "online", 20.0, 25.0),
        ({"image_bytes": 5_000_000, "bytes_per_second": 1e10}, "stored", 20.0, 11.5),
        ({"images_per_second": 1000.0, "visits": 1e5}, "stored", 100.0, 51.5),
        ({"visits": 0.5}, "online", 0.005, 10.50025),
    ],
)
def test_features_are_stored_where_that_costs_fewer_seconds(
    changes: dict[str, Any], mode: str, online: float, stored: float
) -> None:
    choice = choose(**changes)
    assert choice.mode == mode
    assert choice.seconds == pytest.approx({"online_seconds": online, "stored_seconds": stored})


@pytest.mark.parametrize("wish", ["stored", "online"])
def test_the_recipe_overrules_the_numbers(wish: Any) -> None:
    for visits in (1, 1e9):
        choice = choose(wish=wish, images_per_second=None, visits=visits, largest_bytes=1)
        assert choice.mode == wish and choice.seconds == {}
        assert choice.reason == f"features are {wish}, as the recipe says; 1,000 images, 0.5 GB stored"


def test_a_store_larger_than_the_recipe_allows_is_not_made() -> None:
    assert choose(largest_bytes=5e8).mode == "stored"
    choice = choose(largest_bytes=5e8 - 1)
    assert choice.mode == "online" and choice.seconds["stored_seconds"] < choice.seconds["online_seconds"]
    assert "because the store would be larger than runtime.feature_bytes=5e+08" in choice.reason


def test_the_reason_holds_the_numbers() -> None:
    assert choose().reason == (
        "features are stored, the cheaper way; 100 images/s, 2,000 visits to 1,000 images, 0.5 GB stored: "
        "online 20 s, stored 11.5 s with a disk of 1 GB/s"
    )
