"""``valr materialize``: what is out of date among the selected stages, made by Dagster, shown with one bar a stage.

Stages that are up to date are not handed to Dagster at all, so that the second run takes a second.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from valr_ops import runner, workspace
from valr_ops.recipe import price
from valr_ops.recipe.recipe import RecipeError
from valr_ops.stages import ordered, stage, upstream
from valr_ops.store import lineage
from valr_ops.store.artifacts import ArtifactError, Ledger, project_root


class MaterializeError(RuntimeError):
    """A stage failed; the message is the stage's own, with the place of the full log."""


@dataclass(frozen=True)
class Result:
    """What a materialization did."""

    selected: tuple[str, ...]
    made: tuple[str, ...]
    seconds: float

    def line(self) -> str:
        """One sentence for people."""
        if not self.made:
            return f"{len(self.selected)} stages, all up to date: nothing to do ({self.seconds:.1f} s)"
        made = len(set(self.made) & set(self.selected))
        return f"{made} of {len(self.selected)} stages made in {self.seconds:.0f} s, the rest was up to date"


def select(selection: Sequence[str]) -> tuple[str, ...]:
    """Names of the selected stages in the order of the table; ``+name`` selects everything `name` needs as well.

    A cell is ``stage2_ablation@CELL``.

    Raises:
        UnknownStageError: no such stage.
    """
    chosen: set[str] = set()
    for word in ",".join(selection).split(","):
        name = word.strip().removeprefix("+")
        chosen |= {row.name for row in upstream([name])} if word.strip().startswith("+") else {stage(name).name}
    return tuple(row.name for row in ordered(chosen))


def own_data(path: Path) -> dict[str, Any]:
    """Overrides that replace the generated sources by one folder in the JSONL format, with room for longer answers.

    Raises:
        RecipeError: there is no such folder, or it lacks train.jsonl or test.jsonl.
    """
    for name in ("train.jsonl", "test.jsonl"):
        if not (path / name).is_file():
            raise RecipeError(
                f"{path}: {'no such folder' if not path.is_dir() else f'it holds no {name}'}; "
                "give a folder with train.jsonl and test.jsonl (README, Bring your own data)"
            )
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", path.resolve().name)
    source = {"format": "jsonl", "path": os.path.relpath(path, project_root())}
    return {"data.sources": {name: source}, "evaluation.max_new_tokens": 384}


def materialize(selection: Sequence[str], overrides: Mapping[str, Any]) -> Result:
    """Make the selected artifacts through Dagster, as far as they are out of date, and copy them to the DVC remote.

    Raises:
        ArtifactError: something they need is neither selected nor up to date.
        MaterializeError: a stage failed.
    """
    root = project_root()
    # One process imports mlflow instead of every stage, and does so while the first of them are made.
    with lineage.courier(root):
        return _materialize(root, selection, overrides)


def _materialize(root: Path, selection: Sequence[str], overrides: Mapping[str, Any]) -> Result:
    started = time.monotonic()
    names = tuple(name for name in select(selection) if name != "recipe")
    # Made here, because what is out of date follows from it; Dagster then finds it up to date and records it.
    made = ("recipe",) if runner.refresh_recipe(root, overrides) else ()
    waiting = made + runner.out_of_date(root, names)
    if not waiting:
        return Result(names, (), time.monotonic() - started)
    _require_inputs(root, waiting, names)
    _show_prices(root, [name for name in waiting if "@" in name])
    for name in waiting:
        (root / ".valr" / "status" / f"{name}.json").unlink(missing_ok=True)
    logs = root / ".valr" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / "materialize.log"
    env = workspace.prepare(root) | {"VALR_SET": json.dumps(dict(overrides))}
    with log.open("wb") as stream:
        for batch in _batches(waiting):
            if _run_dagster(root, batch, stream, env) != 0:
                raise MaterializeError(_why(root, batch, log))
    ledger = Ledger(root)
    if ledger.has_remote():
        ledger.push(waiting)
    return Result(names, waiting, time.monotonic() - started)


def _show_prices(root: Path, cells: Sequence[str]) -> None:
    """What each of the chosen cells costs, and all of them; nothing where none was chosen."""
    from rich.console import Console
    from rich.table import Table

    if not cells:
        return
    recipe = runner.read_recipe(root)
    table = Table("stage", "hours", "GPU hours", "dollars", box=None, pad_edge=False)
    for row in price.sum_rows({name: price.price(recipe, name, root) for name in cells}):
        table.add_row(*row)
    Console().print(table)


def _run_dagster(root: Path, names: Sequence[str], log: BinaryIO, env: Mapping[str, str]) -> int:
    """Make the named stages in one run, shown while they are made; the exit status of Dagster."""
    from valr_ops.store.progress import watch

    # Ctrl-C reaches Dagster once, from here, and its stages get time to save.
    with workspace.interruptible():
        dagster = workspace.start(workspace.materialize_command(names), root, env, log)
        try:
            watch(names, root / ".valr" / "status", is_running=lambda: dagster.poll() is None)
        except BaseException:
            _end(dagster)
            raise
    return dagster.returncode


def _batches(names: Sequence[str]) -> list[tuple[str, ...]]:
    """What Dagster makes in one run: all stages that are no cells, then one cell at a time."""
    whole = tuple(name for name in names if "@" not in name)
    return [batch for batch in (whole, *((name,) for name in names if "@" in name)) if batch]


def _require_inputs(root: Path, waiting: Sequence[str], selected: Sequence[str]) -> None:
    outside = {needed for name in waiting for needed in stage(name).inputs if needed not in selected}
    for needed, state in Ledger(root).states(sorted(outside)).items() if outside else ():
        if not state.up_to_date:
            by = next(name for name in waiting if needed in stage(name).inputs)
            why = "; ".join(state.reasons) or "it was edited or deleted"
            raise ArtifactError(
                f"{by} needs artifacts/{needed}, which is not up to date ({why}); make it too: valr materialize +{by}"
            )


def _end(dagster: subprocess.Popen[bytes], seconds: float = 60) -> None:
    if dagster.poll() is None:
        dagster.send_signal(signal.SIGINT)
    try:
        dagster.wait(seconds)
    except BaseException as error:
        # A second Ctrl-C gives up what is being saved.
        os.killpg(dagster.pid, signal.SIGKILL)
        if not isinstance(error, subprocess.TimeoutExpired):
            raise


def _why(root: Path, names: Sequence[str], log: Path) -> str:
    failed = []
    for name in names:
        path = root / ".valr" / "status" / f"{name}.json"
        status = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if status.get("state") == "failed":
            failed.append(f"{name}: {status.get('message')}")
    if not failed:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:]
        failed = ["Dagster ended before a stage could say why; the end of its log:", *last]
    return "\n".join([*failed, f"The whole log is in {log.relative_to(root)}"])
