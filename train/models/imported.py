"""Anyone's own Linen network: `config.model = {"name": "package.module:Network", ...}`."""

import contextlib
import importlib
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import train
from train.errors import UserError
from train.models.calling import call_arguments, parameters_of, takes
from train.parallel import AXIS

_COLLECTIONS = ("params", "batch_stats")
_NOT_THEIRS = ("<", *(module.__path__[0] for module in (train, jax, flax, importlib)))


def build(name: str, options: Mapping[str, Any], **ours: Any) -> nn.Module:
    """Imports a network and builds it.

    Importing runs the module's code: call it for what the user names or vouches for alone.

    Args:
      name: a module, a colon, and a Linen class in it or a function that gives a network.
      options: its keyword arguments; lists become tuples, since Linen's modules are hashed.
      **ours: keyword arguments that are left out where it does not take them.

    Raises:
      UserError: there is no such thing, importing or building it fails, or it is no Linen network.
    """
    factory = _imported(name)
    known = parameters_of(factory)
    for option in options:
        if known is not None and option not in known:
            these = [each for each in known if each not in (*ours, "parent", "name")]
            raise UserError(
                f"{name} has no option {option!r}; its options are: {', '.join(these) or 'none'}."
            )
    given = {each: value for each, value in ours.items() if known is None or each in known}
    with as_sentence(f"{name} cannot be built"):
        network = factory(**given | {option: _hashable(value) for option, value in options.items()})
    if not isinstance(network, nn.Module):
        raise UserError(
            f"config.model.name is {name!r}, which gives a {type(network).__name__}; name a "
            "subclass of flax.linen.Module, or a function that gives one of its instances."
        )
    return network


def check(name: str, model: nn.Module, image_shape: tuple[int, ...], num_classes: int) -> None:
    """Traces an imported network once, in training, so that what is wrong with it is a sentence.

    Args:
      name: as in `config.model`.
      model: what `build` gave.
      image_shape: height, width, channels.
      num_classes: how many logits it should give.

    Raises:
      UserError: it cannot be called, has variables that a run does not keep, or gives no logits.
    """
    keys = jax.random.split(jax.random.key(0), 2)

    def called(images: Float[Array, "b h w c"]) -> tuple[Any, Any]:
        variables = model.init(keys[0], images, **call_arguments(model, train=False))
        arguments = call_arguments(model, train=True, axis_name=AXIS, keys=keys)
        return variables, model.apply(variables, images, **arguments, mutable=["batch_stats"])[0]

    with as_sentence(f"{name} cannot be called with images {list(image_shape)}"):
        # On one device, with the axis there for a network that names it itself.
        on_devices = jax.vmap(called, axis_name=AXIS)
        variables, logits = jax.eval_shape(on_devices, jnp.zeros((1, 2, *image_shape)))
    for collection in variables:
        if collection not in _COLLECTIONS:
            raise UserError(
                f"{name} has variables in the collection {collection!r}, and a run keeps those of "
                f"{' and '.join(_COLLECTIONS)} alone; move them there."
            )
    if not variables.get("params"):
        raise UserError(f"{name} has no parameters to train.")
    if not hasattr(logits, "shape"):
        raise UserError(f"{name} gives a {type(logits).__name__}; let it give the logits alone.")
    shape = logits.shape[1:]
    if shape != (2, num_classes) or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise UserError(
            f"{name} gives {logits.dtype}{list(shape)} for 2 images, and logits would be "
            f"float32[2, {num_classes}]; let it take num_classes."
        )


def note_on_statistics(name: str, model: nn.Module, batch_stats: Any, devices: int) -> str | None:
    """What to say where each device normalises by its own part of the batch; None elsewhere."""
    if devices == 1 or not batch_stats or takes(model, "axis_name"):
        return None
    return (
        f"{name} takes no axis_name: the batch statistics that it trains with are each device's "
        f"own (unless it names the axis {AXIS!r} itself), and the running ones are their mean over "
        f"{devices} devices."
    )


def _imported(name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    with as_sentence(f"config.model.name is {name!r}, and {module_name} cannot be imported"):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if not f"{module_name}.".startswith(f"{error.name}."):
                raise  # it is there, and something that it imports is not
            raise UserError(
                f"config.model.name is {name!r}, and there is no module {error.name}; start from "
                "the folder that holds it, or add that to PYTHONPATH."
            ) from error
    network: Any = module
    for part in attribute.split("."):
        network = getattr(network, part, None)
    if not callable(network):
        raise UserError(
            f"config.model.name is {name!r}, and {module_name} has no class or function "
            f"{attribute!r}; name a Linen network as package.module:Network."
        )
    return network


def _hashable(value: Any) -> Any:
    """Lists as tuples, and mappings as Flax's own, which hash."""
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    if isinstance(value, Mapping):
        return flax.core.FrozenDict({key: _hashable(item) for key, item in value.items()})
    return value


@contextlib.contextmanager
def as_sentence(what: str) -> Iterator[None]:
    """Turns whatever code that is not ours raises into a `UserError`, with the last place in it.

    Args:
      what: the beginning of the sentence: what could not be done.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [frame for frame in frames if not frame.filename.startswith(_NOT_THEIRS)]
        place = f", {theirs[-1].filename} line {theirs[-1].lineno}" if theirs else ""
        raise UserError(
            f"{what} ({type(error).__name__}: {message}{place}); correct it, or name another "
            "config.model."
        ) from error
