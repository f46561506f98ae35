"""The image: what goes into it, how it starts, and the volume that is prepared from it."""

from __future__ import annotations

import configparser
import fnmatch
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.infra.tools import CHECKOUT, INFRA, PIP, output, tool

DOCKERFILE = INFRA / "docker" / "Dockerfile"
PREPARE = INFRA / "docker" / "prepare-workspace.sh"


def test_hadolint_finds_nothing() -> None:
    assert output(tool("hadolint", PIP), "--no-color", DOCKERFILE) == ""


def _instructions(stage: int) -> list[tuple[str, str]]:
    """Instructions of one stage, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    stages = re.split(r"^(?=FROM )", text, flags=re.MULTILINE)
    lines = [line.split(None, 1) for line in stages[stage].splitlines() if line.strip()]
    return [(first, re.sub(r"\s+", " ", rest)) for first, rest in lines]


def test_the_image_starts_the_verbs_without_a_shell_and_without_rights() -> None:
    last = dict(_instructions(-1))
    assert json.loads(last["ENTRYPOINT"]) == ["python3", "-m", "valr_ops"]
    user, group = map(int, last["USER"].split(":"))
    assert user >= 10000 and group >= 10000, "a uid that no user of the node has"


def test_what_triton_builds_with_is_in_the_image_and_nothing_of_what_builds_packages() -> None:
    last = _instructions(-1)
    installed = [rest for name, rest in last if name == "RUN"]
    packages = re.findall(r"install -y --no-install-recommends ([\w -]+?) &&", " ".join(installed))
    assert packages == ["git gcc libc6-dev"], "a compiled teacher needs a C compiler; the recipe compiles four"
    assert "Python.h" in " ".join(installed), "of BASE, looked for while the image is built"
    assert not any("pip" in command.split() for command in installed)
    assert [rest for name, rest in last if name == "COPY" and not rest.startswith("--from=")] == []


def test_what_is_downloaded_is_what_the_constraints_name() -> None:
    installs = [
        command
        for stage in (1, 2)
        for name, rest in _instructions(stage)
        if name == "RUN"
        for command in re.findall(r"pip install [^&]*", rest)
    ]
    assert len(installs) == 3
    assert all("--constraint constraints.txt" in one or "--no-deps" in one for one in installs)


def _ignored(path: str) -> bool:
    """Whether the builder is not sent `path`: the last pattern that matches it, or a folder above it, decides."""
    ignored = False
    for line in (CHECKOUT / ".dockerignore").read_text().splitlines():
        pattern = line.lstrip("!")
        if not line or line.startswith("#"):
            continue
        above = [path, *map(str, Path(path).parents)]
        matches = (
            any(fnmatch.fnmatchcase(Path(one).name, pattern[3:]) for one in above if one != ".")
            if pattern.startswith("**/")
            else any(fnmatch.fnmatchcase(one, pattern) for one in above if one != ".")
        )
        if matches:
            ignored = not line.startswith("!")
    return ignored


def test_the_builder_is_sent_the_project_and_no_data_and_no_secret() -> None:
    kept = ["valr_ops/stages.py", "dvc.yaml", ".dvc/config", "mlflow/serve.sh", "infra/docker/prepare-workspace.sh"]
    left = [".git/config", ".valr/services/secrets.sh", "artifacts/sources/manifest.json", ".env", "valr_ops/.env"]
    left += [".dvc/config.local", ".dvc/cache/files", ".venv/bin/python", "tests/tiny.py", "valr_ops/__pycache__/a.pyc"]
    assert [path for path in kept if _ignored(path)] == []
    assert [path for path in left if not _ignored(path)] == []


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """What of the project stands in /opt/valr, small."""
    folder = tmp_path / "image"
    for name, text in {
        "dvc.yaml": "stages: {}\n",
        "dvc.lock": "of the image\n",
        "params.yaml": "scale: tiny\n",
        ".dvcignore": "",
        ".dvc/config": "[core]\n    analytics = false\n",
        "valr_ops/stages.py": "new = True\n",
        "instance/dagster.yaml": "telemetry: {enabled: false}\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (tmp_path / "given.yaml").write_text("scale: paper\n")
    (tmp_path / "workspace").mkdir()
    return folder


def _prepare(image: Path, url: str = "s3://bucket/valr", **environment: str) -> subprocess.CompletedProcess[str]:
    words = ["sh", *map(str, (PREPARE, image, image.parent / "workspace", image.parent / "given.yaml"))]
    env = {"PATH": os.environ["PATH"], "VALR_REMOTE_URL": url, **environment}
    return subprocess.run(words, env=env, capture_output=True, text=True, check=False)


def test_a_new_image_brings_its_code_and_leaves_what_was_made(image: Path) -> None:
    workspace = image.parent / "workspace"
    for name, text in {
        "valr_ops/gone.py": "old = True\n",
        "dvc.lock": "of the runs\n",
        "params.yaml": "scale: tiny\n",
        "artifacts/sources/manifest.json": "{}",
        ".valr/dagster/kept": "",
    }.items():
        (workspace / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace / name).write_text(text)

    done = _prepare(image, DAGSTER_HOME=str(image / "instance"))

    assert done.returncode == 0, done.stderr
    assert (workspace / "valr_ops" / "stages.py").read_text() == "new = True\n"
    assert not (workspace / "valr_ops" / "gone.py").exists()
    assert (workspace / "dvc.lock").read_text() == "of the runs\n"
    assert (workspace / "params.yaml").read_text() == "scale: paper\n"
    assert (workspace / "artifacts" / "sources" / "manifest.json").is_file()
    assert (workspace / ".valr" / "dagster" / "kept").is_file()
    assert (workspace / ".valr" / "dagster" / "dagster.yaml").read_text() == "telemetry: {enabled: false}\n"


def test_the_first_start_and_the_second_give_the_same_workspace(image: Path) -> None:
    workspace = image.parent / "workspace"
    assert _prepare(image).returncode == 0
    first = sorted(path.relative_to(workspace) for path in workspace.rglob("*"))
    assert _prepare(image).returncode == 0
    assert sorted(path.relative_to(workspace) for path in workspace.rglob("*")) == first
    assert (workspace / "dvc.lock").read_text() == "of the image\n"


def test_dvc_works_in_the_workspace_without_git_on_the_bucket(image: Path) -> None:
    _prepare(image)
    settings = configparser.ConfigParser()
    settings.read(image.parent / "workspace" / ".dvc" / "config.local")
    assert settings["core"]["no_scm"] == "true"
    assert settings[f"'remote \"{settings['core']['remote']}\"'"]["url"] == "s3://bucket/valr"


@pytest.mark.parametrize("url", ["", "s3://", "/mnt/remote"])
def test_a_workspace_without_a_bucket_is_refused_with_the_fix(image: Path, url: str) -> None:
    done = _prepare(image, url)
    assert done.returncode == 42
    assert "set it to s3://BUCKET/PREFIX" in done.stderr
    assert not (image.parent / "workspace" / "dvc.yaml").exists()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_image_is_built_and_starts_as_a_user_without_rights(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("buildah's chroot isolation needs root here")
    for name in ("buildah", "mmdebstrap"):
        tool(name, f"apt-get install --no-install-recommends {name}")
    if shutil.disk_usage(tmp_path).free < 20 << 30:
        pytest.skip("20 GiB of disk are needed")
    try:
        said = output(INFRA / "docker" / "build-without-registry.sh", tmp_path, timeout_seconds=3600)
    finally:
        # Five gigabytes, which pytest would keep.
        shutil.rmtree(tmp_path, ignore_errors=True)
    assert "valr:local is built" in said
