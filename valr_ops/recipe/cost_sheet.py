"""The price of one stage as a sheet of figures, and what is alike in the price of every stage.

In: a recipe, and of a stage its FLOPs, hours, memory and bytes by part. Out: a `Price`, which adds what it takes to
start, to fetch and to store, money, the disk of the node, remarks about what does not fit, and every assumption by
value and origin.
Always: amounts that are not known are ranges from the least to the most, and sums of ranges are ranges; a stage that
runs on CPUs costs no money here, because it runs where the orchestrator does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from valr_ops.recipe import cost
from valr_ops.recipe.recipe import Recipe, assumptions
from valr_ops.recipe.workload import Corpus, PriceError

Span = tuple[float, float]
"""The least and the most."""
Precision = Literal["float32", "bfloat16"]

CHECKPOINTS, STARTING, FETCHING, STORING = "checkpoints", "starting", "fetching inputs", "storing the result"
_MOVING = (FETCHING, STORING)

_MEANS = ("images_per_record", "image_pixels", "text_tokens", "segments_per_record", "most_segments")
"""Assumed until there is a corpus."""
_CARD = (
    *("gpu", "gpu_bytes", "gpu_bytes_per_second", "dollars_per_gpu_hour", "bandwidth_utilisation", "notice_seconds"),
    *("network_bytes_per_second", "eager_step_seconds"),
)
"""Assumed of GPUs in a cluster."""


@dataclass(frozen=True)
class Price:
    """What a stage is expected to cost."""

    stage: str
    gpus: int
    """0 where it runs on CPUs."""
    flops: Mapping[str, Span]
    """By part, all processes together."""
    hours: Mapping[str, Span]
    """By part; one comes after the other."""
    dollars: Span
    memory: Mapping[str, int]
    """Bytes of one process and its GPU, by part; not all are there at the same time."""
    peak_bytes: int
    """The most at a time, at the longest records; 0 where that decides nothing."""
    reads: Mapping[str, int]
    """Bytes that it needs beside it, by input; a Job fetches them once."""
    stores: Mapping[str, int]
    """Bytes that are sent to the object store, by part."""
    written_bytes: int
    """The most that it has written at a time: the result, the checkpoints that are kept and the one being written."""
    checkpoint: Mapping[str, Span] = field(default_factory=dict)
    """Seconds to write one, to send it to the object store, and of the notice that there is for both."""
    remarks: tuple[str, ...] = ()
    """What does not fit, and what to change."""
    assumptions: tuple[tuple[str, str, str], ...] = ()
    """Name, value, origin."""

    @property
    def total_hours(self) -> Span:
        """From the start of the Pod to its end."""
        return add(self.hours.values())

    @property
    def working_seconds(self) -> Span:
        """Of the stage itself, without fetching inputs and storing the result."""
        low, high = add(span for part, span in self.hours.items() if part not in _MOVING)
        return 3600 * low, 3600 * high

    @property
    def result_bytes(self) -> int:
        """Of the artifact."""
        return _result(self.stores)

    @property
    def disk_bytes(self) -> int:
        """Of a node that has nothing yet: what is fetched and what is written."""
        return sum(self.reads.values()) + self.written_bytes

    def document(self) -> dict[str, Any]:
        """The price as plain JSON values."""
        return {
            "stage": self.stage,
            "gpus": self.gpus,
            "flops": dict(self.flops),
            "hours": {**self.hours, "total": self.total_hours},
            "dollars": self.dollars,
            "memory_bytes": {**self.memory, "peak": self.peak_bytes},
            "read_bytes": dict(self.reads),
            "store_bytes": dict(self.stores),
            "written_bytes": self.written_bytes,
            "disk_bytes": self.disk_bytes,
            "checkpoint_seconds": dict(self.checkpoint),
            "remarks": list(self.remarks),
            "assumptions": {name: {"value": value, "origin": origin} for name, value, origin in self.assumptions},
        }


def sheet(
    recipe: Recipe,
    name: str,
    corpus: Corpus,
    *,
    gpus: int,
    hours: Mapping[str, Span],
    flops: Mapping[str, Span] | None = None,
    memory: Mapping[str, int] | None = None,
    peak_bytes: int = 0,
    reads: Mapping[str, int],
    stores: Mapping[str, int],
    kept_checkpoints: int = 0,
    remarks: Iterable[str] = (),
) -> Price:
    """The price of the stage `name`.

    Args:
        recipe: with the variant applied.
        corpus: what the figures were counted from.
        gpus: that it takes where the recipe has any; 0 for a stage of the CPU.
        kept_checkpoints: bytes of the checkpoints that are on disk at a time.
        remarks: what the caller has to say before the rest.

    Everything else as in `Price`.
    """
    limits = recipe.price
    gpus = gpus if recipe.runtime.device == "cuda" else 0
    hours = {STARTING: scaled(limits.start_seconds, 1 / 3600), **hours}
    if gpus:
        moved = {FETCHING: sum(reads.values()), STORING: _result(stores)}
        hours |= {
            part: scaled(over(exactly(size), limits.network_bytes_per_second), 1 / 3600) for part, size in moved.items()
        }
    low, high = add(hours.values())
    priced = Price(
        stage=name,
        gpus=gpus,
        flops=flops or {},
        hours=hours,
        dollars=(low * limits.dollars_per_gpu_hour[0] * gpus, high * limits.dollars_per_gpu_hour[1] * gpus),
        memory=memory or {},
        peak_bytes=peak_bytes,
        reads=reads,
        stores=stores,
        written_bytes=_result(stores) + kept_checkpoints,
        assumptions=tuple(_assumed(recipe, corpus, gpus)),
    )
    return replace(priced, remarks=(*remarks, *_remarks(recipe, priced)))


def _result(stores: Mapping[str, int]) -> int:
    return sum(size for part, size in stores.items() if part != CHECKPOINTS)


def _remarks(recipe: Recipe, priced: Price) -> Iterable[str]:
    limits, high = recipe.price, priced.total_hours[1]
    if not priced.gpus:
        return
    if priced.peak_bytes > limits.gpu_bytes:
        yield (
            f"{priced.peak_bytes / 1e9:,.0f} GB at the longest records are more than the {limits.gpu_bytes / 1e9:,.0f} "
            f"GB of {limits.gpu}; {_less_memory(priced.stage)}"
        )
    if (told := too_large_for_scratch(recipe, priced)) is not None:
        yield told
    if high > recipe.cluster.deadline_hours:
        yield (
            f"it may take {high:,.0f} hours, and cluster.deadline_hours={recipe.cluster.deadline_hours:g} stops it "
            "before; it goes on from its checkpoint when it is run again"
        )


def _less_memory(stage: str) -> str:
    if stage.startswith("stage"):
        return "lower data.max_length or the micro-batch, or take more GPUs (runtime.processes)"
    return "lower evaluation.batch_size or evaluation.frames"


def too_large_for_scratch(recipe: Recipe, priced: Price) -> str | None:
    """Why a Job of that price would fill its node's disk, or None where there is room."""
    if not priced.gpus or priced.disk_bytes <= _quantity(recipe.cluster.scratch):
        return None
    needed = -(-priced.disk_bytes // 2**30)
    return (
        f"{priced.disk_bytes / 1e9:,.0f} GB of inputs, checkpoints and result are more than the node's disk of "
        f"cluster.scratch={recipe.cluster.scratch}; set cluster.scratch={needed}Gi or more"
    )


def _assumed(recipe: Recipe, corpus: Corpus, gpus: int) -> Iterable[tuple[str, str, str]]:
    unused = (_MEANS if corpus.counted else ()) + (("cpu_flops_per_second",) if gpus else _CARD)
    left_out = {f"price.{name}" for name in unused}
    yield "a record", corpus.shown(), corpus.origin
    yield ("the peak", *_peak_shown(recipe))
    yield from (one for one in assumptions(recipe) if one[0].startswith("price.") and one[0] not in left_out)


def peak_flops(recipe: Recipe, precision: Precision = "bfloat16") -> float:
    """FLOPs a second of one GPU, or of the CPU, at most.

    Raises:
        PriceError: price.gpu is none that is known.
    """
    if recipe.runtime.device == "cpu":
        return recipe.price.cpu_flops_per_second
    peak = cost.peak_flops(recipe.price.gpu, precision)
    if peak is None:
        raise PriceError(
            f"price.gpu={recipe.price.gpu!r} is no GPU whose peak is known; name it as torch does, such as "
            "'NVIDIA A100-SXM4-80GB' or 'NVIDIA H100'"
        )
    return peak


def _peak_shown(recipe: Recipe) -> tuple[str, str]:
    half, full = peak_flops(recipe, "bfloat16") / 1e12, peak_flops(recipe, "float32") / 1e12
    if recipe.runtime.device == "cpu":
        return f"{full:g} TFLOP/s", "price.cpu_flops_per_second, because runtime.device=cpu; it costs nothing"
    return f"{half:g} TFLOP/s in bfloat16, {full:g} in float32", f"data sheet of {recipe.price.gpu}, dense"


def computing(recipe: Recipe, flops: Iterable[Span], gpus: int, precision: Precision = "bfloat16") -> Span:
    """Hours of so many FLOPs on so many GPUs, or on the CPU of as many processes."""
    return scaled(over(add(flops), recipe.price.utilisation, gpus * peak_flops(recipe, precision)), 1 / 3600)


def reading(recipe: Recipe, bytes_: Span) -> Span:
    """Hours in which a GPU reads so many bytes from its memory, as it does where positions are computed one by one."""
    return scaled(over(bytes_, recipe.price.bandwidth_utilisation, recipe.price.gpu_bytes_per_second), 1 / 3600)


# ------------------------------------------------------------------------------------------------------------- ranges


def exactly(value: float) -> Span:
    """A range of one value."""
    return float(value), float(value)


def scaled(span: Span, factor: float) -> Span:
    """Both ends times `factor`."""
    return span[0] * factor, span[1] * factor


def add(spans: Iterable[Span]) -> Span:
    """The sum of ranges."""
    low = high = 0.0
    for span in spans:
        low, high = low + span[0], high + span[1]
    return low, high


def over(amount: Span, rate: Span, times: float = 1.0) -> Span:
    """Seconds of an amount at a rate of `rate` times `times` a second."""
    return amount[0] / (rate[1] * times), amount[1] / (rate[0] * times)


def shown(span: Span, form: str = "{:,.3g}") -> str:
    """``3.4`` or ``3.4 to 7``."""
    low, high = (form.format(value) if value < 1000 or "," not in form else f"{value:,.0f}" for value in span)
    return low if low == high else f"{low} to {high}"


_UNITS = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def _quantity(amount: str) -> float:
    """The number behind an amount in Kubernetes' notation, such as 64Gi."""
    number = amount.rstrip("mkKMGTi")
    return float(number) * _UNITS.get(amount.removeprefix(number), 1)
