"""From a configuration to all that a run needs, built once and never changed."""

import dataclasses
import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

import feather_jax as feather
from feather_jax.masks import Mask, path_name, prunable_leaves
from train import config as config_lib
from train import data as data_lib
from train import models
from train.config import Config, Steps
from train.data import DataSet
from train.errors import UserError
from train.models.calling import call_arguments
from train.optimizer import learning_rate, make_optimizer
from train.run.churn import all_kept
from train.step import Metrics, TrainState, make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a configuration means.

    Attributes:
      config: the configuration, with what was found out about the data set.
      steps: its durations in updates.
      data: the data set, as this process sees it.
      model: the network.
      prunable: which parameters may be pruned, a pytree of bools.
      prune: Feather's hyperparameters; None for the dense twin.
      initial_state: gives the state before the first update.
      abstract_state: the shapes and dtypes of a state.
      train_step: the bare training step, `train_step(state, batch, *, axis_name=None)`.
      eval_step: the bare evaluation step, `eval_step(variables, batch, *, axis_name=None)`.
    """

    config: Config
    steps: Steps
    data: DataSet
    model: nn.Module
    prunable: PyTree[bool]
    prune: feather.Feather | None
    initial_state: Callable[[], TrainState]
    abstract_state: TrainState
    train_step: Callable[..., tuple[TrainState, Metrics]]
    eval_step: Callable[..., Metrics]


def build(config: Config, data: DataSet | None = None) -> Experiment:
    """Builds the network, the optimiser and the steps for a data set.

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
    prunable = prunable_mask(variables["params"], config.exclude, config.freeze)
    prune = None
    if config.sparsity:
        prune = feather.Feather(
            sparsity=config.sparsity,
            begin_step=steps.prune_begin,
            end_step=steps.prune_end,
            p=config.p,
            theta=config.theta,
            prunable=prunable,
        )
    tx = make_optimizer(config, steps, prune)
    initial_state = state_initializer(
        model, tx, data.image_shape, config.seed, prunable if prune else False
    )
    return Experiment(
        config=config,
        steps=steps,
        data=data,
        model=model,
        prunable=prunable,
        prune=prune,
        initial_state=initial_state,
        abstract_state=jax.eval_shape(initial_state),
        train_step=make_train_step(
            model,
            tx,
            prune,
            learning_rate(config, steps),
            data.train_preprocess,
            seed=config.seed,
            label_smoothing=config.label_smoothing,
            accumulate_steps=config.accumulate_steps,
        ),
        eval_step=make_eval_step(model, data.eval_preprocess),
    )


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


def state_initializer(
    model: nn.Module,
    tx: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    seed: int,
    pruned: Mask,
) -> Callable[[], TrainState]:
    """Builds the function, compiled, that gives the state before the first update.

    Args:
      model: the network.
      tx: the optimiser.
      image_shape: height, width, channels.
      seed: of the weights.
      pruned: which parameters are pruned; False for the dense twin.
    """

    def initial_state() -> TrainState:
        variables = initial_variables(model, image_shape, seed)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=variables["params"],
            batch_stats=variables.get("batch_stats", {}),
            opt_state=tx.init(variables["params"]),
            kept=all_kept(prunable_leaves(variables["params"], pruned)) if pruned else [],
        )

    # It runs once: LLVM's optimisations would take five times as long as they are worth.
    unoptimised = {"xla_backend_optimization_level": 0}
    options = unoptimised if jax.default_backend() == "cpu" else None
    return jax.jit(initial_state, compiler_options=options)


def check_paths(params: PyTree, config: Config) -> None:
    """Raises UserError where `freeze` or the head that is asked for is none of the parameters."""
    try:
        if config.freeze:
            frozen = jax.tree.leaves(feather.path_mask(include=config.freeze)(params))
            if all(frozen):
                raise UserError("config.freeze leaves nothing to train; give fewer expressions.")
    except ValueError as error:
        raise UserError(f"config.freeze {str(error).removeprefix('include ')}") from error
    try:
        if config.head_learning_rate != 1:
            feather.path_mask(include=config.head)(params)
    except ValueError as error:
        raise UserError(f"config.head {str(error).removeprefix('include ')}") from error


def prunable_mask(
    params: PyTree, exclude: tuple[str, ...], freeze: tuple[str, ...] = ()
) -> PyTree[bool]:
    """Feather's default mask without the parameters whose whole path an expression matches.

    Args:
      params: the parameters, or their shapes.
      exclude: regular expressions over paths such as `Dense_0/kernel`.
      freeze: the same, which need not match a prunable one.

    Raises:
      UserError: an expression of `exclude` matches no prunable parameter, or nothing is left to
        prune.
    """
    default = feather.prunable_weights(params)
    leaves = jax.tree_util.tree_leaves_with_path(default)
    names = [path_name(path) for path, selected in leaves if selected]
    for pattern in exclude:
        if not any(re.fullmatch(pattern, name) for name in names):
            raise UserError(
                f"config.exclude holds {pattern!r}, which matches no prunable parameter in full; "
                f"the prunable ones are {', '.join(names)}."
            )

    def stays(name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in exclude + freeze)

    if all(map(stays, names)):
        both = "config.exclude and config.freeze leave" if freeze else "config.exclude leaves"
        raise UserError(f"{both} nothing to prune; give fewer expressions.")
    return jax.tree_util.tree_map_with_path(
        lambda path, selected: selected and not stays(path_name(path)), default
    )
