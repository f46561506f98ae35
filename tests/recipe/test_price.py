"""What a stage is said to cost: against sums done by hand, the paper's run, and what the limit does."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.project import CHECKOUT
from valr_ops.__main__ import main
from valr_ops.recipe import cost, price, recipes, workload
from valr_ops.recipe.recipe import RecipeError, override
from valr_ops.training import schedule

PAPER = recipes.paper()
BLOCK, HIDDEN, LAYERS, WORDS = 233_046_016, 3584, 28, 152_064
"""Of Qwen2.5-VL-7B: matrices of a block (queries and output 2 x 3584^2, keys and values 2 x 3584 x 512, MLP 3 x 3584 x
18944), its width, its blocks, its vocabulary."""

CORPUS = workload.Corpus(
    records=128_000,
    train=128_000,
    validation=0,
    positions=2000,
    image_positions=1600,
    supervised=300,
    images=4,
    segments=2,
    most_segments=5,
    longest=4000,
    aimed=1.0,
    targets=256_000,
    counted=True,
    test=0,
    origin="made up",
)
"""1,000 updates of the paper's 2 x 16 x 4 records."""


def priced(stage: Any = 1, corpus: workload.Corpus = CORPUS, **changes: Any) -> price.Price:
    recipe = override(PAPER, {key.replace("__", "."): value for key, value in changes.items()})
    return price.training_price(recipe, stage, corpus, cost.QWEN_7B)


def low(span: price.Span) -> float:
    assert span[0] == span[1]
    return span[0]


# ---------------------------------------------------------------------------------------------------------- training


def test_the_flops_of_stage_1_are_those_of_a_sum_by_hand() -> None:
    assert 2 * HIDDEN**2 + 2 * HIDDEN * 512 + 3 * HIDDEN * 18944 == BLOCK
    found = priced().flops
    attention = 2 * LAYERS * HIDDEN * 2000 * 2001
    forward = 2 * 2000 * LAYERS * BLOCK + attention + 2 * 300 * HIDDEN * WORDS
    assert low(found["decoder, forward and backward"]) == 128_000 * 3 * forward
    assert low(found["activations computed again"]) == 128_000 * (forward - 2 * 300 * HIDDEN * WORDS)
    assert low(found["vision tower"]) == 128_000 * 4 * cost.QWEN_7B.vision_flops(1600)
    assert set(found) == {"decoder, forward and backward", "activations computed again", "vision tower", "validation"}
    # 6 N D, the rule of thumb, with 3 % for attention and 2 % for the logits.
    assert low(found["decoder, forward and backward"]) == pytest.approx(128_000 * 6 * LAYERS * BLOCK * 2000, rel=0.06)


def test_memory_between_steps_is_that_of_zero_2_by_hand() -> None:
    # facts: 16.6 GB of weights, and of gradients 15.2, moments 60.9 and the float32 copy 30.5 GB a share.
    four, eight = (
        cost.training_memory(cost.QWEN_7B, PAPER.stage1, processes=processes, projectors=0) for processes in (4, 8)
    )
    assert {part: round(size / 1e8) / 10 for part, size in four.items()} == {
        "weights": 16.6,
        "gradients": 3.8,
        "float32 copy of the weights": 7.6,
        "moments": 15.2,
    }
    assert sum(four.values()) / 1e9 == pytest.approx(43.2, abs=0.1)
    assert sum(eight.values()) / 1e9 == pytest.approx(29.9, abs=0.1)


def test_plain_torch_keeps_float32_weights_and_a_copy_in_bfloat16() -> None:
    alone = PAPER.stage1.model_copy(update={"engine": "torch"})
    trained, frozen = cost.QWEN_3B.decoder_parameters, cost.QWEN_3B.vision_parameters
    assert cost.training_bytes(cost.QWEN_3B, alone, 1) == (4 + 2 + 4 + 8) * trained + 4 * frozen
    # Several processes always use ZeRO-2.
    assert cost.training_bytes(cost.QWEN_3B, alone, 4) == cost.training_bytes(cost.QWEN_3B, PAPER.stage1, 4)


def test_activations_cache_and_checkpoint_are_those_of_a_sum_by_hand() -> None:
    # facts: 0.20 MB a token checkpointed and 5.5 MB not, 57,344 bytes of keys and values, 91.4 GB of optimizer.
    a_block = 2 * (6 * HIDDEN + 2 * 512 + 4 * 18944)
    assert 2 * cost.QWEN_7B.kept_for_backward(1, checkpointed=True) == 2 * HIDDEN * LAYERS + a_block
    inputs = 2 * HIDDEN * LAYERS
    assert inputs / 1e6 == pytest.approx(0.2, rel=0.01)
    assert 2 * cost.QWEN_7B.kept_for_backward(1, checkpointed=False) / 1e6 == pytest.approx(5.5, rel=0.01)
    assert 2 * cost.QWEN_7B.cached_per_position == 57_344
    found = priced()
    assert found.stores["checkpoints"] / 10 / 1e9 == pytest.approx(91.4, abs=0.1)
    assert found.memory["activations of the longest micro-batch"] == 2 * 4000 * (2 * HIDDEN * LAYERS + a_block)
    assert found.memory["its logits"] == 10 * 2 * 4000 * 300 // 2000 * WORDS
    held = cost.training_bytes(cost.QWEN_7B, PAPER.stage1, 4) + 10**9
    in_pass = found.memory["activations of the longest micro-batch"] + found.memory["its logits"]
    assert found.peak_bytes == held + in_pass


def test_latents_cost_a_roll_out_and_for_every_hop_two_forward_passes() -> None:
    per_record = {}
    for gradient in ("cut", "hops:2", "hops:3", "full"):
        found = priced(2, latents__feedback_gradient=gradient).flops
        per_record[gradient] = tuple(each / 128_000 for each in found.get("feedback hops", (0, 0)))
        positions = 2000 + 2 * (16 + 2)
        assert low(found["roll-out of the slots"]) == 128_000 * cost.QWEN_7B.decoder_flops(positions, 0)
    hop = cost.QWEN_7B.decoder_flops(2036, 302) + cost.QWEN_7B.decoder_flops(2036, 0)
    assert per_record["cut"] == (0, 0)
    assert per_record["hops:2"] == (2 * hop, 2 * hop) and per_record["hops:3"] == (3 * hop, 3 * hop)
    # All 32 slots at most; it may stop after as many as the recipe assumes.
    assert per_record["full"] == pytest.approx((12 * hop, 32 * hop))
    assert "feedback hops" not in priced(2, latents__method="sequential").flops


def test_slots_are_computed_one_by_one_at_the_speed_of_the_memory() -> None:
    # 13.05 GB of blocks at 2 TB/s are 6.5 ms at best; 16 slots of 2 to 5 segments, for each of 1,000 updates.
    found = priced(2).hours["slots one by one"]
    floor = 2 * LAYERS * BLOCK / 2.0e12
    assert floor == pytest.approx(6.5e-3, rel=0.01)
    assert found[0] * 3600 == pytest.approx(1000 * 16 * 2 * floor / 0.6)
    assert found[1] * 3600 == pytest.approx(1000 * 16 * 5 * floor / 0.3)
    sequential = priced(2, latents__method="sequential").hours["slots one by one"]
    assert sequential[0] == pytest.approx(3 * 16 * found[0])
    assert "slots one by one" not in priced(1).hours


def test_the_cache_of_the_roll_out_holds_a_window_and_no_more_than_twice_the_weights() -> None:
    a_row = 57_344 * (4000 + 5 * 16)
    assert priced(2).memory["keys and values of the roll-out"] == 32 * a_row
    more = priced(2, stage2__accumulation=4000).memory["keys and values of the roll-out"]
    assert 0 <= 2 * 2 * LAYERS * BLOCK - more < 2 * a_row


def test_the_paper_takes_about_a_day_or_two_a_stage_on_four_a100() -> None:
    stage1 = price.price(PAPER, "stage1_sft")
    # 427,500 of 450,000 records are trained on; 19 to 39 hours of 10^20 FLOPs in all at half and a quarter of the peak.
    assert stage1.gpus == 4
    assert 15 < stage1.total_hours[0] < 30 and 30 < stage1.total_hours[1] < 72
    assert stage1.dollars == pytest.approx((4 * 1.8 * stage1.total_hours[0], 4 * 4.1 * stage1.total_hours[1]))
    assert 40e9 < stage1.peak_bytes < 80e9
    cheap = override(PAPER, {"latents.feedback_gradient": "cut"})
    # A roll-out is a fourth of a checkpointed step at most (facts: + 25 %).
    more = price.price(cheap, "stage2_valr_m").total_hours[0] / stage1.total_hours[0]
    assert 1.15 < more < 1.35


def test_updates_are_those_that_training_makes() -> None:
    training = PAPER.stage1
    for visits, processes, most in ((450_000, 4, None), (1729.5, 1, None), (450_000, 4, 7)):
        limited = training.model_copy(update={"max_updates": most})
        assert price.updates(limited, visits, processes) == schedule.updates(limited, visits, processes)
    assert price.updates(training, 450_000, 4) == 3516


def test_a_checkpoint_that_takes_longer_than_the_notice_is_told_with_what_is_lost() -> None:
    found = priced()
    assert found.checkpoint["write"] == pytest.approx((91.4 / 2, 91.4 / 0.5), rel=0.01)
    assert found.checkpoint["send"] == pytest.approx((91.4 / 1.25, 91.4 / 0.25), rel=0.01)
    assert low(found.checkpoint["notice"]) == 120
    lost = found.working_seconds[1] / 10 / 60
    (remark,) = (one for one in found.remarks if "checkpoint of" in one)
    assert f"may lose up to {lost:,.0f} minutes" in remark and "stage1.checkpoint_every=100" in remark
    patient = priced(price__notice_seconds=900, cluster__grace_seconds=900)
    assert low(patient.checkpoint["notice"]) == 900 and not any("checkpoint of" in one for one in patient.remarks)


def test_what_does_not_fit_on_the_card_or_into_the_deadline_is_told() -> None:
    assert not any("more than the" in one for one in priced().remarks)
    (remark,) = (one for one in priced(stage1__micro_batch=64).remarks if "more than the" in one)
    assert "84 GB of NVIDIA A100-SXM4-80GB" in remark and "lower data.max_length or the micro-batch" in remark
    (remark,) = (one for one in priced(cluster__deadline_hours=2).remarks if "deadline" in one)
    assert "cluster.deadline_hours=2 stops it" in remark


def test_the_disk_of_a_node_holds_inputs_result_and_the_checkpoints_that_are_kept() -> None:
    found = priced()
    model, checkpoint = found.stores["model"], found.stores["checkpoints"] // 10
    assert found.reads == {"model to start from": model, "images": 128_000 * 4 * 100_000}
    assert found.disk_bytes == 2 * model + 128_000 * 4 * 100_000 + 3 * checkpoint
    assert not any("cluster.scratch" in one for one in found.remarks)
    for scratch, fits in (("335Gi", True), ("359G", True), ("333Gi", False), ("1.5M", False), ("358000M", False)):
        remarks = priced(cluster__scratch=scratch).remarks
        assert any(f"cluster.scratch={scratch}; raise it" in one for one in remarks) is not fits, scratch


# -------------------------------------------------------------------------------------------------- teachers and scores


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
    assert stage2.reads["stored features"] == features.stores["features"]
    assert "teachers" not in stage2.flops
    online = override(PAPER, {"teachers": {"dinov3": {"features": "online"}}})
    assert "stored features" not in price.price(online, "stage2_valr_s").reads
    assert "teachers" in price.price(online, "stage2_valr_s").flops
    nothing = price.price(online, "teacher_features_dinov3")
    assert nothing.stores["features"] == 0 and "the stage only looks at a few" in nothing.remarks[0]


def test_scores_read_the_weights_once_a_token_of_a_batch() -> None:
    one = override(
        PAPER,
        {
            "evaluation.benchmarks": {"mmvp": {"path": "x"}},
            "price.answer_tokens": 100,
            "evaluation.max_new_tokens": 100,
        },
    )
    found = price.price(one, "scores_base")
    # 300 questions in 10 batches of 32; 100 positions of text, 392 of one image, 50 tokens of the answer on average.
    positions = 100 + round(640 * 480 / 28**2) + 50
    a_step = 2 * LAYERS * BLOCK + 32 * 57_344 * positions
    seconds = 10 * 100 * a_step / 2.0e12
    assert [3600 * each for each in found.hours["answers, token by token"]] == pytest.approx(
        [seconds / 0.6, seconds / 0.3], rel=0.001
    )
    assert found.gpus == 1
    latents = price.price(one, "scores_valr_m").hours["answers, token by token"]
    assert latents[0] / found.hours["answers, token by token"][0] == pytest.approx(154 / 100, rel=0.02)


def test_the_numbers_of_questions_are_the_readers_own() -> None:
    for name, items in workload.PUBLISHED_ITEMS.items():
        reader = importlib.import_module(f"valr_ops.evaluation.benchmarks.{name}")
        assert sum(reader.COUNTS.values()) == items, name


# -------------------------------------------------------------------------------------------- counted, not assumed


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose corpora were made from the tiny recipe, with their reports only."""
    values = recipes.tiny().model_dump(mode="json")
    stages = {
        name: {"params": {"artifacts/recipe/recipe.yaml": {section: values[section]}}}
        for name, section in (("cot_corpus", "data"), ("base_model", "base"))
    }
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}), encoding="utf-8")
    reports = {
        "cot_corpus": {
            "records": 10,
            "images": 20,
            "sources": {
                "a": {"text_tokens_estimated": 600, "test": {"kept": 5}, "format": "jsonl"},
                "b": {"text_tokens_estimated": 400, "test": {"kept": 7}, "format": "monet"},
            },
        },
        "latent_corpus": {
            "sequences": 10,
            "tokens": 1540,
            "longest": 190,
            "segments": 20,
            "segments_without_target": 5,
            "most_segments": 4,
            "targets": 12,
            "sources": {
                "a": {"weight": 2.0, "splits": {"train": 5, "validation": 1}},
                "b": {"weight": 1.0, "splits": {"train": 4}},
            },
        },
    }
    for name, report in reports.items():
        folder = tmp_path / "artifacts" / name
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return tmp_path


def test_corpora_that_were_made_count_instead_of_the_assumed_means(project: Path) -> None:
    corpus = workload.made_corpus(recipes.tiny(), project)
    assert corpus is not None and corpus.counted
    # 5 records twice and 4 once; 1,540 tokens without 2 markers a segment; 100 tokens of text a record.
    assert (corpus.records, corpus.train, corpus.validation) == (10, 14, 1)
    assert (corpus.positions, corpus.image_positions, corpus.images) == (150, 50, 2)
    assert (corpus.supervised, corpus.segments, corpus.aimed) == (75, 2, 0.75)
    assert (corpus.most_segments, corpus.longest, corpus.targets, corpus.test) == (4, 190, 12, 5)
    found = price.price(recipes.tiny(), "stage1_sft", project)
    named = {name: (value, origin) for name, value, origin in found.assumptions}
    assert "counted in latent_corpus: 10 sequences, 1,540 tokens" in named["a record"][1]
    assert "price.segments_per_record" not in named


@pytest.mark.parametrize("changes", [{"data.max_length": 512}, {"base.max_pixels": 4096}])
def test_corpora_of_other_data_or_another_model_do_not_count(project: Path, changes: dict[str, Any]) -> None:
    assert workload.made_corpus(override(recipes.tiny(), changes), project) is None
    assert workload.made_corpus(recipes.tiny(), project / "nowhere") is None


def test_a_source_of_unknown_size_asks_for_its_cap() -> None:
    mine = override(PAPER, {"data.sources": {"mine": {"format": "jsonl", "path": "data/mine"}}})
    with pytest.raises(price.PriceError, match=r"data.sources.mine has neither cap nor limit.*valr materialize"):
        price.price(mine, "stage1_sft")


def test_a_checkpoint_of_ones_own_is_as_large_as_its_config_says(tmp_path: Path) -> None:
    own = override(PAPER, {"base": {"hub_id": None, "revision": None, "path": "weights/mine"}})
    with pytest.raises(price.PriceError, match="valr materialize \\+base_model"):
        price.price(own, "stage1_sft", tmp_path)
    config = {
        "tie_word_embeddings": False,
        "text_config": {
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "num_attention_heads": 28,
            "intermediate_size": 18944,
            "vocab_size": 152_064,
        },
        "vision_config": {
            "hidden_size": 1280,
            "depth": 32,
            "intermediate_size": 3420,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    }
    (tmp_path / "artifacts" / "base_model").mkdir(parents=True)
    (tmp_path / "artifacts" / "base_model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert price.price(own, "stage1_sft", tmp_path).flops == price.price(PAPER, "stage1_sft").flops


# ---------------------------------------------------------------------------------------------------------- the limit


def test_a_stage_above_the_limit_is_refused_with_what_costs_most_and_the_fix() -> None:
    with pytest.raises(price.PriceRefusedError) as refused:
        price.refuse(PAPER, "stage2_valr_m")
    told = str(refused.value)
    for part in ("dollars, more than price.max_dollars=5,000", "hours, more than price.max_hours=168", "feedback hops"):
        assert part in told
    assert "with hops:2 the stage costs" in told and "valr plan --stage stage2_valr_m" in told
    allowed = override(PAPER, {"latents.feedback_gradient": "hops:2"})
    accepted = price.refuse(allowed, "stage2_valr_m")
    assert accepted is not None and accepted.dollars[1] < 5000


def test_the_upper_end_of_the_price_is_held_against_the_limit() -> None:
    found = price.price(PAPER, "stage1_sft")
    between = sum(found.dollars) / 2
    with pytest.raises(price.PriceRefusedError, match="decoder, forward and backward"):
        price.refuse(override(PAPER, {"price.max_dollars": between}), "stage1_sft")
    accepted = price.refuse(override(PAPER, {"price.max_dollars": found.dollars[1] + 1}), "stage1_sft")
    assert accepted is not None and accepted.dollars == found.dollars
    with pytest.raises(price.PriceRefusedError, match=r"price\.max_hours=1"):
        price.refuse(override(PAPER, {"price.max_hours": 1}), "stage1_sft")


def test_a_stage_without_a_price_is_never_refused() -> None:
    assert price.refuse(PAPER, "cot_corpus") is None
    with pytest.raises(price.NoPriceError, match="cot_corpus has no price"):
        price.price(PAPER, "cot_corpus")
    unknown = "teacher_features_efficientnet"
    with pytest.raises(price.NoPriceError, match="what tf_efficientnet_lite0 computes is not known"):
        price.price(recipes.tiny(), unknown)
    assert price.refuse(recipes.tiny(), unknown) is None


def test_a_cell_of_the_ablation_has_the_price_of_its_variant() -> None:
    few, many = (price.price(PAPER, f"stage2_ablation@table12_k{slots}") for slots in (1, 25))
    assert few.dollars[1] < many.dollars[1] and few.stage == "stage2_ablation@table12_k1"


def test_the_prices_of_all_cells_are_summed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = price.cell_prices(PAPER)
    assert set(cells) == {name for name in PAPER.variants if name not in ("valr_s", "valr_m")}
    gpu_hours, dollars = price.together(cells.values())
    assert gpu_hours[1] == pytest.approx(4 * sum(one.total_hours[1] for one in cells.values()))
    assert dollars[0] == pytest.approx(sum(one.dollars[0] for one in cells.values()))
    monkeypatch.chdir(CHECKOUT)
    assert main(["plan", "--stage", "stage2_ablation", "--scale", "paper"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["dollars"] == pytest.approx(dollars)
    assert lines[-2].startswith(f"{len(cells)} together")


def test_nothing_is_paid_for_a_cpu() -> None:
    found = price.price(recipes.tiny(), "stage2_valr_s")
    assert found.dollars == (0, 0) and found.gpus == 0
    assert "activations computed again" not in found.flops and "slots one by one" not in found.hours


def test_a_gpu_that_nobody_knows_is_refused_and_so_is_a_range_from_high_to_low() -> None:
    with pytest.raises(price.PriceError, match=r"price\.gpu='NVIDIA T0' is no GPU whose peak is known"):
        priced(price__gpu="NVIDIA T0")
    with pytest.raises(RecipeError, match=r"price\.utilisation: begins at 0.5, which is more than its end 0.2"):
        override(PAPER, {"price.utilisation": [0.5, 0.2]})


# ---------------------------------------------------------------------------------------------- afterwards, and shown


def test_what_a_run_took_stands_beside_what_was_planned() -> None:
    planned = replace(priced(), hours={"computing": (1.0, 4.0), "fetching inputs": (5.0, 5.0)}, peak_bytes=50)
    assert price.against_plan(planned, 7200.0) == {
        "planned_seconds_low": 3600.0,
        "planned_seconds_high": 14400.0,
        "seconds_over_plan": 1.0,
    }
    assert (
        price.against_plan(planned, 7200.0, peak_bytes=40.0).items()
        >= {
            "planned_peak_bytes": 50.0,
            "peak_bytes": 40.0,
            "peak_bytes_over_plan": 0.8,
        }.items()
    )


def test_plan_shows_every_assumption_and_ends_with_one_json_document(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CHECKOUT)
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["plan", "--stage", "stage2_valr_m", "--scale", "paper", "--set", "price.max_hours=9999"]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = json.loads(lines[-1])
    assert told["stage"] == "stage2_valr_m" and told["gpus"] == 4
    assert told["hours"]["total"][0] < told["hours"]["total"][1] and told["dollars"][0] < told["dollars"][1]
    assert "price.max_dollars=5,000" in told["refused"] and "max_hours" not in told["refused"]
    text = "\n".join(lines[:-1])
    assert "feedback hops" in text and "keys and values of the roll-out" in text and told["refused"] in text
    assumed = told["assumptions"]
    assert all(one["value"] and one["origin"] for one in assumed.values())
    assert {"a record", "the peak", "price.utilisation", "price.dollars_per_gpu_hour", "price.gpu"} <= set(assumed)
    assert all(name in text for name in assumed)


def test_plan_refuses_what_has_no_price(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CHECKOUT)
    assert main(["plan", "--stage", "cot_corpus"]) == 42
    assert "cot_corpus has no price" in capsys.readouterr().err


def test_pricing_imports_nothing_heavy() -> None:
    code = "import sys, valr_ops.recipe.price; print({'torch', 'numpy', 'pyarrow', 'rich'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
