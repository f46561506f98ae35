"""Training checkpoints: named tensors and a JSON state, whole or not there at all.

In: an iterator of (name, tensor) and a dictionary. Out: a folder ``checkpoint-<step>`` of safetensors shards and a
``state.json``, and the way back. Nothing is pickled.
Always: a checkpoint is written to a sibling folder, flushed and renamed, so a kill leaves whole ones only; at most one
shard is held in memory beside the tensors; the newest `KEPT` stay.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

KEPT = 2
"""Two, so that there is one to fall back on if the newest was damaged on disk."""
_SHARD_BYTES = 1024**3
_STATE = "state.json"


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
            return f"its shards are {found}, but {self.state['shards']} were written"
        for shard in self._shards():
            try:
                with safe_open(shard, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                return f"{shard.name} can't be read ({error})"
        return None

    def _shards(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))


def write(folder: Path, step: int, tensors: Iterable[tuple[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Write ``folder/checkpoint-<step>``, then delete all but the newest `KEPT`; returns the new one's folder."""
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
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _flush(folder)
    for old in _folders(folder)[KEPT:]:
        shutil.rmtree(old)
    return final


def newest(folder: Path, fingerprint: str, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint whose state has this `fingerprint`; None if there is none.

    Those of another recipe or other inputs, and damaged ones, are passed over, and `say` is told so.
    """
    for path in _folders(folder):
        try:
            checkpoint = Checkpoint(path, json.loads((path / _STATE).read_text(encoding="utf-8")))
            known = checkpoint.state["fingerprint"]
            damage = checkpoint.damage()
        except (OSError, ValueError, KeyError) as error:
            say(f"{path.name} is passed over: its {_STATE} can't be read ({error})")
            continue
        if known != fingerprint:
            say(f"{path.name} is passed over: it belongs to another recipe or other inputs")
        elif damage is not None:
            say(f"{path.name} is passed over: {damage}")
        else:
            return checkpoint
    return None


def _folders(folder: Path) -> list[Path]:
    """Whole checkpoints, newest first."""
    return sorted(folder.glob("checkpoint-*"), reverse=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
