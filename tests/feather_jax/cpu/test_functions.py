"""The elementary functions against NumPy in float64."""

import math

import numpy as np
import pytest

from feather_jax.cpu.graph import FLOAT32, Elementwise, Input, Node, Step, elementwise
from feather_jax.cpu.interpret import FUNCTIONS, evaluate
from feather_jax.cpu.target import named
from tests.feather_jax.cpu.kernels import run

SPECIAL = [
    *(0.0, -0.0, 1, -1, 0.5, -0.5, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3e38, -3e38, 88.7, -104)
]
SIZES = np.geomspace(1e-40, 3e38, 3000)
EVERYWHERE = np.concatenate(
    [SPECIAL, SIZES, -SIZES, np.linspace(-30, 30, 3001), np.linspace(0.4, 2.5, 1001)]
).astype(np.float32)


def check(result, expected, ulps):
    """Within so many units in the last place, those of the smallest normal number at least."""
    expected = np.asarray(expected, np.float64)
    with np.errstate(all="ignore"):
        rounded = expected.astype(np.float32)
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(result[~finite], rounded[~finite])
    unit = np.spacing(np.maximum(np.abs(rounded[finite]), np.finfo(np.float32).tiny))
    error = np.abs(result[finite] - expected[finite]) / unit
    assert error.max(initial=0) <= ulps, (error.max(), np.flatnonzero(finite)[error.argmax()])


@pytest.mark.parametrize(
    ("function", "ulps"),
    [
        ("exp", 2), ("expm1", 3), ("log", 2), ("log1p", 4), ("logistic", 4), ("tanh", 4),
        ("erf", 3), ("erfc", 6), ("sqrt", 1), ("rsqrt", 2), ("floor", 0), ("ceil", 0),
        ("round", 0), ("abs", 0), ("sign", 0), ("negative", 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("cpu", [None, "x86-64-v2"])
def test_function(function, ulps, cpu):
    x = EVERYWHERE
    node = elementwise(function, Node(Input(0, x.shape, FLOAT32)))
    result = run(node, x, target=named(cpu=cpu) if cpu else None)
    with np.errstate(all="ignore"):
        expected = FUNCTIONS[function](x.astype(np.float64))
    if function == "logistic":  # 1 / (1 + e^88.8) is below the smallest normal number
        expected = np.where(x < -88.7, 0, expected)
    check(result, expected, ulps)


@pytest.mark.parametrize("function", ["sin", "cos"])
def test_sine(function):
    x = np.concatenate([np.linspace(-100, 100, 5001), [1e6, 1e8, -1e7, 0]]).astype(np.float32)
    node = elementwise(function, Node(Input(0, x.shape, FLOAT32)))
    error = np.abs(run(node, x) - getattr(np, function)(x.astype(np.float64)))
    assert error.max() < 1e-7
    for value in (np.inf, -np.inf, np.nan):
        assert math.isnan(
            run(elementwise(function, Node(Input(0, (1,), FLOAT32))), np.float32([value]))[0]
        )


@pytest.mark.parametrize(("function", "ulps"), [("power", 1), ("remainder", 0)])
def test_two_operands(function, ulps):
    values = np.array([*SPECIAL[:13], 2, -2, 3, -3, 2.5, -2.5, 7.25, 1e10, -8], np.float32)
    x, y = (each.ravel() for each in np.meshgrid(values, values))
    if function == "remainder":  # quotients of 2^29 and more are not exact
        with np.errstate(all="ignore"):
            small = ~(np.abs(x / y) > 2.0**29)
        x, y = x[small], y[small]
    nodes = [Node(Input(i, x.shape, FLOAT32)) for i in (0, 1)]
    result = run(elementwise(function, *nodes), x, y)
    with np.errstate(all="ignore"):
        expected = {"power": np.power, "remainder": np.fmod}[function](
            x.astype(float), y.astype(float)
        )
    check(result, expected, ulps)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.int8, np.int64, np.bool_])
def test_integers(dtype):
    dtype = np.dtype(dtype)
    if dtype == np.bool_:
        functions, values = ["and", "or", "xor", "equal", "maximum"], [False, True]
    else:
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        values = [0, 1, 2, 7, 100, high, low, *([] if low == 0 else [-1, -7])]
        functions = [
            "add",
            "subtract",
            "multiply",
            "maximum",
            "minimum",
            "less",
            "greater_equal",
            "equal",
            "and",
            "xor",
        ]
    x, y = (each.ravel().astype(dtype) for each in np.meshgrid(values, values))
    nodes = [Node(Input(i, x.shape, dtype)) for i in (0, 1)]
    for function in functions:
        order = function in ("less", "greater_equal", "equal")
        node = elementwise(function, *nodes, dtype=np.bool_ if order else dtype)
        np.testing.assert_array_equal(run(node, x, y), evaluate(node, x, y), err_msg=function)


def test_integer_division_never_stops_the_processor():
    """As XLA has it: by zero -1 and x, and the least integer by -1 itself and 0."""
    x = np.array([7, -7, 7, 5, -(2**31)], np.int32)
    y = np.array([2, 2, -2, 0, -1], np.int32)
    nodes = [Node(Input(i, x.shape, x.dtype)) for i in (0, 1)]
    quotient = run(elementwise("divide", *nodes), x, y)
    np.testing.assert_array_equal(quotient, [3, -3, -3, -1, -(2**31)])
    np.testing.assert_array_equal(run(elementwise("remainder", *nodes), x, y), [1, -1, 1, 5, 0])


@pytest.mark.parametrize("old", [np.float32, np.int32, np.uint8, np.bool_, np.int64])
@pytest.mark.parametrize("new", [np.float32, np.int32, np.uint8, np.bool_, np.int64])
def test_convert(old, new):
    values = np.array([0, 1, -1, 2.9, -2.9, 300, 3e9, np.inf, -np.inf, np.nan], np.float32)
    x = values if old is np.float32 else np.array([0, 1, 100, 255, 7]).astype(old)
    node = elementwise("convert", Node(Input(0, x.shape, x.dtype)), dtype=new)
    np.testing.assert_array_equal(run(node, x), evaluate(node, x))


def test_several_steps():
    steps = (
        Step("multiply", (0, 1)),
        Step("greater", (2, 0), np.dtype(np.bool_)),
        Step("select", (3, 2, 1)),
    )
    x, y = np.linspace(-2, 2, 37, dtype=np.float32), np.linspace(3, -1, 37, dtype=np.float32)
    node = Node(Elementwise(steps), tuple(Node(Input(i, (37,), FLOAT32)) for i in (0, 1)))
    np.testing.assert_array_equal(run(node, x, y), np.where(x * y > x, x * y, y))
