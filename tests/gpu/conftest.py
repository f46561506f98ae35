"""What every test here needs: a CUDA device, and products in the precision that the tensors have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    """What a recipe calls the device under test."""
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA device here")
    return "cuda"


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    """cuDNN rounds float32 convolutions to 10 bits unless told not to; a CPU's result is not that."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before
