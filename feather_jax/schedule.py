"""How sparsity grows over training, and the gradient scale that goes with the final one."""

import math
import operator
from typing import SupportsFloat, SupportsIndex

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, ScalarLike


def check_sparsity(sparsity: SupportsFloat) -> float:
    """`sparsity` as a Python float in [0, 1), or a ValueError that says what it must be."""
    fraction = float(sparsity)
    if not 0.0 <= fraction < 1.0:
        raise ValueError(
            f"The sparsity is the fraction of zeros, in [0, 1), and it is {fraction}; "
            "for 90 % zeros give 0.9."
        )
    return fraction


def cubic_schedule(
    sparsity: float,
    *,
    begin_step: SupportsIndex | SupportsFloat,
    end_step: SupportsIndex | SupportsFloat,
) -> optax.Schedule:
    """Sparsity that grows fast at first and ever slower until it is reached.

    s(t) = S (1 - (1 - (t - t1) / (t2 - t1))^3) for t1 <= t < t2, 0 before and S after. Where
    `begin_step` equals `end_step` it is a step from 0 to S.

    Args:
      sparsity: the final sparsity S, in [0, 1).
      begin_step: t1, the update (counted from 0) at which sparsity begins to grow, a whole number
        of any type, as 1e4 and `np.ceil(...)` are.
      end_step: t2, the update from which on it is S, likewise.

    Returns:
      A function of the update's number, a Python int or a (traced) integer array of any shape,
      that gives the sparsity in JAX's default float dtype.

    Raises:
      ValueError: the sparsity is outside [0, 1), a step is not whole, `begin_step` is negative or
        after `end_step`.
      TypeError: a step is not a number, or a traced one.

    Example:
      >>> from feather_jax import cubic_schedule
      >>> schedule = cubic_schedule(0.9, begin_step=0, end_step=100)
      >>> [round(float(schedule(step)), 4) for step in (0, 50, 100)]
      [0.0, 0.7875, 0.9]

    References:
      Zhu and Gupta, To prune, or not to prune, 2017 (https://arxiv.org/abs/1710.01878), equation 1,
      with Feather's released settings: t1 = 0 and t2 half of all steps.
    """
    final = check_sparsity(sparsity)
    begin, end = check_step(begin_step, "begin_step"), check_step(end_step, "end_step")
    if begin < 0:
        raise ValueError(f"begin_step counts updates from 0, and it is {begin}.")
    if end < begin:
        raise ValueError(
            f"Sparsity cannot reach its end before it begins: end_step is {end}, and begin_step "
            f"is {begin}."
        )

    def schedule(step: ScalarLike) -> Float[Array, "..."]:
        # The difference is taken in integers, so that no step is too large for a float32.
        left = (end - as_step(step)).astype(float) / max(end - begin, 1)
        # abs keeps the compiler from rounding the cube and the difference together, so that jit
        # changes no bit.
        growing = final * (1 - jnp.abs(left**3))
        return jnp.where(left <= 0, final, jnp.where(left > 1, 0, growing))

    return schedule


def check_step(step: SupportsIndex | SupportsFloat, name: str) -> int:
    """`step` as a Python int, or one sentence that says what the argument `name` must be."""
    if isinstance(step, jax.core.Tracer):
        raise TypeError(f"{name} is static: give a Python number, not a traced value.")
    try:
        return operator.index(step)  # type: ignore[arg-type]
    except TypeError:
        pass
    try:
        number = float(step) if isinstance(step, SupportsFloat) else None
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} counts updates, a whole number, and it is {step!r}.")
    if not number.is_integer():
        raise ValueError(f"{name} counts updates and must be a whole number; it is {number}.")
    return int(number)


def as_step(step: ScalarLike) -> Array:
    """The update's number in signed integers of at least 32 bits, for sums and comparisons.

    In fewer bits a Python number next to it is wrapped around, in unsigned ones the difference is.
    """
    step = jnp.asarray(step)
    return step.astype(jnp.promote_types(step.dtype, jnp.int32))


def default_theta(sparsity: float) -> float:
    """The scale of pruned weights' gradients that Feather uses for a final sparsity.

    Args:
      sparsity: the final sparsity, in [0, 1).

    Returns:
      1.0 up to a sparsity of 0.95, 0.5 above it.

    Raises:
      ValueError: the sparsity is outside [0, 1).

    References:
      Feather's released code (Glentis Georgoulakis et al., BMVC 2023).
    """
    return 1.0 if check_sparsity(sparsity) <= 0.95 else 0.5


def check_theta(theta: SupportsFloat) -> float:
    """`theta` as a finite Python float of at least 0, or a ValueError that says so."""
    scale = float(theta)
    if not (scale >= 0.0 and math.isfinite(scale)):
        raise ValueError(
            f"theta scales the gradients of pruned weights and must be finite and at least 0; "
            f"it is {scale}."
        )
    return scale
