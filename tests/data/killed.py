"""What a test sends to processes that it wants killed: a module of its own, because each of them imports it."""

import os
import signal


def dies(_: object) -> None:
    """What the system does to a process when there is no memory left."""
    os.kill(os.getpid(), signal.SIGKILL)
