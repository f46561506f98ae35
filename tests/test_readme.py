"""What the README shows is what is there."""

import re
from itertools import pairwise

from tests.project import CHECKOUT
from valr_ops.__main__ import _parser
from valr_ops.stages import STAGES

README = (CHECKOUT / "README.md").read_text(encoding="utf-8")


def test_the_picture_of_the_graph_has_the_arrows_of_the_table() -> None:
    picture = README.split("```mermaid")[1].split("```")[0]
    arrows = set()
    for line in picture.splitlines():
        groups = [re.findall(r"[a-z]\w*", group) for group in re.split(r"--+>", line)]
        for sources, targets in pairwise(groups):
            arrows |= {(source, target) for source in sources for target in targets}
    assert arrows == {(needed, row.name) for row in STAGES for needed in row.inputs}


def test_every_command_of_the_readme_exists() -> None:
    verbs = set(re.findall(r"(?<![\w/-])valr ([a-z-]+)", README))
    known = next(action.choices for action in _parser()._subparsers._group_actions)  # type: ignore[union-attr]
    assert verbs and verbs <= set(known or ())
    targets = set(re.findall(r"^make ([a-z]+)|`make ([a-z]+)", README, re.MULTILINE))
    makefile = (CHECKOUT / "Makefile").read_text(encoding="utf-8")
    assert targets and all(re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE) for target in targets)


def test_every_file_the_tree_names_exists() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    for line in tree.splitlines():
        name = line.split()[0] if line.strip() else ""
        if name.endswith((".py", "/")) and not line.startswith(" " * 20):
            path = CHECKOUT / ("valr_ops" if line.startswith("  ") else "") / name
            assert path.exists(), name
