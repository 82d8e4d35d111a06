"""Where a program's time goes: by step, in multiply-accumulates a second, against the peak."""

import dataclasses
import functools
import time
from collections.abc import Callable

import numpy as np

from feather_jax.cpu.machine_code import allocate, assemble, emit_peak, link
from feather_jax.cpu.plan import Plan, Step, describe
from feather_jax.cpu.target import Target
from feather_jax.summary import format_table


@dataclasses.dataclass(frozen=True)
class Profile:
    """Times of a program's steps. `str` gives a table.

    Attributes:
      steps: the plan's.
      seconds: of each step in all turns, the median of several runs.
      peak: multiply-accumulates a second of the cores that took part, measured from registers.
      turns: how often the steps are done.
    """

    steps: tuple[Step, ...]
    seconds: tuple[float, ...]
    peak: float
    turns: int

    @property
    def total(self) -> float:
        """Seconds of all steps."""
        return sum(self.seconds)

    def __str__(self) -> str:
        cells = [
            (step.layer, describe(step.kernel), self.turns * step.macs, seconds)
            for step, seconds in zip(self.steps, self.seconds, strict=True)
        ]
        cells.append(("all", "", sum(macs for _, _, macs, _ in cells), self.total))
        rows = [
            (
                layer,
                kernel,
                f"{1e6 * seconds:,.1f}",
                f"{seconds / self.total:.1%}" if self.total else "",
                f"{macs / seconds / 1e9:.1f}" if macs and seconds else "",
                f"{macs / seconds / self.peak:.0%}" if macs and seconds else "",
            )
            for layer, kernel, macs, seconds in cells
        ]
        return format_table(("layer", "kernel", "µs", "time", "GMAC/s", "of peak"), rows)


def profile(
    run: Callable[[np.ndarray], None], plan: Plan, target: Target, seconds: float = 0.5
) -> Profile:
    """Runs a program for a while.

    Args:
      run: runs it and writes the clock before its first step and after each of every turn, int64.
      plan: the program's.
      target: the machine.
      seconds: for how long, after a first run that is not counted.
    """
    stamps = np.zeros(len(plan.steps) * plan.turns + 1, np.int64)
    run(stamps)
    runs: list[np.ndarray] = []
    stop = time.perf_counter() + seconds
    while len(runs) < 3 or (time.perf_counter() < stop and len(runs) < 1000):
        begin = time.perf_counter()
        run(stamps)
        wall = time.perf_counter() - begin
        ticks = np.diff(stamps).reshape(plan.turns, -1).sum(0)
        runs.append(ticks * (wall / max(1, ticks.sum())))
    median = np.median(runs, axis=0)
    peak = plan.threads * measure_peak(target)
    return Profile(plan.steps, tuple(median.tolist()), peak, plan.turns)


@functools.cache
def measure_peak(target: Target, turns: int = 100_000) -> float:
    """Multiply-accumulates a second of one core, the best of some runs."""
    code = assemble(emit_peak(target), target, jit=True)
    function = link(code, "peak", 2, target)
    memory = allocate(1 << 14)
    best = float("inf")
    for _ in range(7):
        begin = time.perf_counter()
        function(memory.ctypes.data, turns)
        best = min(best, time.perf_counter() - begin)
    return 64 * turns * target.lanes / best
