from __future__ import annotations

import pytest
import torch
from torch import nn

from valr_ops.recipe.recipe import TrainingRecipe
from valr_ops.training.schedule import learning_rate_factor, parameter_groups, updates


def recipe(**values: object) -> TrainingRecipe:
    return TrainingRecipe(**{"learning_rate": 1e-5, **values})  # type: ignore[arg-type]


def test_the_papers_450_000_records_are_3516_updates_with_105_of_warm_up() -> None:
    total = updates(recipe(), 450_000, processes=4)
    assert total == 3516
    factors = [learning_rate_factor(update, total, recipe()) for update in range(total)]
    assert factors.index(1.0) == 105
    assert factors[:106] == sorted(factors[:106])
    assert factors[105:] == sorted(factors[105:], reverse=True)
    assert 0 < factors[-1] < 1e-3


def test_epochs_may_be_fractional_and_max_updates_bounds_them() -> None:
    assert updates(recipe(micro_batch=4, accumulation=2, epochs=2.5), 32, processes=1) == 10
    assert updates(recipe(micro_batch=4, accumulation=2, epochs=2.5, max_updates=7), 32, processes=1) == 7
    assert updates(recipe(micro_batch=64, accumulation=2, epochs=0.01), 32, processes=1) == 1


@pytest.mark.parametrize(
    ("schedule", "half_way"), [("cosine", pytest.approx(0.5)), ("linear", pytest.approx(0.5)), ("constant", 1.0)]
)
def test_each_schedule_has_its_value_half_way(schedule: str, half_way: float) -> None:
    assert learning_rate_factor(50, 100, recipe(schedule=schedule, warmup_fraction=0.0)) == half_way


def test_norms_and_biases_are_not_decayed_and_projectors_have_their_own_rate() -> None:
    decoder, projector = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), nn.Linear(3, 2)
    decoder.append(nn.Linear(3, 3).requires_grad_(False))
    groups = parameter_groups(decoder.parameters(), projector.parameters(), recipe(projector_learning_rate=3e-4))
    seen = [(group["peak_lr"], group["weight_decay"], len(group["params"])) for group in groups]
    assert seen == [(1e-5, 0.01, 1), (1e-5, 0.0, 3), (3e-4, 0.01, 1), (3e-4, 0.0, 1)]


def test_a_frozen_or_empty_part_makes_no_group() -> None:
    assert parameter_groups([torch.zeros(2, 2)], (), recipe()) == []
