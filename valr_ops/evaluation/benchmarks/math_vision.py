"""MathVision (MATH-V): 3,040 problems of mathematics competitions, in 16 subjects and 5 levels.

In: `test-*.parquet` of `MathLLMs/MathVision`, not its testmini, whose score is another figure; or cases whose
`question_type` is the subject, or "SUBJECT_levelN" as the authors' own tables name it; gold a letter A to E where there
are options, else the answer; options the texts of the choices.
Out: items in file order, worded as the authors word them; scores by the authors' rules (mathllm/MATH-V), which
lmms-eval 0.7.3 repeats, or by VLMEvalKit's; and the totals.
Always: an answer is right if it equals the gold letter or the text of the gold option, as a string or as a number at
two decimals. Nothing that a model wrote is run: numbers are read by `arithmetic`, with bounds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache

from valr_ops.evaluation.arithmetic import Number, latex_value, python_value
from valr_ops.evaluation.benchmarks import Item
from valr_ops.evaluation.benchmarks.folder import Folder
from valr_ops.evaluation.choices import can_infer, gold_letter, mean, means
from valr_ops.evaluation.scoring import LMMS_EVAL, OFFICIAL, VLMEVALKIT, Case, Scored, ScoringError

COUNTS = {"": 3040}
"""Questions of the test split."""
SOURCE = (
    "get it with `hf download MathLLMs/MathVision --repo-type dataset --revision COMMIT --include 'data/test-*' "
    "--local-dir FOLDER`"
)
_COLUMNS = ("id", "question", "options", "answer", "level", "subject")
_ASK = (
    'Please solve the problem step by step and put your answer in one "\\boxed{}". '
    'If it is a multiple choice question, only one letter is allowed in the "\\boxed{}".'
)

_LETTERS = "ABCDE"
_PHRASES = ("the final answer is", "the answer is", "the correct answer is", "the answer should be")
_BOX = "oxed{"
_TUPLES = {"(": ")", "[": "]"}
_CLOSE_ENOUGH = 1e-6
_IN_BRACKETS, _IN_BRACES = re.compile(r"\(([a-e])\)"), re.compile(r"\{([a-e])\}")
_VLMEVALKIT_BOX = re.compile(r"\\boxed\{([^}]*)\}")

# Taken out of the content of a box one after the other, each before the next is looked for.
_UNITS_AND_SPACES = (
    *((" ", ""), ("\\,", ""), ("∞", "\\infty"), ("+\\infty", "\\infty"), ("\\\\", "\\"), ("\n", ""), ("\\text", "")),
    *(("\\mbox", ""), ("bmatrix", "pmatrix"), ("\\left", ""), ("\\right", ""), ("^{\\circ}", ""), ("^\\circ", "")),
    *(("{m}^3", ""), ("m^3", ""), ("{units}", ""), ("units", ""), ("{km}", ""), ("km", "")),
)
_LATEX_NOISE = (
    *(("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""), ("\\right", "")),
    *(("^{\\circ}", ""), ("^\\circ", ""), ("\\$", ""), ("$", "")),
)


def read(folder: Folder) -> list[Item]:
    """The questions of `test-*.parquet`, each with its one merged image.

    Raises:
        BenchmarkError: no such file, or a row without its fields.
    """
    return [
        Item(
            id=row.text("id"),
            benchmark=folder.benchmark,
            question=_asked(row.text("question"), options),
            gold=row.letter("answer", len(options)) if options else row.text("answer"),
            options=options,
            question_type=f"{row.text('subject')}_level{row.text('level')}",
            images=row.pictures(),
        )
        for name in folder.find("test-*.parquet", "data/test-*.parquet")
        for row in folder.rows(name, _COLUMNS, ["decoded_image"])
        for options in [() if row.values.get("options") == [] else row.texts("options")]
    ]


def _asked(question: str, options: Sequence[str]) -> str:
    # Options that are nothing but their letters stand in the picture.
    stated = () if "".join(options) == _LETTERS else zip(_LETTERS, options)
    return f"{_ASK}\n{question}\n" + "".join(f"({letter}) {text}\n" for letter, text in stated)


def official(case: Case) -> Scored:
    """Equality of what the authors' rules read with the gold or with the gold option's text."""
    golds = _golds(case)
    answer = read_answer(case.output)
    return Scored(float(any(is_equal(gold, answer) for gold in golds)), answer or None)


def vlmevalkit(case: Case) -> Scored:
    """The answer, or the content of its first box, if it is right or names an option; else a model would be asked."""
    boxed = _VLMEVALKIT_BOX.search(case.output)
    answer = boxed[1] if boxed else case.output
    if case.options:
        letter = can_infer(answer, case.options)
        if letter:
            return Scored(float(letter == gold_letter(case)), letter)
    elif answer and _is_close(case.gold, answer):
        return Scored(1.0, answer)
    return Scored(0.0, None, resolved=False)


PROFILES = {OFFICIAL: official, LMMS_EVAL: official, VLMEVALKIT: vlmevalkit}


def totals(cases: Sequence[Case], scores: Sequence[Scored], profile: str) -> dict[str, float | None]:
    """`overall` and `micro`, in every profile the sample mean; each subject; `levelN` where cases name their level."""
    levels = means(cases, scores, lambda case: _subject_and_level(case)[1])
    levels.pop("", None)
    return {
        "overall": mean(scores),
        "micro": mean(scores),
        **means(cases, scores, lambda case: _subject_and_level(case)[0]),
        **dict(sorted(levels.items())),
    }


def _subject_and_level(case: Case) -> tuple[str, str]:
    subject, mark, level = case.question_type.rpartition("_level")
    return (subject, f"level{level}") if mark and level.isdigit() else (case.question_type, "")


def _golds(case: Case) -> tuple[str, ...]:
    if not case.options:
        return (case.gold,)
    letter = gold_letter(case)
    number = ord(letter) - ord("A")
    if number >= len(case.options):
        raise ScoringError(f"case {case.id!r}: gold {case.gold!r} is none of its {len(case.options)} options")
    return letter, case.options[number]


def read_answer(output: str) -> str:
    """What the authors' rules take for the answer: lower-case LaTeX, possibly empty."""
    text = output.strip()
    for letter in _LETTERS:
        endings = (f" {letter}.", f" ({letter}).")
        if text.endswith(endings) or text.startswith((f"{letter}\n", f"({letter})\n", f"({letter}) {letter}\n")):
            text = letter
    after_is = text.rpartition("is ")[2].rstrip(".")
    if _is_number(after_is):
        text = after_is
    if _BOX not in text:
        for phrase in _PHRASES:
            for written in (phrase, phrase.replace("the", "The")):
                _, found, rest = text.rpartition(written)
                text = rest.strip()
                if found:
                    text = text.partition("\n")[0].partition(". ")[0]
    elif text.count(_BOX) > 1:
        text = "\\b" + _BOX + text.rpartition(_BOX)[2]
    text = _cleaned(_content(text.lower().replace("{}", "")))
    text = _IN_BRACES.sub(r"\1", _IN_BRACKETS.sub(r"\1", text))
    return text.rstrip(".").lstrip(":").strip()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _content(text: str) -> str:
    """What stands in the box, up to its last closing brace in the text; all of it without one."""
    start, end = text.find(_BOX), text.rfind("}")
    if start >= 0 and start + len(_BOX) <= end:
        text = text[start + len(_BOX) : end]
    closing, opening = text.find("}"), text.find("{")
    if closing != -1 and (opening == -1 or closing < opening):
        text = text[:closing]
    text = text.rpartition("=")[2].rpartition("\\approx")[2]
    return _replaced(text, _UNITS_AND_SPACES)


def _replaced(text: str, pairs: Sequence[tuple[str, str]]) -> str:
    for old, new in pairs:
        text = text.replace(old, new)
    return text


def _cleaned(text: str) -> str:
    """The clean-up that came with the MATH data set, quirks included: fractions are mended only beside a root."""
    text = _replaced(text, _LATEX_NOISE).partition("\\text{ ")[0]
    text = _replaced(text, (("\\%", ""), (" .", " 0."), ("{.", "{0.")))
    if text.startswith("."):
        text = "0" + text
    for sign in ("=", "\\approx"):
        if text.count(sign) == 1:
            text = text.partition(sign)[2]
    rooted = "sqrt" in text
    if rooted:
        text = _braced_roots(text)
    text = text.replace(" ", "")
    if rooted:
        text = _braced_fractions(text)
    return _slashed_fraction("\\frac{1}{2}" if text == "0.5" else text)


def _braced_roots(text: str) -> str:
    first, *others = text.split("\\sqrt")
    braced = (rest if not rest or rest[0] == "{" else f"{{{rest[0]}}}{rest[1:]}" for rest in others)
    return "\\sqrt".join([first, *braced])


def _braced_fractions(text: str) -> str:
    first, *others = text.split("\\frac")
    braced = []
    for rest in others:
        if rest[:1] == "{":
            braced.append(rest)
        elif len(rest) < 2:
            return text
        else:
            denominator = rest[1:] if rest[1] == "{" else f"{{{rest[1]}}}{rest[2:]}"
            braced.append(f"{{{rest[0]}}}{denominator}")
    return "\\frac".join([first, *braced])


def _slashed_fraction(text: str) -> str:
    upper, _, lower = text.partition("/")
    try:
        whole = f"{int(upper)}/{int(lower)}" == text
    except ValueError:
        return text
    return f"\\frac{{{upper}}}{{{lower}}}" if whole else text


def is_equal(gold: str, answer: str) -> bool:
    """Equality of two answers as strings in lower case, as tuples, or as numbers at two decimals."""
    gold, answer = gold.lower(), answer.lower()
    if not answer.replace(" ", "") or not gold.replace(" ", ""):
        return False
    if gold.strip() == answer.strip():
        return True
    gold, answer = _rounded_members(gold), _rounded_members(answer)
    if gold == answer:
        return True
    right = _rounded_gold(gold)
    return right is not None and right == _rounded(answer)


def _rounded_members(text: str) -> str:
    """A tuple or list with its members evaluated; as it was if it is none, or one of them has no value."""
    members = text[1:-1].split(",")
    if len(members) < 2 or _TUPLES.get(text[0]) != text[-1]:
        return text
    shown = []
    for member in members:
        if "infty" in member or member in ("a", "-a"):
            shown.append(member)
        elif (value := _rounded(member)) is not None:
            shown.append(str(value))
        else:
            return text
    return f"{text[0]}{','.join(shown)}{text[-1]}"


def _rounded(text: str) -> Number | None:
    value = latex_value(text)
    return None if value is None else round(value, 2)


# Golds are short and come again and again.
_rounded_gold = lru_cache(maxsize=4096)(_rounded)


def _is_close(gold: str, answer: str) -> bool:
    gold, answer = gold.lower().strip(), answer.lower().strip()
    if gold == answer:
        return True
    right = latex_value(gold)
    # While the harness evaluates the answer, its variable `a` holds the gold: the answer "A" is right for every number.
    names = {} if right is None else {"a": right}
    pairs = [(python_value(gold), python_value(answer)), (right, latex_value(answer, names))]
    return any(one is not None and other is not None and _distance(one, other) < _CLOSE_ENOUGH for one, other in pairs)


def _distance(one: Number, other: Number) -> float:
    try:
        return abs(one - other)
    except OverflowError:
        return math.inf
