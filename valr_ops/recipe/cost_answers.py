"""What it costs to ask a model: the scores of every benchmark, and the studies that ask some of it again and again.

In: a recipe with its variant applied, the mean record and the shape of the model. Out: a `Price`.
A prompt is computed in parallel; an answer comes token by token, and each of its steps waits until the blocks, for a
token of text the head, and the keys and values of all rows have been read from memory. A batch is as long as its
answers: from the length that the recipe assumes to the most that it allows, slots beside.
Always: studies compute in float32 on every device and scores in bfloat16 on a GPU, as the stages do; one GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from valr_ops.recipe import cost
from valr_ops.recipe.cost import Shape
from valr_ops.recipe.cost_artifacts import FEATURES, input_bytes, teacher, weight_bytes
from valr_ops.recipe.cost_sheet import Precision, Price, Span, add, computing, exactly, over, reading, scaled, sheet
from valr_ops.recipe.recipe import Recipe
from valr_ops.recipe.workload import Corpus, PriceError, questions
from valr_ops.stages import Stage

LEAST_ITEMS = 30
"""Of a benchmark whose lengths are studied."""
TOKEN_BUDGETS = 5
"""Lengths that are imposed on answers in tokens: almost none, three quartiles and the longest."""
CONDITIONS = 5
"""Under which the latent check asks everything."""
MOST_CUTS = 8
"""Steps after which images are hidden, each of which asks everything once more."""


@dataclass(frozen=True)
class _Questions:
    """Questions with as many images each, which are asked a number of times."""

    items: int
    images: float
    """Of one."""
    rounds: Span = (1.0, 1.0)


def scores_price(recipe: Recipe, row: Stage, corpus: Corpus, model: Shape) -> Price:
    """What a scores stage costs."""
    asked = [_Questions(items, shown) for items, shown in questions(recipe, corpus)]
    precision: Precision = "bfloat16" if recipe.runtime.device == "cuda" else "float32"
    return _asking(recipe, row, corpus, model, asked, precision, latents=row.variant is not None)


def study_price(recipe: Recipe, row: Stage, corpus: Corpus, model: Shape) -> Price:
    """What one of the four studies inside of a model costs.

    Raises:
        PriceError: there is nothing to ask.
    """
    if row.name == "alignment_maps":
        return _maps_price(recipe, row, corpus, model)
    every = [_Questions(items, shown) for items, shown in questions(recipe, corpus)]
    if row.name == "scaling_curve":
        asked = [one for one in _length_study(recipe, every, corpus) if one.items]
    else:
        lines = math.ceil(corpus.segments) + 1
        cuts = min(lines, MOST_CUTS), MOST_CUTS
        # Two models, each asked as it is and with images hidden.
        rounds = {"visual_decay": (2.0 * (1 + cuts[0]), 2.0 * (1 + cuts[1])), "latent_check": exactly(CONDITIONS)}
        asked = _spread(every, recipe.evaluation.study_items, rounds[row.name])
    # What attention went to is read off one parallel pass of each model over what was asked and answered.
    return _asking(recipe, row, corpus, model, asked, "float32", replays=2 if row.name == "visual_decay" else 0)


def _length_study(recipe: Recipe, every: list[_Questions], corpus: Corpus) -> Iterable[_Questions]:
    """Every benchmark that is large enough, asked once a budget of segments and of tokens."""

    def budgets(most: int) -> int:
        return len({0, most, *(2**power for power in range(6) if 2**power < most)})

    rounds = TOKEN_BUDGETS + budgets(math.ceil(corpus.segments)), TOKEN_BUDGETS + budgets(corpus.most_segments)
    least = min(LEAST_ITEMS, recipe.evaluation.limit or LEAST_ITEMS)
    for one in every:
        if one.items >= least:
            yield _Questions(min(one.items, recipe.evaluation.study_items), one.images, rounds)


def _spread(every: list[_Questions], count: int, rounds: Span) -> list[_Questions]:
    """`count` of all questions, of which each benchmark has its share."""
    total = sum(one.items for one in every)
    if not total:
        return []
    images = sum(one.items * one.images for one in every) / total
    return [_Questions(min(count, total), images, rounds)]


@dataclass(frozen=True)
class _Effort:
    """What it takes to ask some questions."""

    opened: Span
    """Images."""
    tower: Span
    """FLOPs, as the next three."""
    questions: Span
    answers: Span
    replays: Span
    """Attention read off answers that are given."""
    read: Span
    """Bytes of weights, and of keys and values, token by token."""
    longest: float
    """Positions of the longest question with its answer."""


def _effort(
    one: _Questions, recipe: Recipe, corpus: Corpus, model: Shape, element: int, *, latents: bool, replays: int
) -> _Effort:
    """What `one` takes; `element` are the bytes of a number."""
    limits, settings = recipe.price, recipe.evaluation
    an_image = corpus.image_positions / corpus.images
    question = round((1 - limits.supervised_share) * limits.text_tokens)
    prompt = round(question + one.images * an_image)
    tokens = min(limits.answer_tokens, settings.max_new_tokens), settings.max_new_tokens
    slots = corpus.segments * (recipe.latents.fed_slots + 2) if latents else 0.0
    batches, rows = math.ceil(one.items / settings.batch_size), min(settings.batch_size, one.items)
    tower = model.vision_flops(round(cost.MERGE**2 * an_image))
    answers, replayed, read = [], [], []
    for times, written in zip(one.rounds, tokens, strict=True):
        length = written + slots
        whole = model.decoder_flops(round(prompt + length), round(written))
        answers.append(times * one.items * (whole - model.decoder_flops(prompt, 0)))
        replayed.append(replays * one.items * whole)
        cached = rows * model.cached_per_position * (prompt + length / 2)
        head = written * model.hidden * model.vocabulary
        read.append(times * batches * element * (length * (model.block_parameters + cached) + head))
    return _Effort(
        opened=scaled(one.rounds, one.items * one.images),
        tower=scaled(one.rounds, one.items * one.images * tower),
        questions=scaled(one.rounds, one.items * model.decoder_flops(prompt, 1)),
        answers=(answers[0], answers[1]),
        replays=(replayed[0], replayed[1]),
        read=(read[0], read[1]),
        longest=prompt + tokens[1] + slots,
    )


def _asking(
    recipe: Recipe,
    row: Stage,
    corpus: Corpus,
    model: Shape,
    asked: list[_Questions],
    precision: Precision,
    *,
    latents: bool = True,
    replays: int = 0,
) -> Price:
    if not asked:
        raise PriceError(f"{row.name} has nothing to ask; name a benchmark in evaluation.benchmarks")
    limits, element = recipe.price, 2 if precision == "bfloat16" else 4
    efforts = [_effort(one, recipe, corpus, model, element, latents=latents, replays=replays) for one in asked]
    parallel = {
        "vision tower": add(effort.tower for effort in efforts),
        "questions": add(effort.questions for effort in efforts),
    }
    if replays:
        parallel["attention over answers"] = add(effort.replays for effort in efforts)
    flops = {**parallel, "answers": add(effort.answers for effort in efforts)}
    opened = add(effort.opened for effort in efforts)
    hours = {"opening images": scaled(over(opened, limits.images_per_second), 1 / 3600)}
    if recipe.runtime.device == "cuda":
        # What is computed one position at a time waits for memory, not for products.
        hours["computing"] = computing(recipe, parallel.values(), 1, precision)
        hours["answers, token by token"] = reading(recipe, add(effort.read for effort in efforts))
    else:
        hours["computing"] = computing(recipe, flops.values(), 1)
    weights = weight_bytes(model, element)
    together = min(recipe.evaluation.batch_size, max(one.items for one in asked))
    longest = max(effort.longest for effort in efforts)
    cache = round(element * together * model.cached_per_position * longest)
    images = sum(one.items * one.images for one in asked)
    return sheet(
        recipe,
        row.name,
        corpus,
        gpus=1,
        flops=flops,
        hours=hours,
        memory={"weights": weights, "keys and values": cache},
        peak_bytes=weights + cache,
        reads={**input_bytes(recipe, row.inputs, corpus, model), "images": round(images * limits.image_bytes)},
        stores={},
    )


def _maps_price(recipe: Recipe, row: Stage, corpus: Corpus, model: Shape) -> Price:
    """Held-out records through the model with their answers given, and their targets through the teachers."""
    positions = round(corpus.positions + corpus.segments * (recipe.latents.fed_slots + 2))
    records = recipe.evaluation.study_items
    found = (teacher(recipe, name, corpus, model) for name in recipe.alignment.teachers)
    looking = sum(one.encoder.flops for one in found if one and one.mode == "online")
    an_image = round(cost.MERGE**2 * corpus.image_positions / corpus.images)
    flops = {
        "vision tower": exactly(records * corpus.images * model.vision_flops(an_image)),
        # Once to roll the slots out, once with them in place.
        "records": exactly(2 * records * model.decoder_flops(positions, 0)),
        "teachers": exactly(records * corpus.segments * looking),
    }
    weights = weight_bytes(model, 4)
    inputs = [
        name for name in row.inputs if name.removeprefix(FEATURES) in recipe.alignment.teachers or FEATURES not in name
    ]
    return sheet(
        recipe,
        row.name,
        corpus,
        gpus=1,
        flops={part: span for part, span in flops.items() if span[1]},
        hours={"computing": computing(recipe, flops.values(), 1, "float32")},
        memory={"weights": weights},
        peak_bytes=weights,
        reads=input_bytes(recipe, inputs, corpus, model),
        stores={},
    )
