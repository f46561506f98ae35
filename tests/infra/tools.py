"""Commands that check what is in infra/: found in this environment or on the machine, else the test is skipped."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
INFRA = CHECKOUT / "infra"
PIP = "pip install -c constraints.txt -e '.[infra]'"
"""Where most of them are had from."""


def tool(name: str, where: str) -> str:
    """The command's path; skips the test where it is missing, saying where it is had from."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is missing; {where}")
    return found


def output(
    *words: str | Path, cwd: Path = CHECKOUT, env: dict[str, str] | None = None, timeout_seconds: float = 540
) -> str:
    """What a command prints; its words are the failure if it fails."""
    done = subprocess.run(
        [*map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=timeout_seconds
    )
    assert done.returncode == 0, f"{words[0]} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout
