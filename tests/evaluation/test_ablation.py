"""The table of models: what stands in it, and what is never put side by side."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from tests.evaluation.scenes import context, scored
from valr_ops.evaluation.ablation import (
    ComparisonError,
    build_ablation_table,
    compare,
    comparisons,
    markdown,
    model_name,
    read_models,
    terminal_table,
)
from valr_ops.evaluation.models import BudgetError
from valr_ops.evaluation.paper_cells import Answers
from valr_ops.store.artifacts import StageReport

Made = tuple[Path, StageReport, dict[str, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A table of four models on 60 items: 20 right, 45 right, 47 right (two more than SFT), all right but one."""
    folder = tmp_path_factory.mktemp("scores")
    inputs = {
        "scores_base": scored(folder, "scores_base", lambda n: n < 20)[0],
        "scores_sft": scored(folder, "scores_sft", lambda n: n < 45)[0],
        "scores_valr_s": scored(folder, "scores_valr_s", lambda n: n < 47, slots=4)[0],
        "scores_valr_m": scored(folder, "scores_valr_m", lambda n: n != 7, slots=4)[0],
    }
    at = context("ablation_table", folder, inputs)
    return at.out, build_ablation_table(at), inputs


def by_hand(score: float = 0.5, counts: tuple[int, ...] = (120, 40, 30), **changes: object) -> Answers:
    """A model on as many benchmarks, scored in fractions, three items a scene; `changes` are of the budget."""
    budget = {
        "isolation": "iso-1",
        "prompt": "0",
        "engine": "transformers",
        "precision": "float32",
        "decoding": "greedy",
        "max_new_tokens": 64,
        "max_segments": 8,
        "force_first_latent": False,
        "min_pixels": 256,
        "max_pixels": 4096,
        "frames": 4,
        "seed": 0,
        "slots": 0,
    }
    rows, entries = [], {}
    for place, n in enumerate(counts):
        name = ("vsi_bench", "blink", "mine")[place]
        entries[name] = {
            "format": name,
            "profile": "official",
            "revision": f"r{place}",
            "drawn": False,
            "n": n,
            "correct": 0,
            "accuracy": score,
            "interval": [score / 2, score],
            "interval_method": "bootstrap",
            "rejected": {},
            "cut_off": 0,
            "majority": {"answer": "A", "accuracy": 0.3},
            "unresolved": 3,
            "format_misses": 6,
            "totals": {"micro": score} | ({"always_a": 0.37, "random": 0.38} if name == "blink" else {}),
            "latent_trigger_rate": 0.0,
            "mean_segments": 0.0,
            "mean_text_tokens": 5.0,
            "mean_latent_steps": 0.0,
        }
        rows += [
            {
                "benchmark": name,
                "id": str(item),
                "question": f"question {item}",
                "gold": "A",
                "score": score + (item % 5) / 50,
                "cluster": f"scene {item // 3}" if place == 0 else "",
            }
            for item in range(n)
        ]
    return {"budget": budget | changes, "benchmarks": entries, "confidence": 0.95}, rows


def test_the_table_has_a_row_for_every_model_with_its_interval_and_its_difference_to_sft(made: Made) -> None:
    table = json.loads((made[0] / "table.json").read_text())
    benchmark = table["benchmarks"]["mine"]
    rows = {row["label"]: row for row in benchmark["rows"]}
    assert list(rows) == ["base", "SFT", "VaLR-S", "VaLR-M"] == list(table["models"].values())
    assert [row["correct"] for row in rows.values()] == [20, 45, 47, 59]
    assert all(row["low"] < row["accuracy"] < row["high"] and row["n"] == 60 for row in rows.values())
    assert benchmark["majority"] == {"answer": "true", "accuracy": pytest.approx(2 / 3, abs=1e-6)}
    assert rows["SFT"]["against_reference"] is None
    against = {label: row["against_reference"] for label, row in rows.items() if row["against_reference"]}
    assert [(one["gained"], one["lost"]) for one in against.values()] == [(0, 25), (2, 0), (15, 1)]
    assert [one["verdict"] for one in against.values()] == ["differs", "within noise", "differs"]
    assert all("exact McNemar" in one["test"] for one in against.values())
    assert against["VaLR-S"]["detectable"] < against["VaLR-M"]["detectable"]
    assert [row["against_majority"] for row in rows.values()] == ["below", "within noise", "within noise", "above"]
    assert {name: budget["slots"] for name, budget in table["budgets"].items()} == {
        "base": 0,
        "sft": 0,
        "valr_s": 4,
        "valr_m": 4,
    }


def test_the_same_numbers_stand_in_csv_and_markdown_and_on_the_terminal(made: Made) -> None:
    folder, report, _ = made
    rows = list(csv.DictReader((folder / "table.csv").open(newline="")))
    assert [(row["label"], row["accuracy"], row["minus_sft_verdict"]) for row in rows] == [
        ("base", "0.333333", "differs"),
        ("SFT", "0.75", ""),
        ("VaLR-S", "0.783333", "within noise"),
        ("VaLR-M", "0.983333", "differs"),
    ]
    assert "| VaLR-M | 98.3 (91.1 to 99.7) |" in report.tables["models side by side"]
    assert "| mine, 60 items | VaLR-M | +23.3 (" in report.tables["models side by side"]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal_table(folder))
    shown = console.export_text()
    assert all(
        word in shown for word in ("VaLR-M", "98.3", "91–100", "within noise", "majority", "66.7", "346 not run")
    )
    assert report.summary["accuracy_mine_valr_m"] == pytest.approx(59 / 60, abs=1e-6)


def test_every_cell_of_the_paper_is_part_of_the_table(made: Made) -> None:
    cells = json.loads((made[0] / "paper_cells.json").read_text())
    assert {cell["paper"] for cell in cells if cell["row"] == "valr_m" and cell["table"] == "2"} == {
        *(64.7, 60.3, 72.3, 86.9, 87.6)
    }
    assert len(list(csv.DictReader((made[0] / "paper_cells.csv").open(newline="")))) == len(cells) == 346
    assert (made[0] / "paper_cells.md").read_text().count("### ") == 10


def test_the_same_scores_give_the_same_bytes(made: Made, tmp_path: Path) -> None:
    again = context("ablation_table", tmp_path, made[2])
    build_ablation_table(again)
    names = sorted(path.name for path in made[0].iterdir())
    assert names == [
        *("accuracy.png", "paper_cells.csv", "paper_cells.json", "paper_cells.md"),
        *("table.csv", "table.json", "table.md"),
    ]
    assert all((again.out / name).read_bytes() == (made[0] / name).read_bytes() for name in names)


def test_models_are_called_alike_by_stage_and_by_what_made_them() -> None:
    assert [model_name(name) for name in ("scores_sft", "stage1_sft", "scores_base", "base_model")] == [
        *("sft", "sft", "base", "base")
    ]
    assert [model_name(name) for name in ("stage2_valr_m", "gpt-4o")] == ["valr_m", "gpt-4o"]


def test_fractional_scores_are_compared_by_scenes_and_small_benchmarks_together() -> None:
    table = compare({"sft": by_hand(0.5), "valr_m": by_hand(0.6)}, "sft", 0.95)
    against = table["benchmarks"]["vsi_bench"]["rows"][1]["against_reference"]
    assert against["difference"] == pytest.approx(0.1)
    assert "40 clusters of 120 items" in against["test"]
    assert [(title, len(rows)) for title, rows in comparisons(table)] == [
        ("VSI-Bench, 120 items", 1),
        ("2 benchmarks of fewer than 100 items, 70 items", 1),
    ]
    assert table["pooled"]["rows"][1]["against_reference"]["n"] == 70


def test_eleven_benchmarks_fit_a_terminal_of_eighty_columns(tmp_path: Path) -> None:
    table = compare({"sft": by_hand(0.5), "valr_m": by_hand(0.6)}, "sft", 0.95)
    one = table["benchmarks"]["blink"]
    titles = ("VSI-Bench", "BLINK", "MMVP", "MMStar", "V*", "CV-Bench", "MathVista", "MathVision", "RealWorldQA")
    table["benchmarks"] = {title: one | {"title": title} for title in (*titles, "HR-Bench", "synthetic")}
    (tmp_path / "table.json").write_text(json.dumps(table | {"pooled": None}))
    (tmp_path / "paper_cells.json").write_text("[]")
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal_table(tmp_path))
    shown = console.export_text()
    assert "…" not in shown and shown.count("30–60") == 11
    assert all(word in shown.split() for word in ("World", "Vision", "V*", "MMStar", "VSI-"))


def test_baselines_rates_and_totals_stand_where_the_profile_has_them() -> None:
    table = compare({"sft": by_hand(0.5)}, "sft", 0.95)
    text = markdown(table)
    assert "| always A |  | 37.0 |  |" in text and "| random |  | 38.0 |  |" in text
    assert "| SFT | 2.5 / 5.0 | 7.5 / 15.0 | 10.0 / 20.0 |" in text
    assert table["benchmarks"]["blink"]["rows"][0]["totals"]["random"] == 0.38


def test_a_model_that_was_not_asked_a_benchmark_has_an_empty_cell() -> None:
    table = compare({"sft": by_hand(0.5), "gpt-4o": by_hand(0.6, counts=(120,))}, "sft", 0.95)
    assert "| gpt-4o | 60.0 (30.0 to 60.0) |  |  |" in markdown(table)


def test_scores_under_different_budgets_make_no_table(tmp_path: Path) -> None:
    folders = {
        "sft": scored(tmp_path, "scores_sft", lambda n: True)[0],
        "valr_m": scored(tmp_path, "scores_valr_m", lambda n: True, slots=4, max_new_tokens=128)[0],
    }
    with pytest.raises(BudgetError, match="max_new_tokens is 64 for SFT and 128 for VaLR-M"):
        compare(read_models(folders), "sft", 0.95)


def test_scores_on_different_items_make_no_table(tmp_path: Path) -> None:
    folders = {
        "sft": scored(tmp_path, "scores_sft", lambda n: True)[0],
        "valr_m": scored(tmp_path, "scores_valr_m", lambda n: True, count=59)[0],
    }
    with pytest.raises(ComparisonError, match=r"on mine: .*different items \(60 and 59, such as 'mine/59'\)"):
        compare(read_models(folders), "sft", 0.95)


@pytest.mark.parametrize("field", ["profile", "revision"])
def test_scores_by_other_rules_or_of_other_files_make_no_table_unless_the_user_says_so(field: str) -> None:
    other = by_hand(0.6)
    other[0]["benchmarks"]["blink"][field] = "another"
    models = {"sft": by_hand(0.5), "valr_m": other}
    with pytest.raises(ComparisonError, match=f"on blink: {field} is '.*' for SFT and 'another' for VaLR-M"):
        compare(models, "sft", 0.95)
    with pytest.raises(ComparisonError, match=f"valr report --allow-different {field}"):
        compare({"base": by_hand(0.5, counts=(120,)), **models}, "base", 0.95)
    table = compare(models, "sft", 0.95, allowed=[field])
    assert [f"blink: {field} is" in one for one in table["different"]] == [True]
    assert f"blink: {field} is" in markdown(table)


def test_what_the_user_allows_is_compared_on_common_items_and_said() -> None:
    models = {"sft": by_hand(0.5), "valr_m": by_hand(0.6, counts=(110, 40, 30), frames=32)}
    table = compare(models, "sft", 0.95, allowed=["frames", "items"])
    assert table["benchmarks"]["vsi_bench"]["rows"][1]["against_reference"]["n"] == 110
    assert table["different"][0] == "frames is 4 for SFT and 32 for VaLR-M"
    assert "different items (120 and 110" in table["different"][1]


def test_a_field_or_reference_that_does_not_exist_is_named_with_those_that_do() -> None:
    with pytest.raises(ComparisonError, match=r"'sft'; choose one of base"):
        compare({"base": by_hand()}, "sft", 0.95)
    with pytest.raises(ComparisonError, match=r"'tokens' can be allowed to differ; there are isolation, .*profile"):
        compare({"base": by_hand()}, "base", 0.95, allowed=["tokens"])
