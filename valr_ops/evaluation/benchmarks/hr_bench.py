"""HR-Bench: 200 questions about images of 4K or 8K, each asked four times with its four options rotated.

In: cases whose `question_type` is single or cross, gold "B", options the texts of A to D.
Out: scores by lmms-eval or VLMEvalKit, and the totals.
Always: what either would send to a language model is unresolved. lmms-eval carries an older matcher of its own, which
takes a lone letter anywhere in the answer and options' texts in an answer of any length.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase

from valr_ops.evaluation.choices import (
    USUAL_LETTERS,
    by_can_infer,
    gold_letter,
    judged,
    mean,
    means,
    only_option_within,
    sole_letter,
)
from valr_ops.evaluation.scoring import LMMS_EVAL, VLMEVALKIT, Case, Scored, Totals


def lmms_eval(case: Case) -> Scored:
    """The only letter among the answer's words, else the only option whose text occurs in it."""
    letter, _ = sole_letter(case.output, ascii_uppercase[: len(case.options)] or USUAL_LETTERS)
    letter = letter or only_option_within(case.output.strip().lower(), case.options)
    return judged(letter, gold_letter(case)) if letter else Scored(0.0, None, resolved=False)


PROFILES = {LMMS_EVAL: lmms_eval, VLMEVALKIT: by_can_infer}


def totals(cases: Sequence[Case], scores: Sequence[Scored], profile: str) -> Totals:
    """`overall` and `micro` over samples, and each category.

    Both harnesses average the four rotations' means, which is the sample mean, because each rotation asks every
    question once.
    """
    return {"overall": mean(scores), "micro": mean(scores), **means(cases, scores)}
