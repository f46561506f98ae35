"""The table and the page: what stands in them, and what never does."""

from __future__ import annotations

import csv
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from tests.evaluation.scenes import context, scored
from valr_ops.evaluation.report import build_ablation_table, compare, reasoning, terminal_table
from valr_ops.evaluation.run import BudgetError
from valr_ops.store.artifacts import StageReport


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StageReport, dict[str, Path]]:
    """A table of four models on 60 items: 20 right, 45 right, 47 right (two more than SFT), all right."""
    folder = tmp_path_factory.mktemp("scores")
    inputs = {
        "scores_base": scored(folder, "scores_base", lambda n: n < 20)[0],
        "scores_sft": scored(folder, "scores_sft", lambda n: n < 45)[0],
        "scores_valr_s": scored(folder, "scores_valr_s", lambda n: n < 47, slots=4)[0],
        "scores_valr_m": scored(folder, "scores_valr_m", lambda n: n != 7, slots=4)[0],
    }
    at = context("ablation_table", folder, inputs)
    return at.out, build_ablation_table(at), inputs


def test_the_table_has_a_row_for_every_model_with_its_interval_and_its_difference_to_sft(
    made: tuple[Path, StageReport, dict[str, Path]],
) -> None:
    table = json.loads((made[0] / "table.json").read_text())
    benchmark = table["benchmarks"]["mine"]
    rows = {row["label"]: row for row in benchmark["rows"]}
    assert list(rows) == ["base", "SFT", "VaLR-S", "VaLR-M"]
    assert [row["correct"] for row in rows.values()] == [20, 45, 47, 59]
    assert all(row["low"] < row["accuracy"] < row["high"] and row["n"] == 60 for row in rows.values())
    assert benchmark["majority"] == {"answer": "true", "accuracy": pytest.approx(2 / 3, abs=1e-6)}
    assert rows["SFT"]["against_reference"] is None
    against = {label: row["against_reference"] for label, row in rows.items() if row["against_reference"]}
    assert [(one["gained"], one["lost"]) for one in against.values()] == [(0, 25), (2, 0), (15, 1)]
    assert [one["verdict"] for one in against.values()] == ["differs", "within noise", "differs"]
    assert against["VaLR-S"]["detectable"] < against["VaLR-M"]["detectable"]
    assert [row["against_majority"] for row in rows.values()] == ["below", "within noise", "within noise", "above"]
    assert table["budget"]["slots"] == {"scores_base": 0, "scores_sft": 0, "scores_valr_s": 4, "scores_valr_m": 4}


def test_the_papers_rows_are_the_printed_ones_and_marked_as_another_model(
    made: tuple[Path, StageReport, dict[str, Path]],
) -> None:
    paper = json.loads((made[0] / "table.json").read_text())["paper"]
    assert paper["benchmarks"] == ["VSI-Bench", "BLINK", "MMVP", "MMStar", "V*", "CV-Bench"]
    assert [row["label"] for row in paper["rows"]] == ["base", "SFT", "VaLR-S", "VaLR-M"]
    assert paper["rows"][-1]["scores"] == [52.9, 64.7, 60.3, 72.3, 86.9, 87.6]
    for text in ((made[0] / "table.md").read_text(), (made[0] / "report.html").read_text()):
        assert "Qwen2.5-VL-7B" in text
        assert "ot comparable with the rows above" in text


def test_the_same_numbers_stand_in_csv_and_markdown_and_on_the_terminal(
    made: tuple[Path, StageReport, dict[str, Path]],
) -> None:
    folder, report, _ = made
    rows = list(csv.DictReader((folder / "table.csv").open(newline="")))
    assert [(row["label"], row["accuracy"], row["minus_sft_verdict"]) for row in rows] == [
        ("base", "0.333333", "differs"),
        ("SFT", "0.75", ""),
        ("VaLR-S", "0.783333", "within noise"),
        ("VaLR-M", "0.983333", "differs"),
    ]
    assert "| VaLR-M | 60 | 98.3 % | 91.1 to 99.7 | +23.3 (" in report.tables["models side by side"]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(terminal_table(folder))
    shown = console.export_text()
    assert all(word in shown for word in ("VaLR-M", "98.3 %", "within noise", "always 'true'", "66.7 %", "52.9"))
    assert report.summary["accuracy_mine_valr_m"] == pytest.approx(59 / 60, abs=1e-6)


def test_scores_under_different_budgets_make_no_table(tmp_path: Path) -> None:
    inputs = {
        "scores_sft": scored(tmp_path, "scores_sft", lambda n: True)[0],
        "scores_valr_m": scored(tmp_path, "scores_valr_m", lambda n: True, slots=4, max_new_tokens=128)[0],
    }
    with pytest.raises(BudgetError, match="max_new_tokens is 64 for scores_sft and 128 for scores_valr_m"):
        compare(inputs, 0.95, "tiny")


def test_scores_on_different_items_make_no_table(tmp_path: Path) -> None:
    inputs = {
        "scores_sft": scored(tmp_path, "scores_sft", lambda n: True)[0],
        "scores_valr_m": scored(tmp_path, "scores_valr_m", lambda n: True, count=59)[0],
    }
    with pytest.raises(BudgetError, match="different items of mine"):
        compare(inputs, 0.95, "tiny")


class Page(HTMLParser):
    """Collects what a browser would load, the words, and tags that do not pair up."""

    VOID = frozenset({"meta", "img", "br", "rect", "line", "link", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_whole_and_loads_nothing_from_outside_it(
    made: tuple[Path, StageReport, dict[str, Path]],
) -> None:
    text = (made[0] / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.loads and all(value.startswith("data:image/png;base64,") for value in page.loads)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in text and "@import" not in text and "http" not in text
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text


def test_the_page_shows_ten_items_of_valr_m_worst_first_with_segments_and_images(
    made: tuple[Path, StageReport, dict[str, Path]],
) -> None:
    text = (made[0] / "report.html").read_text()
    items = text[text.index("Items, worst first") : text.index("How it was scored")]
    assert items.count("<details") == items.count("data:image/png") == 10
    assert items.count("latent segment, 4 slots") == 10
    assert items.index("Is image 7 red?") == min(items.index(f"Is image {n} red?") for n in (0, 1, 2, 7))
    assert items.count('class="badge wrong"') == 1


def test_what_a_model_wrote_can_not_become_markup(made: tuple[Path, StageReport, dict[str, Path]]) -> None:
    text = (made[0] / "report.html").read_text()
    assert "<b>seen</b>" not in text
    assert "&lt;b&gt;seen&lt;/b&gt;" in text


def test_the_same_scores_give_the_same_bytes(made: tuple[Path, StageReport, dict[str, Path]], tmp_path: Path) -> None:
    again = context("ablation_table", tmp_path, made[2])
    build_ablation_table(again)
    names = sorted(path.name for path in made[0].iterdir())
    assert names == ["accuracy.png", "report.html", "table.csv", "table.json", "table.md"]
    assert all((again.out / name).read_bytes() == (made[0] / name).read_bytes() for name in names)


def test_reasoning_is_cut_at_latent_segments() -> None:
    output = "<latent><|latent_pad|><|latent_pad|></latent>row 1.\n<latent></latent>row 2.\nAnswer: 4<|im_end|>"
    assert reasoning(output, slots=16) == [
        {"slots": 2},
        {"text": "row 1."},
        {"slots": 16},
        {"text": "row 2.\nAnswer: 4"},
    ]
