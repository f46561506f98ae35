"""Training checkpoints: named tensors and a JSON state, whole or not there at all.

In: an iterator of (name, tensor) and a dictionary. Out: a folder ``checkpoint-<step>`` of safetensors shards and a
``state.json``, and the way back. Nothing is pickled.
Always: a checkpoint is written to a sibling folder, flushed and renamed, so a kill leaves whole ones only; at most one
shard is held in memory beside the tensors; one that is damaged or belongs to another run is an error, and stays.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_SHARD_BYTES = 1024**3
_STATE = "state.json"


class CheckpointError(RuntimeError):
    """A checkpoint that can't be gone on from: the message says which, why and what to do. Nothing was written."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk."""

    folder: Path
    state: Mapping[str, Any]
    """What was given to `write`."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The named tensors on the CPU, one at a time."""
        for shard in self._shards():
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - a safe_open handle is no mapping
                    yield name, file.get_tensor(name)

    def damage(self) -> str | None:
        """Why the shards can't be read, or None. Opening a shard checks its header against its length."""
        found = {shard.name: shard.stat().st_size for shard in self._shards()}
        if found != self.state["shards"]:
            return f"its shards have {found} bytes, but {self.state['shards']} were written"
        for shard in self._shards():
            try:
                with safe_open(shard, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                return f"{shard.name} can't be read ({error})"
        return None

    def _shards(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))


def write(folder: Path, step: int, tensors: Iterable[tuple[str, Tensor]], state: Mapping[str, Any], keep: int) -> Path:
    """Write ``folder/checkpoint-<step>``, then delete all but the newest `keep`; returns the new one's folder.

    Args:
        folder: where this run's checkpoints are.
        step: number of the step, never one that was written before.
        tensors: named tensors; read once.
        state: JSON values; `newest` compares its ``run``, a mapping, with what runs then.
        keep: number of checkpoints that stay, at least 1.
    """
    final = folder / f"checkpoint-{step:08d}"
    partial = folder / f"partial-{step:08d}"
    for stale in folder.glob("partial-*"):
        shutil.rmtree(stale)
    partial.mkdir(parents=True)
    shard: dict[str, Tensor] = {}
    number, size = 0, 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > _SHARD_BYTES:
            save_file(shard, partial / f"tensors-{number:05d}.safetensors")
            shard, size, number = {}, 0, number + 1
        shard[name] = tensor.detach().cpu().contiguous().clone()
        size += tensor.nbytes
    save_file(shard, partial / f"tensors-{number:05d}.safetensors")
    sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    (partial / _STATE).write_text(json.dumps({**state, "shards": sizes}), encoding="utf-8")
    for path in [*partial.iterdir(), partial]:
        _flush(path)
    partial.rename(final)
    _flush(folder)
    for old in _folders(folder)[keep:]:
        shutil.rmtree(old)
    return final


def newest(folder: Path, run: Mapping[str, Any]) -> Checkpoint | None:
    """The newest checkpoint, of which the state's ``run`` must equal `run`; None if there is none.

    Raises:
        CheckpointError: it is damaged, or was written by another run: the message names each field that differs.
    """
    folders = _folders(folder)
    if not folders:
        return None
    path = folders[0]
    instead = f"to go on from {folders[1].name}" if len(folders) > 1 else "to begin anew"
    try:
        checkpoint = Checkpoint(path, json.loads((path / _STATE).read_text(encoding="utf-8")))
        theirs, damage = checkpoint.state["run"], checkpoint.damage()
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: {_STATE} can't be read ({type(error).__name__}: {error}); delete this folder {instead}"
        ) from None
    if damage is not None:
        raise CheckpointError(f"{path}: {damage}; delete this folder {instead}")
    if differences := list(_differences("", theirs, json.loads(json.dumps(run)))):
        raise CheckpointError(
            f"{path} was written by another run: {'; '.join(differences)}. Make that as it was to go on from there, or "
            f"delete {folder} to begin anew"
        )
    return checkpoint


def _differences(where: str, then: Any, now: Any) -> Iterator[str]:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in sorted({*then, *now}):
            yield from _differences(f"{where}.{key}" if where else key, then.get(key), now.get(key))
    elif then != now:
        yield f"{where} was {json.dumps(then)} and is {json.dumps(now)}"


def _folders(folder: Path) -> list[Path]:
    """Whole checkpoints, newest first."""
    return sorted(folder.glob("checkpoint-*"), reverse=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
