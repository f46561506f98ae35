"""VSI-Bench: letters and numbers about videos of rooms, scored by accuracy and by mean relative accuracy (MRA).

In: `nyu-visionx/VSI-Bench` on disk, its zips unpacked: a table of questions, and `DATASET/SCENE.mp4`; or cases whose
`question_type` is one of the ten of the data set, and whose gold is a letter or a number as text.
Out: items in file order; scores, 0 or 1 for a letter, a tenth for each threshold that a number meets; totals for the
eight tasks of the paper.
Always: the mean over tasks (macro) is None where a task is missing, never a mean over fewer.

Sources: Yang et al., arXiv 2412.14171; vision-x-nyu/thinking-in-space, whose harness trims an answer first; lmms-eval
0.7.3, tasks/vsibench; VLMEvalKit e8e78f0, dataset/utils/spatial_bench.
"""

from __future__ import annotations

import ast
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

from valr_ops.evaluation.benchmarks import Item
from valr_ops.evaluation.benchmarks.folder import Folder
from valr_ops.evaluation.choices import means
from valr_ops.evaluation.scoring import LMMS_EVAL, OFFICIAL, VLMEVALKIT, Case, Scored, ScoringError, Totals

DIRECTION = "object_rel_direction"
DIRECTIONS = tuple(f"{DIRECTION}_{level}" for level in ("easy", "medium", "hard"))
NUMERIC = ("object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation")
MULTIPLE_CHOICE = ("object_rel_distance", *DIRECTIONS, "route_planning", "obj_appearance_order")
TASKS = (*NUMERIC, "object_rel_distance", DIRECTION, "route_planning", "obj_appearance_order")
"""The eight tasks of the paper's tables; the three levels of direction count as one."""

COUNTS = {
    "object_counting": 565,
    "object_abs_distance": 834,
    "object_size_estimation": 953,
    "room_size_estimation": 288,
    "object_rel_distance": 710,
    "object_rel_direction_easy": 217,
    "object_rel_direction_medium": 378,
    "object_rel_direction_hard": 373,
    "route_planning": 194,
    "obj_appearance_order": 618,
}
"""Questions of each type."""
SOURCE = (
    "get it with `hf download nyu-visionx/VSI-Bench --repo-type dataset --revision COMMIT --local-dir FOLDER`, then "
    "unpack its three zips in that folder"
)
_COLUMNS = ("id", "dataset", "scene_name", "question_type", "question", "ground_truth", "options")
_FRAMES = "These are frames of a video."
_ASK_LETTER = "Answer with the option's letter from the given choices directly."
_ASK_NUMBER = "Please answer the question using a single word or phrase."

# 1 - numpy.linspace(.5, .95, 10) in float64. Which errors are ties depends on the last digit, so nothing is recomputed.
THRESHOLDS = (
    0.5,
    0.44999999999999996,
    0.4,
    0.35,
    0.30000000000000004,
    0.25,
    0.19999999999999996,
    0.15000000000000002,
    0.10000000000000009,
    0.050000000000000044,
)


def read(folder: Folder) -> list[Item]:
    """The questions of `test-*.parquet`, else of `test.jsonl`, worded as the authors word them.

    Raises:
        BenchmarkError: a missing table or video, or a row that is no question of one of the ten types with its gold.
    """
    items = []
    for name in folder.find("test-*.parquet", "data/test-*.parquet", "test.jsonl"):
        for row in folder.rows(name, _COLUMNS):
            kind = row.one_of("question_type", COUNTS)
            scene = f"{row.text('dataset')}/{row.text('scene_name')}"
            options = () if kind in NUMERIC else row.texts("options")
            gold = row.letter("ground_truth", len(options)) if options else row.text("ground_truth")
            if not options and _number(gold) is None:
                raise row.error(f"ground_truth is {gold!r}, from which no relative error can be taken")
            asked = ["Options:", *options, _ASK_LETTER] if options else [_ASK_NUMBER]
            items.append(
                Item(
                    id=row.text("id"),
                    benchmark=folder.benchmark,
                    question="\n".join([_FRAMES, row.text("question"), *asked]),
                    gold=gold,
                    options=options,
                    question_type=kind,
                    cluster=scene,
                    video=f"{scene}.mp4",
                )
            )
    folder.require((item.video for item in items), "videos are")
    return items


def mean_relative_accuracy(error: float) -> float:
    """The share of the ten thresholds that a relative error is not above; 0 for one that is no number."""
    return sum(error <= threshold for threshold in THRESHOLDS) / len(THRESHOLDS)


def _official(case: Case) -> Scored:
    gold, token = _gold(case), first_token(case.output)
    if isinstance(gold, str):
        return _same_letter(token, gold)
    try:
        number = float(token)
    except ValueError:
        return Scored(0.0, None)
    return Scored(mean_relative_accuracy(abs(number - gold) / gold), token)


def _lmms_eval(case: Case) -> Scored:
    gold = _gold(case)
    if isinstance(gold, str):
        return _same_letter(first_token(case.output), gold)
    read = first_number(case.output)
    return Scored(mean_relative_accuracy(abs(float(read) - gold) / gold), read) if read else Scored(0.0, None)


def _vlmevalkit(case: Case) -> Scored:
    gold = _gold(case)
    if isinstance(gold, str):
        letter = find_letter(case.output)
        return Scored(float(letter == gold.upper()), letter)
    read = last_number(case.output)
    return Scored(mean_relative_accuracy(abs((float(read) - gold) / gold)), read) if read else Scored(0.0, None)


PROFILES: Mapping[str, Callable[[Case], Scored]] = {
    OFFICIAL: _official,
    LMMS_EVAL: _lmms_eval,
    VLMEVALKIT: _vlmevalkit,
}


def totals(cases: Sequence[Case], scores: Sequence[Scored], profile: str) -> Totals:
    """Each of the eight tasks, the levels of direction, `macro` over the eight, and `micro` over all cases.

    The `overall` of each profile is the macro. `absent` lists question types without a case, if there are any.
    In percent; lmms-eval's are fractions, rounded to six digits.
    """
    of_type = means(cases, scores)
    absent: list[str] = [name for name in (*NUMERIC, *MULTIPLE_CHOICE) if name not in of_type]
    found: dict[str, float | None] = {name: of_type.get(name) for name in (*TASKS, *DIRECTIONS)}
    levels = [of_type[name] for name in DIRECTIONS if name in of_type]
    found[DIRECTION] = sum(levels) / 3 if len(levels) == 3 else None
    tasks = [mean for name in TASKS if (mean := found[name]) is not None]
    found["macro"] = sum(tasks) / len(TASKS) if len(tasks) == len(TASKS) else None
    found["overall"] = found["macro"]
    found["micro"] = math.fsum(one.score for one in scores) / len(scores) if scores else None
    scaled = {name: None if mean is None else _scaled(mean, profile) for name, mean in found.items()}
    return scaled | {"absent": absent} if absent else scaled


def first_token(output: str) -> str:
    """The text before the first space, which no tab or line break replaces, without full stops at its end."""
    return output.strip().split(" ", 1)[0].rstrip(".").strip()


def _scaled(mean: float, profile: str) -> float:
    return round(mean, 6) if profile == LMMS_EVAL else 100 * mean


def _same_letter(token: str, gold: str) -> Scored:
    return Scored(float(token.lower() == gold.lower()), token or None)


def _gold(case: Case) -> str | float:
    """The letter, or the number, that is right. Raises `ScoringError`."""
    if case.question_type in MULTIPLE_CHOICE:
        if re.fullmatch("[A-Za-z]", case.gold):
            return case.gold
        raise ScoringError(f"case {case.id!r}: gold {case.gold!r} is no letter; {case.question_type} has A, B, C or D")
    if case.question_type not in NUMERIC:
        raise ScoringError(
            f"case {case.id!r}: question_type {case.question_type!r} is not in VSI-Bench; it has "
            f"{', '.join((*NUMERIC, *MULTIPLE_CHOICE))}"
        )
    number = _number(case.gold)
    if number is None:
        raise ScoringError(
            f"case {case.id!r}: gold {case.gold!r} is no number, or 0, and an error relative to it does not exist; "
            "correct the gold, or leave the case out"
        )
    return number


def _number(gold: str) -> float | None:
    """The number that a gold states, None where there is no error relative to it."""
    try:
        number = float(gold)
    except ValueError:
        return None
    return number if math.isfinite(number) and number != 0 else None


# lmms-eval: the number that comes first, in digits or in words.

_ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_VALUES = {word: value for value, word in enumerate(_ONES + _TEENS)}
_VALUES |= {word: 10 * value for value, word in enumerate(_TENS, start=2)} | {"hundred": 100, "thousand": 1000}
_DIGITS = re.compile(r"-?\d+(?:\.\d+)?")
_WORD = re.compile(r"[a-z]+")
_TOO_LARGE = 10**400


def first_number(output: str) -> str | None:
    """The first number as lmms-eval 0.7.3 reads it: digits as they stand, or the value of a run of English words.

    A run goes on over digits, hyphens and the word "and", and its parts are added up. "inf" for one beyond float64.
    """
    text = output.strip().lower()
    digits = _DIGITS.search(text)
    run: list[int] = []
    for word in _WORD.finditer(text):
        value = _VALUES.get(word[0])
        if value is not None:
            if not run and digits and digits.start() < word.start():
                break
            run.append(value)
        elif run and word[0] != "and":
            break
    if not run:
        return digits[0] if digits else None
    total = current = 0
    for value in run:
        if value == 1000:
            total, current = total + max(current, 1) * 1000, 0
        elif value == 100:
            current = max(current, 1) * 100
        else:
            current += value
        if current > _TOO_LARGE:
            return "inf"
    return str(total + current)


# VLMEvalKit: what an answer tag holds, else what stands last.

_ZERO_WIDTH = dict.fromkeys(map(ord, "\u200b\u200c\u200d\ufeff"))
_LEFT, _RIGHT = r"[(\[{（【]", r"[)\]}）】]"
_ANSWER_OPENS = re.compile(r"<\s*+answer\b", re.IGNORECASE)
_ANSWER_CLOSES = re.compile(r"<\s*+/\s*+answer\s*+>", re.IGNORECASE)
_THINK_CLOSES = re.compile(r"</\s*+think\s*+>", re.IGNORECASE)
_THINK_OPENS = re.compile(r"<\s*+think\s*+>", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(?:\d*\.\d+|\d+)(?:[eE][-+]?\d+)?")
_COUNT_WORDS = {word: str(value) for word, value in _VALUES.items() if value <= 20}
_COUNT_WORD = re.compile(rf"\b(?:{'|'.join(_COUNT_WORDS)})\b", re.IGNORECASE)

_TAIL_CHARACTERS, _TAIL_LINES = 800, 6
_SPACE = re.compile(r"\s*")
_FIRST_LETTER = re.compile("[A-Ja-j]", re.IGNORECASE)
_BEFORE_TAG = tuple(
    re.compile(rf"(?<![A-Za-z])([A-F])\s*+{_RIGHT}?+\s*+</\s*+{tag}\s*+>", re.IGNORECASE) for tag in ("answer", "think")
)
_OPTION_LINE = re.compile(r"[*_>\-\s]*(?:option|选项)\s+[A-J]\s*[:：]", re.IGNORECASE)
_LONE_LETTER = re.compile(r"[*_`>（）\[\]【】()]*\s*([A-Fa-f])\s*[*_`（）\[\]【】()]*")
_LABELLED = re.compile(r"([A-F])\s*[.．:：)\]】、-]\s", re.IGNORECASE)
# Blanks and brackets before a letter need no place in a pattern: a letter that follows them follows no letter.
_IN_LINE = re.compile(r"(?<![A-Za-z])([A-F])[*_`）\]})]*(?=$|[\s.,:;!?)\]】》」』，。；、：）])")
_AFTER_PHRASE = re.compile(
    r"(?:final\s*+answer|the\s*+answer\s*+is|answer(?:\s*+is)?+|correct\s*+answer"
    r"|答案|最终答案|结论|所以|因此|我选择?+|选择|选)"
    rf"\s*+[:：>＝=]?+\s*+{_LEFT}?+\s*+([A-F])\b",
    re.IGNORECASE,
)
_STANDALONE = re.compile(r"(?<![A-Za-z])([A-F])(?![A-Za-z])")


def find_letter(output: str) -> str | None:
    """The letter as VLMEvalKit's scorer of spatial benchmarks finds it at e8e78f0; the first of seven rules that hits.

    Its patterns are restated so that each takes time linear in the answer: no two neighbouring parts of one can match
    the same characters.
    """
    text = output.strip().translate(_ZERO_WIDTH)
    for start in _inside_answer(text):
        if letter := _FIRST_LETTER.match(text, start):
            if _ANSWER_CLOSES.search(text, letter.end()):
                return letter[0].upper()
            break
    tail = text[-_TAIL_CHARACTERS:]
    for pattern in _BEFORE_TAG:
        if found := pattern.search(tail):
            return found[1].upper()
    for part in (_after_thinking(text), tail):
        if picked := _from_last_lines(part):
            return picked
    if found := _AFTER_PHRASE.search(text):
        return found[1].upper()
    lines = [line for line in text.splitlines() if not _OPTION_LINE.match(line)]
    return _only({letter for line in lines for letter in _STANDALONE.findall(line)})


def last_number(output: str) -> str | None:
    """The number as VLMEvalKit's scorer of spatial benchmarks reads it at e8e78f0.

    It is the one that opens an answer tag whose text is followed by nothing but its end, else the last one after the
    thinking, else the last one anywhere. Of a Python list only the first element is looked at.
    """
    try:
        text = _first_of_list(output)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        # Square brackets around anything else: the harness gives up.
        return None
    text = _COUNT_WORD.sub(lambda word: _COUNT_WORDS.get(word[0].lower(), word[0]), text.strip().translate(_ZERO_WIDTH))
    for start in _inside_answer(text):
        if number := _NUMBER.match(text, start):
            next_tag = text.find("<", number.end())
            if next_tag >= 0 and _ANSWER_CLOSES.match(text, next_tag):
                return number[0]
    numbers = _NUMBER.findall(_after_thinking(text)) or _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def _inside_answer(text: str) -> Iterator[int]:
    """Where the text of each answer tag begins. Tags that share their closing bracket count once."""
    at = 0
    while opened := _ANSWER_OPENS.search(text, at):
        at = text.find(">", opened.end()) + 1
        if not at:
            return
        blank = _SPACE.match(text, at)
        yield blank.end() if blank else at


def _after_thinking(text: str) -> str:
    """What follows the last closing tag of thinking, else the last opening one; all of the text without either."""
    for pattern in (_THINK_CLOSES, _THINK_OPENS):
        if tags := list(pattern.finditer(text)):
            return text[tags[-1].end() :].strip()
    return text


def _from_last_lines(text: str) -> str | None:
    for line in reversed([line.strip() for line in text.splitlines()[-_TAIL_LINES:]]):
        if not line or _OPTION_LINE.match(line):
            continue
        if found := _LONE_LETTER.fullmatch(line) or _LABELLED.match(line):
            return found[1].upper()
        if only := _only(set(_IN_LINE.findall(line))):
            return only
    return None


def _only(letters: set[str]) -> str | None:
    return letters.pop() if len(letters) == 1 else None


def _first_of_list(output: str) -> str:
    bare = output.strip()
    if not (bare.startswith("[") and bare.endswith("]")):
        return output
    with warnings.catch_warnings():
        # About escapes in what a model wrote.
        warnings.simplefilter("ignore")
        values = ast.literal_eval(output)
    return str(values[0]) if isinstance(values, list) and values else output
