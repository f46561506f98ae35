"""Who becomes champion: by the lower bound, on equal items and budgets, with what can't be seen said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.evaluation import scenes
from valr_ops.evaluation.models import BudgetError
from valr_ops.evaluation.run import score_model
from valr_ops.evaluation.statistics import paired_difference
from valr_ops.release.gate import GateError, decide, markdown, overrule, require_champion, write_decision


def champion(folder: Path) -> Path:
    return scenes.scored(folder, "scores_old", lambda number: number % 2 == 0, slots=4)[0]


def test_a_clearly_better_challenger_becomes_champion(tmp_path: Path) -> None:
    better, _ = scenes.scored(tmp_path, "scores_new", lambda number: number % 10 != 1, slots=4)
    decision = decide(champion(tmp_path), better, "mine", 0.95, 0.02)
    assert decision.promotes and not decision.reasons
    assert decision.benchmarks["mine"].low > 0


def test_a_gain_that_may_be_chance_leaves_the_champion(tmp_path: Path) -> None:
    lucky, _ = scenes.scored(tmp_path, "scores_new", lambda number: number % 2 == 0 or number in (1, 3), slots=4)
    decision = decide(champion(tmp_path), lucky, "mine", 0.95, 0.02)
    assert decision.benchmarks["mine"].difference > 0
    assert not decision.promotes
    assert "zero is not excluded" in decision.reasons[0]


def test_it_says_which_difference_so_few_items_can_show(tmp_path: Path) -> None:
    better, _ = scenes.scored(tmp_path, "scores_new", lambda number: True, slots=4)
    decision = decide(champion(tmp_path), better, "mine", 0.95, 0.02)
    assert f"{100 * decision.benchmarks['mine'].detectable:.1f} points" in decision.unseen[0]
    assert decision.unseen[0] in markdown(decision)


def test_scores_under_another_budget_decide_nothing(tmp_path: Path) -> None:
    other, _ = scenes.scored(tmp_path, "scores_new", lambda number: True, slots=4, max_new_tokens=128)
    with pytest.raises(BudgetError, match="max_new_tokens"):
        decide(champion(tmp_path), other, "mine", 0.95, 0.02)


def test_a_target_that_nobody_was_asked_is_refused(tmp_path: Path) -> None:
    old = champion(tmp_path)
    with pytest.raises(GateError, match="target=blink, but the benchmarks are mine"):
        decide(old, old, "blink", 0.95, 0.02)


def test_a_person_overrules_with_a_reason_that_is_kept_beside_what_the_gate_found(tmp_path: Path) -> None:
    old = champion(tmp_path)
    refused = decide(old, old, "mine", 0.95, 0.02)
    with pytest.raises(GateError, match="says why"):
        overrule(refused, " ")
    write_decision(overrule(refused, "the champion's licence ended"), tmp_path)
    kept = json.loads((tmp_path / "decision.json").read_text())
    assert (kept["passes"], kept["promotes"], kept["overruled"]) == (False, True, "the champion's licence ended")
    assert "the champion's licence ended" in (tmp_path / "decision.md").read_text()
    assert kept["reasons"]


def test_the_same_scores_give_the_same_bytes(tmp_path: Path) -> None:
    old = champion(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_decision(decide(old, old, "mine", 0.95, 0.02), tmp_path / name)
    for file in ("decision.json", "decision.md"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_scores_of_another_model_than_the_champion_decide_nothing(tmp_path: Path) -> None:
    old = champion(tmp_path)
    decision = decide(old, old, "mine", 0.95, 0.02)
    require_champion(decision, "digest")
    with pytest.raises(GateError, match="the champion is another"):
        require_champion(decision, "another")


def scored_on_two(folder: Path, stage: str, right: Callable[[str, int], bool]) -> Path:
    """Scores of 60 questions each of `mine` and `other`, of a model that is right where `right` says."""
    at = scenes.context(stage, folder, batch_size=16)
    asked = 0

    def answers(prompts: list[scenes.Prompt]) -> list[scenes.Said]:
        # All of `mine` is asked first.
        nonlocal asked
        said = []
        for honest in scenes.truthful(prompts):
            good = right("mine" if asked < 60 else "other", asked % 60)
            said.append(scenes.said(f"Answer: {str(('true' in honest.text) == good).lower()}<|im_end|>"))
            asked += 1
        return said

    score_model(at, [scenes.benchmark(60), scenes.benchmark(60, "other")], scenes.answerer(answers))
    return at.out


def test_a_loss_elsewhere_keeps_a_challenger_out_however_much_the_target_rose(tmp_path: Path) -> None:
    old = scored_on_two(tmp_path, "scores_old", lambda name, number: name == "other")
    new = scored_on_two(tmp_path, "scores_new", lambda name, number: name == "mine")
    decision = decide(old, new, "mine", 0.95, 0.02)
    assert decision.benchmarks["mine"].passes and not decision.benchmarks["other"].passes
    assert decision.reasons == ["other may have lost more than 2 points " + decision.reasons[0].partition("points ")[2]]


def test_too_few_items_for_an_equally_good_model_are_said_with_how_many_it_would_take(tmp_path: Path) -> None:
    # In `other` each gets right what the other gets wrong in ten of sixty, and the scores are equal.
    old = scored_on_two(tmp_path, "scores_old", lambda name, number: name == "other" and number % 12 != 1)
    new = scored_on_two(tmp_path, "scores_new", lambda name, number: name == "mine" or number % 12 != 5)
    decision = decide(old, new, "mine", 0.95, 0.02)
    equal = decision.benchmarks["other"]
    assert (equal.difference, equal.passes) == (0, False)
    needed = equal.needed or 0
    (sentence,) = decision.too_few
    assert "Even an equally good model can't pass" in sentence
    assert "other with 60 items (its interval reaches" in sentence and f"about {needed:,} items" in sentence
    assert sentence in markdown(decision)

    def passes(items: int) -> bool:
        numbers = range(items)
        found = paired_difference([n % 12 != 5 for n in numbers], [n % 12 != 1 for n in numbers])
        return found.low >= -0.02

    assert passes(12 * (needed // 12 + 1)) and not passes(12 * (needed // 24))


def test_with_nothing_to_compare_with_only_a_person_can_decide(tmp_path: Path) -> None:
    found = decide(None, champion(tmp_path), "mine", 0.95, 0.02, first=True)
    assert not found.promotes and "no champion to compare with" in found.reasons[0]
    page = markdown(overrule(found, "the first one"))
    assert "no champion to compare with" in page and "the first one" in page
