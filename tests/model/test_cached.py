"""The cached decoder against the stock one in float64: rows with gaps, room that runs out, rows that leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from valr_ops.model import cached
from valr_ops.model.cached import CachedDecoder
from valr_ops.model.qwen import tiny_model

HIDDEN = 32


def make_decoder(key_value_heads: int = 2) -> Any:
    """The decoder of a tiny model with four query heads."""
    changes = {"base.from_scratch.attention_heads": 4, "base.from_scratch.key_value_heads": key_value_heads}
    widths = tiny.recipe(**changes).base.from_scratch
    assert widths is not None
    return tiny_model(widths, tiny.processor(), seed=1).double().model.language_model


@pytest.fixture(scope="module")
def decoder() -> Any:
    return make_decoder()


@pytest.fixture(autouse=True)
def grows_by_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached, "_GROWTH_COLUMNS", 3)


class Columns:
    """Random inputs [R, W, hidden], M-RoPE positions [3, R, W], another on every axis, and what is visible [R, W]."""

    def __init__(self, visible: str, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.visible = torch.tensor([[mark == "x" for mark in row] for row in visible.split()])
        rows, width = self.visible.shape
        self.inputs = torch.randn(rows, width, HIDDEN, generator=generator, dtype=torch.float64)
        self.positions = torch.randint(0, 50, (3, rows, width), generator=generator)

    def run(self, begin: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        now = slice(begin, end)
        return self.inputs[:, now], self.positions[:, :, now], self.visible[:, now]

    def step(self, column: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.inputs[:, column], self.positions[:, :, column], self.visible[:, column]

    def by_stock(self, decoder: Any) -> Tensor:
        """Post-norm states of the stock decoder on each row's visible columns alone; zeros elsewhere."""
        states = torch.zeros_like(self.inputs)
        for row, visible in enumerate(self.visible):
            given = self.inputs[row, visible][None], self.positions[:, row, visible][:, None]
            out = decoder(inputs_embeds=given[0], position_ids=given[1], use_cache=False)
            states[row, visible] = out.last_hidden_state[0].detach()
        return states


def same(found: Tensor, wanted: Tensor, visible: Tensor) -> bool:
    return torch.allclose(found[visible], wanted[visible], atol=1e-12)


GAPS = "xxxxxx.x.xxx ..xx.x.xx.xx x..x..xxxx.x .x.xxxx.xxx."
"""A row with its gaps late, one with a gap on the left, two with gaps everywhere; twelve columns."""


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_runs_and_steps_with_gaps_are_the_stock_decoder_without_them(key_value_heads: int) -> None:
    decoder, columns = make_decoder(key_value_heads), Columns(GAPS)
    wanted = columns.by_stock(decoder)
    rows = CachedDecoder(decoder, rows=4, capacity=1)
    found = [rows.extend(*columns.run(0, 4))]
    found += [rows.step(*columns.step(column))[:, None] for column in range(4, 9)]
    found += [rows.extend(*columns.run(9, 11)), rows.step(*columns.step(11))[:, None]]
    assert rows.length == 12 and rows.capacity >= 12
    assert same(torch.cat(found, dim=1), wanted, columns.visible)


def test_room_made_in_advance_and_room_made_on_the_way_give_the_same(decoder: Any) -> None:
    columns = Columns("xxxxxxxx xxxxxxxx")
    states, capacities = [], []
    for capacity in (1, 4, 5, 8, 100):
        rows = CachedDecoder(decoder, rows=2, capacity=capacity)
        rows.extend(*columns.run(0, 4))
        states.append(torch.stack([rows.step(*columns.step(column)) for column in range(4, 8)]))
        capacities.append(rows.capacity)
    assert capacities == [10, 10, 8, 8, 100]
    assert all(torch.allclose(other, states[0], atol=1e-12) for other in states[1:])


def test_the_wanted_columns_alone_are_those_of_the_whole_run(decoder: Any) -> None:
    columns, at = Columns(GAPS), torch.tensor([1, 4, 2, 2])
    states = []
    for wanted in (None, at):
        rows = CachedDecoder(decoder, rows=4, capacity=12)
        first = rows.extend(*columns.run(0, 5), at=wanted)
        rows.step(*columns.step(5))
        second = rows.extend(*columns.run(6, 12), at=wanted)
        whole = [run[torch.arange(4), at] if wanted is None else run for run in (first, second)]
        states.append(torch.stack(whole))
    seen = torch.stack([columns.visible[torch.arange(4), offset + at] for offset in (0, 6)])
    assert seen.sum() >= 5
    assert torch.allclose(states[0][seen], states[1][seen], atol=1e-12)


def test_rows_that_stay_do_not_notice_that_others_left_or_moved(decoder: Any) -> None:
    columns, kept = Columns(GAPS), torch.tensor([3, 1])
    wanted = columns.by_stock(decoder)[kept]
    rows = CachedDecoder(decoder, rows=4, capacity=5)
    rows.extend(*columns.run(0, 4))
    rows.step(*columns.step(4))
    rows.select(kept)
    found = []
    for begin, end in ((5, 8), (8, 9), (9, 12)):
        inputs, positions, visible = columns.run(begin, end)
        run = inputs[kept], positions[:, kept], visible[kept]
        one = run[0][:, 0], run[1][:, :, 0], run[2][:, 0]
        found.append(rows.step(*one)[:, None] if end - begin == 1 else rows.extend(*run))
    assert same(torch.cat(found, dim=1), wanted[:, 5:], columns.visible[kept][:, 5:])


def test_what_stands_at_an_invisible_column_never_matters(decoder: Any) -> None:
    columns = Columns(GAPS)
    states = []
    for loudness in (1.0, 1e6):
        inputs = columns.inputs * torch.where(columns.visible, 1.0, loudness)[..., None]
        rows = CachedDecoder(decoder, rows=4, capacity=12)
        found = [rows.extend(inputs[:, :5], columns.positions[:, :, :5], columns.visible[:, :5])]
        for column in range(5, 12):
            _, positions, visible = columns.step(column)
            found.append(rows.step(inputs[:, column], positions, visible)[:, None])
        states.append(torch.cat(found, dim=1))
    assert torch.equal(states[0][columns.visible], states[1][columns.visible])


def test_steps_without_a_word_about_visibility_are_visible(decoder: Any) -> None:
    columns = Columns("xxxxx xxxxx")
    rows = CachedDecoder(decoder, rows=2, capacity=5)
    rows.extend(*columns.run(0, 2))
    found = [rows.step(inputs, positions) for inputs, positions, _ in map(columns.step, (2, 3, 4))]
    assert torch.allclose(torch.stack(found, dim=1), columns.by_stock(decoder)[:, 2:], atol=1e-12)


def test_nothing_keeps_a_graph(decoder: Any) -> None:
    columns = Columns("xxx")
    inputs = columns.inputs.requires_grad_()
    rows = CachedDecoder(decoder, rows=1, capacity=3)
    assert not rows.extend(inputs[:, :2], *columns.run(0, 2)[1:]).requires_grad
    assert not rows.step(inputs[:, 2], *columns.step(2)[1:]).requires_grad
