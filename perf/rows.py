"""A measured figure with its goal, and where it was measured."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

CHECKOUT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


def row(
    name: str,
    values: Sequence[float],
    unit: str,
    goal: float | None,
    what: str,
    better: str = "lower",
    device: str = "",
) -> Row:
    """The median of `values` with their range.

    Args:
        goal: the value that is wanted; None for a figure that only stands beside others.
        device: name of the GPU, where one was used.
    """
    shown = [round(value, 3) for value in values]
    return {
        "name": name,
        "value": round(statistics.median(values), 3),
        "lowest": min(shown),
        "highest": max(shown),
        "runs": len(shown),
        "unit": unit,
        "goal": None if goal is None else round(goal, 3),
        "better": better,
        "what": what,
        "machine": device or f"{os.cpu_count()} cores, {_gibibytes():.0f} GiB, {platform.machine()}",
        "commit": _commit(),
    }


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line a row."""
    lines = ["| figure | median | range, runs | goal | what |", "| --- | ---: | --- | ---: | --- |"]
    for one in rows:
        unit = "" if one["unit"] == "ratio" else f" {one['unit']}"
        spread = f"{one['lowest']:g} to {one['highest']:g}, {one['runs']}"
        lines.append(f"| {one['name']} | {one['value']:g}{unit} | {spread} | {_goal(one)} | {one['what']} |")
    return "\n".join(lines)


def _goal(one: Row) -> str:
    if one["goal"] is None:
        return ""
    sign = "≤" if one["better"] == "lower" else "≥"
    met = one["value"] <= one["goal"] if one["better"] == "lower" else one["value"] >= one["goal"]
    return f"{sign} {one['goal']:g}{'' if met else ' **missed**'}"


def _gibibytes() -> float:
    return psutil.virtual_memory().total / 2**30


def _commit() -> str:
    words = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True, check=False).stdout.strip()
