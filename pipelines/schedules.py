"""Schedules: a retraining once a week, of everything up to the report.

What is up to date is not done again, so that a week without news costs a minute. The checks of each stage stop what
is below it: data that fail an expectation reach no model.
Always: stopped until ``VALR_AUTOMATION=on`` or a person starts it on Dagster's page.
"""

import os

import dagster as dg

from pipelines.jobs import everything

AUTOMATIC = os.environ.get("VALR_AUTOMATION", "off") == "on"
"""Whether schedules and sensors run from the start."""

WHY = "valr/why"
"""Tag of a run that no person asked for: the reason. The Dagster instance lets one such run go at a time."""

weekly = dg.ScheduleDefinition(
    name="weekly",
    job=everything,
    cron_schedule="0 2 * * 1",
    execution_timezone="UTC",
    tags={WHY: "the week is over"},
    default_status=dg.DefaultScheduleStatus.RUNNING if AUTOMATIC else dg.DefaultScheduleStatus.STOPPED,
    description="Monday, 02:00 UTC: from the sources to the report.",
)
