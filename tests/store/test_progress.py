"""What people, parents, Dagster and the tracking server get to see of a running stage."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster_pipes
import numpy as np
import PIL.Image
import pytest
from rich.console import Console

from valr_ops.store import progress
from valr_ops.store.artifacts import Check, StageReport
from valr_ops.store.progress import Progress, ShowingProgress, read_status, reporting_to_dagster, watch


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that pass only when the test says so."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "monotonic", clock)
    return clock


@pytest.fixture
def log() -> Console:
    """A console that writes to a file, as in a CI; its text is ``log.file.getvalue()``."""
    return Console(file=io.StringIO(), width=200)


def lines(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_the_quiet_progress_changes_nothing_and_prints_nothing(capfd: pytest.CaptureFixture[str]):
    quiet = Progress()
    quiet.say("hello")
    quiet.log(1, {"loss": 0.5})
    assert list(quiet.track(range(3), "items", done=4)) == [0, 1, 2]
    assert capfd.readouterr() == ("", "")


def test_without_a_terminal_there_are_a_few_plain_lines_with_counts_and_time_left(clock: Clock, log: Console):
    showing = ShowingProgress("stage1_sft", console=log)
    for step in showing.track(range(200), "updates"):
        clock.seconds += 0.5
        showing.log(step, {"loss": 2.0 - step / 100})
    said = lines(log)
    assert len(said) == 20, "one line every 5 s during 100 s, and the last of them says the end"
    assert said[0].startswith("stage1_sft  updates 5 % (10/200) · 1 min 35 s left · loss 1.91")
    assert said[-1] == "stage1_sft  updates 200/200 in 1 min 40 s · loss 0.01"
    assert "\x1b" not in "".join(said) and "\r" not in "".join(said)


def test_a_tenth_that_comes_sooner_than_five_seconds_gets_its_line_too(clock: Clock, log: Console):
    for _ in ShowingProgress("scores_sft", console=log).track(range(10), "answers"):
        clock.seconds += 2
    assert [line.split()[2] for line in lines(log)] == [*(str(percent) for percent in range(10, 100, 10)), "10/10"]


def test_a_loop_of_a_moment_gets_one_line(log: Console):
    assert len(list(ShowingProgress("sources", console=log).track(range(1000), "scenes"))) == 1000
    assert len(lines(log)) == 1 and "scenes 1000/1000 in" in lines(log)[0]


def test_a_terminal_gets_a_bar_and_a_log_with_forced_colours_does_not():
    terminal, coloured = (Console(file=file, force_terminal=True, width=120) for file in (Terminal(), io.StringIO()))
    for console in (terminal, coloured):
        showing = ShowingProgress("stage1_sft", console=console)
        for step in showing.track(range(3), "updates"):
            showing.log(step, {"loss": 0.25})
            showing.say("a line above the bar")
    assert "━" in terminal.file.getvalue() and "3/3" in terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "a line above the bar" in terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "━" not in coloured.file.getvalue()  # type: ignore[attr-defined]


def test_standard_output_stays_free_for_the_verbs_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    showing = progress.open_progress(tmp_path, "sources")
    showing.say("drawing [scenes]")
    list(showing.track(range(3), "scenes"))
    showing.finished("made", "abc.dir")
    out, err = capfd.readouterr()
    assert out == ""
    assert "drawing [scenes]" in err and "abc.dir" in err


def test_the_status_file_says_what_a_parent_needs_and_the_time_left_ignores_an_earlier_runs_work(
    clock: Clock, log: Console, tmp_path: Path
):
    file = tmp_path / "stage1_sft.json"
    assert read_status(file).state == "waiting"
    showing = ShowingProgress("stage1_sft", console=log, status_file=file)
    assert read_status(file).state == "running"
    items = showing.track(range(60), "updates", done=40)
    next(items)
    clock.seconds += 3
    showing.log(41, {"loss": 0.5})
    next(items)
    status = json.loads(file.read_text())
    assert (status["description"], status["done"], status["total"]) == ("updates", 41, 100)
    assert status["eta_seconds"] == pytest.approx(59 * 3)
    assert status["metrics"] == {"loss": 0.5}
    items.close()  # type: ignore[attr-defined]
    clock.seconds += 1
    showing.failed("the loss is not finite")
    status = json.loads(file.read_text())
    assert (status["state"], status["message"], status["seconds"]) == ("failed", "the loss is not finite", 4.0)


def test_of_nested_counts_the_outer_one_is_reported(clock: Clock, log: Console, tmp_path: Path):
    showing = ShowingProgress("scores_sft", console=log, status_file=tmp_path / "s.json")
    for _ in showing.track(range(2), "benchmarks"):
        for _ in showing.track(range(5), "answers"):
            clock.seconds += 1
            assert read_status(tmp_path / "s.json").total == 2
    assert lines(log)[-1].startswith("scores_sft  benchmarks 2/2")


def test_a_status_file_is_whole_whenever_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Console):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_STATUS_FILES", 0.0)
    file, done = tmp_path / "s.json", threading.Event()
    torn: list[Exception] = []

    def read() -> None:
        while not done.is_set():
            try:
                read_status(file)
            except ValueError as error:
                torn.append(error)

    showing = ShowingProgress("sources", console=log, status_file=file)
    reader = threading.Thread(target=read)
    reader.start()
    for step in showing.track(range(100), "x" * 20_000):
        showing.log(step, {"loss": 1.0})
    done.set()
    reader.join()
    assert torn == []


def test_metrics_of_a_killed_run_are_kept_and_its_torn_line_does_not_spoil_the_next(log: Console, tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    ShowingProgress("stage1_sft", console=log, metrics_file=file).log(1, {"loss": 0.5})
    file.write_text(file.read_text() + '{"step": 2, "ti')
    again = ShowingProgress("stage1_sft", console=log, metrics_file=file)
    again.log(2, {"loss": np.float32(0.25)})  # type: ignore[dict-item]
    first, torn, second = file.read_text().splitlines()
    assert json.loads(first)["metrics"] == {"loss": 0.5} and torn == '{"step": 2, "ti'
    assert json.loads(second)["metrics"] == {"loss": 0.25} and set(json.loads(second)) == {"step", "time", "metrics"}
    again.finished("made", "abc.dir")
    assert not file.exists()


# ------------------------------------------------------------------------------------------------------------- watch


def scripted(*moments: Callable[[], object]) -> Callable[[], bool]:
    """An `is_running` during whose calls things happen, one after the other; the process ends with the last."""
    remaining = list(moments)

    def is_running() -> bool:
        if remaining:
            remaining.pop(0)()
        return bool(remaining)

    return is_running


def play(folder: Path, clock: Clock) -> Callable[[], bool]:
    """Stage a is made, stage b is caught in the middle, c never starts."""
    quiet = Console(file=io.StringIO())
    a: list[ShowingProgress] = []
    b: list[Iterator[int]] = []

    def count_on() -> None:
        clock.seconds += 4
        next(b[0])

    def start_b() -> None:
        showing = ShowingProgress("b", console=quiet, status_file=folder / "b.json")
        b.append(iter(showing.track(range(100), "updates")))
        next(b[0])

    return scripted(
        lambda: a.append(ShowingProgress("a", console=quiet, status_file=folder / "a.json")),
        lambda: a[0].finished("made", "abc.dir"),
        start_b,
        *[count_on] * 6,
    )


def test_watching_without_a_terminal_says_start_and_end_and_little_in_between(
    tmp_path: Path, clock: Clock, log: Console
):
    ended = watch(["a", "b", "c"], tmp_path, play(tmp_path, clock), poll_seconds=0, console=log)
    assert {stage: status.state for stage, status in ended.items()} == {"a": "made", "b": "stopped", "c": "waiting"}
    said = [line.split("  ", 1) for line in lines(log)]
    assert said[0] == ["a", "started"] and said[1][1].startswith("made (") and said[2] == ["b", "started"]
    between = [text for stage, text in said[3:-1]]
    assert len(between) == 1, "24 s, the last 4 of which end the watch: one line after 12 s"
    assert "updates 3 % (3/100)" in between[0] and "left" in between[0]
    assert said[-1][0] == "b" and said[-1][1].startswith("stopped")


def test_watching_on_a_terminal_shows_a_row_for_every_stage(tmp_path: Path, clock: Clock):
    console = Console(file=Terminal(), force_terminal=True, width=100)
    watch(["a", "b", "c"], tmp_path, play(tmp_path, clock), poll_seconds=0, console=console)
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    for words in ("waiting", "✓", "made", "updates 3 % (3/100)", "stopped"):
        assert words in drawn


# ----------------------------------------------------------------------------------------------------------- Dagster


@pytest.fixture
def dagster_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file into which a process speaks that Dagster started for the asset ``stage1_sft``."""
    messages = tmp_path / "pipes" / "messages"
    messages.parent.mkdir()
    context: dict[str, Any] = dict.fromkeys(dagster_pipes.PipesContextData.__annotations__)
    context |= {"asset_keys": ["stage1_sft"], "run_id": "r1", "extras": {}, "retry_number": 0}
    for name, value in {"CONTEXT": {"data": context}, "MESSAGES": {"path": str(messages)}}.items():
        monkeypatch.setenv(f"DAGSTER_PIPES_{name}", dagster_pipes.encode_param(value))
    monkeypatch.setattr(dagster_pipes.PipesContext, "_instance", None)
    yield messages


def heard(messages: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in messages.read_text().splitlines()]


def report_with_plot(artifact: Path, size: int = 20) -> StageReport:
    artifact.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(artifact / "loss.png")
    return StageReport(
        summary={"updates": 7, "loss": 0.5, "worst": float("inf"), "teacher": "dinov3"},
        tables={"first rows": "| a |\n|---|\n| 1 |"},
        plots=("loss.png",),
        checks=(Check("losses_are_finite", True, "7 of 7 are finite"),),
        timings={"seconds": 1.5},
        report="report.html",
    )


def test_dagster_gets_lines_checks_and_a_materialization_with_everything_people_want_to_see(
    dagster_messages: Path, tmp_path: Path
):
    report = report_with_plot(tmp_path / "stage1_sft")
    with reporting_to_dagster():
        showing = progress.open_progress(tmp_path, "stage1_sft")
        showing.say("running")
        showing.finished("made", "abc.dir")
        showing.materialized(
            report, "abc.dir", tmp_path / "stage1_sft", how="made", tracking_url="http://127.0.0.1:5000/#/x"
        )
    by_method = {message["method"]: message["params"] for message in heard(dagster_messages)}
    assert list(by_method) == ["opened", "log", "report_asset_check", "report_asset_materialization", "closed"]
    check = by_method["report_asset_check"]
    assert (check["check_name"], check["passed"], check["severity"]) == ("losses_are_finite", True, "ERROR")
    made = by_method["report_asset_materialization"]
    assert made["data_version"] == "abc.dir"
    metadata = made["metadata"]
    assert metadata["updates"] == {"type": "int", "raw_value": 7}
    assert metadata["worst"] == {"type": "text", "raw_value": "inf"}
    assert metadata["first rows"]["type"] == "md" and metadata["report"]["type"] == "path"
    assert metadata["MLflow run"] == {"type": "url", "raw_value": "http://127.0.0.1:5000/#/x"}
    image = metadata["plot: loss"]["raw_value"]
    bytes_inside = base64.b64decode(image.partition("base64,")[2].removesuffix(")"))
    assert bytes_inside == (tmp_path / "stage1_sft" / "loss.png").read_bytes()
    assert "exception" not in by_method["closed"]


def test_a_large_plot_is_made_small_enough_for_the_event_log(tmp_path: Path):
    report_with_plot(tmp_path / "stage1_sft", size=300)
    plot = tmp_path / "stage1_sft" / "loss.png"
    assert plot.stat().st_size > 250_000
    shown = progress.asset_metadata(summary={}, timings={}, tables={}, plots=[plot], report=None, links={})
    image = shown["plot: loss"]["raw_value"]
    assert len(image) <= 200_100
    PIL.Image.open(io.BytesIO(base64.b64decode(image.partition("base64,")[2].removesuffix(")")))).verify()


def test_a_failed_check_and_the_error_after_it_reach_dagster(dagster_messages: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="refused"), reporting_to_dagster():
        showing = progress.open_progress(tmp_path, "stage1_sft")
        showing.checked(Check("losses_are_finite", False, "update 3 is not", {"rows": [3]}))
        showing.failed("refused")
        raise ValueError("refused")
    said = heard(dagster_messages)
    (check,) = (message["params"] for message in said if message["method"] == "report_asset_check")
    assert check["passed"] is False and check["metadata"]["rows"] == {"type": "json", "raw_value": [3]}
    assert said[-1]["method"] == "closed" and said[-1]["params"]["exception"]["message"].strip().endswith("refused")


def test_losing_dagster_stops_nothing(dagster_messages: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    report = report_with_plot(tmp_path / "stage1_sft")
    with reporting_to_dagster():
        showing = progress.open_progress(tmp_path, "stage1_sft")
        shutil.rmtree(dagster_messages.parent)
        assert list(showing.track(range(3), "updates")) == [0, 1, 2]
        showing.say("still here")
        showing.finished("made", "abc.dir")
        showing.materialized(report, "abc.dir", tmp_path / "stage1_sft", how="made", tracking_url=None)
    assert capfd.readouterr().err.count("Dagster can't be reached any more") == 2, "once while running, once at the end"


def test_a_second_process_of_a_distributed_run_does_not_speak_to_dagster(
    dagster_messages: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RANK", "1")
    with reporting_to_dagster():
        pass
    assert not dagster_messages.exists()


def test_progress_needs_no_dagster():
    code = "import sys, valr_ops.store.progress; print([m for m in sys.modules if m.startswith('dagster')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
