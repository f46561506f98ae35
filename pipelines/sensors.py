"""Sensors: new data in a source and a report that got old ask for a retraining; a failed run tells people.

Always: one run for one change and none for the same again; data that are still being written are waited for; nothing
is asked for before a person made the first report; stopped until ``VALR_AUTOMATION=on`` or a person starts them on
Dagster's page.
"""

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import dagster as dg

# Dagster hands it out and does not export it.
from dagster._utils.error import SerializableErrorInfo

from assets.factory import FRESH, REPORT, project_recipe
from pipelines import notifying
from pipelines.jobs import everything
from pipelines.schedules import AUTOMATIC, WHY
from valr_ops.exits import EXIT_CONFIGURATION
from valr_ops.recipe.recipe import Recipe
from valr_ops.store.artifacts import folder, project_root
from valr_ops.store.objects import Files, is_remote, open_files

_STATUS = dg.DefaultSensorStatus.RUNNING if AUTOMATIC else dg.DefaultSensorStatus.STOPPED
_SECONDS_BETWEEN_LOOKS = 300
_LOOKS_AT_A_TIME = 16
_READ_BYTES = 4 * 2**30
"""A sensor has a minute. Changed files of more than that are not read to see whether their content differs."""
_WHY_CHARACTERS = 250
_WILL_RETRY = "dagster/will_retry"


@dg.sensor(
    job=everything,
    minimum_interval_seconds=_SECONDS_BETWEEN_LOOKS,
    default_status=_STATUS,
    description="Asks for a retraining when files of a given source or protected benchmark are other ones.",
)
def new_data(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    """One run for each change of the folders and prefixes that the recipe names.

    The cursor holds the stamp at the last look, the one that was last answered, and the number of answers.
    """
    root, recipe = project_root(), project_recipe()
    if recipe is None:
        return dg.SkipReason("the recipe is wrong: `valr plan` says where")
    if not _given(recipe):
        return dg.SkipReason("every source is drawn; give one by data.sources.NAME.path for new data to arrive")
    if not (folder(root, "sources") / "inventory.json").is_file():
        return dg.SkipReason("nothing was made yet; the first run is a person's: valr materialize +report")
    cursor = json.loads(context.cursor or "{}")
    stamp, size = _stamp(recipe)
    if stamp == cursor.get("answered"):
        return dg.SkipReason("the sources are as they were")
    if stamp != cursor.get("seen"):
        context.update_cursor(json.dumps(cursor | {"seen": stamp}))
        return dg.SkipReason("the sources are others than at the last look; it counts if they still are at the next")
    # First the question, so that an error leaves the cursor as it is.
    if size > _READ_BYTES:
        why: str | None = f"files of the sources changed ({size / 1e9:.0f} GB, too much to compare here)"
    else:
        from valr_ops.data.inventory import changed_sources

        why = changed_sources(recipe, folder(root, "sources"))
    answers = cursor.get("answers", 0) + 1
    context.update_cursor(json.dumps({"seen": stamp, "answered": stamp, "answers": answers}))
    if why is None:
        return dg.SkipReason("files were written again with the content that they had")
    return dg.RunRequest(run_key=f"{answers}-{stamp}", tags={WHY: why[:_WHY_CHARACTERS]})


def _given(recipe: Recipe) -> dict[str, str]:
    """Locations of what the user gave, by field."""
    sources = {f"data.sources.{name}": source.path for name, source in recipe.data.sources.items()}
    benchmarks = {f"data.benchmarks.{name}": one.path for name, one in recipe.data.benchmarks.items()}
    return {field: path for field, path in (sources | benchmarks).items() if path is not None}


def _stamp(recipe: Recipe) -> tuple[str, int]:
    """A digest of names, sizes and times or entity tags of all given files, and the bytes of those on this machine.

    Raises:
        StorageError: a location that can't be listed, or a file that went away meanwhile.
    """
    digest, local_bytes = hashlib.sha256(), 0
    for field, location in sorted(_given(recipe).items()):
        files, names = _files(location)
        with ThreadPoolExecutor(_LOOKS_AT_A_TIME) as threads:
            stamps = list(threads.map(files.stamp, names))
        for name, stamp in zip(names, stamps, strict=True):
            digest.update(f"{field} {name} {stamp.size} {stamp.version}\n".encode())
        local_bytes += 0 if is_remote(location) else sum(stamp.size for stamp in stamps)
    return digest.hexdigest()[:16], local_bytes


def _files(location: str) -> tuple[Files, list[str]]:
    """What is looked at: everything below a location; of a file of records only the file, whose lines name the rest."""
    if is_remote(location):
        files = open_files(location)
        return files, files.names()
    path = Path(location).expanduser()
    if path.is_file():
        return open_files(path.parent), [path.name]
    return open_files(path), open_files(path).names()


@dg.sensor(
    job=everything,
    minimum_interval_seconds=3600,
    default_status=_STATUS,
    description=f"Asks for a retraining when the report is older than {FRESH.days} days.",
)
def stale_report(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    """One run for each report that got too old: if that run fails, people decide, and nothing is asked for again."""
    event = context.instance.get_latest_materialization_event(dg.AssetKey(REPORT))
    if event is None:
        return dg.SkipReason("there is no report yet; the first run is a person's: valr materialize +report")
    # Not below zero where the clock was put back.
    age = max(timedelta(0), timedelta(seconds=time.time() - event.timestamp))
    if age <= FRESH:
        return dg.SkipReason(f"the report is {age.days} days old; a new one is asked for after {FRESH.days}")
    return dg.RunRequest(
        run_key=f"{event.run_id}-{event.timestamp:.0f}", tags={WHY: f"the report is {age.days} days old"}
    )


@dg.run_failure_sensor(
    default_status=_STATUS,
    minimum_interval_seconds=30,
    description="Tells people of a failed run: by a webhook as Slack's, by mail, or both (VALR_NOTIFY_...).",
)
def failed_run(context: dg.RunFailureSensorContext) -> dg.SkipReason | None:
    """A message to each receiver that the environment names; none for a run that Dagster starts again by itself."""
    run = context.dagster_run
    if run.tags.get(_WILL_RETRY) == "true":
        return dg.SkipReason("Dagster starts this run again by itself")
    receivers = notifying.receivers()
    if not receivers:
        return dg.SkipReason("nobody is to be told: neither VALR_NOTIFY_WEBHOOK nor VALR_NOTIFY_SMTP is set")
    notifying.send(_notice(context), receivers)
    context.log.info(f"told {' and '.join(receiver.name for receiver in receivers)}")
    return None


def _cause(error: SerializableErrorInfo | None) -> str | None:
    """The first line of what went wrong first: Dagster's own errors only say that something did."""
    while error and error.cause:
        error = error.cause
    return error.message.strip().splitlines()[0] if error else None


def _notice(context: dg.RunFailureSensorContext) -> notifying.Notice:
    run, failed = context.dagster_run, context.get_step_failure_events()
    link = f"{os.environ.get('VALR_DAGSTER_URL', 'http://127.0.0.1:3000').rstrip('/')}/runs/{run.run_id}"
    if not failed:
        return notifying.Notice(
            f"The run {run.run_id[:8]} ({run.job_name}) ended before a step could: {context.failure_event.message}",
            "Launch it again: what is made is found, and a training goes on from its last checkpoint",
            link,
        )
    step = failed[0]
    data = step.step_failure_data
    said = data.user_failure_data.description if data.user_failure_data else None
    said = said or _cause(data.error) or step.message
    status = (data.user_failure_data.metadata if data.user_failure_data else {}).get("exit_status")
    more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    stage = f"{step.step_key}{f'@{context.partition_key}' if context.partition_key else ''}"
    advice = (
        f"Correct what it says, then materialize {stage} again; what is made is not made twice"
        if status is not None and status.value == EXIT_CONFIGURATION
        else f"Read the step's log, then materialize {stage} again; a training goes on from its last checkpoint"
    )
    return notifying.Notice(f"{stage}{more} failed: {said}", advice, link)
