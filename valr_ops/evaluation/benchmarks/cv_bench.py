"""CV-Bench: counting and relations in 2D, depth and distance in 3D, from three sources.

In: `nyu-visionx/CV-Bench` on disk, a parquet file for 2D and one for 3D; or cases whose `question_type` is the source
(ade, coco, omni, or the data set's ADE20K, COCO, Omni3D), gold "(C)", options the texts of the choices.
Out: items in file order, 2D first; scores by the authors' rule (cambrian-mllm/cambrian 539ffc3), lmms-eval or
VLMEvalKit, and the totals.
Always: the authors read one character after their cuts, so "The answer is: B" reads the colon; and their script for
omni cuts more than the two for 2D.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_lowercase

from valr_ops.evaluation.benchmarks import Item
from valr_ops.evaluation.benchmarks.folder import Folder
from valr_ops.evaluation.choices import by_can_infer, gold_letter, judged, mean, means
from valr_ops.evaluation.scoring import LMMS_EVAL, OFFICIAL, VLMEVALKIT, Case, Scored, ScoringError, Totals

COUNTS = {"ade": 633, "coco": 805, "omni": 1200}
"""Questions from each source."""
SOURCE = "get it with `hf download nyu-visionx/CV-Bench --repo-type dataset --revision COMMIT --local-dir FOLDER`"
_ASK = "Answer with the option's letter from the given choices directly."
_SOURCES = {"ade": "ade", "ade20k": "ade", "coco": "coco", "omni": "omni", "omni3d": "omni"}
_AT_START = re.compile(r"[(\s]*([A-Z])", re.IGNORECASE)


def read(folder: Folder) -> list[Item]:
    """The questions of `test_2d.parquet` and `test_3d.parquet`, the authors' instruction in a line after their prompt.

    Raises:
        BenchmarkError: a missing file, or a row without prompt, choices, image, known source or the letter of a choice.
    """
    items = []
    for name in (*folder.find("test_2d.parquet"), *folder.find("test_3d.parquet")):
        for row in folder.rows(name, ("idx", "type", "prompt", "choices", "answer", "source"), ("image",)):
            options = row.texts("choices")
            items.append(
                Item(
                    id=f"{row.text('type')}/{row.text('idx')}",
                    benchmark=folder.benchmark,
                    question=f"{row.text('prompt')}\n{_ASK}",
                    gold=row.letter("answer", len(options)),
                    options=options,
                    question_type=_SOURCES[row.one_of("source", ("ADE20K", "COCO", "Omni3D")).lower()],
                    images=row.pictures(),
                )
            )
    return items


def source(case: Case) -> str:
    """ade, coco or omni. Raises `ScoringError` for another `question_type`."""
    try:
        return _SOURCES[case.question_type.lower()]
    except KeyError:
        raise ScoringError(
            f"case {case.id!r}: question_type {case.question_type!r} is no source of CV-Bench; give ade, coco or omni"
        ) from None


def official(case: Case) -> Scored:
    """The first character after the last "answer is" or "answer:", an opening bracket dropped, in any letter case."""
    omni = source(case) == "omni"
    gold = gold_letter(case).lower()
    text = case.output.lower().strip()
    for cue in ("answer is", "answer:"):
        text = text.rpartition(cue)[2]
    text = text.strip().rstrip(".:," if omni else ".").lstrip("(").rstrip(")")
    read = text[:1]
    scored = judged(read or None, gold)
    # The script for omni takes the right option's text as well, which only an option of one character can be.
    if omni and read == dict(zip(ascii_lowercase, case.options)).get(gold):
        return Scored(1.0, scored.extracted)
    return scored


def lmms_eval(case: Case) -> Scored:
    """The letter at the start after opening brackets, whatever word it begins: "The answer" reads T."""
    match = _AT_START.match(case.output.strip())
    return judged(match[1].upper() if match else None, gold_letter(case))


PROFILES = {OFFICIAL: official, LMMS_EVAL: lmms_eval, VLMEVALKIT: by_can_infer}


def totals(cases: Sequence[Case], scores: Sequence[Scored], profile: str) -> Totals:
    """`overall` as the profile has it, `micro` over samples, each source, `2d` and `3d` as the profile has them.

    `2d` is the mean of ade and coco, for lmms-eval the mean over their samples; `3d` is omni. `overall` is the mean of
    `2d` and `3d`, for lmms-eval the sample mean; VLMEvalKit has two data sets and no number for both: None. What needs
    a source without a case is None, and `absent` lists such sources.
    """
    by_source = means(cases, scores, source)
    micro = mean(scores)
    ade, coco, omni = by_source.get("ade"), by_source.get("coco"), by_source.get("omni")
    flat: float | None = None
    if ade is not None and coco is not None:
        flat = (ade + coco) / 2
        if profile == LMMS_EVAL:
            flat = mean([scored for case, scored in zip(cases, scores) if source(case) != "omni"])
    overall = micro if profile == LMMS_EVAL else None
    if profile == OFFICIAL and flat is not None and omni is not None:
        overall = 1 / 2 * (flat + omni)
    absent = [name for name in ("ade", "coco", "omni") if name not in by_source]
    found = {"overall": overall, "micro": micro, **by_source, "2d": flat, "3d": omni}
    return found | {"absent": absent} if absent else found
