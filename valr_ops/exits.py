"""Exit statuses of the verbs, and which error ends with which.

In: an error. Out: a status by which a shell, DVC, Dagster and Kubernetes tell what a retry can do. An error may say its
own (`exit_status`). Always: an error of this project is one that a person has to mend, unless it says otherwise.
"""

from __future__ import annotations

EXIT_REFUSED = 3
"""The gate refused a challenger, or a bundle did not pass."""
EXIT_CONFIGURATION = 42
"""A configuration or data problem, which a retry can't mend."""
EXIT_AT_CHECKPOINT = 75
"""EX_TEMPFAIL: stopped at a checkpoint; the same command goes on."""
EXIT_INTERRUPTED = 130


def is_ours(error: BaseException) -> bool:
    """Whether the error is one of this project, whose message says what, where and how to mend it."""
    return type(error).__module__.startswith("valr_ops")


def exit_status(error: BaseException) -> int:
    """The status of a verb that ends with `error`."""
    return int(getattr(error, "exit_status", EXIT_CONFIGURATION if is_ours(error) else 1))
