"""torchrun for one Pod of several, with an exit status that says how its ranks ended.

In: torchrun's own arguments. Out: the ranks' work. torchrun ends with status 1 whatever its ranks ended with, and then
neither the rules of the Job nor who waits for it could tell a wrong recipe from a full node or a checkpoint.
Always: the status is that of the rank whose end explains the others'; a signal that killed one is named, its number
added to 128 as a shell does; a Pod that was told to stop tells its ranks, waits for them, and asks to be gone on with.
"""

import signal
import sys
from collections.abc import Sequence
from types import FrameType

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from valr_ops.exits import EXIT_AT_CHECKPOINT


def main(arguments: Sequence[str]) -> int:
    """Run torchrun with these arguments, and return the exit status of the Pod."""
    # The first process of a container has no handlers but its own, and torchrun has none until its Pods have met.
    signal.signal(signal.SIGTERM, _stop)
    try:
        torchrun.run(torchrun.parse_args(list(arguments)))
    except SignalException:
        return EXIT_AT_CHECKPOINT
    except ChildFailedError as error:
        # A rank that is killed takes its peers with it, which then can't reach it; one that stopped was told to.
        rank, failure = min(error.failures.items(), key=lambda one: _rank_of_cause(one[1]))
        if failure.exitcode > 0:
            return failure.exitcode
        print(f"valr: rank {rank} was killed by {signal.Signals(-failure.exitcode).name}", file=sys.stderr, flush=True)
        return 128 - failure.exitcode
    return 0


def _rank_of_cause(failure: ProcessFailure) -> tuple[bool, bool, int]:
    return failure.exitcode > 0, failure.exitcode == EXIT_AT_CHECKPOINT, failure.timestamp


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(EXIT_AT_CHECKPOINT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
