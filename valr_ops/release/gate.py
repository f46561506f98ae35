"""The promotion gate: may this challenger take the champion's place?

In: two scores artifacts, of the champion and of the challenger, with one row an item.
Out: a decision with its evidence, as `decision.json` for machines and `decision.md` for people.
Always: both answered the same items under the same budget, else nothing is decided; a benchmark passes by the lower end
of the interval of its paired difference and never by the difference itself; what the number of items can't show is
said; a person who overrules gives a reason, and what the gate found stays beside it. No clocks and no names in here:
who moved the alias and when is the registry's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from valr_ops.evaluation.ablation import compare, read_models
from valr_ops.evaluation.statistics import percent, points

DECISION, DECISION_PAGE = "decision.json", "decision.md"
CHAMPION, CHALLENGER = "champion", "challenger"
DELTA = 0.02
"""The largest loss, as a share of the full score, that a release may risk on any benchmark."""


class GateError(ValueError):
    """Nothing can be decided: which scores, why, and what to give instead."""


@dataclass(frozen=True)
class Contender:
    """Whose scores they are."""

    artifact: str
    digest: str
    """Of the model's folder, as its scores name it."""


@dataclass(frozen=True)
class Evidence:
    """The challenger minus the champion on one benchmark; shares of the full score."""

    title: str
    n: int
    champion: float
    challenger: float
    difference: float
    low: float
    high: float
    """Ends of the interval of the paired difference."""
    gained: int
    lost: int
    """Items on which the challenger is better, and worse."""
    test: str
    detectable: float
    """Smallest true difference that as many items show with a probability of 0.8."""
    bound: float
    """What `low` has to exceed: 0 for the target, else -delta, which it may also equal."""
    passes: bool


@dataclass(frozen=True)
class Decision:
    """What the gate found, and what a person said about it."""

    champion: Contender
    challenger: Contender
    target: str
    """The benchmark that has to rise."""
    delta: float
    confidence: float
    budgets: Mapping[str, Mapping[str, Any]]
    benchmarks: Mapping[str, Evidence]
    overruled: str = ""
    """Why a person promotes what the gate refuses; empty where nobody did."""

    @property
    def passes(self) -> bool:
        """Whether the gate by itself lets the challenger through."""
        return all(evidence.passes for evidence in self.benchmarks.values())

    @property
    def promotes(self) -> bool:
        """Whether the challenger becomes champion."""
        return self.passes or bool(self.overruled)

    @property
    def reasons(self) -> list[str]:
        """One sentence a benchmark that did not pass."""
        return [self._reason(name, one) for name, one in self.benchmarks.items() if not one.passes]

    @property
    def unseen(self) -> list[str]:
        """One sentence a benchmark on what its number of items can't show."""
        return [
            f"{one.title}: {one.n:,} items show a true difference of {100 * one.detectable:.1f} points four times out "
            f"of five; a loss of up to {100 * max(0.0, -one.low):.1f} points is not excluded."
            for one in self.benchmarks.values()
        ]

    def _reason(self, name: str, one: Evidence) -> str:
        interval = f"{points(one.difference)} points, {points(one.low)} to {points(one.high)}"
        if name == self.target:
            return f"{one.title} has to rise, but zero is not excluded ({interval})."
        return f"{one.title} may have lost more than {100 * self.delta:g} points ({interval})."


def decide(champion: Path, challenger: Path, target: str, confidence: float, delta: float = DELTA) -> Decision:
    """Compare two scores artifacts, item by item.

    Args:
        champion: scores of the model that serves now.
        challenger: scores of the one that may replace it.
        target: the benchmark whose lower bound has to rise above 0.
        confidence: level of the two-sided intervals.
        delta: a share; no benchmark's lower bound may fall below minus this.

    Raises:
        GateError: a benchmark that only one of them was asked, or no such target.
        BudgetError: different budgets.
        ComparisonError: different items, or rules that score them.
        PredictionsError: no scores there, or not one row for every item.
    """
    if not 0.0 <= delta < 1.0:
        raise GateError(f"delta={delta} is no share in [0, 1); two points of accuracy are 0.02")
    models = read_models({CHAMPION: champion, CHALLENGER: challenger})
    asked = {name: set(scores["benchmarks"]) for name, (scores, _) in models.items()}
    alone = sorted(asked[CHAMPION] ^ asked[CHALLENGER])
    if alone:
        raise GateError(
            f"only one of {champion.name} and {challenger.name} was asked {', '.join(alone)}; score both on the same "
            "benchmarks"
        )
    if target not in asked[CHAMPION]:
        raise GateError(f"target={target}, but the benchmarks are {', '.join(sorted(asked[CHAMPION]))}; choose of them")
    table = compare(models, CHAMPION, confidence)
    return Decision(
        champion=Contender(**models[CHAMPION][0]["model"]),
        challenger=Contender(**models[CHALLENGER][0]["model"]),
        target=target,
        delta=delta,
        confidence=confidence,
        budgets=table["budgets"],
        benchmarks={name: _evidence(one, name == target, delta) for name, one in sorted(table["benchmarks"].items())},
    )


def overrule(decision: Decision, reason: str) -> Decision:
    """`decision` with a person's reason to promote all the same.

    Raises:
        GateError: no reason, or nothing to overrule.
    """
    if not reason.strip():
        raise GateError("whoever overrules the gate says why: --overrule REASON")
    if decision.passes:
        raise GateError("the gate lets this challenger through by itself; leave out --overrule")
    return replace(decision, overruled=reason.strip())


def require_champion(decision: Decision, digest: str | None) -> None:
    """Raise `GateError` unless the decision is about the model that is champion in the registry.

    Args:
        digest: of the champion; None while there is none, and then any model may be compared with.
    """
    if digest is not None and decision.champion.digest != digest:
        raise GateError(
            f"--champion has scores of {decision.champion.artifact} ({decision.champion.digest}), but the champion is "
            f"{digest}; score that one, or roll back to the other"
        )


def write_decision(decision: Decision, out: Path) -> None:
    """`decision.json` and `decision.md` into the folder `out`."""
    values = asdict(decision) | {name: getattr(decision, name) for name in ("passes", "promotes", "reasons", "unseen")}
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
    (out / DECISION).write_text(text + "\n", encoding="utf-8")
    (out / DECISION_PAGE).write_text(markdown(decision), encoding="utf-8")


def markdown(decision: Decision) -> str:
    """The decision as a page that says first what happens."""
    if decision.passes:
        verdict = "The challenger becomes champion."
    elif decision.overruled:
        verdict = f"The gate refuses; a person overruled it: {decision.overruled}"
    else:
        verdict = "The champion stays."
    lines = [
        f"# {decision.challenger.artifact} against {decision.champion.artifact}\n",
        f"**{verdict}**\n",
        *(f"- {reason}" for reason in decision.reasons),
        *([""] if decision.reasons else []),
        f"Rule: {decision.benchmarks[decision.target].title} has to rise, and nothing may lose more than "
        f"{100 * decision.delta:g} points, both by the lower end of the {decision.confidence:.0%} interval of the "
        "paired difference.\n",
        "| benchmark | n | champion | challenger | difference | interval | gained | lost | bound | |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | --- |",
        *(
            f"| {one.title}{' (target)' if name == decision.target else ''} | {one.n} | {percent(one.champion)} "
            f"| {percent(one.challenger)} | {points(one.difference)} | {points(one.low)} to {points(one.high)} "
            f"| {one.gained} | {one.lost} | {points(one.bound)} | {'passes' if one.passes else 'fails'} |"
            for name, one in decision.benchmarks.items()
        ),
        "\n## What this can't see\n",
        *(f"- {sentence}" for sentence in decision.unseen),
        "\n## Whose scores\n",
        f"- champion: {decision.champion.artifact}, `{decision.champion.digest}`",
        f"- challenger: {decision.challenger.artifact}, `{decision.challenger.digest}`",
    ]
    return "\n".join(lines) + "\n"


def _evidence(benchmark: Mapping[str, Any], is_target: bool, delta: float) -> Evidence:
    of = {row["model"]: row for row in benchmark["rows"]}
    against = of[CHALLENGER]["against_reference"]
    bound = 0.0 if is_target else -delta
    return Evidence(
        title=benchmark["title"],
        champion=of[CHAMPION]["accuracy"],
        challenger=of[CHALLENGER]["accuracy"],
        **{name: against[name] for name in ("n", "difference", "low", "high", "gained", "lost", "test", "detectable")},
        bound=bound,
        passes=against["low"] > bound if is_target else against["low"] >= bound,
    )
