"""MMStar: 1,500 questions that can't be answered without the image, in 6 categories of 3 sub-categories each.

In: cases whose `question_type` is the sub-category, or else the category; gold "B"; options only for VLMEvalKit.
Out: scores by the authors' rule (MMStar-Benchmark/MMStar 79e6d1c), lmms-eval or VLMEvalKit, and the totals.
Always: the authors read one character and no more, so "Above all" reads A.
"""

from __future__ import annotations

from collections.abc import Sequence

from valr_ops.evaluation.choices import by_can_infer, extract_letter, gold_letter, judged, mean, means
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
_OPENINGS = ("(", "option ", "the answer is ")


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
