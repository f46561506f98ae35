"""`valr doctor`: it sees each thing that would make a run fail, says how to mend it, and changes nothing."""

from __future__ import annotations

import importlib.metadata
import shutil
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from valr_ops import doctor, workspace

CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which nothing is wrong."""
    (tmp_path / "params.yaml").write_text("scale: tiny\n", encoding="utf-8")
    (tmp_path / "mlflow").mkdir()
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text(
        "[core]\n    analytics = false\n    remote = local\n['remote \"local\"']\n    url = ../remote\n",
        encoding="utf-8",
    )
    for command in (
        ["init", "-q"],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "--allow-empty", "-mx"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    workspace.prepare(tmp_path)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / ".valr" / "dagster"))
    monkeypatch.delenv("DAGSTER_MODULE_NAME", raising=False)
    monkeypatch.setattr(doctor.sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setattr(workspace, "in_use", lambda port: False)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=100 * doctor.GIB))
    return tmp_path


def _found(root: Path, name: str) -> doctor.Finding:
    return next(finding for finding in doctor.diagnose(root) if finding.name == name)


def _with_versions(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name not in versions:
            return real(name)
        if versions[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return str(versions[name])

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_where_nothing_is_wrong_everything_is_ok_and_nothing_is_to_be_done(project: Path) -> None:
    findings = doctor.diagnose(project)
    assert [finding for finding in findings if finding.status != "ok" or finding.fix] == []
    assert len({finding.name for finding in findings}) == len(findings) >= 15


def test_it_changes_nothing(project: Path) -> None:
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in sorted(project.rglob("*")) if ".git" not in path.parts}

    before = state()
    doctor.diagnose(project)
    assert state() == before


def test_whatever_is_not_ok_comes_with_a_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    findings = doctor.diagnose(tmp_path)
    assert {"DVC", "params.yaml", "python"} <= {finding.name for finding in findings if finding.status != "ok"}
    assert all(finding.fix for finding in findings if finding.status != "ok")


def test_an_old_antlr_runtime_is_a_problem_of_selections(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_versions(monkeypatch, **{"antlr4-python3-runtime": "4.9.3"})
    assert _found(project, "Dagster selections").status == "problem"
    assert "4.9.3, needed is" in _found(project, "packages").detail


def test_a_missing_package_is_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_versions(monkeypatch, timm=None)
    assert _found(project, "packages").detail == "timm is missing"


def test_torch_and_torchvision_of_different_releases_are_a_problem(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_versions(monkeypatch, torch="2.14.1", torchvision="0.28.0")
    assert _found(project, "torch").status == "problem"
    _with_versions(monkeypatch, torch="2.13.0+cpu", torchvision="0.28.0")
    assert "torchvision_guard" in _found(project, "torch").detail


def test_mlflow_hidden_by_the_settings_folder_is_a_problem(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "mlflow" / "__init__.py").touch()
    assert _found(project, "mlflow").fix == "delete mlflow/__init__.py"
    (project / "mlflow" / "__init__.py").unlink()
    _with_versions(monkeypatch, mlflow=None)
    assert "only the settings folder" in _found(project, "mlflow").detail


@pytest.mark.parametrize(
    ("home", "status"), [(None, "warning"), ("relative", "problem"), ("/nowhere/at/all", "problem"), ("/", "warning")]
)
def test_a_dagster_home_that_is_unset_wrong_or_foreign_is_told(
    project: Path, monkeypatch: pytest.MonkeyPatch, home: str | None, status: str
) -> None:
    monkeypatch.delenv("DAGSTER_HOME")
    if home is not None:
        monkeypatch.setenv("DAGSTER_HOME", home)
    assert _found(project, "Dagster's home").status == status


def test_a_home_of_this_project_stays_and_one_of_another_does_not(
    project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, services, another = (
        project / ".valr" / "dagster",
        project / ".valr" / "services" / "dagster",
        tmp_path_factory.mktemp("another") / ".valr" / "dagster",
    )
    for home in (services, another):
        home.mkdir(parents=True)
    for given, kept in ((services, services), (own, own), (another, own), (project / ".valr", own), (Path("a"), own)):
        monkeypatch.setenv("DAGSTER_HOME", str(given))
        assert workspace.prepare(project)["DAGSTER_HOME"] == str(kept)
        assert (_found(project, "Dagster's home").status == "ok") == (given == kept)
    monkeypatch.delenv("DAGSTER_HOME")
    assert workspace.prepare(project)["DAGSTER_HOME"] == str(own)


def test_the_module_variable_that_breaks_dagster_dev_is_told(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_MODULE_NAME", "pipelines.definitions")
    assert _found(project, "Dagster's module").fix == "unset DAGSTER_MODULE_NAME"


def test_a_mistake_in_params_is_told_in_its_own_words(project: Path) -> None:
    (project / "params.yaml").write_text("scale: tiny\nsede: 1\n", encoding="utf-8")
    assert "did you mean 'seed'" in _found(project, "params.yaml").detail


def test_a_recipe_for_a_gpu_that_is_not_there_is_a_problem(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "params.yaml").write_text("scale: paper\n", encoding="utf-8")
    monkeypatch.setattr(doctor, "_SIGNS_OF_A_GPU", (project / "gpu",))
    assert _found(project, "GPU").status == "problem"
    (project / "gpu").touch()
    assert _found(project, "GPU").status == "ok"


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("[core]\n    remote = local\n", "it reports its use to its makers"),
        ("[core]\n    analytics = false\n", "no remote: artifacts exist only here"),
        ("core]\n", "can't be read"),
    ],
)
def test_dvc_that_reports_has_no_remote_or_is_broken_is_told(project: Path, config: str, told: str) -> None:
    (project / ".dvc" / "config").write_text(config, encoding="utf-8")
    assert told in _found(project, "DVC").detail


def test_a_folder_without_a_commit_is_told(project: Path) -> None:
    shutil.rmtree(project / ".git")
    assert _found(project, "git").status == "warning"


@pytest.mark.parametrize(("gib", "status"), [(0.5, "problem"), (3, "warning"), (50, "ok")])
def test_a_disk_that_is_nearly_full_is_told(
    project: Path, monkeypatch: pytest.MonkeyPatch, gib: float, status: str
) -> None:
    free = int(gib * doctor.GIB)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert _found(project, "disk").status == status


def test_what_is_still_to_be_made_has_to_fit_on_the_disk(project: Path) -> None:
    (project / "params.yaml").write_text("scale: paper\n", encoding="utf-8")
    local = _found(project, "room")
    assert local.status == "warning" and "100.0 GiB are free" in local.detail and "valr plan" in local.fix
    # The checkpoints of a Job are elsewhere.
    (project / "params.yaml").write_text("scale: paper\ncluster: {dispatch: kubernetes}\n", encoding="utf-8")
    results = _found(project, "room")
    needed = [float(found.detail.split("about ")[1].split()[0]) for found in (local, results)]
    assert needed[0] - needed[1] == pytest.approx(3 * 92 / 1.0737, rel=0.01)
    (project / "artifacts" / "cot_corpus").mkdir(parents=True)
    assert _found(project, "room").status == "ok"


def test_folders_that_can_not_be_written_are_told(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: Path(path).name != ".valr")
    assert str(project / ".valr") in _found(project, "permissions").detail


def test_a_port_in_use_is_told(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setattr(workspace, "MLFLOW_PORT", listener.getsockname()[1])
        assert _found(project, f"port {workspace.MLFLOW_PORT}").status == "warning"


def test_what_a_killed_run_left_is_told_and_a_running_one_is_left_alone(project: Path) -> None:
    (project / ".valr" / "staging" / "stage1_sft").mkdir(parents=True)
    assert _found(project, "unfinished runs").fix.startswith("valr run stage1_sft")
    lock = project / ".valr" / "locks" / "stage1_sft.lock"
    lock.parent.mkdir()
    with doctor.FileLock(lock):
        assert _found(project, "unfinished runs").status == "ok"


def test_measurements_that_wait_for_the_server_are_counted(project: Path) -> None:
    for name in ("a", "b", ".half"):
        (project / ".valr" / "spool" / name).mkdir(parents=True)
    assert _found(project, "MLflow spool").detail.startswith("2 runs wait")


def test_the_table_shows_every_finding_and_its_fix(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.show([doctor.Finding("first", "ok", "[fine]"), doctor.Finding("second", "problem", "broken", "mend it")])
    printed = capsys.readouterr().out
    assert "[fine]" in printed and "second" in printed and "→ mend it" in printed
