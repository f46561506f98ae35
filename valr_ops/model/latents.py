"""The latent forward: a batch in, the cross-entropy and the block states at the latent slots out.

A slot's input embedding is the post-norm last hidden state of the position before it; everywhere else it is the
token's embedding or the image feature. Three implementations of this one function:

    reference   re-runs the growing prefix for every slot: the definition, only for tests
    sequential  text in parallel runs, slots one by one, all rows in lock step, with the graph kept: the full gradient
    two_pass    rolls the slots out without gradient, then one parallel pass in which they are inputs like any other

The values are those of the definition in all three. `two_pass` sees the slot inputs z as constants, so the gradient
through the feedback is put back by hops (`LatentOutput.feedback`): with G(z) the states that the slots are fed from and
multiplier = 0 at first, each hop sets multiplier = dL/dz + (dG/dz)^T multiplier, and one backward of
L + <G(z), multiplier> gives all parameters their gradient. G is strictly causal, so N K hops are the full gradient.

Always: padding, neighbours and their order never change a record's result; without slots it is one parallel pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from valr_ops.data.batching import IGNORED, Batch
from valr_ops.model.blocks import Turn, attend, causal_mask, finish, heads, key_value, normed, query, turned
from valr_ops.model.cached import CachedDecoder
from valr_ops.model.deferred import DeferredLinears
from valr_ops.model.layout import Aligned, SlotLayoutError, align, slot_columns
from valr_ops.model.packing import Pack, PackingError, leak, pack
from valr_ops.model.qwen import check_block, input_embeddings, rope_positions, vision_embeddings
from valr_ops.model.tape import Tape
from valr_ops.recipe.recipe import RecipeError
from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (  # noqa: E402
    Qwen2_5_VLDecoderLayer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextModel,
)

Result = TypeVar("Result")

METHODS = ("two_pass", "sequential", "reference")


@dataclass(frozen=True)
class Rollout:
    """What the first pass leaves for the second pass of one batch."""

    vision: Tensor
    """[vision positions, hidden]: merged features of the batch's images and videos."""
    positions: Tensor
    """[3, batch, length] int64: M-RoPE positions."""
    slot_inputs: Tensor
    """[S, K, hidden]: the fed-back states, without graph."""


@dataclass(frozen=True)
class Feedback:
    """How the gradient through the fed-back states was put back."""

    hops: int = 0
    """Hops made; fewer than asked for where one more would change nothing."""
    residual: float = 0.0
    """Size of the last hop's change over the size of the multiplier: how much a further hop would still add."""


@dataclass(frozen=True)
class LatentOutput:
    """What one forward gives; S segments of K slots each, in the order of `batch.segment_rows`."""

    loss_sum: Tensor
    """Sum of the cross-entropy, in nats, over the supervised tokens; a scalar with graph, float32 or wider."""
    token_count: int
    """Number of supervised tokens."""
    states: Tensor | None
    """[S, K, hidden]: raw outputs of the chosen block at the slots, with graph; None without block or segments."""
    slot_inputs: Tensor
    """[S, K, hidden]: the fed-back states, detached, for health figures and tests."""
    norm_ratio: float
    """Mean norm of the fed-back states over the mean norm of the supervised tokens' embeddings; 0 without segments."""
    effective_rank: float
    """Mean over segments of how many directions the K fed-back states span, 1 to K; 0 without segments."""
    drift: float = 0.0
    """Largest |G(z) - z|, the second pass's states against those fed; rounding only, or something is wrong."""
    _edge: _Edge | None = field(default=None, repr=False)

    def feedback(self, loss: Tensor) -> tuple[Tensor, Feedback]:
        """The tensor to call backward on, of the same value as `loss`, and how its gradient was made.

        Args:
            loss: everything that depends on this output and shall be minimised, a scalar with graph. Call it once.
        """
        if self._edge is None or not loss.requires_grad:
            return loss, Feedback()
        return self._edge.close(loss)


@dataclass(frozen=True)
class _Edge:
    """The cut edge of the second pass, from the states G(z) to the slot inputs z, both [S, K, hidden]."""

    fed: Tensor
    returned: Tensor
    hops: int

    def close(self, loss: Tensor) -> tuple[Tensor, Feedback]:
        precision = torch.finfo(self.fed.dtype).eps
        multiplier, residual, hop = torch.zeros_like(self.fed), 0.0, 0
        term = torch.zeros_like(loss)
        while hop < self.hops:
            hop += 1
            (found,) = torch.autograd.grad(loss + term, self.fed, retain_graph=True)
            size = float(found.norm())
            residual = float((found - multiplier).norm()) / size if size else 0.0
            multiplier = found
            wide = torch.promote_types(found.dtype, torch.float32)
            term = (self.returned.to(wide) * multiplier.to(wide)).sum()
            if not residual > precision:
                break
        # The term has a gradient, but its value is no part of the loss.
        return loss + (term - term.detach()), Feedback(hop, residual)


def forward(
    model: Qwen2_5_VLForConditionalGeneration,
    batch: Batch,
    *,
    method: str = "sequential",
    feedback: str = "full",
    block: int | None = None,
    rollout: Rollout | None = None,
) -> LatentOutput:
    """Run `batch` through `model` in mixed text and latent mode (paper, section 3).

    Args:
        model: Qwen2.5-VL; its vision tower gets no gradient. Where its decoder has gradient checkpointing switched on,
            runs of text and the second pass are checkpointed, and of single slots the MLP; the rest is cheap.
        batch: right-padded rows with any number of segments, also none.
        method: "two_pass", "sequential", or "reference" for tests.
        feedback: "full" lets the gradient run through every fed-back state, "cut" through none of them, and "hops:H",
            for two_pass, through chains of at most H of them.
        block: number, from zero, of the decoder block whose output is aligned; None where nothing is aligned.
        rollout: this batch's part of an earlier `roll_out`, for two_pass; made here if it is missing.

    Raises:
        RecipeError: an unknown method or feedback, naming the recipe's field.
        ModelError: the model has no such block.
        SlotLayoutError: the batch's slots are not S runs of K positions, each behind a text position.
    """
    _check_recipe(model, method, feedback, block)
    slots = slot_columns(batch)
    if method == "two_pass" and len(slots) and rollout is None:
        (rollout,) = roll_out(model, [batch])
    vision = vision_embeddings(model, batch) if rollout is None else rollout.vision
    positions = rope_positions(model, batch) if rollout is None else rollout.positions
    embeddings = input_embeddings(model, batch, vision)
    decoder, rows = model.model.language_model, batch.segment_rows[:, None]

    fed = None
    if method == "reference":
        seen = _reference(decoder, embeddings, positions, batch, feedback == "cut", block)
    elif method == "sequential" and len(slots):
        seen = _sequential(decoder, embeddings, positions, batch, slots, feedback == "cut", block)
    else:
        if rollout is not None and len(slots):
            fed = rollout.slot_inputs.detach().to(embeddings.dtype).requires_grad_(torch.is_grad_enabled())
        seen = _parallel(decoder, embeddings, positions, batch, slots, fed, block)

    supervised = batch.labels[:, 1:] != IGNORED
    labels = batch.labels[:, 1:][supervised]
    logits = model.lm_head(seen.states(seen.places[:, :-1][supervised]))
    loss_sum = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")

    returned = seen.states(seen.places[rows, slots - 1])
    slot_inputs = returned.detach() if fed is None else fed.detach()
    return LatentOutput(
        loss_sum=loss_sum,
        token_count=len(labels),
        states=seen.block[seen.places[rows, slots]] if seen.block is not None and len(slots) else None,
        slot_inputs=slot_inputs,
        norm_ratio=_norm_ratio(slot_inputs, embeddings.detach()[:, 1:][supervised]),
        effective_rank=_effective_rank(slot_inputs),
        drift=0.0 if fed is None else float((returned.detach() - slot_inputs).abs().max()),
        _edge=_Edge(fed, returned, _hops(feedback, batch, slots)) if fed is not None and fed.requires_grad else None,
    )


def _check_recipe(model: Qwen2_5_VLForConditionalGeneration, method: str, feedback: str, block: int | None) -> None:
    if method not in METHODS:
        raise RecipeError(f"latents.method={method!r} is unknown; set it to {' or '.join(METHODS)}")
    known = feedback in ("full", "cut") or (feedback.startswith("hops:") and feedback[5:].isdecimal())
    if not known or (feedback.startswith("hops:") and method != "two_pass"):
        raise RecipeError(
            f"latents.feedback_gradient={feedback!r} is not available with latents.method={method!r}; set it to 'full' "
            "or 'cut', or to 'hops:2' (or another number) with the method 'two_pass'"
        )
    if block is not None:
        check_block(model.config, block)
    decoder = model.model.language_model
    if decoder.has_sliding_layers:
        raise RecipeError("the base model uses sliding-window attention; set use_sliding_window to false in its config")
    if decoder.training and decoder.config.attention_dropout:
        raise RecipeError(
            f"the base model has attention_dropout={decoder.config.attention_dropout}, with which a slot is fed "
            "another state than the training pass computes; set it to 0 in its config"
        )


def _hops(feedback: str, batch: Batch, slots: Tensor) -> int:
    """Hops that `feedback` asks for, at most as many as the longest chain of a record has: all its slots."""
    most = int(batch.segment_rows.bincount().max()) * slots.shape[1]
    if feedback == "full":
        return most
    return 0 if feedback == "cut" else min(int(feedback.removeprefix("hops:")), most)


def _norm_ratio(slot_inputs: Tensor, embeddings: Tensor) -> float:
    if not slot_inputs.numel() or not embeddings.numel():
        return 0.0
    return float(slot_inputs.float().norm(dim=-1).mean() / embeddings.float().norm(dim=-1).mean())


def _effective_rank(slot_inputs: Tensor) -> float:
    """exp of the entropy of the normalised singular values, averaged over segments (Roy and Vetterli, 2007)."""
    if not slot_inputs.numel():
        return 0.0
    if not slot_inputs.isfinite().all():
        return float("nan")
    with torch.autocast(slot_inputs.device.type, enabled=False):
        latents = slot_inputs.float()
        # Singular values by way of the K x K products: K is small, the hidden size is not.
        sizes = torch.linalg.eigvalsh(latents @ latents.transpose(1, 2)).clamp(min=0).sqrt()
    shares = sizes / sizes.sum(1, keepdim=True).clamp(min=torch.finfo(sizes.dtype).tiny)
    return float(torch.special.entr(shares).sum(1).exp().mean())


@torch.no_grad()
def roll_out(model: Qwen2_5_VLForConditionalGeneration, batches: Sequence[Batch]) -> list[Rollout]:
    """The slot inputs of all `batches`, decoded together without gradient.

    A serial step costs nearly the same for one row as for a hundred, so a whole accumulation window goes in at once,
    unless its keys and values would take more memory than training takes anyway. Text behind the last segment is not
    read: nothing depends on it.

    Raises:
        SlotLayoutError: the slots of a batch are not S runs of K positions, or K differs between batches.
    """
    widths = {found.shape[1] for batch in batches if len(found := slot_columns(batch))}
    if len(widths) > 1:
        raise SlotLayoutError(f"the batches of a window have {sorted(widths)} slots a segment; give all the same K")
    return [rollout for group in _groups(model, batches) for rollout in _roll_out(model, group, max(widths, default=0))]


def _groups(model: Qwen2_5_VLForConditionalGeneration, batches: Sequence[Batch]) -> Iterator[list[Batch]]:
    """`batches` in groups whose caches are no larger than twice the decoder's weights, as AdamW's moments are.

    That is a whole window for the models this is for; for a small one the cache would be the largest thing by far.
    """
    decoder, text = model.model.language_model, model.config.get_text_config()
    element = decoder.norm.weight.element_size()
    bound = 2 * sum(parameter.numel() for parameter in decoder.parameters()) * element
    head = text.hidden_size // text.num_attention_heads
    column = 2 * text.num_hidden_layers * text.num_key_value_heads * head * element
    group: list[Batch] = []
    for batch in batches:
        wide = [*group, batch]
        size = column * sum(len(one.input_ids) for one in wide) * max(one.input_ids.shape[1] for one in wide)
        if group and size > bound:
            yield group
            group = []
        group.append(batch)
    yield group


def _roll_out(model: Qwen2_5_VLForConditionalGeneration, batches: Sequence[Batch], slots: int) -> list[Rollout]:
    vision = [vision_embeddings(model, batch) for batch in batches]
    positions = [rope_positions(model, batch) for batch in batches]
    fed = torch.empty(0, 0, slots, model.config.get_text_config().hidden_size, device=model.device)
    if any(len(batch.segment_rows) for batch in batches):
        length = max(batch.input_ids.shape[1] for batch in batches)
        embedded = [input_embeddings(model, *of) for of in zip(batches, vision, strict=True)]
        inputs = torch.cat([F.pad(one, (0, 0, 0, length - one.shape[1])) for one in embedded])
        places = torch.cat([F.pad(one, (0, length - one.shape[2])) for one in positions], dim=1)
        fed = _fed_states(model.model.language_model, inputs, places, align(batches, slots), slots)
    rollouts, above = [], 0
    for batch, of_vision, of_positions in zip(batches, vision, positions, strict=True):
        rollouts.append(Rollout(of_vision, of_positions, fed[_numbers(batch), above + batch.segment_rows]))
        above += len(batch.input_ids)
    return rollouts


def _fed_states(decoder: Qwen2_5_VLTextModel, inputs: Tensor, positions: Tensor, layout: Aligned, slots: int) -> Tensor:
    """What every slot is fed, [segments of a row, rows, K, hidden]; without meaning where a row has no such segment."""
    runs = [run for run in layout.runs if run.source is not None]
    end = runs[-1].end + slots - 1
    rows = torch.arange(len(inputs), device=inputs.device)[:, None]
    columns, visible = layout.columns[:, :end], layout.visible[:, :end]
    inputs, positions = inputs[rows, columns], positions[:, rows, columns]
    cached = CachedDecoder(decoder, len(inputs), end)
    fed: list[Tensor] = []
    for run in runs:
        if fed:
            inputs[:, run.begin] = fed[-1]
        now = slice(run.begin, run.end)
        fed.append(cached.extend(inputs[:, now], positions[:, :, now], visible[:, now], run.source))
        for column in range(run.end, run.end + slots - 1):
            fed.append(cached.step(fed[-1], positions[:, :, column], visible[:, column]))
    return torch.stack(fed).unflatten(0, (len(runs), slots)).transpose(1, 2)


def _numbers(batch: Batch) -> Tensor:
    """[S] int64: whether a segment is the first of its row (0), the second ..."""
    counts = batch.segment_rows.bincount(minlength=1)
    before = counts.cumsum(0) - counts
    return torch.arange(len(batch.segment_rows), device=counts.device) - before[batch.segment_rows]


@dataclass(frozen=True)
class _Seen:
    """What a forward computed at P positions, in whatever order it did."""

    last: Tensor
    """[P, hidden], outputs of the last block."""
    norm: nn.Module
    """What makes hidden states of them; only few are wanted."""
    block: Tensor | None
    """[P, hidden], outputs of the chosen block."""
    places: Tensor
    """[batch, length] int64: where a position of the batch stands among the P."""

    def states(self, places: Tensor) -> Tensor:
        """Post-norm hidden states at `places`, [..., hidden]."""
        wanted: Tensor = normed(self.norm, self.last[places])
        return wanted


def _reference(
    decoder: Qwen2_5_VLTextModel, embeddings: Tensor, positions: Tensor, batch: Batch, cut: bool, block: int | None
) -> _Seen:
    """The definition: for each column with a slot, run the stock decoder on all columns before it."""

    def last_hidden_state(inputs: Tensor) -> Tensor:
        length = inputs.shape[1]
        mask, places = batch.attention_mask[:, :length], positions[:, :, :length]
        return decoder(
            inputs_embeds=inputs, attention_mask=mask, position_ids=places, use_cache=False
        ).last_hidden_state

    inputs = embeddings
    for column in batch.slot_mask.any(0).nonzero().flatten().tolist():
        fed = last_hidden_state(inputs[:, :column])[:, -1]
        fed = fed.detach() if cut else fed
        here = torch.where(batch.slot_mask[:, column, None], fed, inputs[:, column])
        inputs = torch.cat([inputs[:, :column], here[:, None], inputs[:, column + 1 :]], dim=1)
    seen: list[Tensor] = []
    tap = decoder.layers[block].register_forward_hook(lambda *call: seen.append(call[2])) if block is not None else None
    hidden = last_hidden_state(inputs)
    if tap is not None:
        tap.remove()
    places = torch.arange(batch.input_ids.numel(), device=hidden.device).view_as(batch.input_ids)
    return _Seen(hidden.flatten(0, 1), nn.Identity(), seen[0].flatten(0, 1) if seen else None, places)


def _parallel(
    decoder: Qwen2_5_VLTextModel,
    embeddings: Tensor,
    positions: Tensor,
    batch: Batch,
    slots: Tensor,
    fed: Tensor | None,
    block: int | None,
) -> _Seen:
    """All positions at once, packed: for batches without slots, and for the second pass, which is `fed`."""
    packed = pack(batch.attention_mask, batch.slot_mask)
    head, tail = packed.gather(embeddings)
    if fed is not None:
        # Only into the tails: what the heads compute is no function of it, so no hop goes there.
        tail = tail.index_put(
            (slots.new_zeros(()), packed.places[batch.segment_rows[:, None], slots] - head.shape[1]), fed
        )
    turns = zip(*(packed.gather(part) for part in decoder.rotary_emb(embeddings, positions)), strict=True)
    head_turn, tail_turn = turns
    outputs = None
    for index, layer in enumerate(_layers(decoder)):
        head, key, value = _checkpointed(decoder, _head_block, layer, head, head_turn, packed)
        if tail.numel():
            tail = _checkpointed(decoder, _tail_block, layer, tail, tail_turn, key, value, packed)
        if index == block:
            outputs = torch.cat([head, tail], dim=1)[0]
    return _Seen(torch.cat([head, tail], dim=1)[0], decoder.norm, outputs, packed.places)


def _head_block(
    layer: Qwen2_5_VLDecoderLayer, hidden: Tensor, turn: Turn, packed: Pack
) -> tuple[Tensor, Tensor, Tensor]:
    """One block on the heads: its output, and the heads' keys and values."""
    entering = normed(layer.input_layernorm, hidden)
    asked, (key, value) = query(layer, entering, turn), key_value(layer, entering, turn)
    return finish(layer, hidden, packed.attend_heads(layer, asked, key, value)), key, value


def _tail_block(
    layer: Qwen2_5_VLDecoderLayer, hidden: Tensor, turn: Turn, key: Tensor, value: Tensor, packed: Pack
) -> Tensor:
    """One block on the tails, with the keys and values of the heads."""
    entering = normed(layer.input_layernorm, hidden)
    asked, own = query(layer, entering, turn), key_value(layer, entering, turn)
    keys, values = (torch.cat(both, dim=2) for both in zip((key, value), own, strict=True))
    return finish(layer, hidden, packed.attend_tails(layer, asked, keys, values))


def check_packing(model: Qwen2_5_VLForConditionalGeneration, batch: Batch) -> None:
    """Raise `PackingError` if a record of a packed batch sees another one; a batch of one record passes."""
    packed = pack(batch.attention_mask, batch.slot_mask)
    if len(packed.heads) < 2:
        return
    decoder = model.model.language_model
    embeddings, positions = input_embeddings(model, batch).detach(), rope_positions(model, batch)
    no_slots = slot_columns(batch)[:0]
    seen = leak(
        lambda inputs: _parallel(decoder, inputs, positions, batch, no_slots, None, None).last, packed, embeddings
    )
    if seen != 0.0:
        raise PackingError(
            f"records {', '.join(batch.record_ids)}: packed into one row, one of them changes another's states by "
            f"{seen:.3g}; attention does not keep them apart on {embeddings.device}, set micro_batch to 1 and report it"
        )


def _sequential(
    decoder: Qwen2_5_VLTextModel,
    embeddings: Tensor,
    positions: Tensor,
    batch: Batch,
    slots: Tensor,
    cut: bool,
    block: int | None,
) -> _Seen:
    """Runs of text and single slots in turn, in as few decoder steps as can be."""
    layout = align([batch], slots.shape[1])
    rows = torch.arange(len(embeddings), device=embeddings.device)
    inputs = embeddings[rows[:, None], layout.columns]
    cosine, sine = (table[rows[:, None], layout.columns] for table in decoder.rotary_emb(embeddings, positions))
    walk = _Walk(decoder, (cosine, sine), layout.visible, block)
    fed: Tensor | None = None
    for run in layout.runs:
        given = inputs[:, run.begin : run.end]
        if fed is not None:
            given = torch.cat([fed[:, None], given[:, 1:]], dim=1)
        last = walk.run(given)
        if run.source is None:
            break
        fed = normed(decoder.norm, last[rows, run.source])
        for _ in range(slots.shape[1] - 1):
            fed = walk.slot(fed.detach() if cut else fed)
        fed = fed.detach() if cut else fed
    places = layout.places + rows[:, None] * layout.columns.shape[1]
    outputs = torch.cat(walk.outputs, dim=1).flatten(0, 1) if block is not None else None
    return _Seen(torch.cat(walk.last, dim=1).flatten(0, 1), decoder.norm, outputs, places)


class _Walk:
    """The decoder's blocks along aligned columns, a run or a slot at a time, with the graph kept."""

    def __init__(self, decoder: Qwen2_5_VLTextModel, turn: Turn, visible: Tensor, block: int | None) -> None:
        self.decoder, self.turn, self.visible, self.block = decoder, turn, visible, block
        self.bias = torch.zeros_like(visible, dtype=turn[0].dtype).masked_fill(~visible, float("-inf"))
        self.blocks = [_WalkedBlock(decoder, layer) for layer in _layers(decoder)]
        self.length = 0
        self.last: list[Tensor] = []
        """Outputs of the last block so far, [rows, columns, hidden] each."""
        self.outputs: list[Tensor] = []
        """Outputs of the chosen block so far."""

    def run(self, inputs: Tensor) -> Tensor:
        """Append a run, [rows, width, hidden]; returns the last block's outputs."""
        width, columns = inputs.shape[1], self.visible.shape[1]
        own = self.visible[:, self.length : self.length + width]
        # In the first run gaps stand on the right only, where causality hides them.
        mask = causal_mask(self.visible[:, : self.length], own) if self.length else None
        hidden, turn = inputs, self._turn(width)
        for index, block in enumerate(self.blocks):
            past = block.tape.read() if block.tape else None
            hidden, key, value = _checkpointed(self.decoder, _run_block, block.layer, hidden, turn, mask, past)
            block.tape = block.tape or Tape(columns, key)
            block.tape.write(key, value)
            self._keep_output(index, hidden)
        return self._advance(hidden)

    def slot(self, fed: Tensor) -> Tensor:
        """Append one slot a row with the input embedding `fed`, [rows, hidden]; returns its post-norm hidden state."""
        hidden, turn, bias = fed[:, None], self._turn(1), self.bias[:, : self.length + 1].clone()
        # A gap looks at itself, so that no row sees nothing.
        bias[:, -1] = 0.0
        for index, block in enumerate(self.blocks):
            hidden = block.slot(hidden, turn, bias)
            self._keep_output(index, hidden)
        return normed(self.decoder.norm, self._advance(hidden)[:, 0])

    def _turn(self, width: int) -> Turn:
        now = slice(self.length, self.length + width)
        return self.turn[0][:, now], self.turn[1][:, now]

    def _keep_output(self, index: int, hidden: Tensor) -> None:
        if index == self.block:
            self.outputs.append(hidden)

    def _advance(self, hidden: Tensor) -> Tensor:
        self.length += hidden.shape[1]
        self.last.append(hidden)
        return hidden


class _WalkedBlock:
    """One block with its keys and values, and its weights' gradients from single slots deferred."""

    def __init__(self, decoder: Qwen2_5_VLTextModel, layer: Qwen2_5_VLDecoderLayer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.layer = layer
        self._checkpointed = functools.partial(_checkpointed, decoder)
        self.tape: Tape | None = None
        self._projections = DeferredLinears(attention.q_proj, attention.k_proj, attention.v_proj)
        self._output = DeferredLinears(attention.o_proj)
        self._gate_up = DeferredLinears(mlp.gate_proj, mlp.up_proj)
        self._down = DeferredLinears(mlp.down_proj)

    def slot(self, hidden: Tensor, turn: Turn, bias: Tensor) -> Tensor:
        """The block's output at one column, [rows, 1, hidden]."""
        layer = self.layer
        assert self.tape is not None
        projected = self._projections(normed(layer.input_layernorm, hidden))
        query, key, value = (heads(layer, one) for one in projected)
        query, key = turned(torch.cat([query, key], dim=1), turn).split([query.shape[1], key.shape[1]], dim=1)
        attended = self.tape.attend(query, key, value, bias, layer.self_attn.scaling)
        hidden = hidden + self._output(attended)[0]
        return self._checkpointed(_slot_mlp, layer, self._gate_up, self._down, hidden)


def _slot_mlp(layer: Qwen2_5_VLDecoderLayer, gate_up: DeferredLinears, down: DeferredLinears, hidden: Tensor) -> Tensor:
    gate, up = gate_up(normed(layer.post_attention_layernorm, hidden))
    return hidden + down(layer.mlp.act_fn(gate) * up)[0]


def _run_block(
    layer: Qwen2_5_VLDecoderLayer,
    hidden: Tensor,
    turn: Turn,
    mask: Tensor | None,
    past: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One block on a run: its output and the run's keys and values."""
    entering = normed(layer.input_layernorm, hidden)
    key, value = key_value(layer, entering, turn)
    keys, values = (key, value) if past is None else (torch.cat(both, dim=2) for both in zip(past, (key, value)))
    return finish(layer, hidden, attend(layer, query(layer, entering, turn), keys, values, mask)), key, value


def _layers(decoder: Qwen2_5_VLTextModel) -> list[Qwen2_5_VLDecoderLayer]:
    return cast(list[Qwen2_5_VLDecoderLayer], list(decoder.layers))


def _checkpointed(decoder: Qwen2_5_VLTextModel, function: Callable[..., Result], *arguments: object) -> Result:
    """What `function` returns; where the decoder checkpoints, its activations are computed again in backward."""
    if decoder.gradient_checkpointing and torch.is_grad_enabled():
        return cast(Result, checkpoint(function, *arguments, use_reentrant=False))
    return function(*arguments)
