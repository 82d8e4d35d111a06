"""Finished runs, as records: what their folders hold, and in what their configurations differ."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from train import config as config_lib
from train.config import RESUMABLE, Config, flat
from train.errors import UserError
from train.store.metrics import Record, read_records

_SUMMARY = (
    *("steps", "parameters", "prunable", "nonzero", "sparsity"),
    *("eval/accuracy", "eval/loss", "eval/examples", "wall_seconds"),
)

# What makes no difference to what is compared, and what a dense run has no use for.
_NOT_COMPARED = ("seed", "sparsity", *RESUMABLE)
_PRUNING = ("prune_begin", "prune_end", "p", "theta", "backbone", "block", "exclude")


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
      workdir: its folder.
      config: its configuration.
      summary: what summary.json holds.
      records: the lines of metrics.jsonl.
    """

    workdir: pathlib.Path
    config: Config
    summary: Record
    records: list[Record]

    @property
    def model_bytes(self) -> int:
        """The size of model.npz; 0 if it is not there any more."""
        path = self.workdir / "model.npz"
        return path.stat().st_size if path.is_file() else 0

    @property
    def dense(self) -> bool:
        """Whether it was trained without pruning."""
        return not self.config.sparsity

    @property
    def title(self) -> str:
        """The network, the data set and the sparsity."""
        what = "dense" if self.dense else f"{100 * self.summary['sparsity']:.3g} % sparse"
        return f"{self.config.model['name']} on {self.config.data['name']}, {what}"

    @property
    def density(self) -> float:
        """The fraction of the prunable weights that is not zero; 1 for a dense run."""
        return 1.0 if self.dense else self.summary["nonzero"] / self.summary["prunable"]

    @property
    def accuracy(self) -> float:
        """Of the finalised model on the evaluation split."""
        return self.summary["eval/accuracy"]


def read_run(workdir: pathlib.Path) -> Run:
    """Reads a finished run.

    Raises:
      UserError: there is none, it is not finished, or a file of it is damaged.
    """
    values = _read_json(workdir / "config.json")
    if values is None:
        raise UserError(f"{workdir} holds no run; give the --workdir of a train.main.")
    try:
        config = config_lib.parse(values)
    except UserError as error:
        raise UserError(f"{workdir / 'config.json'} is damaged: {error}") from error
    summary = _read_json(workdir / "summary.json")
    records = read_records(workdir)
    if summary is None:
        step = records[-1]["step"] if records else 0
        raise UserError(
            f"{workdir} is not finished (its last line of metrics is of step {step}); start it "
            "again to go on."
        )
    for name in _SUMMARY:
        if type(summary.get(name)) not in (int, float):
            raise UserError(f"{workdir / 'summary.json'} lacks {name}; bring back a copy.")
    return Run(workdir, config, summary, records)


def _read_json(path: pathlib.Path) -> dict[str, Any] | None:
    """The object in a file; None without the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); bring back a copy.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; bring back a copy.")
    return value


def differences(runs: Sequence[Run]) -> list[str]:
    """The fields in which runs that have a use for them differ, by dotted names.

    The seed, the sparsity and what may change between two starts are none of them, and a dense run
    has no use for the fields of pruning.
    """
    fields = [flat(run.config.as_dict()) for run in runs]

    def values(name: str) -> set[str]:
        owners = (own for run, own in zip(runs, fields, strict=True) if uses(run, name))
        return {json.dumps(own.get(name)) for own in owners}

    return [name for name in dict.fromkeys(itertools.chain(*fields)) if len(values(name)) > 1]


def uses(run: Run, name: str) -> bool:
    """Whether a field, by its dotted name, makes a difference to what a run is compared by."""
    return name not in _NOT_COMPARED + (_PRUNING if run.dense else ())
