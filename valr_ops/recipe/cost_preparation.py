"""What the stages beside training and asking cost: data read, checked and rewritten, the base model, features, tables.

In: a recipe, the counted or expected corpus, the shape of the model. Out: a `Price`. What a CPU does follows from the
bytes that it reads and from rates of records and images measured on two cores, so its hours are rough.
Always: a stage of the CPU costs hours and bytes and no money; features that training computes itself cost nothing.
"""

from __future__ import annotations

from dataclasses import replace

from valr_ops.recipe.cost import Shape
from valr_ops.recipe.cost_artifacts import FEATURES, artifact_bytes, input_bytes, teacher, weight_bytes
from valr_ops.recipe.cost_sheet import Price, Span, add, computing, exactly, over, scaled, sheet
from valr_ops.recipe.recipe import Recipe
from valr_ops.recipe.workload import Corpus, PriceError, questions
from valr_ops.stages import Stage

TOWER_IMAGES, TEACHER_IMAGES = 32, 64
"""In a step in which the tower of a model made on the spot, or a teacher made on the spot, learns to see."""


class NoPriceError(PriceError):
    """A stage whose cost has no formula here; such a stage is dispatched without being held against the limit."""


def cpu_price(recipe: Recipe, row: Stage, corpus: Corpus, model: Shape) -> Price:
    """What a stage of the CPU costs."""
    limits = recipe.price
    records, images = exactly(corpus.records), exactly(corpus.records * corpus.images)
    asked = list(questions(recipe, corpus))
    shown = exactly(sum(items * pictures for items, pictures in asked))
    made = artifact_bytes(recipe, row.name, corpus, model)
    reads = input_bytes(recipe, row.inputs, corpus, model)
    remarks = []
    match row.name:
        case "sources":
            given = [one for one in recipe.data.sources.values() if one.path is not None]
            listed = round(images[0] * limits.image_bytes * len(given) / max(len(recipe.data.sources), 1))
            reads = {"given sources": listed} if listed else {}
            drawn = scaled(images, 1 - len(given) / max(len(recipe.data.sources), 1))
            seconds = add([over(exactly(listed), limits.disk_bytes_per_second), over(drawn, limits.images_per_second)])
        case "cot_corpus":
            # The readers take images from where the user put them.
            reads = {"images": round(images[0] * limits.image_bytes)}
            seconds = add([over(images, limits.images_per_second), over(records, limits.records_per_second)])
            if recipe.data.matching.by != "data":
                remarks.append(
                    f"matching steps to images (data.matching.by={recipe.data.matching.by}) is left out; an endpoint's "
                    "price is shown before its first request"
                )
        case "latent_corpus":
            seconds = over(records, limits.rewritten_per_second)
        case "benchmarks":
            reads = {"images": round(shown[0] * limits.image_bytes)}
            seconds = add(
                [over(exactly(reads["images"]), limits.disk_bytes_per_second), over(shown, limits.images_per_second)]
            )
        case _:
            # Tables and pages: a line for each answer of each model.
            models = sum(name.startswith("scores_") for name in row.inputs)
            answers = exactly(models * sum(items for items, _ in asked))
            seconds = over(answers, limits.records_per_second)
    return sheet(
        recipe,
        row.name,
        corpus,
        gpus=0,
        hours={"reading and writing": scaled(seconds, 1 / 3600)},
        reads=reads,
        stores={"result": made} if made else {},
        remarks=remarks,
    )


def base_model_price(recipe: Recipe, row: Stage, corpus: Corpus, model: Shape) -> Price:
    """What the base model costs: fetched or copied, or made on the spot with a tower that learns to see."""
    made, limits, scratch = artifact_bytes(recipe, row.name, corpus, model), recipe.price, recipe.base.from_scratch
    reads = input_bytes(recipe, row.inputs, corpus, model)
    flops: dict[str, Span] = {}
    hours: dict[str, Span] = {"writing": scaled(over(exactly(made), limits.disk_bytes_per_second), 1 / 3600)}
    if scratch is not None:
        drawn = recipe.data.synthetic
        patches = drawn.rows * drawn.columns * drawn.cell_pixels**2 // model.vision_patch**2
        seen = scratch.tower_pretraining_steps * TOWER_IMAGES
        flops["vision tower, forward and backward"] = exactly(3 * seen * model.vision_flops(patches))
        hours["computing"] = computing(recipe, flops.values(), 1, "float32")
    else:
        reads["checkpoint"] = weight_bytes(model, 2)
        if recipe.base.hub_id is not None:
            fetched = over(exactly(reads["checkpoint"]), limits.network_bytes_per_second)
            hours["fetching the checkpoint"] = scaled(fetched, 1 / 3600)
    return sheet(recipe, row.name, corpus, gpus=1, flops=flops, hours=hours, reads=reads, stores={"model": made})


def features_price(recipe: Recipe, row: Stage, corpus: Corpus, model: Shape) -> Price:
    """What the features of a teacher cost, stored or left to training.

    Raises:
        NoPriceError: a teacher of a class that has no formula. PriceError: one that the recipe has not.
    """
    name = row.name.removeprefix(FEATURES)
    if name not in recipe.teachers:
        raise PriceError(f"{row.name} needs teachers.{name}, which is not in the recipe; add it to params.yaml")
    one, processes = teacher(recipe, name, corpus, model), recipe.processes_of_a_node
    if one is None:
        raise NoPriceError(f"{row.name} has no price: what {recipe.teachers[name].model} computes is not known here")
    targets = corpus.targets if one.mode == "stored" else 0.0
    flops = {"teacher": exactly(targets * one.encoder.flops)}
    if steps := recipe.teachers[name].pretraining_steps:
        flops["teacher learning to see"] = exactly(3 * steps * TEACHER_IMAGES * one.encoder.flops)
    priced = sheet(
        recipe,
        row.name,
        corpus,
        gpus=processes,
        flops=flops,
        hours={"computing": computing(recipe, flops.values(), processes)},
        memory={"weights": one.weight_bytes},
        peak_bytes=one.weight_bytes,
        reads={"weights": one.weight_bytes, **input_bytes(recipe, row.inputs, corpus, model)},
        stores={"features": round(targets * one.target_bytes)},
    )
    if one.mode == "stored":
        return priced
    remark = "training computes these features itself, which is cheaper; the stage only looks at a few"
    return replace(priced, remarks=(*priced.remarks, remark))
