"""Data parallelism: one function on every device of every process, the state unstacked."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from train.errors import UserError

AXIS = "batch"


def devices() -> list[jax.Device]:
    """All devices of all processes, started if need be.

    Raises:
      UserError: there are none of the kind that is asked for.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # CUDA's without a GPU is an assertion
        asked = f"JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS', '')!r}"
        reason = (str(error).splitlines() or [asked])[0]
        raise UserError(
            f"JAX started no device ({reason}); correct JAX_PLATFORMS or install JAX for what this "
            "machine has."
        ) from error


def device_mesh() -> Mesh:
    """All devices of all processes along the axis "batch", in the order that pmap gives them.

    pmap goes process by process, which `jax.devices()` need not: on some TPU slices the numbers of
    the devices interleave over hosts.
    """
    devices = [
        device
        for process in range(jax.process_count())
        for device in jax.local_devices(process_index=process)
    ]
    return Mesh(np.array(devices), (AXIS,))


def is_first() -> bool:
    """Whether this process is the one that speaks and writes for all, number 0."""
    return jax.process_index() == 0


def gather(value: int) -> list[int]:
    """The `value` of every process, in their order; all of them have to call this."""
    if jax.process_count() == 1:
        return [value]
    return multihost_utils.process_allgather(np.int32(value)).tolist()


def check_batch_size(batch_size: int, accumulate_steps: int = 1) -> None:
    """Raises UserError where the devices' parts of a batch would not be equal and whole."""
    devices = jax.device_count()
    if batch_size % (devices * accumulate_steps):
        parts = f"{devices} devices" if devices > 1 else "1 device"
        if accumulate_steps > 1:
            parts += f" times config.accumulate_steps = {accumulate_steps}"
        raise UserError(
            f"config.batch_size is {batch_size}, which {parts} cannot share equally; choose a "
            f"multiple of {devices * accumulate_steps}."
        )


def check_pairs(batch_size: int) -> None:
    """Raises UserError where a device has an odd number of examples, so that one lacks a partner.

    See `train.data.mix`.
    """
    devices = jax.device_count()
    if batch_size % (2 * devices):
        raise UserError(
            f"config.batch_size is {batch_size}, and config.mixup and config.cutmix need an even "
            f"number for each device; choose a multiple of {2 * devices}."
        )


def on_all_devices(step: Callable[..., Any], *, donate_state: bool) -> Callable[..., Any]:
    """`step(state, batch, axis_name=...)` as a parallel function of a state and a placed batch.

    The state is the same on all devices and has no axis for them, so that a checkpoint does not
    know how many there were. Place it with `replicate` and batches with `shard`.
    """
    return jax.pmap(
        partial(step, axis_name=AXIS),
        axis_name=AXIS,
        in_axes=(None, 0),
        out_axes=None,
        donate_argnums=(0,) if donate_state else (),
    )


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """The arrays of `tree`, the same on every process, on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Places this process's part of a global batch, [b, ...], as [devices, b / devices, ...]."""
    devices = mesh.local_mesh.size
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))

    def place(array: np.ndarray) -> jax.Array:
        stacked = array.reshape(devices, array.shape[0] // devices, *array.shape[1:])
        return jax.make_array_from_process_local_data(sharding, stacked)

    return {name: place(array) for name, array in batch.items()}
