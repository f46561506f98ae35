"""The latent forward: a batch in, the cross-entropy and the block states at the latent slots out.

A slot's input embedding is the post-norm last hidden state of the position before it; everywhere else it is the
token's embedding or the image feature. So a segment of K slots is K serial decoder steps, and the text between
segments is one parallel step. `sequential` does exactly that, all rows of the batch in lock step, with keys, values
and the graph kept: exact values and the exact full gradient. `reference` says the same in a few slow, obvious lines.

Always: padding, neighbours and their order never change a record's result; without slots it is one parallel pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from valr_ops.data.batching import IGNORED, Batch
from valr_ops.model.qwen import check_block, input_embeddings, rope_positions
from valr_ops.recipe.recipe import RecipeError
from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (  # noqa: E402
    Qwen2_5_VLDecoderLayer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextModel,
    apply_rotary_pos_emb,
)


class SlotLayoutError(ValueError):
    """The slots of a batch don't form segments of equal length: the message says which promise is broken."""


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


def forward(
    model: Qwen2_5_VLForConditionalGeneration,
    batch: Batch,
    *,
    method: str = "sequential",
    feedback: str = "full",
    block: int | None = None,
) -> LatentOutput:
    """Run `batch` through `model` in mixed text and latent mode (paper, section 3).

    Args:
        model: Qwen2.5-VL; its vision tower gets no gradient. Where its decoder has gradient checkpointing switched on,
            the text between segments is checkpointed; slots are not, they are cheap.
        batch: right-padded rows with any number of segments, also none.
        method: "sequential", or "reference" for tests.
        feedback: "full" lets the gradient run through every fed-back state, "cut" through none of them.
        block: number, from zero, of the decoder block whose output is aligned; None where nothing is aligned.

    Raises:
        RecipeError: an unknown method or feedback, naming the recipe's field.
        ModelError: the model has no such block.
        SlotLayoutError: the batch's slots are not S runs of K positions, each behind a text position.
    """
    _check_recipe(model, method, feedback, block)
    slots = _slot_columns(batch)
    embeddings, positions = input_embeddings(model, batch), rope_positions(model, batch)
    run = _sequential if method == "sequential" else _reference
    decoder, cut = model.model.language_model, feedback == "cut"
    hidden, block_outputs = run(decoder, embeddings, positions, batch, slots, cut, block)

    supervised = batch.labels[:, 1:] != IGNORED
    labels = batch.labels[:, 1:][supervised]
    logits = model.lm_head(hidden[:, :-1][supervised])
    loss_sum = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")

    rows = batch.segment_rows[:, None]
    slot_inputs = hidden.detach()[rows, slots - 1]
    return LatentOutput(
        loss_sum=loss_sum,
        token_count=len(labels),
        states=block_outputs[rows, slots] if block_outputs is not None and len(slots) else None,
        slot_inputs=slot_inputs,
        norm_ratio=_norm_ratio(slot_inputs, embeddings.detach()[:, 1:][supervised]),
    )


def _check_recipe(model: Qwen2_5_VLForConditionalGeneration, method: str, feedback: str, block: int | None) -> None:
    if method not in ("sequential", "reference"):
        raise RecipeError(f"latents.method={method!r} is unknown; set it to 'sequential' (or 'reference', in tests)")
    if feedback not in ("full", "cut"):
        raise RecipeError(f"latents.feedback_gradient={feedback!r} is not available; set it to 'full' or 'cut'")
    if block is not None:
        check_block(model.config, block)
    if model.model.language_model.has_sliding_layers:
        raise RecipeError("the base model uses sliding-window attention; set use_sliding_window to false in its config")


def _slot_columns(batch: Batch) -> Tensor:
    """Columns of the slots, [S, K]."""
    mask = batch.slot_mask
    first = (mask & ~F.pad(mask, (1, 0))[:, :-1]).nonzero()
    last = (mask & ~F.pad(mask, (0, 1))[:, 1:]).nonzero()
    lengths = last[:, 1] - first[:, 1] + 1
    per_segment = int(lengths[0]) if len(lengths) else 0
    given = torch.stack([batch.segment_rows, batch.segment_starts], dim=1)
    if not torch.equal(first, given) or bool((lengths != per_segment).any()) or bool((given[:, 1] < 1).any()):
        raise SlotLayoutError(
            f"slot_mask has runs of {lengths.tolist()} slots at (row, column) {first.tolist()}, segments begin at "
            f"{given.tolist()}: they must be the same, of one length, each behind a token; build the batch with collate"
        )
    return batch.segment_starts[:, None] + torch.arange(per_segment, device=mask.device)


def _norm_ratio(slot_inputs: Tensor, embeddings: Tensor) -> float:
    if not slot_inputs.numel() or not embeddings.numel():
        return 0.0
    return float(slot_inputs.float().norm(dim=-1).mean() / embeddings.float().norm(dim=-1).mean())


def _reference(
    decoder: Qwen2_5_VLTextModel,
    embeddings: Tensor,
    positions: Tensor,
    batch: Batch,
    slots: Tensor,
    cut: bool,
    block: int | None,
) -> tuple[Tensor, Tensor | None]:
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
    return hidden, seen[0] if seen else None


def _sequential(
    decoder: Qwen2_5_VLTextModel,
    embeddings: Tensor,
    positions: Tensor,
    batch: Batch,
    slots: Tensor,
    cut: bool,
    block: int | None,
) -> tuple[Tensor, Tensor | None]:
    """Last hidden states and outputs of `block`, [batch, length, hidden] each, in as few decoder steps as can be."""
    layout = _align(batch, slots)
    rows = torch.arange(len(embeddings), device=embeddings.device)
    inputs = embeddings[rows[:, None], layout.columns]
    cosine, sine = (table[rows[:, None], layout.columns] for table in decoder.rotary_emb(embeddings, positions))
    rollout = _Rollout(decoder, cosine, sine, layout.visible, block)
    for text in layout.texts:
        hidden = rollout.text(inputs[:, text.begin : text.end])
        if text.source is not None:
            fed = hidden[rows, text.source]
            for _ in range(slots.shape[1]):
                fed = rollout.slot(fed.detach() if cut else fed)
    hidden = torch.cat(rollout.hidden, dim=1)[rows[:, None], layout.places]
    return hidden, torch.cat(rollout.outputs, dim=1)[rows[:, None], layout.places] if block is not None else None


@dataclass(frozen=True)
class _Text:
    """A run of aligned columns that needs no feedback, up to and including the `<latent>` of each row that has one."""

    begin: int
    end: int
    source: Tensor | None
    """[batch]: where in this run the position before the first slot stands; None where no slots follow."""


@dataclass(frozen=True)
class _Layout:
    """The batch with its n-th segments at the same columns: text, K slots, text, K slots, ... text."""

    columns: Tensor
    """[batch, aligned]: which column of the batch stands here; 0 where nothing does."""
    visible: Tensor
    """[batch, aligned] bool: whether anything stands here."""
    places: Tensor
    """[batch, length]: the inverse of `columns`; 0 at the batch's padding."""
    texts: list[_Text]


def _align(batch: Batch, slots: Tensor) -> _Layout:
    """Rows wait for each other before every segment; rows without further segments fill the gaps with their text."""
    lengths, per_segment = batch.attention_mask.sum(1).tolist(), slots.shape[1]
    starts: list[list[int]] = [[] for _ in lengths]
    for row, start in zip(batch.segment_rows.tolist(), batch.segment_starts.tolist(), strict=True):
        starts[row].append(start)
    aligned: list[list[int]] = [[] for _ in lengths]
    done = [0] * len(lengths)
    bounds: list[tuple[int, int, list[int] | None]] = []
    for segment in range(max(map(len, starts)) + 1):
        opening = {row: start[segment] for row, start in enumerate(starts) if segment < len(start)}
        waiting = opening or dict(enumerate(lengths))
        width = max(end - done[row] for row, end in waiting.items())
        begin = len(aligned[0])
        for row, columns in enumerate(aligned):
            end = opening.get(row, min(lengths[row], done[row] + width))
            columns += [*range(done[row], end), *[-1] * (width - end + done[row])]
            done[row] = end
            if opening:
                columns += range(end, end + per_segment) if row in opening else [-1] * per_segment
                done[row] += per_segment if row in opening else 0
        source = [opening[row] - 1 - aligned[row][begin] if row in opening else 0 for row in range(len(aligned))]
        bounds.append((begin, begin + width, source if opening else None))

    device = batch.input_ids.device
    column_of = torch.tensor(aligned, device=device)
    visible = column_of >= 0
    places = torch.zeros(batch.input_ids.shape, dtype=torch.int64, device=device)
    row_of, place_of = visible.nonzero(as_tuple=True)
    places[row_of, column_of[row_of, place_of]] = place_of
    texts = [_Text(b, e, None if s is None else torch.tensor(s, device=device)) for b, e, s in bounds if e > b]
    return _Layout(column_of.clamp(min=0), visible, places, texts)


class _Rollout:
    """The decoder's blocks with a growing past.

    Each block keeps its keys and values as a list of pieces, one a run of text and one a segment. A slot attends to the
    list, not to its concatenation: backward would have to keep one copy of the whole past for every slot.
    """

    def __init__(self, decoder: Qwen2_5_VLTextModel, cosine: Tensor, sine: Tensor, visible: Tensor, block: int | None):
        self.decoder, self.cosine, self.sine, self.visible, self.block = decoder, cosine, sine, visible, block
        self.layers = cast(list[Qwen2_5_VLDecoderLayer], list(decoder.layers))
        self.pieces: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.layers]
        self.length = 0
        self.in_segment = False
        self.hidden: list[Tensor] = []
        """Post-norm hidden states so far, [batch, columns, hidden] each."""
        self.outputs: list[Tensor] = []
        """Outputs of the chosen block so far."""

    def text(self, inputs: Tensor) -> Tensor:
        """Append a run of text, [batch, width, hidden]; returns its post-norm hidden states."""
        checkpointed = self.decoder.gradient_checkpointing and torch.is_grad_enabled()
        mask = self._text_mask(inputs.shape[1])
        hidden, turn = inputs, self._turn(inputs.shape[1])
        for index, layer in enumerate(self.layers):
            arguments = (layer, hidden, *turn, mask, tuple(self.pieces[index]))
            if checkpointed:
                hidden, key, value = checkpoint(_text_block, *arguments, use_reentrant=False)
            else:
                hidden, key, value = _text_block(*arguments)
            self.pieces[index].append((key, value))
            self._keep_output(index, hidden)
        self.in_segment = False
        return self._advance(hidden)

    def slot(self, fed: Tensor) -> Tensor:
        """Append one slot a row with the input embedding `fed`, [batch, hidden]; returns its post-norm hidden state."""
        hidden, turn, bias = fed[:, None], self._turn(1), self._slot_bias(fed)
        for index, layer in enumerate(self.layers):
            pieces = self.pieces[index]
            query, key, value = _query_key_value(layer, hidden, *turn)
            if self.in_segment:
                key, value = (torch.cat([old, new], dim=2) for old, new in zip(pieces.pop(), (key, value), strict=True))
            pieces.append((key, value))
            hidden = _finish(layer, hidden, _attend_to_pieces(layer, query, pieces, bias))
            self._keep_output(index, hidden)
        self.in_segment = True
        return self._advance(hidden)[:, 0]

    def _turn(self, width: int) -> tuple[Tensor, Tensor]:
        now = slice(self.length, self.length + width)
        return self.cosine[:, now], self.sine[:, now]

    def _text_mask(self, width: int) -> Tensor | None:
        """[batch, 1, width, past + width] bool; gaps stand behind the text of their run, where causality hides them."""
        if self.length == 0:
            return None
        past = self.visible[:, None, : self.length].expand(-1, width, -1)
        own = torch.ones(width, width, dtype=torch.bool, device=past.device).tril().expand(len(past), -1, -1)
        return torch.cat([past, own], dim=2)[:, None]

    def _slot_bias(self, like: Tensor) -> Tensor:
        """[batch, 1, 1, past + 1]: minus infinity at gaps."""
        seen = self.visible[:, None, None, : self.length]
        return F.pad(torch.zeros_like(seen, dtype=like.dtype).masked_fill(~seen, float("-inf")), (0, 1))

    def _keep_output(self, index: int, hidden: Tensor) -> None:
        if index == self.block:
            self.outputs.append(hidden)

    def _advance(self, hidden: Tensor) -> Tensor:
        self.length += hidden.shape[1]
        self.hidden.append(self.decoder.norm(hidden))
        return self.hidden[-1]


def _query_key_value(
    layer: Qwen2_5_VLDecoderLayer, hidden: Tensor, cosine: Tensor, sine: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """[batch, heads, width, head_dim] each, rotated; keys and values contiguous, because they are read many times."""
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    shape = (*hidden.shape[:2], -1, attention.head_dim)
    projections: tuple[nn.Module, ...] = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (projection(normed).view(shape).transpose(1, 2) for projection in projections)
    query, key = apply_rotary_pos_emb(query, key, cosine, sine)
    return query, key.contiguous(), value.contiguous()


def _finish(layer: Qwen2_5_VLDecoderLayer, hidden: Tensor, attended: Tensor) -> Tensor:
    """The rest of the block after attention, [batch, width, hidden]."""
    hidden = hidden + layer.self_attn.o_proj(attended)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def _text_block(
    layer: Qwen2_5_VLDecoderLayer,
    hidden: Tensor,
    cosine: Tensor,
    sine: Tensor,
    mask: Tensor | None,
    past: tuple[tuple[Tensor, Tensor], ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """One block on a run of text: its output and the run's keys and values."""
    query, key, value = _query_key_value(layer, hidden, cosine, sine)
    groups = layer.self_attn.num_key_value_groups
    keys, values = (
        torch.cat(parts, dim=2).repeat_interleave(groups, dim=1) for parts in zip(*past, (key, value), strict=True)
    )
    attended = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=mask is None, scale=layer.self_attn.scaling
    )
    return _finish(layer, hidden, attended.transpose(1, 2).flatten(2)), key, value


def _attend_to_pieces(
    layer: Qwen2_5_VLDecoderLayer, query: Tensor, pieces: list[tuple[Tensor, Tensor]], bias: Tensor
) -> Tensor:
    """Attention of one position to a list of pieces, [batch, 1, heads * head_dim].

    The query heads of a group are the rows of one matrix product, so keys are never repeated.
    """
    batch, heads, _, width = query.shape
    grouped = query.view(batch, -1, layer.self_attn.num_key_value_groups, width) * layer.self_attn.scaling
    scores = torch.cat([grouped @ key.transpose(2, 3) for key, _ in pieces], dim=3) + bias
    weights = scores.softmax(dim=3, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
    shares = weights.split([key.shape[2] for key, _ in pieces], dim=3)
    attended = sum(share @ value for share, (_, value) in zip(shares, pieces, strict=True))
    assert isinstance(attended, Tensor)
    return attended.reshape(batch, 1, heads * width)
