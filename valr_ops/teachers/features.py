"""The stages ``teacher_features_<teacher>``: what latents are aligned to, stored or computed while training goes on.

In: the latent corpus, whose segments name their targets (an image, perhaps a box, perhaps other views), and the images.
Out: `index.json` (which encoder, and how its features come to training), a picture of the features, the shards where
they are stored, and at scale tiny the teacher itself.
Always: each distinct target stands once; a shard that was finished before a kill is used again if teacher and targets
are the same; no target is skipped silently: one whose image can't be decoded is named in `rejects.jsonl` with the
records that need it, and training leaves those out.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from valr_ops.data.corpus import ImageStore
from valr_ops.data.sequences import Region, Sequences, targets_of
from valr_ops.recipe.cost import FeatureChoice, choose_features
from valr_ops.store.artifacts import Check, StageContext, StageReport
from valr_ops.store.progress import Progress
from valr_ops.teachers.encoders import Teacher, load_teacher, read_teacher
from valr_ops.teachers.extraction import Extractor, arranged, complete, extract, finished_path, plan, scene_start
from valr_ops.teachers.online import FeatureSource, OnlineFeatures
from valr_ops.teachers.stored import (
    CONSTANT,
    NOT_FINITE,
    FeatureError,
    FeatureStore,
    Shard,
    bytes_per_target,
    is_whole,
    read_index,
    shard_name,
    shown,
    write_index,
    write_targets,
)
from valr_ops.teachers.weights import weights_differ, weights_sample
from valr_ops.workers import end_with_parent

MIN_COSINE = 0.999
"""Of a stored patch feature to the one that was computed: bfloat16 keeps eight bits, which costs about 1e-5."""

_SHOWN_TARGETS = 6
_MEASURED_IMAGES = {"cpu": 8, "cuda": 256}
_MEASURED_SECONDS = 1.0
_REJECTS = "rejects.jsonl"


@dataclass(frozen=True)
class Wanted:
    """What training will ask of a teacher."""

    targets: list[Region]
    """Distinct, in the order in which they are computed."""
    visits: int
    """Segments with a target: how often an epoch asks for one."""


def read_wanted(latent_corpus: Path, *, joint: bool) -> Wanted:
    """The targets of all segments.

    Raises:
        FeatureError: there is none. ShardError: the rewritten corpus is damaged.
    """
    batches = Sequences(latent_corpus).batches()
    found = Counter(target.seen(joint=joint) for batch in batches for _, target in targets_of(batch))
    if not found:
        raise FeatureError(
            f"no segment in {latent_corpus} has a target, so there is nothing to align to; "
            "look at the rejects of cot_corpus, or train with alignment.weight=0"
        )
    return Wanted(arranged(found), found.total())


def build_teacher_features(context: StageContext) -> StageReport:
    """Patch features of every target of the latent corpus, stored or left to training, and what they look like.

    With ``context.part`` only shards are made, in a folder where other processes find them.

    Raises:
        FeatureError: the recipe has no such teacher, the corpus has no target, or a box lies outside of its image.
        TeacherError: the teacher can't be built.
        CorpusError, ShardError: an image is missing or damaged.
    """
    name = context.stage.removeprefix("teacher_features_")
    if name not in context.recipe.teachers:
        known = ", ".join(context.recipe.teachers)
        raise FeatureError(f"{context.stage} needs teachers.{name}, but the recipe has {known}; add it to params.yaml")
    recipe = context.recipe.teachers[name]
    if context.part is not None and recipe.features != "stored":
        raise FeatureError(
            f"a part of {context.stage} stores features, but teachers.{name}.features={recipe.features}; "
            "set it to stored, so that all parts agree"
        )
    wanted = read_wanted(context.inputs["latent_corpus"], joint=recipe.views == "joint")
    started = time.monotonic()
    extractor = _extractor(context, name)
    teacher, loaded = extractor.teacher, time.monotonic()
    context.progress.say(f"{name}: {len(wanted.targets)} targets, features {list(teacher.grid)} x {teacher.dim}")
    if context.part is not None:
        return StageReport(summary={"targets": _extract_part(context, extractor, wanted)})
    choice = _choose(context, extractor, wanted)
    context.progress.say(f"{name}: {choice.reason}")
    source: FeatureSource
    if choice.mode == "stored":
        extracted = _store(context, extractor, wanted)
        source = store = FeatureStore(context.out)
        sound = [target for target in wanted.targets if target in store]
        rejected = _write_rejects(context, extractor, store.rejected)
        if not sound:
            raise FeatureError(
                f"no image of {len(wanted.targets)} targets can be decoded (first {shown(wanted.targets[0])}); "
                "make them again with `valr run cot_corpus --force`, which checks every image"
            )
        problems, figures = _judge(store, wanted.targets)
    else:
        extracted, rejected, problems, figures = 0, 0, [], {}
        write_index(context.out, _head(teacher, "online", []))
        source, sound = OnlineFeatures(extractor), wanted.targets
    seconds = time.monotonic() - loaded
    if recipe.pretraining_steps:
        teacher.save(context.out)
    sample = sound[:: math.ceil(len(sound) / _SHOWN_TARGETS)]
    features = torch.stack([one.double().cpu() for one in source.features(sample)])
    _draw_features(features, extractor.pixels(sample), name, context.out / "pca.png")
    precise = _cosine_to_float32(context, teacher, extractor.pixels(sample)) if recipe.precision != "float32" else {}
    check = _check(name, len(wanted.targets), problems, figures)
    if teacher.held_out_accuracy is not None:
        figures["held_out_patch_accuracy"] = round(teacher.held_out_accuracy, 4)
    about, size = _about(teacher, choice), _size(teacher, wanted, rejected) | figures | precise
    rates = {"images_per_second": extracted / seconds} if extracted else {}
    return StageReport(
        summary=about | size,
        tables={"Teacher": _table(about), "Features": _table(size)},
        plots=("pca.png",),
        checks=(check,),
        timings={"load_seconds": loaded - started, "extract_seconds": seconds, **rates, **choice.seconds},
    )


# ------------------------------------------------------------------------------------------------------ for training


def open_features(
    context: StageContext, teachers: Iterable[str], images: ImageStore, device: str
) -> dict[str, FeatureSource]:
    """Where the features of each of `teachers` come from, by what its artifact says.

    Args:
        context: of the stage that trains.
        images: of the corpus, for features that are computed online.
        device: where those are computed.

    Raises:
        FeatureError: a teacher whose features are none of the inputs, are not there, are another teacher's, or were
            made with other weights.
        TeacherError: the teacher can't be built.
    """
    sources: dict[str, FeatureSource] = {}
    for name in teachers:
        stage = f"teacher_features_{name}"
        if stage not in context.inputs:
            prefix = "teacher_features_"
            there = ", ".join(one.removeprefix(prefix) for one in context.inputs if one.startswith(prefix))
            raise FeatureError(
                f"{context.stage} aligns to {name}, but reads features of {there or 'no teacher'} only; add {stage} to "
                "its inputs in valr_ops/stages.py, or change the teachers that it aligns to"
            )
        folder, index = context.inputs[stage], read_index(context.inputs[stage])
        if index["teacher"] != name:
            raise FeatureError(
                f"{folder} holds features of {index['teacher']}, not of {name}; "
                f"make them again with `valr run {stage} --force`"
            )
        if weights_differ(name, context.recipe.teachers[name], index["weights_sample"]):
            raise FeatureError(
                f"the weights of teachers.{name} are others than those that {stage} was made with; make it again with "
                f"`valr run {stage}`"
            )
        if index["mode"] == "stored":
            sources[name] = FeatureStore(folder)
            continue
        teacher = _load(context, name, device, kept=folder)
        if teacher.fingerprint != index["fingerprint"]:
            raise FeatureError(
                f"teachers.{name} is another encoder than the one that {stage} describes; make it again with "
                f"`valr run {stage} --force`"
            )
        context.progress.say(f"features of {name} are computed online, on {device}")
        sources[name] = OnlineFeatures(Extractor(teacher, images))
    return sources


def origins(inputs: Mapping[str, Path], teachers: Iterable[str]) -> dict[str, dict[str, str]]:
    """By teacher its model, licence and fingerprint, for the settings and the card of a model aligned to it."""
    indexes = {name: read_index(inputs[f"teacher_features_{name}"]) for name in teachers}
    return {name: {key: index[key] for key in ("model", "license", "fingerprint")} for name, index in indexes.items()}


def rejected_records(inputs: Mapping[str, Path], teachers: Iterable[str]) -> set[str]:
    """Ids of the records that can't be aligned because an image that a teacher needs could not be decoded."""
    files = [inputs[f"teacher_features_{name}"] / _REJECTS for name in teachers]
    lines = [line for file in files if file.is_file() for line in file.read_text(encoding="utf-8").splitlines()]
    return {json.loads(line)["id"] for line in lines}


# ------------------------------------------------------------------------------------------------------------ making


def _extractor(context: StageContext, name: str) -> Extractor:
    runtime = context.recipe.runtime
    torch.set_num_threads(runtime.threads)
    device: str = runtime.device
    if device == "cuda" and context.part is not None:
        # Processes of one machine take its GPUs in turn; a pod that sees one takes that.
        device = f"cuda:{context.part[0] % torch.cuda.device_count()}"
    threads = max(1, len(os.sched_getaffinity(0)) // context.recipe.processes_of_a_node)
    return Extractor(_load(context, name, device), ImageStore(context.inputs["cot_corpus"]), threads)


def _load(context: StageContext, name: str, device: str, kept: Path | None = None) -> Teacher:
    """The teacher, from the artifact that keeps it if there is one."""
    recipe = context.recipe.teachers[name]
    if kept is not None and recipe.pretraining_steps:
        return read_teacher(kept, device=device, recipe=recipe)
    base_model = context.inputs.get("base_model")
    return load_teacher(
        name, recipe, context.recipe.seed, device=device, base_model=base_model, progress=context.progress
    )


def _choose(context: StageContext, extractor: Extractor, wanted: Wanted) -> FeatureChoice:
    """Stored or online: what the recipe says, or what costs less by a measurement on the first targets."""
    teacher, runtime = extractor.teacher, context.recipe.runtime
    recipe = teacher.recipe
    speed = None
    if recipe.features == "auto":
        # The last targets: where there are scenes, they are what costs.
        start = scene_start(wanted.targets, max(0, len(wanted.targets) - _MEASURED_IMAGES[teacher.device.type]))
        some = wanted.targets[start:]
        list(extractor.batches([some]))
        count, began = 0, time.monotonic()
        while not count or time.monotonic() - began < _MEASURED_SECONDS:
            count += sum(len(batch.values.cpu()) for batch in extractor.batches([some]))
        speed = count / (time.monotonic() - began)
    return choose_features(
        wish=recipe.features,
        images_per_second=speed,
        image_bytes=bytes_per_target(teacher.grid, teacher.dim, recipe.storage),
        images=len(wanted.targets),
        visits=wanted.visits * context.recipe.stage2.epochs * recipe.trainings,
        bytes_per_second=runtime.feature_bytes_per_second,
        largest_bytes=runtime.feature_bytes,
    )


def _store(context: StageContext, extractor: Extractor, wanted: Wanted) -> int:
    """Make the shards and their index; returns for how many targets features were computed."""
    teacher, shards = extractor.teacher, plan(wanted.targets, extractor.teacher)
    finished = _finished_folder(context.work, teacher)
    for other in context.work.iterdir():
        if other.is_dir() and other != finished:
            shutil.rmtree(other)
    missing = [shard for shard in shards if not is_whole(finished_path(finished, shard))]
    there = len(wanted.targets) - sum(len(shard.targets) for shard in missing)
    with _other_processes(context), contextlib.closing(complete(extractor, missing, finished)) as steps:
        counted = _one_by_one(steps, context.progress)
        label = f"{teacher.name}, images"
        for _ in context.progress.track(counted, label, total=len(wanted.targets), done=there):
            pass
    for number, shard in enumerate(shards):
        _link_or_copy(finished_path(finished, shard), context.out / shard_name(number))
    mend = f"run `valr run {context.stage} --force`"
    opened = [Shard(context.out / shard_name(number), mend) for number in range(len(shards))]
    write_targets(context.out, ((plan.targets, shard.states) for plan, shard in zip(shards, opened, strict=True)))
    write_index(context.out, _head(teacher, "stored", opened))
    return len(wanted.targets) - there


def _extract_part(context: StageContext, extractor: Extractor, wanted: Wanted) -> int:
    """The shards of this part, and of the others what they have not begun; returns for how many targets."""
    assert context.part is not None
    shards, (part, parts) = plan(wanted.targets, extractor.teacher), context.part
    turn = len(shards) * part // parts
    finished = _finished_folder(context.work, extractor.teacher)
    label = f"{extractor.teacher.name}, images of part {part}/{parts}"
    with contextlib.closing(extract(extractor, [*shards[turn:], *shards[:turn]], finished)) as steps:
        return sum(1 for _ in context.progress.track(_one_by_one(steps, context.progress), label))


def _finished_folder(work: Path, teacher: Teacher) -> Path:
    """Where finished shards of this teacher wait."""
    folder = work / f"{teacher.fingerprint}-{teacher.recipe.views}-{teacher.recipe.storage}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _one_by_one(steps: Iterable[int], progress: Progress) -> Iterator[None]:
    """One item an image, with the speed so far."""
    done, began = 0, time.monotonic()
    for count in steps:
        done += count
        progress.log(done, {"images_per_second": done / (time.monotonic() - began)})
        yield from repeat(None, count)


@contextlib.contextmanager
def _other_processes(context: StageContext) -> Iterator[None]:
    """The other processes of this node, each a part; what one leaves undone, this one does."""
    recipe, count = context.recipe, context.recipe.processes_of_a_node
    name = context.stage.removeprefix("teacher_features_")
    decided = recipe.teachers[name].model_copy(update={"features": "stored"})
    recipe = recipe.model_copy(update={"teachers": {**recipe.teachers, name: decided}})
    spawn = multiprocessing.get_context("spawn")
    started = []
    for part in range(1, count):
        mine = replace(context, recipe=recipe, progress=Progress(), part=(part, count))
        started.append(spawn.Process(target=_beside, args=(mine,), daemon=True))
        started[-1].start()
    try:
        yield
    finally:
        for process in started:
            process.terminate()
            process.join()


def _beside(context: StageContext) -> None:
    """A part in a process of its own."""
    end_with_parent()
    build_teacher_features(context)


def _link_or_copy(source: Path, destination: Path) -> None:
    """The finished shard under its name in the artifact, without a second copy where the file system can."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)


def _head(teacher: Teacher, mode: str, shards: Sequence[Shard]) -> dict[str, Any]:
    """What index.json says."""
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda shard: shard.digest, shards))
    return {
        "teacher": teacher.name,
        "mode": mode,
        "model": teacher.recipe.model,
        "license": teacher.license,
        "fingerprint": teacher.fingerprint,
        "weights_sample": weights_sample(teacher.name, teacher.recipe),
        "preprocessing": teacher.preprocessing,
        "views": teacher.recipe.views,
        "grid": teacher.grid,
        "dim": teacher.dim,
        "storage": teacher.recipe.storage if mode == "stored" else None,
        "shards": [{"file": shard.path.name, **digest} for shard, digest in zip(shards, digests, strict=True)],
    }


def _write_rejects(context: StageContext, extractor: Extractor, rejected: Sequence[Region]) -> int:
    """Name every record that needs one of `rejected`; returns their number."""
    if not rejected:
        return 0
    reasons = {
        target: why or "it could be decoded at the second attempt"
        for batch in extractor.batches([rejected])
        for target, why in zip(batch.targets, batch.rejected, strict=True)
    }
    lines = []
    for batch in Sequences(context.inputs["latent_corpus"]).batches():
        ids, sources = batch["id"].to_pylist(), batch["source"].to_pylist()
        for row, target in targets_of(batch):
            if (why := reasons.get(target.seen(joint=extractor.joint))) is not None:
                detail = f"{shown(target)}: {why}"
                line = {"id": ids[row], "source": sources[row], "reason": "image_unreadable", "detail": detail}
                lines.append(json.dumps(line, ensure_ascii=False))
    (context.out / _REJECTS).write_text("".join(f"{line}\n" for line in dict.fromkeys(lines)), encoding="utf-8")
    context.progress.say(
        f"{len(rejected)} targets have no features because their images can't be decoded: {_REJECTS} names the "
        "records, and training leaves them out"
    )
    return len(rejected)


# ---------------------------------------------------------------------------------------------------------- judging


def _judge(store: FeatureStore, targets: Sequence[Region]) -> tuple[list[str], dict[str, float]]:
    """What is wrong with stored features, and figures about them."""
    found: dict[str, list[str]] = {"not finite": [], "the same at every patch": []}
    energy = torch.zeros(store.dim, dtype=torch.float64)
    lowest, cosine, rows, start = 1.0, 0.0, 0, 0
    for shard in store.shards():
        for kind, state in (("not finite", NOT_FINITE), ("the same at every patch", CONSTANT)):
            of_shard = (shard.states == state).nonzero().flatten().tolist()
            found[kind] += [shown(targets[start + row]) for row in of_shard]
        energy += shard.energy
        lowest = min(lowest, shard.facts.min_cosine)
        cosine, rows = cosine + shard.facts.other_cosine, rows + shard.facts.rows
        start += len(shard.states)
    absent = len(targets) - start
    if store.index["storage"] == "float16":
        found["not finite, or larger than float16 can be (set storage to bfloat16)"] = found.pop("not finite")
    problems = [f"{len(which)} {kind} (first {which[0]})" for kind, which in found.items() if which]
    if absent:
        problems.append(f"{absent} missing")
    if lowest < MIN_COSINE:
        problems.append(
            f"storage={store.index['storage']} turns a patch feature away from its value: cosine {lowest:.6f} < "
            f"{MIN_COSINE}; set teachers.{store.teacher}.storage to bfloat16"
        )
    figures = {
        "min_cosine_to_computed": round(lowest, 6),
        "cosine_to_other_target": round(cosine / max(1, rows), 4),
        "largest_channel_share": round((energy.max() / energy.sum().clamp_min(1e-30)).item(), 4),
    }
    return problems, figures


def _cosine_to_float32(context: StageContext, teacher: Teacher, pixels: Tensor) -> dict[str, float]:
    """What computing in a narrower type costs, on a few images."""
    recipe = teacher.recipe.model_copy(update={"precision": "float32", "compile": False})
    exact = context.recipe.model_copy(update={"teachers": {teacher.name: recipe}})
    with torch.no_grad():
        wide = _load(replace(context, recipe=exact), teacher.name, str(teacher.device)).features(pixels)
        cosine = F.cosine_similarity(teacher.features(pixels).float(), wide, dim=-1)
    return {
        "min_cosine_of_precision": round(cosine.min().item(), 6),
        "mean_cosine_of_precision": round(cosine.mean().item(), 6),
    }


def _check(name: str, count: int, problems: Sequence[str], figures: Mapping[str, float]) -> Check:
    sound = f"all {count} targets are accounted for, finite and not constant"
    if "min_cosine_to_computed" in figures:
        sound += f"; cosine to what was computed at least {figures['min_cosine_to_computed']}"
    mend = f"look at the weights of teachers.{name}, then make the features again"
    return Check(
        name="features_are_whole",
        passed=not problems,
        detail=f"{'; '.join(problems)}: {mend}" if problems else sound,
        metadata={"targets": count, "problems": list(problems), **figures},
    )


def _about(teacher: Teacher, choice: FeatureChoice) -> dict[str, int | float | str]:
    """What the encoder is."""
    recipe = teacher.recipe
    return {
        "model": recipe.model,
        "parameters": sum(parameter.numel() for parameter in teacher.model.parameters()),
        "license": teacher.license,
        "fingerprint": teacher.fingerprint[:12],
        "image_pixels": teacher.image_pixels,
        "precision": recipe.precision,
        "views": recipe.views,
        "features": choice.mode,
    }


def _size(teacher: Teacher, wanted: Wanted, rejected: int) -> dict[str, int | float | str]:
    """How much there is of what."""
    return {
        "targets": len(wanted.targets),
        "images": len({target.digest for target in wanted.targets}),
        "joint_targets": sum(bool(target.views) for target in wanted.targets),
        "rejected": rejected,
        "rows": teacher.grid[0],
        "columns": teacher.grid[1],
        "dim": teacher.dim,
        "bytes_per_target": bytes_per_target(teacher.grid, teacher.dim, teacher.recipe.storage),
    }


def _draw_features(features: Tensor, seen: Tensor, name: str, path: Path) -> None:
    """A few targets as the teacher saw them, above their features coloured by the three principal components.

    Args:
        features: ``[n, rows, columns, dim]`` float64.
        seen: ``[n, side, side, 3]`` uint8.
    """
    # Features that are not finite fail the check; the picture must not stop the stage before it can say so.
    features = features.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    centred = features.flatten(0, 2) - features.flatten(0, 2).mean(dim=0)
    components = torch.linalg.svd(centred, full_matrices=False).Vh[:3].T
    # A component's sign is arbitrary; the largest loading is made positive so that the colours are always the same.
    components = components * components.gather(0, components.abs().argmax(dim=0, keepdim=True)).sign()
    colours = centred @ components
    low, high = colours.quantile(0.02, dim=0), colours.quantile(0.98, dim=0)
    shares = ((colours - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    shares = F.pad(shares, (0, 3 - shares.shape[1]))
    figure = Figure(figsize=(1.3 * len(seen), 2.9), layout="constrained")
    axes = figure.subplots(2, len(seen), squeeze=False)
    for column, share in enumerate(shares.unflatten(0, features.shape[:3])):
        axes[0, column].imshow(seen[column].numpy())
        axes[1, column].imshow(share.numpy())
    for panel in axes.flat:
        panel.set_axis_off()
    figure.suptitle(f"{name}: targets and their features (three principal components)", fontsize=9)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| what | value |", "| --- | --- |", *(f"| {what} | {value} |" for what, value in rows.items())])
