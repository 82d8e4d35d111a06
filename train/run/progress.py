"""How a run is getting on: its metrics, read, checked, logged and shown, and its time."""

import dataclasses
import math
import time
from collections.abc import Mapping

import jax
from tqdm import tqdm

from train.errors import UserError
from train.experiment import Experiment
from train.step import Metrics
from train.store.metrics import MetricsLog, Record


@dataclasses.dataclass
class Clock:
    """The run's time in seconds, over all restarts, and the pace of its steps."""

    wall_before: float = 0.0
    _start: float = dataclasses.field(default_factory=time.perf_counter)
    _lap: tuple[int, float] | None = None

    def wall_seconds(self) -> float:
        return self.wall_before + time.perf_counter() - self._start

    def steps_per_second(self, step: int) -> float | None:
        """The pace since the last call; None after `pause` and at first."""
        now = time.perf_counter()
        lap, self._lap = self._lap, (step, now)
        return None if lap is None or step == lap[0] else (step - lap[0]) / (now - lap[1])

    def pause(self) -> None:
        """What comes now, an evaluation or a checkpoint, does not count."""
        self._lap = None


class MetricsReader:
    """Reads the metrics of completed steps, checks them, and logs and shows some.

    Args:
      built: the experiment.
      first: the updates that were completed before.
      log: where to write; None on the processes that don't.
      clock: the pace.
    """

    def __init__(self, built: Experiment, first: int, log: MetricsLog | None, clock: Clock):
        self._config, self._steps, self._log, self._clock = built.config, built.steps, log, clock
        self._finite = "none"
        self._progress = tqdm(
            total=built.steps.total, initial=first, unit="step", disable=log is None or None
        )

    def read(self, step: int, metrics: Metrics, evaluation: Record | None = None) -> None:
        """Waits for the metrics of a step.

        Raises:
          UserError: one is NaN or infinite.
        """
        # The shortest decimal that gives the float32 again: 0.95, not 0.949999988079071.
        values = {name: float(str(value)) for name, value in jax.device_get(metrics).items()}
        values |= evaluation or {}
        check_finite(step, values, self._finite)
        self._finite = f"{values['train/loss']:.4g} at step {step}"
        self._progress.update()
        if self._log is None or (evaluation is None and step % self._config.log_every_steps):
            return
        record = {"step": step, "epoch": step / self._steps.per_epoch} | values
        if pace := self._clock.steps_per_second(step):
            record["examples_per_second"] = pace * self._config.batch_size
        self._log.write(record)
        self._progress.set_postfix_str(headline(record))

    def close(self) -> None:
        """Ends the progress bar."""
        self._progress.close()


def check_finite(step: int, values: Mapping[str, float], last_finite: str) -> None:
    """Raises UserError if a value is NaN or infinite, with the last loss that was not."""
    for name in ("train/loss", *values):
        if not math.isfinite(values[name]):
            raise UserError(
                f"{name} became {values[name]} at step {step} (the last finite train/loss: "
                f"{last_finite}); the checkpoints before it are kept: try a lower "
                "config.learning_rate, a longer config.warmup_epochs or a smaller "
                "config.clip_norm, in a new --workdir."
            )


def headline(record: Record) -> str:
    """A record in one short line."""
    parts = {
        "loss": ("train/loss", ".3f"),
        "acc": ("train/accuracy", ".1%"),
        "eval": ("eval/accuracy", ".2%"),
        "sparsity": ("sparsity", ".1%"),
        "ex/s": ("examples_per_second", ",.0f"),
    }
    return " ".join(
        f"{label} {record[key]:{spec}}" for label, (key, spec) in parts.items() if key in record
    )
