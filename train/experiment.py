"""From a configuration and a data set to all that a run needs, built once and never changed."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32, PyTree

import feather_jax as feather
from train import backbones, models
from train import config as config_lib
from train import data as data_lib
from train.asl import Asl
from train.backbones import Pruning
from train.config import Config, Steps
from train.data import DataSet
from train.errors import UserError
from train.models.calling import call_arguments, count_macs
from train.optimizer import learning_rate, make_optimizer


@flax.struct.dataclass
class TrainState:
    """All that training changes.

    Attributes:
      step: the number of updates completed, an int32 scalar.
      params: the dense weights.
      batch_stats: the running statistics of batch normalisation; {} without any.
      opt_state: the optimiser's state.
      average: the exponential averages of `params` and `batch_stats`; {} without any.
    """

    step: Int32[Array, ""]
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    average: dict[str, PyTree] = flax.struct.field(default_factory=dict)

    @property
    def result(self) -> dict[str, PyTree]:
        """The dense variables that are evaluated and finalised: the averages, if there are any."""
        return self.average or {"params": self.params, "batch_stats": self.batch_stats}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a configuration means.

    Attributes:
      config: the configuration, with what was found out about the data set.
      steps: its durations in updates.
      data: the data set, as this process sees it.
      model: the network.
      prunable: which parameters may be pruned, a pytree of bools.
      prune: Feather's hyperparameters; the dense twin's sparsity is 0, with which Feather is the
        identity.
      learning_rate: a function of the update's number.
      tx: the optimiser.
      notes: what people should know of what is pruned, a sentence each.
    """

    config: Config
    steps: Steps
    data: DataSet
    model: nn.Module
    prunable: PyTree[bool]
    prune: Pruning
    learning_rate: optax.Schedule
    tx: optax.GradientTransformationExtraArgs
    notes: tuple[str, ...]


def build(config: Config, data: DataSet | None = None) -> Experiment:
    """Builds the network and the optimiser for a data set.

    Args:
      config: the configuration.
      data: the data set, in batches of `config.batch_size`; by default the one that `config.data`
        names, opened for this process.

    Raises:
      UserError: the parts of the configuration don't fit one another, or the data set is missing.
    """
    if data is None:
        data = data_lib.load(
            config.data,
            batch_size=config.batch_size,
            seed=config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
    config = config.model_copy(update={"data": config.data | dict(data.found)})
    steps = config_lib.steps(config, data.num_train)
    dtype = usable_dtype(config.compute_dtype, "config.compute_dtype")
    model = models.build(
        config.model,
        num_classes=data.num_classes,
        dtype=dtype,
        image_shape=data.image_shape,
        allow_import=True,  # the user gave the configuration, as code or on the command line
    )
    variables = jax.eval_shape(lambda: initial_variables(model, data.image_shape, config.seed))
    check_paths(variables["params"], config)
    prunable = prunable_mask(variables["params"], config)
    prune = backbones.pruning(
        config,
        steps,
        variables["params"],
        prunable,
        lambda: count_macs(model, variables, data.image_shape),
    )
    schedule = learning_rate(config, steps)
    tx = make_optimizer(config, schedule, prune)
    notes = () if isinstance(prune, Asl) else backbones.check(prune, variables["params"])
    return Experiment(config, steps, data, model, prunable, prune, schedule, tx, notes)


def usable_dtype(name: str, where: str) -> jnp.dtype:
    """The dtype that a network computes in.

    Args:
      name: "float32", "bfloat16" or "float64".
      where: what says so, for the error.

    Raises:
      UserError: it is float64, and JAX would compute in float32 instead.
    """
    dtype = jnp.dtype(name)
    if dtype != jax.dtypes.canonicalize_dtype(dtype):
        raise UserError(
            f"{where} is {name!r}, for which JAX_ENABLE_X64=1 must be in the environment; set it, "
            "or train in 'float32'."
        )
    return dtype


def initial_variables(model: nn.Module, image_shape: tuple[int, ...], seed: int) -> PyTree:
    """The variables of an untrained network for images [height, width, channels]."""
    images = jnp.zeros((1, *image_shape))
    return model.init(jax.random.key(seed), images, **call_arguments(model, train=False))


def check_paths(params: PyTree, config: Config) -> None:
    """Raises UserError where `freeze` or the head that is asked for is none of the parameters."""
    if config.freeze and all(jax.tree.leaves(_by_name(params, "freeze", include=config.freeze))):
        raise UserError("config.freeze leaves nothing to train; give fewer expressions.")
    if config.head_learning_rate != 1:
        _by_name(params, "head", include=config.head)


def prunable_mask(params: PyTree, config: Config) -> PyTree[bool]:
    """Which parameters may be pruned: the default mask without `config.exclude` and `freeze`.

    Raises:
      UserError: an expression of `exclude` matches no prunable parameter, or nothing is left to
        prune.
    """
    mask = _by_name(params, "exclude", exclude=config.exclude)
    if config.freeze:
        frozen = _by_name(params, "freeze", include=config.freeze)
        mask = jax.tree.map(lambda selected, stays: selected and not stays, mask, frozen)
    if config.sparsity and not any(jax.tree.leaves(mask)):
        both = (
            "config.exclude and config.freeze leave" if config.freeze else "config.exclude leaves"
        )
        raise UserError(f"{both} nothing to prune; give fewer expressions.")
    return mask


def _by_name(params: PyTree, field: str, **expressions: Sequence[str] | str) -> PyTree[bool]:
    """`feather.path_mask`'s mask of a field's expressions, whose errors name the field."""
    try:
        return feather.path_mask(**expressions)(params)
    except ValueError as error:
        _, _, rest = str(error).partition(" ")
        raise UserError(f"config.{field} {rest}") from error


def initial_state(experiment: Experiment) -> TrainState:
    """The state before the first update."""
    # It runs once: LLVM's optimisations would take five times as long as they are worth.
    unoptimised = {"xla_backend_optimization_level": 0}
    options = unoptimised if jax.default_backend() == "cpu" else None
    return jax.jit(functools.partial(_initialise, experiment), compiler_options=options)()


def abstract_state(experiment: Experiment) -> TrainState:
    """The shapes and dtypes of a state."""
    return jax.eval_shape(functools.partial(_initialise, experiment))


def _initialise(experiment: Experiment) -> TrainState:
    image_shape, seed = experiment.data.image_shape, experiment.config.seed
    variables: Mapping[str, PyTree] = initial_variables(experiment.model, image_shape, seed)
    variables = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    if isinstance(experiment.prune, Asl):
        variables["params"] = experiment.prune.with_r(variables["params"])
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        **variables,
        opt_state=experiment.tx.init(variables["params"]),
        average=variables if experiment.config.average_decay else {},
    )
