"""RealWorldQA: 765 questions about photographs, mostly from cars; each ends with how it wants to be answered.

In: cases with gold "B", or open ones such as "0" or "Downhill"; options only for VLMEvalKit, which has made the open
questions ones of choice.
Out: scores by lmms-eval or VLMEvalKit, and the sample mean. The authors published no scorer.
Always: an open answer is right only if it is the gold text, but for letter case, white space around and full stops.
"""

from __future__ import annotations

from collections.abc import Sequence

from valr_ops.evaluation.choices import USUAL_LETTERS, by_can_infer, extract_letter, judged, mean
from valr_ops.evaluation.scoring import LMMS_EVAL, VLMEVALKIT, Case, Scored, Totals


def lmms_eval(case: Case) -> Scored:
    """The shared extractor's letter where the gold is A to D in any letter case, else equality of texts."""
    gold = case.gold.strip()
    if len(gold) == 1 and gold.upper() in USUAL_LETTERS:
        return judged(extract_letter(case.output), gold.upper())
    text = case.output.lower().strip().rstrip(".")
    return Scored(float(text == gold.lower()), text or None)


PROFILES = {LMMS_EVAL: lmms_eval, VLMEVALKIT: by_can_infer}


def totals(cases: Sequence[Case], scores: Sequence[Scored], profile: str) -> Totals:
    """`overall` and `micro`: the sample mean, in every profile."""
    return {"overall": mean(scores), "micro": mean(scores)}
