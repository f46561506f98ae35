"""Isolation: what is read out of an output, and what is left alone."""

from __future__ import annotations

import time

import pytest

from valr_ops.evaluation.answers import (
    ISOLATION,
    Isolated,
    answer_text,
    examples,
    isolate,
    normalised,
    without_control_tokens,
    worst_first,
)


def test_the_rule_has_a_name_and_a_version() -> None:
    assert ISOLATION == "iso-1"


@pytest.mark.parametrize(
    ("output", "isolated", "rule"),
    [
        # The worked examples of the rule.
        ("3.4m", "3.4m", "none"),
        ("About 2,400 cm", "About 2,400 cm", "none"),
        ("<latent></latent><think>2 sofas and 5 chairs</think>\n<answer>7</answer>", "7", "answer_tag"),
        ("In frames 3 and 9 I count six stools.", "In frames 3 and 9 I count six stools.", "none"),
        ("Between 12-14 square metres", "Between 12-14 square metres", "none"),
        ("Option C", "Option C", "none"),
        ("The answer is: C", "C", "phrase"),
        (r"So \boxed{\text{C}}", "C", "boxed"),
        ("Clearly the third cup", "Clearly the third cup", "none"),
        # Control tokens.
        ("<latent><|latent_pad|><|latent_pad|></latent>row 1: red.\nAnswer: <latent></latent>4", "4", "phrase"),
        ("<abs_vis_token><abs_vis_token_pad>x</abs_vis_token>B", "B", "none"),
        ("a<abs_vis_token>b", "ab", "none"),
        ("<|lvr_start|><|lvr|>thought<|lvr_end|>B<|im_end|>", "B", "none"),
        # Tags, any case; the last complete one; across lines.
        ("<answer>A</answer> no, <ANSWER>\nB\n</Answer> done", "B", "answer_tag"),
        ("<answer>A</answer> and <answer>B", "A", "answer_tag"),
        ("<answer>x<answer>A</answer></answer>", "A", "answer_tag"),
        ("</answer>A<answer>", "</answer>A<answer>", "none"),
        (r"<answer>\boxed{4}</answer>", r"\boxed{4}", "answer_tag"),
        # Boxes.
        (r"\boxed{1} or \boxed{\frac{1}{2}}", r"\frac{1}{2}", "boxed"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}", "boxed"),
        (r"\boxed{A} then \boxed{B", "A", "boxed"),
        (r"{ \boxed{A}", "A", "boxed"),
        (r"\boxed{\mathrm{A}}", "A", "boxed"),
        (r"\boxed{\text{\text{A}}}", r"\text{A}", "boxed"),
        (r"\boxed{\text{A} or \text{B}}", r"\text{A} or \text{B}", "boxed"),
        (r"the answer is \boxed{3}", "3", "boxed"),
        # Phrases.
        ("row 1: red.\nAnswer: blue<|im_end|>", "blue", "phrase"),
        ("Answer: red\nNo, wrong.\nANSWER: blue", "blue", "phrase"),
        ("Answer:\n  blue", "blue", "phrase"),
        ("Answer: blue\nand some more words", "blue\nand some more words", "phrase"),
        ("the answer is : 4", "4", "phrase"),
        ("answer : Blue Square.\n", "answer : Blue Square.", "none"),
        ("思考\nAnswer: 四", "四", "phrase"),
        ("a < b and c > d\nAnswer: <3", "<3", "phrase"),
        ("true<|im_end|>", "true", "none"),
        # Reasoning.
        ("<think>the answer is 3</think> 4", "4", "none"),
        ("3</analysis>4</THINK>5", "5", "none"),
    ],
)
def test_the_answer_is_what_the_first_rule_that_applies_finds(output: str, isolated: str, rule: str) -> None:
    found = isolate(output)
    assert (found.text, found.rule, found.answer_found, found.unclosed_reasoning) == (isolated, rule, True, False)
    assert answer_text(output) == isolated


@pytest.mark.parametrize(
    "output",
    ["", " \n", "<latent><|latent_pad|></latent><|im_end|><|endoftext|>", "<think>the answer is 4</think>\n<|im_end|>"],
)
def test_nothing_said_is_no_answer_and_reasoning_is_not_searched_for_one(output: str) -> None:
    assert isolate(output) == Isolated("", "none", answer_found=False, unclosed_reasoning=False)


@pytest.mark.parametrize(
    ("output", "rule"), [("Answer:", "phrase"), (r"\boxed{}", "boxed"), ("<answer> </answer>", "answer_tag")]
)
def test_a_mark_with_nothing_after_it_is_no_answer(output: str, rule: str) -> None:
    assert isolate("4 " + output) == Isolated("", rule, answer_found=False, unclosed_reasoning=False)  # type: ignore[arg-type]


def test_reasoning_that_was_not_closed_is_kept_and_said() -> None:
    assert isolate("<think>it is 4") == Isolated("<think>it is 4", "none", answer_found=True, unclosed_reasoning=True)
    assert isolate("<think>3</think><Analysis>the answer is 4") == Isolated(
        "4", "phrase", answer_found=True, unclosed_reasoning=True
    )


def test_a_segment_that_was_never_closed_loses_its_markers_only() -> None:
    assert without_control_tokens("a<latent>b<latent><|latent_pad|></latent>c") == "abc"


@pytest.mark.parametrize(
    "unit",
    [
        *("<latent>", "<latent><|latent_pad|>", "<|", "<|lvr_start|>", "<abs_vis_token>", "Answer:\n", "a\u2028", " "),
        *("<think>", "</think>", "<answer>", "</answer>", r"\boxed{", r"\boxed{}", "{", "}", r"\text{"),
    ],
)
def test_a_megabyte_of_anything_is_read_in_one_pass(unit: str) -> None:
    started = time.process_time()
    answer_text(unit * (2**20 // len(unit)))
    # One pass takes a fraction of a second, a quadratic one hours.
    assert time.process_time() - started < 20


def test_comparison_ignores_case_white_space_and_one_full_stop() -> None:
    assert normalised(" Blue \n SQUARE. ") == normalised("blue square") == "blue square"
    assert normalised("e.g..") == "e.g."


def row(number: int, correct: bool, resolved: bool = True, text_tokens: int = 5) -> dict[str, object]:
    return {"id": str(number), "correct": correct, "resolved": resolved, "text_tokens": text_tokens}


def test_unreadable_answers_come_first_then_long_wrong_ones_then_right_ones() -> None:
    rows = [row(0, True), row(1, False), row(2, False, text_tokens=9), row(3, False, resolved=False), row(4, False)]
    assert [one["id"] for one in worst_first(rows)] == ["3", "2", "1", "4", "0"]


def test_examples_keep_room_for_right_answers_and_fill_up_with_either_kind() -> None:
    def picked(right: int, wrong: int) -> tuple[int, int]:
        rows = [row(number, number < right) for number in range(right + wrong)]
        chosen = examples(rows)
        return sum(bool(one["correct"]) for one in chosen), len(chosen)

    assert picked(right=50, wrong=50) == (3, 10)
    assert picked(right=50, wrong=2) == (8, 10)
    assert picked(right=1, wrong=50) == (1, 10)
    assert picked(right=0, wrong=4) == (0, 4)
