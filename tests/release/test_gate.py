"""Who becomes champion: by the lower bound, on equal items and budgets, with what can't be seen said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.evaluation import scenes
from valr_ops.evaluation.models import BudgetError
from valr_ops.evaluation.run import score_model
from valr_ops.release.gate import GateError, decide, markdown, overrule, require_champion, write_decision


def champion(folder: Path) -> Path:
    return scenes.scored(folder, "scores_old", lambda number: number % 2 == 0, slots=4)[0]


def test_a_clearly_better_challenger_becomes_champion(tmp_path: Path) -> None:
    better, _ = scenes.scored(tmp_path, "scores_new", lambda number: number % 10 != 1, slots=4)
    decision = decide(champion(tmp_path), better, "mine", 0.95)
    assert decision.promotes and not decision.reasons
    assert decision.benchmarks["mine"].low > 0


def test_a_gain_that_may_be_chance_leaves_the_champion(tmp_path: Path) -> None:
    lucky, _ = scenes.scored(tmp_path, "scores_new", lambda number: number % 2 == 0 or number in (1, 3), slots=4)
    decision = decide(champion(tmp_path), lucky, "mine", 0.95)
    assert decision.benchmarks["mine"].difference > 0
    assert not decision.promotes
    assert "zero is not excluded" in decision.reasons[0]


def test_it_says_which_difference_so_few_items_can_show(tmp_path: Path) -> None:
    better, _ = scenes.scored(tmp_path, "scores_new", lambda number: True, slots=4)
    decision = decide(champion(tmp_path), better, "mine", 0.95)
    assert f"{100 * decision.benchmarks['mine'].detectable:.1f} points" in decision.unseen[0]
    assert decision.unseen[0] in markdown(decision)


def test_scores_under_another_budget_decide_nothing(tmp_path: Path) -> None:
    other, _ = scenes.scored(tmp_path, "scores_new", lambda number: True, slots=4, max_new_tokens=128)
    with pytest.raises(BudgetError, match="max_new_tokens"):
        decide(champion(tmp_path), other, "mine", 0.95)


def test_a_target_that_nobody_was_asked_is_refused(tmp_path: Path) -> None:
    old = champion(tmp_path)
    with pytest.raises(GateError, match="target=blink, but the benchmarks are mine"):
        decide(old, old, "blink", 0.95)


def test_a_person_overrules_with_a_reason_that_is_kept_beside_what_the_gate_found(tmp_path: Path) -> None:
    old = champion(tmp_path)
    refused = decide(old, old, "mine", 0.95)
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
        write_decision(decide(old, old, "mine", 0.95), tmp_path / name)
    for file in ("decision.json", "decision.md"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_scores_of_another_model_than_the_champion_decide_nothing(tmp_path: Path) -> None:
    old = champion(tmp_path)
    decision = decide(old, old, "mine", 0.95)
    require_champion(decision, None)
    require_champion(decision, "digest")
    with pytest.raises(GateError, match="the champion is another"):
        require_champion(decision, "another")


def test_a_loss_elsewhere_keeps_a_challenger_out_however_much_the_target_rose(tmp_path: Path) -> None:
    benchmarks = [scenes.benchmark(60), scenes.benchmark(60, "other")]

    def always(word: str) -> Path:
        at = scenes.context(f"scores_{word}", tmp_path, batch_size=16)
        asked = 0

        def answers(prompts: list[scenes.Prompt]) -> list[scenes.Said]:
            # The model is asked all of `mine` first; it is right there if it says what it sees, and wrong in `other`.
            nonlocal asked
            said = []
            for honest in scenes.truthful(prompts):
                truth = "true" in honest.text
                said.append(scenes.said(f"Answer: {str(truth == ((asked < 60) == (word == 'new'))).lower()}<|im_end|>"))
                asked += 1
            return said

        score_model(at, benchmarks, scenes.answerer(answers))
        return at.out

    decision = decide(always("old"), always("new"), "mine", 0.95)
    assert decision.benchmarks["mine"].passes and not decision.benchmarks["other"].passes
    assert decision.reasons == ["other may have lost more than 2 points " + decision.reasons[0].partition("points ")[2]]
