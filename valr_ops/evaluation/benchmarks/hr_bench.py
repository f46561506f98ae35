"""HR-Bench: 200 questions about images of 4K or 8K, each asked four times with its four options rotated.

In: `hr_bench_4k.parquet` or `hr_bench_8k.parquet` of `DreamMr/HR-Bench`, whose scores are two figures; or cases whose
`question_type` is single or cross, gold "B", options the texts of A to D.
Out: items in file order, the four rotations of a question one cluster; scores by lmms-eval or VLMEvalKit, and the
totals.
Always: what either would send to a language model is unresolved. lmms-eval carries an older matcher of its own, which
takes a lone letter anywhere in the answer and options' texts in an answer of any length.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from string import ascii_uppercase

from valr_ops.evaluation.benchmarks import Item
from valr_ops.evaluation.benchmarks.folder import Folder, Row
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

COUNTS = {"": 800}
"""Questions of either size: 200, each four times."""
SOURCE = (
    "get it with `hf download DreamMr/HR-Bench hr_bench_4k.parquet --repo-type dataset --revision COMMIT --local-dir "
    "FOLDER`, and hr_bench_8k.parquet into a folder of its own"
)
_ROTATIONS = 4
_COLUMNS = ("index", "question", *USUAL_LETTERS, "answer", "category")
_ASK = "Answer the option letter directly."


def read(folder: Folder) -> list[Item]:
    """The questions of the one parquet file, in the wording of lmms-eval.

    Raises:
        BenchmarkError: no parquet file or both, or a row without its fields.
    """
    names = folder.find("hr_bench_*.parquet", "data/hr_bench_*.parquet")
    if len(names) > 1:
        raise folder.error(f"{folder.root} holds {' and '.join(names)}: give each a folder and a benchmark of its own")
    rows = list(folder.rows(names[0], _COLUMNS, ["image"]))
    return [
        Item(
            id=row.text("index"),
            benchmark=folder.benchmark,
            question="\n".join([row.text("question").strip(), *_lines(options), _ASK]),
            gold=row.letter("answer", len(options)),
            options=options,
            question_type=row.text("category"),
            cluster=cluster,
            images=row.pictures(),
        )
        for row, cluster in zip(rows, _clusters(rows), strict=True)
        for options in [_options(row)]
    ]


def _options(row: Row) -> tuple[str, ...]:
    return tuple(map(row.text, USUAL_LETTERS))


def _lines(options: Sequence[str]) -> list[str]:
    return [f"{letter}. {text}" for letter, text in zip(USUAL_LETTERS, options)]


def _clusters(rows: Sequence[Row]) -> list[str]:
    """For each row the place of its question. Rotations have question and options in common.

    Some questions are asked with the same options about several images; only of these are the images compared.
    """
    keys: list[tuple[object, ...]] = [(row.text("question"), frozenset(_options(row))) for row in rows]
    frequency = Counter(keys)
    keys = [
        (*key, hashlib.sha256(row.folder.picture(row.pictures()[0])).digest()) if frequency[key] > _ROTATIONS else key
        for row, key in zip(rows, keys, strict=True)
    ]
    places: dict[tuple[object, ...], str] = {}
    return [places.setdefault(key, str(len(places))) for key in keys]


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
