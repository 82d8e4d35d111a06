"""The thresholding operator of Feather, on one array and on a pytree of parameters."""

from functools import partial
from typing import SupportsFloat

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from feather_jax.masks import Mask, is_floating, map_prefix, pruning_mask


def threshold_operator(
    w: Float[Array, "*shape"],
    threshold: Float[Array, "#*shape"] | float,
    p: float = 3.0,
) -> Float[Array, "*shape"]:
    r"""Thresholds weights between hard and soft, with a straight-through derivative.

    .. math::
      P(w; T, p) = \operatorname{sign}(w) (|w|^p - T^p)^{1/p} \text{ for } |w| > T, \text{ else } 0

    `p=1` is soft thresholding, `p=jnp.inf` hard thresholding; Feather uses `p=3`, which is
    continuous at T and close to the identity soon above it.

    The derivative is the straight-through estimator's: the cotangent of `w` is the cotangent of
    the result, for pruned entries too, and `threshold` has none. Nothing is saved for the backward
    pass, and a Hessian-vector product (forward over reverse) is straight-through as well.

    Args:
      w: weights of a floating dtype of at least 16 bits.
      threshold: a scalar, or an array that broadcasts to the shape of `w`; non-negative. Where it
        is 0 the result is `w` itself.
      p: the exponent, a Python number in [1, inf]. It is static: a traced value is an error.

    Returns:
      The thresholded weights in the dtype of `w`. They are compared and computed in the promoted
      dtype of `w` and `threshold`, at least float32, to 3 units in the last place for p = 1, 2, 3
      and inf, to 10 for others. NaN stays NaN.

    Raises:
      TypeError: `w` is not floating-point, or `threshold` is complex.
      ValueError: `p` is traced or below 1, or `threshold` does not broadcast to the shape of `w`.

    Example:
      >>> import jax.numpy as jnp
      >>> from feather_jax import threshold_operator
      >>> threshold_operator(jnp.array([-2.0, 0.5, 1.0]), 1.0, p=1.0)
      Array([-1.,  0.,  0.], dtype=float32)

    References:
      Glentis Georgoulakis et al., Feather: An Elegant Solution to Effective DNN Sparsification,
      BMVC 2023, figure 1 (https://arxiv.org/abs/2310.02448).
    """
    exponent = check_exponent(p)
    w, threshold = jnp.asarray(w), jnp.asarray(threshold)
    if not is_floating(w):
        raise TypeError(
            f"threshold_operator takes floating-point weights, and these have dtype {w.dtype}."
        )
    if jnp.issubdtype(threshold.dtype, jnp.complexfloating):
        raise TypeError(f"A threshold is a real number, and this one has dtype {threshold.dtype}.")
    if not _broadcasts(threshold.shape, w.shape):
        raise ValueError(
            f"A threshold of shape {threshold.shape} does not broadcast to weights of shape "
            f"{w.shape}; give a scalar or one threshold a slice."
        )
    return _operator(exponent, w, threshold)


def sparsify(
    params: PyTree[Float[Array, "..."]],
    threshold: PyTree[Float[Array, "..."]],
    *,
    p: float = 3.0,
    prunable: Mask | None = None,
) -> PyTree[Float[Array, "..."]]:
    """The parameters with `threshold_operator` applied to the prunable ones.

    Args:
      params: a pytree of arrays: Linen's `params`, an `nnx.State`, nested dicts.
      threshold: a scalar for all prunable weights, or a pytree prefix of `params` with one
        threshold a layer; each must broadcast to the weights that it is for.
      p: the exponent of `threshold_operator`, static.
      prunable: which leaves are thresholded; `prunable_weights` by default.

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
        return threshold_operator(weight, threshold, p) if selected else weight

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


def comparable(w: Array, threshold: Array) -> tuple[Array, Array]:
    """Both in the dtype in which |w| > threshold is decided: the promoted one, at least float32."""
    dtype = jnp.result_type(w, threshold, jnp.float32)
    return jnp.asarray(w, dtype), jnp.asarray(threshold, dtype)


def check_exponent(p: SupportsFloat) -> float:
    """`p` as a Python float in [1, inf], or a ValueError that says what it must be."""
    if isinstance(p, jax.core.Tracer):
        raise ValueError(
            "The exponent p is static: pass a Python number, not a traced value (mark it with "
            "static_argnames, or close over it)."
        )
    exponent = float(p)
    if not exponent >= 1.0:
        raise ValueError(f"The exponent p must be a number in [1, inf], and it is {exponent}.")
    return exponent


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    try:
        return jnp.broadcast_shapes(shape, to) == to
    except ValueError:
        return False


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _straight_through(p: float, w: Array, threshold: Array) -> Array:
    return _threshold(p, w, threshold)


def _forward(p: float, w: Array, threshold: Array) -> tuple[Array, tuple[()]]:
    return _threshold(p, w, threshold), ()


def _backward(p: float, residuals: tuple[()], cotangent: Array) -> tuple[Array, None]:
    return cotangent, None


_straight_through.defvjp(_forward, _backward)

# A program that thresholds many weights traces and differentiates it once for each shape.
_operator = jax.jit(_straight_through, static_argnums=0)


# The derivative of the rule above differentiates _forward: a Hessian-vector product is
# straight-through only if the function called there is so itself.
@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _threshold(p: float, w: Array, threshold: Array) -> Array:
    weight, threshold = comparable(w, threshold)
    kept = jnp.abs(weight) > threshold
    thresholded = jnp.where(kept | jnp.isnan(weight), _shrink(p, weight, threshold), 0)
    # At T = 0 nothing is pruned, not even what the backend flushes to zero.
    return jnp.where(threshold == 0, w, thresholded.astype(w.dtype))


@_threshold.defjvp
def _tangent(p: float, primals: tuple[Array, Array], tangents: tuple[Array, Array]):
    return _threshold(p, *primals), tangents[0]


def _shrink(p: float, weight: Array, threshold: Array) -> Array:
    """sign(w) (|w|^p - T^p)^(1/p) where |w| > T, without a difference of large powers.

    With r = T/|w| and d = 1 - r, which (|w| - T)/|w| gives exactly where it matters, the result is
    w times (1 - r^p)^(1/p), and 1 - r^p = d (1 + r + ... + r^(p-1)) has nothing left that cancels.
    """
    if p > 1e20:  # the ratio below is 1 in every dtype, and the largest p fit into none
        return weight
    if p == 1.0:
        return weight - jnp.copysign(threshold, weight)
    limits = jnp.finfo(weight.dtype)
    magnitude = jnp.minimum(jnp.abs(weight), limits.max)  # infinity has no ratio to T
    r = threshold / magnitude
    # Kept above 0, which the difference of two of the smallest floats is flushed to.
    d = jnp.maximum((magnitude - threshold) / magnitude, limits.eps / 4)
    if p == 2.0:
        ratio = jnp.sqrt(d * (1 + r))
    elif p == 3.0:
        ratio = _cube_root(d * (3 - d * (3 - d)))  # 1 + r + r^2 in d, which spares a division
    else:
        # log1p where it is needed: JAX 0.10's loses seven bits around -0.4 in float64 on CPU.
        log_r = jnp.where(d < 0.25, jnp.log1p(-d), jnp.log(r))
        ratio = (-jnp.expm1(p * log_r)) ** (1 / p)
    return weight * jnp.minimum(ratio, 1)


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
