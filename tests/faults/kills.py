"""``python -m tests.faults.kills``: kill each stage at random moments, let it go on, compare with an undisturbed run.

In: a folder, in which the pipeline of scale tiny, or what the named stages need of it, is made once (minutes). Out: a
row a stage in ``kills.json`` (SIGKILL) or ``stops.json`` (SIGTERM), written stage by stage; a row that is there is kept
until its stage is named.
Always: moments come from a seeded generator and are CPU seconds after the end of the imports, so that a busy machine
moves none of them; a start that ends before its moment is no kill, and the stage begins again from nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tests.faults import made as making
from tests.faults.made import Made
from tests.faults.starting import Started, Starter
from tests.project import MICRO
from tests.studies.tiny_study import SMALL
from valr_ops.exits import EXIT_AT_CHECKPOINT
from valr_ops.stages import STAGES

RESULTS = {
    signal.SIGKILL: Path(__file__).with_name("kills.json"),
    signal.SIGTERM: Path(__file__).with_name("stops.json"),
}
_UPDATES = {"max_updates": 8, "checkpoint_every": 2}
CELL = "stage2_ablation@valr_qwen_encoder"
STUDY = "method_check"
"""The four studies of the method train by the same code."""
_TEACHERS = ("dinov3", "siglip2", "pi3", "dinov2", "clip")
SHORT: dict[str, Any] = MICRO | {
    "data.synthetic.train_records": 48,
    "base.from_scratch.tower_pretraining_steps": 10,
    **{f"teachers.{name}.pretraining_steps": 20 for name in _TEACHERS},
    **{f"{stage}.{field}": value for stage in ("stage1", "stage2") for field, value in _UPDATES.items()},
    **{field: value for field, value in SMALL.items() if field.startswith("study.")},
}
"""Scale tiny with fewer records and updates: twenty kills of every stage take an hour of one core and not a night."""
WHOLE: dict[str, Any] = {"scale": "tiny"}
TRAINED = ("base_model", "stage1_sft", "stage2_valr_s", "stage2_valr_m", CELL)
"""Where a kill can cost most."""

_FIRST = (*TRAINED, "cot_corpus", "latent_corpus", "teacher_features_dinov3", "scores_valr_m", "sources")
ORDER = (*_FIRST, *(row.name for row in STAGES if row.name not in _FIRST and not row.on_request), STUDY)
_STARTS_PER_KILL = 2


def disturb(
    made: Made, starter: Starter, name: str, kills: int, seed: int, how: signal.Signals, budget: float = math.inf
) -> dict[str, Any]:
    """Disturb one stage `kills` times, let it finish, and say what became of it.

    Args:
        budget: CPU seconds after which there are no more kills.
    """
    root, expected = made.folder / f"{name}.{how.name}", made.stages[name]
    made.copy(name, root)
    before, wrong = making.records(root), list[str]()
    draw, log = random.Random(f"{seed} {name}"), made.folder / "logs" / f"{name}.{how.name}.log"
    killed = ended = starts = at_checkpoint = 0
    spent, graces, length, anew = 0.0, [0.0], expected.cpu_seconds, True
    while killed < kills and starts < _STARTS_PER_KILL * kills and spent < budget and not wrong:
        running = starter.start(root, ["run", name], log)
        reached, used = running.wait_for_moment(draw.uniform(0, length))
        starts, spent = starts + 1, spent + used
        if reached:
            anew = False
            sent = time.monotonic()
            status = _end(running, how)
            graces.append(time.monotonic() - sent)
            killed += 1
            if status == EXIT_AT_CHECKPOINT:
                at_checkpoint += 1
                if not list((root / ".valr" / "work" / name).glob("checkpoint-*")):
                    wrong.append(f"exit {status} without a checkpoint")
            elif status not in (0, -how):
                wrong.append(f"kill {killed}: ended with {status}: {running.said()[-300:].strip()}")
            wrong += [f"after kill {killed}: {one}" for one in making.after_a_kill(root, name, made, before)]
        else:
            ended += 1
            # The undisturbed run may have been the first one to import something.
            length, anew = min(length, used) if anew else length, True
            if status := running.wait():
                wrong.append(f"after {killed} kills it ended with {status}: {running.said()[-300:].strip()}")
            else:
                wrong += making.after_a_kill(root, name, made, before)
                making.forget(root, name)
        if left := running.left_behind():
            wrong.append(f"after kill {killed}: processes {left} are left")
    started = time.monotonic()
    running = starter.start(root, ["run", name], log)
    status, seconds = running.wait(), time.monotonic() - started
    if status:
        wrong.append(f"the last run ended with {status}: {running.said()[-300:].strip()}")
    else:
        wrong += making.after_the_end(root, name, made, running, before)
    equal = not status and making.comparable(root, name) == expected.comparable
    if equal and not wrong:
        shutil.rmtree(root)
    row = {
        "stage": name,
        "kills": killed,
        "ends_before_kill": ended,
        "equal_digest": equal,
        "seconds_undisturbed": expected.seconds,
        "seconds_after": round(seconds, 2),
        "last_run": running.last_line().get("how", "failed"),
        "wrong": wrong,
    }
    if how == signal.SIGTERM:
        row |= {"at_a_checkpoint": at_checkpoint, "longest_grace_seconds": round(max(graces), 2)}
    return row


def _end(running: Started, how: signal.Signals) -> int:
    if how == signal.SIGKILL:
        running.kill()
    else:
        # A cluster asks the first process only.
        running.ask_to_stop(how)
    return running.wait()


def read_rows(results: Path) -> dict[str, dict[str, Any]]:
    """What was found so far, by stage."""
    return {row["stage"]: row for row in json.loads(results.read_text())} if results.is_file() else {}


def main(arguments: list[str] | None = None) -> int:
    """Disturb the named stages, or all that have no row yet."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kills", description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="where the pipeline is, or will be")
    parser.add_argument(
        "--stages", metavar="A,B", help="these, also where they have a row; all without one if left out"
    )
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="of each stage")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="S", help="CPU seconds a stage, then go on")
    parser.add_argument("--whole", action="store_true", help="scale tiny with all of its records and updates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="store_true", help="SIGTERM instead, to the training stages")
    options = parser.parse_args(arguments)
    how = signal.SIGTERM if options.stop else signal.SIGKILL
    results = RESULTS[how]
    rows = read_rows(results)
    wanted = options.stages.split(",") if options.stages else TRAINED[1:] if options.stop else ORDER
    made = making.make(options.work.resolve(), wanted if options.stages else ORDER, WHOLE if options.whole else SHORT)
    with made.starter() as starter:
        for name in wanted:
            if not options.stages and name in read_rows(results):
                continue
            row = disturb(made, starter, name, options.kills, options.seed, how, options.budget)
            # Another process may have done other stages meanwhile.
            rows = read_rows(results)
            rows[name] = row | {
                "what": f"{how.name} at random CPU seconds after the imports, {made.said}",
                "machine": making.machine(),
                "commit": made.commit,
                "seed": options.seed,
            }
            ordered = [rows[one] for one in ORDER if one in rows]
            results.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(row), flush=True)
    return 1 if any(rows[name]["wrong"] or not rows[name]["equal_digest"] for name in wanted if name in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
