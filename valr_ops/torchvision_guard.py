"""Lets timm and transformers be imported where torchvision's compiled extension does not fit the installed torch.

A CPU build of torch beside a CUDA build of torchvision can't load ``torchvision/_C``; importing torchvision then stops
at ``operator torchvision::nms does not exist``, and timm and transformers' Qwen2.5-VL stop with it. torchvision
describes exactly two operators without looking whether they exist, ``nms`` and ``qnms``: declaring their schemas is
enough. They are declared, not implemented: calling them still fails, and nothing here uses them.

Always: where the extension loads, or where there is no torchvision, nothing is changed; calling twice is calling once.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


@functools.cache
def ensure_torchvision() -> torch.library.Library | None:
    """Make ``import torchvision`` work; call it before timm or a vision class of transformers is imported.

    Returns:
        The library fragment with the two declared operators, or None where torchvision needs no help. The cache holds
        the reference that keeps the operators declared.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _extension_loads(Path(spec.origin).parent):
        return None
    fragment = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            fragment.define(f"{operator}{_SCHEMA}")
    return fragment


def _extension_loads(package: Path) -> bool:
    """Whether the compiled operators of the torchvision in `package` can be loaded into this process."""
    for library in sorted([*package.glob("_C*.so"), *package.glob("_C*.pyd")]):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
        return True
    return False
