"""Element-wise expressions in LLVM IR, on single values or on vectors of any width."""

from collections.abc import Callable, Sequence

import llvmlite.ir as ir
import numpy as np

from feather_jax.cpu import functions
from feather_jax.cpu.emit import F32, Builder, Value
from feather_jax.cpu.functions import constant, intrinsic, like, resized
from feather_jax.cpu.graph import FLOAT32, Literal, Step, Steps


def emit_steps(
    b: Builder,
    steps: Steps,
    operands: Sequence[Value],
    dtypes: Sequence[np.dtype] | None = None,
) -> Value:
    """The value of an expression.

    Args:
      b: where the code goes.
      steps: the expression.
      operands: its arguments, all floats, integers or bits, or all vectors of as many lanes.
      dtypes: theirs, as NumPy has them; float32 all if not given.

    Returns:
      The last step's result: a value of as many lanes.
    """
    values = list(operands)
    known = list(dtypes or [FLOAT32] * len(operands))
    lanes = operands[0].type
    for step in steps:
        own, types = [], []
        for operand in step.operands:
            if isinstance(operand, int):
                own.append(values[operand])
                types.append(known[operand])
            else:
                value = operand.value
                types.append(value.dtype)
                own.append(constant(resized(lanes, element(value.dtype)), value.item()))
        values.append(_step(b, step, own, types))
        known.append(step.dtype)
    return values[-1]


def element(dtype: np.dtype) -> ir.Type:
    """LLVM's type for values of a dtype; a bool is one bit."""
    if dtype == FLOAT32:
        return F32
    return ir.IntType(1 if dtype == np.bool_ else 8 * dtype.itemsize)


def _step(b: Builder, step: Step, operands: list[Value], dtypes: list[np.dtype]) -> Value:
    if step.function == "convert":
        return convert(b, operands[0], dtypes[0], step.dtype)
    if step.function == "select":
        return b.select(*operands)
    dtype = dtypes[0]
    if step.function in _ORDERS:
        return _compare(b, _ORDERS[step.function], operands, dtype)
    if dtype == FLOAT32:
        if step.function in ("maximum", "minimum"):
            return _extreme(b, step, operands)
        return _FLOATS[step.function](b, *operands)
    if step.function in _INTEGERS:
        return _INTEGERS[step.function](b, *operands)
    return _SIGNED[step.function](b, np.issubdtype(dtype, np.signedinteger), *operands)


_ORDERS = {
    "equal": "==",
    "greater": ">",
    "greater_equal": ">=",
    "less": "<",
    "less_equal": "<=",
    "not_equal": "!=",
}


def _compare(b: Builder, order: str, operands: list[Value], dtype: np.dtype) -> Value:
    if dtype == FLOAT32:  # NaN differs from all, and is in no order
        compare = b.fcmp_unordered if order == "!=" else b.fcmp_ordered
    elif np.issubdtype(dtype, np.signedinteger):
        compare = b.icmp_signed
    else:
        compare = b.icmp_unsigned
    return compare(order, *operands)


def _extreme(b: Builder, step: Step, operands: list[Value]) -> Value:
    """The larger or smaller of two, NaN if either is; one instruction if one is a number."""
    order = ">" if step.function == "maximum" else "<"
    x, y = operands
    literal = [isinstance(each, Literal) and not np.isnan(each.value) for each in step.operands]
    if literal[1]:
        x, y = y, x
    chosen = b.select(b.fcmp_ordered(order, x, y), x, y)  # y where either is NaN
    return chosen if any(literal) else b.select(b.fcmp_unordered("uno", x, x), x, chosen)


def convert(b: Builder, x: Value, old: np.dtype, new: np.dtype) -> Value:
    """As XLA does: floats into integers towards zero and within range, NaN to 0."""
    kind = resized(x.type, element(new))
    if old == new:
        return x
    if new == np.bool_:
        return _compare(b, "!=", [x, like(x, 0)], old)
    signed = np.issubdtype(old, np.signedinteger)
    if new == FLOAT32:
        return b.sitofp(x, kind) if signed else b.uitofp(x, kind)
    if old == FLOAT32:
        name = "llvm.fptosi.sat" if np.issubdtype(new, np.signedinteger) else "llvm.fptoui.sat"
        return intrinsic(b, name, x, result=kind)
    if element(new).width == element(old).width:
        return x
    if element(new).width < element(old).width:
        return b.trunc(x, kind)
    return b.sext(x, kind) if signed else b.zext(x, kind)


def _reciprocal_root(b: Builder, x: Value) -> Value:
    return b.fdiv(like(x, 1), functions.square_root(b, x))


def _float_sign(b: Builder, x: Value) -> Value:
    """1, -1, or x itself if it is a zero or NaN."""
    unit = intrinsic(b, "llvm.copysign", like(x, 1), x)
    return b.select(b.fcmp_ordered("!=", x, like(x, 0)), unit, x)


def _is_finite(b: Builder, x: Value) -> Value:
    return b.fcmp_ordered("<", functions.magnitude(b, x), like(x, float("inf")))


_FLOATS: dict[str, Callable[..., Value]] = {
    "abs": functions.magnitude,
    "add": lambda b, x, y: b.fadd(x, y),
    "ceil": functions.ceil,
    "cos": functions.cosine,
    "divide": lambda b, x, y: b.fdiv(x, y),
    "erf": functions.error_function,
    "erfc": functions.complementary_error_function,
    "exp": functions.exponential,
    "expm1": functions.exponential_minus_one,
    "floor": functions.floor,
    "is_finite": _is_finite,
    "log": functions.logarithm,
    "log1p": functions.logarithm_plus_one,
    "logistic": functions.logistic,
    "multiply": lambda b, x, y: b.fmul(x, y),
    "negative": lambda b, x: b.fneg(x),
    "power": functions.power,
    "remainder": functions.remainder,
    "round": functions.round_even,
    "rsqrt": _reciprocal_root,
    "sign": _float_sign,
    "sin": functions.sine,
    "sqrt": functions.square_root,
    "subtract": lambda b, x, y: b.fsub(x, y),
    "tanh": functions.hyperbolic_tangent,
}

_INTEGERS: dict[str, Callable[..., Value]] = {
    "add": lambda b, x, y: b.add(x, y),
    "and": lambda b, x, y: b.and_(x, y),
    "is_finite": lambda b, x: b.icmp_signed("==", x, x),
    "multiply": lambda b, x, y: b.mul(x, y),
    "negative": lambda b, x: b.neg(x),
    "not": lambda b, x: b.not_(x),
    "or": lambda b, x, y: b.or_(x, y),
    "subtract": lambda b, x, y: b.sub(x, y),
    "xor": lambda b, x, y: b.xor(x, y),
}


def _less(b: Builder, signed: bool, x: Value, y: Value) -> Value:
    return (b.icmp_signed if signed else b.icmp_unsigned)("<", x, y)


def _integer_abs(b: Builder, signed: bool, x: Value) -> Value:
    return b.select(b.icmp_signed("<", x, like(x, 0)), b.neg(x), x) if signed else x


def _integer_sign(b: Builder, signed: bool, x: Value) -> Value:
    sign = b.select(_less(b, signed, x, like(x, 0)), like(x, -1), like(x, 1))
    return b.select(b.icmp_signed("==", x, like(x, 0)), x, sign)


def _divisor(b: Builder, signed: bool, x: Value, y: Value) -> Value:
    """`y`, or 1 where the processor would stop: at 0, and for the least integer by -1."""
    bad = b.icmp_signed("==", y, like(y, 0))
    if signed:
        least = b.icmp_signed("==", x, like(x, -(2 ** (_width(x) - 1))))
        bad = b.or_(bad, b.and_(least, b.icmp_signed("==", y, like(y, -1))))
    return b.select(bad, like(y, 1), y)


def _width(x: Value) -> int:
    return (x.type.element if isinstance(x.type, ir.VectorType) else x.type).width


def _integer_divide(b: Builder, signed: bool, x: Value, y: Value) -> Value:
    """Towards zero; by 0 it is -1, all bits set, as XLA has it."""
    safe = _divisor(b, signed, x, y)
    quotient = b.sdiv(x, safe) if signed else b.udiv(x, safe)
    return b.select(b.icmp_signed("==", y, like(y, 0)), like(x, -1), quotient)


def _integer_remainder(b: Builder, signed: bool, x: Value, y: Value) -> Value:
    """With the sign of x; by 0 it is x, as XLA has it."""
    safe = _divisor(b, signed, x, y)
    rest = b.srem(x, safe) if signed else b.urem(x, safe)
    return b.select(b.icmp_signed("==", y, like(y, 0)), x, rest)


_SIGNED: dict[str, Callable[..., Value]] = {
    "abs": _integer_abs,
    "divide": _integer_divide,
    "maximum": lambda b, signed, x, y: b.select(_less(b, signed, x, y), y, x),
    "minimum": lambda b, signed, x, y: b.select(_less(b, signed, x, y), x, y),
    "remainder": _integer_remainder,
    "sign": _integer_sign,
}
