"""MMHalu (MMHal-Bench): 96 open questions about photographs, whose answers a language model rates from 0 to 6.

In: cases whose `output` is what the model said; for the profile with recorded judgements, what the judge said of it.
`question_type` is the data set's; without one it is the case's place modulo 8, in the order of the file.
Out: ratings from 0 to 6, and the hallucination rate: the share of ratings below 3, so lower is better.
Always: without a judge there is no score, and every case is unresolved. A judgement with no rating, or with two, is 0
and counts as a hallucination, as the authors have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from valr_ops.evaluation.choices import mean, means
from valr_ops.evaluation.scoring import OFFICIAL, Case, Scored

RECORDED = f"{OFFICIAL}+judge:recorded"
"""Profile for judgements that were made elsewhere: `output` is the text of one."""
HIGHEST = 6
_FIRST_WITHOUT_HALLUCINATION = 3
_TYPES = 8


def official(case: Case) -> Scored:
    """Unresolved: the authors rate every answer by a language model."""
    return Scored(0.0, None, resolved=False)


def recorded(case: Case) -> Scored:
    """The rating in a judgement."""
    found = rating(case.output)
    return Scored(0.0, None) if found is None else Scored(float(found), str(found))


def rating(judgement: str) -> int | None:
    """The one rating that a judgement states as ``rating: N``, None where it states none or several."""
    lower = judgement.lower()
    found = [number for number in range(HIGHEST + 1) if f"rating: {number}" in lower]
    return found[0] if len(found) == 1 else None


PROFILES = {OFFICIAL: official, RECORDED: recorded}


def totals(cases: Sequence[Case], scores: Sequence[Scored], profile: str) -> dict[str, float | None]:
    """`hallucination_rate`, `mean_rating` and the mean rating of each type; None while a case is unresolved."""
    whole = bool(scores) and all(scored.resolved for scored in scores)
    typed = [
        case if case.question_type else replace(case, question_type=f"type_{number % _TYPES}")
        for number, case in enumerate(cases)
    ]
    low = sum(scored.score < _FIRST_WITHOUT_HALLUCINATION for scored in scores)
    return {
        "hallucination_rate": low / len(scores) if whole else None,
        "mean_rating": mean(scores) if whole else None,
        **{name: value if whole else None for name, value in means(typed, scores).items()},
    }
