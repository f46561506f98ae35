"""Stored teacher features: what the latents are aligned to, one grid of patch features a target.

In: the latent corpus, whose segments name their targets (an image and perhaps a box), and the images. Out: a few large
safetensors shards in bfloat16, `index.json`, a picture of the features, and at scale tiny the teacher itself.
Always: each distinct target stands once, in the order of image digest and box; a shard that was finished before a kill
is used again if teacher and targets are the same; a missing target is an error, never a skipped one. π³ sees each
target as a scene of one view; features of joint views would be other targets.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice, pairwise
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from matplotlib.figure import Figure
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from valr_ops.data.corpus import ImageStore
from valr_ops.data.records import Box
from valr_ops.data.sequences import Sequences, targets_of
from valr_ops.store.artifacts import Check, StageContext, StageReport
from valr_ops.store.progress import Progress
from valr_ops.teachers.encoders import Teacher, load_teacher

Target = tuple[str, Box | None]
"""Digest of an image, and a region of it or all of it."""

SHARD_BYTES = 256 * 2**20
MIN_COSINE = 0.999
"""Of a stored patch feature to its float32 value: bfloat16 keeps eight bits, which costs about 1e-5."""
_BATCH_IMAGES = 64
_SHOWN_TARGETS = 6


class FeatureError(ValueError):
    """Features that can't be made or found: the message names the folder, the target and the fix."""


@dataclass(frozen=True)
class _Shard:
    """What one shard holds, and what is known of it."""

    targets: tuple[Target, ...]
    name: str
    """Name of the file in the artifact."""

    @cached_property
    def key(self) -> str:
        """Digest of the targets: names the finished file in the work folder."""
        return hashlib.sha256(json.dumps(self.targets).encode()).hexdigest()


class FeatureStore:
    """Random access to a `teacher_features_<teacher>` artifact; shards are mapped into memory, not read."""

    def __init__(self, folder: Path) -> None:
        """Read the index. Raises `FeatureError` where there is none."""
        self._folder = folder
        path = folder / "index.json"
        if not path.is_file():
            raise FeatureError(f"{path} does not exist; make the features with `valr run {folder.name}`")
        index = json.loads(path.read_text(encoding="utf-8"))
        self.teacher: str = index["teacher"]
        self.dim: int = index["dim"]
        """Width of a patch feature."""
        self.fingerprint: str = index["fingerprint"]
        """Of the teacher: weights, architecture and preprocessing."""
        self._places = {
            _target(entry["digest"], entry["box"]): (entry["shard"], entry["row"]) for entry in index["targets"]
        }
        self._shards: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Target]:
        """The targets, in the order of the index."""
        return iter(self._places)

    def __contains__(self, target: Target) -> bool:
        return _target(*target) in self._places

    def shards(self) -> list[str]:
        """Names of the files that hold the features."""
        return sorted({shard for shard, _ in self._places.values()})

    def min_cosine_to_float32(self, shard: str) -> float:
        """Lowest cosine of a patch feature stored in `shard` to the float32 value it was rounded from."""
        return float(self._opened(shard).metadata()["min_cosine_to_float32"])

    def get(self, digest: str, box: Sequence[int] | None) -> Tensor:
        """Patch features ``[rows, columns, dim]`` of one target, bfloat16. Raises `FeatureError` for an unknown one."""
        target = _target(digest, box)
        if target not in self._places:
            raise FeatureError(
                f"{self._folder} has no features of image {digest[:12]} box {target[1]}; they belong to another "
                f"corpus: make them again with `valr run {self._folder.name}`"
            )
        shard, row = self._places[target]
        return self._opened(shard).get_slice("features")[row]

    def _opened(self, shard: str) -> Any:
        if shard not in self._shards:
            try:
                self._shards[shard] = safe_open(self._folder / shard, framework="pt")
            except (SafetensorError, OSError) as error:
                raise FeatureError(
                    f"{self._folder / shard} can't be read: {error}; make it again with `valr run {self._folder.name}`"
                ) from error
        return self._shards[shard]


def open_stores(stage: str, teachers: Iterable[str], inputs: Mapping[str, Path]) -> dict[str, FeatureStore]:
    """The features of each of `teachers`, from the artifacts that `stage` reads.

    Raises:
        FeatureError: a teacher whose features are none of the inputs, are not there, or are another teacher's.
    """
    stores = {}
    for teacher in teachers:
        name = f"teacher_features_{teacher}"
        if name not in inputs:
            there = ", ".join(one.removeprefix("teacher_features_") for one in inputs if one.startswith("teacher_feat"))
            raise FeatureError(
                f"{stage} aligns to {teacher}, but reads features of {there or 'no teacher'} only; add {name} to its "
                "inputs in valr_ops/stages.py, or change the teachers that it aligns to"
            )
        stores[teacher] = FeatureStore(inputs[name])
        if stores[teacher].teacher != teacher:
            raise FeatureError(
                f"{inputs[name]} holds features of {stores[teacher].teacher}, not of {teacher}; "
                f"make them again with `valr run {name} --force`"
            )
    return stores


def build_teacher_features(context: StageContext) -> StageReport:
    """The stages ``teacher_features_<teacher>``: patch features of every target of the latent corpus.

    Raises:
        FeatureError: the recipe has no such teacher, the corpus has no target, or a box lies outside of its image.
        TeacherError: the teacher can't be built.
    """
    torch.set_num_threads(context.recipe.runtime.threads)
    name = context.stage.removeprefix("teacher_features_")
    if name not in context.recipe.teachers:
        known = ", ".join(context.recipe.teachers)
        raise FeatureError(f"{context.stage} needs teachers.{name}, but the recipe has {known}; add it to params.yaml")
    targets = read_targets(context.inputs["latent_corpus"])
    images = ImageStore(context.inputs["cot_corpus"])

    started = time.monotonic()
    recipe = context.recipe.teachers[name]
    teacher = load_teacher(
        name,
        recipe,
        context.recipe.seed,
        device=context.recipe.runtime.device,
        base_model=context.inputs.get("base_model"),
        progress=context.progress,
    )
    loaded = time.monotonic()
    fingerprint = teacher.fingerprint
    context.progress.say(f"{name}: {len(targets)} targets, features {list(teacher.grid)} x {teacher.dim}")
    shards = _plan(targets, teacher)
    finished = _finished_folder(context.work, fingerprint)
    extracted = _extract(teacher, images, shards, finished, context.progress)
    seconds = time.monotonic() - loaded

    for shard in shards:
        _link_or_copy(finished / f"{shard.key}.safetensors", context.out / shard.name)
    _write_index(context.out, teacher, fingerprint, shards)
    if recipe.pretraining_steps:
        teacher.save(context.out)
    shown = targets[:: math.ceil(len(targets) / _SHOWN_TARGETS)]
    _draw_features(FeatureStore(context.out), images, teacher, shown, context.out / "pca.png")

    check, figures = _check(context.out, targets, teacher)
    if teacher.held_out_accuracy is not None:
        figures["held_out_patch_accuracy"] = round(teacher.held_out_accuracy, 4)
    about: dict[str, int | float | str] = {
        "model": recipe.model,
        "parameters": sum(parameter.numel() for parameter in teacher.model.parameters()),
        "license": teacher.license,
        "fingerprint": fingerprint[:12],
        "image_pixels": teacher.image_pixels,
    }
    size: dict[str, int | float | str] = {
        "targets": len(targets),
        "images": len({digest for digest, _ in targets}),
        "rows": teacher.grid[0],
        "columns": teacher.grid[1],
        "dim": teacher.dim,
        "shards": len(shards),
    }
    return StageReport(
        summary=about | size | figures,
        tables={"Teacher": _table(about), "Features": _table(size | figures)},
        plots=("pca.png",),
        checks=(check,),
        timings={
            "load_seconds": loaded - started,
            "extract_seconds": seconds,
            "images_per_second": extracted / seconds if extracted else 0.0,
        },
    )


def read_targets(latent_corpus: Path) -> list[Target]:
    """The distinct targets of all segments, sorted by digest and box.

    Raises:
        FeatureError: there is none. ShardError: the rewritten corpus is damaged.
    """
    targets = {target for batch in Sequences(latent_corpus).batches() for target in targets_of(batch)}
    if not targets:
        raise FeatureError(
            f"no segment in {latent_corpus} has a target, so there is nothing to align to; "
            "look at the rejects of cot_corpus, or train with alignment.weight=0"
        )
    return sorted(targets, key=lambda target: (target[0], target[1] or ()))


def _target(digest: str, box: Sequence[int] | None) -> Target:
    if box is None:
        return digest, None
    x0, y0, x1, y1 = box
    return digest, (x0, y0, x1, y1)


def _plan(targets: Sequence[Target], teacher: Teacher) -> list[_Shard]:
    """Targets in order, as many in a shard as fit, the shards of nearly equal size."""
    bytes_per_target = 2 * teacher.dim * math.prod(teacher.grid)
    count = math.ceil(len(targets) * bytes_per_target / SHARD_BYTES)
    edges = [len(targets) * part // count for part in range(count + 1)]
    return [
        _Shard(tuple(targets[start:end]), f"features-{number:05d}.safetensors")
        for number, (start, end) in enumerate(pairwise(edges))
    ]


def _finished_folder(work: Path, fingerprint: str) -> Path:
    """Where finished shards of this teacher wait; those of another one are removed."""
    folder = work / fingerprint
    for other in work.glob("*"):
        if other.is_dir() and other != folder:
            shutil.rmtree(other)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _extract(teacher: Teacher, images: ImageStore, shards: Sequence[_Shard], finished: Path, progress: Progress) -> int:
    """Write the shards that are not there yet; returns for how many targets features were computed."""
    # Batches never cross a shard: a run that goes on after a kill computes the same batches, hence the same bits.
    batches = [(shard, start) for shard in shards for start in range(0, len(shard.targets), _BATCH_IMAGES)]
    missing = [shard for shard in shards if not _opens(finished / f"{shard.key}.safetensors")]
    to_do = [(shard, start) for shard, start in batches if shard in missing]
    pictures = _decoded_once(images, (target for shard in missing for target in shard.targets))
    label = f"features of {teacher.name}, batches of {_BATCH_IMAGES}"
    for shard, start in progress.track(to_do, label, total=len(batches), done=len(batches) - len(to_do)):
        if start == 0:
            features = torch.empty(len(shard.targets), *teacher.grid, teacher.dim, dtype=torch.bfloat16)
            lowest = 1.0
        exact = teacher(list(islice(pictures, min(_BATCH_IMAGES, len(shard.targets) - start)))).cpu()
        end = start + len(exact)
        features[start:end] = exact
        lowest = min(lowest, F.cosine_similarity(features[start:end].float(), exact, dim=-1).min().item())
        if end == len(shard.targets):
            part = finished / f"{shard.key}.part"
            # One metadata key only: safetensors does not keep the order of several.
            save_file({"features": features}, part, metadata={"min_cosine_to_float32": f"{lowest:.6f}"})
            part.replace(finished / f"{shard.key}.safetensors")
    return sum(len(shard.targets) for shard in missing)


def _opens(path: Path) -> bool:
    """Whether `path` is a shard of full length; a power cut can leave a part of one."""
    try:
        safe_open(path, framework="pt")
    except (SafetensorError, OSError):
        return False
    return True


def _decoded_once(images: ImageStore, targets: Iterable[Target]) -> Iterator[PIL.Image.Image]:
    """The pixels of each target; neighbours of one image share its decoding. Raises `FeatureError`."""
    for digest, group in groupby(targets, key=lambda target: target[0]):
        picture = images.load(digest)
        for _, box in group:
            if box is None:
                yield picture
                continue
            x0, y0, x1, y1 = box
            if not (0 <= x0 < x1 <= picture.width and 0 <= y0 < y1 <= picture.height):
                raise FeatureError(
                    f"box {list(box)} of image {digest[:12]} lies outside of {picture.width} x {picture.height} px; "
                    "latent_corpus and cot_corpus are of different runs: make both again"
                )
            yield picture.crop(box)


def _link_or_copy(source: Path, destination: Path) -> None:
    """The finished shard under its name in the artifact, without a second copy where the file system can."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)


def _write_index(folder: Path, teacher: Teacher, fingerprint: str, shards: Sequence[_Shard]) -> None:
    """index.json: one line a target, so that two indexes can be compared by people too."""
    head = {
        "teacher": teacher.name,
        "model": teacher.recipe.model,
        "license": teacher.license,
        "fingerprint": fingerprint,
        "preprocessing": teacher.preprocessing,
        "views": "single",
        "dim": teacher.dim,
        "dtype": "bfloat16",
    }
    entries = [
        {"digest": digest, "box": box, "shard": shard.name, "row": row, "grid": teacher.grid}
        for shard in shards
        for row, (digest, box) in enumerate(shard.targets)
    ]
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    text = json.dumps(head, indent=1).removesuffix("\n}") + f',\n "targets": [\n{lines}\n]}}\n'
    (folder / "index.json").write_text(text, encoding="utf-8")


def _check(folder: Path, targets: Sequence[Target], teacher: Teacher) -> tuple[Check, dict[str, float]]:
    """Read everything back: the blocking check, and figures about the features."""
    store = FeatureStore(folder)
    absent = [_shown(target) for target in targets if target not in store]
    broken, flat, misshapen = [], [], []
    energy, cosine, sound_targets = torch.zeros(teacher.dim, dtype=torch.float64), 0.0, 0
    for start in range(0, len(targets), _BATCH_IMAGES):
        sound = []
        for target in targets[start : start + _BATCH_IMAGES]:
            if target not in store:
                continue
            features = store.get(*target).float()
            if tuple(features.shape) != (*teacher.grid, teacher.dim):
                misshapen.append(_shown(target))
            elif not features.isfinite().all():
                broken.append(_shown(target))
            elif (features == features[0, 0]).all():
                flat.append(_shown(target))
            else:
                sound.append(features)
        if sound:
            patches = torch.stack(sound)
            energy += patches.double().square().sum((0, 1, 2))
            # Neighbours show the same image, so the other target is taken from half a batch away.
            other = patches.roll(len(sound) // 2, dims=0)
            cosine += F.cosine_similarity(patches, other, dim=-1).mean().item() * len(sound)
            sound_targets += len(sound)
    lowest = min(store.min_cosine_to_float32(shard) for shard in store.shards())
    problems = [
        f"{len(found)} {kind} (first {found[0]})"
        for kind, found in (
            ("missing", absent),
            ("of another shape", misshapen),
            ("not finite", broken),
            ("the same at every patch", flat),
        )
        if found
    ]
    if lowest < MIN_COSINE:
        problems.append(f"bfloat16 turns a patch feature away from its float32 value: cosine {lowest} < {MIN_COSINE}")
    figures = {
        "min_cosine_to_float32": lowest,
        "cosine_to_other_target": round(cosine / max(1, sound_targets), 4),
        "largest_channel_share": round((energy.max() / energy.sum().clamp_min(1e-30)).item(), 4),
    }
    check = Check(
        name="features_are_whole",
        passed=not problems,
        detail=f"{'; '.join(problems)}: look at the weights of teachers.{teacher.name}, then make the features again"
        if problems
        else f"all {len(targets)} targets are there, finite and not constant; cosine to float32 at least {lowest}",
        metadata={
            "targets": len(targets),
            "missing": absent[:20],
            "not_finite": broken[:20],
            "constant": flat[:20],
            "misshapen": misshapen[:20],
            "min_cosine_to_float32": lowest,
        },
    )
    return check, figures


def _shown(target: Target) -> str:
    digest, box = target
    return f"{digest[:12]}{list(box) if box else ''}"


def _draw_features(
    store: FeatureStore, images: ImageStore, teacher: Teacher, targets: Sequence[Target], path: Path
) -> None:
    """A few targets as the teacher saw them, above their features coloured by the three principal components."""
    # Features that are not finite fail the check; the picture must not stop the stage before it can say so.
    grids = torch.stack([store.get(*target).double() for target in targets]).nan_to_num()
    centred = grids.flatten(0, 2) - grids.flatten(0, 2).mean(dim=0)
    components = torch.linalg.svd(centred, full_matrices=False).Vh[:3].T
    # A component's sign is arbitrary; the largest loading is made positive so that the colours are always the same.
    components = components * components.gather(0, components.abs().argmax(dim=0, keepdim=True)).sign()
    colours = centred @ components
    low, high = colours.quantile(0.02, dim=0), colours.quantile(0.98, dim=0)
    shares = ((colours - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    shares = F.pad(shares, (0, 3 - shares.shape[1]))
    seen = teacher.squash(list(_decoded_once(images, targets)))
    figure = Figure(figsize=(1.3 * len(targets), 2.9), layout="constrained")
    axes = figure.subplots(2, len(targets), squeeze=False)
    for column, share in enumerate(shares.unflatten(0, grids.shape[:3])):
        axes[0, column].imshow(seen[column].numpy())
        axes[1, column].imshow(share.numpy())
    for panel in axes.flat:
        panel.set_axis_off()
    figure.suptitle(f"{teacher.name}: targets and their features (three principal components)", fontsize=9)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| what | value |", "| --- | --- |", *(f"| {what} | {value} |" for what, value in rows.items())])
