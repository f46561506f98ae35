"""What the machine could compute at most, which utilisation is a share of.

In: the ranks of a run and the precision of its products. Out: FLOPs a second of all ranks together, and how they are
known. Always: a GPU's figure is the data sheet's (dense); a CPU's is measured here with one large product, because data
sheets of CPUs don't say it. Without a figure there is no utilisation in the log, rather than a wrong one.
"""

from __future__ import annotations

import time
from typing import Literal

import torch

from valr_ops.recipe.cost import peak_flops
from valr_ops.training.engine import Ranks

_SIDE, _REPEATS = 768, 3


def peak(ranks: Ranks, precision: Literal["float32", "bfloat16"]) -> tuple[float | None, str]:
    """FLOPs a second that all ranks together could do at most, None where that is not known, and a line about it."""
    if ranks.device.type == "cpu":
        (total,) = ranks.sum([_measured()])
        return total, f"{total / 1e9:.3g} GFLOP/s, measured with a product of {_SIDE} x {_SIDE} matrices"
    name = torch.cuda.get_device_name(ranks.device)
    known = peak_flops(name, precision)
    if known is None:
        return None, f"not known for {name}, so it is left out"
    return known * ranks.size, f"{known * ranks.size / 1e12:.4g} TFLOP/s, {ranks.size} x {name} in dense {precision}"


def _measured() -> float:
    """FLOPs a second of float32 products on this process's threads, the best of a few tries."""
    matrix = torch.full((_SIDE, _SIDE), 0.5)
    best = float("inf")
    for _ in range(_REPEATS):
        started = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - started)
    return float(2 * _SIDE**3 / best)
