"""The judge: what it is asked, what its judgements become, and that trouble with it never becomes a score."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.endpoint import Asked, Says, completion, error, saying, serving
from valr_ops.data.matching import Clock
from valr_ops.evaluation.judge import (
    KEY_VARIABLE,
    REPLIES,
    Judge,
    Judged,
    JudgeError,
    JudgeSettings,
    split_profile,
    task_of,
)
from valr_ops.evaluation.scoring import LMMS_EVAL, OFFICIAL, VLMEVALKIT, Case, Scored

MODEL = "gpt-4o-2024-08-06"
OPTIONS = ("3/11", "8/11")
KEY = "sk-secret-key"


class Hasty(Clock):
    """A clock whose waits are over at once."""

    def __init__(self) -> None:
        self.waited: list[float] = []

    def wait(self, stop: threading.Event, seconds: float) -> None:
        self.waited.append(seconds)


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def judge(url: str, cache: Path, say: Callable[[str], None] = lambda line: None, **changes: Any) -> Judge:
    values = {"dollars_per_million_input_tokens": 2.5, "dollars_per_million_output_tokens": 10.0}
    values |= {"requests_per_minute": 10, **changes}
    return Judge(JudgeSettings(url, MODEL, **values), cache, say, Hasty())  # type: ignore[arg-type]


def choice(at: str, output: str = "eight elevenths, I think") -> Case:
    return Case(at, "8/11", output, "multi_choice", OPTIONS)


def settled(url: str, cache: Path, *cases: Case, benchmark: str = "math_vista", **changes: Any) -> Judged:
    questions = {case.id: f"Question {case.id}?" for case in cases}
    return judge(url, cache, **changes).score(benchmark, OFFICIAL, cases, questions)


def test_only_unresolved_cases_are_asked_and_the_rule_scores_what_was_extracted(tmp_path: Path) -> None:
    cases = [choice("1"), choice("2", "(A)"), choice("3", "hardly three"), choice("4", "no idea")]
    answers = {"Question 1?": "B", "Question 3?": "A", "Question 4?": None}

    def answer(asked: Asked) -> Says:
        text = asked.body["messages"][1]["content"]
        return completion(json.dumps({"answer": answers[text.split("\n")[1]]}), usage=(100, 10))

    with serving(answer) as endpoint:
        found = settled(endpoint.url, tmp_path, *cases)
    assert found.scores == [Scored(1.0, "8/11"), Scored(0.0, "3/11"), Scored(0.0, "3/11"), Scored(0.0, None)]
    assert found.failures == {}
    assert (found.cost.requests, found.cost.input_tokens, found.cost.output_tokens) == (3, 300, 30)
    assert found.cost.dollars == pytest.approx(3 * (100 * 2.5 + 10 * 10) / 1e6)
    body = next(one.body for one in endpoint.asked if "Question 1?" in str(one.body))
    assert (body["model"], body["temperature"]) == (MODEL, 0)
    assert "(A) 3/11\n(B) 8/11" in body["messages"][1]["content"]
    assert "eight elevenths" in body["messages"][1]["content"]


def test_a_judgement_is_paid_for_once(tmp_path: Path) -> None:
    with saying(completion('{"answer": "B"}')) as endpoint:
        first = settled(endpoint.url, tmp_path, choice("1"))
        # A line that was cut short by the end of a process is left out.
        with (tmp_path / REPLIES).open("a") as file:
            file.write('{"key": "torn')
        again = settled(endpoint.url, tmp_path, choice("1"), choice("2"))
        settled(endpoint.url, tmp_path, choice("2"))
    assert len(endpoint.asked) == 2
    assert again.scores[0] == first.scores[0] == Scored(1.0, "8/11")
    assert (again.cost.cached, again.cost.requests) == (1, 1)


def test_what_a_judge_extracted_and_the_rule_cannot_read_is_wrong(tmp_path: Path) -> None:
    with saying(completion('{"answer": "fourteen"}')) as endpoint:
        found = settled(endpoint.url, tmp_path, Case("1", "14", "it is fourteen", "integer"))
    assert found.scores == [Scored(0.0, "fourteen")]


def test_a_long_or_broken_output_is_sent_by_its_end(tmp_path: Path) -> None:
    with saying(completion('{"answer": "B"}')) as endpoint:
        found = settled(endpoint.url, tmp_path, choice("1", "x" * 2**20 + "\ud800 so the second"))
    assert found.scores == [Scored(1.0, "8/11")]
    sent = endpoint.asked[0].body["messages"][1]["content"]
    assert sent.endswith("? so the second")
    assert len(sent) < 40_000


def test_vlmevalkit_counts_a_zero_that_its_judge_extracted(tmp_path: Path) -> None:
    with saying(completion('{"answer": "0"}')) as endpoint:
        found = judge(endpoint.url, tmp_path).score("math_vista", VLMEVALKIT, [Case("1", "0", "0", "integer")], {})
    assert found.scores == [Scored(1.0, "0")]


def test_a_rating_and_a_verdict_are_scores_themselves_and_need_the_question(tmp_path: Path) -> None:
    with saying(completion('```json\n{"rating": 4}\n```')) as endpoint:
        found = settled(endpoint.url, tmp_path, Case("1", "A bus.", "A red bus."), benchmark="mm_halu")
        with pytest.raises(JudgeError, match=r"a rating needs the words of the question.*case '2'"):
            judge(endpoint.url, tmp_path).score("mm_halu", OFFICIAL, [Case("2", "A bus.", "A tram.")], {})
    assert found.scores == [Scored(4.0, "4")]
    with saying(completion('{"correct": true}')) as endpoint:
        found = settled(endpoint.url, tmp_path, Case("1", "(a)", "Open."), benchmark="mmvp")
    assert found.scores == [Scored(1.0, "yes")]


@pytest.mark.parametrize(
    "trouble",
    [
        error(500, "overloaded"),
        error(429, "slow down", retry_after="7"),
        Says(completion('{"answer": "B"}').body, sent=20),
        Says(b'{"choices": []}'),
        Says(b"<html>"),
        Says(b"x" * (2 << 20)),
    ],
)
def test_trouble_is_asked_again_and_an_answer_after_it_counts(tmp_path: Path, trouble: Says) -> None:
    with saying(trouble, trouble, completion('{"answer": "B"}')) as endpoint:
        found = settled(endpoint.url, tmp_path, choice("1"))
    assert found.scores == [Scored(1.0, "8/11")]
    assert found.cost.requests == 3


@pytest.mark.parametrize(
    ("trouble", "named"),
    [
        (error(500), "the judge gave no reply in 5 attempts: status 500"),
        (error(429), "status 429"),
        (Says(completion('{"answer": "B"}').body, sent=20), "RemoteProtocolError"),
        (error(400, "too long"), "the judge refused: status 400"),
        (completion('{"answer": "B'), "the judge replied in another form 3 times: it is no JSON"),
        (completion('{"answer": 2}'), "answer: Input should be a valid string"),
        (completion("B"), "another form 3 times"),
        (completion(None), "another form 3 times"),
        (completion('{"answer": "' + "B" * 201 + '"}'), "at most 200 characters"),
    ],
)
def test_what_never_becomes_an_answer_leaves_the_case_unresolved_and_named(
    tmp_path: Path, trouble: Says, named: str
) -> None:
    with saying(trouble) as endpoint:
        found = settled(endpoint.url, tmp_path, choice("1"))
    assert found.scores == [Scored(0.0, None, resolved=False)]
    assert named in found.failures["1"]
    assert not (tmp_path / REPLIES).exists(), "a failure is asked again the next time"


def test_a_slow_reply_counts_as_none(tmp_path: Path) -> None:
    slow = Says(completion('{"answer": "B"}').body, after=0.3)
    with saying(slow, completion('{"answer": "A"}')) as endpoint:
        found = settled(endpoint.url, tmp_path, choice("1"), reply_seconds=0.1)
    assert found.scores == [Scored(0.0, "3/11")]


@pytest.mark.parametrize(
    "reply", ['{"rating": 7}', '{"rating": -1}', '{"rating": "4"}', '{"rating": 4.5}', "Rating: 4"]
)
def test_a_rating_of_another_form_is_no_rating(tmp_path: Path, reply: str) -> None:
    with saying(completion(reply)) as endpoint:
        found = settled(endpoint.url, tmp_path, Case("1", "A bus.", "A red bus."), benchmark="mm_halu")
    assert not found.scores[0].resolved
    assert "another form" in found.failures["1"]


def test_an_unusable_reply_is_said_to_the_judge(tmp_path: Path) -> None:
    with saying(completion("It is B."), completion('{"answer": "B"}')) as endpoint:
        assert settled(endpoint.url, tmp_path, choice("1")).scores == [Scored(1.0, "8/11")]
    roles = [message["role"] for message in endpoint.asked[1].body["messages"]]
    assert roles == ["system", "user", "assistant", "user"]


def test_after_three_failures_in_a_row_nobody_is_asked_any_more(tmp_path: Path) -> None:
    with saying(error(500)) as endpoint:
        found = settled(endpoint.url, tmp_path, *(choice(str(number), f"reply {number}") for number in range(8)))
    assert len(endpoint.asked) == 3 * 5
    assert [("not asked" in problem) for problem in found.failures.values()] == [False] * 3 + [True] * 5
    assert not any(scored.resolved for scored in found.scores)


def test_what_is_too_dear_is_not_asked(tmp_path: Path) -> None:
    said: list[str] = []
    with saying(completion('{"answer": "B"}')) as endpoint:
        with pytest.raises(JudgeError, match=r"1 questions to gpt-4o-2024-08-06 .* more than max_dollars=1e-05"):
            settled(endpoint.url, tmp_path, choice("1"), max_dollars=1e-5)
        assert endpoint.asked == []
        settled(endpoint.url, tmp_path, choice("1"), say=said.append)
    assert "cost about $0.00" in said[0]


def test_money_that_runs_out_ends_the_judging_and_keeps_what_came(tmp_path: Path) -> None:
    with (
        saying(completion('{"answer": "B"}', usage=(10_000_000, 0))) as endpoint,
        pytest.raises(JudgeError, match=r"was paid about \$25\.00, which reaches max_dollars=1"),
    ):
        settled(endpoint.url, tmp_path, choice("1"), choice("2", "another reply"), max_dollars=1.0)
    assert len(endpoint.asked) == 1
    assert len([line for line in (tmp_path / REPLIES).read_text().splitlines() if line]) == 1


def test_the_key_is_sent_and_shown_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    said: list[str] = []
    with saying(completion(json.dumps({"answer": KEY}))) as endpoint:
        found = settled(endpoint.url, tmp_path, choice("1"), say=said.append)
    assert endpoint.asked[0].headers["Authorization"] == f"Bearer {KEY}"
    assert KEY not in (tmp_path / REPLIES).read_text() + str(said) + str(found)
    with saying(error(401, f"bad key {KEY}")) as endpoint, pytest.raises(JudgeError, match="answered 401") as raised:
        settled(endpoint.url, tmp_path, choice("2", "another reply"))
    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://example.com/v1", "is no address"),
        ("example.com", "is no address"),
        ("https://me:secret@example.com/v1", "carries a user name"),
        ("http://example.com/v1", "would be sent the key in the clear"),
    ],
)
def test_an_address_that_would_leak_is_refused(
    url: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with pytest.raises(JudgeError, match=message) as raised:
        judge(url, tmp_path)
    assert "secret" not in str(raised.value)


def test_the_name_of_a_judged_profile_says_the_rules_and_the_model() -> None:
    assert split_profile(f"{VLMEVALKIT}+judge:{MODEL}") == (VLMEVALKIT, MODEL)
    assert split_profile(OFFICIAL) == (OFFICIAL, None)
    assert [task_of("mm_halu", OFFICIAL), task_of("mmvp", OFFICIAL), task_of("mmvp", LMMS_EVAL)] == [
        *("rating", "verdict", "extraction")
    ]
