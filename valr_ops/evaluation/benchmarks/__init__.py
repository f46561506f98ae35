"""What every benchmark is: items, a prompt for an item, and a verdict on an answer. One file a benchmark.

In: a data set in its public on-disk layout.
Out: `Item`s in a fixed order, and a `Verdict` for an item and an isolated answer.
Always: ids are unique within a benchmark, and an item that can't be asked is a rejection with a reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import PIL.Image

from valr_ops.data.records import Image, Rejection


class BenchmarkError(ValueError):
    """A benchmark that can't be run: what is missing, where, and how to provide it."""


@dataclass(frozen=True)
class Item:
    """One question of a benchmark."""

    id: str
    benchmark: str
    question: str
    """The words put to the model, options included."""
    gold: str
    """The right answer in the data set's own form."""
    images: tuple[Image, ...]
    """Shown with the question, in this order."""


@dataclass(frozen=True)
class Verdict:
    """What a scorer says of one answer."""

    correct: bool
    resolved: bool
    """False where no answer of the expected form could be read; such an answer counts as wrong and is shown as such."""


class Benchmark(Protocol):
    """What `run.py` asks of a benchmark."""

    @property
    def name(self) -> str:
        """As it stands in scores and tables."""

    @property
    def rejections(self) -> Sequence[Rejection]:
        """Test records that can't be asked."""

    def items(self) -> Sequence[Item]:
        """All items, in the order of the data set."""

    def prompt(self, item: Item) -> tuple[list[PIL.Image.Image], str]:
        """Decoded images and the question, as `generate_answers` takes them."""

    def score(self, item: Item, answer: str) -> Verdict:
        """Judge an isolated answer."""

    def constant_answer(self, item: Item) -> str:
        """The gold answer in the form in which equal answers are equal strings, for the majority baseline."""
