from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator

from tests.training.inputs import Listening
from valr_ops.training.launch import _MARK, _hear


class Counting(Listening):
    """Keeps how far its bar came."""

    def __init__(self) -> None:
        super().__init__()
        self.done = 0

    def track(self, items: Iterable[None], description: str, total: int | None = None, done: int = 0) -> Iterator[None]:  # type: ignore[override]
        self.done = done
        for item in items:
            yield item
            self.done += 1


def told(**what: object) -> str:
    return _MARK + json.dumps(what)


def test_a_message_is_heard_with_other_output_in_front_of_it_and_behind_it() -> None:
    """A progress bar of a library ends without a line break, and torchrun writes whenever it likes."""
    progress, last = Counting(), deque[str]()
    lines = [
        told(what="begin", description="updates", total=5, done=2) + "\n",
        "loading 40 %" + told(what="next", description="updates") + "W1122 closing\n",
        "\n",
        told(what="log", step=3, metrics={"ce": 0.5}) + "\n",
        "Traceback\n",
        told(what="say", message=f"{_MARK}is no mark here") + "\n",
    ]
    _hear(lines, progress, last)
    assert progress.done == 3
    assert progress.logged == {3: {"ce": 0.5}}
    assert progress.said == [f"{_MARK}is no mark here"]
    assert list(last) == ["loading 40 %", "W1122 closing", "Traceback"]
