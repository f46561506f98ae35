"""``valr materialize`` and ``valr demo`` as a person meets them: selections, own data, Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.project import copy_project, environment, last_line, valr, valr_here
from valr_ops import orchestration, workspace
from valr_ops.recipe import recipes
from valr_ops.recipe.recipe import RecipeError
from valr_ops.stages import UnknownStageError


def test_a_plus_selects_everything_a_stage_needs_in_the_order_of_the_table() -> None:
    assert orchestration.select(["stage1_sft"]) == ("stage1_sft",)
    assert orchestration.select(["+latent_corpus,stage1_sft"]) == (
        "sources",
        "cot_corpus",
        "base_model",
        "latent_corpus",
        "stage1_sft",
    )


def test_a_misspelt_selection_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UnknownStageError, match="did you mean 'ablation_table'"):
        orchestration.select(["+ablation_tabel"])


def test_own_data_replaces_the_drawn_sources(tmp_path: Path) -> None:
    folder = tmp_path / "my data"
    folder.mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        (folder / name).write_text("{}\n")
    recipe = recipes.load(Path(__file__).parents[1], orchestration.own_data(folder))
    assert list(recipe.data.sources) == ["my_data"]
    assert recipe.data.sources["my_data"].format == "jsonl"


@pytest.mark.parametrize(("present", "said"), [(None, "no such folder"), ("train.jsonl", "holds no test.jsonl")])
def test_a_data_folder_that_is_not_there_or_incomplete_is_named(tmp_path: Path, present: str | None, said: str) -> None:
    folder = tmp_path / "data"
    if present:
        folder.mkdir()
        (folder / present).write_text("{}\n")
    with pytest.raises(RecipeError, match=said):
        orchestration.own_data(folder)


def test_help_and_wrong_usage_are_quick_and_say_what_to_type() -> None:
    words = [sys.executable, "-X", "importtime", "-m", "valr_ops", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "materialize" in done.stdout
    assert not any(f" {heavy}\n" in done.stderr for heavy in ("torch", "dvc", "pydantic", "rich"))
    wrong = subprocess.run([sys.executable, "-m", "valr_ops", "materialise"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "materialize" in wrong.stderr


def test_a_typing_mistake_in_params_yaml_is_one_message(tmp_path: Path) -> None:
    root = copy_project(tmp_path / "project", {"scale": "tiny", "stage2": {"learning_rat": 1e-3}})
    for words in (["run", "sources"], ["materialize", "+ablation_table"], ["plan"], ["demo"]):
        done = valr_here(root, *words, check=False)
        assert done.returncode == 42, words
        assert "params.yaml: stage2.learning_rat" in done.stderr and "learning_rate" in done.stderr
        assert "Traceback" not in done.stderr


def test_check_data_tells_usable_rejected_and_unreadable_apart_by_its_exit_status(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    record = {"id": "a", "images": ["a.png"], "question": "Red?", "steps": [{"text": "It is red."}], "answer": "yes"}
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    good, mixed = tmp_path / "good.jsonl", tmp_path / "mixed.jsonl"
    good.write_text(json.dumps(record) + "\n")
    mixed.write_text(json.dumps(record) + "\n{broken\n")
    for path, status, kept, rejected in (
        (good, 0, 1, {}),
        (mixed, 3, 1, {"not_json": 1}),
        (tmp_path / "nowhere", 2, 0, {}),
    ):
        done = valr_here(root, "check-data", str(path), check=False)
        said = last_line(done)
        assert (done.returncode, said["kept"], said["rejected"]) == (status, kept, rejected), done.stderr
        assert "Traceback" not in done.stderr


def test_what_a_script_starts_in_the_background_is_ended_in_good_order_too(in_background: None) -> None:
    show = "import signal; print(signal.getsignal(2) is signal.default_int_handler, signal.getsignal(15).name)"
    with pytest.raises(KeyboardInterrupt), workspace.interruptible():
        assert subprocess.check_output([sys.executable, "-c", show], text=True) == "True SIG_DFL\n"
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN, "as it was"


@pytest.fixture
def in_background() -> Iterator[None]:
    """SIGINT is ignored, as a shell without job control has it for what is started with `&`."""
    was = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, was)


@pytest.mark.services
@pytest.mark.parametrize("ask", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything_and_the_same_command_goes_on(tmp_path: Path, in_background: None, ask: int) -> None:
    root = copy_project(tmp_path / "project")
    words = [sys.executable, "-m", "valr_ops", "materialize", "+latent_corpus"]
    running = subprocess.Popen(words, cwd=root, env=environment(root), stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    for line in running.stderr:
        if line.startswith("cot_corpus") and "started" in line:
            break
    running.send_signal(ask)
    said = running.stderr.read()
    assert running.wait(90) == 130
    assert "the same command goes on" in said and "Traceback" not in said
    until = time.monotonic() + 20
    while (left := _processes_in(root)) and time.monotonic() < until:
        time.sleep(0.5)
    assert left == []
    made = last_line(valr(root, "materialize", "+latent_corpus"))["made"]
    assert "sources" not in made and "latent_corpus" in made


def _processes_in(root: Path) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == root:
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def test_the_recipe_that_is_made_along_the_way_is_not_counted_among_the_selected() -> None:
    result = orchestration.Result(selected=("sources", "cot_corpus"), made=("recipe", "sources"), seconds=3.2)
    assert result.line() == "1 of 2 stages made in 3 s, the rest was up to date"
