"""What a training stage costs: the FLOPs of its updates, and the slots that wait for memory one by one.

In: a recipe with its variant applied, what is trained on, the shape of the model. Out: a `Price`.
FLOPs are those of `recipe.cost`, with all that is computed beside: activations computed again, the roll-out of the
slots, feedback hops and teachers. Left out are the projectors (below a thousandth) and the optimizer's step.
Always: rows count with their mean length, and memory at the longest one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from valr_ops.recipe import cost
from valr_ops.recipe.cost import Shape
from valr_ops.recipe.cost_artifacts import FEATURES, Teacher, input_bytes, teacher, weight_bytes
from valr_ops.recipe.cost_sheet import (
    CHECKPOINTS,
    Price,
    Span,
    add,
    computing,
    exactly,
    over,
    reading,
    scaled,
    sheet,
    shown,
)
from valr_ops.recipe.recipe import Recipe, TrainingRecipe
from valr_ops.recipe.workload import Corpus

_LOGIT_BYTES = 10
"""Of a logit in bfloat16, its float32 copy and that one's gradient."""
_REDUCED_AT_ONCE = 500_000_000
"""Gradients in ZeRO's bucket, DeepSpeed's default."""
_SLOT_PASSES = 3
"""Times that `sequential` runs the blocks for a slot: forward, MLP computed again, gradient of the activations."""
_INPUTS = ("cot_corpus", "base_model", "latent_corpus")


def training_price(recipe: Recipe, stage: Literal[1, 2], corpus: Corpus, model: Shape, name: str) -> Price:
    """What a training stage costs.

    Args:
        recipe: with the variant applied.
        stage: 1 without latents, 2 with them.
        corpus: what is trained on.
        model: the shape of what is trained.
        name: of the stage.
    """
    teachers, remarks = {}, []
    aligned = recipe.alignment.teachers if stage == 2 and recipe.alignment.weight > 0 else ()
    for wanted in aligned:
        found = teacher(recipe, wanted, corpus, model)
        if found is None:
            remarks.append(f"teachers.{wanted} is left out: what {recipe.teachers[wanted].model} costs is not known")
        else:
            teachers[wanted] = found
    run = _Training(recipe, recipe.stage1 if stage == 1 else recipe.stage2, stage, corpus, model, teachers)
    memory, peak_bytes = run.memory()
    flops, inputs = (
        run.flops(),
        (*_INPUTS, *(("stage1_sft",) if stage == 2 else ()), *(FEATURES + one for one in aligned)),
    )
    priced = sheet(
        recipe,
        name,
        corpus,
        gpus=recipe.runtime.processes,
        flops=flops,
        hours=run.hours(flops),
        memory=memory,
        peak_bytes=peak_bytes,
        reads=input_bytes(recipe, inputs, corpus, model),
        stores=run.stores(),
        kept_checkpoints=min(run.training.keep_checkpoints + 1, run.checkpoints) * run.checkpoint_bytes,
        remarks=remarks,
    )
    if not run.gpu:
        return priced
    written, sent = run.checkpoint_seconds()
    notice = min(recipe.price.notice_seconds, float(recipe.cluster.grace_seconds))
    timed = replace(priced, checkpoint={"write": written, "send": sent, "notice": exactly(notice)})
    if written[1] + sent[1] <= notice:
        return timed
    every = run.training.checkpoint_every
    lost = min(every / run.updates, 1) * priced.working_seconds[1]
    remark = (
        f"a checkpoint of {run.checkpoint_bytes / 1e9:,.0f} GB takes {shown(add((written, sent)))} s to write "
        f"and send, and the notice is {notice:,.0f} s: a preempted run may lose up to {lost / 60:,.0f} minutes, "
        f"the updates since the last one; lower stage{stage}.checkpoint_every={every}, or raise "
        "cluster.grace_seconds and price.notice_seconds where the cloud allows it"
    )
    return replace(timed, remarks=(*timed.remarks, remark))


@dataclass(frozen=True)
class _Training:
    """A training stage in numbers."""

    recipe: Recipe
    training: TrainingRecipe
    stage: Literal[1, 2]
    corpus: Corpus
    model: Shape
    teachers: Mapping[str, Teacher]

    @property
    def gpu(self) -> bool:
        return self.recipe.runtime.device == "cuda"

    @property
    def updates(self) -> int:
        return updates(self.training, self.corpus.train, self.recipe.runtime.processes)

    @property
    def records(self) -> int:
        """That all updates read."""
        return self.updates * _records_per_update(self.training, self.recipe.runtime.processes)

    @property
    def segments(self) -> float:
        """Of a record."""
        return self.corpus.segments if self.stage == 2 else 0.0

    @property
    def slots(self) -> int:
        """Of a segment."""
        return self.recipe.latents.fed_slots

    @property
    def two_pass(self) -> bool:
        return self.segments > 0 and self.recipe.latents.method == "two_pass"

    @property
    def positions(self) -> int:
        """Of a record, slots and markers included."""
        return round(self.corpus.positions + self.segments * (self.slots + 2))

    @property
    def labelled(self) -> int:
        """Of a record, the positions with logits."""
        return min(round(self.corpus.supervised + self.segments), self.positions)

    @property
    def zero(self) -> bool:
        return self.training.engine == "deepspeed" or self.recipe.runtime.processes > 1

    @property
    def stored(self) -> int:
        """Bytes of a weight, as the products read it from memory."""
        return 2 if self.zero and self.training.precision == "bfloat16" else 4

    @property
    def computed(self) -> int:
        """Bytes of a number in a product."""
        return 2 if self.training.precision == "bfloat16" else 4

    @property
    def projectors(self) -> int:
        width = self.recipe.alignment.projector_width
        encoders = (one.encoder for one in self.teachers.values())
        return sum(cost.projector_parameters(self.model, encoder.width, width) for encoder in encoders)

    @property
    def checkpoint_bytes(self) -> int:
        """Weights and two moments in float32 of all that is trained."""
        return 12 * (self.model.decoder_parameters + self.projectors)

    @property
    def checkpoints(self) -> int:
        return math.ceil(self.updates / self.training.checkpoint_every)

    @property
    def online(self) -> list[Teacher]:
        """The teachers that are computed beside training."""
        return [one for one in self.teachers.values() if one.mode == "online"]

    def flops(self) -> dict[str, Span]:
        """Of the whole stage, by part."""
        forward = self.model.decoder_flops(self.positions, self.labelled)
        blocks = self.model.decoder_flops(self.positions, 0)
        tower = self.corpus.images * self.model.vision_flops(
            round(cost.MERGE**2 * self.corpus.image_positions / self.corpus.images)
        )
        parts: dict[str, Span] = {
            "decoder, forward and backward": exactly(3 * forward),
            "vision tower": exactly(tower),
        }
        if self.gpu:
            parts["activations computed again"] = exactly(blocks)
        if self.two_pass:
            parts["roll-out of the slots"] = exactly(blocks)
            # A hop goes back through the activations only, and on a GPU computes them again for it.
            parts["feedback hops"] = scaled(self._hops(), forward + (blocks if self.gpu else 0))
        elif self.segments and self.recipe.latents.method == "reference":
            prefixes = self.segments * self.slots * 3 * self.model.decoder_flops(self.positions // 2, 0)
            parts["growing prefixes"] = exactly(prefixes)
        if self.online:
            looked_at = self.segments * self.corpus.aimed
            parts["teachers"] = exactly(looked_at * sum(one.encoder.flops for one in self.online))
        whole = {part: scaled(span, self.records) for part, span in parts.items() if span[1]}
        held_out = forward + tower + (blocks if self.two_pass else 0)
        return whole | {"validation": exactly(self.corpus.validation * held_out)}

    def _hops(self) -> Span:
        """Feedback hops of a record: records of like size share a micro-batch, so the mean of their slots is the most.

        Each goes through the whole row, one after the other. `full` ends early where a hop changes less than the
        precision of the states holds, which those of float32 weights do not reach before the last slot.
        """
        asked, most = self.recipe.latents.feedback_gradient, self.segments * self.slots
        if asked == "cut":
            return 0.0, 0.0
        if asked == "full":
            return min(self.recipe.price.full_feedback_hops if self.stored == 2 else most, most), most
        return exactly(min(int(asked.removeprefix("hops:")), most))

    def memory(self) -> tuple[dict[str, int], int]:
        """Bytes of one process by part, and the most that is there at a time."""
        parts = cost.training_memory(self.model, self.training, self.recipe.runtime.processes, self.projectors)
        if self.zero:
            parts["gradients being reduced"] = self.stored * min(_REDUCED_AT_ONCE, self.model.decoder_parameters)
        if self.online:
            parts["teachers"] = sum(one.weight_bytes for one in self.online)
        held = sum(parts.values())
        slots = self.corpus.most_segments * self.slots if self.segments else 0
        longest = min(self.recipe.data.max_length, self.corpus.longest + slots)
        rows = self.training.micro_batch * longest
        activations = self.computed * self.model.kept_for_backward(rows, checkpointed=self.gpu)
        logits = _LOGIT_BYTES * round(rows * self.labelled / self.positions) * self.model.vocabulary
        parts |= {"activations of the longest micro-batch": activations, "its logits": logits}
        if not self.two_pass:
            return parts, held + activations + logits
        a_batch = rows * self.stored * self.model.cached_per_position
        # As roll_out divides a window: no group's cache is larger than twice the decoder's weights.
        together = max(2 * self.stored * self.model.block_parameters // a_batch, 1)
        cache = min(together, self.training.accumulation) * a_batch
        parts["keys and values of the roll-out"] = cache
        return parts, held + max(activations + logits, cache)

    def stores(self) -> dict[str, int]:
        return {"model": weight_bytes(self.model, self.computed), CHECKPOINTS: self.checkpoints * self.checkpoint_bytes}

    def checkpoint_seconds(self) -> tuple[Span, Span]:
        """To write one, and to send it."""
        size, limits = exactly(self.checkpoint_bytes), self.recipe.price
        return over(size, limits.disk_bytes_per_second), over(size, limits.network_bytes_per_second)

    def hours(self, flops: Mapping[str, Span]) -> dict[str, Span]:
        """Of the updates, by part."""
        recipe, limits = self.recipe, self.recipe.price
        parts = {"computing": computing(recipe, flops.values(), recipe.runtime.processes, self.training.precision)}
        if self.gpu and self.segments:
            a_slot = reading(recipe, exactly(self.stored * self.model.block_parameters))
            # Rows go in lock step, so that in a window the one with the most segments decides.
            least, most = self.slots * self.segments, float(self.slots * self.corpus.most_segments)
            serial = self.updates
            if not self.two_pass:
                # With a graph every small product is launched by itself, and that may take longer than the memory.
                launched = scaled(limits.eager_step_seconds, 1 / 3600)
                a_slot = max(a_slot[0], launched[0]), max(a_slot[1], launched[1])
                serial *= _SLOT_PASSES * self.training.accumulation
            parts["slots one by one"] = serial * least * a_slot[0], serial * most * a_slot[1]
        written, sent = self.checkpoint_seconds()
        # Sending goes on beside the updates at best, and waits for the network at worst.
        parts[CHECKPOINTS] = scaled((written[0], written[1] + sent[1]), self.checkpoints / 3600)
        return parts


def updates(training: TrainingRecipe, visits: float, processes: int) -> int:
    """Optimizer updates of a stage that visits so many records an epoch, as `training.schedule` counts them."""
    wanted = math.ceil(training.epochs * visits / _records_per_update(training, processes))
    return wanted if training.max_updates is None else min(wanted, training.max_updates)


def _records_per_update(training: TrainingRecipe, processes: int) -> int:
    return training.micro_batch * training.accumulation * processes
