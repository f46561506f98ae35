"""Concurrent requests become batches: one thread owns the model and takes what waits.

In: jobs from many requests. Out: pieces of text while a batch runs, then exactly one outcome a job, an answer or a
`Failure`, as soon as its own row ends; both through `Job.notify`, in the batcher's thread.
Always: no more jobs are held than a full batch and `queue`; of a batch that fails, the rows without an answer are asked
again one by one, so that one row's fault is not its neighbours'; what a client was told once is not told again; no
failure ends the thread but that of the GPU itself, after which nothing is taken any more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from valr_ops.serving.protocol import Answer

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ask:
    """One checked request, as the model is asked."""

    messages: tuple[dict[str, Any], ...]
    """Chat messages whose images are still encoded (`records.Image`), which is ten times smaller than pixels."""
    prompt_tokens: int
    """Positions of the prompt, images expanded."""
    max_new_tokens: int
    """Text and control tokens; slots are not counted."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0


class Generate(Protocol):
    """Answers a batch: calls `on_text` with (row, new text) as it goes and `on_end` with (row, answer) once a row; rows
    for which `stopped` holds are given up."""

    def __call__(
        self,
        asks: Sequence[Ask],
        on_text: Callable[[int, str], None],
        on_end: Callable[[int, Answer], None],
        stopped: Callable[[int], bool],
    ) -> None: ...


@dataclass(frozen=True)
class Failure:
    """Why a job has no answer: the model failed on it, the GPU is lost, the server ends, or nobody waits any more."""

    reason: Literal["error", "broken", "shutting_down", "cancelled"]


Event = str | Answer | Failure


class QueueFull(Exception):
    """As many requests wait as may."""


class Job:
    """One request on its way through the batcher."""

    def __init__(self, name: str, ask: Ask, notify: Callable[[Event], None]) -> None:
        """A job called `name` in the log; `notify` gets every event, from any thread."""
        self.name, self.ask, self._notify = name, ask, notify
        self._cancelled = threading.Event()
        self.ended = False
        """Whether the outcome was told."""
        self._told = ""
        self._attempt = ""

    @property
    def cancelled(self) -> bool:
        """Whether the rest of the answer is wanted by nobody."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Give the row up at its next step; a job that has ended does not notice."""
        self._cancelled.set()

    def begin(self) -> None:
        """An attempt starts, from the first token."""
        self._attempt = ""

    def write(self, text: str) -> None:
        """The attempt's next piece; what an earlier attempt told is not told again.

        Raises:
            RuntimeError: it says something else than the earlier one, whose words can't be taken back.
        """
        self._attempt += text
        if self._attempt.startswith(self._told):
            new, self._told = self._attempt[len(self._told) :], self._attempt
            if new:
                self._notify(new)
        elif not self._told.startswith(self._attempt):
            raise RuntimeError(f"{self.name}: the second attempt says something else than the first")

    def end(self, outcome: Answer | Failure) -> None:
        """Tell the outcome."""
        self.ended = True
        self._notify(outcome)


class Batcher:
    """A bounded queue and the thread that empties it."""

    def __init__(self, generate: Generate, *, rows: int, wait_seconds: float, queue: int) -> None:
        """A batcher whose thread runs until `stop`.

        Args:
            rows: most jobs of a batch.
            wait_seconds: how long the first job of a batch that is not full waits for others.
            queue: jobs that may wait beside a full batch.
        """
        self._generate, self._rows, self._wait_seconds = generate, rows, wait_seconds
        self._places = rows + queue
        self._taken = 0
        self._waiting: deque[tuple[float, Job]] = deque()
        self._running: tuple[Job, ...] = ()
        self._closed: Failure | None = None
        """What jobs are told that come too late."""
        self._changed = threading.Condition()
        # A daemon: a model that hangs must not keep the process alive after `stop` gave up on it.
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    def reserve(self) -> None:
        """Take a place, before a request's body is read; `submit` takes it over, `release` gives it back.

        Raises:
            QueueFull: none is left.
        """
        with self._changed:
            if self._taken >= self._places:
                raise QueueFull
            self._taken += 1

    def release(self) -> None:
        """Give back a place that no job was submitted for."""
        with self._changed:
            self._taken -= 1

    def submit(self, job: Job) -> None:
        """Queue `job` on a reserved place; once the batcher is closed its outcome is why."""
        with self._changed:
            closed = self._closed
            if closed is None:
                self._waiting.append((time.monotonic(), job))
                self._changed.notify_all()
        if closed is not None:
            self._finish(job, closed)

    def counts(self) -> dict[str, int]:
        """Jobs that wait and rows that run."""
        with self._changed:
            return {"waiting": len(self._waiting), "running": sum(not job.ended for job in self._running)}

    @property
    def broken(self) -> bool:
        """Whether the GPU is lost, so that nothing can be answered any more."""
        return self._closed == Failure("broken")

    def close(self, why: Failure = Failure("shutting_down")) -> None:
        """Take no job any more, and end those that wait; what runs goes on."""
        with self._changed:
            self._closed = self._closed or why
            left = [job for _, job in self._waiting]
            self._waiting.clear()
            self._changed.notify_all()
        for job in left:
            self._finish(job, why)

    def give_up(self) -> None:
        """`close`, and end what runs at its next step."""
        self.close()
        for job in self._running:
            job.cancel()

    def stop(self, seconds: float) -> bool:
        """`give_up`, and wait up to `seconds` for the thread; whether it has ended."""
        self.give_up()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while jobs := self._take():
            self._answer(jobs)
            with self._changed:
                self._running = ()

    def _take(self) -> tuple[Job, ...]:
        """The next batch, oldest first; empty once the batcher is closed."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            while not self._closed and len(self._waiting) < self._rows:
                left = self._waiting[0][0] + self._wait_seconds - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            taken = min(self._rows, len(self._waiting))
            self._running = tuple(self._waiting.popleft()[1] for _ in range(taken))
            return self._running

    def _answer(self, jobs: Sequence[Job]) -> None:
        """One outcome for each of `jobs`."""
        for job in jobs:
            if job.cancelled:
                self._finish(job, Failure("cancelled"))
        wanted = [job for job in jobs if not job.ended]
        self._attempt(wanted)
        # Beyond the except clause: what the failed attempt held of the model's memory is free by now.
        for job in [job for job in wanted if not job.ended]:
            if job.cancelled:
                self._finish(job, Failure("cancelled"))
            elif len(wanted) > 1 and not self.broken:
                self._attempt([job])
            if not job.ended:
                self._finish(job, Failure("error"))

    def _attempt(self, jobs: Sequence[Job]) -> None:
        """Ask the model once; if it fails, some of `jobs` have not ended."""
        if not jobs:
            return
        for job in jobs:
            job.begin()

        def end(row: int, answer: Answer) -> None:
            self._finish(jobs[row], Failure("cancelled") if jobs[row].cancelled else answer)

        try:
            self._generate(
                [job.ask for job in jobs],
                lambda row, text: jobs[row].write(text),
                end,
                lambda row: jobs[row].cancelled,
            )
            if not all(job.ended for job in jobs):
                raise RuntimeError("the model has ended, but not all of its rows")
        except Exception as error:
            _LOG.exception("a batch failed: %s", ", ".join(job.name for job in jobs))
            if _is_fatal(error):
                _LOG.critical("this process can't use the GPU any more, nothing is answered; start the server again")
                self.close(Failure("broken"))

    def _finish(self, job: Job, outcome: Answer | Failure) -> None:
        """Free the job's place, then tell its outcome."""
        self.release()
        job.end(outcome)


def _is_fatal(error: Exception) -> bool:
    """Whether CUDA fails every call of this process from now on; after a mere lack of memory it does not."""
    text = str(error)
    return isinstance(error, RuntimeError) and "CUDA error" in text and "out of memory" not in text
