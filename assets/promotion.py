"""The asset `promotion`: the challenger before the gate, each time that the pipeline has scored it.

In: the scores of the recipe's challenger, and those of the baseline that stands in for a champion while there is none.
Out: the model as a version of the registry with the alias `challenger`, the gate's decision in ``.valr/decisions`` and
in MLflow, and its page, reasons and version on the asset.
Always: the alias `champion` moves only where ``release.automatic`` is on and the gate lets the challenger through; a
refusal is a result and not a failure. No row of the table of stages and no DVC stage: what is decided depends on who is
champion in the registry, so the same scores need not give the same decision twice.
"""

import json
import os
import subprocess
import sys
from typing import Any

import dagster as dg

from assets.factory import ON_A_LAPTOP, RECIPE, project_recipe
from assets.retrying import WAITS_SECONDS, raise_for
from valr_ops.exits import EXIT_CONFIGURATION, EXIT_REFUSED
from valr_ops.recipe.recipe import ReleaseRecipe
from valr_ops.store.artifacts import project_root

_RULE = RECIPE.release if RECIPE else ReleaseRecipe()
_WAITS_SECONDS = () if ON_A_LAPTOP else WAITS_SECONDS


@dg.asset(
    deps=[f"scores_{model}" for model in (_RULE.challenger, _RULE.baseline) if model],
    group_name="release",
    kinds={"mlflow"},
    owners=["team:release"],
    description="Whether the newest model may become champion, and that it does where release.automatic is on.\n\n"
    "By hand: `valr release promote`; `valr release show` and `valr release rollback` for what became of it.",
)
def promotion(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
    """Let ``valr release promote`` decide, in a process of its own as a stage has, and show what it says."""
    recipe = project_recipe()
    automatic = recipe is not None and recipe.release.automatic
    command = [sys.executable, "-m", "valr_ops", "release", "promote", *([] if automatic else ["--propose"])]
    done = subprocess.run(
        command,
        cwd=project_root(),
        env={**os.environ, "VALR_DAGSTER_RUN_ID": context.run.run_id},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, EXIT_REFUSED):
        raise_for(_failure(done), context, _WAITS_SECONDS)
    page, _, last_line = done.stdout.strip().rpartition("\n")
    context.log.info(page.rpartition("\n")[2])
    said = json.loads(last_line)
    metadata: dict[str, Any] = {name: said[name] for name in ("version", "promotes", "moved")}
    if said["decision"]:
        remarks = [*said["reasons"], *said["too_few"]]
        metadata["decision"] = dg.MetadataValue.md(page)
        metadata["reasons"] = dg.MetadataValue.md("\n".join(f"- {remark}" for remark in remarks) or "none")
    if said.get("url"):
        metadata["MLflow"] = dg.MetadataValue.url(said["url"])
    return dg.MaterializeResult(metadata=metadata)


def _failure(done: subprocess.CompletedProcess[str]) -> dg.Failure:
    """The verb's own sentence; a retry is allowed only where it can help."""
    sentence = done.stderr.strip().rpartition("valr: ")[2] or f"valr release promote ended with {done.returncode}"
    return dg.Failure(
        description=sentence,
        metadata={"stage": "promotion", "exit_status": done.returncode},
        allow_retries=done.returncode != EXIT_CONFIGURATION,
    )
