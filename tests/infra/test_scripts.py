"""Every shell script of the project, wherever it is: found by its first line, and free of what shellcheck knows."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.infra.tools import CHECKOUT, PIP, output, tool


def _scripts() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=CHECKOUT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    files = [CHECKOUT / name for name in filter(None, listed.split("\0"))]
    return [path for path in files if path.is_file() and re.match(rb"#!.*\b(ba)?sh\n", path.open("rb").readline(80))]


def test_shellcheck_finds_nothing_in_any_script() -> None:
    scripts = _scripts()
    assert {"run", "setup.sh", "up.sh", "serve.sh", "prepare-workspace.sh"} <= {path.name for path in scripts}
    assert output(tool("shellcheck", PIP), *scripts) == ""
