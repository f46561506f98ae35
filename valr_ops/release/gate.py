"""The promotion gate: may this challenger take the champion's place?

In: two scores artifacts, of the champion and of the challenger, with one row an item; while the registry has no
champion, of the recipe's baseline in its place. The champion's are found by the digest that the registry keeps.
Out: a decision with its evidence, as `decision.json` for machines and `decision.md` for people, kept in a folder and
in MLflow; and the alias moved, where that is wanted and the gate, or a person with a reason, lets it.
Always: both answered the same items under the same budget, else nothing is decided; a benchmark passes by the lower end
of the interval of its paired difference and never by the difference itself; what the number of items can't show is
said; what the gate found stays beside the reason of a person who overrules it. A decision has no clocks and no names:
who moved the alias and when is the registry's.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from valr_ops.evaluation.ablation import compare, read_models
from valr_ops.evaluation.run import PREDICTIONS, SCORES, read_scores
from valr_ops.evaluation.statistics import percent, points
from valr_ops.recipe.recipe import Recipe
from valr_ops.recipe.secrets import redacted
from valr_ops.store import lineage
from valr_ops.store.artifacts import Ledger, directory_digest, folder
from valr_ops.store.lineage import CHALLENGER, CHAMPION

DECISION, DECISION_PAGE = "decision.json", "decision.md"


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
    needed: int | None
    """Items, about, with which the interval of a difference of zero would end at -delta; None for the target."""
    passes: bool


@dataclass(frozen=True)
class Decision:
    """What the gate found, and what a person said about it."""

    champion: Contender | None
    """Or the baseline in its place, while nobody is champion; None without either."""
    challenger: Contender
    first: bool
    """Whether nobody is champion yet."""
    target: str
    """The benchmark that has to rise."""
    delta: float
    confidence: float
    budgets: Mapping[str, Mapping[str, Any]]
    benchmarks: Mapping[str, Evidence]
    withdrawn: str | None = None
    """What a person said who rolled this model back from being champion; None where nobody did."""
    overruled: str = ""
    """Why a person promotes what the gate refuses; empty where nobody did."""

    @property
    def passes(self) -> bool:
        """Whether the gate by itself lets the challenger through."""
        return (
            self.withdrawn is None
            and bool(self.benchmarks)
            and all(evidence.passes for evidence in self.benchmarks.values())
        )

    @property
    def promotes(self) -> bool:
        """Whether the challenger may become champion."""
        return self.passes or bool(self.overruled)

    @property
    def reasons(self) -> list[str]:
        """One sentence for each thing that speaks against the challenger."""
        found = []
        if self.withdrawn is not None:
            said = f" ({self.withdrawn})" if self.withdrawn else ""
            found.append(f"This model was champion and was rolled back{said}; only a person brings it back.")
        if self.champion is None:
            found.append("There is no champion to compare with, nor scores of a baseline (release.baseline).")
        return found + [self._reason(name, one) for name, one in self.benchmarks.items() if not one.passes]

    @property
    def too_few(self) -> list[str]:
        """At most one sentence: benchmarks with which the gate would refuse an equally good model too, chance aside."""
        named = [
            f"{one.title} with {one.n:,} items (its interval reaches {100 * (one.difference - one.low):.1f}; it would "
            f"take about {one.needed:,} items)"
            for one in self.benchmarks.values()
            if one.needed is not None and one.needed > one.n
        ]
        if not named:
            return []
        return [
            f"Even an equally good model can't pass where its interval reaches more than {100 * self.delta:g} points "
            f"below zero: {', '.join(named)}."
        ]

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


def decide(
    champion: Path | None, challenger: Path, target: str, confidence: float, delta: float, first: bool = False
) -> Decision:
    """Compare two scores artifacts, item by item.

    Args:
        champion: scores of the model that serves now, or of a baseline; None where there are neither, and then only a
            person can let the challenger through.
        challenger: scores of the one that may replace it.
        target: the benchmark whose lower bound has to rise above 0.
        confidence: level of the two-sided intervals.
        delta: a share; no other benchmark's lower bound may fall below minus this.
        first: nobody is champion yet.

    Raises:
        GateError: a benchmark that only one of them was asked, or no such target.
        BudgetError: different budgets.
        ComparisonError: different items, or rules that score them.
        PredictionsError: no scores there, or not one row for every item.
    """
    if not 0.0 < delta < 1.0:
        raise GateError(f"delta={delta} is no share between 0 and 1; two points of accuracy are 0.02")
    models = read_models({CHALLENGER: challenger} | ({CHAMPION: champion} if champion else {}))
    asked = {name: set(scores["benchmarks"]) for name, (scores, _) in models.items()}
    if target not in asked[CHALLENGER]:
        raise GateError(
            f"target={target}, but the benchmarks are {', '.join(sorted(asked[CHALLENGER]))}; choose one of them by "
            "--target or release.target"
        )
    alone = sorted(asked[CHALLENGER] ^ asked.get(CHAMPION, asked[CHALLENGER]))
    if alone:
        raise GateError(
            f"only one of the two models was asked {', '.join(alone)}; score both on the same benchmarks, and name the "
            "champion's new scores by --champion"
        )
    table = compare(models, CHAMPION if champion else CHALLENGER, confidence)
    contenders = {name: Contender(**scores["model"]) for name, (scores, _) in models.items()}
    return Decision(
        champion=contenders.get(CHAMPION),
        challenger=contenders[CHALLENGER],
        first=first,
        target=target,
        delta=delta,
        confidence=confidence,
        budgets=table["budgets"],
        benchmarks={name: _evidence(one, name == target, delta) for name, one in sorted(table["benchmarks"].items())}
        if champion
        else {},
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
    return replace(decision, overruled=redacted(reason.strip()))


def require_champion(decision: Decision, digest: str) -> None:
    """Raise `GateError` unless the model that the challenger was compared with has this digest, the champion's."""
    if decision.champion is None or decision.champion.digest != digest:
        compared = f"{decision.champion.artifact} ({decision.champion.digest})" if decision.champion else "nobody"
        raise GateError(
            f"--champion has scores of {compared}, but the champion is {digest}; leave out --champion, score that one, "
            "or roll back to the other"
        )


def write_decision(decision: Decision, out: Path) -> None:
    """`decision.json` and `decision.md` into the folder `out`."""
    found = ("passes", "promotes", "reasons", "too_few", "unseen")
    values = asdict(decision) | {name: getattr(decision, name) for name in found}
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
    (out / DECISION).write_text(text + "\n", encoding="utf-8")
    (out / DECISION_PAGE).write_text(markdown(decision), encoding="utf-8")


def markdown(decision: Decision) -> str:
    """The decision as a page that says first what the gate says."""
    other = "baseline" if decision.first else CHAMPION
    if decision.passes:
        verdict = "The gate lets the challenger through."
    elif decision.overruled:
        verdict = f"The gate refuses; a person overruled it: {decision.overruled}"
    else:
        verdict = f"The gate refuses: the {CHAMPION} stays." if not decision.first else "The gate refuses."
    against = f" against {decision.champion.artifact}" if decision.champion else ""
    lines = [f"# {decision.challenger.artifact}{against}\n", f"**{verdict}**\n"]
    if decision.first and decision.champion:
        lines += [f"There is no champion to compare with; the baseline {decision.champion.artifact} takes its place.\n"]
    remarks = [*decision.reasons, *decision.too_few]
    lines += [*(f"- {remark}" for remark in remarks), *([""] if remarks else [])]
    if decision.champion:
        lines += [
            f"Rule: {decision.benchmarks[decision.target].title} has to rise, and nothing else may lose more than "
            f"{100 * decision.delta:g} points, both by the lower end of the {decision.confidence:.0%} interval of the "
            "paired difference.\n",
            f"| benchmark | n | {other} | challenger | difference | interval | gained | lost | bound | |",
            "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | --- |",
            *(
                f"| {one.title}{' (target)' if name == decision.target else ''} | {one.n} | {percent(one.champion)} "
                f"| {percent(one.challenger)} | {points(one.difference)} | {points(one.low)} to {points(one.high)} "
                f"| {one.gained} | {one.lost} | {points(one.bound)} | {'passes' if one.passes else 'fails'} |"
                for name, one in decision.benchmarks.items()
            ),
            "\n## What this can't see\n",
            *(f"- {sentence}" for sentence in decision.unseen),
            "",
        ]
    lines += ["## Whose scores\n"]
    if decision.champion:
        lines += [f"- {other}: {decision.champion.artifact}, `{decision.champion.digest}`"]
    lines += [f"- challenger: {decision.challenger.artifact}, `{decision.challenger.digest}`"]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Proposal:
    """What became of a challenger."""

    version: str
    """Of the challenger in the registry."""
    decision: Decision | None
    """None for the model that is champion already: nothing is decided about it."""
    folder: Path | None
    """Where the decision is kept."""
    moved: bool
    """Whether the challenger is champion now and was not before."""
    url: str | None
    """Address of the decision's run in MLflow; None while MLflow is away."""


def propose(
    root: Path,
    recipe: Recipe,
    challenger: Path,
    *,
    champion: Path | None = None,
    reason: str | None = None,
    moves: bool = True,
    out: Path | None = None,
) -> Proposal:
    """Register a scored model as challenger, let the gate decide, keep the decision, and move the alias.

    The same again changes nothing but what is missing, so that one that was interrupted is simply given again.

    Args:
        recipe: its section `release` is the rule.
        challenger: scores of the model, the folder of a stage or of `valr evaluate`.
        champion: scores of the champion in place of those that are known, and known from then on; or of a baseline.
        reason: why a person overrules the gate, if one does.
        moves: whether the challenger becomes champion where the decision promotes it.
        out: a new folder for the decision; without it one in ``.valr/decisions``, named by version and digest.

    Raises:
        GateError: nothing can be decided, nothing is to be overruled, or `out` holds something else.
        LineageError: the registry is away, or another machine made a champion meanwhile.
        BudgetError, ComparisonError, PredictionsError: as `decide`.
    """
    with lineage.release_lock(root):
        known = lineage.registered(root)
        model = Contender(**read_scores(challenger)["model"])
        scores = _remember(root, challenger)
        if model.digest == known.champion_digest:
            # Its scores may be newer than those that it became champion with.
            return Proposal(lineage.register(root, model.artifact, model.digest, scores), None, None, False, None)
        rule = recipe.release
        with _opponent(root, recipe, known, champion) as other:
            decision = decide(
                other, challenger, rule.target, recipe.evaluation.confidence, rule.delta, first=known.champion is None
            )
        if known.champion_digest is not None:
            require_champion(decision, known.champion_digest)
            if champion is not None and decision.champion is not None:
                lineage.register(root, decision.champion.artifact, known.champion_digest, _remember(root, champion))
        # Else the pipeline would promote by night what people took back by day.
        withdrawn = {known.digests.get(version): said for version, said in known.withdrawn.items()}
        decision = replace(decision, withdrawn=withdrawn.get(model.digest))
        if reason is not None:
            decision = overrule(decision, reason)
        version = lineage.register(root, model.artifact, model.digest, scores)
        kept, digest = _keep(decision, root, version, out)
        url = lineage.record(root, _record(decision, version, kept, digest, recipe))
        lineage.show_decision(root, version, markdown(decision), digest)
        moved = decision.promotes and moves
        if moved:
            how = "gate" if decision.passes else "overruled"
            lineage.promote(root, version, how, decision.overruled, digest, seen=known)
        return Proposal(version, decision, kept, moved, url)


@contextmanager
def _opponent(root: Path, recipe: Recipe, known: lineage.Registered, given: Path | None) -> Iterator[Path | None]:
    """Scores to compare with: those given, else the champion's, else the baseline's; None where there are none."""
    if given is not None:
        yield given
    elif known.champion is None:
        baseline = folder(root, f"scores_{recipe.release.baseline}") if recipe.release.baseline else None
        yield baseline if baseline and (baseline / SCORES).is_file() else None
    else:
        with tempfile.TemporaryDirectory() as place:
            yield _scores_of(root, known, known.champion, Path(place))


def _scores_of(root: Path, known: lineage.Registered, version: str, place: Path) -> Path:
    """The scores that a version was registered with, as a new folder: from DVC's cache, or first from its remote."""
    ledger, digests = Ledger(root), known.scores.get(version, {})
    why = "" if ledger.has_remote() else ", and there is no remote"
    for name, digest in digests.items():
        files = _cached(ledger, digest)
        if not files and ledger.has_remote():
            why = f", and not in its remote either{_fetch(ledger, digest)}"
            files = _cached(ledger, digest)
        if files:
            (place / name).mkdir()
            for file, data in files.items():
                (place / name / file).write_bytes(data)
            return place / name
    wanted = ", ".join(f"{name} {digest}" for name, digest in digests.items()) or "none were registered"
    raise GateError(
        f"the scores of the champion, version {version} ({wanted}), are not in DVC's cache{why}; score its model again "
        "and name the folder by --champion"
    )


def _remember(root: Path, scores: Path) -> dict[str, str]:
    """Digest of scores by their name; DVC's cache has them from now on, wherever they were made."""
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.transfer import transfer

    cache = Ledger(root).repo.cache.local
    staged, _, tree = build(cache, str(scores), cache.fs, "md5")
    transfer(staged, cache, {tree.hash_info}, shallow=False)
    return {scores.name: str(tree.hash_info.value)}


def _cached(ledger: Ledger, digest: str) -> dict[str, bytes]:
    """What the gate reads of scores; empty unless DVC's cache has all of it."""
    files = {file: ledger.read(digest, file) for file in (SCORES, PREDICTIONS)}
    whole = {file: data for file, data in files.items() if data is not None}
    return whole if len(whole) == len(files) else {}


def _fetch(ledger: Ledger, digest: str) -> str:
    """Copy an artifact from DVC's remote to its cache; in brackets why that failed, or nothing."""
    from dvc.exceptions import DvcException
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import ObjectFormatError

    cloud = ledger.repo.cloud
    try:
        cloud.transfer(
            cloud.get_remote_odb(None, "pull"), ledger.repo.cache.local, [HashInfo("md5", digest)], shallow=False
        )
    except (DvcException, ObjectFormatError, OSError) as error:
        return f" ({type(error).__name__})"
    return ""


def _keep(decision: Decision, root: Path, version: str, out: Path | None) -> tuple[Path, str]:
    """The folder that holds the decision, and its digest; written whole or not at all, and once."""
    decisions = root / ".valr" / "decisions"
    staged = decisions / ".partial"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    write_decision(decision, staged)
    digest = directory_digest(staged)
    final = out or decisions / f"{version}-{digest[:12]}"
    if not final.exists():
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(staged, final)
    elif directory_digest(final) != digest:
        raise GateError(f"{final} holds something else than this decision; give a new folder by --out")
    shutil.rmtree(staged, ignore_errors=True)
    return final, digest


def _record(decision: Decision, version: str, kept: Path, digest: str, recipe: Recipe) -> lineage.RunRecord:
    """The decision as a flat run of its own, the same one however often it is recorded."""
    figures = ("champion", "challenger", "difference", "low", "high", "detectable")
    return lineage.RunRecord(
        stage="promotion",
        group="release",
        output_digest=digest,
        # Inputs are what artifacts are made from; the digests of the models are among the tags.
        input_digests={},
        recipe_fingerprint=recipe.fingerprint,
        git_commit="",
        code_digest="",
        parameters={"release": recipe.release.model_dump(mode="json"), "evaluation.confidence": decision.confidence},
        summary={
            "passes": int(decision.passes),
            "promotes": int(decision.promotes),
            **{
                f"{name}/{figure}": getattr(one, figure)
                for name, one in decision.benchmarks.items()
                for figure in figures
            },
        },
        timings={},
        artifact=kept,
        files=(DECISION, DECISION_PAGE),
        tables={"Decision": markdown(decision)},
        tags={
            "mlflow.source.name": "valr release promote",
            "release.version": version,
            "release.challenger": decision.challenger.digest,
            "release.champion": decision.champion.digest if decision.champion else "",
            "release.overruled": decision.overruled,
        },
        id=hashlib.sha256(f"{version} {digest}".encode()).hexdigest()[:32],
    )


def _evidence(benchmark: Mapping[str, Any], is_target: bool, delta: float) -> Evidence:
    of = {row["model"]: row for row in benchmark["rows"]}
    against = of[CHALLENGER]["against_reference"]
    bound = 0.0 if is_target else -delta
    # An interval narrows with the root of the number of items.
    needed = math.ceil(against["n"] * ((against["difference"] - against["low"]) / delta) ** 2)
    return Evidence(
        title=benchmark["title"],
        champion=of[CHAMPION]["accuracy"],
        challenger=of[CHALLENGER]["accuracy"],
        **{name: against[name] for name in ("n", "difference", "low", "high", "gained", "lost", "test", "detectable")},
        bound=bound,
        needed=None if is_target else needed,
        passes=against["low"] > bound if is_target else against["low"] >= bound,
    )
