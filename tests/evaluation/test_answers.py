"""Isolation: what is read out of an output, and what is left alone."""

from __future__ import annotations

import time

import pytest

from valr_ops.evaluation.answers import answer_text, examples, normalised, without_control_tokens, worst_first


@pytest.mark.parametrize(
    ("output", "isolated"),
    [
        ("row 1: red.\nAnswer: blue<|im_end|>", "blue"),
        ("Answer: red\nNo, wrong.\nAnswer: blue", "blue"),
        ("<latent><|latent_pad|><|latent_pad|></latent>row 1: red.\nAnswer: <latent></latent>4", "4"),
        ("answer : Blue Square.\n", "Blue Square."),
        ("Answer: blue\nand some more words", "blue"),
        ("Answer:\n  blue", "blue"),
        ("Answer:", ""),
        ("true<|im_end|>", "true"),
        ("The Answer: is hidden in a line", "The Answer: is hidden in a line"),
        ("", ""),
        ("<latent><|latent_pad|></latent><|im_end|><|endoftext|>", ""),
        ("思考\nAnswer: 四", "四"),
        ("a < b and c > d\nAnswer: <3", "<3"),
    ],
)
def test_the_answer_is_what_stands_on_the_last_answer_line(output: str, isolated: str) -> None:
    assert answer_text(output) == isolated


def test_a_segment_that_was_never_closed_loses_its_markers_only() -> None:
    assert without_control_tokens("a<latent>b<latent><|latent_pad|></latent>c") == "abc"


@pytest.mark.parametrize("unit", ["<latent>", "<latent><|latent_pad|>", "<|", "Answer:\n", "a\u2028", " "])
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
