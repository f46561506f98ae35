"""The asset `stage2_ablation`: the other trained models of the paper's tables, one partition a cell.

Materialize one cell, several, or all of them as a backfill: each is a run of its own, so that one that fails stops no
other, and the pool of the GPU, or the cluster's queue, keeps them apart. The cells are those that the recipe has at its
scale: all of the paper's at small and paper, two at tiny, three at mini. Each artifact is in a folder of its own below
``artifacts/stage2_ablation``. The asset shows what each cell costs; every run says it of its cell and of all cells that
were chosen with it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import dagster as dg

from assets.factory import RECIPE, stage_asset
from valr_ops.recipe import price
from valr_ops.recipe.recipe import RecipeError
from valr_ops.stages import ABLATION, STAGES, ablation_cells
from valr_ops.store.artifacts import project_root

CELLS = {cell: row for cell, row in ablation_cells().items() if RECIPE and cell in RECIPE.variants} or ablation_cells()
"""What can be materialized, by cell; all where the recipe has none or is wrong, and each then says so."""

_NEEDED = {name for row in CELLS.values() for name in row.inputs}
_FIELDS = {field for row in CELLS.values() for field in row.parameters if not field.startswith("variants.")}

_BACKFILL = "dagster/backfill"


def _prices() -> Mapping[str, Any]:
    """A table for the asset's page, by the recipe's assumptions."""
    if RECIPE is None:
        return {}
    try:
        rows = list(price.sum_rows(price.cell_prices(RECIPE)))
    except (price.PriceError, RecipeError) as error:
        return {"price": str(error)}
    lines = ["| cell | hours | GPU hours | dollars |", "| --- | ---: | ---: | ---: |"]
    return {"price": dg.MetadataValue.md("\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]))}


def _announced(context: dg.AssetExecutionContext) -> str:
    """What the run's cell costs, and all cells of the backfill that it belongs to."""
    if RECIPE is None:
        return "the recipe is wrong, and the stage will say where"
    try:
        prices = {cell: price.price(RECIPE, CELLS[cell].name, project_root()) for cell in _chosen(context)}
    except (price.PriceError, RecipeError) as error:
        return f"no price: {error}"
    *each, together = price.sum_rows(prices)
    said = [row for row in each if row[0] == context.partition_key] + ([together] if len(each) > 1 else [])
    return "; ".join(f"{name}: {gpu_hours} GPU hours, {dollars} dollars" for name, _, gpu_hours, dollars in said)


def _chosen(context: dg.AssetExecutionContext) -> list[str]:
    """The cells of the backfill that the run belongs to, else only its own."""
    backfill = context.instance.get_backfill(context.run.tags.get(_BACKFILL, ""))
    if backfill is None:
        return [context.partition_key]
    if backfill.asset_backfill_data is None:
        return list(backfill.partition_names or [context.partition_key])
    return sorted(backfill.asset_backfill_data.get_target_partitions_subset(context.asset_key).get_partition_keys())


ablation = stage_asset(
    replace(
        next(iter(CELLS.values())),
        name=ABLATION,
        summary="The other trained models of the paper's tables 3 to 6, 9, 11, 12 and figure 3, one partition a cell.",
        inputs=tuple(row.name for row in STAGES if row.name in _NEEDED),
        parameters=(*sorted(_FIELDS), "variants.CELL"),
    ),
    cells=dg.StaticPartitionsDefinition(list(CELLS)),
    metadata=_prices(),
    announce=_announced,
)
