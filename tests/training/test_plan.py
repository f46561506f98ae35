"""A training says what it took beside what its price had planned, where the corpora say how large they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.training.inputs import context, write_inputs
from valr_ops.training.loop import build_stage1

READ = {
    "records": 10,
    "images": 12,
    "sources": {"made": {"text_tokens_estimated": 600, "format": "jsonl", "test": {"kept": 0}}},
}
WRITTEN = {
    "sequences": 10,
    "tokens": 1000,
    "longest": 140,
    "segments": 20,
    "segments_without_target": 0,
    "most_segments": 3,
    "targets": 8,
    "sources": {"made": {"weight": 1.0, "splits": {"train": 8, "validation": 2}}},
}


def test_seconds_stand_beside_the_plan_and_the_artifact_knows_of_neither(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "inputs")
    recipe = tiny.recipe(**{"stage1.max_updates": 2})
    without = build_stage1(context("stage1_sft", recipe, inputs, tmp_path / "first"))
    assert "planned_seconds_low" not in without.timings
    for name, report in (("cot_corpus", READ), ("latent_corpus", WRITTEN)):
        (inputs[name] / "report.json").write_text(json.dumps(report), encoding="utf-8")
    beside = build_stage1(context("stage1_sft", recipe, inputs, tmp_path / "second"))
    low, high = beside.timings["planned_seconds_low"], beside.timings["planned_seconds_high"]
    assert 0 < low < high
    over = beside.timings["training_seconds"] / (low * high) ** 0.5
    assert beside.timings["seconds_over_plan"] == pytest.approx(over)
    assert beside.summary == without.summary
