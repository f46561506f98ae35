"""Concurrent jobs share batches, and nothing that happens to one of them happens to another."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tests.serving.asked import PATIENCE, Echo, Said, ask
from valr_ops.serving.batcher import Ask, Batcher, Event, Failure, Generate, Job, QueueFull

Make = Callable[..., Batcher]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes batchers and stops them after the test."""
    made: list[Batcher] = []

    def batcher(generate: Generate, rows: int = 4, wait_seconds: float = 0.0, places: int = 8) -> Batcher:
        made.append(Batcher(generate, rows=rows, wait_seconds=wait_seconds, queue=places))
        return made[-1]

    yield batcher
    assert all(one.stop(PATIENCE) for one in made)


class Listener:
    """A job and what it was told."""

    def __init__(self, batcher: Batcher, text: str) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.job = Job(text, ask(text), self.events.put)
        batcher.reserve()
        batcher.submit(self.job)

    def told(self) -> tuple[str, Event]:
        """The text of all pieces, and the outcome."""
        text = ""
        while isinstance(event := self.events.get(timeout=PATIENCE), str):
            text += event
        return text, event


def test_jobs_that_wait_together_are_one_batch_in_their_order(make: Make):
    echo = Echo()
    echo.go.clear()
    batcher = make(echo.answer, rows=3)
    first = Listener(batcher, "first")
    assert echo.started.acquire(timeout=PATIENCE)
    others = [Listener(batcher, f"word {number}") for number in range(4)]
    assert batcher.counts() == {"waiting": 4, "running": 1}
    echo.go.set()
    assert [one.told() for one in [first, *others]] == [
        (text, Said(text)) for text in ("first", "word 0", "word 1", "word 2", "word 3")
    ]
    assert echo.batches == [["first"], ["word 0", "word 1", "word 2"], ["word 3"]]


def test_a_batch_that_is_not_full_waits_for_neighbours(make: Make):
    echo = Echo()
    batcher = make(echo.answer, rows=3, wait_seconds=PATIENCE)
    first = Listener(batcher, "a")
    time.sleep(0.05)  # in which a batcher that does not wait has begun
    told = [first, Listener(batcher, "b"), Listener(batcher, "c")]
    assert [one.told()[0] for one in told] == ["a", "b", "c"], "the third one fills the batch, which ends the waiting"
    assert echo.batches == [["a", "b", "c"]]


def test_a_row_that_fails_does_not_fail_its_neighbours_nor_say_their_words_twice(
    make: Make, caplog: pytest.LogCaptureFixture
):
    echo = Echo()
    batcher = make(echo.answer, rows=3, wait_seconds=PATIENCE)
    told = [Listener(batcher, text).told for text in ("good one", "bad", "good two")]
    assert [each() for each in told] == [
        ("good one", Said("good one")),
        ("bad", Failure("error")),
        ("good two", Said("good two")),
    ]
    assert "FloatingPointError" in caplog.text, "the log says why"
    later = [Listener(batcher, text).told for text in ("x", "y", "z")]
    assert [each()[1] for each in later] == [Said("x"), Said("y"), Said("z")], "the batcher lives on"


def test_a_second_attempt_that_says_something_else_is_an_error_not_a_mixture(make: Make):
    attempts: list[int] = []

    def moody(asks: Sequence[Ask], on_text: Callable[[int, str], None], on_end: Any, stopped: Any) -> None:
        attempts.append(len(asks))
        for row in range(len(asks)):
            on_text(row, "yes" if len(attempts) == 1 else "no")
        if len(attempts) == 1:
            raise MemoryError
        on_end(0, Said("no"))

    batcher = make(moody, rows=2, wait_seconds=PATIENCE)
    told = [Listener(batcher, text).told for text in ("a", "b")]
    assert [each() for each in told] == [("yes", Failure("error"))] * 2
    assert attempts == [2, 1, 1]


def test_a_full_queue_refuses_and_has_room_again_once_a_job_has_ended(make: Make):
    echo = Echo()
    echo.go.clear()
    batcher = make(echo.answer, rows=1, places=1)
    running = Listener(batcher, "running")
    assert echo.started.acquire(timeout=PATIENCE)
    waiting = Listener(batcher, "waiting")
    with pytest.raises(QueueFull):
        batcher.reserve()
    echo.go.set()
    assert [running.told()[1], waiting.told()[1]] == [Said("running"), Said("waiting")]
    assert [Listener(batcher, text).told()[1] for text in "ab"] == [Said("a"), Said("b")]


def test_a_cancelled_job_is_given_up_in_its_batch_and_never_begun_in_the_queue(make: Make):
    echo = Echo()
    echo.go.clear()
    batcher = make(echo.answer, rows=1)
    running = Listener(batcher, "running on")
    assert echo.started.acquire(timeout=PATIENCE)
    waiting = Listener(batcher, "waiting")
    waiting.job.cancel()
    running.job.cancel()
    assert running.told() == ("running", Failure("cancelled"))
    assert waiting.told() == ("", Failure("cancelled"))
    assert echo.batches == [["running on"]]
    assert echo.given_up == ["running on"]


def test_closing_ends_what_waits_and_finishes_what_runs(make: Make):
    echo = Echo()
    echo.go.clear()
    batcher = make(echo.answer, rows=1)
    running = Listener(batcher, "running")
    assert echo.started.acquire(timeout=PATIENCE)
    waiting = Listener(batcher, "waiting")
    batcher.close()
    assert waiting.told()[1] == Failure("shutting_down")
    assert Listener(batcher, "late").told()[1] == Failure("shutting_down")
    echo.go.set()
    assert running.told()[1] == Said("running")


def test_stopping_gives_up_what_runs(make: Make):
    echo = Echo()
    echo.go.clear()
    batcher = make(echo.answer)
    running = Listener(batcher, "running")
    assert echo.started.acquire(timeout=PATIENCE)
    assert batcher.stop(PATIENCE)
    assert running.told()[1] == Failure("cancelled")


def staggered(ends: Callable[[], None]) -> Generate:
    """Ends the rows of a batch one by one; `ends` is called before each but the first."""

    def generate(asks: Sequence[Ask], on_text: Any, on_end: Callable[[int, Said], None], stopped: Any) -> None:
        for row, one in enumerate(asks):
            if row:
                ends()
            on_end(row, Said(one.messages[-1]["content"][-1]["text"]))

    return generate


def test_a_row_that_ends_is_answered_while_its_neighbours_go_on(make: Make):
    go_on = threading.Event()
    batcher = make(staggered(lambda: waited(go_on)), rows=2, wait_seconds=PATIENCE)
    short, long = Listener(batcher, "short"), Listener(batcher, "long")
    assert short.told()[1] == Said("short")
    assert batcher.counts() == {"waiting": 0, "running": 1}
    assert long.events.empty()
    go_on.set()
    assert long.told()[1] == Said("long")


def waited(event: threading.Event) -> None:
    assert event.wait(PATIENCE)


def test_a_row_that_has_ended_is_not_asked_again_when_a_neighbour_fails(make: Make):
    batches: list[int] = []

    def fail() -> None:
        raise FloatingPointError

    def counted(asks: Sequence[Ask], *others: Any) -> None:
        batches.append(len(asks))
        staggered(fail)(asks, *others)

    batcher = make(counted, rows=3, wait_seconds=PATIENCE)
    told = [Listener(batcher, text).told for text in "abc"]
    assert [each()[1] for each in told] == [Said("a"), Said("b"), Said("c")]
    assert batches == [3, 1, 1]


@pytest.mark.parametrize(
    ("text", "fatal"),
    [
        ("CUDA error: device-side assert triggered", True),
        ("CUDA error: out of memory", False),
        ("CUDA out of memory. Tried", False),
    ],
)
def test_an_error_that_loses_the_gpu_ends_the_batcher_and_no_other_does(
    make: Make, text: str, fatal: bool, caplog: pytest.LogCaptureFixture
):
    echo, go = Echo(), threading.Event()

    def lost(asks: Sequence[Ask], *others: Any) -> None:
        if asks[0].messages[-1]["content"][-1]["text"] == "first":
            waited(go)
            raise RuntimeError(text)
        echo.answer(asks, *others)

    batcher = make(lost, rows=1)
    first, waiting = Listener(batcher, "first"), Listener(batcher, "waiting")
    go.set()
    assert first.told()[1] == Failure("error")
    assert waiting.told()[1] == (Failure("broken") if fatal else Said("waiting"))
    assert Listener(batcher, "late").told()[1] == (Failure("broken") if fatal else Said("late"))
    assert batcher.broken == fatal
    assert ("start the server again" in caplog.text) == fatal and text in caplog.text
