"""What training writes down: one row an update, the plot of it, and what people read.

In: figures of every update. Out: `training_log.parquet` and `loss.png`, equal bytes for equal runs.
The columns of a row, by name:

    loss, ce                        the window's loss, and its cross-entropy in nats a supervised token
    alignment/<teacher>             mean cosine to the segment's own features; the loss contains its negative
    control/<teacher>               the same cosine to the features of another image of the micro-batch
    gradient_norm                   before clipping; decoder_ and projector_gradient_norm are its parts
    <part>_learning_rate            of the decoder and of the projectors
    latent_norm_ratio               norm of the fed-back states over that of the tokens' embeddings
    effective_rank                  directions that the K latents of a segment span, 1 to K
    feedback_residual               size of the last feedback hop's change over the size of the feedback
    slot_drift                      largest difference between pass 2's states and those rolled out, over the largest

Always: a cosine that was not measured is no number, it is missing in the row and null in the parquet; clocks never
enter a row; rates, `data_wait_share` and `model_flops_utilisation` (model FLOPs as `recipe.cost` counts them, over the
seconds of the update, over the machine's peak) go to people and trackers only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure

Row = dict[str, float]
"""One update: the columns, and nothing else; without the cosines that were not measured."""
_WHOLE_NUMBERS = ("update", "supervised_tokens", "aligned_segments")


class Clock:
    """Seconds and rates of this process's updates; they go to people and trackers, never into the artifact."""

    def __init__(self, peak_flops: float | None) -> None:
        """`peak_flops`: FLOPs a second that all ranks could do at most, or None where that is not known."""
        self._peak_flops = peak_flops
        self._last = time.monotonic()
        self._seconds = self._waited = self._tokens = self._records = self._flops = 0.0

    def start(self) -> None:
        """Begin to count here: what was before the first update is no part of it."""
        self._last = time.monotonic()

    def lap(self, tokens: float, records: int, flops: float, waited: float) -> dict[str, float]:
        """The rates of the update that ends now, which did so much after `waited` seconds without data."""
        now = time.monotonic()
        seconds, self._last = max(now - self._last, 1e-9), now
        self._seconds += seconds
        self._waited += waited
        self._tokens += tokens
        self._records += records
        self._flops += flops
        return self._rates(seconds, waited, tokens, records, flops)

    def totals(self) -> dict[str, float]:
        """The same over all laps, and their seconds; empty if there were none."""
        if not self._seconds:
            return {}
        rates = self._rates(self._seconds, self._waited, self._tokens, self._records, self._flops)
        return {"training_seconds": self._seconds, **rates}

    def _rates(self, seconds: float, waited: float, tokens: float, records: float, flops: float) -> dict[str, float]:
        rates = {
            "tokens_per_second": tokens / seconds,
            "samples_per_second": records / seconds,
            "data_wait_share": min(waited / seconds, 1.0),
        }
        if self._peak_flops is not None:
            rates["model_flops_utilisation"] = flops / seconds / self._peak_flops
        return rates


def write_log(rows: Sequence[Row], teachers: Sequence[str], path: Path) -> None:
    """Write the rows as parquet: whole numbers int64, everything else float64, null where a row has no value."""
    # Any row may lack some, and the columns must not depend on which.
    names = dict.fromkeys(["update", "loss", *_measured(teachers), *(name for row in rows for name in row)])
    kinds = {name: pa.int64() if name in _WHOLE_NUMBERS else pa.float64() for name in names}
    table = {name: pa.array([row.get(name) for row in rows]).cast(kind) for name, kind in kinds.items()}
    pq.write_table(pa.table(table), path, row_group_size=4096)


def plot(rows: Sequence[Row], teachers: Sequence[str], path: Path) -> None:
    """Cross-entropy over updates, and beside it each teacher's cosine with its control as a thin line."""
    at = [row["update"] for row in rows]
    figure = Figure(figsize=(9 if teachers else 5, 3.2), layout="constrained")
    axes = figure.subplots(1, 2 if teachers else 1, squeeze=False)[0]
    axes[0].plot(at, [row["ce"] for row in rows], color="tab:blue")
    axes[0].set(xlabel="update", ylabel="cross-entropy (nats a token)", ylim=(0, None))
    for number, teacher in enumerate(teachers):
        colour = f"C{number}"
        # Where nothing was measured a line has a gap.
        own, control = ([row.get(f"{kind}/{teacher}", math.nan) for row in rows] for kind in ("alignment", "control"))
        axes[1].plot(at, own, color=colour, label=teacher)
        axes[1].plot(at, control, color=colour, linewidth=0.8, linestyle="--", label=f"{teacher}, another image")
    if teachers:
        axes[1].set(xlabel="update", ylabel="cosine to teacher features")
        axes[1].legend(fontsize="small")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def not_finite(rows: Sequence[Row], validation: Mapping[str, float]) -> list[str]:
    """What is not finite, in words; empty when all is well."""
    wrong = [f"{name} in update {row['update']:.0f}" for row in rows for name in row if not math.isfinite(row[name])]
    return wrong + [name for name, value in validation.items() if not math.isfinite(value)]


def table(row: Row, validation: Mapping[str, float], teachers: Sequence[str]) -> str:
    """Markdown: the last update beside the validation split."""
    lines = ["| | last update | validation |", "| --- | --- | --- |"]
    for name in _measured(teachers):
        values = (row.get(name), validation.get(f"validation/{name}"))
        last, held_out = ("none" if value is None else f"{value:.4f}" for value in values)
        lines.append(f"| {name} | {last} | {held_out} |")
    return "\n".join(lines)


def _measured(teachers: Sequence[str]) -> list[str]:
    """The cross-entropy and the cosines: the columns that show what was learned."""
    return ["ce", *(f"{kind}/{teacher}" for teacher in teachers for kind in ("alignment", "control"))]
