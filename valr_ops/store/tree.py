"""The lineage of an artifact: from its scores back to weights, data, sources, recipe, code and command, and onwards.

In: a stage's name. Out: a tree for people, and the same as one JSON document. What was made from what is read in
dvc.lock, what an artifact says of itself in its files, who made it from which commit in MLflow's runs; a version that
dvc.lock has forgotten is followed through the runs alone.
Always: everything is about one version, named by its digest, never about a file that happens to lie there now; what
can't be known here (a folder that is elsewhere, a server that is away) is named, and the rest is told all the same.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from valr_ops.stages import RECIPE_FILE, UnknownStageError, dvc_target, stage
from valr_ops.store.artifacts import ArtifactError, Ledger
from valr_ops.store.lineage import LineageError, RecordedRun, find_runs

_SHOWN_DIGITS = 10
_SHOWN_CHARACTERS = 160
_PIPED_COLUMNS = 240


@dataclass(frozen=True)
class Version:
    """One artifact in one version, and how it was made."""

    stage: str
    digest: str
    inputs: Mapping[str, str]
    """Digest of each input artifact, by stage name."""
    fields: Mapping[str, Any]
    """The recipe fields that it depends on, with their values when it was made."""
    code: tuple[str, ...]
    """Files of the code that it depends on; empty where dvc.lock has forgotten the version."""
    changed_code: tuple[str, ...]
    """Those of them that are different now."""
    code_digest: str
    run: RecordedRun | None
    """What the tracking server knows of its making."""
    summary: Mapping[str, Any] | None
    """Its counts and scores; None where the artifact is not on this machine."""


@dataclass(frozen=True)
class Source:
    """One source of records."""

    format: str
    drawn: bool
    """Made by the generator, not given by the user."""
    files: int
    bytes: int
    digest: str
    """MD5 over the names, sizes and digests of its files."""
    licenses: Mapping[str, int] | None
    """Records of the corpus by their licence; None where the corpus is not on this machine."""


@dataclass(frozen=True)
class Lineage:
    """Everything that is known about where one artifact came from and what became of it."""

    version: Version
    upstream: tuple[Version, ...]
    """All that it was made from, the nearest first."""
    downstream: tuple[Version, ...]
    """All that was made from it, the nearest first."""
    sources: Mapping[str, Source]
    teachers: Mapping[str, Mapping[str, Any]]
    """Model, licence and fingerprint of the weights, by teacher."""
    benchmarks: Mapping[str, Mapping[str, Any]]
    git_commit: str
    """Of the code that made it; else that which recorded it in dvc.lock; else empty."""
    missing: tuple[str, ...]
    """What could not be found out, and how to change that."""


def trace(root: Path, name: str) -> Lineage:
    """The lineage of the artifact of stage `name`, as it was last recorded.

    Raises:
        UnknownStageError: no such stage. ArtifactError: it was never made.
    """
    tracer = _Tracer(root)
    if name not in tracer.recorded:
        stage(name)
        raise ArtifactError(f"{name} was not made yet, so it has no lineage; make it with: valr materialize +{name}")
    (version,) = tracer.versions([(name, _digest(tracer.recorded[name]))])
    upstream, downstream = tracer.upstream(version), tracer.downstream(version)
    everything = (version, *upstream)
    return Lineage(
        version=version,
        upstream=upstream,
        downstream=downstream,
        sources=tracer.sources((*everything, *downstream)),
        teachers=tracer.teachers(everything),
        benchmarks=tracer.benchmarks(everything),
        git_commit=tracer.git_commit(version),
        missing=tuple(dict.fromkeys(tracer.missing)),
    )


class _Tracer:
    """Looks things up, and keeps what it did not find."""

    def __init__(self, root: Path) -> None:
        self.root, self.ledger, self.missing = root, Ledger(root), list[str]()
        self.recorded: Mapping[str, Any] = self.ledger.recorded()
        self.tracking = True

    def upstream(self, version: Version) -> tuple[Version, ...]:
        found: dict[tuple[str, str], Version] = {}
        waiting = list(version.inputs.items())
        while waiting:
            nearest = self.versions(key for key in dict.fromkeys(waiting) if key not in found)
            found |= {(one.stage, one.digest): one for one in nearest}
            waiting = [item for one in nearest for item in one.inputs.items() if item not in found]
        return tuple(found.values())

    def downstream(self, version: Version) -> tuple[Version, ...]:
        found: dict[tuple[str, str], Version] = {}
        waiting = [(version.stage, version.digest)]
        while waiting:
            made = [
                (name, _digest(entry))
                for name, entry in self.recorded.items()
                if any(_inputs(entry).get(needed) == digest for needed, digest in waiting)
            ]
            if not found:
                # Versions that dvc.lock has forgotten.
                others = self._runs(f"input.{version.stage}", [version.digest]).get(version.digest, [])
                made += [(run.stage, run.output_digest) for run in others]
            nearest = self.versions(key for key in dict.fromkeys(made) if key not in found)
            found |= {(one.stage, one.digest): one for one in nearest}
            waiting = [(one.stage, one.digest) for one in nearest]
        return tuple(found.values())

    def versions(self, keys: Iterable[tuple[str, str]]) -> list[Version]:
        wanted = list(keys)
        runs = self._runs("output.digest", [digest for _, digest in wanted]) if wanted else {}
        return [
            self._version(name, digest, next((run for run in runs.get(digest, ()) if run.stage == name), None))
            for name, digest in wanted
        ]

    def _version(self, name: str, digest: str, run: RecordedRun | None) -> Version:
        shown = f"{name}@{digest[:_SHOWN_DIGITS]}"
        entry = self.recorded.get(name, {})
        known = _digest(entry) == digest
        if not known and run is None:
            self.missing.append(f"how {shown} was made: dvc.lock has another version, and MLflow no run of this one")
        elif run is None and self.tracking:
            self.missing.append(f"who made {shown}, and when: MLflow has no run of it")
        code = _code(entry) if known else {}
        changed = tuple(file for file, md5 in code.items() if _md5(self.root / file) != md5)
        manifest = self._read(digest, "manifest.json")
        if manifest is None:
            if known:
                way = f"fetch it with: dvc pull {dvc_target(name)}"
            else:
                # From today's dvc.lock, DVC would fetch another version.
                way = (
                    "dvc.lock does not have this version, so first check out the commit of dvc.lock that brought it "
                    f"(git log --reverse -S{digest} -- '*dvc.lock'), then fetch it with: dvc fetch {dvc_target(name)}"
                )
            self.missing.append(f"what is in {shown}: it is not on this machine; {way}")
        return Version(
            stage=name,
            digest=digest,
            inputs=_inputs(entry) if known else run.input_digests if run else {},
            fields=entry.get("params", {}).get(RECIPE_FILE, {}) if known else run.parameters if run else {},
            code=tuple(code),
            changed_code=changed,
            code_digest=run.code_digest if run else "" if changed else self._code_digest(name, tuple(code)),
            run=run,
            summary=manifest["summary"] if manifest else None,
        )

    def _code_digest(self, name: str, code: tuple[str, ...]) -> str:
        """Of unchanged files, if they are still all that the stage depends on; else empty."""
        try:
            row = stage(name)
        except UnknownStageError:
            return ""
        return row.code_digest(self.root) if sorted(row.code) == sorted(code) else ""

    def sources(self, versions: Iterable[Version]) -> dict[str, Source]:
        corpora = self._of("cot_corpus", versions, "report.json").get("sources", {})
        found = {
            name: Source(
                format=row["format"],
                drawn=row["generated"],
                files=len(row["files"]),
                bytes=sum(file["size"] for file in row["files"].values()),
                digest=hashlib.md5(json.dumps(row["files"], sort_keys=True).encode()).hexdigest(),
                licenses=corpora[name]["licenses"] if name in corpora else None,
            )
            for name, row in self._of("sources", versions, "inventory.json").items()
        }
        unlicensed = [name for name, source in found.items() if source.licenses is None]
        if unlicensed:
            self.missing.append(f"the licence of {', '.join(unlicensed)}: no corpus that was made from it is here")
        return found

    def teachers(self, versions: Iterable[Version]) -> dict[str, dict[str, Any]]:
        found = {}
        for version in versions:
            if version.stage.startswith("teacher_features_"):
                teacher = self._read(version.digest, "teacher.json")
                if teacher is not None:
                    model = {name: teacher["recipe"][name] for name in ("model", "hub_id", "revision", "license")}
                    found[teacher["name"]] = {**model, "fingerprint": teacher["fingerprint"]}
        return found

    def benchmarks(self, versions: Iterable[Version]) -> dict[str, Any]:
        return self._of("benchmarks", versions, "benchmarks.json")

    def _of(self, name: str, versions: Iterable[Version], file: str) -> dict[str, Any]:
        """A file of the artifact of stage `name` among `versions`; empty where there is none."""
        found = next((version for version in versions if version.stage == name), None)
        return (self._read(found.digest, file) if found else None) or {}

    def git_commit(self, version: Version) -> str:
        commit = version.run.git_commit if version.run and version.run.git_commit != "none" else ""
        # The commit that brought the digest into dvc.lock holds the code that made it.
        words = ["git", "log", "--format=%H", "-n1", f"-S{version.digest}", "--", "dvc.lock", "ablation/dvc.lock"]
        answer = subprocess.run(words, cwd=self.root, capture_output=True, text=True, check=False)
        commit = commit or (answer.stdout.strip() if answer.returncode == 0 else "")
        if not commit:
            self.missing.append(f"the git commit of {version.stage}: no run and no commit of dvc.lock names it")
        return commit

    def _runs(self, tag: str, values: list[str]) -> dict[str, list[RecordedRun]]:
        if not self.tracking:
            return {}
        try:
            return find_runs(self.root, tag, values)
        except LineageError as error:
            self.tracking = False
            self.missing.append(f"who made all this, when and by which command: {error}")
            return {}

    def _read(self, digest: str, file: str) -> dict[str, Any] | None:
        data = self.ledger.read(digest, file)
        return json.loads(data) if data is not None else None


def _digest(entry: Mapping[str, Any]) -> str:
    outs = entry.get("outs") or [{}]
    return str(outs[0].get("md5", ""))


def _inputs(entry: Mapping[str, Any]) -> dict[str, str]:
    """Digest of each input artifact, by stage name."""
    deps = {str(dep["path"]): str(dep.get("md5", "")) for dep in entry.get("deps", ())}
    return {
        "@".join(path.removeprefix("artifacts/").split("/")): md5
        for path, md5 in deps.items()
        if path.startswith("artifacts/")
    }


def _code(entry: Mapping[str, Any]) -> dict[str, str]:
    deps = {str(dep["path"]): str(dep.get("md5", "")) for dep in entry.get("deps", ())}
    return {path: md5 for path, md5 in deps.items() if path.startswith("valr_ops/")}


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else ""


# ----------------------------------------------------------------------------------------------------------- showing


def show(lineage: Lineage, console: Console | None = None) -> dict[str, Any]:
    """Print the tree, and return the same as a JSON document."""
    version = lineage.version
    tree = Tree(_label(version, " · ".join(_scores(version.summary or {})) or _facts(version, lineage)))
    _add(tree, "made by", _making(lineage))
    _add(tree, f"recipe {version.run.recipe_fingerprint if version.run else ''}".strip(), _fields(version.fields))
    made_from = tree.add(Text("made from", style="dim"))
    known = {(one.stage, one.digest): one for one in lineage.upstream}
    shown: set[tuple[str, str]] = set()
    _add_inputs(made_from, version, known, shown, lineage)
    if not version.inputs:
        made_from.add(Text("no other artifact"))
    became = tree.add(Text("made from it", style="dim"))
    _add_products(became, version, lineage.downstream, set())
    if not lineage.downstream:
        became.add(Text("nothing yet"))
    if lineage.missing:
        _add(tree, "not known here", lineage.missing, "yellow")
    # A pipe has no width; digests and addresses should stay whole in it.
    console = console or Console(width=None if sys.stdout.isatty() else _PIPED_COLUMNS)
    console.print(tree, highlight=False)
    return document(lineage)


def document(lineage: Lineage) -> dict[str, Any]:
    """The lineage as JSON values."""
    version = lineage.version

    def row(one: Version) -> dict[str, Any]:
        return {
            "stage": one.stage,
            "digest": one.digest,
            "inputs": dict(one.inputs),
            "code_digest": one.code_digest,
            "changed_code": list(one.changed_code),
            "summary": one.summary,
            "run": asdict(one.run) | {"parameters": dict(one.run.parameters)} if one.run else None,
        }

    return {
        **row(version),
        "git_commit": lineage.git_commit,
        "command": version.run.command if version.run else "",
        "recipe": {
            "fingerprint": version.run.recipe_fingerprint if version.run else "",
            "fields": dict(version.fields),
        },
        "sources": {name: asdict(source) for name, source in lineage.sources.items()},
        "teachers": dict(lineage.teachers),
        "benchmarks": dict(lineage.benchmarks),
        "made_from": [row(one) for one in lineage.upstream],
        "made_from_it": [row(one) for one in lineage.downstream],
        "missing": list(lineage.missing),
    }


def _add(tree: Tree, title: str, lines: Iterable[str], style: str = "") -> None:
    branch = tree.add(Text(title, style="dim"))
    for line in lines:
        branch.add(Text(line, style=style))


def _label(version: Version, *facts: str) -> Text:
    digest = (version.digest[:_SHOWN_DIGITS], "cyan")
    return Text.assemble((version.stage, "bold"), "  ", digest, *(f"  {fact}" for fact in facts if fact))


def _making(lineage: Lineage) -> Iterator[str]:
    version, run = lineage.version, lineage.version.run
    if run is not None:
        when = datetime.fromtimestamp(run.ended, UTC).strftime("%Y-%m-%d %H:%M UTC")
        yield f"{run.command or f'valr run {version.stage}'}  ({', '.join(filter(None, [run.person, when]))})"
    changed = f"; changed since: {', '.join(version.changed_code)}" if version.changed_code else ", the same now"
    files = f"  {len(version.code)} files{changed}" if version.code else ""
    yield f"code {version.code_digest or 'of an unknown digest'}{files}"
    if lineage.git_commit:
        yield f"commit {lineage.git_commit}"
    if run is not None:
        yield f"measured in {run.url}"
        if run.dagster_run_id:
            yield f"Dagster run {run.dagster_run_id}"


def _fields(fields: Mapping[str, Any]) -> Iterator[str]:
    for name, value in sorted(fields.items()):
        values = value if isinstance(value, Mapping) else {"": value}
        line = " · ".join(f"{key} {json.dumps(one)}".strip() for key, one in values.items() if one is not None)
        more = "" if len(line) <= _SHOWN_CHARACTERS else " ..."
        yield f"{name}  {line[:_SHOWN_CHARACTERS]}{more}"


def _add_inputs(
    tree: Tree,
    version: Version,
    known: Mapping[tuple[str, str], Version],
    shown: set[tuple[str, str]],
    lineage: Lineage,
) -> None:
    for key in version.inputs.items():
        one = known[key]
        if key in shown:
            tree.add(_label(one, "see above"))
            continue
        shown.add(key)
        branch = tree.add(_label(one, _facts(one, lineage)))
        if one.stage == "sources":
            for name, source in lineage.sources.items():
                branch.add(Text(_source_line(name, source)))
        if one.stage == "benchmarks":
            for name, row in lineage.benchmarks.items():
                branch.add(Text(f"{name}  {row.get('revision', '')[:_SHOWN_DIGITS]}  {row.get('questions')} questions"))
        _add_inputs(branch, one, known, shown, lineage)


def _add_products(tree: Tree, version: Version, made: Iterable[Version], shown: set[tuple[str, str]]) -> None:
    products = tuple(made)
    for one in products:
        key = (one.stage, one.digest)
        if one.inputs.get(version.stage) != version.digest:
            continue
        branch = tree.add(_label(one, "see above" if key in shown else " · ".join(_scores(one.summary or {}))))
        if key not in shown:
            shown.add(key)
            _add_products(branch, one, products, shown)


def _facts(version: Version, lineage: Lineage) -> str:
    """The one thing that a reader wants to know of an input."""
    teacher = lineage.teachers.get(version.stage.removeprefix("teacher_features_"))
    if teacher and version.stage.startswith("teacher_features_"):
        return f"{teacher['model']} · {teacher['license']} · weights {teacher['fingerprint'][:_SHOWN_DIGITS]}"
    if version.stage == "base_model" and "base" in version.fields:
        base = version.fields["base"]
        if base["hub_id"]:
            return f"{base['hub_id']}@{base['revision'][:_SHOWN_DIGITS]}"
        return "from a local folder" if base["path"] else "from scratch"
    summary = version.summary or {}
    counted = [name for name in ("records", "sequences", "parameters", "updates") if name in summary]
    return " · ".join(f"{summary[name]:,} {name}" for name in counted)


def _source_line(name: str, source: Source) -> str:
    licenses = " and ".join(source.licenses) if source.licenses else "licence not known here"
    origin = "drawn" if source.drawn else "given"
    return f"{name}  {source.digest[:_SHOWN_DIGITS]}  {licenses} · {source.format}, {origin}, {source.files:,} files"


def _scores(summary: Mapping[str, Any]) -> Iterator[str]:
    for name in summary:
        benchmark = name.removeprefix("accuracy_")
        if name.startswith("accuracy_") and f"accuracy_low_{benchmark}" in summary:
            low, high = summary[f"accuracy_low_{benchmark}"], summary[f"accuracy_high_{benchmark}"]
            guess = f", majority {summary[f'majority_{benchmark}']:.3f}" if f"majority_{benchmark}" in summary else ""
            yield f"{benchmark} {summary[name]:.3f} [{low:.3f}, {high:.3f}{guess}]"
