"""Products and windows: dot_general, conv_general_dilated and reduce_window_* as nodes."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from feather_jax.cpu.equation import Equation, Rule, Unsupported
from feather_jax.cpu.graph import (
    FLOAT32,
    Constant,
    Convolution,
    MatMul,
    Node,
    Pad,
    Pool,
    Shape,
    reshape,
    transpose,
)
from feather_jax.cpu.sink import keeps_order


def dot(eqn: Equation, left: Node, right: Node) -> Node:
    """A dense layer (a convolution of one pixel) if one side is known, else a `MatMul`."""
    (contracted, batched) = eqn.params["dimension_numbers"]
    _floats_only(left, right)
    if isinstance(right.operation, Constant):
        return _dense(eqn, left, right.operation.value, contracted, batched, swapped=False)
    if isinstance(left.operation, Constant):
        value = left.operation.value
        return _dense(eqn, right, value, contracted[::-1], batched[::-1], swapped=True)

    plain, swapped = (
        (left, right, contracted, batched),
        (right, left, contracted[::-1], batched[::-1]),
    )
    if _moved(*swapped) >= _moved(*plain):
        return reshape(_matmul(*plain, eqn.name), eqn.shape, eqn.name)
    batch, left_free = len(batched[0]), len(left.shape) - len(contracted[0])
    right_free = len(eqn.shape) - left_free
    shape = (*eqn.shape[:batch], *eqn.shape[left_free:], *eqn.shape[batch:left_free])
    product = reshape(_matmul(*swapped, eqn.name), shape, eqn.name)
    behind = range(batch + right_free, len(shape))
    return transpose(product, (*range(batch), *behind, *range(batch, batch + right_free)), eqn.name)


def _orders(
    left: Node, right: Node, contracted: Sequence[Sequence[int]], batched: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How both sides' axes are to be ordered: [batch, free, inner] and [batch, inner, free]."""
    (left_inner, right_inner), (left_batch, right_batch) = contracted, batched
    left_free = _others(left.shape, left_inner, left_batch)
    right_free = _others(right.shape, right_inner, right_batch)
    return (*left_batch, *left_free, *left_inner), (*right_batch, *right_inner, *right_free)


def _moved(
    left: Node, right: Node, contracted: Sequence[Sequence[int]], batched: Sequence[Sequence[int]]
) -> int:
    """How many elements must be transposed for a matmul."""
    orders = _orders(left, right, contracted, batched)
    sides = zip((left, right), orders, strict=True)
    return sum(math.prod(x.shape) for x, order in sides if not keeps_order(order, x.shape))


def _matmul(
    left: Node,
    right: Node,
    contracted: Sequence[Sequence[int]],
    batched: Sequence[Sequence[int]],
    name: str,
) -> Node:
    batch = math.prod(left.shape[axis] for axis in batched[0])
    inner = math.prod(left.shape[axis] for axis in contracted[0])
    rows, columns = (math.prod(each.shape) // max(1, batch * inner) for each in (left, right))
    first, second = _orders(left, right, contracted, batched)
    left = reshape(transpose(left, first, name), (batch, rows, inner), name)
    right = reshape(transpose(right, second, name), (batch, inner, columns), name)
    return Node(MatMul(), (left, right), name)


def _dense(
    eqn: Equation,
    x: Node,
    kernel: np.ndarray,
    contracted: tuple[Sequence[int], Sequence[int]],
    batched: tuple[Sequence[int], Sequence[int]],
    *,
    swapped: bool,
) -> Node:
    """x [free..., batch..., inner...] times kernel [inner..., batch..., free...], of one group each
    batch element; the result is [batch..., free of x..., free of the kernel...], or with these two
    swapped."""
    (x_inner, kernel_inner), (x_batch, kernel_batch) = contracted, batched
    x_free = _others(x.shape, x_inner, x_batch)
    kernel_free = _others(kernel.shape, kernel_inner, kernel_batch)
    batch_shape = [x.shape[axis] for axis in x_batch]
    x_shape = [x.shape[axis] for axis in x_free]
    kernel_shape = [kernel.shape[axis] for axis in kernel_free]
    groups, features = math.prod(batch_shape), math.prod(kernel_shape)
    inner = math.prod(x.shape[axis] for axis in x_inner)

    # The first free axis, which is the batch of most programs, and all others as rows.
    pixels = (x_shape[0], math.prod(x_shape[1:])) if x_shape else (1, 1)
    x = transpose(x, (*x_free, *x_batch, *x_inner), eqn.name)
    x = reshape(x, (*pixels, 1, groups * inner), eqn.name)
    kernel = np.transpose(kernel, (*kernel_inner, *kernel_batch, *kernel_free))
    weights = np.ascontiguousarray(kernel.reshape(1, 1, inner, groups * features))
    result = Node(Convolution(weights, groups=groups), (x,), eqn.name)

    result = reshape(result, (*x_shape, *batch_shape, *kernel_shape), eqn.name)
    own, batch, theirs = (
        tuple(range(start, start + len(shape)))
        for start, shape in (
            (0, x_shape),
            (len(x_shape), batch_shape),
            (len(x_shape) + len(batch_shape), kernel_shape),
        )
    )
    order = (*batch, *theirs, *own) if swapped else (*batch, *own, *theirs)
    return transpose(result, order, eqn.name)


def _others(shape: Shape, *taken: Sequence[int]) -> tuple[int, ...]:
    used = {axis for axes in taken for axis in axes}
    return tuple(axis for axis in range(len(shape)) if axis not in used)


def _floats_only(*operands: Node) -> None:
    for operand in operands:
        if operand.dtype != FLOAT32:
            raise Unsupported(f"of {operand.dtype}, where it computes in float32")


def convolution(eqn: Equation, x: Node, kernel: Node) -> Node:
    """With a known kernel, over one or two spatial axes, in any layout."""
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    _floats_only(x, kernel)
    if not isinstance(kernel.operation, Constant):
        raise Unsupported("whose kernel depends on the arguments")
    if params["batch_group_count"] != 1:
        raise Unsupported("with a batch_group_count")
    axes = len(params["window_strides"])
    if axes not in (1, 2):
        raise Unsupported(f"over {axes} spatial axes, where it knows one and two")

    def layout(spec: Sequence[int]) -> tuple[int, ...]:
        """(batch, features, space...) as (batch, space..., features)."""
        return (spec[0], *spec[2:], spec[1])

    # A single axis is the height of images of width 1.
    fill = (1,) * (2 - axes)
    output, inputs, *space = numbers.rhs_spec
    weights = np.transpose(kernel.operation.value, (*space, inputs, output))
    weights = weights.reshape(*weights.shape[:axes], *fill, *weights.shape[axes:])
    x = transpose(x, layout(numbers.lhs_spec), eqn.name)
    x = _interior(x, tuple(params["lhs_dilation"]), eqn.name)
    batch, *size, channels = x.shape
    x = reshape(x, (batch, *size, *fill, channels), eqn.name)
    padding = (*(tuple(map(int, each)) for each in params["padding"]), *((0, 0) for _ in fill))
    operation = Convolution(
        np.ascontiguousarray(weights),
        strides=(*params["window_strides"], *fill),  # type: ignore[arg-type]
        padding=padding,  # type: ignore[arg-type]
        dilation=(*params["rhs_dilation"], *fill),  # type: ignore[arg-type]
        groups=params["feature_group_count"],
    )
    result = Node(operation, (x,), eqn.name)
    batch, *size, channels = result.shape
    result = reshape(result, (batch, *size[:axes], channels), eqn.name)
    return transpose(result, tuple(np.argsort(layout(numbers.out_spec)).tolist()), eqn.name)


def _interior(x: Node, dilation: tuple[int, ...], name: str) -> Node:
    """Zeros between the pixels of [batch, space..., channels], as a transposed convolution has."""
    if all(each == 1 for each in dilation):
        return x
    interior = (0, *(each - 1 for each in dilation), 0)
    return Node(Pad(np.float32(0), ((0, 0),) * len(x.shape), interior), (x,), name)


def pooling(kind: str) -> Rule:
    """reduce_window of a `kind` over at most two axes, in any layout."""

    def rule(eqn: Equation, x: Node) -> Node:
        params = eqn.params
        if any(each != 1 for each in params["base_dilation"]):
            raise Unsupported("with a base_dilation")
        windows = list(
            zip(
                params["window_dimensions"],
                params["window_strides"],
                (tuple(map(int, each)) for each in params["padding"]),
                params["window_dilation"],
                strict=True,
            )
        )
        trivial = (1, 1, (0, 0), 1)
        pooled = [axis for axis, window in enumerate(windows) if window[:3] != trivial[:3]]
        if len(pooled) > 2:
            raise Unsupported(f"over {len(pooled)} axes, where it knows one and two")
        others = [axis for axis in range(len(windows)) if axis not in pooled]
        batch = [axis for axis in others if not pooled or axis < pooled[0]]
        if len(batch) == len(others):  # [n, c, h, w] or [c, h, w]: the last of them are channels
            batch = batch[:-1]
        channels = [axis for axis in others if axis not in batch]
        window, strides, padding, dilation = zip(
            *(windows[axis] for axis in pooled), *[trivial] * (2 - len(pooled)), strict=True
        )

        order = (*batch, *pooled, *channels)
        x = transpose(x, order, eqn.name)
        n, c = (
            math.prod(x.shape[order.index(axis)] for axis in each) for each in (batch, channels)
        )
        space = [x.shape[order.index(axis)] for axis in pooled] + [1] * (2 - len(pooled))
        x = reshape(x, (n, *space, c), eqn.name)
        x = Node(Pool(kind, window, strides, padding, dilation), (x,), eqn.name)
        x = reshape(x, tuple(eqn.shape[axis] for axis in order), eqn.name)
        return transpose(x, tuple(np.argsort(order).tolist()), eqn.name)

    return rule


def cumulative(kind: str) -> Rule:
    """The `kind` of all elements up to each one along an axis: a window that reaches to the end."""
    pool = pooling(kind)

    def rule(eqn: Equation, x: Node) -> Node | tuple[Node, ...]:
        axis, ones = eqn.params["axis"], (1,) * len(x.shape)
        size = x.shape[axis]
        behind = (0, size - 1) if eqn.params["reverse"] else (size - 1, 0)
        params = {
            "base_dilation": ones,
            "window_dilation": ones,
            "window_strides": ones,
            "window_dimensions": tuple(size if i == axis else 1 for i in range(len(ones))),
            "padding": tuple(behind if i == axis else (0, 0) for i in range(len(ones))),
        }
        return pool(dataclasses.replace(eqn, params=params), x)

    return rule
