"""``python -m tests.faults.full_disk``: fill the disk under each stage, see what it says and leaves, make room again.

In: the folder of `kills`, whose pipeline is made where it is not there. Out: a row a stage in ``full_disk.json``.
Always: the disk is a small one in memory, seen by this process only, with the whole project on it and just less room
than the stage writes, at several sizes: it fills up under the stage's own files, under DVC's and under MLflow's. The
artifact of before stands there meanwhile, and is made again from nothing once there is room.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.faults import made as making
from tests.faults.kills import ORDER, SHORT, WHOLE, read_rows
from tests.faults.made import Made
from tests.faults.starting import Starter

RESULTS = Path(__file__).with_name("full_disk.json")
ROOMS = (0.05, 0.4, 0.9)
"""So much of what the undisturbed run writes there is room for."""
_DISK_MIB = 1024
_EXIT_TRY_AGAIN = 1


def fill(made: Made, starter: Starter, disk: Path, name: str) -> dict[str, Any]:
    """Run one stage on disks that are too small, then on one that is not, and say what became of it."""
    root, ballast, expected = disk / "project", disk / "ballast", made.stages[name]
    log = made.folder / "logs" / f"{name}.full.log"
    wrong: list[str] = []
    said: list[str] = []
    fitted = 0
    for share in ROOMS:
        made.copy(name, root, with_artifact=True)
        before = making.records(root)
        room = int(share * expected.written_bytes)
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(shutil.disk_usage(disk).free - room, 1))
        running = starter.start(root, ["run", name, "--force"], log)
        status, words = running.wait(), running.said().strip()
        ballast.unlink()
        where = f"with {room / 2**20:.2f} MiB"
        if status == 0:
            fitted += 1
            continue
        sentence = next((line for line in words.splitlines() if line.startswith("valr: ")), words[-300:])
        said.append(sentence)
        if status != _EXIT_TRY_AGAIN or f"the disk of {disk}" not in sentence or "Traceback" in words:
            wrong.append(f"{where}: ended with {status}: {sentence[:300]}")
        wrong += [f"{where}: {one}" for one in making.after_a_failure(root, name, made, before)]
    running = starter.start(root, ["run", name, "--force"], log)
    if status := running.wait():
        wrong.append(f"with room again it ended with {status}: {running.said()[-300:].strip()}")
    else:
        wrong += making.after_the_end(root, name, made, running, before)
    return {
        "stage": name,
        "full": len(said),
        "fitted": fitted,
        "equal_digest": not status and making.comparable(root, name) == expected.comparable,
        "written_mib": round(expected.written_bytes / 2**20, 2),
        "said": said[0].replace(str(disk), "DISK") if said else "",
        "wrong": wrong,
    }


def on_a_small_disk(disk: Path, words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `words` where `disk` is a small one, which nobody else sees and which is gone afterwards."""
    disk.mkdir(parents=True, exist_ok=True)
    mount = ["unshare", "-Urm", "sh", "-c", f'mount -t tmpfs -o size={_DISK_MIB}m tmpfs "$0" && exec "$@"', str(disk)]
    return subprocess.run([*mount, *words], text=True, stderr=subprocess.PIPE, check=False, **options)


def main(arguments: list[str] | None = None) -> int:
    """Fill the disk under the named stages, or under all that have no row yet."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.full_disk", description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="where the pipeline is, or will be")
    parser.add_argument("--stages", metavar="A,B", help="these; else all that have no row yet")
    parser.add_argument("--whole", action="store_true", help="scale tiny with all of its records and updates")
    parser.add_argument("--on", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    work = options.work.resolve()
    rows = read_rows(RESULTS)
    wanted = options.stages.split(",") if options.stages else [name for name in ORDER if name not in rows]
    made = making.make(work, wanted if options.stages else ORDER, WHOLE if options.whole else SHORT)
    if options.on is None:
        disk = work / "disk"
        own = [sys.executable, "-m", "tests.faults.full_disk", "--work", str(work), "--on", str(disk)]
        own += ["--whole"] if options.whole else []
        done = on_a_small_disk(disk, [*own, "--stages", ",".join(wanted)])
        print(done.stderr, file=sys.stderr, end="")
        return done.returncode
    with made.starter() as starter:
        for name in wanted:
            row = fill(made, starter, options.on, name)
            what = f"room for {', '.join(f'{share:.0%}' for share in ROOMS)} of what it writes, {made.said}"
            rows[name] = row | {"what": what, "machine": making.machine(), "commit": made.commit}
            ordered = [rows[one] for one in ORDER if one in rows]
            RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(row), flush=True)
    return 1 if any(rows[name]["wrong"] or not rows[name]["equal_digest"] for name in wanted) else 0


if __name__ == "__main__":
    sys.exit(main())
