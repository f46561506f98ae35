"""Speed of what people wait for: ``make perf`` or ``python -m perf [NAME ...]``.

In: this checkout. Out: perf/results.json, one row a figure with its goal, machine and commit, the same as a table in
perf/README.md, and on the screen. Wherever two things are compared, both were measured in one run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence

from perf import commands, data, evaluation, method, teachers
from perf.rows import CHECKOUT, Row, table

RESULTS = CHECKOUT / "perf" / "results.json"
README = CHECKOUT / "perf" / "README.md"
MARK = "<!-- results -->"

BENCHMARKS: dict[str, Callable[[], Iterator[Row]]] = {
    benchmark.__name__: benchmark
    for benchmark in (
        commands.start,
        commands.hit,
        commands.main_job,
        commands.setup,
        commands.tests,
        data.corpus,
        data.decoding,
        method.steps,
        method.hops,
        method.memory,
        method.generation,
        method.gpu,
        teachers.extraction,
        teachers.stored_reading,
        teachers.stored_bytes,
        teachers.gpu_teachers,
        evaluation.scoring,
        evaluation.reading,
        evaluation.batches,
        evaluation.page,
    )
}


def main(names: Sequence[str]) -> int:
    """Run the named benchmarks, or all of them; keep the other rows of the results."""
    unknown = sorted(set(names) - set(BENCHMARKS))
    if unknown:
        print(f"perf: there is no benchmark {', '.join(unknown)}; known: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    rows = {row["name"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.is_file() else {}
    for name in names or BENCHMARKS:
        for row in BENCHMARKS[name]():
            rows[row["name"]] = row
            goal = "" if row["goal"] is None else f"goal {row['goal']}"
            spread = f"{row['lowest']} to {row['highest']}, n={row['runs']}"
            print(f"{row['name']:34} {row['value']:>9} {row['unit']:5} {goal:12} ({spread})", flush=True)
            RESULTS.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
    above, _, _ = README.read_text(encoding="utf-8").partition(MARK)
    README.write_text(f"{above}{MARK}\n\n{table(list(rows.values()))}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
