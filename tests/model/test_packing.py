"""Packed rows: padding is gone, positions are found again, and records don't see each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from valr_ops.model.blocks import attend
from valr_ops.model.packing import Pack, leak, pack
from valr_ops.model.qwen import tiny_model

MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 0],
        [1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1],
    ]
)
"""A long record, one of a single position, none at all, and one without padding."""


def make_layer(key_value_heads: int) -> Any:
    changes = {"base.from_scratch.attention_heads": 4, "base.from_scratch.key_value_heads": key_value_heads}
    widths = tiny.recipe(**changes).base.from_scratch
    assert widths is not None
    return tiny_model(widths, tiny.processor(), seed=1).double().model.language_model.layers[0]


def split_heads(states: Tensor, heads: int) -> Tensor:
    """[1, T, heads * 8] as [1, heads, T, 8]."""
    return states.view(*states.shape[:2], heads, 8).transpose(1, 2)


def test_a_packed_row_holds_the_real_positions_in_order_and_nothing_else() -> None:
    padded = torch.arange(24).view(4, 6)
    packed = pack(MASK)
    assert packed.gather(padded).tolist() == [[0, 1, 2, 3, 4, 6, 18, 19, 20, 21, 22, 23]]
    assert packed.lengths == [5, 1, 6]
    found = packed.gather(padded)[0][packed.places]
    assert torch.equal(found[MASK.bool()], padded[MASK.bool()])


def test_gathering_keeps_all_further_dimensions() -> None:
    padded = torch.randn(4, 6, 2, 3)
    assert torch.equal(pack(MASK).gather(padded)[0], padded[MASK.bool()])


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_packed_attention_is_that_of_each_record_alone(key_value_heads: int) -> None:
    layer, packed = make_layer(key_value_heads), pack(MASK)
    torch.manual_seed(0)
    query = split_heads(torch.randn(1, 12, 32, dtype=torch.float64), 4)
    key, value = (
        split_heads(torch.randn(1, 12, 8 * key_value_heads, dtype=torch.float64), key_value_heads) for _ in range(2)
    )
    alone = [
        attend(layer, *(one[:, :, begin:end] for one in (query, key, value)))
        for begin, end in ((0, 5), (5, 6), (6, 12))
    ]
    found = packed.attend(layer, query, key, value)
    assert found.shape == (1, 12, 32)
    assert torch.allclose(found, torch.cat(alone, dim=1), atol=1e-12)
    assert not torch.allclose(found, attend(layer, query, key, value), atol=1e-3)


def sums(packed: Pack, sees: Tensor, inputs: Tensor) -> Tensor:
    """States [T, hidden] that add up the inputs of those positions which each position sees, [T, T]."""
    return sees.to(inputs.dtype) @ packed.gather(inputs)[0]


def test_records_that_are_kept_apart_leak_exactly_nothing() -> None:
    packed, inputs = pack(MASK), torch.randn(4, 6, 3, dtype=torch.float64)
    apart = packed.rows[:, None] == packed.rows
    assert leak(lambda given: sums(packed, apart, given), packed, inputs) == 0.0


def test_one_position_that_sees_its_neighbours_last_is_a_leak() -> None:
    packed, inputs = pack(MASK), torch.randn(4, 6, 3, dtype=torch.float64)
    sees = packed.rows[:, None] == packed.rows
    sees[5, 4] = True
    assert leak(lambda given: sums(packed, sees, given), packed, inputs) > 0.1


def test_a_leak_that_values_do_not_show_is_found_in_the_gradient() -> None:
    packed, inputs = pack(MASK), torch.ones(4, 6, 3, dtype=torch.float64)

    def even(given: Tensor) -> Tensor:
        """An even function of the first record: turning it around changes nothing."""
        own = packed.gather(given)[0]
        return own + given[0].square().sum()

    assert leak(even, packed, inputs) > 0.1


def test_a_leak_without_a_gradient_is_found_in_the_values() -> None:
    packed, inputs = pack(MASK), torch.ones(4, 6, 3, dtype=torch.float64)
    assert leak(lambda given: packed.gather(given)[0] + given[0].detach().sum(), packed, inputs) > 0.1
