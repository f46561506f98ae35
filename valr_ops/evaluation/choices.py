"""Rules by which harnesses read the letter of an option out of an answer, shared by the benchmarks of multiple choice.

In: what a model said, raw, and the options of its question in order; the first one is A.
Out: a letter, or None where the rule reads nothing.
Always: a rule does what its harness does, false positives included, in time linear in the length of the answer.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from string import ascii_uppercase

from valr_ops.evaluation.scoring import Case, Scored, ScoringError

NO_OPTION = "Z"
"""The letter that VLMEvalKit gives to an answer which declines all options."""
USUAL_LETTERS = "ABCD"
"""The letters of a question whose options are not known."""

_LABEL = re.compile(r"\(([a-z])\)", re.IGNORECASE)
_GOLD = re.compile(r"\(?([A-Za-z])\)?")
_PUNCTUATION_TO_SPACE = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_API_FAILED = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
# No word boundary after the letter, as in the harness: "answer is clear" reads C.
_ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)

_ARTICLE = re.compile(r"\ba (?=[a-z])")
_LAST_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")

_LETTER_FORMATS = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))
_STARTS, _ENDS, _AFTER_PHRASE, _ANYWHERE = 10, 9, 7, 0
# A longer phrase is not redundant beside its ending: the first places where the two occur differ.
_PHRASES = (
    *(f"{which}answer is" for which in ("the ", "", "the correct ", "correct ", "the best ", "best ", "my ")),
    *(f"{which}option is" for which in ("the correct ", "correct ", "the best ", "best ")),
    *(f"{which}choice is" for which in ("the ", "", "the correct ", "correct ", "my ")),
    *("i choose", "i select", "i pick", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def gold_letter(case: Case) -> str:
    """The upper-case letter of the right option; the gold is ``B``, ``(B)`` or the text of one of the options.

    Raises:
        ScoringError: the gold is none of these.
    """
    stated = _GOLD.fullmatch(case.gold.strip())
    if stated:
        return stated[1].upper()
    if case.gold in case.options[: len(ascii_uppercase)]:
        return ascii_uppercase[case.options.index(case.gold)]
    raise ScoringError(
        f"case {case.id!r}: gold {case.gold!r} is neither an option's letter, such as B or (B), nor the text of one "
        f"of its {len(case.options)} options; give gold and options as the data set does"
    )


def separate(options: Sequence[str]) -> Sequence[str]:
    """The texts of options that a data set has in one text, ``(a) Open (b) Closed``; others as they are."""
    stated = " ".join(options) if any(map(_LABEL.search, options)) else ""
    return tuple(part.strip() for part in _LABEL.split(stated)[2::2]) or options


def can_infer(output: str, options: Sequence[str]) -> str | None:
    """The letter by VLMEvalKit's `can_infer` at e8e78f0: by letter first, else by the options' texts.

    `Z` means that the answer declines all options; None, that the harness would ask a language model.
    Without options the letters are A to D, and no text is looked for.
    """
    if not options:
        return can_infer_letter(output, USUAL_LETTERS)
    return can_infer_letter(output, ascii_uppercase[: len(options)]) or can_infer_text(output, options)


def can_infer_letter(output: str, letters: str) -> str | None:
    """The only letter among the answer's words if it is first met in the last four; else X of "answer is X"."""
    letter, words = sole_letter(output, letters)
    if letter and letter not in words[:-4]:
        return letter
    if _API_FAILED in output:
        return None
    stated = _ANSWER_IS.search(output)
    return stated[1].upper() if stated and stated[1].upper() in letters else None


def sole_letter(output: str, letters: str) -> tuple[str | None, list[str]]:
    """The only one of `letters` among the answer's words, and the words; punctuation parts words.

    `Z` where the answer is a refusal that VLMEvalKit knows, or where it has the word Z and none of the letters; then
    there are no words, because its place does not matter.
    """
    if _API_FAILED in output:
        return None, []
    if any(refusal in output for refusal in _REFUSALS):
        return NO_OPTION, []
    words = output.translate(_PUNCTUATION_TO_SPACE).split()
    distinct = set(words)
    found = [letter for letter in letters if letter in distinct]
    if not found and NO_OPTION in distinct:
        return NO_OPTION, []
    return (found[0] if len(found) == 1 else None), words


def can_infer_text(output: str, options: Sequence[str]) -> str | None:
    """The only option whose text occurs in the answer, which is at most twice as long as all options together."""
    answer = output.lower()
    if len(answer) > 2 * sum(map(len, options)):
        return None
    return only_option_within(answer, options)


def only_option_within(answer: str, options: Sequence[str]) -> str | None:
    """The letter of the only option whose text in lower case is a part of `answer`, itself in lower case."""
    found = [letter for letter, option in zip(ascii_uppercase, options) if option.lower() in answer]
    return found[0] if len(found) == 1 else None


def extract_letter(output: str, letters: str = USUAL_LETTERS) -> str | None:
    """The letter by the multiple-choice extractor that lmms-eval 0.7.3 shares among tasks.

    The best format wins: the letter at the start, at the end, after a phrase such as "answer is", then ``(A)``,
    ``A.``, ``A:``, ``A)`` and ``A`` before a space; of equal formats the one later in the text. Without any, a letter
    anywhere. Letters are upper-case, and may be parts of words but for the first two formats.
    """
    text = output.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    bare = text.strip()
    text = f" {text} "
    lower = text.lower()
    ranked: list[tuple[int, int, str]] = []
    for written, rank in _LETTER_FORMATS:
        ranked += [(rank, text.rfind(form), letter) for letter in letters if (form := written.format(letter)) in text]
    for phrase in _PHRASES:
        place = lower.find(phrase)
        if place >= 0:
            after = [(text.find(letter, place + len(phrase)), letter) for letter in letters]
            ranked += [(_AFTER_PHRASE, at, letter) for at, letter in after if at >= 0]
    if bare[:1] and bare[0] in letters and not bare[1:2].isalpha():
        ranked.append((_STARTS, 0, bare[0]))
    if bare[:1] and bare[-1] in letters and not bare[-2:-1].isalpha():
        ranked.append((_ENDS, 0, bare[-1]))
    if not ranked:
        ranked = [(_ANYWHERE, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(ranked)[2] if ranked else None


def read_leniently(case: Case) -> bool:
    """Whether somebody who reads kindly would find the gold answer in an answer that scored nothing.

    It counts how many answers are lost to their form, and scores nothing: the one letter or option among the words, the
    last number, or the gold's own words somewhere.
    """
    try:
        gold = gold_letter(case)
    except ScoringError:
        numbers = _LAST_NUMBER.findall(case.output)
        if _LAST_NUMBER.fullmatch(case.gold.strip()):
            return bool(numbers) and float(numbers[-1]) == float(case.gold)
        words = " ".join(case.output.translate(_PUNCTUATION_TO_SPACE).lower().split())
        return f" {case.gold.lower().strip()} " in f" {words} "
    options = separate(case.options)
    letters = ascii_uppercase[: len(options)] or USUAL_LETTERS
    words = _ARTICLE.sub("", case.output).upper()
    return (sole_letter(words, letters)[0] or can_infer_text(case.output, options)) == gold


def judged(letter: str | None, gold: str) -> Scored:
    """1 for the gold letter and 0 for another one or none."""
    return Scored(float(letter == gold), letter)


def by_can_infer(case: Case) -> Scored:
    """Score by VLMEvalKit's rules for multiple choice; what it would send to a language model is unresolved."""
    gold = gold_letter(case)
    letter = can_infer(case.output, case.options)
    return judged(letter, gold) if letter else Scored(0.0, None, resolved=False)


def means(
    cases: Sequence[Case], scores: Sequence[Scored], group: Callable[[Case], str] = lambda case: case.question_type
) -> dict[str, float]:
    """The mean score of each group, by default a question type, in the order in which they first occur."""
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for case, scored in zip(cases, scores, strict=True):
        groups[group(case)].append(scored.score)
    return {name: sum(values) / len(values) for name, values in groups.items()}


def mean(scores: Sequence[Scored]) -> float | None:
    """The mean score over all cases, None without one."""
    return sum(scored.score for scored in scores) / len(scores) if scores else None
