"""What tests of the training step share."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from train import parallel


def on_devices(step: Callable[..., Any], number: int) -> tuple[Callable[..., Any], Mesh]:
    """A step on the first devices, as a run takes it on all of them, and the mesh of these."""
    devices = jax.devices()[:number]
    step_on_devices = jax.pmap(
        lambda state, batch: step(state, batch, axis_name=parallel.AXIS),
        axis_name=parallel.AXIS,
        in_axes=(None, 0),
        out_axes=None,
        devices=devices,
    )
    return step_on_devices, Mesh(np.array(devices), (parallel.AXIS,))


def assert_close(actual: PyTree, expected: PyTree, tolerance: float) -> None:
    """That all leaves are, relatively or absolutely."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )
