"""The stage ``recipe``: the resolved recipe as a file that every other stage reads, and its ledger for people."""

from __future__ import annotations

from collections.abc import Iterable

import yaml

from valr_ops.recipe.recipes import Assumption, ledger
from valr_ops.store.artifacts import StageContext, StageReport


def build_recipe(context: StageContext) -> StageReport:
    """The stage ``recipe``: recipe.yaml, which every other stage reads, and assumptions.md, which people read."""
    recipe = context.recipe
    values = recipe.model_dump(mode="json")
    text = yaml.safe_dump(values, sort_keys=True, allow_unicode=True, width=120)
    (context.out / "recipe.yaml").write_text(text, encoding="utf-8")
    lines = ledger(recipe)
    table = _markdown(lines)
    heading = f"# The recipe {recipe.fingerprint}, scale {recipe.scale}\n\n"
    (context.out / "assumptions.md").write_text(heading + table, encoding="utf-8")
    return StageReport(
        summary={
            "scale": recipe.scale,
            "fingerprint": recipe.fingerprint,
            "fields": len(lines),
            "paper_silent": sum(line.origin.startswith("Paper silent") for line in lines),
            "differs_from_paper_scale": sum(bool(line.paper) for line in lines),
            "variants": len(recipe.variants),
        },
        tables={"Every value and where it comes from": table},
    )


def _markdown(lines: Iterable[Assumption]) -> str:
    def row(*cells: str) -> str:
        return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |\n"

    body = "".join(row(f"`{line.field}`", line.value, line.paper, line.origin) for line in lines)
    return row("field", "value", "at scale paper", "where it comes from") + row(*["---"] * 4) + body
