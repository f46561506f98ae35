"""Teachers: frozen vision encoders behind one call, images in, patch features out.

In: a `TeacherRecipe`: a class of timm, of transformers, π³ or Qwen2.5-VL's own tower, with weights from a local file or
folder, a pinned hub revision or a package, or at scale tiny from a short training on drawn scenes. Out: a `Teacher`;
``teacher(images)`` is ``[N, rows, columns, dim]`` float32 or bfloat16.
Always: one geometry for every teacher (the whole image squashed to a square by PIL's antialiased bicubic filter; no
crop, whatever a model's own evaluation transform does, so that patch (i, j) of all teachers shows the same place), the
model's own mean and standard deviation, no prefix tokens, no gradient. `Teacher.fingerprint` names a feature's origin:
weights, architecture, preprocessing and precision.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image
import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from valr_ops.recipe.recipe import TeacherRecipe
from valr_ops.store.progress import Progress
from valr_ops.teachers.huggingface import read_vision_model
from valr_ops.teachers.pi3 import HEAD_PREFIXES, Pi3
from valr_ops.teachers.qwen import read_tower
from valr_ops.teachers.timm_encoders import build_timm, classifier_prefixes, known_model, unbuildable
from valr_ops.teachers.weights import TeacherError, load_strictly, locate_weights, read_package, read_weights

_COMPILED_REST = 32

Images = Sequence[PIL.Image.Image] | Tensor
"""RGB images of any sizes, or one uint8 tensor ``[N, height, width, 3]``."""


class Encoder(Protocol):
    """What stands between a `Teacher` and a model."""

    autocast: bool
    """In bfloat16: weights stay float32 and operations are cast, instead of a cast of the weights."""

    @property
    def model(self) -> nn.Module:
        """The module whose parameters carry the names of its checkpoint."""

    @property
    def patch_size(self) -> int:
        """Pixels on each side of what one output cell shows."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Of the model's configuration, one a channel, for pixels in [0, 1]."""

    @property
    def std(self) -> tuple[float, ...]:
        """Likewise, the standard deviation."""

    @property
    def settings(self) -> dict[str, Any]:
        """What changes the features beside weights and preprocessing, JSON values."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """Features ``[N, rows, columns, dim]`` of normalised `pixels` ``[N, 3, height, width]``."""


class Teacher:
    """A frozen encoder with its preprocessing.

    Args:
        name: the key in ``recipe.teachers``.
        recipe: what it was built from.
        encoder: its model is on the device where it will stay.

    Raises:
        TeacherError: the size is no multiple of the patch.
    """

    def __init__(self, name: str, recipe: TeacherRecipe, encoder: Encoder) -> None:
        self.name = name
        self.recipe = recipe
        self.encoder = encoder
        self.model = encoder.model.eval().requires_grad_(False)
        self.image_pixels = recipe.image_pixels
        self.license = recipe.license
        self.held_out_accuracy: float | None = None
        """Of a teacher trained on drawn scenes: fraction of held-out patches whose content a linear map names."""
        if recipe.image_pixels % encoder.patch_size:
            nearest = max(1, round(recipe.image_pixels / encoder.patch_size)) * encoder.patch_size
            raise TeacherError(
                f"teachers.{name}.image_pixels={recipe.image_pixels} is no multiple of the patch of {recipe.model}, "
                f"{encoder.patch_size} px; set it to {nearest}"
            )
        side = recipe.image_pixels // encoder.patch_size
        self.grid = (side, side)
        self.dtype = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
        if not encoder.autocast:
            # Rotary angles are these times a patch's place; rounded to bfloat16 they end up to .06 rad elsewhere. Other
            # buffers have to follow the weights: filters and biases meet activations.
            frequencies = [
                (part, name, value)
                for part in self.model.modules()
                for name, value in part.named_buffers(recurse=False)
                if name.endswith("inv_freq")
            ]
            self.model.to(self.dtype)
            for part, name, value in frequencies:
                setattr(part, name, value)
        self.device = next(self.model.parameters()).device
        """Where the weights are."""
        # On a CPU what a batch leaves in the cache decides, on a GPU how much there is to do at once.
        self.batch_images = 256 if self.device.type == "cuda" else min(128, max(8, 2048 // (side * side)))
        """Images that are computed at once; with `compile`, as many or `_COMPILED_REST`, which are padded to that."""
        # One value a pixel, not a channel: next to channels that lie innermost, three values would not be vectorised.
        self._mean, self._std = (
            torch.tensor(values, device=self.device).expand(self._image_shape).contiguous()
            for values in (encoder.mean, encoder.std)
        )
        # The output is measured, not looked up: a wrong shape must show here and not in the loss.
        with torch.no_grad():
            probe = self._encode(torch.zeros(1, *self._image_shape, dtype=torch.uint8, device=self.device))
        if probe.ndim != 4 or probe.shape[:3] != (1, *self.grid):
            raise TeacherError(
                f"teachers.{name}: {recipe.model} gives {list(probe.shape)}, not 1 x {side} x {side} cells"
            )
        self.dim = int(probe.shape[-1])

    @torch.no_grad()
    def __call__(self, images: Images) -> Tensor:
        """Patch features of `images`.

        Returns:
            ``[N, rows, columns, dim]`` in the recipe's precision on the teacher's device, row-major from the top left,
            after the model's final norm (π³ has none: its last two blocks side by side, each image as a scene of one
            view; Qwen2.5-VL's tower hands on what its merger makes of 2 x 2 patches; a ``layer`` is not normalised).

        Raises:
            TeacherError: an image that is not RGB, or a tensor that is not uint8 ``[N, height, width, 3]``.
        """
        return self.features(self.squash(images))

    def squash(self, images: Images) -> Tensor:
        """The images as the model sees them, uint8 ``[N, image_pixels, image_pixels, 3]``. Raises `TeacherError`."""
        if isinstance(images, Tensor):
            if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
                raise TeacherError(
                    f"teacher {self.name} got a {images.dtype} tensor of shape {list(images.shape)}; "
                    "give uint8 [N, height, width, 3], or PIL images"
                )
            images = [PIL.Image.fromarray(image) for image in images.cpu().numpy()]
        return squash(images, self.image_pixels)

    def features(self, squashed: Tensor) -> Tensor:
        """Patch features of images from `squash`, differentiable in the weights, `batch_images` at a time.

        Args:
            squashed: uint8 ``[N, image_pixels, image_pixels, 3]`` on any device; a pinned one is copied in the shadow
                of what the device does.

        Returns:
            ``[N, rows, columns, dim]`` in the recipe's precision, on the teacher's device.

        Raises:
            TeacherError: images of another size or type, or ``compile`` without a compiler.
        """
        self._check(squashed, dimensions=4)
        if not len(squashed):
            return torch.zeros(0, *self.grid, self.dim, dtype=self.dtype, device=self.device)
        encode = self._compiled if self.recipe.compile else self._encode
        whole = len(squashed) // self.batch_images * self.batch_images
        step = self._rest if self.recipe.compile else self.batch_images
        batches = [*squashed[:whole].split(self.batch_images), *squashed[whole:].split(step)]
        parts = [encode(batch.to(self.device, non_blocking=True)) for batch in batches if len(batch)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def joint(self, squashed: Tensor) -> Tensor:
        """Patch features of views of the same scenes, each seen together with the others; never compiled.

        Args:
            squashed: uint8 ``[scenes, views, image_pixels, image_pixels, 3]``.

        Returns:
            ``[scenes, views, rows, columns, dim]`` in the recipe's precision, on the teacher's device.

        Raises:
            TeacherError: the teacher is not π³, or images of another size or type.
        """
        if not isinstance(self.encoder, Pi3):
            raise TeacherError(
                f"teachers.{self.name} ({self.recipe.model}) sees one image at a time; only pi3 sees views"
            )
        self._check(squashed, dimensions=5)
        pixels = self._normalised(squashed.to(self.device, non_blocking=True).flatten(0, 1))
        with self._autocast():
            return self.encoder.joint(pixels.unflatten(0, squashed.shape[:2])).to(self.dtype)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Everything between the decoded image and the model, JSON values."""
        return {
            "geometry": "squash to a square",
            "filter": "PIL bicubic, antialiased",
            "image_pixels": self.image_pixels,
            "mean": list(self.encoder.mean),
            "std": list(self.encoder.std),
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over architecture, preprocessing, precision and a digest of each weight, computed once.

        Equal for teachers that give equal features.
        """
        settings = {
            "architecture": self.recipe.architecture,
            "model": self.recipe.model,
            "precision": self.recipe.precision,
            "preprocessing": self.preprocessing,
            "encoder": self.encoder.settings,
        }
        digests = {key: _digest(tensor) for key, tensor in self.model.state_dict().items()}
        return hashlib.sha256(json.dumps([settings, digests], sort_keys=True).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write ``teacher.safetensors`` and ``teacher.json``, from which `read_teacher` makes the same teacher.

        Raises:
            TeacherError: it came with weights, beside which lies what describes it.
        """
        origins = (self.recipe.weights, self.recipe.hub_id, self.recipe.package)
        if self.recipe.architecture == "qwen2_5_vl" or any(origins):
            raise TeacherError(f"teachers.{self.name} came with its weights; keep these instead of saving it")
        weights = {key: tensor.contiguous().cpu() for key, tensor in sorted(self.model.state_dict().items())}
        save_file(weights, folder / "teacher.safetensors")
        recipe = self.recipe.model_copy(update={"weights": "teacher.safetensors", "pretraining_steps": 0})
        description = {"name": self.name, "recipe": recipe.model_dump(mode="json"), "fingerprint": self.fingerprint}
        (folder / "teacher.json").write_text(json.dumps(description, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        return self.image_pixels, self.image_pixels, 3

    def _check(self, squashed: Tensor, dimensions: int) -> None:
        if squashed.dtype != torch.uint8 or squashed.ndim != dimensions or squashed.shape[-3:] != self._image_shape:
            views = "views, " if dimensions == 5 else ""
            raise TeacherError(
                f"teacher {self.name} got a {squashed.dtype} tensor of shape {list(squashed.shape)}; give uint8 "
                f"[N, {views}{self.image_pixels}, {self.image_pixels}, 3], which squash makes"
            )

    def _normalised(self, squashed: Tensor) -> Tensor:
        """Float pixels ``[N, 3, height, width]``, in the type of the first layer's weights."""
        pixels = squashed.float().div_(255).sub_(self._mean).div_(self._std).permute(0, 3, 1, 2)
        return pixels if self.encoder.autocast else pixels.to(self.dtype)

    def _autocast(self) -> torch.autocast:
        wanted = self.encoder.autocast and self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted)

    def _encode(self, squashed: Tensor) -> Tensor:
        """`features` of uint8 images on the device, all at once."""
        pixels = self._normalised(squashed)
        with self._autocast():
            return self.encoder(pixels).to(self.dtype)

    def _compiled(self, squashed: Tensor) -> Tensor:
        """`_encode`, compiled at first use for `batch_images` and for `_COMPILED_REST`; fewer are padded with black.

        Two shapes, because each is compiled for itself, and a window of training has far fewer images than a batch.
        """
        count = len(squashed)
        try:
            features = self._compiled_encode(F.pad(squashed, (0, 0, 0, 0, 0, 0, 0, -count % self._rest)))
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = str(error).splitlines()[0]
            # On a GPU it is Triton that compiles, its launchers in C.
            needed = "a C compiler and Python.h (e.g. apt-get install gcc libc6-dev python3-dev, or set CC)"
            if self.device.type == "cpu":
                needed = "a C++ compiler (e.g. apt-get install g++, or set CXX)"
            raise TeacherError(
                f"teachers.{self.name}.compile=true, but torch.compile failed: {reason}; it needs {needed}, or set "
                "compile to false"
            ) from error
        return features[:count]

    @property
    def _rest(self) -> int:
        return min(_COMPILED_REST, self.batch_images)

    @functools.cached_property
    def _compiled_encode(self) -> Any:
        return torch.compile(self._encode, dynamic=False)


def squash(images: Sequence[PIL.Image.Image], side: int) -> Tensor:
    """Images as every teacher of that size sees them: the whole of each, resized to a square. Safe in threads.

    Returns:
        uint8 ``[N, side, side, 3]``.

    Raises:
        TeacherError: an image that is not RGB.
    """
    squashed = np.empty((len(images), side, side, 3), np.uint8)
    for position, image in enumerate(images):
        if image.mode != "RGB":
            raise TeacherError(
                f"image {position} in mode {image.mode} can't be shown to a teacher; convert it to RGB first "
                "(ImageStore.load does)"
            )
        squashed[position] = np.asarray(image.resize((side, side), PIL.Image.Resampling.BICUBIC))
    return torch.from_numpy(squashed)


def load_teacher(
    name: str,
    recipe: TeacherRecipe,
    seed: int,
    *,
    device: str = "cpu",
    base_model: Path | None = None,
    progress: Progress | None = None,
) -> Teacher:
    """Build the teacher `name` and give it its weights.

    Args:
        name: the key in ``recipe.teachers``, for messages and for the seed.
        recipe: architecture, and exactly one origin of weights. ``hub_id`` downloads the pinned revision, here and now.
        seed: for a teacher trained on drawn scenes; the same seed gives the same bytes.
        device: ``cpu`` or ``cuda``.
        base_model: the artifact of that name, whose tower a teacher of architecture qwen2_5_vl without weights is.
        progress: shows the training on drawn scenes.

    Raises:
        TeacherError: an unknown model or argument, no or several origins, weights that don't fit, or a size that is no
            multiple of the patch.
    """
    if recipe.architecture == "qwen2_5_vl":
        encoder: Encoder = _tower(name, recipe, base_model)
        encoder.model.to(device)
        return Teacher(name, recipe, encoder)
    origins = [field for field in ("weights", "hub_id", "package") if getattr(recipe, field) is not None]
    origins += ["pretraining_steps"] if recipe.pretraining_steps else []
    if len(origins) != 1:
        raise TeacherError(
            f"teachers.{name} has {' and '.join(origins) if origins else 'no weights'}; set exactly one of weights (a "
            "local .safetensors file or folder), hub_id (with revision), package and, at scale tiny, pretraining_steps"
        )
    own_seed = int.from_bytes(hashlib.sha256(f"{name} {seed}".encode()).digest()[:4], "big")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(own_seed)
        if recipe.pretraining_steps:
            # Imported here because a teacher with weights draws no scenes.
            from valr_ops.teachers.pretraining import pretrain

            encoder = _build(name, recipe, folder=None)
            encoder.model.to(device)
            # Rounded weights can't be trained by small steps.
            exact = recipe.model_copy(update={"precision": "float32", "compile": False})
            trained = Teacher(name, exact, encoder)
            accuracy = pretrain(trained, recipe.pretraining_steps, own_seed, progress or Progress())
            teacher = Teacher(name, recipe, trained.encoder)
            teacher.held_out_accuracy = accuracy
            return teacher
        encoder = _with_weights(name, recipe)
    encoder.model.to(device)
    return Teacher(name, recipe, encoder)


def read_teacher(folder: Path, *, device: str = "cpu", recipe: TeacherRecipe | None = None) -> Teacher:
    """The teacher that `Teacher.save` wrote into `folder`.

    Args:
        device: ``cpu`` or ``cuda``.
        recipe: what a caller expects it to be; it may differ in what does not change features, such as ``compile``.

    Raises:
        TeacherError: there is none, its weights are not those that were saved, or it is not what `recipe` says.
    """
    path = folder / "teacher.json"
    if not path.is_file():
        raise TeacherError(f"{path} does not exist; only teachers trained on drawn scenes are kept with their features")
    description = json.loads(path.read_text(encoding="utf-8"))
    kept = {"weights": str(folder / "teacher.safetensors"), "pretraining_steps": 0}
    wanted = (recipe or TeacherRecipe.model_validate(description["recipe"])).model_copy(update=kept)
    teacher = load_teacher(description["name"], wanted, seed=0, device=device)
    if teacher.fingerprint != description["fingerprint"]:
        raise TeacherError(
            f"{folder / 'teacher.safetensors'} was changed after it was saved, or teachers.{teacher.name} is another "
            "one now; make the artifact again"
        )
    return teacher


def _with_weights(name: str, recipe: TeacherRecipe) -> Encoder:
    path, where = locate_weights(name, recipe)
    if recipe.architecture == "transformers":
        return read_vision_model(name, recipe, path, where)
    encoder = _build(name, recipe, folder=path if path.is_dir() else None)
    model = encoder.model
    ignored = HEAD_PREFIXES if isinstance(model, Pi3) else classifier_prefixes(model)
    if recipe.package is None:
        tensors = read_weights(path, where)
    else:
        tensors = read_package(
            path, where, [*model.state_dict(), *(f"{ignored[0]}{end}" for end in ("weight", "bias"))]
        )
    load_strictly(model, tensors, ignored_prefixes=ignored, where=where)
    return encoder


def _build(name: str, recipe: TeacherRecipe, folder: Path | None) -> Encoder:
    """The encoder with random weights. Raises `TeacherError`."""
    if recipe.architecture == "timm":
        return build_timm(name, recipe, folder)
    known_model(name, recipe)
    try:
        return Pi3(recipe.model, **recipe.arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise unbuildable(name, recipe, error) from error


def _tower(name: str, recipe: TeacherRecipe, base_model: Path | None) -> Encoder:
    """The tower of the checkpoint that the recipe or the stage's input names. Raises `TeacherError`."""
    folder = Path(recipe.weights).expanduser() if recipe.weights else base_model
    if folder is None:
        raise TeacherError(
            f"teachers.{name} has no weights; set weights to the folder of a Qwen2.5-VL checkpoint, or give the stage "
            f"teacher_features_{name} the input base_model"
        )
    return read_tower(folder, f"teachers.{name}.weights={folder}" if recipe.weights else f"the base model in {folder}")


def _digest(tensor: Tensor) -> str:
    """Of type, shape and bytes."""
    content = xxhash.xxh3_128_hexdigest(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return f"{tensor.dtype} {list(tensor.shape)} {content}"
