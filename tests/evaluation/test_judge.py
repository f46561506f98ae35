"""The judge: what it is asked, what its judgements become, and that trouble with it never becomes a score."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.data.endpoint import Asked, Says, completion, error, saying, serving
from valr_ops.__main__ import main
from valr_ops.evaluation.judge import KEY_VARIABLE, PROMPT, REPLIES, Judge, JudgeError, open_judge, task_of
from valr_ops.evaluation.scoring import LMMS_EVAL, OFFICIAL, VLMEVALKIT, Case, Scored, ScoringError, score, score_file
from valr_ops.exits import EXIT_CONFIGURATION
from valr_ops.store.chat import Clock

MODEL = "gpt-4o-2024-08-06"
OPTIONS = ("3/11", "8/11")
UNRESOLVED = Scored(0.0, None, resolved=False)


class Hasty(Clock):
    """A clock whose waits are over at once."""

    def wait(self, stop: threading.Event, seconds: float) -> None:
        pass


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def judge(url: str, folder: Path, said: list[str] | None = None, **changes: Any) -> Judge:
    return open_judge(MODEL, url, folder, ([] if said is None else said).append, clock=Hasty(), **changes)


def choice(at: str, output: str = "eight elevenths, I think") -> Case:
    return Case(at, "8/11", output, "multi_choice", OPTIONS, question=f"Question {at}?")


def photograph(output: str, question: str = "What is it?") -> Case:
    return Case("1", "A bus.", output, options=("bus", "street"), question=question)


def shown(asked: Asked) -> str:
    return str(asked.body["messages"][1]["content"])


# What is asked, and what becomes of it.


def test_only_unresolved_cases_are_asked_and_the_rule_scores_what_was_extracted(tmp_path: Path) -> None:
    cases = [choice("1"), choice("2", "(A)"), choice("3", "hardly three"), choice("4", "no idea")]
    answers = {"Question 1?": "b", "Question 3?": "(A)", "Question 4?": None}

    def answer(asked: Asked) -> Says:
        return completion(json.dumps({"answer": answers[shown(asked).split("\n")[1]]}), usage=(100, 10))

    with serving(answer) as endpoint:
        judging = judge(endpoint.url, tmp_path)
        found = score(cases, "math_vista", OFFICIAL, judging)
    assert found == [Scored(1.0, "8/11"), Scored(0.0, "3/11"), Scored(0.0, "3/11"), Scored(0.0, None)]
    assert judging.report() == {
        "model": MODEL,
        "prompt": PROMPT,
        "cases": 3,
        "answered": 0,
        "requests": 3,
        "input_tokens": 300,
        "output_tokens": 30,
        "dollars": pytest.approx(3 * (100 * 2.5 + 10 * 10) / 1e6),
        "failures": {},
    }
    asked = next(one for one in endpoint.asked if "Question 1?" in shown(one))
    assert (asked.body["model"], asked.body["temperature"]) == (MODEL, 0)
    assert "(A) 3/11\n(B) 8/11" in shown(asked)
    assert "eight elevenths" in shown(asked)


def test_the_right_answer_is_not_shown_to_a_judge_that_extracts(tmp_path: Path) -> None:
    with saying(completion('{"answer": "14"}')) as endpoint:
        case = Case("1", "73", "fourteen", "integer", question="How many?")
        assert score([case], "math_vista", OFFICIAL, judge(endpoint.url, tmp_path)) == [Scored(0.0, "14")]
    assert "73" not in shown(endpoint.asked[0])


def test_what_a_judge_extracted_and_the_rule_cannot_read_is_wrong(tmp_path: Path) -> None:
    with saying(completion('{"answer": "fourteen"}')) as endpoint:
        case = Case("1", "14", "it is fourteen", "integer", question="How many?")
        assert score([case], "math_vista", OFFICIAL, judge(endpoint.url, tmp_path)) == [Scored(0.0, "fourteen")]


def test_vlmevalkit_counts_a_zero_that_its_judge_extracted(tmp_path: Path) -> None:
    with saying(completion('{"answer": "0"}')) as endpoint:
        case = Case("1", "0", "0", "integer", question="How many?")
        assert score([case], "math_vista", VLMEVALKIT, judge(endpoint.url, tmp_path)) == [Scored(1.0, "0")]


def test_a_judge_gives_the_verdict_where_the_authors_ask_for_one(tmp_path: Path) -> None:
    case = Case("7", "(a)", "It is open.", options=("(a) Open (b) Closed",), question="Is the door open?")
    with saying(completion('{"correct": true}')) as endpoint:
        assert score([case], "mmvp", OFFICIAL, judge(endpoint.url, tmp_path)) == [Scored(1.0, "yes")]
    assert shown(endpoint.asked[0]) == (
        "Question:\nIs the door open?\n\nOptions:\n(a) Open (b) Closed\n\nRight answer:\n(a)\n\nReply:\nIt is open."
    )
    assert [task_of("mm_halu", OFFICIAL), task_of("mmvp", OFFICIAL), task_of("mmvp", LMMS_EVAL)] == [
        *("rating", "verdict", "extraction")
    ]


@pytest.mark.parametrize(
    ("judgement", "expected"),
    [
        ("The street is there. It is short.\nRating: 4", Scored(4.0, "4")),
        ("No rating comes to mind.", Scored(0.0, None)),
        ("Rating: 3 or rather\nRating: 4", Scored(0.0, None)),
        ("**Rating:** 5", Scored(0.0, None)),
    ],
)
def test_a_rating_is_read_as_the_authors_of_mm_halu_read_it(tmp_path: Path, judgement: str, expected: Scored) -> None:
    with saying(completion(judgement)) as endpoint:
        found = score([photograph("A red bus.")], "mm_halu", OFFICIAL, judge(endpoint.url, tmp_path))
    assert found == [expected]
    assert shown(endpoint.asked[0]) == (
        "Question:\nWhat is it?\n\nIn the photograph:\nbus\nstreet\n\nRight answer:\nA bus.\n\nReply:\nA red bus."
    )
    assert "response_format" not in endpoint.asked[0].body


def test_a_long_or_broken_output_is_sent_by_its_end(tmp_path: Path) -> None:
    with saying(completion('{"answer": "B"}')) as endpoint:
        case = choice("1", "x" * 2**20 + "\ud800 so the second")
        assert score([case], "math_vista", OFFICIAL, judge(endpoint.url, tmp_path)) == [Scored(1.0, "8/11")]
    assert shown(endpoint.asked[0]).endswith("? so the second")
    assert len(shown(endpoint.asked[0])) < 40_000


def test_a_judgement_is_paid_for_once(tmp_path: Path) -> None:
    with saying(completion('{"answer": "B"}')) as endpoint:
        score([choice("1")], "math_vista", OFFICIAL, judge(endpoint.url, tmp_path))
        again = judge(endpoint.url, tmp_path)
        found = score([choice("1"), choice("2")], "math_vista", OFFICIAL, again)
    assert len(endpoint.asked) == 2
    assert found == [Scored(1.0, "8/11")] * 2
    assert (again.report()["answered"], again.report()["requests"]) == (1, 1)


# Trouble.


@pytest.mark.parametrize(
    ("trouble", "named"),
    [
        (error(500), "the judge gave no answer: answered 500"),
        (Says(completion('{"answer": "B"}').body, sent=20), "the judge gave no answer: RemoteProtocolError"),
        (error(400, "too long"), "the judge answered 400 (too long)"),
        (error(400, "no", "content_filter"), "the judge refused: content_filter"),
        (completion('{"answer": "B'), "the judge replied in another form: it is no JSON object"),
        (completion('{"answer": 2}'), "another form: answer: Input should be a valid string"),
        (completion("B"), "the judge replied in another form"),
        (completion(None), "the judge said nothing whole"),
        (completion('{"answer": "B"}', finish_reason="length"), "the judge said nothing whole (finish_reason length)"),
        (completion('{"answer": "' + "B" * 201 + '"}'), "at most 200 characters"),
    ],
)
def test_what_never_becomes_an_answer_leaves_the_case_unresolved_and_named(
    tmp_path: Path, trouble: Says, named: str
) -> None:
    with saying(trouble) as endpoint:
        judging = judge(endpoint.url, tmp_path)
        (found,) = score([choice("1")], "math_vista", OFFICIAL, judging)
    assert (found.score, found.extracted, found.resolved) == (0.0, None, False)
    assert named in found.problem
    assert judging.report()["failures"] == {found.problem: 1}


@pytest.mark.parametrize("trouble", [error(500), completion("Rating: 6", finish_reason="length"), completion("")])
def test_a_rating_that_was_not_given_is_no_hallucination(tmp_path: Path, trouble: Says) -> None:
    with saying(trouble) as endpoint:
        (found,) = score([photograph("A red bus.")], "mm_halu", OFFICIAL, judge(endpoint.url, tmp_path))
    assert not found.resolved and found.problem


def test_a_judge_that_is_gone_leaves_every_case_as_it_was(tmp_path: Path) -> None:
    with saying(completion("")) as endpoint:
        gone = endpoint.url
    found = score([choice(str(at)) for at in range(40)], "math_vista", OFFICIAL, judge(gone, tmp_path))
    assert not any(scored.resolved for scored in found)
    assert any("ConnectError" in scored.problem for scored in found)
    assert all(scored.problem for scored in found)


def test_what_would_meet_every_case_ends_the_judging(tmp_path: Path) -> None:
    with saying(error(401)) as endpoint, pytest.raises(JudgeError, match=f"which belongs in {KEY_VARIABLE}"):
        score([choice("1")], "math_vista", OFFICIAL, judge(endpoint.url, tmp_path))
    alias = completion('{"answer": "B"}', model="gpt-4o-2024-11-20")
    with saying(alias) as endpoint, pytest.raises(JudgeError, match=f"answered --judge={MODEL} as gpt-4o-2024-11-20"):
        score([choice("1")], "math_vista", OFFICIAL, judge(endpoint.url, tmp_path))
    assert not (tmp_path / REPLIES).exists()


def test_a_case_without_its_question_can_not_be_judged_and_nothing_is_asked(tmp_path: Path) -> None:
    settled = Case("1", "8/11", "(A)", "multi_choice", OPTIONS)
    with saying(completion('{"answer": "B"}')) as endpoint:
        assert score([settled], "math_vista", OFFICIAL, judge(endpoint.url, tmp_path)) == [Scored(0.0, "3/11")]
        with pytest.raises(JudgeError, match=r"cases.jsonl:9: case '2' has no question, .* add the field question"):
            score(
                [choice("1"), Case("2", "8/11", "?", "multi_choice", OPTIONS, "cases.jsonl:9")],
                "math_vista",
                OFFICIAL,
                judge(endpoint.url, tmp_path),
            )
    assert endpoint.asked == []


def test_what_is_too_dear_is_not_asked(tmp_path: Path) -> None:
    said: list[str] = []
    with saying(completion('{"answer": "B"}')) as endpoint:
        with pytest.raises(JudgeError, match=r"1 questions to gpt-4o-2024-08-06 .* --judge-max-dollars=1e-05"):
            score([choice("1")], "math_vista", OFFICIAL, judge(endpoint.url, tmp_path, max_dollars=1e-5))
        assert endpoint.asked == []
        score([choice("1")], "math_vista", OFFICIAL, judge(endpoint.url, tmp_path, said))
    assert "cost about $0.00" in said[0]


def test_a_price_is_known_given_or_nothing_on_this_machine(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match="the price of --judge=some-judge-1 is not known"):
        open_judge("some-judge-1", "https://example.com/v1", tmp_path, print)
    open_judge("some-judge-1", "https://example.com/v1", tmp_path, print, price=(0.0, 0.0))
    open_judge("some-judge-1", "http://127.0.0.1:8000/v1", tmp_path, print)
    for bad in ({"price": (-1.0, 0.0)}, {"price": (0.0, float("nan"))}, {"max_dollars": float("nan")}):
        with pytest.raises(JudgeError, match="is no sum of money"):
            open_judge("some-judge-1", "https://example.com/v1", tmp_path, print, **bad)  # type: ignore[arg-type]


# The command.

CASES = [
    {"id": 1, "question": "Which?", "question_type": "multi_choice", "gold": "8/11", "options": OPTIONS, "output": "8"},
    {"id": 2, "question": "And?", "question_type": "multi_choice", "gold": "8/11", "options": OPTIONS, "output": "3"},
    {"id": 3, "question_type": "multi_choice", "gold": "8/11", "options": OPTIONS, "output": "(B)"},
]


def run(folder: Path, url: str, *more: str) -> int:
    (folder / "cases.jsonl").write_text("".join(json.dumps(case) + "\n" for case in CASES))
    out = folder / "scores.jsonl"
    arguments = ["--benchmark", "math_vista", "--in", str(folder / "cases.jsonl"), "--out", str(out)]
    return main(["score", *arguments, "--judge", MODEL, "--judge-url", url, *more])


def test_the_command_names_the_judge_in_the_profile_and_shows_what_it_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(asked: Asked) -> Says:
        return completion('{"answer": "B"}', (1000, 10)) if "Which?" in shown(asked) else error(400, "no")

    with serving(answer) as endpoint:
        assert run(tmp_path, endpoint.url, "--aggregate") == 0
    lines = capsys.readouterr().out.splitlines()
    summary = json.loads(lines[-1])
    assert summary["profile"] == f"official+judge:{MODEL}"
    assert (summary["n"], summary["mean"], summary["unresolved"]) == (3, pytest.approx(2 / 3), 1)
    assert summary["totals"]["overall"] == pytest.approx(2 / 3)
    assert summary["judge"]["dollars"] == pytest.approx(0.0026)
    assert summary["judge"]["failures"] == {"the judge answered 400 (no)": 1}
    assert any("settled 1 of 2 cases" in line and "$0.0026; 1 not: the judge answered 400" in line for line in lines)
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert scores == [
        {"id": 1, "score": 1.0, "extracted": "8/11", "resolved": True, "problem": ""},
        {"id": 2, "score": 0.0, "extracted": None, "resolved": False, "problem": "the judge answered 400 (no)"},
        {"id": 3, "score": 1.0, "extracted": "8/11", "resolved": True, "problem": ""},
    ]
    assert len((tmp_path / REPLIES).read_text().splitlines()) == 1


def test_the_command_refuses_what_is_too_dear_and_half_a_judge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with saying(completion('{"answer": "B"}')) as endpoint:
        assert run(tmp_path, endpoint.url, "--judge-max-dollars", "0.0001") == EXIT_CONFIGURATION
        assert "more than --judge-max-dollars=0.0001. Nothing was asked" in capsys.readouterr().err
        assert run(tmp_path, "") == EXIT_CONFIGURATION
        assert "both --judge MODEL and --judge-url URL" in capsys.readouterr().err
        assert run(tmp_path, endpoint.url, "--judge-price", "0", "0", "--judge-max-dollars", "0") == 0
    assert endpoint.asked and (tmp_path / "scores.jsonl").exists()


def test_judgements_have_a_file_of_their_own(tmp_path: Path) -> None:
    cases = tmp_path / REPLIES
    cases.write_text(json.dumps(CASES[2]) + "\n")
    judging = judge("http://127.0.0.1:1/v1", tmp_path)
    with pytest.raises(ScoringError, match="is where judgements go"):
        score_file(cases, tmp_path / "scores.jsonl", "math_vista", judge=judging)


def test_recorded_judgements_are_not_judged_again(tmp_path: Path) -> None:
    judging = judge("http://127.0.0.1:1/v1", tmp_path)
    with pytest.raises(ScoringError, match=r"mm_halu by official\+judge:recorded is judged already"):
        score([photograph("Rating: 4")], "mm_halu", "official+judge:recorded", judging)
