"""Backward, clipping and the update behind one set of methods: plain torch in one process, DeepSpeed ZeRO-2 in many.

In: a module that returns ``(loss, figures)``, AdamW's parameter groups, and losses already divided by the counts of the
whole window. Out: updated parameters, and the whole training state as named full tensors, the same for both engines and
for any number of ranks, so that either resumes from the other's checkpoint.
Always: gradients of the window's micro-batches and of all ranks are summed, never averaged; a parameter without a
gradient counts as one with gradient zero.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from valr_ops.recipe.recipe import RecipeError, RuntimeRecipe, TrainingRecipe

_MOMENTS = ("exp_avg", "exp_avg_sq")
_COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def sum(self, values: Iterable[float]) -> list[float]:
        """The elementwise sum over all ranks, in float64; every rank gets the same."""
        total = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def largest(self, value: float) -> float:
        """The largest of all ranks' values; every rank gets the same."""
        found = torch.tensor(value, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return float(found)

    def wait(self) -> None:
        """Return when all ranks are here."""
        if self.size > 1:
            dist.barrier()


def join_ranks(runtime: RuntimeRecipe) -> Ranks:
    """Join the process group that torchrun's RANK, WORLD_SIZE and LOCAL_RANK describe; alone where they are not set.

    Raises:
        RecipeError: torchrun started another number of processes than the recipe says, or there is no such GPU.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size != runtime.processes:
        raise RecipeError(
            f"runtime.processes={runtime.processes} but {size} are running; set it to {size}, or start "
            f"{runtime.processes} (valr run starts them itself where torchrun did not)"
        )
    device = torch.device("cpu")
    if runtime.device == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0))
        if index >= torch.cuda.device_count():
            raise RecipeError(
                f"runtime.device=cuda and {index + 1} processes on this node, but {torch.cuda.device_count()} GPUs; "
                "set runtime.processes to their number, or runtime.device to cpu"
            )
        torch.cuda.set_device(index)
        device = torch.device("cuda", index)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if runtime.device == "cuda" else "gloo", timeout=_COLLECTIVE_TIMEOUT)
    return Ranks(rank, size, device)


def make_engine(
    module: nn.Module, groups: list[dict[str, Any]], recipe: TrainingRecipe, ranks: Ranks
) -> TorchEngine | DeepSpeedEngine:
    """The recipe's engine; several processes always use DeepSpeed, which shards the optimizer (paper: ZeRO-2)."""
    bfloat16 = recipe.precision == "bfloat16"
    if bfloat16 and ranks.device.type != "cuda":
        raise RecipeError("precision=bfloat16 needs runtime.device=cuda; on the CPU set precision to float32")
    optimizer = torch.optim.AdamW(groups, betas=recipe.betas)
    if recipe.engine == "deepspeed" or ranks.size > 1:
        return DeepSpeedEngine(module, optimizer, recipe.max_gradient_norm, bfloat16, ranks)
    return TorchEngine(module, optimizer, recipe.max_gradient_norm, bfloat16, ranks)


class TorchEngine:
    """One process; float32 weights, on CUDA with bfloat16 products where the recipe says so."""

    name = "torch"

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.AdamW, max_norm: float, bfloat16: bool, ranks: Ranks
    ) -> None:
        self.module, self.optimizer, self.max_norm, self.ranks = module, optimizer, max_norm, ranks
        self._bfloat16 = bfloat16
        self._trained = _trained(module)
        # AdamW makes its moments at the first step: too late to find out that there is no memory for them.
        for parameter in self._trained.values():
            self.optimizer.state[parameter] = _fresh_state(parameter, updates=0)

    def __call__(self, *arguments: Any) -> tuple[Tensor, Any]:
        """The module's ``(loss, figures)``."""
        with self.precision():
            loss, figures = self.module(*arguments)
        return loss, figures

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Where parts of the module may be called by themselves, in the precision of `__call__`."""
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self._bfloat16)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of a share of the window's loss; `last` says that the window is complete."""
        loss.backward()

    def forget(self) -> None:
        """Discard the gradients so far, as if there had been no backward."""
        self.optimizer.zero_grad(set_to_none=True)

    def gradient_norms(self) -> dict[str, float]:
        """Norm of the window's gradient before clipping, by `part` of the parameter groups; it may be not finite."""
        for parameter in self._trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        groups = self.optimizer.param_groups
        return _by_part(groups, [float(nn.utils.get_total_norm([p.grad for p in group["params"]])) for group in groups])

    def step(self, factor: float) -> None:
        """Clip, update with `factor` times the peak learning rates, forget the gradient."""
        _set_rates(self.optimizer, factor)
        nn.utils.clip_grad_norm_(self._trained.values(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and moments as (name, full tensor), float32."""
        for name, parameter in self._trained.items():
            yield f"parameter/{name}", parameter
            for moment in _MOMENTS:
                yield f"{moment}/{name}", self.optimizer.state[parameter][moment]

    def load_state(self, tensors: Iterable[tuple[str, Tensor]], updates: int) -> None:
        """Go on from what `state` gave after `updates` updates."""
        for parameter in self._trained.values():
            self.optimizer.state[parameter] = _fresh_state(parameter, updates)
        with torch.no_grad():
            for name, tensor in tensors:
                kind, name = name.split("/", 1)
                parameter = self._trained[name]
                (parameter if kind == "parameter" else self.optimizer.state[parameter][kind]).copy_(tensor)


class DeepSpeedEngine:
    """ZeRO-2: every rank holds the weights and a share of the gradient and of AdamW's state.

    AdamW is torch's own, because DeepSpeed's is compiled at the first use. Training state is read and set through
    DeepSpeed's public per-parameter functions instead of its checkpoint files, which are pickles. What the ranks have
    ready at the same place in the order of their backward is added up, so this order must not depend on the records.
    """

    name = "DeepSpeed ZeRO-2"

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.AdamW, max_norm: float, bfloat16: bool, ranks: Ranks
    ) -> None:
        os.environ.setdefault("DS_ACCELERATOR", ranks.device.type)
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # Compiled at first use, for half a minute; a compilation that was killed leaves a lock that waits for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # DeepSpeed insists on it although nothing else is read from the environment.
        os.environ.setdefault("LOCAL_RANK", "0")
        if not dist.is_initialized():
            # A group of one; a store in memory needs no free port.
            backend = "nccl" if ranks.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.module, self.ranks = module, ranks
        self._trained = _trained(module)
        buffers = [
            (part, name, value) for part in module.modules() for name, value in part.named_buffers(recurse=False)
        ]
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            dist_init_required=False,
            config={
                # Checked against the number of ranks; windows are made by the loop and closed by `last`.
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "zero_optimization": {"stage": 2, "overlap_comm": False},
                "zero_allow_untested_optimizer": True,
                "gradient_clipping": max_norm,
                "bf16": {"enabled": bfloat16},
                # Its default is the weights' precision: in bfloat16 a large sum no longer moves by a small gradient.
                "data_types": {"grad_accum_dtype": "fp32"},
                "steps_per_print": 2**31,
            },
        )
        for part, name, value in buffers:
            # DeepSpeed casts buffers as well, and rotary frequencies do not survive bfloat16.
            setattr(part, name, value.to(ranks.device))
        # Made here because DeepSpeed, which makes it at the first step, then links that of the first group only.
        for share in self._shares():
            self._zero.optimizer.state[share] = _fresh_state(share, updates=0)
        self._zero._lazy_init_hp_params_optimizer_state()

    def __call__(self, *arguments: Any) -> tuple[Tensor, Any]:
        """The module's ``(loss, figures)``."""
        loss, figures = self._engine(*arguments)
        return loss, figures

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Where parts of the module may be called by themselves: anywhere, its weights have the precision."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of a share of the window's loss; `last` says that the window is complete."""
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over ranks.
        self._engine.backward(loss * self.ranks.size, scale_wrt_gas=False)

    def forget(self) -> None:
        """Discard the gradients so far, as if there had been no backward; what DeepSpeed does after an overflow."""
        self._zero.zero_grad(set_to_none=True)
        for group in range(len(self._zero.bit16_groups)):
            self._zero.averaged_gradients[group] = self._zero.all_grad_tensors[group] = None

    def gradient_norms(self) -> dict[str, float]:
        """Norm of the window's gradient before clipping, by `part` of the parameter groups; NaN if not finite."""
        zero, groups = self._zero, self._zero.param_groups
        norms = [
            float(zero.get_grad_norm_direct(zero.averaged_gradients[number], zero.params_in_partition[number]))
            for number in range(len(groups))
        ]
        return _by_part(groups, [norm if norm >= 0 else float("nan") for norm in norms])

    def step(self, factor: float) -> None:
        """Clip, update with `factor` times the peak learning rates, forget the gradient."""
        _set_rates(self._zero, factor)
        self._engine.step()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and moments as (name, full tensor), float32. All ranks must read it to the end together."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter in self._trained.items():
            yield f"parameter/{name}", safe_get_full_fp32_param(parameter)
            for moment in _MOMENTS:
                yield f"{moment}/{name}", safe_get_full_optimizer_state(parameter, moment)

    def load_state(self, tensors: Iterable[tuple[str, Tensor]], updates: int) -> None:
        """Go on from what `state` gave after `updates` updates, with either engine and any number of ranks."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for share in self._shares():
            self._zero.optimizer.state[share]["step"].fill_(updates)
        for name, tensor in tensors:
            kind, name = name.split("/", 1)
            if kind == "parameter":
                safe_set_full_fp32_param(self._trained[name], tensor.to(self.ranks.device))
            else:
                safe_set_full_optimizer_state(self._trained[name], tensor.to(self.ranks.device), kind)
        self._zero.update_lp_params()

    def _shares(self) -> list[Tensor]:
        """This rank's share of each parameter group, flat and float32."""
        return [share for group in self._zero.optimizer.param_groups for share in group["params"]]


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _fresh_state(parameter: Tensor, updates: int) -> dict[str, Tensor]:
    moments = {moment: torch.zeros_like(parameter) for moment in _MOMENTS}
    return {"step": torch.tensor(float(updates)), **moments}


def _by_part(groups: list[dict[str, Any]], norms: list[float]) -> dict[str, float]:
    """The norms of parameter groups, put together by the part of the model that they belong to."""
    parts: dict[str, float] = {}
    for group, norm in zip(groups, norms, strict=True):
        parts[group["part"]] = math.hypot(parts.get(group["part"], 0.0), norm)
    return parts


def _set_rates(optimizer: Any, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
