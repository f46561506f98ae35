"""The artifacts that training reads, in miniature: model, sequences, images and made-up teacher features."""

from __future__ import annotations

import io
import os
import signal
from dataclasses import replace
from pathlib import Path

import torch

from tests import tiny
from valr_ops.data.corpus import write_images
from valr_ops.data.records import Image
from valr_ops.data.sequences import Region, Sequence, Sequences, batch_of, write_sequences
from valr_ops.model.qwen import save_model
from valr_ops.recipe.recipe import Recipe
from valr_ops.store.artifacts import StageContext
from valr_ops.store.progress import Progress
from valr_ops.teachers.stored import Shard, ShardWriter, shard_name, write_index, write_targets

GRID, DIMENSION = (3, 3), 6


def sequences(count: int = 10) -> list[Sequence]:
    """Ragged sequences: the four of `tiny` over and over; the last two are held out."""
    made = [replace(tiny.sequences()[number % 4], id=f"tiny/{number:02d}") for number in range(count)]
    return [replace(one, split="validation") if number >= count - 2 else one for number, one in enumerate(made)]


def write_corpus(folder: Path, sequences: list[Sequence], weights: dict[str, float] | None = None) -> Sequences:
    """Write `sequences` as a `latent_corpus`, four a block, in place of what is there; returns those for training."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [tiny.stored(one) for one in sequences]
    write_sequences(folder, (batch_of(rows[start : start + 4]) for start in range(0, len(rows), 4)), weights or {})
    return Sequences(folder, "train")


def write_inputs(root: Path, teachers: tuple[str, ...] = ("dinov3",)) -> dict[str, Path]:
    """Write every input artifact below `root`; returns their folders by stage name."""
    folders = {name: root / name for name in ("cot_corpus", "latent_corpus", "base_model")}
    folders |= {f"teacher_features_{teacher}": root / f"teacher_features_{teacher}" for teacher in teachers}
    for folder in folders.values():
        folder.mkdir(parents=True)
    images = []
    for name, image in sorted(tiny.images().images.items()):
        data = io.BytesIO()
        image.save(data, "PNG")
        images.append(Image(data.getvalue(), tiny.digest(name), image.width, image.height, "input"))
    write_images(folders["cot_corpus"], images)
    write_corpus(folders["latent_corpus"], sequences())
    save_model(tiny.model(), tiny.processor(), folders["base_model"], {})
    for number, teacher in enumerate(teachers):
        _write_features(folders[f"teacher_features_{teacher}"], teacher, number)
    return folders | {"stage1_sft": folders["base_model"]}


def _write_features(folder: Path, teacher: str, seed: int) -> None:
    """Features that depend on the image alone, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    targets = [(one.digest, one.box) for sequence in sequences() for one in sequence.segments if one.digest is not None]
    distinct = sorted(set(targets), key=str)
    of_image = {digest: torch.randn(*GRID, DIMENSION, generator=generator) for digest, _ in distinct}
    store_features(folder, teacher, {Region(tiny.digest(name), box): of_image[name] for name, box in distinct})


def store_features(folder: Path, teacher: str, features: dict[Region, torch.Tensor]) -> None:
    """Write a `teacher_features_<teacher>` with these features ``[rows, columns, dim]``."""
    values = torch.stack(list(features.values()))
    rows, columns, dim = values.shape[1:]
    writer = ShardWriter(folder / shard_name(0), len(values), (rows, columns), dim, "bfloat16")
    writer.write(values, [False] * len(values))
    writer.finish()
    shard = Shard(folder / shard_name(0), "")
    write_targets(folder, [(list(features), shard.states)])
    head = {"teacher": teacher, "mode": "stored", "dim": dim, "grid": [rows, columns], "fingerprint": "0"}
    about = {"model": "made up", "license": "none", "views": "single", "weights_sample": None, "storage": "bfloat16"}
    write_index(folder, {**head, **about, "shards": [{"file": shard_name(0)}]})


class Listening(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.logged: dict[int, dict[str, float]] = {}

    def say(self, message: str) -> None:
        self.said.append(message)

    def log(self, step: int, metrics: dict[str, float]) -> None:  # type: ignore[override]
        self.logged[step] = dict(metrics)


class DyingAt(Listening):
    """Ends the run while update `step` is logged, as a kill would."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def log(self, step: int, metrics: dict[str, float]) -> None:  # type: ignore[override]
        if step == self.step:
            raise MemoryError
        super().log(step, metrics)


class SignalledAt(DyingAt):
    """Gets SIGTERM while update `step` is logged."""

    def log(self, step: int, metrics: dict[str, float]) -> None:  # type: ignore[override]
        if step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
        Listening.log(self, step, metrics)


def context(
    stage: str, recipe: Recipe, inputs: dict[str, Path], root: Path, progress: Progress | None = None
) -> StageContext:
    """A context whose `out` is empty and whose `work` is what an earlier one of this `root` left."""
    out, work = root / "out", root / "work"
    if out.is_dir():
        for file in out.rglob("*"):
            file.unlink()
        out.rmdir()
    out.mkdir(parents=True)
    work.mkdir(exist_ok=True)
    return StageContext(stage, recipe, inputs, out, work, progress or Listening())


def content(folder: Path) -> dict[str, bytes]:
    """Every file's bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
