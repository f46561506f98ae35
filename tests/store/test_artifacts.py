"""What DVC is asked and how often, and how a folder is published."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from valr_ops.store import artifacts
from valr_ops.store.artifacts import Ledger

STAGES = ("first", "second", "third")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC project with three stages in a row, each artifact there and none recorded."""
    from dvc.repo import Repo

    Repo.init(str(tmp_path), no_scm=True).close()
    stages: dict[str, Any] = {}
    for name, needed in zip(STAGES, ("code.py", "artifacts/first", "artifacts/second"), strict=True):
        stages[name] = {"cmd": f"run {name}", "deps": [needed], "outs": [f"artifacts/{name}"]}
        write(tmp_path, name, name)
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    (tmp_path / "code.py").write_text("one = 1\n")
    # The verbs work from the project's folder.
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(root: Path, stage: str, content: str) -> None:
    """Make the artifact of `stage` anew, as a published folder is made: nothing is written into an old one."""
    made = root / "artifacts" / f"new_{stage}"
    made.mkdir(parents=True)
    (made / "manifest.json").write_text(content)
    with artifacts.published(made, root / "artifacts" / stage, root / "trash"):
        pass


def test_the_pipeline_is_parsed_once_for_any_number_of_stages_and_once_more_when_it_changed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dvc.utils import strictyaml

    load, parsed = strictyaml.load, []

    def counted(path: str, *arguments: Any, **options: Any) -> Any:
        parsed.append(Path(path).name)
        return load(path, *arguments, **options)

    for name in STAGES:
        Ledger(root).commit(name)
    monkeypatch.setattr(strictyaml, "load", counted)
    ledger = Ledger(root)
    assert all(state.up_to_date for state in ledger.states(STAGES).values())
    assert ledger.states(STAGES).keys() == set(STAGES)
    assert sorted(parsed) == ["dvc.lock", "dvc.yaml"]
    write(root, "third", "another")
    ledger.commit("third")
    assert sorted(parsed) == ["dvc.lock", "dvc.yaml"]
    assert ledger.states(STAGES)["third"].up_to_date
    assert sorted(parsed) == ["dvc.lock", "dvc.lock", "dvc.yaml", "dvc.yaml"]


def test_a_run_that_a_kill_kept_from_being_remembered_is_made_again(root: Path) -> None:
    ledger = Ledger(root)
    ledger.commit("first")
    (run,) = (root / ".dvc" / "cache" / "runs").glob("*/*/*")
    run.unlink()
    (root / "dvc.lock").unlink()
    (root / "artifacts" / "first" / "manifest.json").unlink()
    assert Ledger(root).restore("first") is False
    write(root, "first", "first")
    Ledger(root).commit("first")
    (root / "dvc.lock").unlink()
    assert Ledger(root).restore("first") is True


def test_what_another_process_records_is_seen(root: Path) -> None:
    mine, others = Ledger(root), Ledger(root)
    assert [state.reasons for state in mine.states(STAGES).values()] == [("it was not made yet",)] * 3
    for name in STAGES:
        others.commit(name)
    assert all(state.up_to_date for state in mine.states(STAGES).values())
    write(root, "first", "another")
    others.commit("first")
    assert mine.states(STAGES)["first"].up_to_date
    assert mine.states(STAGES)["second"].reasons == ("input first changed",)
    stages = yaml.safe_load((root / "dvc.yaml").read_text())
    stages["stages"]["third"]["cmd"] = "run it otherwise"
    (root / "dvc.yaml").write_text(yaml.safe_dump(stages))
    assert mine.states(["third"])["third"].reasons == ("its command in dvc.yaml changed",)


def test_an_artifact_is_recorded_with_what_it_was_made_from(root: Path) -> None:
    ledger = Ledger(root)
    ledger.commit("first")
    started = ledger.start("second")
    (root / "code.py").write_text("two = 2\n")
    write(root, "first", "another")
    ledger.commit("first")
    write(root, "second", "made of the first one")
    ledger.commit("second", started)
    assert ledger.states(["second"])["second"].reasons == ("input first changed",)
    write(root, "first", "first")
    ledger.commit("first")
    assert ledger.states(STAGES)["second"].up_to_date


def test_what_a_job_made_is_recorded_with_what_it_was_asked_for(root: Path) -> None:
    (root / "values.yaml").write_text("rate: 1.0e-05\nmany: {b: 1, a: null}\n")
    stages = yaml.safe_load((root / "dvc.yaml").read_text())
    stages["stages"]["second"] |= {
        "params": [{"values.yaml": ["rate", "many"]}],
        "deps": ["artifacts/first", "code.py"],
    }
    (root / "dvc.yaml").write_text(yaml.safe_dump(stages))
    ledger, lock = Ledger(root), root / "dvc.lock"
    digest, recipe = ledger.commit("first"), {"rate": 1e-05, "many": {"a": None, "b": 1}, "other": 2}
    ledger.commit("second")
    as_here = lock.read_bytes()
    lock.unlink()
    ledger.commit("first")
    ledger.commit("second", ledger.requested("second", {"first": digest}, recipe, same_code=True))
    assert lock.read_bytes() == as_here
    for asked, why in (
        (({"first": "0" * 32 + ".dir"}, recipe, True), "input first changed"),
        (({"first": digest}, recipe | {"rate": 1}, True), "recipe field rate: 1 -> 1e-05"),
        (({"first": digest}, recipe, False), "code code.py changed"),
    ):
        ledger.commit("second", ledger.requested("second", *asked[:2], same_code=asked[2]))
        assert ledger.states(["second"])["second"].reasons == (why,)
        assert Ledger(root).restore("second") is True, "an earlier run was of what is here now"
        assert lock.read_bytes() == as_here


@pytest.mark.parametrize("lost", [False, True])
def test_a_version_that_dvc_removed_is_brought_back_whole_or_not_at_all(root: Path, lost: bool) -> None:
    artifact, staged = root / "artifacts" / "first", root / "staged"
    assert Ledger(root).bring_back("first", staged), "it is there, and was never recorded"
    (artifact / "deep").mkdir()
    (artifact / "deep" / "file").write_text("deep")
    digest = Ledger(root).commit("first")
    shutil.rmtree(artifact)
    if lost:
        (file,) = (one for one in (root / ".dvc" / "cache").rglob("*") if one.is_file() and one.read_bytes() == b"deep")
        file.unlink()
    staged.mkdir()
    (staged / "left").touch()
    assert Ledger(root).bring_back("first", staged) is not lost
    assert artifact.exists() is not lost
    if not lost:
        assert artifacts.directory_digest(artifact) == digest and not staged.exists()


def test_a_record_is_written_to_the_bytes_that_dvc_writes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dvc import dvcfile
    from dvc.utils.serialize import modify_yaml

    values = {
        "rate": 1e-05,
        "word": "no",
        "long": "one two " * 20,
        "many": [{"a": "1e3"}, None, [1.0]],
        "lines": "a\n\nb\n",
    }
    (root / "values.yaml").write_text(yaml.safe_dump(values))
    stages = yaml.safe_load((root / "dvc.yaml").read_text())
    stages["stages"]["second"]["params"] = [{"values.yaml": list(values)}]
    (root / "dvc.yaml").write_text(yaml.safe_dump(stages))
    lock, texts = root / "dvc.lock", []
    for by_dvc in (False, True):
        lock.unlink(missing_ok=True)
        for name in STAGES:
            write(root, name, name)
        for name, content in (("third", "a"), ("second", "b"), ("first", "c"), ("second", "d"), ("third", "e")):
            write(root, name, content)
            ledger = Ledger(root)
            if by_dvc:
                monkeypatch.setattr(dvcfile, "modify_yaml", modify_yaml)
                ledger.repo.commit(target=name, force=True)
            else:
                ledger.commit(name)
            texts.append(lock.read_text())
    assert texts[:5] == texts[5:]
    lock.write_text(f"# merged by hand\n{texts[-1]}")
    write(root, "first", "f")
    Ledger(root).commit("first")
    assert lock.read_text().startswith("# merged by hand\n")
    assert Ledger(root).states(["second"])["second"].reasons == ("input first changed",)


def test_a_push_copies_the_named_artifacts_and_no_other(root: Path) -> None:
    config = root / ".dvc" / "config"
    config.write_text("[core]\n    no_scm = true\n    remote = there\n['remote \"there\"']\n    url = ../there\n")
    ledger = Ledger(root)
    for name in STAGES:
        ledger.commit(name)
    assert ledger.has_remote()
    # A folder is a list of files and one file.
    assert ledger.push(["first", "third"]) == 4
    assert ledger.push(["first", "third"]) == 0
    assert ledger.push(STAGES) == 2


def test_a_publication_replaces_the_old_folder_and_flushes_every_file_and_folder_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged, final, trash = tmp_path / "staged", tmp_path / "final", tmp_path / "trash"
    names = {f"shard/{number}" for number in range(30)}
    for folder in (staged / "shard", final):
        folder.mkdir(parents=True)
    (final / "old").touch()
    for name in names:
        (staged / name).write_text(name)
    wanted = {path.stat().st_ino for path in (staged, *staged.rglob("*"))}
    flushed = set()

    def fsync(handle: int) -> None:
        assert staged.is_dir() and (final / "old").exists()
        flushed.add(os.fstat(handle).st_ino)

    monkeypatch.setattr("os.fsync", fsync)
    with artifacts.published(staged, final, trash):
        pass
    assert flushed == wanted and len(wanted) == 32
    assert {path.relative_to(final).as_posix() for path in final.rglob("*")} == names | {"shard"}
    assert not staged.exists() and not trash.exists()


def test_a_file_that_cannot_be_flushed_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staged, final = tmp_path / "staged", tmp_path / "final"
    for folder in (staged, final):
        folder.mkdir()
    (staged / "new").touch()
    (final / "old").touch()

    def fsync(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(OSError, match="no space left"), artifacts.published(staged, final, tmp_path / "trash"):
        pass
    assert (final / "old").exists() and (staged / "new").exists()
