"""MMHalu (MMHal-Bench): 96 open questions about photographs, whose answers a language model rates from 0 to 6.

In: `response_template.json` of `Shengcao1006/MMHal-Bench`, and in `images/` its photographs, each named as at the end
of its `image_src` or IMAGE_ID.jpg (the data set gives addresses, and nothing is fetched); or cases whose `output` is
what the model said; for the profile with recorded judgements, what the judge said of it.
`question_type` is the data set's; without one it is the case's place modulo 8, in the order of the file.
Out: items in file order; ratings from 0 to 6, and the hallucination rate: the share of ratings below 3, so lower is
better.
Always: without a judge there is no score, and every case is unresolved. A judgement with no rating, or with two, is 0
and counts as a hallucination, as the authors have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from valr_ops.evaluation.benchmarks import Item, Picture
from valr_ops.evaluation.benchmarks.folder import Folder, Row
from valr_ops.evaluation.choices import mean, means
from valr_ops.evaluation.scoring import OFFICIAL, Case, Scored

COUNTS = {"": 96}
"""Questions: twelve of each of eight types."""
SOURCE = (
    "get it with `hf download Shengcao1006/MMHal-Bench --repo-type dataset --revision COMMIT --local-dir FOLDER`, then "
    "put the photograph behind each image_src into FOLDER/images under its own name or as IMAGE_ID.jpg"
)
_TEMPLATE = "response_template.json"
_ENDINGS = (".jpg", ".jpeg", ".png")

RECORDED = f"{OFFICIAL}+judge:recorded"
"""Profile for judgements that were made elsewhere: `output` is the text of one."""
FULL_SCORE = 6
_FIRST_WITHOUT_HALLUCINATION = 3
_TYPES = 8


def read(folder: Folder) -> list[Item]:
    """The questions of the template; the gold is the answer that a person wrote, the id is the place in the file.

    The options are what the photograph shows, which a judge has to know.

    Raises:
        BenchmarkError: a missing template or photograph, or a question without its fields.
    """
    rows = folder.json(_TEMPLATE)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise folder.error(f"{_TEMPLATE} is no list of objects")
    items = [
        Item(
            id=str(row.number),
            benchmark=folder.benchmark,
            question=row.text("question"),
            gold=row.text("gt_answer"),
            options=row.texts("image_content"),
            question_type=row.text("question_type"),
            images=(Picture(_photograph(row)),),
        )
        for row in (Row(folder, _TEMPLATE, number, values) for number, values in enumerate(rows))
    ]
    folder.require((image.file for item in items for image in item.images if isinstance(image, Picture)), "images are")
    return items


def _photograph(row: Row) -> str:
    """The file of a question's photograph; where there is none, the one that its address names."""
    named = PurePosixPath(urlsplit(row.text("image_src")).path).name
    by_id = PurePosixPath(row.text("image_id")).name
    expected = [f"images/{name}" for name in (named, *(by_id + ending for ending in _ENDINGS))]
    return next(filter(row.folder.has, expected), expected[0])


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
    found = [number for number in range(FULL_SCORE + 1) if f"rating: {number}" in lower]
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
