"""A user's own benchmark: the test split of a source in the project's JSONL format.

In: a jsonl source (`test.jsonl` and its images), read by the reader that training data goes through.
Out: items in file order; verdicts by one of four rules, chosen by the form of the gold answer.
Always: bad lines, a second line with an id already seen, and unreadable images are rejections, never dropped items.

gold: a letter (`C`, `(C)`), or the text of an option that the question states
    the letter, bracketed or with one of ``. ) :`` after it, or that option's text
gold: yes, no, true, false
    the same truth value, in either pair of words
gold: a number
    an integer exactly; a decimal within half a unit of the gold's last digit
gold: anything else
    the same text, but for letter case, white space and a final full stop
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from decimal import Decimal

import PIL.Image

from valr_ops.data.images import decode
from valr_ops.data.records import Record, Rejection
from valr_ops.evaluation.answers import normalised
from valr_ops.evaluation.benchmarks import BenchmarkError, Item, Verdict

_LETTER = re.compile(r"\(?([A-Za-z])[.):]?")
_BARE_LETTER_GOLD = re.compile(r"[A-Z]|\([A-Za-z]\)")
_OPTION_LINE = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]+(\S.*?)[ \t]*$", re.MULTILINE)
_OPTION_INLINE = re.compile(r"\(([A-Z])\)\s*([^()]*[^()\s,;.?])")
_NUMBER = re.compile(r"[+-]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3})?")
_TRUTH = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}


class JsonlBenchmark:
    """The test records of one jsonl source."""

    def __init__(self, name: str, records: Iterable[Record | Rejection], limit: int | None = None):
        """`name` is the source's name, `records` what its reader yields for the split test.

        Raises:
            BenchmarkError: not one record can be asked.
        """
        self.name = name
        self.rejections: list[Rejection] = []
        items: dict[str, Item] = {}
        for record in records:
            if isinstance(record, Rejection):
                self.rejections.append(record)
            elif record.id in items:
                self.rejections.append(
                    Rejection(
                        record.id, name, "duplicate_id", f"test.jsonl of {name} has a second record {record.id!r}"
                    )
                )
            elif limit is None or len(items) < limit:
                shown = tuple(image for image in record.images if image.role == "input")
                items[record.id] = Item(record.id, name, record.question, record.answer, shown)
        if not items:
            why = (
                "; ".join(sorted({rejection.reason for rejection in self.rejections}))
                or "there is no test.jsonl, or nothing in it"
            )
            raise BenchmarkError(
                f"benchmark {name} has no item: {why}. Put records with question, answer and images into its test.jsonl"
            )
        self._items = list(items.values())

    def items(self) -> Sequence[Item]:
        """Every test record that can be asked, in file order."""
        return self._items

    def prompt(self, item: Item) -> tuple[list[PIL.Image.Image], str]:
        """The record's input images and its question word for word."""
        return [decode(image.data) for image in item.images], item.question

    def score(self, item: Item, answer: str) -> Verdict:
        """Judge by the rule for the gold's form; see the table above."""
        given = _in_form_of(item, answer)
        if given is None:
            return Verdict(correct=False, resolved=False)
        right, number = _number(item.gold), _number(given)
        if right is not None and number is not None:
            return Verdict(correct=abs(number - right) <= _tolerance(right), resolved=True)
        return Verdict(correct=given == self.constant_answer(item), resolved=True)

    def constant_answer(self, item: Item) -> str:
        """The gold as the rules compare it: `C`, `yes`, `3.5` or normalised text."""
        answer = _in_form_of(item, item.gold)
        return normalised(item.gold) if answer is None else answer


def options(question: str) -> dict[str, str]:
    """Options stated in a question, letter to text: lines like ``A. red`` or, within a line, ``(A) red (B) blue``.

    Empty unless the letters run A, B, ... without a gap and there are at least two.
    """
    for pattern in (_OPTION_LINE, _OPTION_INLINE):
        found = pattern.findall(question)
        letters = "".join(letter for letter, _ in found)
        if len(found) > 1 and letters == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(found)]:
            return dict(found)
    return {}


def _in_form_of(item: Item, answer: str) -> str | None:
    """`answer` reduced to the form of the item's gold, or None where it has not that form."""
    gold, answer = item.gold.strip(), answer.strip()
    stated = options(item.question)
    by_text = {normalised(text): letter for letter, text in stated.items()}
    if _BARE_LETTER_GOLD.fullmatch(gold) or normalised(gold) in by_text:
        if normalised(answer) in by_text:
            return by_text[normalised(answer)]
        letter = _LETTER.fullmatch(answer)
        if letter is None or (stated and letter[1].upper() not in stated):
            return None
        return letter[1].upper()
    if normalised(gold) in _TRUTH:
        return _TRUTH.get(normalised(answer))
    if _number(gold) is not None:
        number = _number(answer)
        return None if number is None else format(number.normalize(), "f")
    return normalised(answer) or None


def _number(text: str) -> Decimal | None:
    """The number that `text` is, with well-formed thousands separators and one final full stop allowed, else None."""
    text = text.strip().removesuffix(".")
    return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else None


def _tolerance(gold: Decimal) -> Decimal:
    """Nothing for an integer, half a unit of the last digit for a decimal."""
    exponent = gold.as_tuple().exponent
    return Decimal(5).scaleb(exponent - 1) if isinstance(exponent, int) and exponent < 0 else Decimal(0)
