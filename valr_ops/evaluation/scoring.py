"""Scores of answers by the rules that a benchmark's authors, or a harness, published: cases in, scores out.

In: cases, each with the gold answer and what a model said, and the name of a profile. Out: a score a case with what was
read out of the answer, and on demand the benchmark's totals.
Always: a profile does exactly what its name says, ties and float64 included, and nothing is guessed where it would have
asked a language model: such a case is `unresolved`, counts as wrong and is counted. No model and no data set is needed.
Where a `Judge` is given, it is asked about those cases, and the profile's name says so.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import orjson

OFFICIAL, LMMS_EVAL, VLMEVALKIT = "official", "lmms-eval@0.7.3", "vlmevalkit@e8e78f0"

JUDGED_BY = "+judge:"
"""Between a profile and the judge's model in the name of a judged profile."""

BENCHMARKS = (
    "vsi_bench",
    "blink",
    "mmvp",
    "mmstar",
    "vstar",
    "cv_bench",
    "math_vista",
    "math_vision",
    "mm_halu",
    "realworldqa",
    "hr_bench",
    "jsonl",
)
"""Modules of `valr_ops.evaluation.benchmarks` that score."""

Totals = Mapping[str, float | str | list[str] | None]
"""Totals by name. One is None where a part of it is missing; another names the parts, or what the cases are."""


class ScoringError(ValueError):
    """Cases that can't be scored: the message names file, line, field and what is expected."""


@dataclass(frozen=True, slots=True)
class Case:
    """One answer to be scored."""

    id: str
    gold: str
    """In the data set's own form, such as ``(B)``; of a number or a list, its JSON text."""
    output: str
    """What the model said."""
    question_type: str = ""
    """Task, sub-task, category or source: what the rules and totals of the benchmark are divided by."""
    options: tuple[str, ...] = ()
    """In the data set's own form; one element where that form is one text."""
    where: str = ""
    """File and line that the case was read from."""
    question: str = ""
    """The words put to the model, which only a judge reads."""


@dataclass(frozen=True, slots=True)
class Scored:
    """The score of one case."""

    score: float
    """In [0, 1]; 0 to 6 for mm_halu."""
    extracted: str | None
    """What the rule read out of the answer; None where nothing could be read."""
    resolved: bool = True
    """False where the profile would have asked a language model, and there is none, or it did not settle the case."""
    problem: str = ""
    """Why a judge did not settle it."""


class Rules(Protocol):
    """What a benchmark's module offers."""

    PROFILES: Mapping[str, Any]
    """By profile a function ``(Case) -> Scored``, which raises `ScoringError` for a case that no rule fits. The first
    one is the default: `official` where it can be computed from answers alone."""

    def totals(self, cases: Sequence[Case], scores: Sequence[Scored], profile: str) -> Totals:
        """The benchmark's totals by name, as the profile computes them."""


class Judge(Protocol):
    """A language model that settles unresolved cases; `valr_ops.evaluation.judge.open_judge` makes one."""

    model: str
    replies: Path
    """File that judgements are appended to."""

    def settle(self, cases: Sequence[Case], scores: Sequence[Scored], benchmark: str, profile: str) -> list[Scored]:
        """The scores of `profile` with every unresolved one judged that could be, in order."""

    def report(self) -> Mapping[str, Any]:
        """Who judged how many cases, at what cost, and what failed."""


def rules_of(benchmark: str) -> Rules:
    """The rules of a benchmark. Raises `ScoringError` for an unknown name."""
    if benchmark not in BENCHMARKS:
        raise ScoringError(f"there is no benchmark {benchmark!r}; choose one of {', '.join(BENCHMARKS)}")
    module: Any = importlib.import_module(f"valr_ops.evaluation.benchmarks.{benchmark}")
    return module


def score(cases: Sequence[Case], benchmark: str, profile: str, judge: Judge | None = None) -> list[Scored]:
    """The scores of `cases`, in order; with a judge those of the profile ``PROFILE+judge:MODEL``.

    Raises:
        ScoringError: an unknown benchmark or profile, a profile that names a judge beside another one, or a case that
            no rule fits.
        JudgeError: see `judge.Judge.settle`.
    """
    rules = rules_of(benchmark)
    if profile not in rules.PROFILES:
        raise ScoringError(f"{benchmark} has no profile {profile!r}; its profiles are {', '.join(rules.PROFILES)}")
    if judge and JUDGED_BY in profile:
        raise ScoringError(f"{benchmark} by {profile} is judged already; take another profile, or leave --judge out")
    rule = rules.PROFILES[profile]
    scores: list[Scored] = []
    for case in cases:
        try:
            scores.append(rule(case))
        except ScoringError as error:
            raise ScoringError(f"{case.where}: {error}" if case.where else str(error)) from None
    return judge.settle(cases, scores, benchmark, profile) if judge else scores


def score_file(
    source: Path,
    target: Path,
    benchmark: str,
    profile: str | None = None,
    aggregate: bool = False,
    judge: Judge | None = None,
) -> dict[str, Any]:
    """Score the cases in `source` and write a line each, in order, to `target`, which appears whole or not at all.

    Args:
        source: JSON lines with ``id``, ``gold``, ``output`` and where the benchmark has them ``question_type`` and
            ``options``; for a judge ``question``, and for mm_halu as ``options`` what the photograph shows. Other
            fields are not read.
        target: JSON lines with ``id`` as it was given, ``score``, ``extracted`` and ``resolved``; with a judge also
            ``problem``, which is empty for a case that is settled.
        benchmark: one of `BENCHMARKS`.
        profile: the benchmark's default without one.
        aggregate: also compute the benchmark's totals.
        judge: asked about the cases that the profile would send to a language model.

    Returns:
        ``benchmark``, ``profile``, ``n``, ``mean``, the number of ``unresolved`` cases, the report of the ``judge`` if
        there is one, and ``totals`` if asked for.

    Raises:
        ScoringError: a case, the benchmark or the profile is unusable, or a file can't be read or written.
        JudgeError: the judge can't be asked, or not any more.
    """
    rules = rules_of(benchmark)
    profile = profile or next(iter(rules.PROFILES))
    numbered = list(read_cases(source))
    if target.exists() and (not target.is_file() or target.samefile(source)):
        raise ScoringError(f"{target} holds the cases or is no file; give --out a file of its own")
    if judge and judge.replies.resolve() in (source.resolve(), target.resolve()):
        raise ScoringError(f"{judge.replies} is where judgements go; give the cases and --out files of other names")
    cases = [case for _, case in numbered]
    scores = score(cases, benchmark, profile, judge)
    # Before anything is written: totals may refuse the cases as well.
    totals = {"totals": dict(rules.totals(cases, scores, profile))} if aggregate else {}
    _write(
        target,
        (
            {"id": name, "score": one.score, "extracted": one.extracted, "resolved": one.resolved}
            | ({"problem": one.problem} if judge else {})
            for (name, _), one in zip(numbered, scores, strict=True)
        ),
    )
    return {
        "benchmark": benchmark,
        "profile": f"{profile}{JUDGED_BY}{judge.model}" if judge else profile,
        "n": len(scores),
        "mean": math.fsum(one.score for one in scores) / len(scores),
        "unresolved": sum(not one.resolved for one in scores),
        **({"judge": dict(judge.report())} if judge else {}),
        **totals,
    }


def read_cases(path: Path) -> Iterator[tuple[str | int, Case]]:
    """The id of every case as it was given, and the case; see `score_file`. Raises `ScoringError`."""
    lines: dict[str, str] = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                row = _parsed(line, where)
                case = _case(row, where)
                if case.id in lines:
                    raise ScoringError(f"{where}: id {case.id!r} was already in {lines[case.id]}; keep one of the two")
                lines[case.id] = where
                yield row["id"], case
    except OSError as error:
        raise ScoringError(f"{path} can't be read ({error.strerror}); give --in a file of JSON lines") from None
    if not lines:
        raise ScoringError(f"{path} has no cases; write one JSON object a line, with id, gold and output")


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        row = _parsed_slowly(line, where)
    if not isinstance(row, dict):
        raise ScoringError(f"{where}: {_kind(row)} where an object with id, gold and output is expected")
    return row


def _parsed_slowly(line: bytes, where: str) -> Any:
    """By the standard library, which reads half a surrogate pair and says more about an error."""
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ScoringError(f"{where}: byte {error.start} is not UTF-8; write the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ScoringError(
            f"{where}: column {error.colno} is not JSON ({error.msg}); write one object a line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ScoringError(f"{where} is not JSON that can be read ({error}); write one object a line") from None


def _case(row: Mapping[str, Any], where: str) -> Case:
    for field in ("id", "gold", "output"):
        if field not in row:
            raise ScoringError(f"{where}: {field} is missing; the fields are {', '.join(sorted(row)) or 'none'}")
    name, output, question_type, options = row["id"], row["output"], row.get("question_type"), row.get("options")
    question = row.get("question")
    if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
        raise ScoringError(f"{where}: id is {_kind(name)}; give text or a whole number")
    if not isinstance(output, str):
        raise ScoringError(f"{where}: output is {_kind(output)}; give what the model said as text, empty for nothing")
    if not isinstance(question_type, str | None):
        raise ScoringError(f"{where}: question_type is {_kind(question_type)}; give text")
    if not isinstance(question, str | None):
        raise ScoringError(f"{where}: question is {_kind(question)}; give the words put to the model as text")
    if not isinstance(options, str | list | None):
        raise ScoringError(f"{where}: options is {_kind(options)}; give a list of texts")
    choices = [options] if isinstance(options, str) else options or []
    return Case(
        id=str(name),
        gold=_text(row["gold"], f"{where}: gold", json.dumps),
        output=output,
        question_type=question_type or "",
        options=tuple(_text(choice, f"{where}: an option") for choice in choices),
        where=where,
        question=question or "",
    )


def _text(value: object, what: str, of_list: Any = None) -> str:
    """`value` if it is text, else the JSON text of a number, or of a list if `of_list` writes it."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return json.dumps(value)
    if isinstance(value, list) and of_list is not None:
        return str(of_list(value))
    raise ScoringError(f"{what} is {_kind(value)}; give it as the data set does, such as {'(B)'!r}")


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return "empty" if value == "" else kinds.get(type(value), f"the number {value}"[:40])


def _write(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        try:
            with partial.open("wb") as file:
                file.writelines(map(_line, rows))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ScoringError(f"{path} can't be written ({error.strerror}); give --out a file in a folder") from None


def _line(row: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(row) + b"\n"
    except TypeError:
        # Half a surrogate pair in what was read out of an answer.
        return json.dumps(row).encode() + b"\n"
