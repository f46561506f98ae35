"""A user's own benchmark: questions in JSON lines, and the rules that score their answers.

In: a folder with one file of JSON lines (or `benchmark.jsonl` beside others) and the images and videos that it names;
or the test records of a source in the project's JSONL format; or cases whose `question_type` names the rule.
Out: items in file order; scores of cases.
Always: a line that can't be asked or scored stops the reading with file and line. Of records, which others check,
such ones and second ones with an id already seen are rejections, never dropped items.

    {"id": 1, "question": "Which is longer?", "images": ["images/1.png"], "choices": ["left", "right"], "answer": "B"}

`question` is asked with its choices behind it, `prompt` word for word. Also `video` and `num_frames`; `answer_type`
(default choice beside choices, else text); `scorer` of a number (mra, abs_tol=X or rel_tol=X); `group`, `subgroup`,
`pair`; and `meta` for anything else. A number keeps the digits it is written with, since its tolerance depends on them.

The rules: ``choice``, ``yes_no``, ``number``, ``text`` and ``list``. An answer is right if it is

choice: gold a letter (`C`, `(C)`) or the text of an option
    the letter, bracketed or with one of ``. ) :`` after it, or that option's text
yes_no: gold yes, no, true or false
    the same truth value, in either pair of words
number: gold an integer or a decimal
    the integer exactly; the decimal within half a unit of the gold's last digit. ``number:mra`` scores as VSI-Bench
    does; ``number:abs_tol=X`` and ``number:rel_tol=X`` give a tolerance
text: gold a text, or a JSON list of texts of which any is right
    the same text, but for letter case, white space and a final full stop
list: gold a JSON list
    as many elements, each right as a number or a text, in order
"""

from __future__ import annotations

import difflib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from string import ascii_uppercase
from typing import Any

from valr_ops.data.records import Record, Rejection
from valr_ops.evaluation.answers import normalised
from valr_ops.evaluation.benchmarks import BenchmarkError, Item, Picture
from valr_ops.evaluation.benchmarks.folder import Folder
from valr_ops.evaluation.benchmarks.vsi_bench import mean_relative_accuracy
from valr_ops.evaluation.choices import mean, means
from valr_ops.evaluation.scoring import OFFICIAL, Case, Scored, ScoringError

COUNTS: dict[str, int] = {}
"""How many questions a user's benchmark has is not published."""
SOURCE = "write one JSON object a line, with id, question or prompt, answer, and images or video as paths in the folder"

_FIELDS = (
    *("id", "question", "prompt", "answer", "images", "video", "num_frames", "choices", "answer_type", "scorer"),
    *("group", "subgroup", "pair", "meta"),
)
_ASK_LETTER = "Answer with the option's letter from the given choices directly."

_LETTER = re.compile(r"\(([A-Za-z])\)|([A-Za-z])[.):]?")
_BARE_LETTER_GOLD = re.compile(r"[A-Z]|\([A-Za-z]\)")
_OPTION_LINE = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]+(\S.*?)[ \t]*$", re.MULTILINE)
_OPTION_INLINE = re.compile(r"\(([A-Z])\)\s*([^()]*[^()\s,;.?])")
_LETTERED_OPTION = re.compile(r"\(?([A-Z])[.):]\s*(\S.*)", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3})?")
_TRUTH = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}


def read(folder: Folder) -> list[Item]:
    """The questions of a user's own benchmark; see the module for its fields.

    Raises:
        BenchmarkError: no file, several of which none is `benchmark.jsonl`, or a line that can't be asked or scored:
            unknown or wrong fields, an id already seen, missing media or ones outside the folder, a gold that is none
            of the choices, no finite number, or 0 where the error is relative to it.
    """
    names = folder.find("*.jsonl")
    name = "benchmark.jsonl" if "benchmark.jsonl" in names else names[0]
    if len(names) > 1 and name != "benchmark.jsonl":
        raise folder.error(f"{folder.root} holds {', '.join(names)}; call the one with the questions benchmark.jsonl")
    items: list[Item] = []
    lines: dict[str, int] = {}
    for line in _lines(folder, name):
        item = _item(line)
        if item.id in lines:
            raise line.error(f"id {item.id!r} was already in line {lines[item.id]}; keep one of the two")
        items.append(item)
        lines[item.id] = line.number
    return items


def from_records(name: str, records: Iterable[Record | Rejection]) -> tuple[list[Item], list[Rejection]]:
    """The test records of a source as questions, asked word for word with their input images.

    Args:
        name: of the source.
        records: what its reader yields for the split test.

    Returns:
        items in file order, whose rule follows from the gold, and from the options that the question states; and the
        records that can't be asked.

    Raises:
        BenchmarkError: not one record can be asked.
    """
    rejections: list[Rejection] = []
    items: dict[str, Item] = {}
    for record in records:
        if isinstance(record, Rejection):
            rejections.append(record)
            continue
        rule, gold, stated = _inferred(record.question, record.answer)
        shown = tuple(image for image in record.images if image.role == "input")
        if record.id in items:
            detail = f"test.jsonl of {name} has a second record {record.id!r}"
            rejections.append(Rejection(record.id, name, "duplicate_id", detail))
        elif rule == "choice" and _chosen(gold, stated) is None:
            detail = f"answer {gold} is none of the {len(stated)} options that the question states"
            rejections.append(Rejection(record.id, name, "answer_not_allowed", detail))
        else:
            items[record.id] = Item(record.id, name, record.question, gold, stated, rule, images=shown)
    if not items:
        why = (
            "; ".join(sorted({rejection.reason for rejection in rejections}))
            or "there is no test.jsonl, or nothing in it"
        )
        raise BenchmarkError(
            f"benchmark {name} has no item: {why}. Put records with question, answer and images into its test.jsonl"
        )
    return list(items.values()), rejections


def _inferred(question: str, answer: str) -> tuple[str, str, tuple[str, ...]]:
    """Rule, gold and options of a record, by the form of its answer."""
    answer = answer.strip()
    stated = tuple(options(question).values())
    if _BARE_LETTER_GOLD.fullmatch(answer) or normalised(answer) in map(normalised, stated):
        return "choice", answer, stated
    if normalised(answer) in _TRUTH:
        return "yes_no", answer, ()
    if _number(answer) is not None:
        return "number", answer, ()
    return "text", _text_gold(answer), ()


def options(question: str) -> dict[str, str]:
    """Options stated in a question, letter to text: lines like ``A. red`` or, within a line, ``(A) red (B) blue``.

    Empty unless the letters run A, B, ... without a gap and there are at least two.
    """
    for pattern in (_OPTION_LINE, _OPTION_INLINE):
        found = pattern.findall(question)
        letters = "".join(letter for letter, _ in found)
        if len(found) > 1 and letters == ascii_uppercase[: len(found)]:
            return dict(found)
    return {}


@dataclass(frozen=True, slots=True)
class _Line:
    """One line of the file, whose fields are asked for by kind; errors name file and line."""

    folder: Folder
    file: str
    number: int
    """From 1."""
    values: Mapping[str, Any]
    """Without nulls."""

    def error(self, what: str) -> BenchmarkError:
        return self.folder.error(f"{self.file}:{self.number}: {what}")

    def wrong(self, field: str, expected: str) -> BenchmarkError:
        return self.error(f"{field} is {str(self.values[field])[:60]!r}, where {expected} is expected")

    def require(self, name: str) -> None:
        """Raise `BenchmarkError` unless the folder has this file."""
        try:
            there = self.folder.has(name)
        except BenchmarkError:
            raise self.error(f"{name!r} leads out of the folder") from None
        if not there:
            raise self.error(f"there is no file {name!r} in {self.folder.root}")

    def text(self, field: str) -> str:
        """A text or a whole number; empty where there is no such field."""
        value = self.values.get(field, "")
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if field in self.values and not (isinstance(value, str) and value.strip()):
            raise self.wrong(field, "text")
        return str(value)

    def texts(self, field: str) -> tuple[str, ...]:
        """A list of texts; empty where there is no such field."""
        value = self.values.get(field, [])
        if not isinstance(value, list) or not all(isinstance(one, str) and one.strip() for one in value):
            raise self.wrong(field, "a list of texts")
        return tuple(value)


def _lines(folder: Folder, name: str) -> Iterator[_Line]:
    """The objects of the file. Numbers are `Decimal`s, which keep their digits."""
    for number, line in enumerate(folder.bytes(name).removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if line.strip():
            try:
                values = json.loads(line.decode(), parse_float=Decimal, parse_constant=Decimal)
                # Refuses half of a pair of UTF-16, which no file of results could hold.
                json.dumps(values, ensure_ascii=False, default=str).encode()
            except (ValueError, RecursionError) as error:
                raise folder.error(f"{name}:{number} is not JSON in UTF-8 ({error})") from None
            if not isinstance(values, dict):
                raise folder.error(f"{name}:{number} is no JSON object")
            yield _Line(folder, name, number, {key: value for key, value in values.items() if value is not None})


def _item(line: _Line) -> Item:
    unknown = sorted(line.values.keys() - set(_FIELDS))
    if unknown:
        close = difflib.get_close_matches(unknown[0], _FIELDS, n=1)
        hint = f"did you mean {close[0]}?" if close else "put it under meta"
        raise line.error(f"there is no field {unknown[0]!r}; {hint}")
    for field in ("id", "answer"):
        if field not in line.values:
            raise line.error(f"{field} is missing")
    if not isinstance(line.values.get("meta", {}), dict):
        raise line.wrong("meta", "an object")
    frames = line.values.get("num_frames", 0)
    if "num_frames" in line.values and (type(frames) is not int or frames < 1 or "video" not in line.values):
        raise line.wrong("num_frames", "a whole number above 0, beside a video,")
    choices = _choices(line)
    item = Item(
        id=line.text("id"),
        benchmark=line.folder.benchmark,
        question=_asked(line, choices),
        gold=_gold(line),
        options=choices,
        question_type=_rule(line),
        cluster=line.text("pair"),
        images=tuple(map(Picture, line.texts("images"))),
        video=line.text("video"),
        frames=frames,
        group=line.text("group"),
        subgroup=line.text("subgroup"),
    )
    for name in (*line.texts("images"), *filter(None, [item.video])):
        line.require(name)
    try:
        official(Case(item.id, item.gold, "", item.question_type, item.options))
    except ScoringError as error:
        raise line.error(str(error)) from None
    return item


def _choices(line: _Line) -> tuple[str, ...]:
    """The choices without letters."""
    choices = tuple(_without_letters(line.texts("choices")))
    if "choices" in line.values and not 2 <= len(set(map(normalised, choices))) == len(choices) <= len(ascii_uppercase):
        raise line.wrong("choices", f"a list of 2 to {len(ascii_uppercase)} different texts")
    return choices


def _asked(line: _Line, choices: Sequence[str]) -> str:
    if ("question" in line.values) == ("prompt" in line.values):
        raise line.error("give either question or prompt")
    if "prompt" in line.values or not choices:
        return line.text("prompt") or line.text("question")
    lettered = (f"{letter}. {text}" for letter, text in zip(ascii_uppercase, choices))
    return "\n".join([line.text("question"), *lettered, _ASK_LETTER])


def _rule(line: _Line) -> str:
    """The answer type, and behind a colon the scorer if there is one."""
    kind = line.text("answer_type") or ("choice" if "choices" in line.values else "text")
    if kind not in (*_RULES, "number"):
        raise line.wrong("answer_type", f"one of {', '.join((*_RULES, 'number'))}")
    if "choices" in line.values and kind != "choice":
        raise line.error(f"answer_type {kind} has no choices")
    return ":".join(filter(None, [kind, line.text("scorer")]))


def _gold(line: _Line) -> str:
    """The answer: a text as it is, of a number its digits, of a list its JSON text."""
    answer = line.values["answer"]
    elements = answer if isinstance(answer, list) else [answer]
    if not elements or not all(map(_is_answer, elements)):
        raise line.wrong("answer", "a text, a finite number, or a list of these")
    if not isinstance(answer, list):
        return _text_gold(answer) if _rule(line) == "text" and isinstance(answer, str) else str(answer)
    if _rule(line) not in ("text", "list"):
        raise line.wrong("answer", f"one answer of type {_rule(line)}")
    return f"[{', '.join(json.dumps(one, ensure_ascii=False) if isinstance(one, str) else str(one) for one in answer)}]"


def _is_answer(value: object) -> bool:
    if isinstance(value, Decimal):
        return value.is_finite()
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, str) and bool(value.strip()))


def _text_gold(answer: str) -> str:
    """The gold of the rule text that stands for this one text, even if it reads like a list of texts."""
    return json.dumps([answer], ensure_ascii=False) if _json_list(answer) else answer


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
    name, how = _rule_of(case)
    if name == "number":
        return _score_number(case, how)
    rule = _RULES.get(name)
    if rule is None or how:
        raise ScoringError(
            f"case {case.id!r}: question_type {case.question_type!r} names no rule; choose one of "
            f"{', '.join(_RULES)}, number, number:mra, number:abs_tol=X, number:rel_tol=X"
        )
    return rule(case)


def _rule_of(of: Case | Item) -> tuple[str, str]:
    """The rule that `question_type` names, by default choice beside options, else text; and how it scores."""
    name, _, how = (of.question_type or ("choice" if of.options else "text")).partition(":")
    return name, how


PROFILES = {OFFICIAL: official}


def comparable(of: Case | Item) -> str:
    """The gold as its rule compares it, for the answer that is right most often: `C`, `yes`, `3.5`, normalised text."""
    rule = _rule_of(of)[0]
    if rule == "choice":
        return _chosen(of.gold, of.options) or normalised(of.gold)
    if rule == "yes_no":
        return _TRUTH.get(normalised(of.gold), normalised(of.gold))
    if rule == "list":
        return json.dumps([_plain(one) for one in _json_list(of.gold) or ()], ensure_ascii=False)
    return _plain(of.gold) if rule == "number" else normalised((_json_list(of.gold) or [of.gold])[0])


def _plain(text: str) -> str:
    """A number without what its digits don't need, other text normalised."""
    number = _number(text)
    return normalised(text) if number is None else format(number.normalize(), "f")


def group_totals(items: Sequence[Item], scores: Sequence[Scored]) -> dict[str, float]:
    """What `totals` can't tell from cases: the mean of each group, `macro` over groups, `pair` over pairs.

    A pair, of any number of items, is right if all of them are. Items without a group or a pair are left out; where no
    item has one, so is the total.
    """
    groups: defaultdict[str, list[float]] = defaultdict(list)
    pairs: defaultdict[str, list[float]] = defaultdict(list)
    for item, scored in zip(items, scores, strict=True):
        if item.group:
            groups[item.group].append(scored.score)
        if item.group and item.subgroup:
            groups[f"{item.group}/{item.subgroup}"].append(scored.score)
        if item.cluster:
            pairs[item.cluster].append(scored.score)
    found = {name: sum(values) / len(values) for name, values in groups.items()}
    whole = [found[name] for name in dict.fromkeys(item.group for item in items if item.group)]
    if whole:
        found["macro"] = sum(whole) / len(whole)
    if pairs:
        found["pair"] = sum(min(values) == 1 for values in pairs.values()) / len(pairs)
    return found


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


_RULES: dict[str, Callable[[Case], Scored]] = {
    "choice": _score_choice,
    "yes_no": _score_truth,
    "text": _score_text,
    "list": _score_list,
}
