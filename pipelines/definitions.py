"""The only `Definitions`: assets from the table of stages, jobs, what starts them, and how stages are run.

Loading this imports neither torch nor transformers, mlflow or great_expectations: every process that Dagster starts
loads it, so it has to be quick.
"""

import dagster as dg

from assets.ablation import ablation as ablation_asset
from assets.dispatch import StageRunner
from assets.factory import IN_CLUSTER, stage_assets
from assets.promotion import promotion
from pipelines.jobs import ablation, corpus, everything
from pipelines.launching import keep_looking
from pipelines.schedules import weekly
from pipelines.sensors import failed_run, new_data, stale_report

keep_looking()

STEPS_AT_ONCE = 8 if IN_CLUSTER else 2
"""Of one run. What waits for a Job takes 0.2 GB here and nothing else; the cluster's quota says how many Jobs run."""

PRELOADED = [
    "pipelines.definitions",
    "dagster._core.storage.sqlite_storage",
    "dagster._core.storage.root",
    "upath.core",
]
"""What each step needs, imported once in the process that they are forked from: without the storage, SQLAlchemy and
Alembic in it, a step takes 1 s longer. Where one of them is not there any more, the step imports what it needs."""

defs = dg.Definitions(
    assets=[*stage_assets, ablation_asset, promotion],
    jobs=[everything, corpus, ablation],
    schedules=[weekly],
    sensors=[new_data, stale_report, failed_run],
    resources={"stages": StageRunner()},
    executor=dg.multiprocess_executor.configured(
        {"max_concurrent": STEPS_AT_ONCE, "start_method": {"forkserver": {"preload_modules": PRELOADED}}}
    ),
)
