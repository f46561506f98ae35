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
NO_SLOTS = torch.zeros(4, 6, dtype=torch.bool)
SLOTS = NO_SLOTS.clone()
SLOTS[0, 2] = SLOTS[0, 4] = SLOTS[3, 4] = True


def make_layer(key_value_heads: int) -> Any:
    changes = {"base.from_scratch.attention_heads": 4, "base.from_scratch.key_value_heads": key_value_heads}
    widths = tiny.recipe(**changes).base.from_scratch
    assert widths is not None
    return tiny_model(widths, tiny.processor(), seed=1).double().model.language_model.layers[0]


def split_heads(states: Tensor, heads: int) -> Tensor:
    """[1, T, heads * 8] as [1, heads, T, 8]."""
    return states.view(*states.shape[:2], heads, 8).transpose(1, 2)


def test_a_packed_row_holds_the_real_positions_heads_first_and_nothing_else() -> None:
    padded = torch.arange(24).view(4, 6)
    packed = pack(MASK, SLOTS)
    head, tail = packed.gather(padded)
    assert head.tolist() == [[0, 1, 6, 18, 19, 20, 21]]
    assert tail.tolist() == [[2, 3, 4, 22, 23]]
    assert (packed.heads, packed.tails) == ([2, 1, 4], [3, 0, 2])
    found = torch.cat([head, tail], dim=1)[0][packed.places]
    assert torch.equal(found[MASK.bool()], padded[MASK.bool()])


def test_without_slots_everything_is_head_in_the_order_of_the_batch() -> None:
    padded = torch.randn(4, 6, 2, 3)
    packed = pack(MASK, NO_SLOTS)
    head, tail = packed.gather(padded)
    assert torch.equal(head[0], padded[MASK.bool()])
    assert tail.shape == (1, 0, 2, 3)
    assert (packed.heads, packed.tails) == ([5, 1, 6], [0, 0, 0])


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
@pytest.mark.parametrize("slots", ["SLOTS", "NO_SLOTS"])
def test_packed_attention_is_that_of_each_record_alone(slots: str, key_value_heads: int) -> None:
    layer, packed = make_layer(key_value_heads), pack(MASK, globals()[slots])
    torch.manual_seed(0)
    padded = [split_heads(torch.randn(4, 6, 8 * count, dtype=torch.float64), count) for count in (4, key_value_heads)]
    query, key = padded
    value = key.flip(2)
    given = [torch.cat(packed.gather(one.transpose(1, 2)), dim=1).transpose(1, 2) for one in (query, key, value)]
    parts = [one.split([sum(packed.heads), sum(packed.tails)], dim=2) for one in given]
    found = [packed.attend_heads(layer, *(head for head, _ in parts))]
    if sum(packed.tails):
        found.append(packed.attend_tails(layer, parts[0][1], given[1], given[2]))
    states = torch.cat(found, dim=1)[0][packed.places]
    for row, length in enumerate(MASK.sum(1).tolist()):
        if length:
            alone = attend(layer, *(one[row : row + 1, :, :length] for one in (query, key, value)))[0]
            assert torch.allclose(states[row, :length], alone, atol=1e-12)
    assert states.shape == (4, 6, 32)


def row_of(packed: Pack, padded: Tensor) -> Tensor:
    """[T, ...], heads and tails."""
    return torch.cat(packed.gather(padded), dim=1)[0]


def sums(packed: Pack, sees: Tensor, inputs: Tensor) -> Tensor:
    """States [T, hidden] that add up the inputs of those positions which each position sees, [T, T]."""
    return sees.to(inputs.dtype) @ row_of(packed, inputs)


def test_records_that_are_kept_apart_leak_exactly_nothing() -> None:
    packed, inputs = pack(MASK, SLOTS), torch.randn(4, 6, 3, dtype=torch.float64)
    apart = packed.rows[:, None] == packed.rows
    assert leak(lambda given: sums(packed, apart, given), packed, inputs) == 0.0


def test_one_position_that_sees_its_neighbours_last_is_a_leak() -> None:
    packed, inputs = pack(MASK, NO_SLOTS), torch.randn(4, 6, 3, dtype=torch.float64)
    sees = packed.rows[:, None] == packed.rows
    sees[5, 4] = True
    assert leak(lambda given: sums(packed, sees, given), packed, inputs) > 0.1


def test_a_leak_that_values_do_not_show_is_found_in_the_gradient() -> None:
    packed, inputs = pack(MASK, SLOTS), torch.ones(4, 6, 3, dtype=torch.float64)

    def even(given: Tensor) -> Tensor:
        """An even function of the first record: turning it around changes nothing."""
        own = row_of(packed, given)
        return own + given[0].square().sum()

    assert leak(even, packed, inputs) > 0.1


def test_a_leak_without_a_gradient_is_found_in_the_values() -> None:
    packed, inputs = pack(MASK, SLOTS), torch.ones(4, 6, 3, dtype=torch.float64)
    assert leak(lambda given: row_of(packed, given) + given[0].detach().sum(), packed, inputs) > 0.1
