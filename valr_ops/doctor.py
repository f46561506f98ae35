"""``valr doctor``: what of this machine and this checkout would make a run fail, and how to mend it.

In: the project folder. Out: one `Finding` a question, all of them, whatever the others say. Always: nothing is changed,
nothing is downloaded, and no heavy package is imported, so that the answer takes a second even where imports fail.
"""

from __future__ import annotations

import configparser
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from packaging.requirements import Requirement
from packaging.version import Version

from valr_ops import workspace
from valr_ops.recipe import price, recipes
from valr_ops.recipe.recipe import Recipe, RecipeError

DISTRIBUTION = "valr-ops"
GIB = 1 << 30
_SIGNS_OF_A_GPU = (Path("/proc/driver/nvidia/gpus"), Path("/dev/nvidiactl"))


@dataclass(frozen=True)
class Finding:
    """The answer to one question."""

    name: str
    status: Literal["ok", "warning", "problem"]
    """`problem`: runs fail. `warning`: something is lost or does not work as typed."""
    detail: str
    """What was seen."""
    fix: str = ""
    """What to do; empty where nothing is to be done."""


def diagnose(root: Path) -> list[Finding]:
    """Every finding about the checkout `root` and this interpreter, in the order in which to mend them."""
    return [finding for question in _QUESTIONS for finding in question(root)]


def show(findings: Iterable[Finding]) -> None:
    """Print the findings as a table, with what to do under each that needs it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "warning": "yellow", "problem": "bold red"}
    table = Table("", "question", "what was found", box=None, pad_edge=False)
    for finding in findings:
        found = Text(finding.detail)
        if finding.fix:
            found.append(f"\n→ {finding.fix}", style="bold")
        table.add_row(Text(finding.status, style=colours[finding.status]), finding.name, found)
    Console().print(table)


def _python(root: Path) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    if Path(sys.prefix).resolve() != (root / ".venv").resolve():
        yield Finding(
            "python",
            "warning",
            f"Python {version} of {sys.prefix}, not the one in .venv",
            "source .venv/bin/activate (after make setup)",
        )
    else:
        yield Finding("python", "ok", f"Python {version} in .venv")


def _packages(root: Path) -> Iterator[Finding]:
    try:
        declared = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("packages", "problem", f"{DISTRIBUTION} itself is not installed", "make setup")
        return
    needed = [line for line in map(Requirement, declared) if not line.marker or line.marker.evaluate({"extra": ""})]
    wrong = [told for told in map(_unmet, needed) if told]
    if wrong:
        yield Finding("packages", "problem", "; ".join(wrong), "make setup, which installs what constraints.txt names")
    else:
        yield Finding("packages", "ok", f"all {len(needed)} declared packages are there in the versions they need")


def _unmet(requirement: Requirement) -> str | None:
    version = _version(requirement.name)
    if version is None:
        return f"{requirement.name} is missing"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} is {version}, needed is {requirement.specifier}"
    return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _selections(root: Path) -> Iterator[Finding]:
    version = _version("antlr4-python3-runtime")
    if version is None or Version(version).release[:2] != (4, 13):
        # dagster-io/dagster#27487
        yield Finding(
            "Dagster selections",
            "problem",
            f"antlr4-python3-runtime is {version or 'missing'}: every --select fails with a TypeError about ord()",
            "make setup; to add packages use pip install -c constraints.txt, or hydra-core brings the old one back",
        )
    else:
        yield Finding("Dagster selections", "ok", f"antlr4-python3-runtime {version} reads them")


def _torch(root: Path) -> Iterator[Finding]:
    torch, torchvision = _version("torch"), _version("torchvision")
    if not torch or not torchvision:
        yield Finding("torch", "problem", f"torch {torch}, torchvision {torchvision}", "make setup")
        return
    pair = f"torch {torch} with torchvision {torchvision}"
    # The two are released together: 2.13 with 0.28, 2.14 with 0.29.
    expected = f"0.{Version(torch).minor + 15}"
    if Version(torch).major == 2 and not torchvision.startswith(f"{expected}."):
        fix = f"pip install -c constraints.txt torch torchvision, or torchvision {expected} for this torch"
        yield Finding("torch", "problem", f"{pair}: versions that were not built for each other", fix)
    elif Version(torch).local != Version(torchvision).local:
        yield Finding("torch", "ok", f"{pair}: different builds, bridged by valr_ops/torchvision_guard.py")
    else:
        yield Finding("torch", "ok", pair)


def _mlflow(root: Path) -> Iterator[Finding]:
    version, spec = _version("mlflow"), importlib.util.find_spec("mlflow")
    if (root / "mlflow" / "__init__.py").exists():
        yield Finding(
            "mlflow",
            "problem",
            "mlflow/__init__.py makes the settings folder hide the package of that name",
            "delete mlflow/__init__.py",
        )
    elif version is None or spec is None or spec.origin is None:
        # Without the package, `import mlflow` still succeeds, as an empty namespace made of the settings folder.
        yield Finding(
            "mlflow", "problem", "the package is not installed, only the settings folder is found", "make setup"
        )
    else:
        yield Finding("mlflow", "ok", f"mlflow {version}, not hidden by the settings folder")


def _dagster_home(root: Path) -> Iterator[Finding]:
    home = os.environ.get("DAGSTER_HOME")
    activate = 'source .venv/bin/activate, or eval "$(valr env)"; the verbs of valr work without'
    if not home:
        detail = "DAGSTER_HOME is not set: what `dagster` itself does would be recorded nowhere"
        yield Finding("Dagster's home", "warning", detail, activate)
    elif not Path(home).is_absolute() or not Path(home).is_dir():
        yield Finding("Dagster's home", "problem", f"DAGSTER_HOME={home} is no absolute path of a folder", activate)
    elif Path(home).resolve() != Path(workspace.environment(root)["DAGSTER_HOME"]).resolve():
        yield Finding("Dagster's home", "warning", f"DAGSTER_HOME={home} belongs to another project", activate)
    else:
        yield Finding("Dagster's home", "ok", home)
    if "DAGSTER_MODULE_NAME" in os.environ:
        detail = "DAGSTER_MODULE_NAME is set, which stops `dagster dev` from reading workspace.yaml"
        yield Finding("Dagster's module", "warning", detail, "unset DAGSTER_MODULE_NAME")


def _dvc(root: Path) -> Iterator[Finding]:
    settings = configparser.ConfigParser()
    try:
        found = settings.read([root / ".dvc" / "config", root / ".dvc" / "config.local"])
    except configparser.Error as error:
        yield Finding("DVC", "problem", f".dvc/config can't be read: {error}", "git checkout .dvc/config")
        return
    if not found:
        yield Finding("DVC", "problem", "there is no .dvc/config", "git checkout .dvc, or dvc init")
        return
    remote = settings.get("core", "remote", fallback=None)
    if settings.getboolean("core", "analytics", fallback=True):
        yield Finding("DVC", "warning", "it reports its use to its makers", "dvc config core.analytics false")
    elif remote is None:
        yield Finding("DVC", "warning", "no remote: artifacts exist only here", "dvc remote add --default NAME URL")
    else:
        address = settings.get(f"'remote \"{remote}\"'", "url", fallback="no address")
        yield Finding("DVC", "ok", f"initialised, reports nothing, remote {remote} ({address})")


def _git(root: Path) -> Iterator[Finding]:
    if shutil.which("git") is None:
        yield Finding("git", "problem", "git is not installed", "install it, e.g. apt-get install git")
        return
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    if head.returncode != 0:
        said = head.stderr.strip().splitlines()
        detail = f"no commit can be named ({said[0] if said else 'git rev-parse failed'}): runs will not say which code"
        yield Finding("git", "warning", detail, "work in a clone, and commit")
    else:
        yield Finding("git", "ok", f"at commit {head.stdout.strip()}")


def _params(root: Path) -> Iterator[Finding]:
    try:
        recipe = recipes.load(root)
    except RecipeError as error:
        yield Finding("params.yaml", "problem", str(error), "edit params.yaml; valr plan lists every field")
        return
    yield Finding("params.yaml", "ok", f"scale {recipe.scale}, recipe {recipe.fingerprint}")
    yield _device(recipe)


def _device(recipe: Recipe) -> Finding:
    has_gpu = any(sign.exists() for sign in _SIGNS_OF_A_GPU)
    wanted = recipe.runtime.device
    if wanted == "cuda" and not has_gpu:
        fix = "run it where there is one, or choose scale tiny, which needs none"
        return Finding("GPU", "problem", "runtime.device is cuda, but no NVIDIA GPU is seen here", fix)
    return Finding("GPU", "ok", f"{'one is seen' if has_gpu else 'none is seen'}, the recipe computes on {wanted}")


def _disk(root: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(root).free
    detail = f"{free / GIB:.1f} GiB free"
    if free < GIB:
        yield Finding("disk", "problem", detail, "free some; dvc gc --workspace removes old versions from the cache")
    elif free < 5 * GIB:
        yield Finding("disk", "warning", detail, "dvc gc --workspace removes old versions of artifacts from the cache")
    else:
        yield Finding("disk", "ok", detail)
    yield from _room(root, free)
    closed = [path for path in (root, root / ".valr", root / "artifacts", root / ".dvc") if path.exists()]
    closed = [path for path in closed if not os.access(path, os.W_OK | os.X_OK)]
    if closed:
        names = ", ".join(map(str, closed))
        yield Finding(
            "permissions", "problem", f"can't write to {names}", "make them yours, e.g. sudo chown -R $USER ."
        )
    else:
        yield Finding("permissions", "ok", "the project's folders can be written")


def _room(root: Path, free: int) -> Iterator[Finding]:
    """Whether there is room for all that the recipe still has to make here, as far as its size is known."""
    try:
        recipe = recipes.load(root)
        stages = price.stage_prices(recipe, root)
    except (RecipeError, price.PriceError):
        return
    missing = [one for name, one in stages.items() if not (root / "artifacts" / name).exists()]
    # A Job has its checkpoints elsewhere, and its result comes home.
    here = [one for one in missing if not (one.gpus and recipe.cluster.dispatch == "kubernetes")]
    results = sum(one.result_bytes for one in missing)
    needed = results + max((one.written_bytes - one.result_bytes for one in here), default=0)
    detail = f"artifacts that are not made yet and checkpoints take about {needed / GIB:,.1f} GiB"
    if needed > free:
        fix = "free some, or take fewer records (data.sources.NAME.cap); valr plan says how much each stage writes"
        yield Finding("room", "warning", f"{detail}, and {free / GIB:,.1f} GiB are free", fix)
    else:
        yield Finding("room", "ok", detail)


def _ports(root: Path) -> Iterator[Finding]:
    for name, port in (("dagster", workspace.DAGSTER_PORT), ("mlflow", workspace.MLFLOW_PORT)):
        if workspace.in_use(port):
            fix = f"nothing, if that is valr ui; else valr ui --{name}-port N"
            yield Finding(f"port {port}", "warning", f"in use, {name}'s page can't be opened there again", fix)
        else:
            yield Finding(f"port {port}", "ok", f"free for the page of {name}")


def _leftovers(root: Path) -> Iterator[Finding]:
    staging = root / ".valr" / "staging"
    left = [folder.name for folder in sorted(staging.iterdir())] if staging.is_dir() else []
    left = [name for name in left if not _is_running(root, name)]
    if left:
        detail = f"unpublished work of a run that died or was refused: {', '.join(left)}"
        yield Finding("unfinished runs", "warning", detail, f"valr run {left[0]} starts over and clears it")
    else:
        yield Finding("unfinished runs", "ok", "none")
    spool = root / ".valr" / "spool"
    waiting = sum(not entry.name.startswith(".") for entry in spool.iterdir()) if spool.is_dir() else 0
    if waiting:
        detail = f"{waiting} runs wait in .valr/spool for the tracking server"
        fix = "start the server (make ui) or check MLFLOW_TRACKING_URI; the next stage delivers them"
        yield Finding("MLflow spool", "warning", detail, fix)
    else:
        yield Finding("MLflow spool", "ok", "empty: everything measured has been delivered")


def _is_running(root: Path, stage: str) -> bool:
    lock = root / ".valr" / "locks" / f"{stage}.lock"
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        # No right to lock it: `permissions` tells.
        return False


_QUESTIONS: tuple[Callable[[Path], Iterator[Finding]], ...] = (
    _python,
    _packages,
    _selections,
    _torch,
    _mlflow,
    _git,
    _disk,
    _params,
    _dvc,
    _dagster_home,
    _ports,
    _leftovers,
)
