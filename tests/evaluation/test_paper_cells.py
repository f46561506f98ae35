"""The paper's cells beside ours: which numbers are compared, and when there is a verdict."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from valr_ops.evaluation.benchmarks import cv_bench, mmvp, vsi_bench
from valr_ops.evaluation.paper_cells import (
    Answers,
    PaperCell,
    cells_csv,
    cells_markdown,
    paper_cells,
    verdict_counts,
)
from valr_ops.recipe.recipes import paper, paper_tables

PRINTED = {row["model"]: row["scores"] for row in paper_tables()["tables"]["1"]["rows"]}


def answers(
    benchmark: str,
    shares: Mapping[str, float],
    counts: Mapping[str, int],
    drawn: bool = False,
    frames: int = 32,
    clusters: int = 0,
) -> Answers:
    """Right and wrong answers of which `shares` are right, by question type."""
    rows: list[dict[str, Any]] = []
    for kind, n in counts.items():
        for place in range(n):
            rows.append(
                {
                    "benchmark": benchmark,
                    "id": f"{kind}/{place}",
                    "question_type": kind,
                    "cluster": f"scene{(17 * len(rows)) % clusters}" if clusters else "",
                    # Right answers are spread over the scenes.
                    "score": float((place + 1) * shares[kind] // 1 > place * shares[kind] // 1),
                    "text_tokens": 40 + place,
                }
            )
    entry = {"format": benchmark, "profile": "official", "drawn": drawn, "n": len(rows)}
    return {"budget": {"frames": frames}, "benchmarks": {benchmark: entry}}, rows


def video(model: str, **changes: Any) -> Answers:
    """VSI-Bench answered as the paper prints it of `model`, type by type."""
    counts = changes.pop("counts", vsi_bench.COUNTS)
    shares = {
        kind: PRINTED[model][vsi_bench.DIRECTION if kind in vsi_bench.DIRECTIONS else kind] / 100 for kind in counts
    }
    return answers("vsi_bench", shares, counts, clusters=288, **changes)


def cell(cells: list[PaperCell], table: str, row: str, column: str) -> PaperCell:
    return next(one for one in cells if (one.table, one.row, one.column) == (table, row, column))


def test_every_printed_score_has_a_cell_and_every_trained_row_its_model() -> None:
    cells = paper_cells({}, 0.95)
    tables = paper_tables()["tables"]
    printed = sum(
        len(row["scores"]) for table in ("1", "2", "3", "4", "5", "6", "9", "11", "12") for row in tables[table]["rows"]
    )
    assert len(cells) == printed + 2
    assert {one.verdict for one in cells} == {"not run"}
    assert cell(cells, "4", "pi3 + dinov3", "vstar").model == "table4_pi3_dinov3"
    assert cell(cells, "9", "pi3 + dinov3 + siglip2", "blink").model == "valr_m"
    assert cell(cells, "5", "dinov3", "blink").model == "valr_s"
    assert cell(cells, "11", "weight 0.0", "blink").model == "valr_no_va"
    assert cell(cells, "12", "K = 25", "blink").model == "table12_k25"
    assert cell(cells, "6", "qwen2.5-vl-7b", "blink").model == "base"
    trained = {one.model for one in cells if one.table in ("4", "5", "6", "9", "11", "12")} - {"base"}
    assert trained <= set(paper().variants)


def test_a_score_like_the_printed_one_is_within_noise_and_one_like_the_base_models_differs() -> None:
    like = paper_cells({"valr_m": video("valr_m")}, 0.95)
    average = cell(like, "1", "valr_m", "avg")
    assert average.ours == pytest.approx(52.9, abs=0.1)
    assert average.verdict == "within noise"
    assert average.difference_low < average.difference < average.difference_high
    assert {one.verdict for one in like if one.table == "1" and one.row == "valr_m"} == {"within noise"}
    assert cell(like, "4", "pi3 + dinov3 + siglip2", "vsi_bench").verdict == "within noise"

    far = cell(paper_cells({"valr_m": video("qwen2.5-vl-7b")}, 0.95), "1", "valr_m", "avg")
    assert far.ours == pytest.approx(33.6, abs=0.1)
    assert far.verdict == "differs" and far.difference_high < -10


def test_the_average_of_vsi_bench_is_the_one_that_the_row_prints_and_the_macro_stands_beside_it() -> None:
    cells = paper_cells({"valr_m": video("valr_m"), "GPT-4o": video("gpt-4o", frames=16)}, 0.95)
    ours = cell(cells, "1", "valr_m", "avg")
    assert (ours.compared, ours.macro) == ("micro", pytest.approx(51.7, abs=0.1))
    quoted = cell(cells, "1", "gpt-4o", "avg")
    assert (quoted.compared, quoted.verdict) == ("macro", "within noise")
    assert quoted.ours == quoted.macro == pytest.approx(34.0, abs=0.1)
    assert not quoted.notes


def test_directions_and_cv_bench_weigh_their_parts_as_the_authors_do() -> None:
    _, rows = video("valr_m")
    levels = dict(zip(vsi_bench.DIRECTIONS, (1.0, 0.5, 0.0), strict=True))
    shares = {kind: levels.get(kind, 0.5) for kind in vsi_bench.COUNTS}
    of_video = answers("vsi_bench", shares, vsi_bench.COUNTS)
    of_images = answers("cv_bench", {"ade": 1.0, "coco": 0.0, "omni": 0.5}, cv_bench.COUNTS)
    of_video[0]["benchmarks"].update(of_images[0]["benchmarks"])  # type: ignore[attr-defined]
    cells = paper_cells({"valr_m": (of_video[0], [*of_video[1], *of_images[1]])}, 0.95)
    assert cell(cells, "1", "valr_m", "object_rel_direction").ours == pytest.approx(50.0, abs=0.1)
    assert cell(cells, "2", "valr_m", "cv_bench").ours == pytest.approx(50.0, abs=0.1)
    assert len(rows) == 5130


def test_mmvp_is_compared_by_single_questions() -> None:
    counts = {"": 300}
    assert counts == mmvp.COUNTS
    found = cell(paper_cells({"valr_s": answers("mmvp", {"": 0.6}, counts)}, 0.95), "2", "valr_s", "mmvp")
    assert (found.compared, found.items, found.ours, found.verdict) == ("single", 300, 60.0, "within noise")


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        (video("valr_m", drawn=True), "drawn questions"),
        (video("valr_m", counts=vsi_bench.COUNTS | {"route_planning": 190}), "5,126 of 5,130 asked"),
        (answers("blink", {"Counting": 0.5}, {"Counting": 120}), "not run"),
    ],
)
def test_without_the_whole_public_data_set_there_is_no_verdict(given: Answers, verdict: str) -> None:
    found = cell(paper_cells({"valr_m": given}, 0.95), "1", "valr_m", "avg")
    assert (found.verdict, found.difference) == (verdict, None)


def test_a_model_is_found_by_the_papers_name_whatever_its_letter_case() -> None:
    cells = paper_cells({"Qwen2.5-VL-7B-Instruct": video("qwen2.5-vl-7b"), "LVR": video("lvr")}, 0.95)
    assert cell(cells, "3", "qwen2.5-vl-7b", "vsi_bench").ours == pytest.approx(33.6, abs=0.1)
    assert cell(cells, "1", "lvr", "avg").verdict == "within noise"


def test_a_point_of_figure_2_has_no_verdict_because_its_bin_is_not_printed() -> None:
    cells = paper_cells({"ocean-r1-7b": answers("mmvp", {"": 0.6}, {"": 300})}, 0.95)
    point = cell(cells, "fig2", "ocean-r1-7b, 100 tokens", "mmvp")
    assert (point.verdict, point.paper) == ("bin not printed", 62.7)
    assert point.ours == pytest.approx(60.0, abs=1.0)


def test_cells_say_where_the_paper_disagrees_with_itself_and_where_frames_differ() -> None:
    cells = paper_cells({"valr_s": video("valr_s", frames=4)}, 0.95)
    assert "disagrees with itself" in cell(cells, "4", "dinov3 + siglip2", "vsi_bench").notes[0]
    assert "no fraction of 150 pairs" in cell(cells, "9", "pi3 + qwen", "mmvp").notes[0]
    assert cell(cells, "1", "valr_s", "route_planning").notes == ("4 frames, the paper 32",)
    assert not cell(cells, "2", "valr_s", "vstar").notes


def test_csv_and_markdown_hold_every_cell_and_counts_add_up() -> None:
    cells = paper_cells({"valr_m": video("valr_m")}, 0.95)
    rows = list(csv.DictReader(io.StringIO(cells_csv(cells))))
    assert [row["column"] for row in rows] == [one.column for one in cells]
    text = cells_markdown([*cells, replace(cells[0], table="2", row="mine")])
    assert "### Table 12: Latent slots K" in text and "| mine | avg |" in text
    counts = verdict_counts(cells)
    assert sum(counts.values()) == len(cells)
    # Nine of table 1, and VaLR-M's row in tables 4 and 9.
    assert counts["within noise"] == 11
