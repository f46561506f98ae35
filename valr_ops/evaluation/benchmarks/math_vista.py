"""MathVista testmini: 1,000 questions of mathematics in pictures, of choice or with an integer, a decimal or a list.

In: `testmini*.parquet` of `AI4Math/MathVista`; or cases with the gold answer, which for choices is the option's text,
and options the texts of the choices. `question_type` is the data set's question or answer type: multi_choice, text,
free_form, integer, float or list. For free_form the gold says which; the precision of a decimal is the number of
decimals of its gold, or N in "float:N".
Out: items in file order, in the authors' ready wording; scores by the authors' normalisation (lupantech/MathVista),
lmms-eval or VLMEvalKit; and the totals.
Always: the authors have a language model shorten the answer first, and take the option nearest by edit distance where
the result is none of the options. Here the answer is normalised as it is, and where nothing can be read of it, it is
unresolved.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase

from valr_ops.evaluation.benchmarks import Item
from valr_ops.evaluation.benchmarks.folder import Folder, Row
from valr_ops.evaluation.choices import can_infer, mean, means
from valr_ops.evaluation.scoring import LMMS_EVAL, OFFICIAL, VLMEVALKIT, Case, Scored, ScoringError

COUNTS = {"": 1000}
"""Questions of testmini. The answers of the larger test split are withheld."""
SOURCE = (
    "get it with `hf download AI4Math/MathVista --repo-type dataset --revision COMMIT --include 'data/testmini*' "
    "--local-dir FOLDER`"
)
_COLUMNS = ("pid", "query", "choices", "precision", "answer", "question_type", "answer_type")

_BRACKETED = re.compile(r"\(([a-zA-Z])\)")
_INTEGER = re.compile(r"\s*[+-]?[0-9]+\s*")
_TYPES = ("multi_choice", "text", "free_form", "integer", "float", "list")


def read(folder: Folder) -> list[Item]:
    """The questions of `testmini*.parquet`; the type is multi_choice, or that of the answer.

    Raises:
        BenchmarkError: no such file, or a row without its fields.
    """
    return [
        Item(
            id=row.text("pid"),
            benchmark=folder.benchmark,
            question=row.text("query"),
            gold=row.one_of("answer", options) if options else row.text("answer"),
            options=options,
            question_type="multi_choice" if options else _answer_type(row),
            images=row.pictures(),
        )
        for name in folder.find("testmini*.parquet", "data/testmini*.parquet")
        for row in folder.rows(name, _COLUMNS, ["decoded_image"])
        for options in [row.texts("choices") if row.text("question_type") == "multi_choice" else ()]
    ]


def _answer_type(row: Row) -> str:
    """The answer type, of a decimal with its precision if the gold has another number of decimals."""
    kind = row.one_of("answer_type", ("integer", "float", "list"))
    if kind != "float":
        return kind
    precision = int(float(row.text("precision")))
    return kind if precision == _decimals(row.text("answer")) else f"float:{precision}"


def official(case: Case) -> Scored:
    """Equality of the normalised answer with the gold."""
    return _normalised(case, case.output)


def lmms_eval(case: Case) -> Scored:
    """The same with white space around answer and gold left out."""
    found = _normalised(case, case.output.strip())
    if found.extracted is None:
        return found
    return Scored(float(found.extracted.strip() == case.gold.strip()), found.extracted)


def _normalised(case: Case, output: str) -> Scored:
    kind, precision = _kind(case)
    if kind == "multi_choice":
        read = _option(output, case.options)
    elif kind == "list":
        read = output if _is_list(output) or output == case.gold else None
    else:
        read = _number(output, precision)
    if read is None:
        # An empty answer is not sent to a model; of options the nearest one would still be taken.
        return Scored(0.0, None, resolved=not output and kind != "multi_choice")
    return Scored(float(read == case.gold), read)


def _option(output: str, options: Sequence[str]) -> str | None:
    """The option that the first ``(X)`` names, or a bare letter, or the whole answer."""
    if output in options:
        return output
    text = output.strip()
    bracketed = _BRACKETED.search(text)
    if bracketed:
        text = bracketed[1].upper()
    letters = ascii_uppercase[: len(options)]
    if len(text) == 1 and text in letters:
        return options[letters.index(text)]
    return text if text in options else None


def _is_list(text: str) -> bool:
    return text.strip().startswith("[") and text.strip().endswith("]")


def _number(text: str, precision: int | None) -> str | None:
    """An integer where `precision` is None, cut towards zero, else a decimal rounded to it."""
    try:
        value = float(text)
        return str(int(value)) if precision is None else str(round(value, precision))
    except (ValueError, OverflowError):
        return None


def vlmevalkit(case: Case) -> Scored:
    """The option by `can_infer`, or a number that is right as it stands; for everything else a model would be asked.

    A right 0 is asked for too, since the harness takes the value for a failure, and so is every list.
    """
    kind, precision = _kind(case)
    if kind == "multi_choice":
        letter = can_infer(case.output, case.options)
        if letter is None:
            return Scored(0.0, None, resolved=False)
        return Scored(float(letter == ascii_uppercase[case.options.index(case.gold)]), letter)
    if kind == "number":
        cast = int if precision is None else float
        try:
            value, gold = cast(case.output), cast(case.gold)
        except (ValueError, OverflowError):
            value = gold = 0
        if value and value == gold:
            return Scored(1.0, str(value))
    return Scored(0.0, None, resolved=False)


def _vlmevalkit_extracted(case: Case) -> Scored:
    """How VLMEvalKit compares what its judge extracted: as above, a 0 counts, and a list is never right."""
    kind, precision = _kind(case)
    if kind == "number":
        cast = int if precision is None else float
        try:
            return Scored(float(cast(case.output) == cast(case.gold)), case.output)
        except (ValueError, OverflowError):
            return Scored(0.0, case.output)
    return vlmevalkit(case) if kind == "multi_choice" else Scored(0.0, case.output)


PROFILES = {OFFICIAL: official, LMMS_EVAL: lmms_eval, VLMEVALKIT: vlmevalkit}
EXTRACTED = {VLMEVALKIT: _vlmevalkit_extracted}
"""Rules for what a judge extracted, where they are others than for a raw answer."""


def totals(cases: Sequence[Case], scores: Sequence[Scored], profile: str) -> dict[str, float | None]:
    """`overall`, the sample mean in every profile, as is `micro`; and each question type.

    lmms-eval prints no number where nothing is right: there `overall` is None.
    """
    average = mean(scores)
    return {
        "overall": None if profile == LMMS_EVAL and not average else average,
        "micro": average,
        **means(cases, scores),
    }


def _kind(case: Case) -> tuple[str, int | None]:
    """multi_choice, list or number; and the decimals of a number, None for an integer.

    Raises:
        ScoringError: a type that the data set has not, or a gold that is none of the options.
    """
    stated, _, decimals = case.question_type.partition(":")
    if (stated and stated not in _TYPES) or (decimals and (stated != "float" or not decimals.isdigit())):
        raise ScoringError(
            f"case {case.id!r}: question_type {case.question_type!r} is none of {', '.join(_TYPES)}, float:N"
        )
    if stated in ("multi_choice", "text") or (not stated and case.options):
        if case.gold not in case.options[: len(ascii_uppercase)]:
            raise ScoringError(
                f"case {case.id!r}: gold {case.gold!r} is the text of none of its {len(case.options)} options; "
                "give gold and options as the data set does"
            )
        return "multi_choice", None
    if stated == "list" or (stated != "integer" and stated != "float" and _is_list(case.gold)):
        return "list", None
    if stated == "integer" or (stated != "float" and _INTEGER.fullmatch(case.gold)):
        return "number", None
    return "number", int(decimals) if decimals else _decimals(case.gold)


def _decimals(gold: str) -> int:
    return len(gold.strip().partition(".")[2])
