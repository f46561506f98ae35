from __future__ import annotations

from pathlib import Path

import pytest
import torch

from valr_ops.model import checkpoint


def write(folder: Path, step: int, fingerprint: str = "mine") -> Path:
    tensors = [("a/weight", torch.full((2, 3), float(step))), ("b/weight", torch.arange(step))]
    return checkpoint.write(folder, step, iter(tensors), {"fingerprint": fingerprint, "done": {"loss": [0.1, step]}})


def test_a_checkpoint_comes_back_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_SHARD_BYTES", 32)
    folder = write(tmp_path, 5)
    assert len(list(folder.glob("*.safetensors"))) == 2
    found = checkpoint.newest(tmp_path, "mine", pytest.fail)
    assert found is not None
    assert found.state["done"] == {"loss": [0.1, 5]}
    tensors = dict(found.tensors())
    assert torch.equal(tensors["a/weight"], torch.full((2, 3), 5.0))
    assert torch.equal(tensors["b/weight"], torch.arange(5))


def test_only_the_newest_two_stay(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        write(tmp_path, step)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["checkpoint-00000002", "checkpoint-00000010"]


def test_a_kill_while_writing_leaves_the_earlier_one(tmp_path: Path) -> None:
    write(tmp_path, 1)

    def dying() -> object:
        yield "a/weight", torch.zeros(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(tmp_path, 2, dying(), {"fingerprint": "mine"})  # type: ignore[arg-type]
    found = checkpoint.newest(tmp_path, "mine", pytest.fail)
    assert found is not None and found.folder.name == "checkpoint-00000001"
    write(tmp_path, 3)
    assert not list(tmp_path.glob("partial-*"))


def test_a_truncated_checkpoint_is_passed_over_in_words(tmp_path: Path) -> None:
    write(tmp_path, 1)
    shard = write(tmp_path, 2) / "tensors-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    said: list[str] = []
    found = checkpoint.newest(tmp_path, "mine", said.append)
    assert found is not None and found.folder.name == "checkpoint-00000001"
    assert len(said) == 1 and "checkpoint-00000002 is passed over" in said[0]


def test_a_checkpoint_of_another_recipe_is_passed_over_in_words(tmp_path: Path) -> None:
    write(tmp_path, 1, fingerprint="theirs")
    said: list[str] = []
    assert checkpoint.newest(tmp_path, "mine", said.append) is None
    assert said == ["checkpoint-00000001 is passed over: it belongs to another recipe or other inputs"]
