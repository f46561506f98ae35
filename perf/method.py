"""Speed and memory of the method: a step of stage 2 beside one of stage 1, hops, and generation.

The model has the real classes and 6.8 million random weights; records have four segments of 16 slots and about 700
positions. A step is forward and backward of a window of eight micro-batches of four records; teachers, projectors and
the optimizer, which don't depend on how latents are computed, are left out. One thread, as in the recipe: single
positions are slower with two. Every comparison takes its sides in turn, so that a slow minute of the machine hits both.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from perf.rows import Row, row
from tests import tiny
from valr_ops.data.batching import IGNORED, Batch
from valr_ops.model import latents
from valr_ops.model.cached import CachedDecoder
from valr_ops.model.decoding import ValrForConditionalGeneration
from valr_ops.model.qwen import freeze_tower, tiny_config
from valr_ops.recipe.cost import batch_flops, peak_flops, shape_of
from valr_ops.recipe.recipe import TinyModelRecipe
from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

from transformers import (  # noqa: E402
    LogitsProcessor,
    LogitsProcessorList,
    Qwen2_5_VLForConditionalGeneration,
)

SEGMENTS, SLOTS, BLOCK = 4, 16, 3
MICRO_BATCH, ACCUMULATION = 4, 8
RUNS = 5
SMALL = TinyModelRecipe(
    hidden_size=256,
    layers=8,
    attention_heads=8,
    key_value_heads=4,
    intermediate_size=640,
    vocabulary_size=2048,
    tower_pretraining_steps=0,
)
WIDE = TinyModelRecipe(
    hidden_size=2048,
    layers=36,
    attention_heads=16,
    key_value_heads=2,
    intermediate_size=11008,
    vocabulary_size=151_936,
    rope_theta=1e6,
    tower_pretraining_steps=0,
)
"""The decoder of Qwen2.5-VL-3B."""


def steps() -> Iterator[Row]:
    """Seconds of a stage-2 step over those of a stage-1 step on the same tokens."""
    torch.set_num_threads(1)
    model, window = small_model(), make_window(MICRO_BATCH, ACCUMULATION, SEGMENTS)
    seconds = in_turn(
        {
            "stage1": lambda: stage1(model, window),
            "two_pass_cut": lambda: stage2(model, window, "two_pass", "cut"),
            "two_pass_hops2": lambda: stage2(model, window, "two_pass", "hops:2"),
            "sequential": lambda: stage2(model, window, "sequential", "full"),
        },
        RUNS,
    )
    goals = {"two_pass_cut": 1.7, "two_pass_hops2": 2.4, "sequential": 2.0}
    for name, goal in goals.items():
        what = f"stage-2 step, {name}, over a stage-1 step on the same tokens"
        yield row(f"step_{name}", over(seconds[name], seconds["stage1"]), "ratio", goal, what)
    one = make_window(1, 1, SEGMENTS)
    seconds = in_turn(
        {"stage1": lambda: stage1(model, one), "reference": lambda: stage2(model, one, "reference", "full")}, 1
    )
    what = "the same for the growing prefix and a single record, for comparison"
    yield row("step_reference", over(seconds["reference"], seconds["stage1"]), "ratio", None, what)


def hops() -> Iterator[Row]:
    """How wrong the gradient of `two_pass` is, relative to the full one, by the number of hops."""
    torch.set_num_threads(1)
    model = small_model().double()
    (batch,) = make_window(1, 1, SEGMENTS)
    wanted = gradient(model, batch, "sequential", "full")
    for number in (0, 1, 2, 4, 8, 16, 32, 64):
        found = gradient(model, batch, "two_pass", f"hops:{number}" if number else "cut")
        error = float((found - wanted).norm() / wanted.norm())
        cosine = float(torch.nn.functional.cosine_similarity(found, wanted, dim=0))
        what = f"relative error of the gradient with {number} hops of {SEGMENTS * SLOTS}; cosine {cosine:.5f}"
        exact = dict.fromkeys(("value", "lowest", "highest"), float(f"{error:.3g}"))
        yield {**row(f"gradient_error_hops{number}", [error], "ratio", None, what), **exact}


def memory() -> Iterator[Row]:
    """Peak memory of a stage-2 step over that of a stage-1 step, both with what training keeps between steps."""
    torch.set_num_threads(1)
    model, window = small_model(), make_window(MICRO_BATCH, ACCUMULATION, SEGMENTS)
    kept = 4 * sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    sides = {
        "two_pass_cut": lambda: stage2(model, window, "two_pass", "cut"),
        "two_pass_hops2": lambda: stage2(model, window, "two_pass", "hops:2"),
        "sequential": lambda: stage2(model, window, "sequential", "full"),
    }
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    for checkpointed in (True, False):
        model.model.language_model.gradient_checkpointing = checkpointed
        base = kept + peak_bytes(lambda: stage1(model, window))
        how = "checkpointed" if checkpointed else "plain"
        for name, side in sides.items():
            ratio = (kept + peak_bytes(side)) / base
            what = f"peak of weights, gradients, moments and activations, stage 2 {name} over stage 1, {how}"
            yield row(f"memory_{name}_{how}", [ratio], "ratio", 1.2 if checkpointed else None, what)


def generation() -> Iterator[Row]:
    """Tokens a second of our `generate`, which runs latents, beside the stock class's, which has none."""
    torch.set_num_threads(1)
    stock = small_model()
    ours = ValrForConditionalGeneration(stock.config).eval()
    ours.load_state_dict(stock.state_dict())
    ours.config.valr["slots"] = SLOTS
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 300, (16, 64), generator=generator)
    length = {"max_new_tokens": 160, "min_new_tokens": 160, "do_sample": False, "pad_token_id": 0}
    opening = LogitsProcessorList([_Opening(tiny.control().latent, every=24)])

    def run(model: Qwen2_5_VLForConditionalGeneration, rows: int, **more: object) -> None:
        given = ids[:rows]
        made = model.generate(input_ids=given, attention_mask=torch.ones_like(given), **length, **more)  # type: ignore[misc]
        assert made.shape == (rows, 64 + 160)

    seconds = in_turn(
        {
            "stock": lambda: run(stock, 16),
            "latents_off": lambda: run(ours, 16, latents=False),
            "latents": lambda: run(ours, 16, logits_processor=opening),
            "one": lambda: run(ours, 1, logits_processor=opening),
        },
        RUNS,
    )
    what = "tokens a second at batch 16 over the stock class's, same number of steps"
    yield row("generate_latents", over(seconds["stock"], seconds["latents"]), "ratio", 1.0, what, "higher")
    yield row(
        "generate_latents_off",
        over(seconds["stock"], seconds["latents_off"]),
        "ratio",
        None,
        f"{what}, no latents",
        "higher",
    )
    sixteen = [16 * ratio for ratio in over(seconds["one"], seconds["latents"])]
    yield row("generate_batch", sixteen, "ratio", 5.0, "tokens a second at batch 16 over batch 1", "higher")


class _Opening(LogitsProcessor):
    """Makes a random model open a segment every so many columns."""

    def __init__(self, latent: int, every: int) -> None:
        self.latent, self.every = latent, every

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] % self.every == 0:
            scores = scores.clone()
            scores[:, self.latent] = scores.max() + 1.0
        return scores


def gpu() -> Iterator[Row]:
    """The same on a GPU, with the shape of Qwen2.5-VL-3B and random weights; nothing where there is none."""
    if not torch.cuda.is_available():
        return
    device, name = torch.device("cuda"), torch.cuda.get_device_name()
    model = make_model(WIDE, tied=True, device=device, dtype=torch.bfloat16)
    yield row("gpu_latent_step", _bandwidth_share(model), "ratio", 0.6, _BANDWIDTH, "higher", name)
    model.model.language_model.gradient_checkpointing = True
    peak = peak_flops(name, "bfloat16")
    for segments, goal in ((1, 1.35), (5, 1.6)):
        window = [batch.to(device) for batch in make_window(2, 16, segments, prompt=1200, step=60)]
        seconds = in_turn(
            {
                "stage1": lambda w=window: stage1(model, w),
                "two_pass_cut": lambda w=window: stage2(model, w, "two_pass", "cut"),
                "two_pass_hops2": lambda w=window: stage2(model, w, "two_pass", "hops:2"),
            },
            RUNS,
            gpu=True,
        )
        if segments == 1 and peak is not None:
            shape = shape_of(model.config)
            records = [
                (int(length), int((labels != IGNORED).sum()))
                for batch in window
                for length, labels in zip(batch.attention_mask.sum(1), batch.labels, strict=True)
            ]
            work = batch_flops(shape, records, [])
            used = [work / one / peak for one in seconds["stage1"]]
            what = "model FLOPs of a stage-1 step over the dense bf16 peak, checkpointed"
            yield row("gpu_stage1_utilisation", used, "ratio", 0.45, what, "higher", name)
        what = f"stage-2 step over stage-1 step, micro-batch 2 x 16, {segments} segment(s) of 16"
        cut = over(seconds["two_pass_cut"], seconds["stage1"])
        yield row(f"gpu_step_two_pass_cut_{segments}", cut, "ratio", goal, f"{what}, two_pass cut", device=name)
        hops2 = over(seconds["two_pass_hops2"], seconds["stage1"])
        yield row(f"gpu_step_two_pass_hops2_{segments}", hops2, "ratio", None, f"{what}, hops:2", device=name)
        one = window[:1]
        seconds = in_turn(
            {
                "stage1": lambda w=one: stage1(model, w),
                "sequential": lambda w=one: stage2(model, w, "sequential", "full"),
            },
            RUNS,
            gpu=True,
        )
        what = f"stage-2 step over stage-1 step, one micro-batch of 2, {segments} segment(s) of 16, sequential"
        sequential = over(seconds["sequential"], seconds["stage1"])
        yield row(f"gpu_step_sequential_{segments}", sequential, "ratio", None, what, device=name)


_BANDWIDTH = "bytes of the block weights a second in a latent step at batch 1, over the bandwidth of a copy"


def _bandwidth_share(model: Qwen2_5_VLForConditionalGeneration) -> list[float]:
    decoder, steps_timed = model.model.language_model, 64
    cached = CachedDecoder(decoder, rows=1, capacity=1024)
    width = model.config.get_text_config().hidden_size
    prompt = torch.randn(1, 512, width, device=model.device, dtype=model.dtype)
    positions = torch.arange(512, device=model.device).expand(3, 1, -1)
    state = cached.extend(prompt, positions, torch.ones(1, 512, dtype=torch.bool, device=model.device))[:, -1]

    def step_often() -> None:
        fed, now = state, positions[:, :, -1]
        for _ in range(steps_timed):
            now = now + 1
            fed = cached.step(fed, now)

    block_bytes = sum(parameter.nbytes for parameter in decoder.layers.parameters())
    source = torch.empty(2**32, dtype=torch.uint8, device=model.device)
    target = torch.empty_like(source)
    seconds = in_turn({"steps": step_often, "copy": lambda: target.copy_(source)}, RUNS, gpu=True)
    bandwidth = [2 * source.nbytes / one for one in seconds["copy"]]
    return [block_bytes * steps_timed / one / best for one, best in zip(seconds["steps"], bandwidth, strict=True)]


# ------------------------------------------------------------------------------------------------- model and data


def small_model() -> Qwen2_5_VLForConditionalGeneration:
    """The model of these benchmarks, on the CPU."""
    return make_model(SMALL)


def make_model(
    widths: TinyModelRecipe,
    tied: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Qwen2_5_VLForConditionalGeneration:
    """A model of the real class with random weights, drawn where they will be: on a CPU, 3 billion take a minute."""
    torch.manual_seed(0)
    config = tiny_config(widths, tiny.processor())
    text = config.get_text_config()
    text.tie_word_embeddings = config.tie_word_embeddings = tied
    # Qwen's own; with the .05 of scale tiny the feedback of a random model this wide is chaotic.
    text.initializer_range = config.initializer_range = 0.02
    with device or torch.device("cpu"):
        return freeze_tower(Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype).eval())


def make_window(micro_batch: int, accumulation: int, segments: int, prompt: int = 365, step: int = 60) -> list[Batch]:
    """Micro-batches of ragged records: a prompt, then `segments` segments, each with its step."""
    generator = torch.Generator().manual_seed(0)
    return [_make_batch(micro_batch, segments, prompt, step, generator) for _ in range(accumulation)]


def _make_batch(rows: int, segments: int, prompt: int, step: int, generator: torch.Generator) -> Batch:
    def about(length: int) -> int:
        return int(torch.randint(length * 3 // 4, length * 5 // 4, (1,), generator=generator))

    control, starts, lengths, prompts = tiny.control(), [], [], []
    for number in range(rows):
        length = about(prompt)
        prompts.append(length)
        for _ in range(segments):
            starts.append((number, length + 1))
            length += SLOTS + 2 + about(step)
        lengths.append(length)
    shape = rows, max(lengths)
    ids = torch.randint(5, 400, shape, generator=generator)
    here = torch.arange(shape[1])
    mask = here < torch.tensor(lengths)[:, None]
    labels = ids.masked_fill(~mask | (here < torch.tensor(prompts)[:, None]), IGNORED)
    slot_mask = torch.zeros(shape, dtype=torch.bool)
    for number, start in starts:
        slot_mask[number, start : start + SLOTS] = True
        ids[number, start - 1], ids[number, start : start + SLOTS] = control.latent, control.latent_pad
    return Batch(
        input_ids=ids,
        attention_mask=mask.long(),
        labels=labels.masked_fill(slot_mask, IGNORED),
        pixel_values=None,
        image_grid_thw=None,
        mm_token_type_ids=torch.zeros(shape, dtype=torch.int64),
        slot_mask=slot_mask,
        segment_rows=torch.tensor([number for number, _ in starts], dtype=torch.int64),
        segment_starts=torch.tensor([start for _, start in starts], dtype=torch.int64),
        targets=[None] * len(starts),
        record_ids=[str(number) for number in range(rows)],
    )


# ---------------------------------------------------------------------------------------------------- what is timed


def stage1(model: Qwen2_5_VLForConditionalGeneration, window: Sequence[Batch]) -> None:
    """Forward and backward of a window in which slots are ordinary tokens."""
    for batch in window:
        none = batch.segment_rows[:0]
        plain = dataclasses.replace(
            batch, slot_mask=torch.zeros_like(batch.slot_mask), segment_rows=none, segment_starts=none
        )
        latents.forward(model, plain).loss_sum.backward()


def stage2(model: Qwen2_5_VLForConditionalGeneration, window: Sequence[Batch], method: str, feedback: str) -> None:
    """Forward and backward of a window with its slots fed back."""
    rollouts = latents.roll_out(model, window) if method == "two_pass" else [None] * len(window)
    for batch, rollout in zip(window, rollouts, strict=True):
        _loss(latents.forward(model, batch, method=method, feedback=feedback, block=BLOCK, rollout=rollout)).backward()


def gradient(model: Qwen2_5_VLForConditionalGeneration, batch: Batch, method: str, feedback: str) -> torch.Tensor:
    """The gradient of one micro-batch as one vector."""
    loss = _loss(latents.forward(model, batch, method=method, feedback=feedback, block=BLOCK))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, trained)])


def _loss(output: latents.LatentOutput) -> torch.Tensor:
    """Cross-entropy plus something that depends on the block states as the alignment does."""
    assert output.states is not None
    return output.feedback(output.loss_sum + output.states.square().mean())[0]


def in_turn(sides: Mapping[str, Callable[[], object]], runs: int, gpu: bool = False) -> dict[str, list[float]]:
    """CPU seconds (on a GPU wall-clock seconds) of each side, run in turn; one more round before warms up."""
    clock = time.monotonic if gpu else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(runs + 1):
        for name, side in sides.items():
            gc.collect()
            started = clock()
            side()
            if gpu:
                torch.cuda.synchronize()
            if number:
                seconds[name].append(clock() - started)
    return seconds


def over(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Ratios, round by round."""
    return [value / one for value, one in zip(values, base, strict=True)]


def peak_bytes(side: Callable[[], object]) -> int:
    """Largest sum of tensor bytes that `side` allocates on the CPU on top of what is there."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        side()
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events = profiled.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(sizes))
