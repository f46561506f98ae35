"""torchvision can be imported after `ensure_torchvision`, whatever build it is."""

from __future__ import annotations

import subprocess
import sys

import torch

from valr_ops.torchvision_guard import ensure_torchvision


def test_torchvision_timm_and_the_vision_model_import_after_the_guard_in_a_fresh_process() -> None:
    program = (
        "from valr_ops.torchvision_guard import ensure_torchvision; ensure_torchvision(); "
        "import torchvision.transforms.v2, timm; print('imported')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "imported", done.stderr


def test_a_second_call_declares_nothing_again() -> None:
    assert ensure_torchvision() is ensure_torchvision()


def test_the_two_operators_exist_after_the_guard() -> None:
    ensure_torchvision()
    for operator in (torch.ops.torchvision.nms, torch.ops.torchvision.qnms):
        schema = str(operator.default._schema)
        assert "Tensor dets, Tensor scores, float iou_threshold" in schema
