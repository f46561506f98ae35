"""Training checkpoints: named tensors and a JSON state, whole or not there at all.

In: an iterator of (name, tensor) and a dictionary. Out: a folder ``checkpoint-<step>`` of safetensors shards and a
``state.json``, and the way back; where a machine may be taken away, a `Mirror` of them in object storage.
Nothing is pickled.
Always: a checkpoint is written to a sibling folder, flushed and renamed, so a kill leaves whole ones only; at most one
shard is held in memory beside the tensors; one that is damaged or belongs to another run is an error, and stays. In the
mirror a checkpoint counts once the object that names its digest is there, which is the last one to be written.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from valr_ops.store.objects import ChangedError, MissingError, S3Files, TakenError, patiently
from valr_ops.store.remote import Remote

_SHARD_BYTES = 1024**3
_STATE = "state.json"
_MIRRORED = re.compile(r"checkpoint-\d{8}\.json")
_KEPT_IN_MIRROR = 2
"""One may turn out to be damaged."""
_LOOK_SECONDS = 1.0


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
    try:
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
    except BaseException:
        # On a full disk it would be in the way of itself.
        shutil.rmtree(partial, ignore_errors=True)
        raise
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


class Mirror:
    """Inside the block each new checkpoint of a run is copied to object storage, beside the training.

    Where the block ends with an error, such as the signal that takes the machine away, it waits for the copy of the
    last one. What can't be copied is said, and costs the training nothing.

    Args:
        folder: where the run's checkpoints are.
        location: ``s3://bucket/prefix`` of this run's alone.
        say: gets lines for people.
    """

    def __init__(self, folder: Path, location: str, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        self._remote, self._index = Remote(location), S3Files(location)
        self._copied: set[str] = set()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mirror", daemon=True)

    def __enter__(self) -> None:
        # What was there before came from the mirror, or is older than what will be.
        self._copied.update(path.name for path in _folders(self._folder))
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join()
        if error is not None:
            self._copy_newest()

    def _watch(self) -> None:
        while not self._ending.wait(_LOOK_SECONDS):
            self._copy_newest()

    def _copy_newest(self) -> None:
        new = next((path for path in _folders(self._folder) if path.name not in self._copied), None)
        if new is None or (self._copied and new.name < max(self._copied)):
            return
        # Training deletes old checkpoints; links to the files keep this one for as long as the copy takes.
        aside = self._folder.with_name(f"{self._folder.name}.mirrored")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            shutil.copytree(new, aside, copy_function=os.link)
            stored = self._remote.push(aside)
            content = json.dumps({"digest": stored.digest, "size": stored.size}).encode()
            with contextlib.suppress(TakenError):
                patiently(self._index.put, f"{new.name}.json", content, only_new=True)
            self._copied.add(new.name)
            self._forget_old()
        except OSError as error:
            self._say(f"{new.name} is not in the store yet, training goes on meanwhile: {error}")
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _forget_old(self) -> None:
        for name in _mirrored(self._index)[_KEPT_IN_MIRROR:]:
            _forget(self._index, name)


def restore(folder: Path, locations: Iterable[str], say: Callable[[str], None]) -> bool:
    """Bring the newest whole checkpoint in any of the mirrors back into `folder`; whether one is there then.

    One that is damaged in the store is said and deleted there, and the one before it is taken.

    Raises:
        StorageError: a mirror can't be read. DiskFullError: the checkpoint does not fit.
    """
    found = [(name, location) for location in locations for name in _mirrored(S3Files(location))]
    for name, location in sorted(found, key=lambda one: one[0], reverse=True):
        here = folder / name.removesuffix(".json")
        if any(path.name >= here.name for path in _folders(folder)):
            return True
        try:
            Remote(location).fetch(_digest(S3Files(location), name), here)
        except (ChangedError, MissingError) as error:
            say(f"{here.name} can't be used, going on from the one before it: {error}")
            _forget(S3Files(location), name)
            continue
        say(f"{here.name} fetched from {location}")
        return True
    return bool(_folders(folder))


def discard(location: str) -> None:
    """Delete a mirror. Raises `StorageError`."""
    mirror = S3Files(location)
    # First what makes a checkpoint count, so that a kill leaves no half one.
    for name in sorted(patiently(mirror.names), key=lambda name: not _MIRRORED.fullmatch(name)):
        patiently(mirror.delete, name)


def _mirrored(index: S3Files) -> list[str]:
    """Objects that name a whole checkpoint each, the newest first."""
    return sorted((name for name in patiently(index.names, ".json") if _MIRRORED.fullmatch(name)), reverse=True)


def _forget(index: S3Files, name: str) -> None:
    """Delete one checkpoint from a mirror, with those of its files that no other one has."""
    with contextlib.suppress(ChangedError, MissingError):
        digest = _digest(index, name)
        others = {_digest(index, other) for other in _mirrored(index) if other != name}
        if digest not in others:
            Remote(index.location).forget(digest, but=others)
    patiently(index.delete, name)


def _digest(index: S3Files, name: str) -> str:
    try:
        return str(json.loads(patiently(index.read, name, 1 << 16))["digest"])
    except (ValueError, KeyError, TypeError):
        raise ChangedError(f"{index.location}/{name} can't be read: it was altered in the store") from None


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
