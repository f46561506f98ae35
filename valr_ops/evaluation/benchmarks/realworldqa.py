"""RealWorldQA: 765 questions about photographs, mostly from cars; each ends with how it wants to be answered.

In: the parquet files of `xai-org/RealworldQA`; or cases with gold "B", or open ones such as "0" or "Downhill"; options
only for VLMEvalKit, which has made the open questions ones of choice, so that its profile refuses an open one.
Out: items in file order, in the data set's own words; scores by lmms-eval or VLMEvalKit, and the sample mean. The
authors published no scorer.
Always: an open answer is right only if it is the gold text, but for letter case, white space around and full stops.
"""

from __future__ import annotations

from collections.abc import Sequence

from valr_ops.evaluation.benchmarks import Item
from valr_ops.evaluation.benchmarks.folder import Folder
from valr_ops.evaluation.choices import USUAL_LETTERS, by_can_infer, extract_letter, judged, mean
from valr_ops.evaluation.scoring import LMMS_EVAL, VLMEVALKIT, Case, Scored, Totals

COUNTS = {"": 765}
"""Questions; the data set has no types."""
SOURCE = (
    "get it with `hf download xai-org/RealworldQA --repo-type dataset --revision COMMIT --local-dir FOLDER`; its "
    "licence allows no changed copies"
)


def read(folder: Folder) -> list[Item]:
    """The questions of all parts of the split; the id is the place in it, because there is no column of ids.

    Raises:
        BenchmarkError: no parquet file, or a row without its fields.
    """
    rows = [
        row
        for name in folder.find("data/test*.parquet", "test*.parquet")
        for row in folder.rows(name, ["question", "answer"], ["image"])
    ]
    return [
        Item(
            id=str(number),
            benchmark=folder.benchmark,
            question=row.text("question"),
            gold=row.text("answer"),
            images=row.pictures(),
        )
        for number, row in enumerate(rows)
    ]


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
