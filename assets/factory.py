"""One Dagster asset for each row of the table of stages, with its checks, kinds, owners and code version."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import dagster as dg

from assets.dispatch import StageRunner
from assets.retrying import WAITS_SECONDS, raise_for
from valr_ops.recipe import recipes
from valr_ops.recipe.recipe import Recipe, RecipeError
from valr_ops.stages import STAGES, Stage, dvc_target
from valr_ops.store.artifacts import project_root

OWNERS = {
    "recipe": "team:research",
    "preparation": "team:data",
    "teachers": "team:vision",
    "training": "team:training",
    "evaluation": "team:evaluation",
    "studies": "team:research",
}
"""Who is asked about an asset; one team a group."""

REPORT = "report"
FRESH = timedelta(days=8)
"""How old the report may get: a week between two scheduled runs, and a day for the run."""

GPU_POOL = "gpu"
"""Steps that use a GPU of this machine: one at a time, unless the Dagster instance allows more."""


def project_recipe() -> Recipe | None:
    """The recipe as it stood when Dagster loaded the project; None where it is wrong, which every stage then says."""
    try:
        return recipes.load(project_root(), json.loads(os.environ.get("VALR_SET", "{}")))
    except RecipeError:
        return None


RECIPE = project_recipe()

ON_A_LAPTOP = RECIPE is None or RECIPE.scale in ("tiny", "mini")
"""Everything runs on the CPU, and a person waits for the answer."""

IN_CLUSTER = RECIPE is not None and RECIPE.cluster.dispatch == "kubernetes"
"""GPU stages are Jobs: the cluster's queue and quota say how many run, and a pool here would leave GPUs idle."""


def stage_asset(
    row: Stage,
    cells: dg.PartitionsDefinition | None = None,
    metadata: Mapping[str, Any] | None = None,
    announce: Callable[[dg.AssetExecutionContext], str] | None = None,
) -> dg.AssetsDefinition:
    """The asset of one stage. Its body dispatches the verb; everything it shows is reported by the stage itself.

    Args:
        row: of the table; where there are cells, what they have in common.
        cells: for a stage that is made by cell, one partition each.
        metadata: shown with the asset beside what all of them show.
        announce: what to say in the log before the stage starts.
    """
    root = project_root()
    by_hand = f"{row.name}@CELL" if cells else row.name
    with_dvc = dvc_target(by_hand)

    @dg.asset(
        name=row.name,
        deps=list(row.inputs) or ([] if row.name == "recipe" else ["recipe"]),
        group_name=row.group,
        description=f"{row.summary}\n\nBy hand: `valr run {by_hand}` or `dvc repro {with_dvc}`.",
        kinds=set(row.kinds),
        owners=[OWNERS[row.group]],
        code_version=row.code_digest(root),
        check_specs=[
            dg.AssetCheckSpec(name=check, asset=row.name, blocking=True, description=check.replace("_", " "))
            for check in row.checks
        ],
        metadata={
            "recipe fields": ", ".join(row.parameters) or "all",
            "artifact": f"artifacts/{row.name}",
            **(metadata or {}),
        },
        tags={"resources": row.resources},
        partitions_def=cells,
        pool=GPU_POOL if row.resources == "gpu" and not (ON_A_LAPTOP or IN_CLUSTER) else None,
        freshness_policy=dg.FreshnessPolicy.time_window(fail_window=FRESH) if row.name == REPORT else None,
    )
    def asset(context: dg.AssetExecutionContext, stages: StageRunner) -> Iterator[Any]:
        name = f"{row.name}@{context.partition_key}" if cells else row.name
        if announce:
            context.log.info(announce(context))
        waits_seconds = () if ON_A_LAPTOP else WAITS_SECONDS
        try:
            yield from stages.materialize(context, name, root)
        except dg.Failure as failure:
            raise_for(failure, context, waits_seconds)
        except Exception as error:
            # Not the stage's: Dagster's database or a network went away meanwhile. What the stage does is found again.
            raise_for(dg.Failure(f"{type(error).__name__}: {error}"), context, waits_seconds)

    return asset


stage_assets = [stage_asset(row) for row in STAGES]
