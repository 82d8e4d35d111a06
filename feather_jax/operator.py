"""The thresholding operator of Feather, on one array and on a pytree of parameters."""

from functools import partial
from typing import SupportsFloat

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree, ScalarLike

from feather_jax.magnitude import Magnitude, broadcasts, comparison_dtype, measure
from feather_jax.masks import Mask, is_floating, map_prefix, pruning_mask
from feather_jax.schedule import check_theta


def threshold_operator(
    w: Float[Array, "*shape"],
    threshold: Float[Array, "#*shape"] | float,
    p: float = 3.0,
    *,
    theta: float = 1.0,
    magnitude: Magnitude = jnp.abs,
) -> Float[Array, "*shape"]:
    r"""Thresholds weights between hard and soft, with a straight-through derivative.

    .. math::
      P(w; T, p) = \operatorname{sign}(w) (|w|^p - T^p)^{1/p} \text{ for } |w| > T, \text{ else } 0

    `p=1` is soft thresholding, `p=jnp.inf` hard thresholding; Feather uses `p=3`, which is
    continuous at T and close to the identity soon above it. With another magnitude m than the
    absolute value it is :math:`w (1 - (T/m)^p)^{1/p}` where m > T.

    The derivative is the straight-through estimator's: the cotangent of `w` is the cotangent of
    the result, for pruned entries too, and `threshold` has none. Nothing is saved for the backward
    pass, and a Hessian-vector product (forward over reverse) is straight-through as well. With a
    `theta` other than 1 the cotangent of pruned entries, m <= T, is multiplied by it, which is what
    `scale_pruned_gradients` does for whoever can pass the threshold to the optimiser: use one of
    the two. Then the arguments are saved.

    Args:
      w: weights of a floating dtype of at least 16 bits.
      threshold: a scalar, or an array that broadcasts to the shape of `w`; non-negative. Where it
        is 0 the result is `w` itself.
      p: the exponent, a Python number in [1, inf]. It is static: a traced value is an error.
      theta: the scale of pruned entries' cotangents, static, finite and at least 0.
      magnitude: what is compared with the threshold, such as `block_magnitude((4, 1))`.

    Returns:
      The thresholded weights in the dtype of `w`. They are compared and computed in the promoted
      dtype of `w` and `threshold`, at least float32, to 3 units in the last place for p = 1, 2, 3
      and inf, to 10 for others. NaN stays NaN.

    Raises:
      TypeError: `w` is not floating-point, or `threshold` is complex.
      ValueError: `p` or `theta` is traced or out of its range, or `threshold` or the magnitude
        does not broadcast to the shape of `w`.

    Example:
      >>> import jax.numpy as jnp
      >>> from feather_jax import threshold_operator
      >>> threshold_operator(jnp.array([-2.0, 0.5, 1.0]), 1.0, p=1.0)
      Array([-1.,  0.,  0.], dtype=float32)

    References:
      Glentis Georgoulakis et al., Feather: An Elegant Solution to Effective DNN Sparsification,
      BMVC 2023, figure 1 (https://arxiv.org/abs/2310.02448).
    """
    exponent, scale = check_exponent(p), check_theta(static(theta, "The scale theta"))
    w, threshold = jnp.asarray(w), jnp.asarray(threshold)
    if not is_floating(w):
        raise TypeError(
            f"threshold_operator takes floating-point weights, and these have dtype {w.dtype}."
        )
    if jnp.issubdtype(threshold.dtype, jnp.complexfloating):
        raise TypeError(f"A threshold is a real number, and this one has dtype {threshold.dtype}.")
    if not broadcasts(threshold.shape, w.shape):
        raise ValueError(
            f"A threshold of shape {threshold.shape} does not broadcast to weights of shape "
            f"{w.shape}; give a scalar or one threshold a slice."
        )
    return _operator(exponent, scale, magnitude, w, threshold)


def sparsify(
    params: PyTree[Float[Array, "..."]],
    threshold: PyTree[Float[Array, "..."]],
    *,
    p: float = 3.0,
    theta: float = 1.0,
    prunable: Mask | None = None,
    magnitude: Magnitude = jnp.abs,
) -> PyTree[Float[Array, "..."]]:
    """The parameters with `threshold_operator` applied to the prunable ones.

    Args:
      params: a pytree of arrays: Linen's `params`, an `nnx.State`, nested dicts.
      threshold: a scalar for all prunable weights, or a pytree prefix of `params` with one
        threshold a layer; each must broadcast to the weights that it is for.
      p: the exponent of `threshold_operator`, static.
      theta: the scale of pruned weights' gradients, static. Leave it at 1 where the optimiser has
        `scale_pruned_gradients`.
      prunable: which leaves are thresholded; `prunable_weights` by default.
      magnitude: what is compared with the threshold, |w| by default.

    Returns:
      A pytree like `params`; leaves that are not prunable are the same objects.

    Raises:
      TypeError, ValueError: as `threshold_operator`; the mask or the thresholds do not fit, or
        nothing is prunable.

    Example:
      >>> import jax.numpy as jnp
      >>> from feather_jax import sparsify
      >>> params = {"kernel": jnp.array([[0.5, 2.0]]), "bias": jnp.array([0.5])}
      >>> sparsify(params, 1.0, p=jnp.inf)
      {'bias': Array([0.5], dtype=float32), 'kernel': Array([[0., 2.]], dtype=float32)}
    """

    def thresholded(weight: Array, threshold: Array, selected: bool) -> Array:
        if not selected:
            return weight
        return threshold_operator(weight, threshold, p, theta=theta, magnitude=magnitude)

    thresholds, mask = spread_threshold(threshold, params), pruning_mask(params, prunable)
    return jax.tree.map(thresholded, params, thresholds, mask)


def spread_threshold(threshold: PyTree, params: PyTree) -> PyTree:
    """A threshold for each leaf of `params`, from a scalar or a pytree prefix of `params`."""
    try:
        return map_prefix(
            lambda _, value, subtree: jax.tree.map(lambda _: value, subtree), threshold, params
        )
    except ValueError as error:
        raise ValueError(
            "The threshold must be a scalar or a pytree prefix of the parameters, and it is "
            "neither (the error above says where they differ)."
        ) from error


def scale_pruned(
    theta: ScalarLike,
    update: Float[Array, "*shape"],
    w: Float[Array, "*shape"],
    threshold: Float[Array, "#*shape"],
    magnitude: Magnitude,
) -> Float[Array, "*shape"]:
    """`update` in its dtype, times theta where its weight is pruned: m <= T, and T > 0."""
    size, threshold = _comparable(measure(magnitude, w), threshold)
    pruned = (size <= threshold) & (threshold > 0)
    dtype = comparison_dtype(update)
    scaled = jnp.asarray(theta, dtype) * jnp.asarray(update, dtype)
    return jnp.where(pruned, scaled.astype(update.dtype), update)


def check_exponent(p: SupportsFloat) -> float:
    """`p` as a Python float in [1, inf], or a ValueError that says what it must be."""
    exponent = float(static(p, "The exponent p"))
    if not exponent >= 1.0:
        raise ValueError(f"The exponent p must be a number in [1, inf], and it is {exponent}.")
    return exponent


def static(value: SupportsFloat, name: str) -> SupportsFloat:
    """`value`, or a ValueError if it is traced."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"{name} is static: pass a Python number, not a traced value (mark it with "
            "static_argnames, or close over it)."
        )
    return value


def _comparable(*values: Array) -> list[Array]:
    dtype = comparison_dtype(*values)
    return [jnp.asarray(value, dtype) for value in values]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _straight_through(
    p: float, theta: float, magnitude: Magnitude, w: Array, threshold: Array
) -> Array:
    return _threshold(p, magnitude, w, threshold)


def _forward(p: float, theta: float, magnitude: Magnitude, w: Array, threshold: Array):
    return _threshold(p, magnitude, w, threshold), () if theta == 1 else (w, threshold)


def _backward(
    p: float,
    theta: float,
    magnitude: Magnitude,
    residuals: tuple[Array, Array] | tuple[()],
    cotangent: Array,
) -> tuple[Array, None]:
    if residuals:
        w, threshold = lax.stop_gradient(residuals)
        cotangent = scale_pruned(theta, cotangent, w, threshold, magnitude)
    return cotangent, None


_straight_through.defvjp(_forward, _backward)

# A program that thresholds many weights traces and differentiates it once for each shape.
_operator = jax.jit(_straight_through, static_argnums=(0, 1, 2))


# The derivative of the rule above differentiates _forward: a Hessian-vector product is
# straight-through only if the function called there is so itself.
@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _threshold(p: float, magnitude: Magnitude, w: Array, threshold: Array) -> Array:
    weight, size, limit = _comparable(w, measure(magnitude, w), threshold)
    kept = (size > limit) | jnp.isnan(weight)
    thresholded = jnp.where(kept, weight * _ratio(p, size, limit), 0)
    # At T = 0 nothing is pruned, not even what the backend flushes to zero.
    return jnp.where(limit == 0, w, thresholded.astype(w.dtype))


@_threshold.defjvp
def _tangent(p: float, magnitude: Magnitude, primals: tuple[Array, Array], tangents):
    return _threshold(p, magnitude, *primals), tangents[0]


def _ratio(p: float, magnitude: Array, threshold: Array) -> Array | float:
    """(1 - (T/m)^p)^(1/p) where m > T, without a difference of powers.

    With r = T/m and d = 1 - r, which (m - T)/m gives exactly where it matters, 1 - r^p is
    d (1 + r + ... + r^(p-1)), in which nothing is left that cancels. Rounding may bring that to
    one unit above 1, but not its root.
    """
    if p > 1e20:  # it is 1 in every dtype, and the largest p fit into none
        return 1.0
    limits = jnp.finfo(magnitude.dtype)
    magnitude = jnp.minimum(magnitude, limits.max)  # infinity has no ratio to T
    r = threshold / magnitude
    # Kept above 0, which the difference of two of the smallest floats is flushed to.
    d = jnp.maximum((magnitude - threshold) / magnitude, limits.eps / 4)
    if p == 1.0:
        return d
    if p == 2.0:
        return jnp.sqrt(d * (1 + r))
    if p == 3.0:
        return _cube_root(d * (3 - d * (3 - d)))  # 1 + r + r^2 in d, which spares a division
    # log1p where it is needed: JAX 0.10's loses seven bits around -0.4 in float64 on CPU.
    log_r = jnp.where(d < 0.25, jnp.log1p(-d), jnp.log(r))
    return (-jnp.expm1(p * log_r)) ** (1 / p)


def _cube_root(x: Array) -> Array:
    """The cube root of x in [eps / 4, 2], within a unit in the last place.

    A third of x's bits, read as an integer, is a guess with an error below 4 %, and each step of
    Halley's triples its digits. On CPU a power takes ten times as long, `jnp.cbrt` longer still.
    """
    bits_dtype, offset, steps = (
        (jnp.uint64, 0x2A9F7893 << 32, 3) if x.dtype == jnp.float64 else (jnp.uint32, 0x2A5119F2, 2)
    )
    bits = lax.bitcast_convert_type(x, bits_dtype) // 3 + jnp.asarray(offset, bits_dtype)
    y = lax.bitcast_convert_type(bits, x.dtype)
    for _ in range(steps):
        cube = y * y * y
        y += y * ((x - cube) / (2 * cube + x))
    return y
