"""Speed of teachers: making features, storing them, reading them, and computing them beside training.

Encoders are the real classes with random weights, images are drawn JPEGs of 640 x 480 pixels. Two things that are
compared take turns in one run, with one torch thread each as in the recipe, so that a second core decodes and writes.
"""

from __future__ import annotations

import gc
import hashlib
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional as F

from perf.method import WIDE, make_model, make_window, over, stage2
from perf.rows import Row, row
from valr_ops.data.corpus import ImageStore, write_images
from valr_ops.data.records import Image
from valr_ops.data.sequences import Region
from valr_ops.recipe.recipe import TeacherRecipe
from valr_ops.recipe.recipes import scale
from valr_ops.teachers.encoders import Teacher
from valr_ops.teachers.extraction import Extractor, arranged, extract, finished_path, plan
from valr_ops.teachers.online import OnlineFeatures
from valr_ops.teachers.pi3 import Pi3
from valr_ops.teachers.stored import (
    SHARD_BYTES,
    FeatureStore,
    Shard,
    ShardWriter,
    bytes_per_target,
    shard_name,
    write_index,
    write_targets,
)
from valr_ops.teachers.timm_encoders import build_timm

RUNS = 5
GRID, DIM = (16, 16), 1024
"""Of ViT-L/16 at 256 pixels."""
SMALL = {"embed_dim": 96, "depth": 4, "num_heads": 3}
EXTRACTED = {"tiny": (SMALL, 1024), "vit_s": ({}, 96)}
"""Widths of the encoder, and how many images it is given."""
STORED_TARGETS, WINDOW = 4096, 64
GPU_IMAGES, GPU_SCENES, GPU_VIEWS = 1024, 32, 8
DEVICE = "cuda"


def extraction() -> Iterator[Row]:
    """Images a second from JPEGs on disk to shards on disk, over the encoder alone on pixels in memory."""
    torch.set_num_threads(1)
    for name, (arguments, count) in EXTRACTED.items():
        teacher = random_teacher("dinov3", _recipe("vit_small_patch16_dinov3", arguments))
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            extractor = Extractor(teacher, drawn_images(root, count))
            targets = arranged(map(Region, ImageStore(root)))
            began = time.monotonic()
            pixels = extractor.pixels(targets)
            decoded = count / (time.monotonic() - began)

            def bare(teacher: Teacher = teacher, pixels: Tensor = pixels) -> None:
                with torch.no_grad():
                    for batch in pixels.split(teacher.batch_images):
                        teacher.features(batch)

            def whole(extractor: Extractor = extractor, targets: list[Region] = targets, root: Path = root) -> None:
                with tempfile.TemporaryDirectory(dir=root) as finished:
                    done = sum(extract(extractor, plan(targets, extractor.teacher), Path(finished)))
                assert done == len(targets)

            teacher(pixels[:1])
            seconds = wall_clock({"bare": bare, "whole": whole}, RUNS)
        cores = len(os.sched_getaffinity(0))
        what = f"{name}, DINOv3 class at 256 px, {count} images, {cores} cores"
        rates = [count / one for one in seconds["bare"]]
        yield row(f"extraction_{name}_bare", rates, "1/s", None, f"{what}: the encoder alone, one thread", "higher")
        yield row(f"extraction_{name}_decoding", [decoded], "1/s", None, f"{what}: decoding alone, one core", "higher")
        what = f"{what}: images a second from JPEGs on disk to shards on disk over the encoder alone"
        yield row(f"extraction_{name}", over(seconds["bare"], seconds["whole"]), "ratio", 0.95, what, "higher")


def stored_reading() -> Iterator[Row]:
    """Bytes a second from shards into batches, over a plain copy, a file a sample, and `datasets`."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        targets = drawn_store(root / "teacher_features_dinov3", STORED_TARGETS)
        store = FeatureStore(root / "teacher_features_dinov3")
        copied = torch.stack(store.features(targets))
        values = copied.view(torch.int16).numpy()
        (root / "files").mkdir()
        for number, one in enumerate(values):
            np.save(root / "files" / f"{number}.npy", one)
        theirs = _dataset(values, root / "dataset")
        order = np.random.default_rng(0).permutation(len(targets)).reshape(-1, WINDOW).tolist()
        batch = torch.empty(WINDOW, *GRID, DIM, dtype=torch.bfloat16)
        bits = batch.view(torch.int16)

        def ours(store: FeatureStore) -> None:
            for places in order:
                torch.stack(store.features([targets[place] for place in places]), out=batch)

        def copy() -> None:
            for part in copied.split(WINDOW):
                batch.copy_(part)

        def files() -> None:
            for places in order:
                loaded = [torch.from_numpy(np.load(root / "files" / f"{place}.npy")) for place in places]
                torch.stack(loaded, out=bits)

        def datasets() -> None:
            for places in order:
                bits.copy_(torch.from_numpy(theirs[places]["features"]).view(bits.shape))

        for check in (lambda: ours(store), files, datasets):
            check()
            assert torch.equal(bits, torch.from_numpy(values[order[-1]]))
        seconds = wall_clock(
            {
                "first": lambda: ours(FeatureStore(root / "teacher_features_dinov3")),
                "later": lambda: ours(store),
                "copy": copy,
                "files": files,
                "datasets": datasets,
            },
            RUNS,
        )
    what = f"{copied.nbytes / 1e9:.1f} GB of ViT-L features, {WINDOW} in random order to a batch, one thread"
    rates = [copied.nbytes / 1e9 / one for one in seconds["later"]]
    yield row("stored_reading", rates, "GB/s", None, f"{what}: later visits", "higher")
    for name, visit in (("first", "first visit, opening and checksums included"), ("later", "later visits")):
        ratios = over(seconds["copy"], seconds[name])
        compared = f"{what}: {visit}, over a plain copy in memory"
        goal = 0.8 if name == "later" else None
        yield row(f"stored_reading_{name}_over_copy", ratios, "ratio", goal, compared, "higher")
    for name, which in (("files", "np.load of a file a sample"), ("datasets", "`datasets` with numpy format")):
        compared = f"{what}: later visits, over {which}"
        ratios = over(seconds[name], seconds["later"])
        yield row(f"stored_reading_over_{name}", ratios, "ratio", 3.0, compared, "higher")


def stored_bytes() -> Iterator[Row]:
    """Bytes on disk over those of float32, everything that belongs to the features included."""
    torch.set_num_threads(1)
    count = 32
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        images = drawn_images(root, count)
        targets = arranged(map(Region, images))
        for storage in ("bfloat16", "float16", "int8"):
            # Two of ViT-L's blocks: as wide, but not as slow. Features of all of them are not rounded differently.
            recipe = _recipe("vit_large_patch16_dinov3", {"depth": 2}).model_copy(update={"storage": storage})
            teacher = random_teacher("dinov3", recipe)
            artifact = root / storage
            (artifact / "finished").mkdir(parents=True)
            plans = plan(targets, teacher)
            assert sum(extract(Extractor(teacher, images), plans, artifact / "finished")) == count
            for number, one in enumerate(plans):
                finished_path(artifact / "finished", one).rename(artifact / shard_name(number))
            shards = complete_store(artifact, teacher.grid, teacher.dim, storage, [one.targets for one in plans])
            size = sum(file.stat().st_size for file in artifact.iterdir() if file.is_file()) / count
            cosine = min(shard.facts.min_cosine for shard in shards)
            what = f"{size:,.0f} bytes an image of ViT-L/16 at 256 px, index included, over float32; "
            what += f"smallest cosine to it {cosine:.6f}"
            yield row(f"stored_bytes_{storage}", [size / (4 * np.prod((*GRID, DIM)))], "ratio", None, what)


def gpu_teachers() -> Iterator[Row]:
    """Images a second of the paper's encoders on a GPU, and what two of them cost a stage-2 step beside them."""
    if not torch.cuda.is_available():
        return
    recipes = scale("paper").teachers
    online = {}
    for name in ("dinov3", "siglip2"):
        online[name] = random_teacher(name, recipes[name], DEVICE)
        yield from _gpu_rates(online[name], 2400.0 if name == "dinov3" else None)
    yield from _gpu_share(list(online.values()))
    del online
    for name in ("dinov2", "clip"):
        yield from _gpu_rates(random_teacher(name, recipes[name], DEVICE), None)
    yield from _gpu_pi3(random_teacher("pi3", recipes["pi3"], DEVICE))


def _gpu_rates(teacher: Teacher, goal: float | None) -> Iterator[Row]:
    device, name, side = torch.cuda.get_device_name(), teacher.name, teacher.image_pixels
    pinned = torch.randint(0, 256, (GPU_IMAGES, side, side, 3), dtype=torch.uint8).pin_memory()
    there = pinned.to(DEVICE)
    began = time.monotonic()
    _compute(teacher, there[: teacher.batch_images])
    torch.cuda.synchronize()
    compiling = time.monotonic() - began
    sides = {"pinned": lambda: _compute(teacher, pinned), "there": lambda: _compute(teacher, there)}
    if goal is not None:
        eager = Teacher(name, teacher.recipe.model_copy(update={"compile": False}), teacher.encoder)
        _compute(eager, there)
        sides["eager"] = lambda: _compute(eager, there)
    seconds = wall_clock(sides, RUNS)
    rates = {side: [GPU_IMAGES / one for one in values] for side, values in seconds.items()}
    what = f"{teacher.recipe.model} at {side} px, bfloat16, batches of {teacher.batch_images}"
    what_compiled = f"{what}, compiled in {compiling:.0f} s"
    what_pinned = f"{what_compiled}, from decoded images in pinned memory"
    yield row(f"gpu_teacher_{name}", rates["pinned"], "1/s", goal, what_pinned, "higher", device)
    what_there = f"{what_compiled}, from decoded images on the device"
    yield row(f"gpu_teacher_{name}_on_device", rates["there"], "1/s", None, what_there, "higher", device)
    if "eager" in rates:
        what_eager = f"{what}, not compiled, from decoded images on the device"
        yield row(f"gpu_teacher_{name}_eager", rates["eager"], "1/s", None, what_eager, "higher", device)
    some = there[: teacher.batch_images]
    exact = random_teacher(name, teacher.recipe.model_copy(update={"precision": "float32", "compile": False}), DEVICE)
    with torch.no_grad():
        cosine = F.cosine_similarity(teacher.features(some).float(), exact.features(some), dim=-1)
    what = f"{teacher.recipe.model}, random weights: smallest cosine of a patch feature, compiled and in bfloat16, to "
    what += f"what float32 gives; mean {cosine.mean():.5f}"
    yield row(f"gpu_teacher_{name}_cosine", [cosine.min().item()], "ratio", None, what, "higher", device)


def _gpu_pi3(teacher: Teacher) -> Iterator[Row]:
    device, side = torch.cuda.get_device_name(), teacher.image_pixels
    count = GPU_SCENES * GPU_VIEWS
    views = torch.randint(0, 256, (GPU_SCENES, GPU_VIEWS, side, side, 3), dtype=torch.uint8).pin_memory()

    def single() -> None:
        _compute(teacher, views.flatten(0, 1))

    def joint() -> None:
        with torch.no_grad():
            teacher.joint(views)

    single()
    joint()
    seconds = wall_clock({"single": single, "joint": joint}, RUNS)
    for name, how in (("single", "each alone"), ("joint", f"in scenes of {GPU_VIEWS} views")):
        what = f"π³ at {side} px, bfloat16 by autocast, images {how}, from decoded images in pinned memory"
        rates = [count / one for one in seconds[name]]
        yield row(f"gpu_teacher_pi3_{name}", rates, "1/s", None, what, "higher", device)


def _gpu_share(teachers: Sequence[Teacher]) -> Iterator[Row]:
    """A stage-2 step with the features of the next window computed in a thread beside it, and without."""
    device = torch.cuda.get_device_name()
    model = make_model(WIDE, tied=True, device=torch.device(DEVICE), dtype=torch.bfloat16)
    model.model.language_model.gradient_checkpointing = True
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
        images = drawn_images(Path(folder), 32 * 5)
        sources = [OnlineFeatures(Extractor(teacher, images)) for teacher in teachers]
        for segments in (1, 5):
            window = [batch.to(DEVICE) for batch in make_window(2, 16, segments, prompt=1200, step=60)]
            targets = list(map(Region, images))[: 32 * segments]

            def alone(targets: Sequence[Region] = targets) -> None:
                for source in sources:
                    source.features(targets)

            def without(window: Sequence[Any] = window) -> None:
                stage2(model, window, "two_pass", "cut")

            def beside(alone: Callable[[], None] = alone, without: Callable[[], None] = without) -> None:
                coming = pool.submit(alone)
                without()
                coming.result()

            alone()
            beside()
            seconds = wall_clock({"without": without, "beside": beside, "alone": alone}, RUNS)
            what = (
                f"{' and '.join(teacher.name for teacher in teachers)} online, {len(targets)} images a window, "
                f"beside a stage-2 step (Qwen2.5-VL-3B, micro-batch 2 x 16, {segments} segment(s), two_pass cut)"
            )
            shares = [ratio - 1 for ratio in over(seconds["beside"], seconds["without"])]
            median = {side: statistics.median(values) for side, values in seconds.items()}
            shared = f"{what}: what it takes longer than {median['without']:.2f} s"
            yield row(f"gpu_online_share_{segments}", shares, "share", 0.03, shared, device=device)
            shares = over(seconds["alone"], seconds["without"])
            shared = f"{what}: their {median['alone']:.2f} s alone, decoding included, over the step's"
            yield row(f"gpu_online_alone_{segments}", shares, "share", None, shared, device=device)


def _compute(teacher: Teacher, pixels: Tensor) -> None:
    """Features batch by batch, which are not kept."""
    with torch.no_grad():
        for batch in pixels.split(teacher.batch_images):
            teacher.features(batch)


# ------------------------------------------------------------------------------------------------- data and teachers


def random_teacher(name: str, recipe: TeacherRecipe, device: str = "cpu") -> Teacher:
    """The encoder of `recipe` with random weights, equal for equal recipes, made on the device."""
    if "dino" in recipe.model:
        # Their layer scales begin at 1e-5, and nothing that a block computes would be seen.
        recipe = recipe.model_copy(update={"arguments": recipe.arguments | {"init_values": 1.0}})
    torch.manual_seed(0)
    with torch.device(device):
        if recipe.architecture == "pi3":
            return Teacher(name, recipe, Pi3(recipe.model, **recipe.arguments))
        return Teacher(name, recipe, build_timm(name, recipe, folder=None))


def _recipe(model: str, arguments: dict[str, Any]) -> TeacherRecipe:
    return TeacherRecipe(architecture="timm", model=model, arguments=arguments, image_pixels=256)


def drawn_images(folder: Path, count: int) -> ImageStore:
    """JPEGs of 640 x 480 pixels with structure and grain, about as many bytes as a photo has."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(min(count, 50)):
        coarse = PIL.Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((640, 480), PIL.Image.Resampling.BICUBIC), np.int16)
        grainy = smooth + rng.normal(0, 6, (480, 640, 1)).astype(np.int16)
        file = io.BytesIO()
        PIL.Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
        encoded.append(file.getvalue())

    def images() -> Iterator[Image]:
        for number in range(count):
            # Other bytes behind the end of the picture make it another image, which has to be decoded anew.
            data = encoded[number % len(encoded)] + number.to_bytes(4, "little")
            digest = hashlib.sha256(data).hexdigest()
            yield Image(data=data, digest=digest, width=640, height=480, role="input")

    write_images(folder, images())
    return ImageStore(folder)


def drawn_store(folder: Path, count: int) -> list[Region]:
    """An artifact with features of the size of ViT-L's; returns its targets in order."""
    folder.mkdir()
    targets = [Region(hashlib.sha256(str(number).encode()).hexdigest()) for number in range(count)]
    each = SHARD_BYTES // bytes_per_target(GRID, DIM, "bfloat16")
    of_shards = [targets[start : start + each] for start in range(0, count, each)]
    torch.manual_seed(0)
    some = torch.randn(8, *GRID, DIM).bfloat16()
    for number, of_shard in enumerate(of_shards):
        writer = ShardWriter(folder / shard_name(number), len(of_shard), GRID, DIM, "bfloat16")
        for start in range(0, len(of_shard), 8):
            writer.write(some.roll(number * each + start, dims=-1)[: len(of_shard) - start], [False] * 8)
        writer.finish()
    complete_store(folder, GRID, DIM, "bfloat16", of_shards)
    return targets


def complete_store(
    folder: Path, grid: tuple[int, int], dim: int, storage: str, of_shards: Sequence[Sequence[Region]]
) -> list[Shard]:
    """Write what stands beside the shards; returns them."""
    shards = [Shard(folder / shard_name(number), "measure again") for number in range(len(of_shards))]
    states = (shard.states for shard in shards)
    write_targets(folder, zip(of_shards, states, strict=True))
    described: dict[str, Any] = {"teacher": "dinov3", "model": "vit_large_patch16_dinov3", "license": "none"}
    described |= {"mode": "stored", "fingerprint": "", "weights_sample": None, "preprocessing": {}, "views": "single"}
    described |= {"grid": grid, "dim": dim, "storage": storage}
    write_index(folder, described | {"shards": [{"file": shard.path.name, **shard.digest} for shard in shards]})
    return shards


def _dataset(values: np.ndarray, folder: Path) -> Any:
    """`values` ``[n, ...]`` as a Hugging Face data set on disk, memory-mapped, with numpy format."""
    import datasets
    import pyarrow as pa

    datasets.disable_progress_bars()
    width = int(np.prod(values.shape[1:]))
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width)
    datasets.Dataset(pa.table({"features": column})).save_to_disk(folder)
    return datasets.load_from_disk(folder).with_format("numpy")


# ------------------------------------------------------------------------------------------------------------ timing


def wall_clock(sides: Mapping[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Seconds of each side, run in turn, until a GPU has done what it was given."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, side in sides.items():
            gc.collect()
            began = time.monotonic()
            side()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.monotonic() - began)
    return seconds
