"""What a run tells while it goes: lines for people, metrics, a progress bar, its time."""

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Mapping

import jax
from tqdm import tqdm

import feather_jax as feather
from train import parallel
from train.config import Config, Steps
from train.errors import UserError
from train.step import Metrics
from train.store.metrics import MetricsLog, Record


class Journal:
    """Metrics, read, checked, logged and shown; on the processes but the first, only checked.

    Args:
      workdir: the run's folder.
      config: how often to log, and the size of a batch.
      steps: the durations.
      first: the updates that were completed before.
      say: takes a line meant for people.

    Raises:
      UserError: metrics.jsonl is damaged.
      StorageError: the folder cannot be written.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        config: Config,
        steps: Steps,
        first: int,
        say: Callable[[str], None],
    ):
        self._config, self._steps, self.say = config, steps, say
        self._log = MetricsLog(workdir, first) if parallel.is_first() else None
        self._bar = tqdm(
            total=steps.total, initial=first, unit="step", disable=None if self._log else True
        )
        self._last_finite = "none"
        self._starved: set[str] = set()
        self._lap: tuple[int, float] | None = None

    @property
    def records(self) -> list[Record]:
        """All that was logged, over all restarts."""
        return self._log.records if self._log else []

    def read(self, step: int, metrics: Metrics, evaluation: Record | None = None) -> None:
        """Waits for the metrics of a step, and logs those that are asked for.

        Raises:
          UserError: one is NaN or infinite.
        """
        # The shortest decimal that gives the float32 again: 0.95, not 0.949999988079071.
        values = {name: float(str(value)) for name, value in jax.device_get(metrics).items()}
        values |= evaluation or {}
        check_finite(step, values, self._last_finite)
        self._last_finite = f"{values['train/loss']:.4g} at step {step}"
        self._bar.update()
        if self._log is None or (evaluation is None and step % self._config.log_every_steps):
            return
        record = {"step": step, "epoch": step / self._steps.per_epoch} | values
        if pace := self._steps_per_second(step):
            record["examples_per_second"] = pace * self._config.batch_size
        self._log.write(record)
        self._bar.set_postfix_str(headline(record))

    def warn_of_starved(self, step: int, summary: feather.Summary) -> None:
        """Says which layers have come to be pruned whole or nearly, each layer once."""
        layers = tuple(each for each in summary.starved if each.name not in self._starved)
        self._starved |= {each.name for each in layers}
        for note in dataclasses.replace(summary, layers=layers).notes:
            self.say(f"After step {step}: {note}")

    def pause(self) -> None:
        """What was just done, an evaluation or a checkpoint, does not count as the steps' time."""
        self._lap = None

    def sync(self) -> None:
        """Sees to it that all that was logged is on disk.

        Raises:
          StorageError: it is not.
        """
        if self._log:
            self._log.sync()

    def close(self) -> None:
        """Ends the progress bar and closes the files."""
        self._bar.close()
        if self._log:
            self._log.close()

    def _steps_per_second(self, step: int) -> float | None:
        """The pace since the last call; None after `pause` and at first."""
        now = time.perf_counter()
        lap, self._lap = self._lap, (step, now)
        return None if lap is None or step == lap[0] else (step - lap[0]) / (now - lap[1])


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
