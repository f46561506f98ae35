"""What asking a model is said to cost: against sums done by hand, and the studies' own numbers of rounds."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from tests.recipe.test_cost_training import BLOCK, HIDDEN, LAYERS, PAPER, WORDS, low
from valr_ops.evaluation import interventions, length_study, probes
from valr_ops.recipe import cost, cost_answers, price, recipes, workload
from valr_ops.recipe.recipe import override

MMVP = {
    "evaluation.benchmarks": {"mmvp": {"path": "x"}},
    "price.answer_tokens": 100,
    "evaluation.max_new_tokens": 100,
    "evaluation.batch_size": 32,
}
"""300 questions with an image each in batches of 32, and answers of 100 tokens."""
PROMPT = 100 + round(640 * 480 / 28**2)
"""Positions: a fourth of 400 tokens of text, and the image."""


def asked(name: str, **changes: Any) -> price.Price:
    return price.price(override(PAPER, MMVP | {key.replace("__", "."): one for key, one in changes.items()}), name)


def seconds(found: price.Price) -> tuple[float, float]:
    least, most = found.hours["answers, token by token"]
    return 3600 * least, 3600 * most


def test_scores_read_the_weights_once_a_token_of_a_batch() -> None:
    found = asked("scores_base")
    # 10 batches of 32: a step reads blocks, head and the keys and values of all rows, half of the answer on average.
    a_step = 2 * LAYERS * BLOCK + 2 * HIDDEN * WORDS + 32 * 57_344 * (PROMPT + 50)
    by_hand = 10 * 100 * a_step / 2.0e12
    assert seconds(found) == pytest.approx((by_hand / 0.6, by_hand / 0.3), rel=0.001)
    assert found.gpus == 1 and found.reads == {"base_model": 2 * 8_292_166_656, "images": 300 * 100_000}
    # At slots the head is not read: 3 segments of 16 slots and 2 markers.
    slots = 10 * (154 * (2 * LAYERS * BLOCK + 32 * 57_344 * (PROMPT + 77)) + 100 * 2 * HIDDEN * WORDS) / 2.0e12
    assert seconds(asked("scores_valr_m"))[0] == pytest.approx(slots / 0.6, rel=0.001)


def test_questions_are_computed_in_parallel() -> None:
    found = asked("scores_base").flops
    assert low(found["questions"]) == 300 * cost.QWEN_7B.decoder_flops(PROMPT, 1)
    # 2 N D, the rule of thumb, with 2 % for attention.
    assert low(found["questions"]) == pytest.approx(300 * 2 * LAYERS * BLOCK * PROMPT, rel=0.03)


def test_images_are_opened_by_the_cpu_each_time_they_are_asked_about() -> None:
    assert 3600 * asked("scores_base").hours["opening images"][0] == pytest.approx(300 / 700)
    assert 3600 * asked("latent_check").hours["opening images"][1] == pytest.approx(5 * 64 / 300)


def test_a_limit_on_items_counts_for_every_benchmark() -> None:
    assert asked("scores_base", evaluation__limit=32).reads["images"] == 32 * 100_000
    assert seconds(asked("scores_base", evaluation__limit=32))[0] == pytest.approx(
        seconds(asked("scores_base"))[0] / 10
    )


def test_the_numbers_of_questions_are_the_readers_own() -> None:
    for name, items in workload.PUBLISHED_ITEMS.items():
        reader = importlib.import_module(f"valr_ops.evaluation.benchmarks.{name}")
        assert sum(reader.COUNTS.values()) == items, name


def test_the_rounds_of_studies_are_the_studies_own() -> None:
    assert cost_answers.LEAST_ITEMS == length_study.LEAST_ITEMS
    assert len(length_study._QUANTILES) + 2 == cost_answers.TOKEN_BUDGETS
    assert len(interventions.CONDITIONS) == cost_answers.CONDITIONS
    assert cost_answers.MOST_CUTS == probes._MOST_CUTS


def test_a_study_asks_its_items_once_a_round_in_float32() -> None:
    check = asked("latent_check")
    # 64 of the 300 in two batches, under five conditions.
    a_round = 2 * (154 * (4 * LAYERS * BLOCK + 32 * 2 * 57_344 * (PROMPT + 77)) + 100 * 4 * HIDDEN * WORDS) / 2.0e12
    assert seconds(check) == pytest.approx((5 * a_round / 0.6, 5 * a_round / 0.3), rel=0.001)
    assert low(check.flops["questions"]) == 5 * 64 * cost.QWEN_7B.decoder_flops(PROMPT, 1)
    parallel = low(check.flops["questions"]) + low(check.flops["vision tower"])
    assert check.hours["computing"][0] * 3600 == pytest.approx(parallel / (0.5 * 19.5e12))
    assert check.memory["weights"] == 4 * 8_292_166_656
    # Two models, 4 to 8 places to hide images from beside the answers as they are; 9 to 11 budgets of the other study.
    decay, curve = seconds(asked("visual_decay")), seconds(asked("scaling_curve"))
    assert decay == pytest.approx((2 * 5 * a_round / 0.6, 2 * 9 * a_round / 0.3), rel=0.001)
    assert curve == pytest.approx((9 * a_round / 0.6, 11 * a_round / 0.3), rel=0.001)


def test_maps_look_at_held_out_records_once() -> None:
    found = asked("alignment_maps")
    positions = round(400 + 4 * 640 * 480 / 28**2 + 3 * 18)
    assert low(found.flops["records"]) == 2 * 64 * cost.QWEN_7B.decoder_flops(positions, 0)
    assert set(found.reads) == {"cot_corpus", "latent_corpus", "stage2_valr_m"}


def test_a_study_without_questions_asks_for_a_benchmark() -> None:
    nothing = override(recipes.paper(), {"evaluation.benchmarks": {}})
    with pytest.raises(price.PriceError, match="latent_check has nothing to ask; name a benchmark"):
        price.price(nothing, "latent_check")
