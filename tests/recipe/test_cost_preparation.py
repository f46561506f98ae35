"""What teachers, the base model and the stages of the CPU are said to cost: against published figures and by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.recipe.test_cost_training import CORPUS, PAPER, low
from valr_ops.model import tower
from valr_ops.recipe import cost, cost_preparation, price, recipes
from valr_ops.recipe.cost_artifacts import artifact_bytes
from valr_ops.recipe.recipe import override
from valr_ops.stages import STAGES, stage
from valr_ops.teachers import pretraining


@pytest.mark.parametrize(
    ("teacher", "views", "teraflops", "megabytes"),
    # facts: teachers.md, section 5.
    [("dinov3", 1, 0.16, 0.52), ("pi3", 1, 0.41, 1.05), ("pi3", 8, 3.6 / 8, 1.05), ("pi3", 32, 18 / 32, 1.05)],
)
def test_a_teacher_costs_what_its_architecture_says(
    teacher: str, views: int, teraflops: float, megabytes: float
) -> None:
    encoder = cost.encoder(PAPER.teachers[teacher], cost.QWEN_7B, views)
    assert encoder is not None
    assert encoder.flops / 1e12 == pytest.approx(teraflops, rel=0.05)
    assert 2 * encoder.patches * encoder.width / 1e6 == pytest.approx(megabytes, rel=0.01)


def test_the_encoders_have_the_published_number_of_parameters() -> None:
    vit, pi3 = (cost.encoder(PAPER.teachers[name], cost.QWEN_7B, 1) for name in ("dinov3", "pi3"))
    assert vit is not None and vit.parameters == pytest.approx(304_371_712, rel=0.01)
    assert pi3 is not None and pi3.parameters == pytest.approx(304_371_712 + 453_547_008, rel=0.01)
    assert cost.encoder(recipes.tiny().teachers["efficientnet"], cost.QWEN_7B, 1) is None


def test_features_are_read_or_computed_as_training_will_choose() -> None:
    kept = override(PAPER, {"teachers": {"dinov3": {"features": "stored"}}})
    features = price.price(kept, "teacher_features_dinov3")
    # 450,000 records with three targets each.
    assert features.stores["features"] == 1_350_000 * 256 * 1024 * 2
    assert low(features.flops["teacher"]) / 1_350_000 / 1e12 == pytest.approx(0.164, rel=0.01)
    stage2 = price.price(kept, "stage2_valr_s")
    assert stage2.reads["teacher_features_dinov3"] == features.stores["features"]
    assert "teachers" not in stage2.flops
    online = override(PAPER, {"teachers": {"dinov3": {"features": "online"}}})
    assert "teacher_features_dinov3" not in price.price(online, "stage2_valr_s").reads
    assert "teachers" in price.price(online, "stage2_valr_s").flops
    nothing = price.price(online, "teacher_features_dinov3")
    assert nothing.stores["features"] == 0 and "the stage only looks at a few" in nothing.remarks[0]


def test_features_are_priced_on_the_gpus_of_one_node() -> None:
    kept = override(PAPER, {"teachers": {"dinov3": {"features": "stored"}}})
    one = price.price(kept, "teacher_features_dinov3")
    of_two = price.price(override(kept, {"cluster.nodes": 2, "runtime.processes": 8}), "teacher_features_dinov3")
    assert (of_two.gpus, of_two.hours) == (one.gpus, one.hours) and one.gpus == 4


def test_a_teacher_without_a_formula_has_no_price_and_is_not_refused() -> None:
    unknown = "teacher_features_efficientnet"
    with pytest.raises(price.NoPriceError, match="what tf_efficientnet_lite0 computes is not known"):
        price.price(recipes.tiny(), unknown)
    assert price.refuse(recipes.tiny(), unknown) is None


def cpu(name: str, **changes: Any) -> price.Price:
    recipe = override(PAPER, {key.replace("__", "."): value for key, value in changes.items()})
    return cost_preparation.cpu_price(recipe, stage(name), CORPUS, cost.QWEN_7B)


def test_the_corpus_is_read_checked_and_written_at_measured_rates() -> None:
    found = cpu("cot_corpus")
    seconds = (128_000 * (4 / 700 + 1 / 11_000), 128_000 * (4 / 300 + 1 / 1500))
    assert [3600 * each for each in found.hours["reading and writing"]] == pytest.approx(seconds)
    assert found.reads == {"images": 128_000 * 400_000}
    assert found.written_bytes == found.stores["result"] == 128_000 * (400_000 + 400 * 4)
    assert found.gpus == 0 and found.dollars == (0, 0)
    # Where an endpoint matches images to steps, its rate decides.
    asked = {"by": "similarity", "model": "clip"}
    assert any("is left out" in one for one in cpu("cot_corpus", data__matching=asked).remarks)


def test_sources_are_listed_where_they_are_and_drawn_ones_written() -> None:
    given = cpu("sources")
    assert given.written_bytes == 0 and given.reads == {"given sources": 128_000 * 400_000}
    drawn = cost_preparation.cpu_price(recipes.tiny(), stage("sources"), CORPUS, cost.QWEN_7B)
    assert drawn.reads == {} and drawn.written_bytes == 128_000 * (4 * 500 + 80 * 4)


def test_the_base_model_is_fetched_or_learns_to_see() -> None:
    fetched = price.price(PAPER, "base_model")
    weights = 2 * 8_292_166_656
    assert fetched.stores == {"model": weights} and fetched.reads["checkpoint"] == weights
    assert [3600 * each for each in fetched.hours["fetching the checkpoint"]] == pytest.approx(
        [weights / 1.25e9, weights / 2.5e8]
    )
    made = price.price(recipes.tiny(), "base_model")
    assert "fetching the checkpoint" not in made.hours and low(made.flops["vision tower, forward and backward"]) > 0


def test_images_a_step_are_those_of_the_code() -> None:
    assert cost_preparation.TOWER_IMAGES == tower.GRIDS_PER_BATCH
    assert cost_preparation.TEACHER_IMAGES == pretraining._BATCH


def test_every_stage_has_a_price_or_says_why_not() -> None:
    for recipe in (recipes.tiny(), recipes.small(), PAPER):
        found = price.overview(recipe)
        assert {*found.stages, *found.unpriced} == {row.name for row in STAGES}
        studies = {row.name for row in STAGES if row.group == "studies"}
        assert set(found.unpriced) == {"teacher_features_efficientnet", *studies}
        assert all(one.total_hours[0] > 0 for one in found.stages.values())
        for row in STAGES:
            if row.name in found.stages:
                gpu = row.resources == "gpu" and recipe.runtime.device == "cuda"
                assert (found.stages[row.name].gpus > 0) is gpu
                assert (found.stages[row.name].dollars[0] > 0) is gpu


def test_large_artifacts_are_counted_alike_by_who_writes_and_who_reads_them() -> None:
    found = price.overview(override(PAPER, {"teachers": {"dinov3": {"features": "stored"}}})).stages
    written = {
        name: sum(size for part, size in one.stores.items() if part != "checkpoints") for name, one in found.items()
    }
    for one in found.values():
        for name, size in one.reads.items():
            assert written.get(name, size) == size, f"{one.stage} reads {name}"
    assert artifact_bytes(PAPER, "report", CORPUS, cost.QWEN_7B) == 0
    assert artifact_bytes(PAPER, "cot_corpus", replace(CORPUS, records=0), cost.QWEN_7B) == 0
