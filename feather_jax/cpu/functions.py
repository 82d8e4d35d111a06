"""The elementary functions in LLVM IR, on a float or a vector of floats: no library behind them.

Each is within a few units in the last place, and NaN, infinities and zeros are as in C. They are
written in a form that gives the same bits in a vector as alone, and (`Real`) for float32 and,
where an intermediate result needs it, float64.
"""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import llvmlite.ir as ir
import numpy as np

from feather_jax.cpu.emit import F32, I32, I64, Builder, Value

F64 = ir.DoubleType()
LN2 = Fraction("0.6931471805599453094172321214581765680755001343602552541206800095")


@dataclasses.dataclass(frozen=True)
class Real:
    """A floating-point type and what depends on its precision.

    Attributes:
      kind, integer: LLVM's type, and the integer of as many bits.
      mantissa, bias: bits of the fraction, and of the exponent what stands for 0.
      high: bits of ln 2 that multiply any exponent exactly.
      exponential, logarithm: terms of the two series.
    """

    kind: ir.Type
    integer: ir.IntType
    mantissa: int
    bias: int
    high: int
    exponential: int
    logarithm: int

    @property
    def magic(self) -> float:
        """Added to a number below it, this leaves its nearest integer in the lowest bits."""
        return 1.5 * 2.0**self.mantissa

    @property
    def ln2(self) -> tuple[float, float]:
        """ln 2 in two parts, the first of few bits."""
        high = Fraction(round(LN2 * 2**self.high), 2**self.high)
        return float(high), float(LN2 - high)


SINGLE = Real(F32, I32, 23, 127, 12, 7, 4)
DOUBLE = Real(F64, I64, 52, 1023, 32, 13, 10)

# erfc(x) = t exp(g(t) - x^2) with t = 1 / (1 + x/2). For x from 0 to 12 g is smooth, and this its
# least-squares polynomial in t - 1/2 at Chebyshev nodes, within 6e-8.
_ERFC = (
    *(-0.6717940688800934, 1.3452851804949588, 0.18936854370433145, -0.3750430088348794),
    *(-0.15777274491522084, 0.27904558424811354, 0.1106592522555229, -0.2623142370612226),
    *(-0.0403020160799821, 0.1577510139933128),
)


def like(value: Value, number: float) -> ir.Constant:
    """A constant of a value's type, in all lanes if it is a vector."""
    return constant(value.type, number)


def constant(kind: ir.Type, number: float) -> ir.Constant:
    element = kind.element if isinstance(kind, ir.VectorType) else kind
    own = float(number) if isinstance(element, (ir.FloatType, ir.DoubleType)) else int(number)
    if isinstance(element, ir.FloatType):
        own = float(np.float32(own))  # LLVM wants it exact
    return ir.Constant(kind, [own] * kind.count if isinstance(kind, ir.VectorType) else own)


def resized(kind: ir.Type, element: ir.Type) -> ir.Type:
    """`element`, or as many of it as `kind` has lanes."""
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element


def intrinsic(b: Builder, name: str, *operands: Value, result: ir.Type | None = None) -> Value:
    """LLVM's function `name`, overloaded by its result's type and, if it differs, its operand's."""
    kind, types = result or operands[0].type, [operand.type for operand in operands]
    overload = [kind] if result is None else [kind, types[0]]
    full = ".".join([name, *map(_suffix, overload)])
    return b.call(b.code.intrinsic(full, kind, types), operands)


def _suffix(kind: ir.Type) -> str:
    if isinstance(kind, ir.VectorType):
        return f"v{kind.count}{_suffix(kind.element)}"
    if isinstance(kind, ir.IntType):
        return f"i{kind.width}"
    return "f32" if isinstance(kind, ir.FloatType) else "f64"


def multiply_add(b: Builder, x: Value, y: Value | float, z: Value | float) -> Value:
    y, z = (each if isinstance(each, ir.Value) else like(x, each) for each in (y, z))
    return intrinsic(b, "llvm.fmuladd", x, y, z)


def polynomial(b: Builder, x: Value, coefficients: Sequence[float]) -> Value:
    """coefficients[0] + coefficients[1] x + ... by Horner's rule."""
    result: Value = like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = multiply_add(b, result, x, coefficient)
    return result


def clip(b: Builder, x: Value, low: float, high: float) -> Value:
    """Between two numbers; NaN stays NaN."""
    x = b.select(b.fcmp_ordered(">", like(x, low), x), like(x, low), x)
    return b.select(b.fcmp_ordered("<", like(x, high), x), like(x, high), x)


def magnitude(b: Builder, x: Value) -> Value:
    return intrinsic(b, "llvm.fabs", x)


def square_root(b: Builder, x: Value) -> Value:
    return intrinsic(b, "llvm.sqrt", x)


def _power_of_two(b: Builder, n: Value, real: Real) -> Value:
    """2^n for integers n within the exponents of normal numbers."""
    bits = b.shl(b.add(n, like(n, real.bias)), like(n, real.mantissa))
    return b.bitcast(bits, resized(n.type, real.kind))


def _reduce(b: Builder, x: Value, real: Real, addend: Value | None = None) -> tuple[Value, Value]:
    """(n, r) such that x + addend = n ln 2 + r and |r| is at most half of ln 2."""
    integers = resized(x.type, real.integer)
    high, low = real.ln2
    total = x if addend is None else b.fadd(x, addend)
    shifted = multiply_add(b, total, 1 / math.log(2), real.magic)
    n = b.fsub(shifted, like(x, real.magic))
    rest = multiply_add(b, n, -low, multiply_add(b, n, -high, x))
    rest = rest if addend is None else b.fadd(rest, addend)
    magic = b.bitcast(like(x, real.magic), integers)
    return b.sub(b.bitcast(shifted, integers), magic), rest


def exponential(b: Builder, x: Value, real: Real = SINGLE, addend: Value | None = None) -> Value:
    """e^(x + addend), the sum not being rounded; the addend is small."""
    limit = real.bias * math.log(2)
    x = clip(b, x, -limit - 0.7 * real.mantissa, limit + 1)
    n, rest = _reduce(b, x, real, addend)
    series = [1 / math.factorial(k) for k in range(real.exponential + 1)]
    result = polynomial(b, rest, series)
    # In two steps, as 2^n is no normal number near the ends of the range.
    half = b.ashr(n, like(n, 1))
    result = b.fmul(result, _power_of_two(b, half, real))
    return b.fmul(result, _power_of_two(b, b.sub(n, half), real))


def exponential_minus_one(b: Builder, x: Value) -> Value:
    n, rest = _reduce(b, clip(b, x, -60, 89), SINGLE)
    series = [1 / math.factorial(k) for k in range(2, SINGLE.exponential + 2)]
    own = multiply_add(b, b.fmul(rest, rest), polynomial(b, rest, series), rest)
    # 2 (2^(n-1) own + 2^(n-1) - 1/2): nothing is lost at n = 0, or overflows at the largest n.
    half = _power_of_two(b, b.sub(n, like(n, 1)), SINGLE)
    result = multiply_add(b, half, own, b.fsub(half, like(x, 0.5)))
    return b.fadd(result, result)


def logarithm(b: Builder, x: Value, real: Real = SINGLE) -> Value:
    integers = resized(x.type, real.integer)
    tiny = b.fcmp_ordered("<", x, like(x, 2.0 ** (1 - real.bias)))
    scaled = b.select(tiny, b.fmul(x, like(x, 2.0**real.mantissa)), x)
    bits = b.bitcast(scaled, integers)
    least = b.bitcast(like(x, math.sqrt(0.5)), integers)
    exponent = b.ashr(b.sub(bits, least), like(bits, real.mantissa))
    fraction = b.bitcast(b.sub(bits, b.shl(exponent, like(bits, real.mantissa))), x.type)
    exponent = b.sub(exponent, b.select(tiny, like(bits, real.mantissa), like(bits, 0)))
    n = b.sitofp(exponent, x.type)
    # With the fraction, in [sqrt(1/2), sqrt(2)), as (1 + s) / (1 - s): 2 (s + s^3/3 + s^5/5 + ...).
    rest = b.fsub(fraction, like(x, 1))
    s = b.fdiv(rest, b.fadd(rest, like(x, 2)))
    series = [2 / (2 * k + 1) for k in range(1, real.logarithm + 1)]
    square = b.fmul(s, s)
    tail = b.fmul(b.fmul(s, square), polynomial(b, square, series))
    high, low = real.ln2
    small = b.fadd(b.fadd(s, s), multiply_add(b, n, low, tail))
    result = multiply_add(b, n, high, small)
    bad = b.select(b.fcmp_ordered("==", x, like(x, 0)), like(x, -math.inf), like(x, math.nan))
    result = b.select(b.fcmp_ordered(">", x, like(x, 0)), result, bad)
    return b.select(b.fcmp_ordered("==", x, like(x, math.inf)), x, result)


def logarithm_plus_one(b: Builder, x: Value) -> Value:
    """log(u) x / (u - 1) for u = 1 + x as it is rounded: the errors of both cancel (Kahan)."""
    u = b.fadd(x, like(x, 1))
    difference = b.fsub(u, like(x, 1))
    result = b.fmul(logarithm(b, u), b.fdiv(x, difference))
    result = b.select(b.fcmp_ordered("==", difference, like(x, 0)), x, result)
    return b.select(b.fcmp_ordered("==", u, like(x, math.inf)), u, result)


def logistic(b: Builder, x: Value) -> Value:
    one = like(x, 1)
    return b.fdiv(one, b.fadd(one, exponential(b, b.fneg(x))))


def hyperbolic_tangent(b: Builder, x: Value) -> Value:
    x = clip(b, x, -10, 10)
    t = exponential_minus_one(b, b.fadd(x, x))
    return b.fdiv(t, b.fadd(t, like(x, 2)))


def _error_near_zero(b: Builder, x: Value) -> Value:
    """erf(x) by its series, for |x| below 0.5."""
    scale = 2 / math.sqrt(math.pi)
    series = [scale * (-1) ** k / (math.factorial(k) * (2 * k + 1)) for k in range(8)]
    return b.fmul(x, polynomial(b, b.fmul(x, x), series))


def _error_tail(b: Builder, x: Value) -> Value:
    """erfc(x) for x from 0."""
    x = clip(b, x, 0, 12)
    t = b.fdiv(like(x, 1), multiply_add(b, x, 0.5, 1.0))
    # x^2 = short^2 + (x - short) (x + short), where the first is exact, `short` having few bits.
    bits = b.bitcast(x, resized(x.type, I32))
    short = b.bitcast(b.and_(bits, like(bits, -(1 << 12))), x.type)
    rest = b.fmul(b.fsub(x, short), b.fadd(x, short))
    addend = b.fsub(polynomial(b, b.fsub(t, like(t, 0.5)), _ERFC), rest)
    return b.fmul(t, exponential(b, b.fneg(b.fmul(short, short)), addend=addend))


def error_function(b: Builder, x: Value) -> Value:
    size = magnitude(b, x)
    beyond = intrinsic(b, "llvm.copysign", b.fsub(like(x, 1), _error_tail(b, size)), x)
    return b.select(b.fcmp_ordered(">", size, like(x, 0.5)), beyond, _error_near_zero(b, x))


def complementary_error_function(b: Builder, x: Value) -> Value:
    tail = _error_tail(b, magnitude(b, x))
    return b.select(b.fcmp_ordered("<", x, like(x, 0)), b.fsub(like(x, 2), tail), tail)


def round_even(b: Builder, x: Value, real: Real = SINGLE) -> Value:
    """To the nearest integer, halves to the even one; a library call on some targets otherwise."""
    limit, size = like(x, 2.0**real.mantissa), magnitude(b, x)
    rounded = b.fsub(b.fadd(size, limit), limit)
    rounded = intrinsic(b, "llvm.copysign", rounded, x)
    return b.select(b.fcmp_ordered("<", size, limit), rounded, x)


def floor(b: Builder, x: Value, real: Real = SINGLE) -> Value:
    rounded = round_even(b, x, real)
    lower = b.fsub(rounded, like(x, 1))
    return b.select(b.fcmp_ordered(">", rounded, x), lower, rounded)


def ceil(b: Builder, x: Value) -> Value:
    return b.fneg(floor(b, b.fneg(x)))


def sine(b: Builder, x: Value, quarter: int = 0) -> Value:
    """sin(x + quarter pi/2), reduced in float64: exact to float32 for |x| below 1e8."""
    x = b.fpext(x, resized(x.type, F64))
    integers = resized(x.type, I64)
    shifted = multiply_add(b, x, 2 / math.pi, DOUBLE.magic)
    n = b.fsub(shifted, like(x, DOUBLE.magic))
    high = float(Fraction(round(math.pi / 2 * 2**26), 2**26))
    low = float(Fraction("1.5707963267948966192313216916397514421") - Fraction(high))
    rest = multiply_add(b, n, -low, multiply_add(b, n, -high, x))
    square = b.fmul(rest, rest)
    signs = [(-1) ** k for k in range(7)]
    odd = [sign / math.factorial(2 * k + 1) for k, sign in enumerate(signs)]
    even = [sign / math.factorial(2 * k) for k, sign in enumerate(signs)]
    turn = b.add(b.bitcast(shifted, integers), constant(integers, quarter))
    flip = b.icmp_signed("!=", b.and_(turn, like(turn, 1)), like(turn, 0))
    value = b.select(flip, polynomial(b, square, even), b.fmul(rest, polynomial(b, square, odd)))
    minus = b.icmp_signed("!=", b.and_(turn, like(turn, 2)), like(turn, 0))
    return b.fptrunc(b.select(minus, b.fneg(value), value), resized(x.type, F32))


def cosine(b: Builder, x: Value) -> Value:
    return sine(b, x, quarter=1)


def power(b: Builder, x: Value, y: Value) -> Value:
    """x^y as C's pow, by logarithm and exponential in float64."""
    wide = resized(x.type, F64)
    x, y = b.fpext(x, wide), b.fpext(y, wide)
    size = magnitude(b, x)
    result = exponential(b, b.fmul(y, logarithm(b, size, DOUBLE)), DOUBLE)
    one, zero, infinity = like(x, 1), like(x, 0), like(x, math.inf)
    ordered = b.fcmp_ordered("==", y, y)
    result = b.select(b.and_(b.fcmp_ordered("==", size, one), ordered), one, result)

    half = b.fmul(y, like(y, 0.5))
    whole = b.fcmp_ordered("==", floor(b, y, DOUBLE), y)
    odd = b.and_(whole, b.fcmp_unordered("!=", floor(b, half, DOUBLE), half))
    sign = intrinsic(b, "llvm.copysign", one, x)
    result = b.select(odd, b.fmul(result, sign), result)
    negative = b.and_(b.fcmp_ordered("<", x, zero), b.fcmp_ordered("<", size, infinity))
    result = b.select(b.and_(negative, b.not_(whole)), like(x, math.nan), result)
    certain = b.or_(b.fcmp_ordered("==", y, zero), b.fcmp_ordered("==", x, one))
    return b.fptrunc(b.select(certain, one, result), resized(x.type, F32))


def remainder(b: Builder, x: Value, y: Value) -> Value:
    """Of the division towards zero, with the sign of x; exact while the quotient is below 2^29."""
    wide = resized(x.type, F64)
    left, right = b.fpext(x, wide), b.fpext(y, wide)
    ratio = b.fdiv(left, right)
    down = floor(b, magnitude(b, ratio), DOUBLE)
    whole = intrinsic(b, "llvm.copysign", down, ratio)
    rest = b.fptrunc(multiply_add(b, b.fneg(whole), right, left), x.type)
    rest = intrinsic(b, "llvm.copysign", rest, x)
    finite = b.fcmp_ordered("<", magnitude(b, x), like(x, math.inf))
    endless = b.fcmp_ordered("==", magnitude(b, y), like(x, math.inf))
    return b.select(b.and_(finite, endless), x, rest)
