"""What a configuration may say, and the checks that every one passes before anything is built."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import ml_collections
import pydantic
from pydantic import Field

from train import fields
from train.errors import UserError
from train.fields import AtLeast0, Checked, Count, Fraction, Positive


def _is_named(value: Any) -> Any:
    if not (isinstance(value, dict) and isinstance(value.get("name"), str)):
        raise ValueError
    return value


Named = Annotated[
    dict[str, Any],
    pydantic.BeforeValidator(_is_named),
    Field(description="a mapping with the key 'name', as in {\"name\": ...}"),
]
"""What a name of ours stands for, with its options."""

Dtype = Literal["float32", "bfloat16", "float64"]

Exponent = Annotated[
    float,
    Field(ge=1, allow_inf_nan=True),
    pydantic.BeforeValidator(lambda value: math.inf if value == "inf" else value),
    pydantic.PlainSerializer(lambda value: "inf" if math.isinf(value) else value),
    Field(description="in [1, inf]: 1 is soft thresholding, inf is hard"),
]
"""In [1, inf], where JSON, which has no infinity, says "inf"."""

Patterns = Annotated[
    tuple[str, ...],
    Field(
        strict=False,
        description="a tuple of strings, as in --config.exclude=\"('Dense_0/kernel',)\"",
    ),
]


Block = Annotated[
    Annotated[tuple[Count | None, ...], Field(strict=False, min_length=1)] | None,
    Field(
        description="a tuple of lengths along a kernel's last axes, as in (4, 1); None is a whole "
        "axis"
    ),
]


class Config(Checked):
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
      backbone: what selects the thresholds, by name, with its options: "global" is one for all
        weights, "uniform" the sparsity in every layer, "erk" Erdos-Renyi-Kernel, "macs" a budget
        of multiply-accumulates (option `exponent`), "n_m" the `n` largest of every `m` weights
        along the input axis, "asl" thresholds that are learned (options `weight` and
        `learning_rate`). What `sparsity` is a fraction of is the backbone's: MACs for "macs".
      block: the block of weights that is pruned as one, by its length along the kernel's last axes:
        (4, 1) is 4 input channels; None for single weights.
      exclude: regular expressions over parameter paths such as `Dense_0/kernel`; a parameter that
        one of them matches in full stays dense.
      optimizer: "sgd" or "adamw".
      momentum: SGD's momentum, AdamW's b1.
      nesterov: Nesterov's momentum, in SGD.
      b2: AdamW's decay of the squared gradients.
      weight_decay: its factor, on kernels alone; added to the gradient in SGD, decoupled in AdamW.
      clip_norm: the largest global norm of the gradient; 0 for no clipping.
      warmup_epochs: how long the learning rate rises from 0.
      label_smoothing: the part of the target's probability that is spread over all classes.
      mixup: alpha of Mixup, 0 for none; 0.2 is usual (see `train.data.mix`).
      cutmix: alpha of CutMix, 0 for none; 1 is usual.
      accumulate_steps: an update's examples are taken in this many parts, one after the other.
      compute_dtype: "float32", "bfloat16" (weights are float32 in either), or "float64", weights
        included, where JAX_ENABLE_X64=1 is in the environment.
      seed: what the initial weights, the order of examples and the augmentation are drawn from.
      init_from: what training starts from: a workdir, a model file, or torchvision's or timm's
        weights in a file of PyTorch or of safetensors; "" for none.
      head: an expression that the paths of the last layer's parameters match in full: those begin
        anew where `init_from` has another number of classes.
      head_learning_rate: the head's learning rate, as a multiple of `learning_rate`.
      freeze: regular expressions over parameter paths; a parameter that one of them matches in full
        stays as it is: it is neither trained nor pruned.
      freeze_statistics: whether batch normalisation is trained with the running statistics that it
        starts from, which then stay.
      average_decay: how much of itself an exponential average of the dense weights and the running
        statistics keeps in an update; it is evaluated and finalised in their place; 0 for none.
        After k updates it is at most (1 + k) / (10 + k), so that a short run forgets its start too.
      log_every_steps: how often a line of metrics is written.
      eval_every_epochs: how often the model is evaluated; it is at the end in any case.
      checkpoint_every_steps: how often the state is saved; it is at the end in any case.
      keep_checkpoints: how many of the newest checkpoints are kept.
    """

    data: Named
    model: Named
    batch_size: Count
    epochs: Positive
    learning_rate: Positive
    sparsity: Annotated[
        Fraction,
        Field(description="in [0, 1): it is the fraction of zeros, so that 0.9 prunes 90 %"),
    ]
    prune_begin: AtLeast0 = 0.0
    prune_end: AtLeast0 | None = None
    p: Exponent = 3.0
    theta: AtLeast0 | None = None
    backbone: Named = Field(default_factory=lambda: {"name": "global"})
    block: Block = None
    exclude: Patterns = ()
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: Fraction = 0.9
    nesterov: bool = False
    b2: Fraction = 0.999
    weight_decay: AtLeast0 = 0.0
    clip_norm: AtLeast0 = 3.0
    warmup_epochs: AtLeast0 = 0.0
    label_smoothing: Fraction = 0.0
    mixup: AtLeast0 = 0.0
    cutmix: AtLeast0 = 0.0
    accumulate_steps: Count = 1
    compute_dtype: Dtype = "float32"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    init_from: str = ""
    head: str = "head/.*"
    head_learning_rate: Positive = 1.0
    freeze: Patterns = ()
    freeze_statistics: bool = False
    average_decay: Fraction = 0.0
    log_every_steps: Count = 10
    eval_every_epochs: Positive = 1.0
    checkpoint_every_steps: Count = 1000
    keep_checkpoints: Count = 3

    @property
    def prune_end_epoch(self) -> float:
        """`prune_end`, with its default."""
        return self.epochs / 2 if self.prune_end is None else self.prune_end

    def as_dict(self) -> dict[str, Any]:
        """The configuration as JSON has it: dicts, lists, strings and numbers, and p "inf"."""
        return plain(self.model_dump())

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        """What one field says about another."""
        for name in ("exclude", "freeze", "head"):
            given = getattr(self, name)
            for pattern in (given,) if isinstance(given, str) else given:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise UserError(
                        f"config.{name} has {pattern!r}, which is no regular expression ({error}); "
                        "correct it or quote its special characters with a backslash."
                    ) from error
        if self.warmup_epochs >= self.epochs:
            raise UserError(
                f"config.warmup_epochs is {self.warmup_epochs}, and it must be less than "
                f"config.epochs = {self.epochs}."
            )
        if not self.prune_begin <= self.prune_end_epoch <= self.epochs:
            raise UserError(
                f"Pruning begins at epoch {self.prune_begin} and ends at epoch "
                f"{self.prune_end_epoch}: config.prune_begin must not be after config.prune_end, "
                f"nor that after config.epochs = {self.epochs}."
            )
        return self


RESUMABLE = ("log_every_steps", "eval_every_epochs", "checkpoint_every_steps", "keep_checkpoints")
"""The fields that may change between two starts with one workdir."""


def parse(values: Mapping[str, Any]) -> Config:
    """A checked `Config` from what a config file gave.

    Args:
      values: a mapping such as an `ml_collections.ConfigDict`.

    Raises:
      UserError: a field is unknown, missing, of another type or out of its range.
    """
    return fields.parse(Config, checked_plain(values), "config")


def checked_plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """`plain(values)`, all of whose keys are strings.

    Raises:
      UserError: a key is not, or a value is a placeholder.
    """
    try:
        given = plain(values)
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


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration with the fields of its mappings by dotted names, as on the command line."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[f"{prefix}{name}"] = value
    return fields


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
