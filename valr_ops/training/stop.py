"""Stopping in good order: SIGTERM and SIGINT become a request that the loop answers at the next update's end.

In: signals, which a cluster sends before it takes a node away. Out: `requested()`, and `TrainingInterrupted` once the
checkpoint is written. Always: the second SIGINT is an ordinary KeyboardInterrupt, for who does not want to wait.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from valr_ops.exits import EXIT_AT_CHECKPOINT


class TrainingInterrupted(RuntimeError):
    """A signal stopped the run after a whole update, and the checkpoint is written."""

    exit_status = EXIT_AT_CHECKPOINT


class StopSignals:
    """Context in which SIGTERM and SIGINT only set a flag; outside the main thread signals are left alone."""

    def __init__(self) -> None:
        self._then: Callable[[], None] | None = None
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def requested(self) -> bool:
        """Whether a signal came since the context was entered."""
        return self.received is not None

    def then(self, action: Callable[[], None]) -> None:
        """Call `action` at the first signal; at once if it came already."""
        self._then = action
        if self.received is not None:
            action()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = signal.Signals(number).name
            if self._then is not None:
                self._then()
