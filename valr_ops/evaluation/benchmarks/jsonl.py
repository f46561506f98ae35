"""A user's own benchmark: the test split of a source in the project's JSONL format, and the rules that score it.

In: a jsonl source (`test.jsonl` and its images), read by the reader that training data goes through; or cases whose
`question_type` names the rule.
Out: items in file order; verdicts by one of four rules, chosen by the form of the gold answer; scores of cases.
Always: bad lines, a second line with an id already seen, and unreadable images are rejections, never dropped items.

gold: a letter (`C`, `(C)`), or the text of an option that the question states
    the letter, bracketed or with one of ``. ) :`` after it, or that option's text
gold: yes, no, true, false
    the same truth value, in either pair of words
gold: a number
    an integer exactly; a decimal within half a unit of the gold's last digit
gold: anything else
    the same text, but for letter case, white space and a final full stop

The rules of cases: ``choice`` (the default beside options), ``yes_no``, ``number``, ``number:mra`` (as in VSI-Bench),
``number:abs_tol=X``, ``number:rel_tol=X``, ``text`` (the default; a JSON list of texts as gold means any of them) and
``list`` (a JSON list as gold; as many elements, each right as a number or a text, in order).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from string import ascii_uppercase

import PIL.Image

from valr_ops.data.images import decode
from valr_ops.data.records import Record, Rejection
from valr_ops.evaluation.answers import normalised
from valr_ops.evaluation.benchmarks import BenchmarkError, Item, Verdict
from valr_ops.evaluation.benchmarks.vsi_bench import mean_relative_accuracy
from valr_ops.evaluation.choices import mean, means
from valr_ops.evaluation.scoring import OFFICIAL, Case, Scored, ScoringError

_LETTER = re.compile(r"\(([A-Za-z])\)|([A-Za-z])[.):]?")
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
        letter = _letter(answer)
        return None if stated and letter not in stated else letter
    if normalised(gold) in _TRUTH:
        return _TRUTH.get(normalised(answer))
    if _number(gold) is not None:
        number = _number(answer)
        return None if number is None else format(number.normalize(), "f")
    return normalised(answer) or None


def _letter(answer: str) -> str | None:
    found = _LETTER.fullmatch(answer)
    return (found[1] or found[2]).upper() if found else None


def _number(text: str) -> Decimal | None:
    """The number that `text` is, with well-formed thousands separators and one final full stop allowed, else None."""
    text = text.strip().removesuffix(".")
    return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else None


def _tolerance(gold: Decimal) -> Decimal:
    """Nothing for an integer, half a unit of the last digit for a decimal."""
    exponent = gold.as_tuple().exponent
    return Decimal(5).scaleb(exponent - 1) if isinstance(exponent, int) and exponent < 0 else Decimal(0)


def official(case: Case) -> Scored:
    """Score by the rule that `question_type` names. An answer without the form that the rule asks for is unresolved.

    Raises:
        ScoringError: there is no such rule, or the gold has not the form that it asks for.
    """
    name, _, how = (case.question_type or ("choice" if case.options else "text")).partition(":")
    if name == "number":
        return _score_number(case, how)
    rule = _RULES.get(name)
    if rule is None or how:
        raise ScoringError(
            f"case {case.id!r}: question_type {case.question_type!r} names no rule; choose one of "
            f"{', '.join(_RULES)}, number, number:mra, number:abs_tol=X, number:rel_tol=X"
        )
    return rule(case)


PROFILES = {OFFICIAL: official}


def totals(cases: Sequence[Case], scores: Sequence[Scored], profile: str) -> dict[str, float | None]:
    """`overall` and `micro`, the mean over cases; `macro`, the mean of the means of question types; each of these."""
    by_type = means(cases, scores)
    macro = sum(by_type.values()) / len(by_type) if by_type else None
    return {"overall": mean(scores), "micro": mean(scores), "macro": macro, **by_type}


def _judged(read: str | None, right: bool) -> Scored:
    return Scored(0.0, None, resolved=False) if read is None else Scored(float(right), read)


def _score_choice(case: Case) -> Scored:
    gold = _chosen(case.gold, case.options)
    if gold is None:
        raise _bad_gold(case, f"neither a letter nor the text of one of {len(case.options)} options")
    read = _chosen(case.output, case.options)
    return _judged(read, read == gold)


def _chosen(answer: str, stated: Sequence[str]) -> str | None:
    """The letter of the option whose text the answer is, else the letter that it is."""
    answer = answer.strip()
    texts = {normalised(text): letter for letter, text in zip(ascii_uppercase, _without_letters(stated))}
    texts |= {normalised(text): letter for letter, text in zip(ascii_uppercase, stated)}
    if normalised(answer) in texts:
        return texts[normalised(answer)]
    letter = _letter(answer)
    return None if letter and stated and letter not in ascii_uppercase[: len(stated)] else letter


def _without_letters(stated: Sequence[str]) -> list[str]:
    """Option texts out of ``A. red`` or ``(A) red``, where the letters of all of them run A, B, ..."""
    found = [_LETTERED_OPTION.fullmatch(text.strip()) for text in stated]
    runs = all(match and match[1] == letter for match, letter in zip(found, ascii_uppercase))
    return [match[2] for match in found if match] if runs else list(stated)


def _score_truth(case: Case) -> Scored:
    gold = _TRUTH.get(normalised(case.gold))
    if gold is None:
        raise _bad_gold(case, "none of yes, no, true, false")
    read = _TRUTH.get(normalised(case.output))
    return _judged(read, read == gold)


def _score_number(case: Case, how: str) -> Scored:
    gold = _number(case.gold)
    if gold is None:
        raise _bad_gold(case, "no number")
    scorer, _, bound = how.partition("=")
    limit = _number(bound)
    if (scorer in ("abs_tol", "rel_tol")) != (limit is not None) or scorer not in ("", "mra", "abs_tol", "rel_tol"):
        raise ScoringError(
            f"case {case.id!r}: question_type {case.question_type!r}: write number, number:mra, number:abs_tol=0.5 or "
            "number:rel_tol=0.05"
        )
    if scorer in ("mra", "rel_tol") and not gold:
        raise _bad_gold(case, "0, of which there is no relative error; use number:abs_tol=X")
    read = _number(case.output)
    if read is None:
        return _judged(None, False)
    if scorer == "mra":
        error = abs((float(read) - float(gold)) / float(gold))
        return Scored(mean_relative_accuracy(error), case.output.strip())
    off = abs(read - gold)
    if scorer == "rel_tol":
        off /= abs(gold)
    return _judged(case.output.strip(), off <= (_tolerance(gold) if limit is None else limit))


def _score_text(case: Case) -> Scored:
    golds = _json_list(case.gold) or [case.gold]
    read = normalised(case.output) or None
    return _judged(read, any(read == normalised(gold) for gold in golds))


def _score_list(case: Case) -> Scored:
    golds = _json_list(case.gold)
    if golds is None:
        raise _bad_gold(case, 'no JSON list, such as ["red", 2]')
    given = _json_list(case.output)
    if given is None:
        return _judged(None, False)
    right = len(given) == len(golds) and all(map(_same_element, given, golds))
    return _judged(json.dumps(given, ensure_ascii=False), right)


def _same_element(given: str, gold: str) -> bool:
    right, number = _number(gold), _number(given)
    if right is not None and number is not None:
        return abs(number - right) <= _tolerance(right)
    return normalised(given) == normalised(gold)


def _json_list(text: str) -> list[str] | None:
    """The elements of a JSON list of texts and numbers, as text, else None."""
    if not text.lstrip().startswith("["):
        return None
    try:
        found = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError):
        return None
    return found if all(isinstance(element, str) for element in found) else None


def _bad_gold(case: Case, what: str) -> ScoringError:
    return ScoringError(f"case {case.id!r}: gold {case.gold!r} is {what} (question_type {case.question_type!r})")


_LETTERED_OPTION = re.compile(r"\(?([A-Z])[.):]\s*(\S.*)", re.DOTALL)
_RULES: dict[str, Callable[[Case], Scored]] = {
    "choice": _score_choice,
    "yes_no": _score_truth,
    "text": _score_text,
    "list": _score_list,
}
