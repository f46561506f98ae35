"""What a stage costs before it runs: FLOPs, memory, bytes, hours, dollars, and the limit above which it does not run.

In: a recipe and the name of a stage; what corpora and weights say about themselves where they are made already, else
the recipe's caps and the means that it assumes. Out: a `Price` whose hours and dollars are ranges, with every
assumption behind it by value and origin; afterwards, what the run took beside what was planned.
FLOPs are those of `recipe.cost`, here with all that is computed beside: activations computed again, the roll-out of the
slots, feedback hops and teachers. Left out are the projectors (below a thousandth) and the optimizer's step.
Always: nothing is measured, nothing heavy is imported, and rows count with their mean length.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from valr_ops.recipe import cost
from valr_ops.recipe.cost import Shape
from valr_ops.recipe.recipe import Recipe, TrainingRecipe, assumptions, override
from valr_ops.recipe.workload import Corpus, PriceError, assumed_corpus, made_corpus, questions
from valr_ops.stages import ablation_cells, stage

Span = tuple[float, float]
"""The least and the most."""
Precision = Literal["float32", "bfloat16"]

_MEANS = ("images_per_record", "image_pixels", "text_tokens", "segments_per_record", "most_segments")
"""Assumed until there is a corpus."""
_CARD = (
    *("gpu", "gpu_bytes", "gpu_bytes_per_second", "dollars_per_gpu_hour", "bandwidth_utilisation", "notice_seconds"),
    "network_bytes_per_second",
)
"""Assumed of GPUs in a cluster."""
_LOGIT_BYTES = 10
"""Of a logit in bfloat16, its float32 copy and that one's gradient."""
_REDUCED_AT_ONCE = 500_000_000
"""Gradients in ZeRO's bucket, DeepSpeed's default."""
_SLOT_PASSES = 3
"""Times that `sequential` reads the blocks for a slot: forward, MLP computed again, gradient of the activations."""


class NoPriceError(PriceError):
    """A stage whose cost has no formula here; such a stage is dispatched without being held against the limit."""


class PriceRefusedError(PriceError):
    """A stage whose price is above the recipe's limit: the message says by how much, what costs most, and the fix."""


@dataclass(frozen=True)
class Price:
    """What a stage is expected to cost."""

    stage: str
    gpus: int
    """None where the recipe runs on CPUs."""
    flops: Mapping[str, Span]
    """By part, all processes together."""
    hours: Mapping[str, Span]
    """By part; one comes after the other."""
    dollars: Span
    memory: Mapping[str, int]
    """Bytes of one process and its GPU, by part; not all are there at the same time."""
    peak_bytes: int
    """The most at a time, at the longest records."""
    reads: Mapping[str, int]
    """Bytes that are fetched once, by part."""
    stores: Mapping[str, int]
    """Bytes that are sent to the object store, by part."""
    disk_bytes: int
    """Of the node: what is fetched, the checkpoints that are kept and the one being written, and the result."""
    checkpoint: Mapping[str, Span] = field(default_factory=dict)
    """Seconds to write one, to send it to the object store, and of the notice that there is for both."""
    remarks: tuple[str, ...] = ()
    """What does not fit, and what to change."""
    assumptions: tuple[tuple[str, str, str], ...] = ()
    """Name, value, origin."""

    @property
    def total_hours(self) -> Span:
        """From the start of the Pod to its end."""
        return _sum(self.hours.values())

    @property
    def working_seconds(self) -> Span:
        """Of the updates or batches, without fetching inputs and storing the result."""
        low, high = _sum(span for part, span in self.hours.items() if part not in _MOVING)
        return 3600 * low, 3600 * high

    def document(self) -> dict[str, Any]:
        """The price as plain JSON values."""
        return {
            "stage": self.stage,
            "gpus": self.gpus,
            "flops": dict(self.flops),
            "hours": {**self.hours, "total": self.total_hours},
            "dollars": self.dollars,
            "memory_bytes": {**self.memory, "peak": self.peak_bytes},
            "read_bytes": dict(self.reads),
            "store_bytes": dict(self.stores),
            "disk_bytes": self.disk_bytes,
            "checkpoint_seconds": dict(self.checkpoint),
            "remarks": list(self.remarks),
            "assumptions": {name: {"value": value, "origin": origin} for name, value, origin in self.assumptions},
        }


_CHECKPOINTS, _FETCHING, _STORING = "checkpoints", "fetching inputs", "storing the result"
_MOVING = (_FETCHING, _STORING)


def price(recipe: Recipe, name: str, project: Path | None = None) -> Price:
    """What the stage `name` of a whole recipe costs.

    Args:
        recipe: of the project; the stage's own variant is applied here.
        name: a teacher_features, training or scores stage.
        project: folder with dvc.lock and artifacts/, whose corpora and base model are counted instead of assumed, if
            they were made from this recipe's data and base model.

    Raises:
        NoPriceError: another kind of stage, or a teacher of a class that has no formula.
        PriceError: a model or a number of records that is not known yet.
        RecipeError, UnknownStageError: no such stage or variant.
    """
    row = stage(name)
    if row.variant is not None:
        recipe = recipe.for_variant(row.variant)
    model = _model(recipe, project)
    corpus = made_corpus(recipe, project) or assumed_corpus(recipe, model)
    match row.function.rpartition(":")[2]:
        case "build_stage1":
            return training_price(recipe, 1, corpus, model, name)
        case "build_stage2":
            return training_price(recipe, 2, corpus, model, name)
        case "build_teacher_features":
            return _features_price(recipe, name.removeprefix("teacher_features_"), corpus, model, name)
        case "build_scores":
            return _scores_price(recipe, corpus, model, name, latents=row.variant is not None)
    raise NoPriceError(f"{name} has no price; priced are stages of the groups teachers and training, and scores")


def cell_prices(recipe: Recipe, project: Path | None = None) -> dict[str, Price]:
    """What each cell of the ablation costs that the recipe has a variant for, by its name; arguments as of `price`."""
    cells = (cell for cell in ablation_cells() if cell in recipe.variants)
    return {cell: price(recipe, ablation_cells()[cell].name, project) for cell in cells}


def together(prices: Iterable[Price]) -> tuple[Span, Span]:
    """Hours of all GPUs, and dollars, of several stages."""
    every = list(prices)
    return _sum(_times(one.total_hours, one.gpus) for one in every), _sum(one.dollars for one in every)


def _model(recipe: Recipe, project: Path | None) -> Shape:
    known = cost.shape(recipe)
    if known is not None:
        return known
    config = None if project is None else project / "artifacts" / "base_model" / "config.json"
    if config is None or not config.is_file():
        raise PriceError(
            f"only the checkpoint base.path={recipe.base.path} or base.hub_id={recipe.base.hub_id} says how large the "
            "model is; make base_model first: valr materialize +base_model"
        )
    values = json.loads(config.read_text("utf-8"))
    text, vision = SimpleNamespace(**values["text_config"]), SimpleNamespace(**values["vision_config"])
    tied = values["tie_word_embeddings"]
    return cost.shape_of(SimpleNamespace(get_text_config=lambda: text, vision_config=vision, tie_word_embeddings=tied))


def training_price(recipe: Recipe, stage: Literal[1, 2], corpus: Corpus, model: Shape, name: str = "training") -> Price:
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
    for teacher in aligned:
        found = _teacher(recipe, teacher, corpus, model)
        if found is None:
            remarks.append(f"teachers.{teacher} is left out: what {recipe.teachers[teacher].model} costs is not known")
        else:
            teachers[teacher] = found
    run = _Training(recipe, recipe.stage1 if stage == 1 else recipe.stage2, stage, corpus, model, teachers)
    memory, peak_bytes = run.memory()
    flops, processes = run.flops(), recipe.runtime.processes
    kept = min(run.training.keep_checkpoints + 1, run.checkpoints) * run.checkpoint_bytes
    priced = _finished(
        recipe, name, processes, flops, run.hours(flops), memory, peak_bytes, run.reads(), run.stores(), corpus, kept
    )
    if not run.gpu:
        return replace(priced, remarks=(*priced.remarks, *remarks))
    written, sent = run.checkpoint_seconds()
    notice = min(recipe.price.notice_seconds, float(recipe.cluster.grace_seconds))
    every = run.training.checkpoint_every
    if written[1] + sent[1] > notice:
        lost = min(every / run.updates, 1) * priced.working_seconds[1]
        remarks.append(
            f"a checkpoint of {run.checkpoint_bytes / 1e9:,.0f} GB takes {_shown(_sum((written, sent)))} s to write "
            f"and send, and the notice is {notice:,.0f} s: a preempted run may lose up to {lost / 60:,.0f} minutes, "
            f"the updates since the last one; lower stage{stage}.checkpoint_every={every}, or raise "
            "cluster.grace_seconds and price.notice_seconds where the cloud allows it"
        )
    timing = {"write": written, "send": sent, "notice": _exactly(notice)}
    return replace(priced, checkpoint=timing, remarks=(*priced.remarks, *remarks))


@dataclass(frozen=True)
class _Teacher:
    encoder: cost.Encoder
    weight_bytes: int
    target_bytes: int
    mode: Literal["stored", "online"]


@dataclass(frozen=True)
class _Training:
    """A training stage in numbers."""

    recipe: Recipe
    training: TrainingRecipe
    stage: Literal[1, 2]
    corpus: Corpus
    model: Shape
    teachers: Mapping[str, _Teacher]

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
        encoders = (teacher.encoder for teacher in self.teachers.values())
        return sum(cost.projector_parameters(self.model, encoder.width, width) for encoder in encoders)

    @property
    def checkpoint_bytes(self) -> int:
        """Weights and two moments in float32 of all that is trained."""
        return 12 * (self.model.decoder_parameters + self.projectors)

    @property
    def checkpoints(self) -> int:
        return math.ceil(self.updates / self.training.checkpoint_every)

    def of(self, mode: Literal["stored", "online"]) -> list[_Teacher]:
        return [teacher for teacher in self.teachers.values() if teacher.mode == mode]

    def flops(self) -> dict[str, Span]:
        """Of the whole stage, by part."""
        forward = self.model.decoder_flops(self.positions, self.labelled)
        blocks = self.model.decoder_flops(self.positions, 0)
        tower = self.corpus.images * self.model.vision_flops(
            round(cost.MERGE**2 * self.corpus.image_positions / self.corpus.images)
        )
        parts: dict[str, Span] = {
            "decoder, forward and backward": _exactly(3 * forward),
            "vision tower": _exactly(tower),
        }
        if self.gpu:
            parts["activations computed again"] = _exactly(blocks)
        if self.two_pass:
            parts["roll-out of the slots"] = _exactly(blocks)
            # A hop goes back through the activations only, and on a GPU computes them again for it.
            parts["feedback hops"] = _times(self._hops(), forward + (blocks if self.gpu else 0))
        elif self.segments and self.recipe.latents.method == "reference":
            prefixes = self.segments * self.slots * 3 * self.model.decoder_flops(self.positions // 2, 0)
            parts["growing prefixes"] = _exactly(prefixes)
        if self.of("online"):
            looked_at = self.segments * self.corpus.aimed
            parts["teachers"] = _exactly(looked_at * sum(teacher.encoder.flops for teacher in self.of("online")))
        whole = {part: _times(span, self.records) for part, span in parts.items() if span[1]}
        held_out = forward + tower + (blocks if self.two_pass else 0)
        return whole | {"validation": _exactly(self.corpus.validation * held_out)}

    def _hops(self) -> Span:
        """Feedback hops of a record."""
        asked, most = self.recipe.latents.feedback_gradient, self.segments * self.slots
        if asked == "cut":
            return 0.0, 0.0
        if asked == "full":
            return min(self.recipe.price.full_feedback_hops, most), most
        return _exactly(min(int(asked.removeprefix("hops:")), most))

    def memory(self) -> tuple[dict[str, int], int]:
        """Bytes of one process by part, and the most that is there at a time."""
        parts = cost.training_memory(self.model, self.training, self.recipe.runtime.processes, self.projectors)
        if self.zero:
            parts["gradients being reduced"] = self.stored * min(_REDUCED_AT_ONCE, self.model.decoder_parameters)
        if self.of("online"):
            parts["teachers"] = sum(teacher.weight_bytes for teacher in self.of("online"))
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

    def reads(self) -> dict[str, int]:
        images = self.corpus.records * self.corpus.images * self.recipe.price.image_bytes
        parts = {"model to start from": self._weights(), "images": round(images)}
        if self.of("stored"):
            a_target = sum(teacher.target_bytes for teacher in self.of("stored"))
            parts["stored features"] = round(self.corpus.targets * a_target)
        return parts

    def stores(self) -> dict[str, int]:
        return {"model": self._weights(), _CHECKPOINTS: self.checkpoints * self.checkpoint_bytes}

    def _weights(self) -> int:
        return self.computed * (self.model.decoder_parameters + self.model.vision_parameters)

    def checkpoint_seconds(self) -> tuple[Span, Span]:
        """To write one, and to send it."""
        size, limits = _exactly(self.checkpoint_bytes), self.recipe.price
        return _over(size, limits.disk_bytes_per_second), _over(size, limits.network_bytes_per_second)

    def hours(self, flops: Mapping[str, Span]) -> dict[str, Span]:
        """Of the updates, by part."""
        recipe, limits = self.recipe, self.recipe.price
        parts = {"computing": _computing(recipe, flops, recipe.runtime.processes, self.training.precision)}
        if self.gpu and self.segments:
            read = _exactly(self.stored * self.model.block_parameters / 3600)
            a_slot = _over(read, limits.bandwidth_utilisation, limits.gpu_bytes_per_second)
            # Rows go in lock step, so that in a window the one with the most segments decides.
            least, most = self.slots * self.segments, float(self.slots * self.corpus.most_segments)
            serial = self.updates if self.two_pass else _SLOT_PASSES * self.updates * self.training.accumulation
            parts["slots one by one"] = serial * least * a_slot[0], serial * most * a_slot[1]
        written, sent = self.checkpoint_seconds()
        # Sending goes on beside the updates at best, and waits for the network at worst.
        parts[_CHECKPOINTS] = _times((written[0], written[1] + sent[1]), self.checkpoints / 3600)
        return parts


def updates(training: TrainingRecipe, visits: float, processes: int) -> int:
    """Optimizer updates of a stage that visits so many records an epoch, as `training.schedule` counts them."""
    wanted = math.ceil(training.epochs * visits / _records_per_update(training, processes))
    return wanted if training.max_updates is None else min(wanted, training.max_updates)


def _records_per_update(training: TrainingRecipe, processes: int) -> int:
    return training.micro_batch * training.accumulation * processes


def _teacher(recipe: Recipe, name: str, corpus: Corpus, model: Shape) -> _Teacher | None:
    teacher, share = recipe.teachers[name], math.sqrt(math.prod(recipe.price.utilisation))
    encoder = cost.encoder(teacher, model, corpus.images if teacher.views == "joint" else 1.0)
    if encoder is None:
        return None
    element, scale = (1, 4) if teacher.storage == "int8" else (2, 0)
    target_bytes = encoder.patches * (encoder.width * element + scale)
    choice = cost.choose_features(
        wish=teacher.features,
        images_per_second=_peak_flops(recipe) * share / encoder.flops,
        image_bytes=target_bytes,
        images=round(corpus.targets),
        visits=corpus.train * corpus.segments * corpus.aimed * recipe.stage2.epochs * teacher.trainings,
        bytes_per_second=recipe.runtime.feature_bytes_per_second,
        largest_bytes=recipe.runtime.feature_bytes,
    )
    weight_bytes = encoder.parameters * (2 if teacher.precision == "bfloat16" else 4)
    return _Teacher(encoder, weight_bytes, target_bytes, choice.mode)


def _features_price(recipe: Recipe, teacher: str, corpus: Corpus, model: Shape, name: str) -> Price:
    if teacher not in recipe.teachers:
        raise PriceError(f"{name} needs teachers.{teacher}, which is not in the recipe; add it to params.yaml")
    one = _teacher(recipe, teacher, corpus, model)
    if one is None:
        raise NoPriceError(f"{name} has no price: what {recipe.teachers[teacher].model} computes is not known here")
    targets = corpus.targets if one.mode == "stored" else 0.0
    flops = {"teacher": _exactly(targets * one.encoder.flops)}
    priced = _finished(
        recipe,
        name,
        recipe.runtime.processes,
        flops,
        {"computing": _computing(recipe, flops, recipe.runtime.processes)},
        {"weights": one.weight_bytes},
        one.weight_bytes,
        {"weights": one.weight_bytes, "images": round(targets * recipe.price.image_bytes)},
        {"features": round(targets * one.target_bytes)},
        corpus,
    )
    if one.mode == "online":
        remark = "training computes these features itself, which is cheaper; the stage only looks at a few"
        return replace(priced, remarks=(*priced.remarks, remark))
    return priced


def _scores_price(recipe: Recipe, corpus: Corpus, model: Shape, name: str, *, latents: bool) -> Price:
    limits, asked, gpu = recipe.price, recipe.evaluation, recipe.runtime.device == "cuda"
    an_image = corpus.image_positions / corpus.images
    question = round((1 - limits.supervised_share) * limits.text_tokens)
    slots = corpus.segments * (recipe.latents.fed_slots + 2) if latents else 0.0
    least, most = limits.answer_tokens + slots, asked.max_new_tokens + slots
    least = min(least, most)
    elements = 2 if gpu else 4
    prompts: Span = (0.0, 0.0)
    towers, answers, serial = 0.0, (0.0, 0.0), (0.0, 0.0)
    longest = images = 0.0
    for items, shown in questions(recipe, corpus):
        prompt = round(question + shown * an_image)
        longest = max(longest, prompt + most)
        images += items * shown
        prompts = _sum((prompts, _exactly(items * model.decoder_flops(prompt, 1))))
        towers += items * shown * model.vision_flops(round(cost.MERGE**2 * an_image))
        batches = math.ceil(items / asked.batch_size)
        grown = [
            items * (model.decoder_flops(round(prompt + length), round(length)) - model.decoder_flops(prompt, 0))
            for length in (least, most)
        ]
        answers = _sum((answers, (grown[0], grown[1])))
        # A step reads the blocks, and the keys and values of all rows.
        a_step = [
            elements * (model.block_parameters + asked.batch_size * model.cached_per_position * (prompt + length / 2))
            for length in (least, most)
        ]
        serial = _sum((serial, (batches * least * a_step[0], batches * most * a_step[1])))
    flops = {"vision tower": _exactly(towers), "questions": prompts, "answers": answers}
    weights = elements * (model.decoder_parameters + model.vision_parameters)
    cache = round(elements * asked.batch_size * model.cached_per_position * longest)
    hours: dict[str, Span] = {}
    if gpu:
        # What is computed one position at a time waits for memory, not for products.
        hours["computing"] = _computing(recipe, {part: flops[part] for part in ("vision tower", "questions")}, 1)
        hours["answers, token by token"] = _times(
            _over(serial, limits.bandwidth_utilisation, limits.gpu_bytes_per_second), 1 / 3600
        )
    else:
        hours["computing"] = _computing(recipe, flops, 1)
    return _finished(
        recipe,
        name,
        1,
        flops,
        hours,
        {"weights": weights, "keys and values": cache},
        weights + cache,
        {"model": weights, "images": round(images * limits.image_bytes)},
        {},
        corpus,
    )


def _finished(
    recipe: Recipe,
    name: str,
    gpus: int,
    flops: Mapping[str, Span],
    hours: Mapping[str, Span],
    memory: Mapping[str, int],
    peak_bytes: int,
    reads: Mapping[str, int],
    stores: Mapping[str, int],
    corpus: Corpus,
    kept_checkpoints: int = 0,
) -> Price:
    """A price with what is alike for all stages: moving bytes, money, the card, the disk, and the assumptions.

    Args: those of `Price`, and the bytes of the checkpoints that are on disk at a time.
    """
    limits, gpu = recipe.price, recipe.runtime.device == "cuda"
    moved = {_FETCHING: reads, _STORING: {part: size for part, size in stores.items() if part != _CHECKPOINTS}}
    seconds = {
        part: _over(_exactly(sum(sizes.values())), limits.network_bytes_per_second) for part, sizes in moved.items()
    }
    hours = {**hours, **({part: _times(span, 1 / 3600) for part, span in seconds.items()} if gpu else {})}
    disk = sum(sum(sizes.values()) for sizes in moved.values()) + kept_checkpoints
    low, high = _sum(hours.values())
    dollars = (low * limits.dollars_per_gpu_hour[0] * gpus, high * limits.dollars_per_gpu_hour[1] * gpus)
    remarks = []
    if gpu and peak_bytes > limits.gpu_bytes:
        remarks.append(
            f"{peak_bytes / 1e9:,.0f} GB at the longest records are more than the {limits.gpu_bytes / 1e9:,.0f} GB of "
            f"{limits.gpu}; lower data.max_length or the micro-batch, or take more GPUs (runtime.processes)"
        )
    if gpu and disk > _bytes(recipe.cluster.scratch):
        remarks.append(
            f"{disk / 1e9:,.0f} GB of inputs, checkpoints and result are more than the node's disk of "
            f"cluster.scratch={recipe.cluster.scratch}; raise it"
        )
    if gpu and high > recipe.cluster.deadline_hours:
        remarks.append(
            f"it may take {high:,.0f} hours, and cluster.deadline_hours={recipe.cluster.deadline_hours:g} stops it "
            "before; it goes on from its checkpoint when it is run again"
        )
    unused = (_MEANS if corpus.counted else ()) + (("cpu_flops_per_second",) if gpu else _CARD)
    assumed = [("a record", corpus.shown(), corpus.origin), ("the peak", *_peak_shown(recipe))]
    left_out = {f"price.{name}" for name in unused}
    assumed += [one for one in assumptions(recipe) if one[0].startswith("price.") and one[0] not in left_out]
    return Price(
        stage=name,
        gpus=gpus if gpu else 0,
        flops=flops,
        hours=hours,
        dollars=dollars if gpu else (0.0, 0.0),
        memory=memory,
        peak_bytes=peak_bytes,
        reads=reads,
        stores=stores,
        disk_bytes=disk,
        remarks=tuple(remarks),
        assumptions=tuple(assumed),
    )


def _peak_flops(recipe: Recipe, precision: Precision = "bfloat16") -> float:
    if recipe.runtime.device == "cpu":
        return recipe.price.cpu_flops_per_second
    peak = cost.peak_flops(recipe.price.gpu, precision)
    if peak is None:
        raise PriceError(
            f"price.gpu={recipe.price.gpu!r} is no GPU whose peak is known; name it as torch does, such as "
            "'NVIDIA A100-SXM4-80GB' or 'NVIDIA H100'"
        )
    return peak


def _peak_shown(recipe: Recipe) -> tuple[str, str]:
    half, full = _peak_flops(recipe, "bfloat16") / 1e12, _peak_flops(recipe, "float32") / 1e12
    if recipe.runtime.device == "cpu":
        return f"{full:g} TFLOP/s", "price.cpu_flops_per_second, because runtime.device=cpu; it costs nothing"
    return f"{half:g} TFLOP/s in bfloat16, {full:g} in float32", f"data sheet of {recipe.price.gpu}, dense"


def _computing(recipe: Recipe, flops: Mapping[str, Span], gpus: int, precision: Precision = "bfloat16") -> Span:
    """Hours of so many FLOPs."""
    peak = gpus * _peak_flops(recipe, precision)
    return _times(_over(_sum(flops.values()), recipe.price.utilisation, peak), 1 / 3600)


# ------------------------------------------------------------------------------------------------ the limit, afterwards


def refuse(recipe: Recipe, name: str, project: Path | None = None) -> Price | None:
    """The price of a stage that is about to be dispatched; None for a stage that has none.

    Args: as of `price`.

    Raises:
        PriceRefusedError: the price may be above ``price.max_dollars`` or ``price.max_hours``.
        PriceError: the price of a stage that should have one is not known.
    """
    try:
        priced = price(recipe, name, project)
    except NoPriceError:
        return None
    told = refusal(recipe, priced, project)
    if told:
        raise PriceRefusedError(told)
    return priced


def refusal(recipe: Recipe, priced: Price, project: Path | None = None) -> str | None:
    """Why a stage of that price is not dispatched, or None where it is; `recipe` and `project` as `price` got them."""
    limits, hours, dollars = recipe.price, priced.total_hours, priced.dollars
    above = []
    if dollars[1] > limits.max_dollars:
        above.append(f"cost {_shown(dollars)} dollars, more than price.max_dollars={limits.max_dollars:,g}")
    if hours[1] > limits.max_hours:
        above.append(f"take {_shown(hours)} hours, more than price.max_hours={limits.max_hours:,g}")
    if not above:
        return None
    part, span = max(priced.flops.items(), key=lambda one: one[1][1])
    share = span[1] / _sum(priced.flops.values())[1]
    return (
        f"{priced.stage} is not dispatched: it may {' and '.join(above)}. {share:.0%} of its FLOPs at most: {part}. "
        f"{_cheaper(recipe, priced.stage, part, project)}Raise the limit to run it all the same; "
        f"`valr plan --stage {priced.stage}` shows where the figures come from"
    )


def _cheaper(recipe: Recipe, name: str, part: str, project: Path | None) -> str:
    if part != "feedback hops":
        return ""
    other = price(override(recipe, {"latents.feedback_gradient": "hops:2"}), name, project)
    return (
        f"latents.feedback_gradient={recipe.latents.feedback_gradient} makes up to one for each slot of a record; with "
        f"hops:2 the stage costs {_shown(other.dollars)} dollars and takes {_shown(other.total_hours)} hours. "
    )


def against_plan(planned: Price, seconds: float, peak_bytes: float | None = None) -> dict[str, float]:
    """What a run took beside what was planned: figures for its timings.

    Args:
        planned: its price.
        seconds: of all its updates or batches, checkpoints included, without fetching and storing.
        peak_bytes: the most memory that tensors took on one GPU, None where that was not measured.

    Returns:
        ``planned_seconds_low`` and ``planned_seconds_high``, ``seconds_over_plan`` (1 is their geometric mean), and
        where memory was measured ``planned_peak_bytes``, ``peak_bytes`` and ``peak_bytes_over_plan``.
    """
    low, high = planned.working_seconds
    found = {
        "planned_seconds_low": low,
        "planned_seconds_high": high,
        "seconds_over_plan": seconds / math.sqrt(low * high),
    }
    if peak_bytes is not None:
        found |= {
            "planned_peak_bytes": float(planned.peak_bytes),
            "peak_bytes": peak_bytes,
            "peak_bytes_over_plan": peak_bytes / planned.peak_bytes,
        }
    return found


def sum_rows(prices: Mapping[str, Price]) -> Iterable[tuple[str, str, str, str]]:
    """What a person reads of several stages: (name, hours, hours of all GPUs, dollars), with their sum at the end."""
    for name, one in prices.items():
        gpu_hours, dollars = together([one])
        yield name, _shown(one.total_hours), _shown(gpu_hours), _shown(dollars)
    gpu_hours, dollars = together(prices.values())
    yield f"{len(prices)} together", "", _shown(gpu_hours), _shown(dollars)


def rows(priced: Price) -> Iterable[tuple[str, str, str]]:
    """What a person reads: (section, part, figure)."""
    for part, span in priced.flops.items():
        yield "FLOPs", part, _shown(span, "{:.3g}")
    yield "FLOPs", "all", _shown(_sum(priced.flops.values()), "{:.3g}")
    for part, size in priced.memory.items():
        yield "memory of a process", part, f"{size / 1e9:,.3g} GB"
    yield "memory of a process", "most at a time", f"{priced.peak_bytes / 1e9:,.3g} GB"
    for part, size in priced.reads.items():
        yield "read", part, f"{size / 1e9:,.4g} GB"
    for part, size in priced.stores.items():
        yield "stored", part, f"{size / 1e9:,.4g} GB"
    yield "disk of a node", "with checkpoints", f"{priced.disk_bytes / 1e9:,.4g} GB"
    for part, span in priced.checkpoint.items():
        yield "checkpoint", part, f"{_shown(span)} s"
    for part, span in priced.hours.items():
        yield "hours", part, _shown(span)
    yield "hours", "all", _shown(priced.total_hours)
    yield "money", f"{priced.gpus} GPU{'s' * (priced.gpus != 1)}", f"{_shown(priced.dollars)} dollars"


_UNITS = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def _bytes(quantity: str) -> float:
    """Of an amount in Kubernetes' notation, such as 64Gi."""
    number = quantity.rstrip("mkKMGTi")
    return float(number) * _UNITS.get(quantity.removeprefix(number), 1)


def _exactly(value: float) -> Span:
    return float(value), float(value)


def _times(span: Span, factor: float) -> Span:
    return span[0] * factor, span[1] * factor


def _sum(spans: Iterable[Span]) -> Span:
    low = high = 0.0
    for span in spans:
        low, high = low + span[0], high + span[1]
    return low, high


def _over(amount: Span, rate: Span, times: float = 1.0) -> Span:
    """Seconds of an amount at a rate of `rate` times `times` a second."""
    return amount[0] / (rate[1] * times), amount[1] / (rate[0] * times)


def _shown(span: Span, form: str = "{:,.3g}") -> str:
    low, high = (form.format(value) if value < 1000 or "," not in form else f"{value:,.0f}" for value in span)
    return low if low == high else f"{low} to {high}"
