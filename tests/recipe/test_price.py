"""What stages are said to cost, counted or assumed; what the limit does, what a run took beside, and what is shown."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.project import CHECKOUT
from tests.recipe.test_cost_training import PAPER, priced
from valr_ops.__main__ import main
from valr_ops.recipe import price, recipes, workload
from valr_ops.recipe.recipe import RecipeError, override

WHOLE_GRADIENT = override(PAPER, {"latents.feedback_gradient": "full"})

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


def test_in_the_folder_of_a_job_what_was_sent_counts(project: Path) -> None:
    sent = {name: {"outs": [{"path": f"artifacts/{name}", "md5": "1.dir"}]} for name in ("cot_corpus", "latent_corpus")}
    (project / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": sent}), encoding="utf-8")
    corpus = workload.made_corpus(recipes.tiny(), project)
    assert corpus is not None and corpus.counted


def test_a_report_of_another_version_counts_as_none(project: Path) -> None:
    (project / "artifacts" / "latent_corpus" / "report.json").write_text('{"sequences": 10}', encoding="utf-8")
    assert workload.made_corpus(recipes.tiny(), project) is None
    assert price.price(recipes.tiny(), "latent_corpus", project).total_hours[0] > 0


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


def test_a_stage_above_the_limit_is_refused_with_what_to_type_instead_and_its_price() -> None:
    with pytest.raises(price.PriceRefusedError) as refused:
        price.refuse(WHOLE_GRADIENT, "stage2_valr_m")
    told = str(refused.value)
    for part in ("dollars, more than price.max_dollars=5,000", "hours, more than price.max_hours=168", "feedback hops"):
        assert part in told
    assert "\n" not in told and "valr plan --stage stage2_valr_m" in told
    for value in ("hops:1", "hops:2", "hops:4", "cut"):
        accepted = price.refuse(override(PAPER, {"latents.feedback_gradient": value}), "stage2_valr_m")
        assert accepted is not None and accepted.dollars[1] < 5000
        hours, dollars = map(price.shown, (accepted.total_hours, accepted.dollars))
        assert f"--set latents.feedback_gradient={value} ({hours} hours, {dollars} dollars)" in told
    # The whole gradient on the other way is cheaper than by hops, and said to be above the limit as well.
    assert "--set latents.method=sequential" in told and "the whole gradient as well, still above the limit" in told
    most = price.price(WHOLE_GRADIENT, "stage2_valr_m")
    asked = dict(one.split("=") for one in told.split("all the same: --set ")[1].split(";")[0].split(" --set "))
    assert most.dollars[1] <= float(asked["price.max_dollars"]) < 1.1 * most.dollars[1]
    assert price.refuse(override(WHOLE_GRADIENT, asked), "stage2_valr_m") is not None


def test_only_settings_that_cost_less_are_offered() -> None:
    for now, offered in (("hops:4", {"hops:1", "hops:2", "cut"}), ("hops:2", {"hops:1", "cut"})):
        few = override(PAPER, {"latents.feedback_gradient": now, "price.max_hours": 1})
        with pytest.raises(price.PriceRefusedError) as refused:
            price.refuse(few, "stage2_valr_m")
        assert set(re.findall(r"--set latents\.\w+=(\S+) \(", str(refused.value))) == offered


def test_a_job_that_would_fill_its_node_is_refused_and_a_local_stage_only_told() -> None:
    tight = {"cluster.scratch": "100Gi"}
    here = price.refuse(override(PAPER, tight), "stage2_valr_m")
    assert here is not None and any("cluster.scratch=100Gi" in one for one in here.remarks)
    job = override(PAPER, tight | {"cluster.dispatch": "kubernetes"})
    with pytest.raises(price.PriceRefusedError, match=r"not dispatched: \d+ GB of inputs.*set cluster.scratch=475Gi"):
        price.refuse(job, "stage2_valr_m")
    assert price.refuse(override(job, {"cluster.scratch": "475Gi"}), "stage2_valr_m") is not None


@pytest.mark.parametrize("name", ["small", "paper"])
def test_every_job_of_a_scale_has_room_on_its_node_and_on_its_card(name: str) -> None:
    recipe = override(recipes.scale(name), {"cluster.dispatch": "kubernetes"})
    found = price.overview(recipe)
    assert found.refused == ()
    assert {name: one.peak_bytes for name, one in found.stages.items() if one.peak_bytes > recipe.price.gpu_bytes} == {}


def test_the_upper_end_of_the_price_is_held_against_the_limit() -> None:
    found = price.price(PAPER, "stage1_sft")
    between = sum(found.dollars) / 2
    with pytest.raises(price.PriceRefusedError, match="decoder, forward and backward"):
        price.refuse(override(PAPER, {"price.max_dollars": between}), "stage1_sft")
    accepted = price.refuse(override(PAPER, {"price.max_dollars": found.dollars[1] + 1}), "stage1_sft")
    assert accepted is not None and accepted.dollars == found.dollars
    with pytest.raises(price.PriceRefusedError, match=r"price\.max_hours=1"):
        price.refuse(override(PAPER, {"price.max_hours": 1}), "stage1_sft")


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
        "actual_seconds": 7200.0,
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
    asked = ["--set", "price.max_hours=9999", "--set", "latents.feedback_gradient=full"]
    assert main(["plan", "--stage", "stage2_valr_m", "--scale", "paper", *asked]) == 0
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


def test_plan_without_a_stage_ends_with_all_stages_in_100_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CHECKOUT)
    monkeypatch.setenv("COLUMNS", "100")
    asked = ["--set", "price.dollars_per_gpu_hour=[2,2]", "--set", "latents.feedback_gradient=full"]
    assert main(["plan", "--scale", "paper", *asked]) == 0
    *_, ledger, table, remarks = capsys.readouterr().out.split("\n\n")
    lines = table.splitlines()
    assert lines[0].split() == ["stage", "on", "hours", "dollars", "GB", "written", "GB", "read"]
    assert all(len(line) <= 100 for line in lines)
    told = json.loads(remarks.splitlines()[-1])
    assert [line.split()[0] for line in lines[1:-3]] == list(told["stages"])
    assert lines[-3].startswith(f"{len(told['stages'])} together") and lines[-1].startswith("everything")
    every = [*told["stages"].values(), *told["cells"].values()]
    assert told["gpu_hours"][1] == pytest.approx(sum(one["gpus"] * one["hours"][1] for one in every))
    # Two dollars an hour exactly: what is left of the range comes from the hours.
    assert told["dollars"] == pytest.approx([2 * hours for hours in told["gpu_hours"]])
    assert {"stage2_valr_m", "stage2_ablation@table12_k25"} <= set(told["refused"])
    assert "stage2_valr_m, 29 cells" in remarks and "teacher_features_efficientnet is not among them" in remarks
    assert "parameters trained" in ledger


def test_plan_of_a_corpus_of_unknown_size_says_so_and_still_shows_the_recipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CHECKOUT)
    mine = "data.sources={mine: {format: jsonl, path: data/mine}}"
    assert main(["plan", "--scale", "paper", "--set", mine]) == 0
    said = capsys.readouterr().out
    assert "No stage has a price: data.sources.mine has neither cap nor limit" in said and "latents.slots" in said
    assert "neither cap" in json.loads(said.splitlines()[-1])["unpriced"]


def test_pricing_imports_nothing_heavy() -> None:
    code = "import sys, valr_ops.recipe.price; print({'torch', 'numpy', 'pyarrow', 'rich'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
