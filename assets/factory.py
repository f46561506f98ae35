"""One Dagster asset for each row of the table of stages, with its checks, kinds, owners and code version."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from assets.dispatch import StageRunner
from valr_ops.stages import STAGES, Stage
from valr_ops.store.artifacts import project_root

OWNERS = {
    "recipe": "team:research",
    "preparation": "team:data",
    "teachers": "team:vision",
    "training": "team:training",
    "evaluation": "team:evaluation",
}
"""Who is asked about an asset; one team a group."""


def stage_asset(row: Stage) -> dg.AssetsDefinition:
    """The asset of one stage. Its body dispatches the verb; everything it shows is reported by the stage itself."""
    root = project_root()

    @dg.asset(
        name=row.name,
        deps=list(row.inputs) or ([] if row.name == "recipe" else ["recipe"]),
        group_name=row.group,
        description=f"{row.summary}\n\nBy hand: `valr run {row.name}` or `dvc repro {row.name}`.",
        kinds=set(row.kinds),
        owners=[OWNERS[row.group]],
        code_version=row.code_digest(root),
        check_specs=[
            dg.AssetCheckSpec(name=check, asset=row.name, blocking=True, description=check.replace("_", " "))
            for check in row.checks
        ],
        metadata={"recipe fields": ", ".join(row.parameters) or "all", "artifact": f"artifacts/{row.name}"},
        tags={"resources": row.resources},
    )
    def asset(context: dg.AssetExecutionContext, stages: StageRunner) -> Iterator[Any]:
        yield from stages.materialize(context, row.name, root)

    return asset


stage_assets = [stage_asset(row) for row in STAGES]
