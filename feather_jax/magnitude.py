"""What a weight is compared by: |w|, or the root mean square of a block of weights."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Magnitude: TypeAlias = Callable[[Float[Array, "*shape"]], Float[Array, "#*shape"]]
"""A function of a weight array that gives non-negative numbers which broadcast to it. `jnp.abs` is
one, `block_magnitude` makes others. It is static under `jax.jit`, so it must be hashable. Where it
gives several weights the same number, it may have a method `blocks` that gives the number once."""

# Up to as many weights of a block are taken one by one.
_SMALL_BLOCK = 16


def block_magnitude(block: Sequence[int | None], *, axes: Sequence[int] | None = None) -> Magnitude:
    """The root mean square of blocks of weights, so that a block is pruned or kept as a whole.

    `block_magnitude((4, 1))` groups 4 consecutive input channels of a kernel whose last two axes
    are input and output, `block_magnitude((None, None, None, 1))` a filter of a two-dimensional
    convolution. Equal arguments give equal magnitudes, which compile once.

    Args:
      block: the block's length along each axis; None takes a whole axis. Where the axis is no
        multiple of it, the last block is shorter, and its mean is over what it has.
      axes: the axis of each length. By default they are the last ones, and a kernel may have its
        input in the last axis but one alone: two axes (Dense), or a convolution's window of equal
        sizes (sizes of 1 apart) over two dimensions or more before the last two. Others are
        refused, since an attention's kernel (embed, heads, head_dim) would be grouped across its
        heads; say `axes=(-2, -1)` for a one-dimensional convolution or a stack of layers.

    Returns:
      A function of weights of at least float32 that gives their blocks' magnitudes in their dtype,
      within 3 units in the last place and with the same bits in every program. An axis that is one
      block has size 1 in the result, every other its own size. A block that holds NaN is NaN, else
      one that holds infinity is infinite.

    Raises:
      TypeError: `block` is no sequence of integers and None.
      ValueError: a length is below 1, an axis is named twice, or there are not as many axes as
        lengths; when it is called, a kernel does not have the axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from feather_jax import block_magnitude, threshold_operator
      >>> w = jnp.array([[3.0], [0.0], [1.0], [1.0]])
      >>> threshold_operator(w, 2.0, jnp.inf, magnitude=block_magnitude((2, 1))).ravel()
      Array([3., 0., 0., 0.], dtype=float32)
    """
    if not isinstance(block, Sequence):
        raise TypeError(f"A block is a sequence of lengths, and it is {block!r}; give (4, 1), say.")
    return _BlockMagnitude(tuple(block), None if axes is None else tuple(axes))


def measure(magnitude: Magnitude, w: Float[Array, "*shape"]) -> Float[Array, "#*shape"]:
    """The magnitudes of weights, taken in the dtype of `w` but at least in float32.

    Everything that compares weights with a threshold calls this, so that all see the same bits.

    Raises:
      TypeError: the magnitude gives something else than real floating-point numbers.
      ValueError: its result does not broadcast to the shape of `w`.
    """
    result = magnitude(jnp.asarray(w, comparison_dtype(w)))
    if not jnp.issubdtype(result.dtype, jnp.floating):
        raise TypeError(
            f"A magnitude gives real floating-point numbers, and this one gives {result.dtype}."
        )
    if not broadcasts(result.shape, w.shape):
        raise ValueError(
            f"A magnitude must broadcast to its weights, and of weights of shape {w.shape} this "
            f"one gives the shape {result.shape}; reduce with keepdims=True."
        )
    return result


def measure_once(magnitude: Magnitude, w: Float[Array, "*shape"]) -> Float[Array, "..."]:
    """What `measure` gives, but each number for as many weights: one a block if there are such."""
    blocks = getattr(magnitude, "blocks", None)
    return measure(magnitude, w) if blocks is None else blocks(jnp.asarray(w, comparison_dtype(w)))


def comparison_dtype(*values: Array) -> DTypeLike:
    """The dtype in which magnitudes and thresholds are compared: the promoted, float32 at least."""
    with jax.numpy_dtype_promotion("standard"):  # also where the user's own code is held to strict
        return jnp.result_type(jnp.float32, *values)


def like_weights(
    function: Callable[[Array], Array], w: Float[Array, "*shape"]
) -> Float[Array, "#*shape"]:
    """`function(w)`, of the shape of `w` but for axes of size 1, sharded as `w` is.

    On a mesh with Explicit axes, where reshaping a sharded axis is an error, XLA is left to find
    how what is in between is sharded, as on an Auto one.
    """
    sharding = jax.typeof(w).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return function(w)
    shape = jax.eval_shape(function, jax.ShapeDtypeStruct(w.shape, w.dtype)).shape
    spec = [None if size == 1 else name for size, name in zip(shape, sharding.spec, strict=True)]
    return auto_axes(function, out_sharding=NamedSharding(sharding.mesh, PartitionSpec(*spec)))(w)


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an array of `shape` broadcasts to the shape `to`."""
    try:
        return jnp.broadcast_shapes(shape, to) == to
    except ValueError:
        return False


def has_one_input_axis(shape: tuple[int, ...]) -> bool:
    """Whether a kernel's shape says that its input channels are the last axis but one alone.

    Two axes are a Dense layer's, and more than three a convolution's if its window is as long in
    every dimension, or 1. Three may be (embed, heads, head_dim), four a stack of those.
    """
    window = [size for size in shape[:-2] if size != 1]
    return len(shape) == 2 or (len(shape) > 3 and len(set(window)) < 2)


@dataclasses.dataclass(frozen=True)
class _BlockMagnitude:
    block: tuple[int | None, ...]
    axes: tuple[int, ...] | None

    def __post_init__(self) -> None:
        for length in self.block:
            if isinstance(length, bool) or not isinstance(length, int | np.integer | None):
                raise TypeError(
                    f"A block's lengths are integers or None for a whole axis, and one of "
                    f"{self.block} is {length!r}."
                )
        if not self.block or any(length is not None and length < 1 for length in self.block):
            raise ValueError(
                f"A block has a length of 1 or more for each axis, and this one is {self.block}; "
                "give for example (4, 1)."
            )
        if self.axes is not None and len(set(self.axes)) != len(self.block):
            raise ValueError(
                f"A block of {self.block} needs one axis for each length, and axes is {self.axes}."
            )

    def __call__(self, w: Float[Array, "*shape"]) -> Float[Array, "#*shape"]:
        lengths = self._lengths(w.shape)

        def of_weights(w: Array) -> Array:
            # The barrier keeps XLA from finding a block's again for each of its weights.
            values = lax.optimization_barrier(_root_mean_square(w, lengths))
            return _join(values, w.shape, lengths)

        return like_weights(of_weights, jnp.asarray(w))

    def blocks(self, w: Float[Array, "*shape"]) -> Float[Array, "..."]:
        """The same magnitudes, one a block instead of one a weight if all blocks are of a size."""
        lengths = self._lengths(w.shape)
        if any(size % length for size, length in zip(w.shape, lengths, strict=True)):
            return self(w)
        return _root_mean_square(jnp.asarray(w), lengths).reshape(_counts(w.shape, lengths))

    def _lengths(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The block's length along every axis of a kernel, or a ValueError."""
        axes = self.axes or tuple(range(-len(self.block), 0))
        dimensions = range(-len(shape), len(shape))
        if len({axis % len(shape) for axis in axes if axis in dimensions}) < len(axes):
            raise ValueError(
                f"Blocks of {self.block} along the axes {axes} need a kernel that has each of "
                f"these, and one of shape {shape} has not; leave it out with `prunable`."
            )
        grouped = any(length != 1 for length in self.block[:-1])
        if self.axes is None and grouped and not has_one_input_axis(shape):
            raise ValueError(
                f"Blocks of {self.block} group the input channels, the last axis but one, and a "
                f"kernel of shape {shape} may have others (an attention's are embed, heads, "
                f"head_dim): say which axes are meant, as in block_magnitude({self.block}, "
                f"axes={axes}), or leave the kernel out with `prunable`."
            )
        lengths = [1] * len(shape)
        for axis, length in zip(axes, self.block, strict=True):
            lengths[axis] = max(1, min(length or shape[axis], shape[axis]))
        return tuple(lengths)


@partial(jax.jit, static_argnums=1)
def _root_mean_square(w: Float[Array, "*shape"], lengths: tuple[int, ...]) -> Float[Array, "..."]:
    """The root mean square of each block, from an exact sum of rounded squares.

    A threshold often is the magnitude of a block, which must then have the same bits wherever it is
    computed, but compilers add floating-point numbers in the order that suits them. So the weights
    are divided by the largest of their block, and the squares are added as integers.
    """
    members = _members(_split(jnp.abs(w), lengths))
    largest = _merged(lax.max, jnp.max, members)
    unit = jnp.where(largest <= 0, 1, largest)
    shares = [jnp.where(x == unit, 1, x / unit) for x in members]  # infinity has no ratio to itself
    squares = [share * share for share in shares]
    mean_square = _exact_sum(squares, math.prod(lengths)) / _sizes(w.shape, lengths)
    return unit * jnp.sqrt(mean_square)


def _exact_sum(parts: list[Float[Array, "..."]], size: int) -> Float[Array, "..."]:
    """The sums of `size` numbers in [0, 1], one of them 1, the same in any order of adding.

    They are counted in units of 2**-bits, what is left in units of 2**-(2 bits), and so on until
    all that is left is less than the last place of the sum.
    """
    dtype = parts[0].dtype
    integer = jnp.int64 if dtype == jnp.float64 else jnp.int32
    exponent = math.ceil(math.log2(size))
    bits = np.iinfo(integer).bits - 2 - exponent  # the sum of the integers fits with one to spare
    words = math.ceil((exponent + jnp.finfo(dtype).nmant - 1) / bits)
    total = jnp.zeros((), dtype)
    for word in range(1, words + 1):
        parts = [x * 2.0**bits for x in parts]
        whole = [jnp.floor(x) if word < words else jnp.round(x) for x in parts]
        counted = _merged(lax.add, jnp.sum, [x.astype(integer) for x in whole])
        total += counted.astype(dtype) * 2.0 ** (-bits * word)
        parts = [x - y for x, y in zip(parts, whole, strict=True)]
    return total


def _members(blocks: Float[Array, "..."]) -> list[Float[Array, "..."]]:
    """The weights of small blocks, one of each block in each array; large blocks as they are.

    One after another they are read once, by one kernel, where XLA reads what is reduced as often as
    it is.
    """
    members, within = [blocks], range(1, blocks.ndim, 2)
    if math.prod(blocks.shape[axis] for axis in within) > _SMALL_BLOCK:
        return members
    for axis in within:
        places = range(blocks.shape[axis])
        if len(places) > 1:
            members = [lax.slice_in_dim(x, i, i + 1, axis=axis) for x in members for i in places]
    return members


def _merged(
    two: Callable[[Array, Array], Array],
    along: Callable[..., Array],
    members: list[Float[Array, "..."]],
) -> Float[Array, "..."]:
    """All members of each block as one, by a function of two of them or of them all."""
    if len(members) > 1:
        return reduce(two, members)
    return along(members[0], axis=tuple(range(1, members[0].ndim, 2)), keepdims=True)


def _split(x: Float[Array, "*shape"], lengths: tuple[int, ...]) -> Float[Array, "..."]:
    """Every axis as two, the blocks and what they hold; the last block is filled up with zeros."""
    counts = _counts(x.shape, lengths)
    missing = [
        count * length - size for size, count, length in zip(x.shape, counts, lengths, strict=True)
    ]
    padded = jnp.pad(x, [(0, size) for size in missing]) if any(missing) else x
    return padded.reshape([size for pair in zip(counts, lengths, strict=True) for size in pair])


def _join(
    x: Float[Array, "..."], shape: tuple[int, ...], lengths: tuple[int, ...]
) -> Float[Array, "..."]:
    """One value a block for each weight of it, or for all where the block is the whole axis."""
    counts = _counts(shape, lengths)
    repeats = [1 if count == 1 else length for count, length in zip(counts, lengths, strict=True)]
    pairs = [size for pair in zip(counts, repeats, strict=True) for size in pair]
    sizes = [count * repeat for count, repeat in zip(counts, repeats, strict=True)]
    joined = jnp.broadcast_to(x, pairs).reshape(sizes)
    return joined[tuple(slice(size) for size in shape)]


def _sizes(shape: tuple[int, ...], lengths: tuple[int, ...]) -> Any:
    """How many weights each block has, to broadcast to what `_split` gives."""
    sizes: Any = 1
    for axis, (size, length) in enumerate(zip(shape, lengths, strict=True)):
        if size % length == 0:
            sizes = sizes * length
            continue
        along = np.full(math.ceil(size / length), length)
        along[-1] = size % length
        sizes = sizes * along.reshape([-1 if i == 2 * axis else 1 for i in range(2 * len(shape))])
    return sizes


def _counts(shape: tuple[int, ...], lengths: tuple[int, ...]) -> list[int]:
    return [math.ceil(size / length) for size, length in zip(shape, lengths, strict=True)]
