"""Processes that work for this one.

In: how many, the module whose functions they run, and what each does first. Out: an executor.
Always: they start from a process that has imported that module and done nothing else, for one that has started threads
must not be forked; Ctrl-C is answered by the process that they work for, and they end where it ends, even if it is
killed; an error there ends them at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any


class WorkerLostError(RuntimeError):
    """A process that worked for this one was killed."""

    exit_status = 1


@contextmanager
def workers(
    count: int, module: str, begin: Callable[..., None] | None = None, given: tuple[Any, ...] = ()
) -> Iterator[ProcessPoolExecutor]:
    """Context with `count` processes; at its end they finish what was submitted, after an exception they don't.

    Args:
        begin: called with `given` in every process before anything else.

    Raises:
        WorkerLostError: the result of a process that was killed was asked for.
    """
    context = multiprocessing.get_context("forkserver")
    # Of a server that runs already this changes nothing; its processes then import for themselves.
    context.set_forkserver_preload([module])
    with ProcessPoolExecutor(count, context, _begin, (dict(os.environ), begin, given)) as pool:
        try:
            yield pool
        except BaseException as error:
            # Which they are is forgotten by the shutdown.
            running = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise WorkerLostError(
                    f"one of the {count} processes of {module} was killed, most likely for want of memory; run the "
                    "same command again, with more memory or fewer CPUs"
                ) from None
            raise


def end_with_parent() -> None:
    """In a process that works for another: leave Ctrl-C to that one, and end when it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Ignored by that one, it would be ignored here, and could not end this process.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None, "this process was started by none of ours"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _begin(environment: dict[str, str], begin: Callable[..., None] | None, given: tuple[Any, ...]) -> None:
    # The server that forks may have been started under another one, with another store's address.
    os.environ.update(environment)
    end_with_parent()
    if begin is not None:
        begin(*given)
