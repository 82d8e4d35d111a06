"""SIGINT and SIGTERM as a wish to stop at the next step boundary, on all processes together."""

import signal
import threading
import types
from typing import Self

import jax
from jax.experimental import multihost_utils

from train import parallel


class Interrupted(Exception):
    """The run was asked to stop, and its state is saved.

    Attributes:
      signum: the signal's number.
      step: the updates completed.
    """

    def __init__(self, signum: int, step: int):
        name = signal.Signals(signum).name
        super().__init__(
            f"Stopped by {name} after step {step}, which is saved; the same command goes on."
        )
        self.signum, self.step = signum, step


class Interruption:
    """Notes SIGINT and SIGTERM while it is entered; a second SIGINT leaves at once.

    In another thread than the main one, as a tuner or a notebook's agent runs it, it notes none.

    With several processes, JAX's preemption service listens to SIGTERM (and to what else the
    platform has for a notice), tells all of them, and makes out a step that none has passed. A
    SIGINT is handed to it as well.
    """

    def __init__(self) -> None:
        self._signum = 0

    def __enter__(self) -> Self:
        several = jax.process_count() > 1
        noted = [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]
        if threading.current_thread() is not threading.main_thread():
            noted = []  # Python has the main thread alone listen: it is whose signals these are
        self._before = {number: signal.signal(number, self._note) for number in noted}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def signal_after(self, step: int) -> int:
        """The number of the signal for which the run is to stop after `step`, 0 to go on.

        Every process has to ask after every step, and all get the same answer.
        """
        if jax.process_count() == 1:
            return self._signum
        if not multihost_utils.reached_preemption_sync_point(step):
            return 0
        return signal.SIGINT if signal.SIGINT in parallel.gather(self._signum) else signal.SIGTERM

    def _note(self, signum: int, frame: types.FrameType | None) -> None:
        if self._signum and signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self._signum = self._signum or signum
        if jax.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)
