from __future__ import annotations

from pathlib import Path

import pytest
import torch

from valr_ops.model import checkpoint
from valr_ops.model.checkpoint import CheckpointError

RUN = {"seed": 0, "stage2": {"learning_rate": 1e-5, "betas": [0.9, 0.999]}, "input": {"latent_corpus": "0f0f"}}


def write(folder: Path, step: int, keep: int = 2) -> Path:
    tensors = [("a/weight", torch.full((2, 3), float(step))), ("b/weight", torch.arange(step))]
    return checkpoint.write(folder, step, iter(tensors), {"run": RUN, "done": {"loss": [0.1, step]}}, keep)


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_checkpoint_comes_back_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_SHARD_BYTES", 32)
    folder = write(tmp_path, 5)
    assert len(list(folder.glob("*.safetensors"))) == 2
    found = checkpoint.newest(tmp_path, RUN)
    assert found is not None
    assert found.state["done"] == {"loss": [0.1, 5]}
    tensors = dict(found.tensors())
    assert torch.equal(tensors["a/weight"], torch.full((2, 3), 5.0))
    assert torch.equal(tensors["b/weight"], torch.arange(5))


@pytest.mark.parametrize(("keep", "left"), [(1, [10]), (2, [2, 10]), (5, [1, 2, 10])])
def test_only_the_newest_stay(keep: int, left: list[int], tmp_path: Path) -> None:
    for step in (1, 2, 10):
        write(tmp_path, step, keep)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"checkpoint-{step:08d}" for step in left]


def test_a_kill_while_writing_leaves_the_earlier_one(tmp_path: Path) -> None:
    write(tmp_path, 1)

    def dying() -> object:
        yield "a/weight", torch.zeros(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(tmp_path, 2, dying(), {"run": RUN}, keep=2)  # type: ignore[arg-type]
    found = checkpoint.newest(tmp_path, RUN)
    assert found is not None and found.folder.name == "checkpoint-00000001"
    write(tmp_path, 3)
    assert not list(tmp_path.glob("partial-*"))


def test_without_a_checkpoint_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "nothing yet", RUN) is None


@pytest.mark.parametrize("damaged", ["tensors-00000.safetensors", "state.json"])
def test_a_truncated_checkpoint_is_an_error_that_says_what_to_delete(damaged: str, tmp_path: Path) -> None:
    write(tmp_path, 1)
    file = write(tmp_path, 2) / damaged
    file.write_bytes(file.read_bytes()[:-4])
    before = files(tmp_path)
    with pytest.raises(CheckpointError, match="delete this folder to go on from checkpoint-00000001") as error:
        checkpoint.newest(tmp_path, RUN)
    assert str(file.parent) in str(error.value) and damaged in str(error.value)
    assert files(tmp_path) == before


def test_a_checkpoint_of_another_run_is_an_error_that_names_what_differs(tmp_path: Path) -> None:
    write(tmp_path, 1)
    before = files(tmp_path)
    changed = {**RUN, "stage2": {"learning_rate": 2e-6, "betas": (0.9, 0.999)}, "latents": {"slots": 4}}
    with pytest.raises(CheckpointError) as error:
        checkpoint.newest(tmp_path, changed)
    assert "latents was null and is" in str(error.value)
    assert "stage2.learning_rate was 1e-05 and is 2e-06. Make that as it was" in str(error.value)
    assert "betas" not in str(error.value) and "seed" not in str(error.value)
    assert files(tmp_path) == before


def test_a_checkpoint_is_never_written_over(tmp_path: Path) -> None:
    write(tmp_path, 1)
    before = files(tmp_path / "checkpoint-00000001")
    with pytest.raises(OSError):
        write(tmp_path, 1)
    assert files(tmp_path / "checkpoint-00000001") == before
