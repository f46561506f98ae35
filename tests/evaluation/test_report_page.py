"""The page as a person sees it: eleven benchmarks, long words and many pictures, on a phone and on a desk."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from valr_ops.evaluation.ablation import TITLES
from valr_ops.evaluation.report import write_page

CHROMIUM = Path("/usr/bin/chromium")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
ITEMS = {"vsi_bench": 200, "synthetic": 256}
"""Every other benchmark has twelve."""
FIELDS = {
    "isolation": "iso-1",
    "prompt": "0" * 16,
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
}


def noise() -> bytes:
    """A picture that can hardly be packed."""
    saved = io.BytesIO()
    PIL.Image.effect_noise((320, 240), 60).convert("RGB").save(saved, "PNG")
    return saved.getvalue()


def written(folder: Path, name: str, right: float) -> Path:
    """Scores of a model that is right on that share of the items, with a photograph's worth of bytes an image."""
    draw, picture = random.Random(name), noise()
    (folder / "examples").mkdir(parents=True)
    entries, rows, examples = {}, [], []
    for benchmark in (*TITLES, "synthetic"):
        n = ITEMS.get(benchmark, 12)
        of_benchmark: list[dict[str, Any]] = []
        for place in range(n):
            score = float(draw.random() < right)
            steps = "The chair stands left of the table. " * draw.randrange(1, 30) + "w" * 300
            of_benchmark.append(
                {
                    "benchmark": benchmark,
                    "id": f"{benchmark}/{place}",
                    "cluster": f"scene {place // 4}",
                    "question": "These are frames of a video.\nWhich is\n" + "longest" * 40,
                    "gold": "A",
                    "score": score,
                    "correct": score == 1,
                    "resolved": place % 5 > 0,
                    "text_tokens": place,
                    "output": f"<latent></latent>{steps}\nAnswer: A",
                    "isolated": "A",
                    "question_type": "x",
                    "status": "ok",
                    "segments": 1,
                }
            )
        # Only VaLR-M's are shown.
        for row in of_benchmark[:2] if name == "stage2_valr_m" else ():
            files = [f"examples/{len(examples)}-{number}.png" for number in range(8)]
            for file in files:
                (folder / file).write_bytes(picture)
            examples.append({"benchmark": benchmark, "id": row["id"], "images": files})
        rows += of_benchmark
        correct = sum(row["correct"] for row in of_benchmark)
        entries[benchmark] = {
            "format": benchmark,
            "profile": "official",
            "revision": "5f" * 8,
            "drawn": n == 12,
            "n": n,
            "correct": correct,
            "accuracy": correct / n,
            "interval": [0.8 * correct / n, min(1, 1.2 * correct / n)],
            "interval_method": "bootstrap",
            "rejected": {},
            "cut_off": 1,
            "unresolved": 2,
            "format_misses": 1,
            "majority": {"answer": "A", "accuracy": 0.3},
            "totals": {f"sub_category_{i}": i / 7 for i in range(9)},
            "latent_trigger_rate": 0.5,
            "mean_segments": 1.5,
            "mean_text_tokens": 90.0,
            "mean_latent_steps": 24.0,
        }
    slots = 16 if "valr" in name else 0
    scores = {"budget": FIELDS | {"slots": slots}, "confidence": 0.95, "benchmarks": entries}
    (folder / "scores.json").write_text(json.dumps(scores | {"model": {"artifact": name, "digest": "0"}}))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "examples.json").write_text(json.dumps(examples))
    return folder


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    models = {"base_model": 0.2, "stage1_sft": 0.6, "stage2_valr_s": 0.65, "stage2_valr_m": 0.75, "gpt-4o": 0.7}
    folders = [written(folder / name, name, right) for name, right in models.items()]
    write_page(folders, folder / "page.html")
    return folder / "page.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=str(CHROMIUM), args=OPTIONS)
        yield opened
        opened.close()


def test_eleven_benchmarks_and_eighty_pictures_are_a_page_that_can_be_mailed(page_file: Path) -> None:
    text = page_file.read_text()
    assert text.count("data:image/") == 80
    assert len(text) < 3_000_000


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_a_person_reads_the_page_without_moving_it_sideways(
    browser: Any, page_file: Path, width: int, colours: str
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=colours)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    closed = page.locator("details:not([open]) > summary")
    while closed.count():
        closed.first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    # What is wider than the page scrolls in its own box.
    assert page.evaluate(
        "[...document.querySelectorAll('table')].every(one => one.parentElement.classList.contains('scroll'))"
    )
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(255, 255, 255)" if colours == "light" else "rgb(17, 22, 27)")
    page.close()
