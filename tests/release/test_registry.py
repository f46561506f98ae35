"""Versions, aliases and the history of the champion, on a registry of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from valr_ops.store import lineage
from valr_ops.store.lineage import LineageError, Promotion, Registered, promote, register, registered, roll_back


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project with three models, of which the second and third were promoted after the first."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for digest in ("aa.dir", "bb.dir", "cc.dir"):
            version = register(folder, "stage2_valr_m", digest, {"scores_valr_m": f"scores-{digest}"})
            promote(folder, version, "overruled", "the first one" if digest == "aa.dir" else "", f"decision-{digest}")
        yield folder


def test_the_history_says_who_moved_the_alias_when_and_why(root: Path) -> None:
    known = registered(root)
    assert known.aliases["champion"] == "3"
    assert dict(known.digests) == {"1": "aa.dir", "2": "bb.dir", "3": "cc.dir"}
    first = known.history[0]
    assert (first.version, first.reason, first.evidence) == ("1", "the first one", "decision-aa.dir")
    assert first.person and first.at > 1.7e9


def test_the_same_weights_are_one_version_however_often_they_are_registered(root: Path) -> None:
    assert register(root, "stage2_valr_m", "bb.dir", {}) == "2"
    known = registered(root)
    assert len(known.digests) == 3
    assert known.aliases == {"champion": "3", "challenger": "2"}


def test_a_version_that_does_not_exist_moves_nothing(root: Path) -> None:
    with pytest.raises(LineageError, match="no version 9"):
        promote(root, "9", "overruled", "why not")
    assert registered(root).aliases["champion"] == "3"


def test_rolling_back_moves_the_alias_only_and_twice_goes_back_by_two(root: Path) -> None:
    before = registered(root)
    assert [roll_back(root).version, roll_back(root, "still slow").version] == ["2", "1"]
    after = registered(root)
    assert after.aliases["champion"] == "1"
    assert (after.digests, after.stages) == (before.digests, before.stages)
    assert after.history[-1].reason == "still slow"
    with pytest.raises(LineageError, match="before the present one"):
        roll_back(root)


def move(version: str, how: str = "gate") -> Promotion:
    return Promotion(version, how, "", "", "someone", 0.0)


def test_a_promotion_cut_off_before_its_line_was_written_can_be_rolled_back() -> None:
    known = Registered({"champion": "2"}, {}, {}, [move("1")])
    assert known.before == "1"


def test_a_version_that_was_rolled_back_is_not_come_back_to() -> None:
    known = Registered({"champion": "3"}, {}, {}, [move("1"), move("2"), move("1", "rolled back"), move("3")])
    assert known.before == "1"


def test_a_registry_that_is_away_is_said_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(LineageError, match="can't be asked"):
        lineage.registered(root)
