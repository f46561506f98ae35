"""MMVP: pairs of images that CLIP takes for alike, one question to both, whose answers are opposite.

In: `MMVP/MMVP` on disk, a table of questions and a folder of images, or `lmms-lab-eval/MMVP`, one parquet file; or
cases whose id holds the question's Index, 1 to 300, and whose gold is ``(a)`` or ``(b)``.
Out: items in file order, their options in the one text that the data set has; 0 or 1 a case; `single` accuracy over
cases and `pair` accuracy over pairs, which are never to be mixed up.
Always: Index 1 and 2 are a pair, 3 and 4 the next, in whatever order the cases come. A gold is the one of the files.

The authors' own score asks GPT-4 about each answer, so `official` leaves every case unresolved and is not the default.
Sources: tsb0601/MMVP, scripts/gpt_grader.py; lmms-eval 0.7.3, tasks/mmvp; VLMEvalKit e8e78f0.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from valr_ops.evaluation.benchmarks import Item, Picture
from valr_ops.evaluation.benchmarks.folder import Folder
from valr_ops.evaluation.choices import can_infer, can_infer_letter, gold_letter, judged, mean, separate
from valr_ops.evaluation.scoring import LMMS_EVAL, OFFICIAL, VLMEVALKIT, Case, Scored, ScoringError, Totals

COUNTS = {"": 300}
SOURCE = (
    "get it with `hf download MMVP/MMVP --repo-type dataset --revision COMMIT --local-dir FOLDER`, or with four labels "
    "corrected as lmms-lab-eval/MMVP"
)
CORRECTED = {99: "B", 100: "A", 279: "B", 280: "A"}
"""Right letters by Index where the original labels are swapped (tsb0601/MMVP#30, lmms-eval#1018).

`lmms-lab-eval/MMVP` has them corrected; the original and VLMEvalKit's copy have not. A case is scored against the gold
it comes with, and the totals say which labels those were."""

_LETTERS = "AB"
_INDEX = re.compile(r"\d+")
# In this order; the last one takes any a or b before a blank, such as that of "camera".
_LETTER_RULES = (
    re.compile(r"\A\(?([AB])\)?(?:[.\s]|\Z)", re.IGNORECASE),
    re.compile(r"answer\s+is\s+\(?([AB])", re.IGNORECASE),
    re.compile(r"option\s+\(?([AB])", re.IGNORECASE),
    re.compile(r"([AB])\)?(?:\s|\Z)", re.IGNORECASE),
    re.compile(r"\A([AB])", re.IGNORECASE),
)


def read(folder: Folder) -> list[Item]:
    """The questions of `Questions.csv` with the images of `MMVP Images`, else of `data/train-*.parquet`.

    The authors put question and options into one line and add no instruction.

    Raises:
        BenchmarkError: a missing table or image, or a row without Index, question, options or one of the two letters.
    """
    items = []
    for name in folder.find("Questions.csv", "data/train-*.parquet"):
        for row in folder.rows(name, ("Index", "Question", "Options", "Correct Answer"), ("image",)):
            # One version of the authors' file has a small L in its heading.
            index = row.text("Index", "lndex")
            if not index.isdecimal() or index.startswith("0"):
                raise row.error(f"Index is {index!r} where a number from 1 on is expected")
            options = row.text("Options")
            items.append(
                Item(
                    id=index,
                    benchmark=folder.benchmark,
                    question=f"{row.text('Question')} {options}",
                    gold=row.letter("Correct Answer", len(_LETTERS)),
                    options=(options,),
                    cluster=f"pair {(int(index) + 1) // 2}",
                    images=row.pictures() if row.images else (Picture(f"MMVP Images/{index}.jpg"),),
                )
            )
    pictures = (picture.file for item in items for picture in item.images if isinstance(picture, Picture))
    folder.require(pictures, "images are")
    return items


def read_letter(output: str) -> str | None:
    """The letter as lmms-eval 0.7.3 reads it, or None."""
    text = output.strip()
    for rule in _LETTER_RULES:
        if found := rule.search(text):
            return found[1].upper()
    return None


def _lmms_eval(case: Case) -> Scored:
    return judged(read_letter(case.output), _gold(case))


def _vlmevalkit(case: Case) -> Scored:
    gold, options = _gold(case), separate(case.options)
    letter = can_infer(case.output, options) if options else can_infer_letter(case.output, _LETTERS)
    return judged(letter, gold) if letter else Scored(0.0, None, resolved=False)


def _official(case: Case) -> Scored:
    _gold(case)
    return Scored(0.0, None, resolved=False)


PROFILES: Mapping[str, Callable[[Case], Scored]] = {
    LMMS_EVAL: _lmms_eval,
    VLMEVALKIT: _vlmevalkit,
    OFFICIAL: _official,
}


def totals(cases: Sequence[Case], scores: Sequence[Scored], profile: str) -> Totals:
    """`single` over cases, `pair` over pairs with both right, and the `label_set` of the golds; fractions.

    `pair` is None, and `incomplete_pairs` lists their Index, where a case has lost its partner. `label_set` is
    `original`, `corrected` or `mixed` by the four swapped labels, None without any of them.

    Raises:
        ScoringError: an id without an Index, or an Index twice.
    """
    right: dict[int, bool] = {}
    for case, scored in zip(cases, scores, strict=True):
        index = _index(case)
        if index in right:
            raise ScoringError(f"case {case.id!r}: MMVP has one question of Index {index}, and here are two")
        right[index] = scored.score == 1
    pairs: defaultdict[int, list[bool]] = defaultdict(list)
    for index, both in right.items():
        pairs[(index - 1) // 2].append(both)
    alone = sorted(index for index in right if len(pairs[(index - 1) // 2]) < 2)
    found: dict[str, float | str | list[str] | None] = {"single": mean(scores), "pair": None}
    if alone:
        found["incomplete_pairs"] = list(map(str, alone))
    elif pairs:
        found["pair"] = sum(map(all, pairs.values())) / len(pairs)
    return found | {"label_set": label_set(cases)}


def label_set(cases: Sequence[Case]) -> str | None:
    """Whether the golds are the `original` or the `corrected` ones, `mixed`, or None if no case tells."""
    told = {_gold(case) == CORRECTED[index] for case in cases if (index := _index(case)) in CORRECTED}
    if len(told) == 2:
        return "mixed"
    return None if not told else "corrected" if told.pop() else "original"


def _gold(case: Case) -> str:
    letter = gold_letter(case)
    if letter not in _LETTERS:
        raise ScoringError(f"case {case.id!r}: gold {case.gold!r} is neither (a) nor (b)")
    return letter


def _index(case: Case) -> int:
    numbers = _INDEX.findall(case.id)
    if not numbers or int(numbers[-1]) < 1:
        raise ScoringError(
            f"case {case.id!r}: no Index in the id, by which MMVP pairs its questions; write it like mmvp_7 or 7"
        )
    return int(numbers[-1])
