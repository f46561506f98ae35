"""What training is said to cost: against sums done by hand, and for the paper's own run."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from valr_ops.recipe import cost, price, recipes, workload
from valr_ops.recipe.cost_sheet import Price, Span
from valr_ops.recipe.cost_training import training_price, updates
from valr_ops.recipe.recipe import override
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

SEQUENTIAL = {"latents__method": "sequential", "latents__feedback_gradient": "full"}


def priced(stage: Literal[1, 2] = 1, corpus: workload.Corpus = CORPUS, **changes: Any) -> Price:
    recipe = override(PAPER, {key.replace("__", "."): value for key, value in changes.items()})
    return training_price(recipe, stage, corpus, cost.QWEN_7B, f"stage{stage}")


def low(span: Span) -> float:
    assert span[0] == span[1]
    return span[0]


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
    # facts: 16.6 GB of weights, and of gradients 30.5, moments 60.9 and the float32 copy 30.5 GB a share.
    four, eight = (
        cost.training_memory(cost.QWEN_7B, PAPER.stage1, processes=processes, projectors=0) for processes in (4, 8)
    )
    assert {part: round(size / 1e8) / 10 for part, size in four.items()} == {
        "weights": 16.6,
        "gradients": 7.6,
        "float32 copy of the weights": 7.6,
        "moments": 15.2,
    }
    assert sum(four.values()) / 1e9 == pytest.approx(47.0, abs=0.1)
    assert sum(eight.values()) / 1e9 == pytest.approx(31.8, abs=0.1)


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
    assert "feedback hops" not in priced(2, **SEQUENTIAL).flops
    # States of float32 weights hold so much that all 32 are made.
    exact = priced(2, latents__feedback_gradient="full", stage2__engine="torch", runtime__processes=1).flops
    assert low(exact["feedback hops"]) == pytest.approx(128_000 * 32 * hop)


def test_slots_are_computed_one_by_one_at_the_speed_of_the_memory() -> None:
    # 13.05 GB of blocks at 2 TB/s are 6.5 ms at best; 16 slots of 2 to 5 segments, for each of 1,000 updates.
    found = priced(2).hours["slots one by one"]
    floor = 2 * LAYERS * BLOCK / 2.0e12
    assert floor == pytest.approx(6.5e-3, rel=0.01)
    assert found[0] * 3600 == pytest.approx(1000 * 16 * 2 * floor / 0.6)
    assert found[1] * 3600 == pytest.approx(1000 * 16 * 5 * floor / 0.3)
    # With a graph a pass takes at least its launches, and there are three for a slot of each of 16 micro-batches.
    sequential = priced(2, **SEQUENTIAL).hours["slots one by one"]
    assert sequential[0] * 3600 == pytest.approx(1000 * 16 * 3 * 16 * 2 * 0.025)
    slow = priced(2, **SEQUENTIAL, price__eager_step_seconds=[1e-9, 1e-9]).hours["slots one by one"]
    assert slow[0] == pytest.approx(3 * 16 * found[0])
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
    assert stage1.dollars == pytest.approx((4 * 1.5 * stage1.total_hours[0], 4 * 4.1 * stage1.total_hours[1]))
    assert 40e9 < stage1.peak_bytes < 80e9
    cheap = override(PAPER, {"latents.feedback_gradient": "cut"})
    # A roll-out is a fourth of a checkpointed step at most (facts: + 25 %).
    more = price.price(cheap, "stage2_valr_m").total_hours[0] / stage1.total_hours[0]
    assert 1.15 < more < 1.35


def test_updates_are_those_that_training_makes() -> None:
    training = PAPER.stage1
    for visits, processes, most in ((450_000, 4, None), (1729.5, 1, None), (450_000, 4, 7)):
        limited = training.model_copy(update={"max_updates": most})
        assert updates(limited, visits, processes) == schedule.updates(limited, visits, processes)
    assert updates(training, 450_000, 4) == 3516


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
    # Pictures and text; ids of four bytes.
    corpora = {"cot_corpus": 128_000 * (4 * 100_000 + 400 * 4), "latent_corpus": 128_000 * 2000 * 4}
    assert found.reads == {"base_model": model, **corpora}
    assert found.written_bytes == model + 3 * checkpoint
    assert found.disk_bytes == found.written_bytes + model + sum(corpora.values())
    assert not any("cluster.scratch" in one for one in found.remarks)
    for scratch, fits in (("337Gi", True), ("362G", True), ("334Gi", False), ("1.5M", False), ("358000M", False)):
        remarks = priced(cluster__scratch=scratch).remarks
        told = f"cluster.scratch={scratch}; set cluster.scratch=336Gi or more"
        assert any(told in one for one in remarks) is not fits, scratch


def test_stage_2_fetches_what_its_table_of_inputs_names() -> None:
    assert set(priced(2).reads) == {"base_model", "stage1_sft", "cot_corpus", "latent_corpus"}
