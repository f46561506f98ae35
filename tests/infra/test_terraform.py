"""The Terraform configuration: its form, its types, and its own tests, with a mocked provider and no account."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.infra.tools import INFRA, output, tool

TERRAFORM = INFRA / "terraform"
PROVIDER = "registry.terraform.io/hashicorp/aws"
MIRRORS = ("~/.terraform.d/plugins", "/usr/local/share/terraform/plugins", "/usr/share/terraform/plugins", "/opt/*")
"""Where Terraform looks for providers that lie on the machine, and where images put them."""


def test_files_are_formatted() -> None:
    output(
        tool("terraform", "it is not in a package index: see terraform.io"), "fmt", "-check", "-recursive", TERRAFORM
    )


def test_the_role_is_for_the_accounts_that_get_it_in_the_cluster() -> None:
    (listed,) = re.findall(r"service_accounts = \[(.*)\]", (TERRAFORM / "access.tf").read_text())
    overlay = yaml.safe_load((INFRA / "k8s" / "overlays" / "prod" / "kustomization.yaml").read_text())
    (annotated,) = (one["target"]["name"] for one in overlay["patches"] if one["target"]["kind"] == "ServiceAccount")
    names = re.findall(r'"([\w-]+)"', listed)
    accounts = [one["metadata"]["name"] for one in yaml.safe_load_all((INFRA / "k8s/base/access.yaml").read_text())]
    assert sorted(names) == sorted(one for one in accounts if re.fullmatch(annotated, one))


@pytest.mark.services
def test_the_configuration_is_valid_and_passes_its_own_tests(tmp_path: Path) -> None:
    terraform = tool("terraform", "it is not in a package index: see terraform.io")
    folder = shutil.copytree(TERRAFORM, tmp_path / "terraform", ignore=shutil.ignore_patterns(".terraform"))
    (tmp_path / "empty.tfrc").touch()
    quiet = {"TF_CLI_CONFIG_FILE": str(tmp_path / "empty.tfrc"), "CHECKPOINT_DISABLE": "1", "TF_IN_AUTOMATION": "1"}
    env = {**{key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "TF_"))}, **quiet}

    output(terraform, "init", "-backend=false", "-input=false", f"-plugin-dir={_mirror()}", cwd=folder, env=env)
    said = output(terraform, "test", "-no-color", cwd=folder, env=env)

    assert re.search(r"Success! [1-9]\d* passed, 0 failed", said), said


def _mirror() -> Path:
    """A folder that has the provider; skips the test where there is none."""
    for pattern in MIRRORS:
        path = Path(pattern).expanduser()
        for folder in path.parent.glob(path.name):
            if (folder / PROVIDER).is_dir():
                return folder
    pytest.skip(f"the provider {PROVIDER} lies in none of {', '.join(MIRRORS)}; terraform providers mirror brings it")
