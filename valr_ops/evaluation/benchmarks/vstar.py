"""V*Bench: 191 questions about small things in large images, in two categories.

In: cases whose `question_type` is direct_attributes or relative_position, gold "B"; options only for VLMEvalKit.
Out: scores by lmms-eval or VLMEvalKit, and the totals.
Always: there is no `official` profile. The authors compare the likelihoods of the options' texts (penghao-wu/vstar
4ede664), which a generated answer does not have.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from valr_ops.evaluation.choices import by_can_infer, gold_letter, judged, mean, means
from valr_ops.evaluation.scoring import LMMS_EVAL, VLMEVALKIT, Case, Scored, Totals

CATEGORIES = ("direct_attributes", "relative_position")

_PLACES = tuple(
    re.compile(place, re.IGNORECASE)
    for place in (
        r"\A([A-D])",
        r"(?:ANSWER|CHOICE|OPTION)(?:\s+IS)?[\s:]+([A-D])",
        r"\(([A-D])\)",
        r"([A-D])\s*[.)\]]",
        r"(?:\A|\s)([A-D])(?:\s|\Z)",
    )
)
_LETTER = re.compile("[A-D]")


def lmms_eval(case: Case) -> Scored:
    """The first letter in the first of five places that has one, else the only A to D of the answer in upper case.

    A letter may begin or end a word, so "Answer: B" reads A and "Based on" reads B.
    """
    text = case.output.strip().upper()
    for place in _PLACES:
        if match := place.search(text):
            return judged(match[1], gold_letter(case))
    found = _LETTER.findall(text)
    return judged(found[0] if len(found) == 1 else None, gold_letter(case))


PROFILES = {LMMS_EVAL: lmms_eval, VLMEVALKIT: by_can_infer}


def totals(cases: Sequence[Case], scores: Sequence[Scored], profile: str) -> Totals:
    """`overall` over samples as the profile has it (lmms-eval in percent), `micro` and each category as fractions."""
    micro = mean(scores)
    percent = 100.0 if profile == LMMS_EVAL else 1.0
    return {"overall": None if micro is None else micro * percent, "micro": micro, **means(cases, scores)}
