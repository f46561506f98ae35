"""MMStar: 1,500 questions that can't be answered without the image, in 6 categories of 3 sub-categories each.

In: `Lin-Chen/MMStar` on disk, one parquet file whose questions contain their options; or cases whose `question_type`
is the sub-category, or else the category; gold "B"; options only for VLMEvalKit.
Out: items in file order; scores by the authors' rule (MMStar-Benchmark/MMStar 79e6d1c), lmms-eval or VLMEvalKit, and
the totals.
Always: the instruction after a question is lmms-eval's, which has no full stop. The authors read one character and no
more, so "Above all" reads A.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from valr_ops.evaluation.benchmarks import Item
from valr_ops.evaluation.benchmarks.folder import Folder
from valr_ops.evaluation.choices import USUAL_LETTERS, by_can_infer, extract_letter, gold_letter, judged, mean, means
from valr_ops.evaluation.scoring import LMMS_EVAL, OFFICIAL, VLMEVALKIT, Case, Scored, Totals

CATEGORIES = {
    "coarse perception": ("image scene and topic", "image style & quality", "image emotion"),
    "fine-grained perception": ("object counting", "recognition", "localization"),
    "instance reasoning": (
        "single-instance reasoning",
        "cross-instance attribute reasoning",
        "cross-instance relation reasoning",
    ),
    "logical reasoning": ("code & sequence reasoning", "diagram reasoning", "common reasoning"),
    "science & technology": (
        "biology & chemistry & physics",
        "electronics & energy & mechanical eng.",
        "geography & earth science & agriculture",
    ),
    "math": ("geometry", "numeric commonsense and calculation", "statistical reasoning"),
}
_CATEGORY_OF = {part: category for category, parts in CATEGORIES.items() for part in parts}
COUNTS = {"": 1500}
SOURCE = "get it with `hf download Lin-Chen/MMStar --repo-type dataset --revision COMMIT --local-dir FOLDER`"
_ASK = "Answer with the option's letter from the given choices directly"
_LIST = re.compile("(?:Options|Choices):")
_MARK = re.compile(r"(?:^|,?\s)\s*(?:([A-D]):|\(([A-D])\))\s*")
_OPENINGS = ("(", "option ", "the answer is ")


def read(folder: Folder) -> list[Item]:
    """The questions of `mmstar.parquet`.

    Raises:
        BenchmarkError: a missing file, or a row without question, image, known sub-category or a letter from A to D.
    """
    items = []
    for name in folder.find("mmstar.parquet", "data/val-*.parquet"):
        for row in folder.rows(name, ("index", "question", "answer", "l2_category"), ("image",)):
            question = row.text("question")
            items.append(
                Item(
                    id=row.text("index"),
                    benchmark=folder.benchmark,
                    question=f"{question}\n{_ASK}",
                    gold=row.letter("answer", len(USUAL_LETTERS)),
                    options=stated_options(question),
                    question_type=row.one_of("l2_category", _CATEGORY_OF),
                    images=row.pictures(),
                )
            )
    return items


def stated_options(question: str) -> tuple[str, ...]:
    """The options that a question ends in, ``Options: A: red, B: blue`` or ``Choices:\\n(A) red\\n(B) blue``.

    Options of the text "nan" are gaps of the data set and left out. Empty where the letters are not A, B and so on.
    """
    _, *parts = _MARK.split(_LIST.split(question)[-1].strip())
    letters = [colon or bracket for colon, bracket in zip(parts[::3], parts[1::3], strict=True)]
    if "".join(letters) != USUAL_LETTERS[: len(letters)]:
        return ()
    return tuple(text.strip() for text in parts[2::3] if text.strip() != "nan")


def official(case: Case) -> Scored:
    """The first character, or the one after an opening bracket, "option" or "the answer is", in any letter case."""
    text = case.output.lower().strip().replace("\n", " ")
    opening = next((opening for opening in _OPENINGS if text.startswith(opening)), "")
    return judged(text[len(opening) :][:1] or None, gold_letter(case).lower())


def lmms_eval(case: Case) -> Scored:
    """The shared extractor's letter among A to D; lower-case letters are not read."""
    return judged(extract_letter(case.output), gold_letter(case))


PROFILES = {OFFICIAL: official, LMMS_EVAL: lmms_eval, VLMEVALKIT: by_can_infer}


def totals(cases: Sequence[Case], scores: Sequence[Scored], profile: str) -> Totals:
    """`overall` as the profile has it, `micro` over samples, `l2_macro` over the 18 sub-categories, and each of them.

    `overall` is the sample mean, for lmms-eval the mean over sub-categories. The authors divide by 1,500 and by 250 a
    category, which is the same where no case is missing. `l2_macro` is None unless the sub-categories are the 18;
    then `absent` lists those without a case.
    """
    by_type = means(cases, scores)
    by_category = means(cases, scores, lambda case: _CATEGORY_OF.get(case.question_type, case.question_type))
    macro = sum(by_type.values()) / len(_CATEGORY_OF) if by_type.keys() == _CATEGORY_OF.keys() else None
    micro = mean(scores)
    absent = [part for part in _CATEGORY_OF if part not in by_type]
    found = {
        "overall": macro if profile == LMMS_EVAL else micro,
        "micro": micro,
        "l2_macro": macro,
        **by_category,
        **by_type,
    }
    return found | {"absent": absent} if absent else found
