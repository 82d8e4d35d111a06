"""The program, with a signal to itself: `python fault.py SIGKILL 20 --config ...`.

It comes when the metrics of that step are read, or, for the name of a file instead of a step, when
that file has been written and is about to take its name.
"""

import os
import signal
import sys

from train import main
from train.run import cluster, journal


def send_at(signum: int, step: str) -> None:
    """Sends `signum` to this process at `step`."""
    if not step.isdecimal():
        replace = os.replace

        def replace_after_the_signal(source, target):
            if os.path.basename(target) == step:
                signal.raise_signal(signum)
            replace(source, target)

        os.replace = replace_after_the_signal
        return
    read = journal.Journal.read

    def read_after_the_signal(self, number, metrics, evaluation=None):
        if number == int(step):
            signal.raise_signal(signum)
        return read(self, number, metrics, evaluation)

    journal.Journal.read = read_after_the_signal


if __name__ == "__main__":
    cluster.HEARTBEAT_SECONDS = 10
    send_at(signal.Signals[sys.argv[1]], sys.argv[2])
    sys.exit(main.main(sys.argv[2:]))
