"""Products of a few vectors with a matrix: dense layers on one image, or a handful.

Where there are more rows to multiply than that, they are the pixels of a sparse convolution.
"""

import dataclasses

import llvmlite.ir as ir
import numpy as np

from feather_jax.cpu.emit import F32, Builder, Code, Value, i64, vector_of
from feather_jax.cpu.expressions import emit_steps
from feather_jax.cpu.graph import Steps
from feather_jax.cpu.tiles import FLOAT

CHAINS = 8  # independent sums of the sparse product, to hide the latency of the multiply-add


@dataclasses.dataclass(frozen=True)
class SparseProduct:
    """y[i] = activation(W x[i] + bias + residual[i]) for the rows of x, from lists of pairs.

    Operands: y, x, residual (y again where there is none), bias, rows, pairs. Work items are the
    outputs.

    Attributes:
      batch, inputs, outputs: sizes; y is [batch, outputs] and x [batch, inputs], by rows.
      residual: whether there is one.
      activation: steps of one argument.
    """

    batch: int
    inputs: int
    outputs: int
    residual: bool
    activation: Steps

    @property
    def items(self) -> int:
        return self.outputs


@dataclasses.dataclass(frozen=True)
class DenseProduct:
    """The same for a matrix of which most is not zero: a lane is an output.

    Operands: y, x, residual, bias, weights [inputs, `padded`]. Work items are vectors of outputs. A
    weight that is zero leaves its lane as it is.

    Attributes:
      lanes: outputs of a vector.
      masked: whether any weight is zero.
    """

    batch: int
    inputs: int
    outputs: int
    residual: bool
    activation: Steps
    lanes: int
    masked: bool

    @property
    def items(self) -> int:
        return -(-self.outputs // self.lanes)


def pack_product(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lists of a matrix [inputs, outputs]: int32 [outputs + 1] first pairs, and the pairs."""
    column, row = np.nonzero(weights.T)
    pairs = np.empty(len(row), [("weight", np.float32), ("offset", np.int32)])
    pairs["weight"] = weights[row, column]
    pairs["offset"] = FLOAT * row
    counts = np.bincount(column, minlength=weights.shape[1])
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32), pairs


def pad_outputs(values: np.ndarray, lanes: int) -> np.ndarray:
    """The last axis made a multiple of `lanes` with zeros."""
    missing = -values.shape[-1] % lanes
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])


def emit_sparse_product(code: Code, spec: SparseProduct) -> ir.Function:
    """void f(y, x, residual, bias, rows, pairs, begin, end)."""
    b, (y, x, residual, bias, rows, pairs, begin, end) = code.start("sparse_product", 6)
    zero = ir.Constant(F32, 0.0)

    def output(number: Value) -> None:
        own = b.address(rows, b.scale(number, 4))
        low, high = b.read_index(own), b.read_index(own, 4)
        whole = b.sub(high, b.srem(b.sub(high, low), i64(CHAINS)))
        for image in range(spec.batch):
            source = b.address(x, image * spec.inputs * FLOAT)

            def product(pair: Value, total: Value, source: Value = source) -> Value:
                value = b.read(b.address(source, b.read_index(pair, 4)), F32)
                return b.multiply_add(b.read(pair, F32), value, total)

            def several(k: Value, *sums: Value, product=product) -> list[Value]:
                first = b.address(pairs, b.scale(k, 8))
                return [product(b.address(first, 8 * i), sums[i]) for i in range(CHAINS)]

            def one(k: Value, total: Value, product=product) -> list[Value]:
                return [product(b.address(pairs, b.scale(k, 8)), total)]

            sums = b.loop(low, whole, several, [zero] * CHAINS, CHAINS)
            while len(sums) > 1:
                half = len(sums) // 2
                sums = [b.fadd(sums[i], sums[i + half]) for i in range(half)]
            (total,) = b.loop(whole, high, one, sums)
            at = b.scale(number, FLOAT)
            total = b.fadd(total, b.read(bias, F32, at))
            place = b.add(at, i64(image * spec.outputs * FLOAT))
            _finish(b, spec, total, y, residual, place, 1)

    b.loop(begin, end, output)
    b.ret_void()
    return b.function


def emit_dense_product(code: Code, spec: DenseProduct) -> ir.Function:
    """void f(y, x, residual, bias, weights, begin, end)."""
    b, (y, x, residual, bias, weights, begin, end) = code.start("dense_product", 5)
    kind, lanes = vector_of(spec.lanes), spec.lanes
    padded = -(-spec.outputs // lanes) * lanes
    left = spec.outputs % lanes
    zero = ir.Constant(kind, [0.0] * lanes)
    chains = 4

    def vector(number: Value) -> None:
        at = b.scale(number, FLOAT * lanes)
        own = b.address(weights, at)

        for image in range(spec.batch):
            source = b.address(x, image * spec.inputs * FLOAT)

            def one(k: Value, total: Value, source: Value = source) -> Value:
                weight = b.read(own, kind, b.scale(k, FLOAT * padded))
                value = b.splat(b.read(source, F32, b.scale(k, FLOAT)), lanes)
                result = b.multiply_add(weight, value, total)
                if not spec.masked:
                    return result
                return b.select(b.fcmp_unordered("!=", weight, zero), result, total)

            def several(k: Value, *sums: Value, one=one) -> list[Value]:
                return [one(b.add(k, i64(i)), total) for i, total in enumerate(sums)]

            whole = spec.inputs - spec.inputs % chains
            sums = b.loop(i64(0), i64(whole), several, [zero] * chains, chains)
            for k in range(whole, spec.inputs):
                sums[k - whole] = one(i64(k), sums[k - whole])
            total = b.fadd(b.fadd(sums[0], sums[1]), b.fadd(sums[2], sums[3]))
            total = b.fadd(total, b.read(bias, kind, at, 4))
            place = b.add(at, i64(image * spec.outputs * FLOAT))

            def finish(count: int, total: Value = total, place: Value = place) -> None:
                """The first `count` lanes of the vector."""
                if count == lanes:
                    _finish(b, spec, total, y, residual, place, lanes)
                    return
                for lane in range(count):
                    value = b.extract_element(total, ir.Constant(ir.IntType(32), lane))
                    at = b.add(place, i64(FLOAT * lane))
                    _finish(b, spec, value, y, residual, at, 1)

            if not left:
                finish(lanes)
            else:
                last = b.icmp_signed("==", number, i64(spec.outputs // lanes))
                with b.if_else(last) as (partial, full):
                    with partial:
                        finish(left)
                    with full:
                        finish(lanes)

    b.loop(begin, end, vector)
    b.ret_void()
    return b.function


def _finish(
    b: Builder,
    spec: SparseProduct | DenseProduct,
    total: Value,
    y: Value,
    residual: Value,
    place: Value,
    lanes: int,
) -> None:
    """Adds the residual, activates and writes `lanes` outputs."""
    if spec.residual:
        total = b.fadd(total, b.read(residual, total.type, place, FLOAT))
    if spec.activation:
        total = emit_steps(b, spec.activation, [total])
    b.write(total, y, place, FLOAT)
