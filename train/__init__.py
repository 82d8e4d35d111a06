"""The training program: train.main, and what there is to do with its runs."""

import os
import signal
import sys
import types


def begin() -> None:
    """Gives SIGINT its usual meaning back, once a program has imported what it needs."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(signum: int, frame: types.FrameType | None) -> None:
    os.write(2, b"Stopped by SIGINT before anything had begun.\n")
    os._exit(128 + signum)


# `python -m` imports this package first, then for seconds what the program needs. An interrupt
# would be a traceback through all of that, or be lost in an extension that is being loaded.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
