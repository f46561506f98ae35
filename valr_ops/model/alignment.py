"""The alignment loss: block states at the slots in, minus their cosine to a frozen teacher's patch features out.

    F = [K, hidden] on the sqrt(K) x sqrt(K) grid -> resize to the teacher's [h, w] -> psi -> [h * w, D]
    loss of a segment = - mean over patches of cos(F[p], teacher[p])          (paper, section 3.3, as in REPA)

The cosine runs over the feature axis, in float32 or wider. Sums and counts are returned, not means, because the caller
knows the number of segments of the whole accumulation window and of all ranks. The same cosine against *another*
image's features is the control: without it, a good value may only mean that the teacher's mean was learned.

Always: a segment without a target contributes nothing, every projector gets a gradient, if only zero, and grids may
differ between the targets of a batch and between teachers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from valr_ops.data.sequences import Region
from valr_ops.recipe.recipe import AlignmentRecipe


class AlignmentError(ValueError):
    """Slots, targets and projectors don't fit together: the message names the teacher and both shapes."""


class Projector(nn.Module):
    """psi of one teacher: Linear, SiLU, Linear, SiLU, Linear (paper: "learnable MLP"; depth and width follow REPA)."""

    def __init__(self, hidden_size: int, width: int, dimension: int):
        super().__init__()
        self.first = nn.Linear(hidden_size, width)
        self.rest = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, dimension))

    def forward(self, slots: Tensor, upsample: Tensor) -> Tensor:
        """Predicted patch features, [segments, patches, D], of `slots` [segments, K, hidden].

        Args:
            upsample: [patches, K], rows summing to one. Such a resize commutes with an affine map, so the first Linear
                runs on K slots instead of all patches: 16 times fewer products at K = 16 and 256 patches.
        """
        return self.rest(upsample @ self.first(slots))


class Projectors(nn.ModuleDict):
    """One projector a teacher, by the teacher's name. Used in training only."""

    def __init__(self, dimensions: Mapping[str, int], hidden_size: int, recipe: AlignmentRecipe):
        """Make psi for every teacher of `dimensions` (its feature dimension D), in that order."""
        width = recipe.projector_width
        super().__init__({name: Projector(hidden_size, width, dimension) for name, dimension in dimensions.items()})


@dataclass(frozen=True)
class TeacherAlignment:
    """One teacher's part of the loss."""

    loss_sum: Tensor
    """Sum over its aligned segments of the segment's loss, a scalar with graph; 0 with graph where there are none."""
    segments: int
    """Number of segments that had a target."""
    control_sum: float
    """Sum over segments of what their mean cosine is if another image's features, on its own grid, are the target; over
    the segments that had another image in the batch."""
    control_segments: int
    """Number of those segments."""


@dataclass(frozen=True)
class AlignmentOutput:
    """The alignment of a batch, by teacher."""

    teachers: dict[str, TeacherAlignment]

    def loss(self, segments: Mapping[str, int]) -> Tensor:
        """This batch's share of L_REPA (one teacher) or L_multi (several), a scalar.

        Args:
            segments: by teacher, the number of aligned segments in the whole window and on all ranks. The shares of
                all batches add up to a value in [-1, 1].
        """
        shares = [part.loss_sum / max(segments[name], 1) for name, part in self.teachers.items()]
        return torch.stack(shares).mean()


def alignment_loss(
    projectors: Projectors,
    states: Tensor | None,
    targets: Mapping[str, Sequence[Tensor | None]],
    keys: Sequence[Region | None],
    *,
    upsample: str,
) -> AlignmentOutput:
    """Compare the slots of S segments with each teacher's patch features.

    Args:
        states: [S, K, hidden], the block states; None is the same as no segments.
        targets: by teacher, S features [h, w, D] each, or None for a segment without target; grids may differ.
        keys: S targets, `batch.targets`; they say which features belong to another image.
        upsample: "bilinear", "bicubic", "nearest" or "linear_1d" (`AlignmentRecipe.upsample`).

    Raises:
        AlignmentError: teachers, numbers of segments or feature dimensions that don't fit, or K that makes no grid.
    """
    if set(targets) != set(projectors):
        raise AlignmentError(
            f"targets for {sorted(targets)} but projectors for {sorted(projectors)}; give both the same"
        )
    segments = 0 if states is None else len(states)
    for name, features in targets.items():
        if not len(features) == len(keys) == segments:
            raise AlignmentError(
                f"{name}: {len(features)} targets and {len(keys)} keys for {segments} segments; each needs one of both"
            )
    return AlignmentOutput(
        {
            name: _one_teacher(name, projector, states, targets[name], keys, upsample)
            for name, projector in projectors.items()
        }
    )


def _one_teacher(
    name: str,
    projector: nn.Module,
    states: Tensor | None,
    targets: Sequence[Tensor | None],
    keys: Sequence[Region | None],
    upsample: str,
) -> TeacherAlignment:
    groups = _by_grid(targets)
    if states is None or not groups:
        # A rank whose batch uses no projector must still reduce its gradients, or the collective never completes.
        nothing = torch.stack([parameter.sum() for parameter in projector.parameters()]).sum() * 0.0
        return TeacherAlignment(nothing, segments=0, control_sum=0.0, control_segments=0)
    others = _another_image([key if target is not None else None for key, target in zip(keys, targets, strict=True)])
    losses: list[Tensor] = []
    controls: list[Tensor] = []
    for (height, width, dimension), members in groups.items():
        here = set(members)
        asked = [segment for segment, other in others.items() if other in here]
        # A segment of another grid is resized to this one as well if its control is here.
        rows = [*members, *(segment for segment in asked if segment not in here)]
        matrix = _upsampling_matrix_on(states.device, states.dtype, states.shape[1], height, width, upsample)
        predicted = projector(states[rows], matrix)
        if predicted.shape[2] != dimension:
            raise AlignmentError(
                f"{name}: the projector makes {predicted.shape[2]} features a patch but the target has {dimension} "
                f"(shape {[height, width, dimension]}); build Projectors with the teacher's own dimension"
            )
        target = torch.stack([features for i in members if (features := targets[i]) is not None]).to(states.device)
        target = target.flatten(1, 2)
        losses.append(-_cosine(predicted[: len(members)], target).mean(dim=1).sum())
        if asked:
            row = {segment: row for row, segment in enumerate(rows)}
            own, foreign = [row[segment] for segment in asked], [row[others[segment]] for segment in asked]
            controls.append(_cosine(predicted.detach()[own], target[foreign]).mean(dim=1).sum())
    return TeacherAlignment(
        loss_sum=torch.stack(losses).sum(),
        segments=sum(map(len, groups.values())),
        control_sum=float(sum(controls)),
        control_segments=len(others),
    )


def _by_grid(targets: Sequence[Tensor | None]) -> dict[tuple[int, int, int], list[int]]:
    """Indices of the segments with a target, by the target's shape [h, w, D]."""
    groups: dict[tuple[int, int, int], list[int]] = {}
    for index, features in enumerate(targets):
        if features is not None:
            height, width, dimension = features.shape
            groups.setdefault((height, width, dimension), []).append(index)
    return groups


def _another_image(keys: Sequence[Region | None]) -> dict[int, int]:
    """For every segment with a key the first segment of the next image; empty where there is only one image."""
    first: dict[str, int] = {}
    for index, key in enumerate(keys):
        if key is not None:
            first.setdefault(key.digest, index)
    images = list(first)
    if len(images) < 2:
        return {}
    following = {image: first[images[(at + 1) % len(images)]] for at, image in enumerate(images)}
    return {index: following[key.digest] for index, key in enumerate(keys) if key is not None}


def _cosine(predicted: Tensor, target: Tensor) -> Tensor:
    """Cosine over the feature axis, [segments, patches]; 0 for a zero vector."""
    wide = torch.promote_types(predicted.dtype, torch.float32)
    return F.cosine_similarity(predicted.to(wide), target.to(wide), dim=-1)


@functools.lru_cache(maxsize=64)
def _upsampling_matrix_on(
    device: torch.device, dtype: torch.dtype, slots: int, height: int, width: int, mode: str
) -> Tensor:
    """`upsampling_matrix` where the states are: made once for each of the few grids of a run."""
    return upsampling_matrix(slots, height, width, mode).to(device, dtype)


def upsampling_matrix(slots: int, height: int, width: int, mode: str) -> Tensor:
    """The resize from K slots to a patch grid as a matrix, [height * width, K], rows summing to one, both row-major.

    float64 on the CPU. A matrix product needs no transposition of the features, and unlike `F.interpolate` it has a
    deterministic gradient on GPUs. Corners are not aligned: slots and patches are areas, not points.

    Raises:
        AlignmentError: an unknown mode, or K is no square and the mode needs a grid.
    """
    one_hot = torch.eye(slots, dtype=torch.float64)[:, None]
    if mode == "linear_1d":
        return F.interpolate(one_hot, size=height * width, mode="linear", align_corners=False).flatten(1).T
    if mode not in ("bilinear", "bicubic", "nearest"):
        raise AlignmentError(
            f"alignment.upsample={mode!r} is unknown; set it to bilinear, bicubic, nearest or linear_1d"
        )
    side = math.isqrt(slots)
    if side * side != slots:
        raise AlignmentError(
            f"{slots} slots make no square grid; set latents.slots to 1, 4, 9, 16, 25 ... "
            "or alignment.upsample to linear_1d"
        )
    align_corners = None if mode == "nearest" else False
    grid = F.interpolate(
        one_hot.view(slots, 1, side, side), size=(height, width), mode=mode, align_corners=align_corners
    )
    return grid.flatten(1).T
