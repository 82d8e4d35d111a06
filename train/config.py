"""What a configuration may say, and the checks that every one passes before anything is built."""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from train.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment: plain data, all of which `config.json` holds.

    A file under `configs/` gives the fields that make its recipe, and the others have these
    defaults. Durations are in epochs of the data set, and `Steps` turns them into updates.

    Attributes:
      data: the data set and its preprocessing, by name (see `train.data.load`).
      model: the network, by name, with its options (see `train.models.build`).
      batch_size: examples in one update, over all devices and processes.
      epochs: how long to train.
      learning_rate: the highest learning rate; it falls to 0 along a cosine.
      sparsity: the final fraction of zeros, in [0, 1); 0 trains the dense twin without Feather.
      prune_begin: the epoch at which sparsity begins to grow.
      prune_end: the epoch at which it is reached; None for half of all epochs.
      p: the exponent of the thresholding operator.
      theta: the scale of pruned weights' gradients; None for `feather_jax.default_theta`.
      exclude: regular expressions over parameter paths such as `Dense_0/kernel`; a parameter that
        one of them matches in full stays dense.
      optimizer: "sgd" or "adamw".
      momentum: SGD's momentum, AdamW's b1.
      nesterov: Nesterov's momentum, in SGD.
      b2: AdamW's decay of the squared gradients.
      weight_decay: on kernels alone; added to the gradient in SGD, decoupled in AdamW.
      clip_norm: the largest global norm of the gradient; 0 for no clipping.
      warmup_epochs: how long the learning rate rises from 0.
      label_smoothing: in [0, 1).
      accumulate_steps: an update's examples are taken in this many parts, one after the other.
      compute_dtype: "float32", "bfloat16" (weights are float32 in either), or "float64", weights
        included, where JAX_ENABLE_X64=1 is in the environment.
      seed: of the initial weights, the order of examples and the augmentation.
      init_from: a workdir or a model file whose variables training starts from; "" for none.
      log_every_steps: how often a line of metrics is written.
      eval_every_epochs: how often the model is evaluated; it is at the end in any case.
      checkpoint_every_steps: how often the state is saved; it is at the end in any case.
      keep_checkpoints: how many of the newest checkpoints are kept.
    """

    data: Mapping[str, Any]
    model: Mapping[str, Any]
    batch_size: int
    epochs: float
    learning_rate: float
    sparsity: float
    prune_begin: float = 0.0
    prune_end: float | None = None
    p: float = 3.0
    theta: float | None = None
    exclude: tuple[str, ...] = ()
    optimizer: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    b2: float = 0.999
    weight_decay: float = 0.0
    clip_norm: float = 3.0
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    accumulate_steps: int = 1
    compute_dtype: str = "float32"
    seed: int = 0
    init_from: str = ""
    log_every_steps: int = 10
    eval_every_epochs: float = 1.0
    checkpoint_every_steps: int = 1000
    keep_checkpoints: int = 3

    @property
    def prune_end_epoch(self) -> float:
        """`prune_end`, with its default."""
        return self.epochs / 2 if self.prune_end is None else self.prune_end

    def as_dict(self) -> dict[str, Any]:
        """The configuration as JSON has it: dicts, lists, strings and numbers, and p "inf"."""
        values = plain(dataclasses.asdict(self))
        return values | {"p": "inf"} if math.isinf(self.p) else values


RESUMABLE = ("log_every_steps", "eval_every_epochs", "checkpoint_every_steps", "keep_checkpoints")
"""The fields that may change between two starts with one workdir."""

_at_least_0 = (lambda value: value >= 0, "must be at least 0")
_at_least_1 = (lambda value: value >= 1, "must be at least 1")
_positive = (lambda value: value > 0, "must be above 0")
_fraction = (lambda value: 0 <= value < 1, "must be in [0, 1)")

_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "batch_size": _at_least_1,
    "epochs": _positive,
    "learning_rate": _positive,
    "sparsity": (
        lambda value: 0 <= value < 1,
        "must be in [0, 1): it is the fraction of zeros, so that 0.9 prunes 90 %",
    ),
    "prune_begin": _at_least_0,
    "prune_end": _at_least_0,
    "p": (lambda value: value >= 1, "must be in [1, inf]: 1 is soft thresholding, inf is hard"),
    "theta": _at_least_0,
    "optimizer": (lambda value: value in ("sgd", "adamw"), "must be 'sgd' or 'adamw'"),
    "momentum": _fraction,
    "b2": _fraction,
    "weight_decay": _at_least_0,
    "clip_norm": _at_least_0,
    "warmup_epochs": _at_least_0,
    "label_smoothing": _fraction,
    "accumulate_steps": _at_least_1,
    "compute_dtype": (
        lambda value: value in ("float32", "bfloat16", "float64"),
        "must be 'float32', 'bfloat16' or 'float64'",
    ),
    "seed": (lambda value: 0 <= value < 2**32, "must be in [0, 2**32)"),
    "log_every_steps": _at_least_1,
    "eval_every_epochs": _positive,
    "checkpoint_every_steps": _at_least_1,
    "keep_checkpoints": _at_least_1,
}


def parse(values: Mapping[str, Any]) -> Config:
    """A checked `Config` from what a config file gave.

    Args:
      values: a mapping such as an `ml_collections.ConfigDict`.

    Raises:
      UserError: a field is unknown, missing, of another type or out of its range.
    """
    given = checked_plain(values)
    fields = {field.name: field for field in dataclasses.fields(Config)}
    for name in given:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"the nearest is {close[0]!r}" if close else f"known are {', '.join(fields)}"
            raise UserError(f"config.{name} is not a field of the configuration; {hint}.")
    for name, field in fields.items():
        if name not in given and field.default is dataclasses.MISSING:
            raise UserError(f"The configuration lacks the field {name!r}; give config.{name}.")
    hints = typing.get_type_hints(Config)
    config = Config(**{name: _coerce(name, value, hints[name]) for name, value in given.items()})
    _check(config)
    return config


def checked_plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """`plain(values)`, all of whose keys are strings.

    Raises:
      UserError: a key is not, a value holds itself, or is a placeholder.
    """
    try:
        given = plain(values)
    except RecursionError as error:
        raise UserError(
            "The configuration holds itself; give values that JSON can hold."
        ) from error
    except TypeError as error:  # ml_collections sorts keys
        raise UserError(
            f"The configuration has keys of several types ({error}); give it names, which are "
            "strings."
        ) from error
    except ml_collections.config_dict.RequiredValueError as error:
        raise UserError(
            "The configuration has a required_placeholder; give a value in its place, or leave the "
            "field out of the file and give --config.FIELD=VALUE."
        ) from error
    _check_keys("config", given)
    return given


def _check_keys(path: str, value: Any) -> None:
    """Raises UserError where a mapping within `value` has a key that is no string."""
    if isinstance(value, list):
        for item in value:
            _check_keys(path, item)
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                raise UserError(f"{path} has the key {name!r}; give it names, which are strings.")
            _check_keys(f"{path}.{name}", item)


def plain(value: Any) -> Any:
    """`value` with mappings as dicts and sequences as lists, which is how JSON has them."""
    if isinstance(value, Mapping) or hasattr(value, "to_dict"):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _coerce(name: str, value: Any, kind: Any) -> Any:
    """`value` as the field's type: an int will do for a float, a list for a tuple."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and types.NoneType in kinds:
        return None
    kind = kinds[0]
    if name == "p" and value == "inf":  # JSON has no infinity
        return math.inf
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    if kind == tuple[str, ...]:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise UserError(
            f"config.{name} is {value!r}, and it must be a tuple of strings, "
            f"as in --config.{name}=\"('Dense_0/kernel',)\"."
        )
    if kind == Mapping[str, Any]:
        if isinstance(value, dict) and isinstance(value.get("name"), str):
            return value
        raise UserError(
            f"config.{name} is {value!r}, and it must be a mapping with the key 'name', "
            'as in {"name": ...}.'
        )
    raise UserError(
        f"config.{name} is {value!r}, of type {type(value).__name__}, and it must be of type "
        f"{kind.__name__}; correct it in the config file or with --config.{name}=..."
    )


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration with the fields of its mappings by dotted names, as on the command line."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[f"{prefix}{name}"] = value
    return fields


def _check(config: Config) -> None:
    for name, (holds, what) in _RULES.items():
        value = getattr(config, name)
        if value is None:
            continue
        if name != "p" and isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.{name} is {value!r}, and it must be a finite number.")
        if not holds(value):
            raise UserError(f"config.{name} is {value!r}, and it {what}.")
    for pattern in config.exclude:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"config.exclude holds {pattern!r}, which is no regular expression ({error}); "
                "correct it or quote its special characters with a backslash."
            ) from error
    if config.batch_size % config.accumulate_steps:
        raise UserError(
            f"config.batch_size is {config.batch_size}, which config.accumulate_steps = "
            f"{config.accumulate_steps} does not divide; choose a multiple."
        )
    if config.warmup_epochs >= config.epochs:
        raise UserError(
            f"config.warmup_epochs is {config.warmup_epochs}, and it must be less than "
            f"config.epochs = {config.epochs}."
        )
    prune_end = config.prune_end_epoch
    if not config.prune_begin <= prune_end <= config.epochs:
        raise UserError(
            f"Pruning begins at epoch {config.prune_begin} and ends at epoch {prune_end}: "
            "config.prune_begin must not be after config.prune_end, nor that after "
            f"config.epochs = {config.epochs}."
        )


@dataclasses.dataclass(frozen=True)
class Steps:
    """The durations of a configuration, in updates.

    Attributes:
      per_epoch: updates in an epoch; the incomplete last batch is dropped.
      total: updates in the run.
      warmup: updates during which the learning rate rises.
      prune_begin: the update at which sparsity begins to grow.
      prune_end: the update from which on it is the final one.
      eval_every: updates between two evaluations.
    """

    per_epoch: int
    total: int
    warmup: int
    prune_begin: int
    prune_end: int
    eval_every: int


def steps(config: Config, num_train: int) -> Steps:
    """Turns epochs into updates.

    Args:
      config: the durations, in epochs, and the batch size.
      num_train: the number of training examples.

    Raises:
      UserError: a batch is larger than the data set, or warm-up takes all updates.
    """
    per_epoch = num_train // config.batch_size
    if not per_epoch:
        raise UserError(
            f"config.batch_size is {config.batch_size}, and the training split has only "
            f"{num_train} examples; choose a smaller batch."
        )

    def updates(epochs: float) -> int:
        return round(epochs * per_epoch)

    if updates(config.epochs) >= 2**31:
        raise UserError(
            f"config.epochs is {config.epochs}, which is {updates(config.epochs):.2g} updates; "
            "choose fewer, so that there are less than 2**31."
        )
    total, warmup = max(updates(config.epochs), 1), updates(config.warmup_epochs)
    if warmup >= total:
        raise UserError(
            f"config.warmup_epochs is {config.warmup_epochs}, which is {warmup} of all {total} "
            "updates; choose it shorter, or a larger config.epochs."
        )
    return Steps(
        per_epoch=per_epoch,
        total=total,
        warmup=warmup,
        prune_begin=updates(config.prune_begin),
        prune_end=updates(config.prune_end_epoch),
        eval_every=max(updates(config.eval_every_epochs), 1),
    )
