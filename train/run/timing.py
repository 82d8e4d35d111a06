"""How long one image takes on one core of this machine: compiled for its zeros, and by XLA."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from feather_jax import cpu
from train.store.model_file import SavedModel

COMPILED, XLA = "inference/compiled_seconds", "inference/xla_seconds"
MOST_TURNS = 200  # the median of more would be the same


def time_one_image(model: SavedModel, seconds: float = 0.8) -> dict[str, float]:
    """The CPU time of the network on one image, preprocessing included.

    That of all threads together, which is what one core would take, whatever else the machine does.

    Args:
      model: a model file.
      seconds: for how long at most the two are measured in turn, once they are compiled.

    Returns:
      `COMPILED` and `XLA`, medians in seconds; nothing where the network has something in it that
      `feather_jax.cpu` does not compile.
    """
    image = np.zeros((1, *model.image_shape), np.uint8)
    try:
        compiled = cpu.compile(functools.partial(model.logits, model.variables), image)
    except NotImplementedError:
        return {}
    by_xla = compile_by_xla(model, image)
    calls = {COMPILED: lambda: compiled(image), XLA: lambda: by_xla(image)}
    return in_turn(calls, seconds)


def compile_by_xla(
    model: SavedModel, images: UInt8[np.ndarray, "b h w c"]
) -> Callable[[UInt8[np.ndarray, "b h w c"]], Float[Array, "b k"]]:
    """The network on images of this shape, by XLA on the CPU, whatever JAX else computes on.

    Returns:
      From images to logits, which are there when it returns.
    """
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        variables = jax.device_put(model.variables)
        compiled = jax.jit(model.logits).lower(variables, images).compile()
    return lambda images: jax.block_until_ready(compiled(variables, images))


def in_turn(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median CPU seconds of a call of each, taken one after the other so that all meet the same."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    stop = time.perf_counter() + seconds
    for turn in range(MOST_TURNS):
        if turn and time.perf_counter() > stop:
            break
        for name, call in calls.items():
            begin = time.process_time()
            call()
            times[name].append(time.process_time() - begin)
    return {name: statistics.median(each) for name, each in times.items()}
