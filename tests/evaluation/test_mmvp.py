from __future__ import annotations

import random

import pytest

from valr_ops.evaluation.benchmarks.mmvp import CORRECTED, PROFILES, label_set, read_letter, totals
from valr_ops.evaluation.scoring import LMMS_EVAL, OFFICIAL, VLMEVALKIT, Case, Scored, ScoringError

OPTIONS = ("(a) Open (b) Closed",)


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        ("A", "A"),
        ("b", "B"),
        ("(b)", "B"),
        ("(a).", "A"),
        ("A answer", "A"),
        ("b.) no", "B"),
        ("The answer is B", "B"),
        ("answer  is (a", "A"),
        ("the answer is best", "B"),
        ("I take option (b) here", "B"),
        ("camera ", "A"),
        ("a camera", "A"),
        ("my camera shows it", "A"),
        ("not a", "A"),
        ("Both", "B"),
        ("apple", "A"),
        ("open", None),
        ("the answer: none", None),
        ("", None),
        ("<latent></latent>", None),
        ("Ａ", None),
        ("B\nA", "B"),
    ],
)
def test_lmms_eval_reads_letters_by_its_rules_in_order_with_their_false_positives(
    output: str, letter: str | None
) -> None:
    assert read_letter(output) == letter


@pytest.mark.parametrize("gold", ["(b)", "B", "b"])
def test_a_letter_equal_to_the_gold_in_any_form_scores_one(gold: str) -> None:
    for profile in (LMMS_EVAL, VLMEVALKIT):
        assert PROFILES[profile](Case("1", gold, "B", options=OPTIONS)) == Scored(1.0, "B")
        assert PROFILES[profile](Case("1", gold, "A", options=OPTIONS)) == Scored(0.0, "A")


@pytest.mark.parametrize("options", [OPTIONS, ("Open", "Closed"), ("(a) Open", "(b) Closed")])
def test_vlmevalkit_also_reads_the_text_of_an_option(options: tuple[str, ...]) -> None:
    assert PROFILES[VLMEVALKIT](Case("1", "(b)", "It is closed", options=options)) == Scored(1.0, "B")


def test_vlmevalkit_leaves_to_a_judge_what_its_rules_do_not_read() -> None:
    rule = PROFILES[VLMEVALKIT]
    assert rule(Case("1", "(b)", "open or closed", options=OPTIONS)) == Scored(0.0, None, resolved=False)
    assert rule(Case("1", "(b)", "It is closed")) == Scored(0.0, None, resolved=False)
    assert rule(Case("1", "(b)", "b")) == Scored(0.0, None, resolved=False)


def test_the_official_score_needs_a_judge_for_every_answer_and_so_is_not_the_default() -> None:
    assert PROFILES[OFFICIAL](Case("1", "(a)", "(a)")) == Scored(0.0, None, resolved=False)
    assert next(iter(PROFILES)) == LMMS_EVAL


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("gold", ["", "(c)", "Open"])
def test_a_gold_that_is_neither_letter_is_an_error(profile: str, gold: str) -> None:
    with pytest.raises(ScoringError, match="case '7'"):
        PROFILES[profile](Case("7", gold, "A", options=OPTIONS))


def answers(*right: bool) -> list[tuple[Case, Scored]]:
    return [(Case(f"mmvp_{index}", "(a)", ""), Scored(float(one), None)) for index, one in enumerate(right, start=1)]


def test_single_counts_cases_and_pair_counts_pairs_that_are_right_twice() -> None:
    cases, scores = zip(*answers(True, True, True, False, False, True, True, False), strict=True)
    assert totals(cases, scores, LMMS_EVAL) == {"single": 5 / 8, "pair": 1 / 4, "label_set": None}


def test_pairs_go_by_index_and_not_by_order() -> None:
    rows = answers(True, True, False, False, True, True, False, False)
    random.Random(0).shuffle(rows)
    cases, scores = zip(*rows, strict=True)
    assert totals(cases, scores, LMMS_EVAL)["pair"] == 1 / 2


def test_a_case_without_its_partner_leaves_no_pair_accuracy_and_is_named() -> None:
    cases, scores = zip(*answers(True, True, True, True, False), strict=True)
    found = totals(cases[1:], scores[1:], LMMS_EVAL)
    assert found == {"single": 3 / 4, "pair": None, "incomplete_pairs": ["2", "5"], "label_set": None}


@pytest.mark.parametrize(
    ("ids", "named"), [(("one", "two"), "no Index"), (("0", "1"), "no Index"), (("a1", "b1"), "here are two")]
)
def test_ids_that_are_no_index_of_the_data_set_are_an_error(ids: tuple[str, ...], named: str) -> None:
    with pytest.raises(ScoringError, match=named):
        totals([Case(one, "(a)", "") for one in ids], [Scored(0.0, None)] * 2, LMMS_EVAL)


def test_totals_tell_the_original_labels_from_the_corrected_ones() -> None:
    swapped = {"A": "B", "B": "A"}
    corrected = [Case(str(index), f"({letter.lower()})", "") for index, letter in CORRECTED.items()]
    original = [Case(str(index), swapped[letter], "") for index, letter in CORRECTED.items()]
    assert label_set(corrected) == "corrected"
    assert label_set(original) == "original"
    assert label_set(corrected[:2] + original[2:]) == "mixed"
    assert label_set([Case("98", "(a)", "")]) is None


def test_a_case_is_scored_against_the_gold_it_comes_with() -> None:
    assert PROFILES[LMMS_EVAL](Case("99", "(a)", "A")).score == 1
