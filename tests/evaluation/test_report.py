"""The page: what stands in it, what never does, and that it needs nothing beside itself."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from tests.evaluation.scenes import context, scored
from valr_ops.__main__ import main
from valr_ops.evaluation.ablation import ComparisonError, build_ablation_table
from valr_ops.evaluation.models import BudgetError
from valr_ops.evaluation.report import build_report, data_uri, reasoning, spread, study, write_page
from valr_ops.store.artifacts import StageReport

HOSTILE = (
    "# What <b>remains</b>\n\nPlain words, <script>alert(1)</script> and [a link](https://example.org/x).\n\n"
    "- one\n- two\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\n![chart](b.png) ![far](https://example.org/far.png)\n"
)

Made = tuple[Path, StageReport, dict[str, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A page of two models on 60 items, of which VaLR-M has one wrong, with one study that has two plots."""
    folder = tmp_path_factory.mktemp("report")
    inputs = {
        "scores_sft": scored(folder, "scores_sft", lambda n: n < 45)[0],
        "scores_valr_m": scored(folder, "scores_valr_m", lambda n: n != 7, slots=4)[0],
    }
    at = context("ablation_table", folder, inputs)
    build_ablation_table(at)
    inputs |= {"ablation_table": at.out, "visual_decay": written_study(folder / "visual_decay")}
    at = context("report", folder, inputs)
    return at.out / "report.html", build_report(at), inputs


def written_study(folder: Path) -> Path:
    """`result.md` with a heading, a list, a table, an image and things that must not work; and two plots."""
    folder.mkdir()
    (folder / "result.md").write_text(HOSTILE)
    for name, side in (("a.png", 8), ("b.png", 600)):
        # Noise, which is large as PNG.
        PIL.Image.effect_noise((side, side), 90).convert("RGB").save(folder / name)
    return folder


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
        assert not [name for name, _ in attributes if name.startswith("on")]
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


def test_the_page_is_whole_and_loads_nothing_from_outside_it(made: Made) -> None:
    text = made[0].read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.loads and all(re.match("data:image/(png|webp);base64,", value) for value in page.loads)
    assert not {"script", "link", "iframe", "object", "a"} & set(page.tags)
    assert "url(" not in text and "@import" not in text
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    assert len(text) < 3_000_000
    assert made[1].report == "report.html" and made[1].summary["items"] == 10


def test_the_page_has_models_the_papers_cells_the_study_items_and_how_it_was_scored(made: Made) -> None:
    text = made[0].read_text()
    parts = ("Models and benchmarks", "Differences to SFT", "Every cell of the paper", "What ", "Items, worst first")
    places = [text.index(f"<h2>{part}") for part in (*parts, "How it was scored")]
    assert places == sorted(places)
    models = text[places[0] : places[1]]
    assert "98.3<span" in models and "91.1 to 99.7" in models and "majority answer" in models
    assert "+23.3 (" in text[places[1] : places[2]]
    paper = text[places[2] : places[3]]
    assert paper.count("<details>") == 11 and "346 not run" in paper
    assert "52.9*" in paper and "unweighted" not in paper and "the mean of its eight sub-tasks" in paper
    assert "max new tokens" in text[places[5] :] and "SFT 0, VaLR-M 4" in text[places[5] :]


def test_a_study_shows_its_sentences_and_plots_and_nothing_else(made: Made) -> None:
    text = made[0].read_text()
    section = text[text.index("<h2>What ") : text.index("Items, worst first")]
    assert "<h2>What &lt;b&gt;remains&lt;/b&gt;</h2>" in section
    assert "&lt;script&gt;" in section and "<li>one</li>" in section and "<td>2</td>" in section
    assert section.count("<img") == 2 and 'alt="chart"' in section and 'alt="a"' in section
    assert "far.png" not in section and "<a " not in section


def test_a_large_picture_is_packed_and_a_small_one_is_left_as_it_is(made: Made) -> None:
    folder = made[2]["visual_decay"]
    assert data_uri(folder / "a.png").startswith("data:image/png;")
    large = data_uri(folder / "b.png")
    assert large.startswith("data:image/webp;") and len(large) < (folder / "b.png").stat().st_size
    assert study(folder)["plots"][0][0] == "a"


def test_the_page_shows_ten_items_of_valr_m_worst_first_with_segments_and_images(made: Made) -> None:
    text = made[0].read_text()
    items = text[text.index("Items, worst first") : text.index("How it was scored")]
    assert items.count("<details") == items.count("data:image/png") == 10
    assert items.count("latent segment, 4 slots") == 10
    assert items.index("Is image 7 red?") == min(items.index(f"Is image {n} red?") for n in (0, 1, 2, 7))
    assert items.count('class="badge wrong"') == 1


def test_shown_items_are_the_worst_of_every_benchmark() -> None:
    def row(benchmark: str, correct: bool, resolved: bool = True) -> dict[str, Any]:
        return {"benchmark": benchmark, "correct": correct, "resolved": resolved, "text_tokens": 1}

    rows = [row("a", False)] * 9 + [row("b", False, resolved=False)] + [row("c", True)] * 4
    shown = [one["benchmark"] for one in spread(rows, 6)]
    assert shown == ["b", "a", "a", "a", "c", "c"]


def test_what_a_model_wrote_can_not_become_markup(made: Made) -> None:
    text = made[0].read_text()
    assert "<b>seen</b>" not in text
    assert "&lt;b&gt;seen&lt;/b&gt;" in text


def test_the_same_inputs_give_the_same_page(made: Made, tmp_path: Path) -> None:
    again = context("report", tmp_path, made[2])
    build_report(again)
    assert (again.out / "report.html").read_bytes() == made[0].read_bytes()


def test_any_scores_folders_make_a_page_and_the_last_line_says_what_is_on_it(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Both were made by a model called `stage`, so they go by the names of their folders.
    folders = [str(made[2][name]) for name in ("scores_sft", "scores_valr_m")]
    out = tmp_path / "pages" / "page.html"
    assert main(["report", *folders, "--out", str(out), "--reference", "scores_sft"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["models"], said["reference"]) == (["scores_sft", "scores_valr_m"], "scores_sft")
    assert said["paper_cells"] == {"not run": 346}
    text = out.read_text()
    assert "<h1>Models side by side</h1>" in text and "Differences to scores_sft" in text


def test_a_difference_is_refused_with_the_way_to_allow_it_and_then_stands_on_the_page(
    made: Made, tmp_path: Path
) -> None:
    other = scored(tmp_path, "scores_valr_m", lambda n: True, slots=4, max_new_tokens=128)[0]
    folders = [made[2]["scores_sft"], other]
    with pytest.raises(BudgetError, match=r"max_new_tokens is 64 .* and 128 .*--allow-different FIELD"):
        write_page(folders, tmp_path / "page.html")
    write_page(folders, tmp_path / "page.html", allowed=["max_new_tokens"])
    text = (tmp_path / "page.html").read_text()
    assert "Compared although different" in text
    assert "max_new_tokens is 64 for scores_sft and 128 for scores_valr_m" in text
    with pytest.raises(ComparisonError, match="one name"):
        write_page([other, other], tmp_path / "page.html")


def test_reasoning_is_cut_at_latent_segments() -> None:
    output = "<latent><|latent_pad|><|latent_pad|></latent>row 1.\n<latent></latent>row 2.\nAnswer: 4<|im_end|>"
    assert reasoning(output, slots=16) == [
        {"slots": 2},
        {"text": "row 1."},
        {"slots": 16},
        {"text": "row 2.\nAnswer: 4"},
    ]
