"""Courses: one arm trained with one seed at one learning rate, many of them side by side, one on a core.

In: the recipe's `study` section and the courses wanted. Out: of each its learning curve, its cost, and its model.
What stands in for pretraining and stage 1 is done once and shared: every course of a seed begins with the same weights
and sees the same pictures in the same order.
Always: a course is one thread and gives the same figures alone or beside others; one that is finished is kept, so that
a killed study goes on with those that are not, and another study, or one whose tables have changed, trains it no more;
code or recipe that decide a course make it another one; clocks are kept apart from figures.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from valr_ops.model.qwen import make_processor, tiny_model, train_tokenizer
from valr_ops.recipe.recipe import BaseModelRecipe, Recipe, TrainingRecipe, override
from valr_ops.recipe.recipe import read as read_recipe
from valr_ops.stages import code_of, digest_of
from valr_ops.store.progress import Progress
from valr_ops.studies.arms import ARMS, TEACHERS, Arm, ArmLoss
from valr_ops.studies.encoders import Encoder, train_teacher, train_tower
from valr_ops.studies.looking import CONDITIONS, Subject, look, slot_probe, step_probe
from valr_ops.studies.tiles import Layout, Pictures, draw
from valr_ops.torchvision_guard import ensure_torchvision
from valr_ops.training.log import Row
from valr_ops.training.schedule import parameter_groups
from valr_ops.workers import workers

ensure_torchvision()

from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor  # noqa: E402

_CHECKOUT = Path(__file__).parents[2]
STAGE_1 = "stage1"
SEGMENTS = (0, 1, 2)
"""Imposed before every step."""
SEARCHED, SCORED = range(2)
"""Held-out pictures by which a learning rate is chosen, and those by which arms are compared."""
_STAGE_1, _STAGE_2, _HELD_OUT = range(3)
_PRETRAINED = "pretrained"


@dataclass(frozen=True)
class Course:
    """What is trained."""

    arm: str
    """A key of `ARMS`, or `STAGE_1`."""
    seed: int
    learning_rate: float

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.seed}-{self.learning_rate:g}"


@dataclass(frozen=True)
class Taken:
    """What came of a course."""

    course: Course
    curve: list[dict[str, float]]
    """A row every so many updates: `update`, `accuracy` of steps and of whole `chains` on pictures not trained on, and
    the loss of that update and its parts."""
    flops: int
    """Of one update, counted as it was computed: forward, backward, roll-out, hops and the teachers' features."""
    readings: dict[str, Any]
    """What was read in the model after `StudyRecipe.updates` updates (`read_inside`)."""
    seconds: float
    """Of this process's CPU, scoring left out."""

    def at(self, update: int) -> dict[str, float]:
        """The row of the curve after so many updates."""
        return next(row for row in self.curve if row["update"] >= update)


def take(recipe: Recipe, courses: Sequence[Course], work: Path, progress: Progress, label: str) -> dict[Course, Taken]:
    """All `courses`; those that `work` holds, by the same code and recipe, are read from there."""
    recipe, work = override(recipe, {"alignment.block": recipe.study.block}), work / _digest(recipe)
    work.mkdir(parents=True, exist_ok=True)
    seeds = sorted({course.seed for course in courses})
    ahead = [Course(STAGE_1, seed, recipe.study.stage1_learning_rate) for seed in seeds]
    # A GPU is shared by nobody; a core takes one course.
    count = 1 if recipe.runtime.device == "cuda" else max(1, len(os.sched_getaffinity(0)) // recipe.runtime.threads)
    with workers(count, __name__) as pool:
        for of_turn, said in (([Course(_PRETRAINED, 0, 0.0)], "pretraining"), (ahead, "stage 1"), (courses, label)):
            _in_turn(pool, recipe, of_turn, work, progress, said)
    return {course: _read(course, work) for course in courses}


def _digest(recipe: Recipe) -> str:
    """Eight hexadecimal digits, equal where a course comes out the same."""
    values = recipe.model_dump(mode="json", include={"study", "alignment", "runtime"})
    for which in ("seeds", "learning_rates", "chain_steps", "quick"):
        del values["study"][which]
    values["training"] = _training(recipe, recipe.study.stage1_learning_rate).model_dump(mode="json")
    values["code"] = digest_of(code_of(__name__), _CHECKOUT)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def _in_turn(
    pool: Executor, recipe: Recipe, courses: Sequence[Course], work: Path, progress: Progress, label: str
) -> None:
    """Take what is not in `work` yet."""
    waiting = [course for course in courses if not _figures(course, work).is_file()]
    values = recipe.model_dump(mode="json")
    futures = [pool.submit(_take, values, asdict(course), str(work)) for course in waiting]
    done = len(courses) - len(waiting)
    for future in progress.track(as_completed(futures), label, total=len(courses), done=done) if waiting else ():
        progress.say(future.result())


def _take(values: dict[str, Any], fields: dict[str, Any], folder: str) -> str:
    """One course, in a process of its own; what to say of it."""
    recipe, course, work = read_recipe(values), Course(**fields), Path(folder)
    torch.set_num_threads(recipe.runtime.threads)
    if course.arm == _PRETRAINED:
        return _pretrain(recipe, course, work)
    model, layout = _open_model(recipe, course.seed, work)
    teachers = _read_teachers(work, recipe.runtime.device)
    study = recipe.study
    if course.arm == STAGE_1:
        taken = _train(course, ARMS["sft"], model, layout, teachers, recipe, study.stage1_updates, _STAGE_1)
    else:
        model.load_state_dict(load_file(_weights(Course(STAGE_1, course.seed, study.stage1_learning_rate), work)))
        arm = ARMS[course.arm]
        taken = _train(course, arm, model, layout, teachers, recipe, study.updates, _STAGE_2)
    _write(taken, model.state_dict() if course.arm == STAGE_1 else {}, work)
    right = taken.curve[-1]["accuracy"]
    return f"{course.name}: {right:.3f} of the steps right, {taken.seconds:.0f} CPU s"


def _pretrain(recipe: Recipe, course: Course, work: Path) -> str:
    started, study = time.process_time(), recipe.study
    model, layout = _model(recipe, study.search_seed)
    known = {"tower": train_tower(model, layout, study.side, study.model.tower_pretraining_steps, study.search_seed)}
    tensors = {f"tower.{name}": value for name, value in model.model.visual.state_dict().items()}
    for name, knows in TEACHERS.items():
        encoder, known[name] = train_teacher(knows, study.side, study.teacher_updates, study.search_seed)
        tensors |= {f"{name}.{key}": value for key, value in encoder.state_dict().items()}
    row = {"update": 0.0, **known}
    _write(Taken(course, [row], 0, {}, time.process_time() - started), tensors, work)
    return ", ".join(f"{name} {share:.3f}" for name, share in known.items()) + " of the answers about cells right"


def _open_model(recipe: Recipe, seed: int, work: Path) -> tuple[Qwen2_5_VLForConditionalGeneration, Layout]:
    """The model that seed `seed` begins with: the pretrained tower, and a decoder of random weights."""
    model, layout = _model(recipe, seed)
    tensors = load_file(_weights(Course(_PRETRAINED, 0, 0.0), work))
    tower = {key.removeprefix("tower."): value for key, value in tensors.items() if key.startswith("tower.")}
    model.model.visual.load_state_dict(tower)
    return model.to(torch.device(recipe.runtime.device)), layout  # type: ignore[arg-type]


def _read_teachers(work: Path, device: str) -> dict[str, Encoder]:
    """The encoders of `TEACHERS`, frozen."""
    tensors = load_file(_weights(Course(_PRETRAINED, 0, 0.0), work))
    teachers = {}
    for name in TEACHERS:
        teachers[name] = Encoder().requires_grad_(False).to(device)
        teachers[name].load_state_dict(
            {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        )
    return teachers


def held_out(recipe: Recipe, part: int) -> Pictures:
    """Pictures that no course trains on, the same for all."""
    study = recipe.study
    return draw((study.search_seed, _HELD_OUT, part), study.pictures, study.side, study.steps)


def _model(recipe: Recipe, seed: int) -> tuple[Qwen2_5_VLForConditionalGeneration, Layout]:
    processor = _processor(recipe)
    return tiny_model(recipe.study.model, processor, seed), Layout(processor)


def _processor(recipe: Recipe) -> Qwen2_5_VLProcessor:
    # Letters are ids of every byte-level tokenizer, whatever it was trained on.
    tokenizer = train_tokenizer(["a"], recipe.study.model.vocabulary_size)
    return make_processor(tokenizer, BaseModelRecipe(from_scratch=recipe.study.model))


def _training(recipe: Recipe, learning_rate: float) -> TrainingRecipe:
    return TrainingRecipe(learning_rate=learning_rate, projector_learning_rate=recipe.study.projector_learning_rate)


def _train(
    course: Course,
    arm: Arm,
    model: Qwen2_5_VLForConditionalGeneration,
    layout: Layout,
    teachers: dict[str, Encoder],
    recipe: Recipe,
    updates: int,
    stage: int,
) -> Taken:
    study = recipe.study
    # What is drawn here are the projectors.
    torch.manual_seed(course.seed)
    loss_of = ArmLoss(arm, model, teachers, layout, recipe).to(recipe.runtime.device)
    training = _training(recipe, course.learning_rate)
    projectors = [] if loss_of.projectors is None else list(loss_of.projectors.parameters())
    groups = parameter_groups(model.parameters(), projectors, training)
    trained = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=training.betas)
    curve: list[dict[str, float]] = []
    readings: dict[str, Any] = {}
    flops, seconds, searching = 0, 0.0, course.seed == study.search_seed
    updates *= 1 if searching or stage == _STAGE_1 else arm.times
    subject, pictures = Subject(model, layout, arm), held_out(recipe, SEARCHED if searching else SCORED)
    for update in range(1, updates + 1):
        started = time.process_time()
        for group in groups:
            group["lr"] = group["peak_lr"] * min(1.0, update / study.warmup_updates)
        drawn = draw((course.seed, stage, update), study.batch, study.side, study.steps)
        if update == 1:
            with FlopCounterMode(display=False) as counter:
                row = _update(loss_of, drawn, optimizer, trained, training.max_gradient_norm)
            flops = counter.get_total_flops()
        else:
            row = _update(loss_of, drawn, optimizer, trained, training.max_gradient_norm)
        seconds += time.process_time() - started
        # An arm that is trained longer than the others is scored and read where they end, too.
        others_end = stage == _STAGE_2 and update == study.updates
        if others_end or update % study.score_every == 0 or update == updates:
            right = look(subject, pictures).right
            scores = {"accuracy": float(right.mean()), "chains": float(right.all(1).mean())}
            curve.append({"update": update, **scores, **row})
        if others_end and not searching:
            readings = read_inside(subject, pictures)
    return Taken(course, curve, flops, readings, seconds)


def read_inside(subject: Subject, pictures: Pictures) -> dict[str, Any]:
    """What the model does with its latents and its picture, as JSON values.

    `right` and `image_attention` by step; `step_probe` and `slot_probe` by block; `conditions`, the share of right
    steps under each of `CONDITIONS`; `segments`, that with so many segments before each step. What needs latents is
    left out where there are none.
    """
    seen = look(subject, pictures)
    found: dict[str, Any] = {
        "right": seen.right.mean(0).tolist(),
        "image_attention": seen.image_attention.mean(0).tolist(),
        "step_probe": step_probe(seen, pictures),
    }
    if subject.arm.slots:
        found["slot_probe"] = slot_probe(seen, pictures)
        found["conditions"] = {
            condition: float(look(subject, pictures, condition).right.mean()) for condition in CONDITIONS
        }
        found["segments"] = {
            str(count): float(look(subject, pictures, before=[count] * pictures.steps).right.mean())
            for count in SEGMENTS
        }
    return found


def _update(
    loss_of: ArmLoss, drawn: Pictures, optimizer: torch.optim.Optimizer, trained: list[nn.Parameter], bound: float
) -> Row:
    optimizer.zero_grad(set_to_none=True)
    loss, row = loss_of(drawn)
    loss.backward()
    nn.utils.clip_grad_norm_(trained, bound)
    optimizer.step()
    return row


def _figures(course: Course, work: Path) -> Path:
    return work / f"{course.name}.json"


def _weights(course: Course, work: Path) -> Path:
    return work / f"{course.name}.safetensors"


def _write(taken: Taken, tensors: dict[str, torch.Tensor], work: Path) -> None:
    """Weights first: figures that are there say that the course is finished."""
    for path, write in (
        (_weights(taken.course, work), lambda partial: save_file(_own(tensors), partial)),
        (_figures(taken.course, work), lambda partial: partial.write_text(json.dumps(asdict(taken)))),
    ):
        # Two studies may train the same course at the same time.
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        write(partial)
        partial.replace(path)


def _own(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def _read(course: Course, work: Path) -> Taken:
    values = json.loads(_figures(course, work).read_text())
    return replace(Taken(**values), course=course)
