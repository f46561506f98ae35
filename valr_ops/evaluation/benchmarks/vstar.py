"""V*Bench: 191 questions about small things in large images, in two categories.

In: `craigwu/vstar_bench` on disk, a table of questions and a folder of images for each category; or cases whose
`question_type` is direct_attributes or relative_position, gold "B"; options only for VLMEvalKit.
Out: items in file order; scores by lmms-eval or VLMEvalKit, and the totals.
Always: a question is the authors' text, with its options in the order that they shuffled them into; in the file beside
each image the right one comes first. There is no `official` profile. The authors compare the likelihoods of the
options' texts (penghao-wu/vstar 4ede664), which a generated answer does not have.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from valr_ops.evaluation.benchmarks import Item, Picture
from valr_ops.evaluation.benchmarks.folder import Folder
from valr_ops.evaluation.choices import by_can_infer, gold_letter, judged, mean, means
from valr_ops.evaluation.scoring import LMMS_EVAL, VLMEVALKIT, Case, Scored, Totals

COUNTS = {"direct_attributes": 115, "relative_position": 76}
"""Questions of each category."""
CATEGORIES = tuple(COUNTS)
SOURCE = "get it with `hf download craigwu/vstar_bench --repo-type dataset --revision COMMIT --local-dir FOLDER`"
_OPTION = re.compile(r"^\(([A-Z])\) *(.*?)\s*$", re.MULTILINE)

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


def read(folder: Folder) -> list[Item]:
    """The questions of `test_questions.jsonl`; their text has a line for each option, and the instruction.

    Raises:
        BenchmarkError: a missing table or image, or a row without text, options, known category or an option's letter.
    """
    items = []
    for row in folder.rows("test_questions.jsonl", ()):
        category, text = row.one_of("category", CATEGORIES), row.text("text")
        options = tuple(option for _, option in _OPTION.findall(text))
        items.append(
            Item(
                id=f"{category}/{row.text('question_id')}",
                benchmark=folder.benchmark,
                question=text,
                gold=row.letter("label", len(options)),
                options=options,
                question_type=category,
                images=(Picture(row.text("image")),),
            )
        )
    pictures = (picture.file for item in items for picture in item.images if isinstance(picture, Picture))
    folder.require(pictures, "images are")
    return items


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
