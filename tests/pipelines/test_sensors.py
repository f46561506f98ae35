"""New data and an old report ask for one run each; the same data and a young report for none."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from assets.factory import FRESH
from pipelines import sensors
from pipelines.schedules import WHY
from valr_ops.data.inventory import listing
from valr_ops.data.sources import opened
from valr_ops.recipe import recipes


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with one given source that was listed, and one that is drawn."""
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.jsonl").write_text("{}\n")
    (tmp_path / "mine" / "a.png").write_bytes(b"pixels")
    sources: dict[str, Any] = {"mine": {"format": "jsonl", "path": "mine"}, "scenes": {"format": "jsonl"}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"scale": "tiny", "data.sources": sources}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VALR_SET", raising=False)
    listed(tmp_path)
    return tmp_path


def listed(root: Path) -> None:
    """What the stage `sources` leaves behind about the given source."""
    artifact = root / "artifacts" / "sources"
    artifact.mkdir(parents=True, exist_ok=True)
    files = listing(opened("mine", recipes.load(root), artifact))
    (artifact / "inventory.json").write_text(json.dumps({"mine": {"files": files}}))
    (artifact / "benchmarks.json").write_text("{}")


class Looks:
    """The sensor, look after look, with the cursor that it left."""

    def __init__(self) -> None:
        self.cursor: str | None = None

    def __call__(self) -> dg.RunRequest | dg.SkipReason:
        context = dg.build_sensor_context(cursor=self.cursor)
        answer = sensors.new_data(context)
        self.cursor = context.cursor
        return answer


def test_data_as_they_were_listed_ask_for_nothing(project: Path) -> None:
    look = Looks()
    assert [type(look()) for _ in range(4)] == [dg.SkipReason] * 4


def test_each_change_asks_for_one_run_once_it_stands_still(project: Path) -> None:
    look, keys = Looks(), set()
    for content in ("{}\n{}\n", "{}\n{}\n{}\n"):
        look()
        look()
        (project / "mine" / "train.jsonl").write_text(content)
        assert "at the next" in look().skip_message
        asked = look()
        assert asked.tags[WHY] == "source mine changed: train.jsonl"
        assert "as they were" in look().skip_message and "as they were" in look().skip_message
        keys.add(asked.run_key)
        listed(project)
    assert len(keys) == 2


def test_data_that_are_still_written_are_waited_for(project: Path) -> None:
    look = Looks()
    for lines in range(2, 6):
        (project / "mine" / "train.jsonl").write_text("{}\n" * lines)
        assert isinstance(look(), dg.SkipReason)
    assert isinstance(look(), dg.RunRequest)


def test_a_file_written_again_with_the_same_content_asks_for_nothing(project: Path) -> None:
    look = Looks()
    look()
    look()
    os.utime(project / "mine" / "a.png", (1, 1))
    look()
    assert "the content that they had" in look().skip_message


def test_data_taken_back_and_brought_again_ask_each_time(project: Path) -> None:
    """A store gives the same entity tag for the same content, and Dagster drops a run with a key that it has seen."""
    look, train = Looks(), project / "mine" / "train.jsonl"
    keys = []
    for content in ("{}\n{}\n", "{}\n", "{}\n{}\n"):
        train.write_text(content)
        os.utime(train, (1, 1))
        look()
        keys.append(look().run_key)
        listed(project)
    assert len(set(keys)) == 3


def test_more_than_a_look_has_time_for_is_not_read(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensors, "_READ_BYTES", 5)
    look = Looks()
    look()
    assert "too much to compare" in look().tags[WHY]


def test_an_error_leaves_the_question_open(project: Path) -> None:
    look = Looks()
    look()
    before = look.cursor
    (project / "mine").rename(project / "gone")
    with pytest.raises(OSError, match="does not exist"):
        look()
    assert look.cursor == before


def test_a_single_file_of_records_is_watched(project: Path) -> None:
    (project / "params.yaml").write_text(
        yaml.safe_dump({"scale": "tiny", "data.sources": {"mine": {"format": "jsonl", "path": "mine/train.jsonl"}}})
    )
    listed(project)
    look = Looks()
    look()
    look()
    (project / "mine" / "train.jsonl").write_text("{}\n{}\n")
    look()
    assert isinstance(look(), dg.RunRequest)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"scale": "tiny"}, "every source is drawn"),
        ({"scale": "tiny", "no_such_field": 1}, "the recipe is wrong"),
    ],
)
def test_without_anything_to_watch_it_says_so(project: Path, params: dict[str, Any], said: str) -> None:
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    assert said in Looks()().skip_message


def test_the_first_run_is_a_persons(project: Path) -> None:
    (project / "artifacts" / "sources" / "inventory.json").unlink()
    assert "first run is a person's" in Looks()().skip_message


def test_a_report_that_got_old_asks_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dg.asset
    def report() -> None:
        pass

    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:

        def look() -> dg.RunRequest | dg.SkipReason:
            return sensors.stale_report(dg.build_sensor_context(instance))

        assert "no report yet" in look().skip_message
        dg.materialize([report], instance=instance)
        assert "0 days old" in look().skip_message
        later = time.time() + FRESH.total_seconds() + 60
        monkeypatch.setattr(sensors.time, "time", lambda: later)
        first, second = look(), look()
        assert first.run_key == second.run_key and "8 days old" in first.tags[WHY]
        monkeypatch.setattr(sensors.time, "time", lambda: later - 2 * FRESH.total_seconds())
        assert "0 days old" in look().skip_message, "the clock was put back to before the report"
