"""Teachers: frozen vision encoders behind one call, images in, patch features out.

In: a `TeacherRecipe`: a timm class or π³ with a local safetensors file, a pinned hub revision, or at scale tiny a short
training on drawn scenes; or the vision tower inside a Qwen2.5-VL checkpoint. Out: a `Teacher`; ``teacher(images)`` is
``[N, rows, columns, dim]`` float32.
Always: one geometry for every teacher (the whole image squashed to a square by PIL's antialiased bicubic filter; no
crop, whatever a model's own evaluation transform does, so that patch (i, j) of all teachers shows the same place), the
model's own mean and standard deviation, no prefix tokens, no gradient. `Teacher.fingerprint` names a feature's origin:
weights, architecture and preprocessing.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from valr_ops.recipe.recipe import TeacherRecipe
from valr_ops.store.progress import Progress
from valr_ops.teachers.pi3 import HEAD_PREFIXES, Pi3
from valr_ops.teachers.qwen import QwenTower
from valr_ops.torchvision_guard import ensure_torchvision

ensure_torchvision()

import timm  # noqa: E402

Images = Sequence[PIL.Image.Image] | Tensor
"""RGB images of any sizes, or one uint8 tensor ``[N, height, width, 3]``."""


class TeacherError(ValueError):
    """A teacher that can't be built or used: the message names the recipe field, the value and the fix."""


class Teacher:
    """A frozen encoder with its preprocessing.

    Args:
        name: the key in ``recipe.teachers``.
        recipe: what it was built from.
        model: a timm vision transformer, `Pi3` or `QwenTower`, on its device.
    """

    def __init__(self, name: str, recipe: TeacherRecipe, model: nn.Module) -> None:
        self.name = name
        self.recipe = recipe
        self.model = model.eval().requires_grad_(False)
        self.image_pixels = recipe.image_pixels
        self.license = recipe.license
        self.held_out_accuracy: float | None = None
        """Of a teacher trained on drawn scenes: fraction of held-out patches whose content a linear map names."""
        self._patch_size = _patch_size(model)
        if recipe.image_pixels % self._patch_size:
            nearest = max(1, round(recipe.image_pixels / self._patch_size)) * self._patch_size
            raise TeacherError(
                f"teachers.{name}.image_pixels={recipe.image_pixels} is no multiple of the patch of {recipe.model}, "
                f"{self._patch_size} px; set it to {nearest}"
            )
        side = recipe.image_pixels // self._patch_size
        self.grid = (side, side)
        self._mean, self._std = _normalisation(model)
        # The output is measured, not looked up: a wrong shape must show here and not in the loss.
        probe = self.features(torch.zeros(1, self.image_pixels, self.image_pixels, 3, dtype=torch.uint8))
        self.dim = int(probe.shape[-1])

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def __call__(self, images: Images) -> Tensor:
        """Patch features of `images`.

        Returns:
            ``[N, rows, columns, dim]`` float32 on the teacher's device, row-major from the top left, after the model's
            final norm (π³ has none: its last two blocks side by side, each image as a scene of one view; Qwen2.5-VL's
            tower hands on what its merger makes of 2 x 2 patches).

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
        for position, image in enumerate(images):
            if image.mode != "RGB":
                raise TeacherError(
                    f"teacher {self.name} got image {position} in mode {image.mode}; "
                    "convert it to RGB first (ImageStore.load does)"
                )
        size = (self.image_pixels, self.image_pixels)
        squashed = [np.asarray(image.resize(size, PIL.Image.Resampling.BICUBIC)) for image in images]
        return torch.from_numpy(np.stack(squashed)) if squashed else torch.zeros(0, *size, 3, dtype=torch.uint8)

    def features(self, squashed: Tensor) -> Tensor:
        """Patch features ``[N, rows, columns, dim]`` of uint8 images from `squash`; differentiable in the weights."""
        pixels = squashed.to(self.device).permute(0, 3, 1, 2).float() / 255
        if isinstance(self.model, Pi3):
            return self.model(pixels[:, None])[:, 0].float()
        mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in (self._mean, self._std))
        normalised = (pixels - mean) / std
        if isinstance(self.model, QwenTower):
            return self.model(normalised).float()
        tokens = self.model.forward_features(normalised)  # type: ignore[operator]
        return tokens[:, self.model.num_prefix_tokens :].float().unflatten(1, self.grid)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Everything between the decoded image and the model, JSON values."""
        return {
            "geometry": "squash to a square",
            "filter": "PIL bicubic, antialiased",
            "image_pixels": self.image_pixels,
            "mean": list(self._mean),
            "std": list(self._std),
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 over architecture, preprocessing and weights: equal for teachers that give equal features."""
        settings = {
            "architecture": self.recipe.architecture,
            "model": self.recipe.model,
            "arguments": self.recipe.arguments,
            "preprocessing": self.preprocessing,
        }
        if isinstance(self.model, QwenTower):
            settings["tower"] = self.model.settings
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write ``teacher.safetensors`` and ``teacher.json``, from which `read_teacher` makes the same teacher."""
        weights = {key: tensor.contiguous().cpu() for key, tensor in sorted(self.model.state_dict().items())}
        save_file(weights, folder / "teacher.safetensors")
        recipe = self.recipe.model_copy(update={"weights": "teacher.safetensors", "pretraining_steps": 0})
        description = {"name": self.name, "recipe": recipe.model_dump(mode="json"), "fingerprint": self.fingerprint}
        (folder / "teacher.json").write_text(json.dumps(description, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
        return Teacher(name, recipe, _read_tower(name, recipe, base_model).to(device))
    origins = [field for field in ("weights", "hub_id") if getattr(recipe, field) is not None]
    origins += ["pretraining_steps"] if recipe.pretraining_steps else []
    if len(origins) != 1:
        raise TeacherError(
            f"teachers.{name} has {' and '.join(origins) if origins else 'no weights'}; set exactly one of weights "
            "(a local .safetensors file), hub_id (with revision) and, at scale tiny, pretraining_steps"
        )
    own_seed = int.from_bytes(hashlib.sha256(f"{name} {seed}".encode()).digest()[:4], "big")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(own_seed)
        model = _build(name, recipe)
        if recipe.pretraining_steps:
            # Imported here because a teacher with weights draws no scenes.
            from valr_ops.teachers.pretraining import pretrain

            teacher = Teacher(name, recipe, model.to(device))
            teacher.held_out_accuracy = pretrain(teacher, recipe.pretraining_steps, own_seed, progress or Progress())
            return teacher
    where = f"teachers.{name}.weights" if recipe.weights else f"teachers.{name}.hub_id"
    path = Path(recipe.weights).expanduser() if recipe.weights else _download(name, recipe)
    ignored = HEAD_PREFIXES if isinstance(model, Pi3) else (f"{model.pretrained_cfg['classifier']}.",)  # type: ignore[index]
    load_strictly(model, _read_safetensors(path, where), ignored_prefixes=ignored, where=f"{where}={path}")
    return Teacher(name, recipe, model.to(device))


def read_teacher(folder: Path, *, device: str = "cpu") -> Teacher:
    """The teacher that `Teacher.save` wrote into `folder`.

    Raises:
        TeacherError: there is none, or its weights are not those that were saved.
    """
    path = folder / "teacher.json"
    if not path.is_file():
        raise TeacherError(f"{path} does not exist; only teachers trained on drawn scenes are kept with their features")
    description = json.loads(path.read_text(encoding="utf-8"))
    recipe = TeacherRecipe.model_validate(description["recipe"] | {"weights": str(folder / "teacher.safetensors")})
    teacher = load_teacher(description["name"], recipe, seed=0, device=device)
    if teacher.fingerprint != description["fingerprint"]:
        raise TeacherError(f"{folder / 'teacher.safetensors'} was changed after it was saved; make the artifact again")
    return teacher


def load_strictly(
    model: nn.Module, tensors: Mapping[str, Tensor], *, ignored_prefixes: tuple[str, ...] = (), where: str
) -> None:
    """Copy `tensors` into `model`: every parameter must be there, in its shape, and nothing else beside it.

    Args:
        ignored_prefixes: names that may be there and are not used.
        where: the field and the file, for messages.

    Raises:
        TeacherError: missing or unexpected names, or wrong shapes; all of them are counted, the first are named.
    """
    wanted = model.state_dict()
    given = {key: tensor for key, tensor in tensors.items() if not key.startswith(ignored_prefixes or ("\0",))}
    missing, unexpected = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    misshapen = [
        f"{key} {list(given[key].shape)} instead of {list(wanted[key].shape)}"
        for key in sorted(wanted.keys() & given.keys())
        if given[key].shape != wanted[key].shape
    ]
    problems = [
        f"{len(found)} {kind} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
        for kind, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if found
    ]
    if problems:
        raise TeacherError(
            f"{where} does not fit the model: {'; '.join(problems)}. "
            "Check that model, arguments and image size are those of this checkpoint"
        )
    model.load_state_dict(given)


def _build(name: str, recipe: TeacherRecipe) -> nn.Module:
    """The model with random weights. Raises `TeacherError`."""
    if not timm.is_model(recipe.model):
        close = difflib.get_close_matches(recipe.model.split(".")[0], timm.list_models(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "; timm.list_models() shows the names"
        raise TeacherError(f"teachers.{name}.model={recipe.model!r} is no model of timm{hint}")
    try:
        if recipe.architecture == "pi3":
            return Pi3(recipe.model, **recipe.arguments)
        model: Any = timm.create_model(recipe.model, pretrained=False, num_classes=0, **recipe.arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise TeacherError(
            f"teachers.{name}.arguments={recipe.arguments} can't build {recipe.model}: {error}; "
            f"{_known_arguments(recipe)}"
        ) from error
    if not hasattr(model, "num_prefix_tokens") or not hasattr(model, "patch_embed"):
        raise TeacherError(
            f"teachers.{name}.model={recipe.model!r} has no patch tokens; choose a vision transformer such as "
            "vit_large_patch16_dinov3"
        )
    native = model.patch_embed.img_size
    if not getattr(model, "dynamic_img_size", False) and native != (recipe.image_pixels, recipe.image_pixels):
        raise TeacherError(
            f"teachers.{name}.image_pixels={recipe.image_pixels}, but {recipe.model} takes {native[0]} px only; "
            f"set it to {native[0]}, or set arguments.img_size for weights of that size"
        )
    return model


def _read_tower(name: str, recipe: TeacherRecipe, base_model: Path | None) -> QwenTower:
    """The vision tower of a Qwen2.5-VL checkpoint; of its weights, nothing else is read. Raises `TeacherError`."""
    folder = Path(recipe.weights).expanduser() if recipe.weights else base_model
    if folder is None:
        raise TeacherError(
            f"teachers.{name} has no weights; set weights to the folder of a Qwen2.5-VL checkpoint, or give the stage "
            f"teacher_features_{name} the input base_model"
        )
    where = f"teachers.{name}.weights={folder}" if recipe.weights else f"the base model in {folder}"
    if not (folder / "config.json").is_file():
        raise TeacherError(f"{where} has no config.json; give the folder of a Qwen2.5-VL checkpoint")
    # Imported here because the other teachers need nothing of transformers, and it takes seconds.
    from transformers import AutoConfig, AutoImageProcessor, Qwen2_5_VLConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise TeacherError(f"{where} is no whole checkpoint: {error}; copy it again") from error
    if not isinstance(config, Qwen2_5_VLConfig):
        raise TeacherError(
            f"{where} holds a model of type {config.model_type!r}; architecture qwen2_5_vl takes the tower of a "
            "Qwen2.5-VL checkpoint"
        )
    model = QwenTower(config.vision_config, tuple(processor.image_mean), tuple(processor.image_std))
    load_strictly(model.tower, _read_below("visual", folder, where), where=where)
    return model


def _read_below(prefix: str, folder: Path, where: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint folder whose names begin with `prefix`, without it, and none of the others."""
    # Checkpoints call the tower visual., transformers since 4.52 in memory model.visual.
    belongs = re.compile(rf"(?:model\.)?{prefix}\.(.+)")
    index = folder / "model.safetensors.index.json"
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
    except (ValueError, KeyError) as error:
        raise TeacherError(f"{where}: {index.name} can't be read: {error!r}; copy it again") from error
    files = sorted({file for key, file in weight_map.items() if belongs.match(key)}) or ["model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not (folder / file).is_file():
            raise TeacherError(f"{where} lacks {file}; copy the checkpoint again, as safetensors")
        try:
            with safe_open(folder / file, framework="pt") as opened:
                wanted = {found[1]: found[0] for found in map(belongs.fullmatch, opened.keys()) if found}
                tensors |= {name: opened.get_tensor(key) for name, key in wanted.items()}
        except (SafetensorError, OSError) as error:
            raise TeacherError(f"{where}: {file} can't be read as safetensors: {error}; copy it again") from error
    return tensors


def _known_arguments(recipe: TeacherRecipe) -> str:
    from timm.models import vision_transformer

    accepted = inspect.signature(vision_transformer.VisionTransformer.__init__).parameters
    known = [*(["decoder_depth"] if recipe.architecture == "pi3" else []), *accepted]
    wrong = [argument for argument in recipe.arguments if argument not in known]
    close = [match for argument in wrong for match in difflib.get_close_matches(argument, known, n=1)]
    return f"did you mean {', '.join(close)}?" if close else "such as embed_dim, depth, num_heads, img_size, patch_size"


def _patch_size(model: nn.Module) -> int:
    return model.patch_size if isinstance(model, Pi3 | QwenTower) else int(model.patch_embed.patch_size[0])  # type: ignore[union-attr,index]


def _normalisation(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the model's own configuration, for pixels in [0, 1]."""
    if isinstance(model, Pi3):
        return tuple(model.image_mean.flatten().tolist()), tuple(model.image_std.flatten().tolist())
    if isinstance(model, QwenTower):
        return model.mean, model.std
    return tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"])  # type: ignore[index]


def _read_safetensors(path: Path, where: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise TeacherError(
            f"{where}={path} is no file; give the path of a .safetensors file, or set hub_id and revision"
        )
    if path.suffix != ".safetensors":
        raise TeacherError(
            f"{where}={path} is not a safetensors file, and pickles are not read because they can run code; convert it "
            "where you trust it: safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise TeacherError(
            f"{where}={path} can't be read as safetensors: {error}; fetch or convert it again"
        ) from error


def _download(name: str, recipe: TeacherRecipe) -> Path:
    """The safetensors file of the pinned hub revision, from the local cache or the hub. Raises `TeacherError`."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    assert recipe.hub_id is not None and recipe.revision is not None  # the recipe requires both
    try:
        folder = huggingface_hub.snapshot_download(
            recipe.hub_id, revision=recipe.revision, allow_patterns=["model.safetensors"]
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise TeacherError(
            f"teachers.{name}.hub_id={recipe.hub_id} at {recipe.revision[:12]} can't be fetched: {error}; for a gated "
            f"repository accept its terms and set HF_TOKEN, or download it elsewhere and set teachers.{name}.weights"
        ) from error
    return Path(folder) / "model.safetensors"
