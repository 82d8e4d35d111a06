"""The operator against extended precision, and its derivative against the straight-through one."""

import decimal
import itertools
from functools import partial

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

from feather_jax import scale_pruned_gradients, sparsify, threshold_operator

EXPONENTS = (1.0, 1.15, 1.5, 2.0, 3.0, 3.5, 10.0, np.inf)
operator = jax.jit(threshold_operator, static_argnums=2)
properties = settings(max_examples=100)


def reference(w, threshold, p):
    """sign(w) (|w|^p - T^p)^(1/p) as it is written, in extended precision."""
    magnitude = np.abs(np.asarray(w, np.longdouble))
    threshold = np.asarray(threshold, np.longdouble)
    kept = magnitude > threshold
    if np.isinf(p):
        value = magnitude
    else:
        powers = magnitude**p - np.where(kept, threshold, 0) ** p
        value = np.where(kept, powers, 0) ** (1 / np.longdouble(p))
    return np.where(kept, np.copysign(value, w), 0)


def ulps(value, expected):
    """How far apart, in units in the last place of `value`'s dtype at `expected`."""
    unit = np.spacing(np.abs(expected).astype(value.dtype)).astype(np.longdouble)
    return np.abs(value.astype(np.longdouble) - expected) / unit


def floats_above(threshold, count):
    """The `count` floats that follow each of `threshold`: [len(threshold), count]."""
    bits = np.asarray(threshold, np.float32).view(np.int32)
    return (bits[:, None] + np.arange(1, count + 1, dtype=np.int32)).view(np.float32)


def weights_and_thresholds(n=2048):
    """Weights from 1e-30 to 1e30 with thresholds far below, near and above, and the next floats."""
    rng = np.random.default_rng(0)
    w = (10 ** rng.uniform(-30, 30, n)).astype(np.float32)
    ratios = np.concatenate(
        [10 ** rng.uniform(-20, 0, n // 2), 1 - 10 ** rng.uniform(-7, 0, n // 2)]
    )
    thresholds = (w * ratios).astype(np.float32)
    thresholds[::16] = (w[::16] * 2).astype(np.float32)
    thresholds[1::16] = w[1::16]
    thresholds = np.where(thresholds < 1e-37, 0, thresholds).astype(np.float32)
    near = np.float32([1e-30, 3e-17, 0.02, 1, 1.9999999, 2**24, 1e30 / 2])
    above = floats_above(near, 512)
    w = np.concatenate([w, above.ravel()]) * rng.choice(np.float32([-1, 1]), n + above.size)
    return w, np.concatenate([thresholds, np.repeat(near, 512)])


@pytest.mark.parametrize("p", EXPONENTS)
def test_accuracy_in_float32(p):
    w, thresholds = weights_and_thresholds()
    value = np.asarray(operator(w, thresholds, p))
    expected = reference(w, thresholds, p)
    assert value.dtype == np.float32
    np.testing.assert_array_equal(value == 0, np.abs(w) <= thresholds)
    kept = np.abs(w) > thresholds
    assert 3000 < kept.sum() < len(w)
    bound = 3 if p in (1, 2, 3, np.inf) else 10
    assert ulps(value, expected)[kept].max() <= bound


@pytest.mark.parametrize("p", EXPONENTS)
def test_accuracy_in_float64(p):
    rng = np.random.default_rng(1)
    near = np.float64([1e-30, 0.3, 1e30])
    above = (near.view(np.int64)[:, None] + np.arange(1, 20)).view(np.float64)
    w = np.concatenate([10 ** rng.uniform(-30, 30, 60), above.ravel()])
    thresholds = np.concatenate([w[:60] * rng.uniform(0, 1, 60), np.repeat(near, 19)])
    with decimal.localcontext(prec=60):
        power = decimal.Decimal(p)
        exact = [
            a if np.isinf(p) else (a**power - t**power) ** (1 / power)
            for a, t in zip(map(decimal.Decimal, w), map(decimal.Decimal, thresholds), strict=True)
        ]
        with jax.enable_x64(True):
            value = np.asarray(operator(w, thresholds, p))
        assert value.dtype == np.float64
        errors = [
            abs(decimal.Decimal(float(v)) - e) / decimal.Decimal(float(np.spacing(v)))
            for v, e in zip(value, exact, strict=True)
        ]
    # In general 1/p is rounded, which a number as small as d raises to the power of log(1/d).
    assert max(errors) <= (3 if p in (1, 2, 3, np.inf) else 16)


@pytest.mark.parametrize(
    ("dtype", "threshold"),
    # The last of float16 is a denormal of it, and a normal float32.
    [(jnp.bfloat16, 0.1), (jnp.bfloat16, 1e30), (jnp.float16, 0.1), (jnp.float16, 3e-7)],
)
@pytest.mark.parametrize("p", [1.0, 3.0, np.inf])
def test_every_16_bit_float(dtype, threshold, p):
    w = np.arange(2**16, dtype=np.uint16).view(dtype)
    value = np.asarray(operator(w, np.float32(threshold), p))
    assert value.dtype == dtype
    wide = w.astype(np.float32)
    finite = np.isfinite(wide)
    np.testing.assert_array_equal(value[~finite].astype(np.float32), wide[~finite])

    expected = reference(wide[finite], np.float32(threshold), p)
    rounded, value = expected.astype(np.float32).astype(dtype), value[finite]
    # Computed in float32 and rounded once more: a float away where that is a near tie.
    away = np.abs(value.view(np.int16).astype(int) - rounded.view(np.int16).astype(int))
    assert away[rounded != 0].max() <= 1
    assert (value == rounded).mean() > 0.999
    np.testing.assert_array_equal(value == 0, np.abs(wide[finite]) <= np.float32(threshold))


def test_low_precision_weights_are_compared_with_the_exact_threshold():
    w = jnp.asarray([0.1001], jnp.bfloat16)  # 0.10009765625, and so is 0.1 in bfloat16
    assert threshold_operator(w, 0.1, jnp.inf) == w
    assert threshold_operator(w, jnp.float32(0.1), jnp.inf) == w
    assert threshold_operator(w, jnp.bfloat16(0.1), jnp.inf) == 0


def test_the_promoted_dtype_decides_under_x64():
    with jax.enable_x64(True):
        w = jnp.asarray([1.0], jnp.float32)
        above, below = np.float64(1 + 1e-12), np.float64(1 - 1e-12)
        assert threshold_operator(w, above, jnp.inf) == 0
        assert threshold_operator(w, below, jnp.inf) == 1
        assert threshold_operator(w, below, 1.0) == np.float32(1 - (1 - 1e-12))
        assert threshold_operator(w, below).dtype == jnp.float32


@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32])
def test_a_threshold_of_zero_is_the_identity_to_the_bit(p, dtype):
    special = [0.0, -0.0, 1e-40, -1e-45, 6e-8, np.inf, -np.inf, np.nan, 1.0, -6e4]
    w = np.resize(np.float32(special), 16).astype(dtype)
    for zero in np.float32([0.0, -0.0]):
        value = np.asarray(operator(w, zero, p))
        np.testing.assert_array_equal(value.view(np.uint8), w.view(np.uint8))


@pytest.mark.parametrize("p", EXPONENTS)
def test_what_is_not_finite(p):
    w = np.resize(np.float32([np.nan, np.inf, -np.inf, 0]), 16)
    np.testing.assert_array_equal(operator(w, np.float32(0.5), p), w)
    for threshold in np.float32([np.inf, np.nan]):  # nothing is greater than either
        value = operator(w, threshold, p)
        np.testing.assert_array_equal(value, np.where(np.isnan(w), np.nan, 0))


@pytest.mark.parametrize("p", [*EXPONENTS, 1e300])
def test_no_nan_comes_of_numbers(p):
    special = [0, -0.0, 1, -2, 1e-38, 1.2e-38, 1e30, -3e38, 1e-45, np.inf, -np.inf]
    w = np.resize(np.float32(special), 16)
    with jax.debug_nans(True):
        for threshold in np.float32([0, 1e-45, 1.1754944e-38, 0.5, 3e38, np.inf]):
            value = threshold_operator(w, threshold, p)
            assert np.all(np.abs(value) <= np.abs(w))


@pytest.mark.parametrize("p", EXPONENTS)
def test_nothing_grows(p):
    rng = np.random.default_rng(9)
    w = (2 ** rng.uniform(0, 1, 2**16)).astype(np.float32)
    # Where (T/w)^2 vanishes next to 1, but T/w does not, rounding goes up as often as down.
    thresholds = (w * 10 ** rng.uniform(-9, 0, w.size)).astype(np.float32)
    assert np.all(operator(w, thresholds, p) <= w)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 3.5, np.inf])
def test_another_magnitude(p):
    """w (1 - (T/m)^p)^(1/p) in extended precision, with a magnitude far from |w|."""
    rng = np.random.default_rng(10)
    w = (rng.normal(size=(64, 16)) * 10 ** rng.uniform(-3, 3, (64, 16))).astype(np.float32)

    def largest_of_row(w):
        return jnp.max(jnp.abs(w), axis=1, keepdims=True)

    m = np.abs(w).max(1, keepdims=True)
    thresholds = (m * rng.uniform(0.5, 1.3, m.shape)).astype(np.float32)
    thresholds[0], thresholds[1] = m[0], np.nextafter(m[1], np.float32(0))
    thresholds[2] = 0
    compiled = jax.jit(partial(threshold_operator, p=p, magnitude=largest_of_row))
    value = np.asarray(compiled(w, thresholds))
    ratio = np.minimum(np.longdouble(thresholds) / m, 1)
    exponent = np.longdouble(p)
    expected = w * (1 if np.isinf(p) else (1 - ratio**exponent) ** (1 / exponent)) * (ratio < 1)
    kept = np.broadcast_to(m > thresholds, w.shape)
    assert 20 < kept[:, 0].sum() < 60
    np.testing.assert_array_equal(value[~kept], 0)
    assert ulps(value, expected)[kept].max() <= (3 if p in (1, 2, 3, np.inf) else 10)
    np.testing.assert_array_equal(value[2], w[2])


def test_a_magnitude_is_taken_in_float32_whatever_the_threshold_is():
    seen = []

    def magnitude(w):
        seen.append(w.dtype)
        return jnp.abs(w)

    with jax.enable_x64(True):
        for w_dtype, threshold_dtype in [("bfloat16", "bfloat16"), ("float32", "float64")]:
            w = jnp.asarray([1.0, -3.0], w_dtype)
            threshold = jnp.asarray(2, threshold_dtype)
            value = threshold_operator(w, threshold, np.inf, magnitude=magnitude)
            np.testing.assert_array_equal(value, [0, -3])
            assert value.dtype == w_dtype
    assert set(seen) == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("magnitude", "error", "message"),
    [
        (
            lambda w: jnp.abs(w).sum(1),
            ValueError,
            r"gives the shape \(4, 2\); reduce with keepdims",
        ),
        (lambda w: w > 0, TypeError, "real floating-point numbers, and this one gives bool"),
    ],
)
def test_magnitudes_that_are_errors(magnitude, error, message):
    with pytest.raises(error, match=message):
        threshold_operator(jnp.ones((4, 3, 2)), 0.5, magnitude=magnitude)


THRESHOLD_SHAPES = [(), (1,), (6,), (5, 1), (1, 6), (4, 1, 1), (4, 1, 6), (4, 5, 6)]


@pytest.mark.parametrize("shape", THRESHOLD_SHAPES)
def test_thresholds_broadcast(shape):
    rng = np.random.default_rng(2)
    w = rng.normal(size=(4, 5, 6)).astype(np.float32)
    thresholds = np.abs(rng.normal(size=shape)).astype(np.float32)
    thresholds *= rng.uniform(size=shape) > 0.3  # some are 0
    value = np.asarray(operator(w, thresholds, 3.0))
    expected = reference(w, np.broadcast_to(thresholds, w.shape), 3)
    np.testing.assert_allclose(value, expected.astype(np.float32), rtol=4e-7)


@pytest.mark.parametrize("shape", [(7,), (5,), (2, 4, 5, 6), (1, 4, 5, 6), (4, 5), (0,)])
def test_a_threshold_that_does_not_broadcast_is_an_error(shape):
    with pytest.raises(ValueError, match=r"does not broadcast to weights of shape \(4, 5, 6\)"):
        threshold_operator(jnp.ones((4, 5, 6)), jnp.ones(shape))
    with pytest.raises(ValueError, match="does not broadcast"):
        threshold_operator(jnp.ones(()), jnp.ones(3))


def test_scalar_and_empty_weights():
    assert threshold_operator(2.0, 1.0, 1.0) == 1
    assert threshold_operator(jnp.ones((0, 3)), 1.0).shape == (0, 3)
    assert threshold_operator(jnp.ones((0, 3)), jnp.ones(3)).shape == (0, 3)


def test_an_integer_threshold_is_a_number():
    np.testing.assert_array_equal(threshold_operator(jnp.array([1.5, -3, 2]), 2, 1.0), [0, -1, 0])


@pytest.mark.parametrize("p", [0.999, 0, -1, -jnp.inf, jnp.nan])
def test_an_exponent_below_one_is_an_error(p):
    with pytest.raises(ValueError, match=r"must be a number in \[1, inf\], and it is"):
        threshold_operator(jnp.ones(3), 0.5, p)


def test_a_traced_exponent_is_an_error():
    for transform in (jax.jit, jax.vmap, jax.grad):
        with pytest.raises(ValueError, match="exponent p is static"):
            transform(lambda p: threshold_operator(jnp.float32(1), 0.5, p))(jnp.full(3, 2.0))


def test_dtypes_that_are_errors():
    with pytest.raises(TypeError, match="floating-point weights, and these have dtype int32"):
        threshold_operator(jnp.ones(3, jnp.int32), 0.5)
    with pytest.raises(TypeError, match="dtype complex64"):
        threshold_operator(jnp.ones(3, jnp.complex64), 0.5)
    with pytest.raises(TypeError, match="A threshold is a real number"):
        threshold_operator(jnp.ones(3), 0.5j)


# ---- properties ----


@st.composite
def cases(draw):
    """16 weights, zeros and magnitudes from 1e-30 to 1e30, and a threshold that often ties."""
    finite = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
    ordinary = st.floats(-2, 2, width=32, allow_subnormal=False)
    elements = (finite | ordinary).map(lambda x: 0.0 if abs(x) < 1e-30 else x)
    w = draw(hnp.arrays(np.float32, 16, elements=elements))
    threshold = draw(st.sampled_from(np.abs(w).tolist()) | elements.map(abs))
    return w, np.float32(threshold), draw(st.sampled_from(EXPONENTS))


@given(cases())
@properties
def test_pruned_are_those_of_at_most_the_threshold(case):
    w, threshold, p = case
    np.testing.assert_array_equal(
        np.asarray(operator(w, threshold, p)) == 0, np.abs(w) <= threshold
    )


@given(cases())
@properties
def test_odd_shrinking_and_monotone(case):
    w, threshold, p = case
    value = np.asarray(operator(w, threshold, p))
    np.testing.assert_array_equal(np.asarray(operator(-w, threshold, p)), -value)
    assert np.all(np.abs(value) <= np.abs(w))
    assert np.all(np.sign(value) * np.sign(w) >= 0)
    ascending = value[np.argsort(w)].astype(float)
    assert np.all(np.diff(ascending) >= -20 * np.spacing(np.abs(value)).max())


@given(cases())
@properties
def test_greater_exponents_tend_to_hard_thresholding(case):
    w, threshold, _ = case
    exponents = (1.0, 1.5, 2.0, 3.0, 3.5, 10.0, 1e3, 1e6, np.inf)
    values = [np.abs(np.asarray(operator(w, threshold, p)), dtype=float) for p in exponents]
    for less, more in itertools.pairwise(values):
        assert np.all(more >= less * (1 - 2e-6))
    hard = np.where(np.abs(w) > threshold, np.abs(w), 0)
    np.testing.assert_array_equal(values[-1], hard)
    # (1 - r^p)^(1/p) is within 2e-5 of 1 for p = 1e6, for every r < 1 in float32.
    np.testing.assert_allclose(values[-2], hard, rtol=2e-5)


# ---- transformations ----


def sample(shape=(8, 6), seed=3):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def straight_through(w, threshold, weights):
    """The gradient of sum(weights * exp(P(w))) if P's derivative is taken to be 1."""
    return weights * np.exp(reference(w, threshold, 3)).astype(np.float32)


def loss(w, threshold, weights, **options):
    # Of all derivatives of exp none is zero at zero, where pruned entries are.
    return jnp.sum(weights * jnp.exp(threshold_operator(w, threshold, **options)))


@pytest.mark.parametrize("transform", [lambda f: f, jax.checkpoint], ids=["plain", "remat"])
def test_the_gradient_is_straight_through(transform):
    w, weights = sample(), sample(seed=4)
    gradients = jax.jit(jax.grad(transform(loss), argnums=(0, 1)))
    gradient, by_threshold = gradients(w, 0.7, weights)
    np.testing.assert_allclose(gradient, straight_through(w, 0.7, weights), rtol=1e-5, atol=1e-7)
    assert by_threshold == 0
    np.testing.assert_array_equal(gradients(w, jnp.full(6, 0.7), weights)[1], np.zeros(6))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_cotangent_passes_through_unchanged(dtype):
    w = jnp.asarray([0.0, 0.1, -3.0, jnp.nan, jnp.inf, -0.0], dtype)
    cotangent = jnp.asarray([1.0, -2.0, 1e-3, 4.0, jnp.inf, 0.3], dtype)

    @jax.jit
    def gradients(w, cotangent):
        vjps = [jax.vjp(lambda w, p=p: threshold_operator(w, 0.5, p), w)[1] for p in EXPONENTS]
        return [vjp(cotangent)[0] for vjp in vjps]

    for gradient in gradients(w, cotangent):
        assert gradient.dtype == dtype
        np.testing.assert_array_equal(gradient, cotangent)


def test_nothing_is_saved_for_the_backward_pass(capsys):
    w, thresholds = sample(), jnp.abs(sample((6,)))

    def residuals(function):
        return jax.tree.leaves(jax.eval_shape(lambda w: jax.vjp(function, w)[1], w))

    assert residuals(jnp.sin)  # this would be seen
    for p in EXPONENTS:
        assert not residuals(lambda w, p=p: threshold_operator(w, 0.7, p))
        assert not residuals(lambda w, p=p: threshold_operator(w, thresholds, p))
        assert not residuals(jax.jit(lambda w, p=p: threshold_operator(w, thresholds, p)))
    jax.ad_checkpoint.print_saved_residuals(lambda w: threshold_operator(w, 0.7), w)
    assert not capsys.readouterr().out.strip()


def test_a_hessian_vector_product_is_straight_through():
    w, weights, vector = sample(), sample(seed=4), sample(seed=5)
    gradient = jax.grad(loss)
    expected = straight_through(w, 0.7, weights) * vector

    def forward_over_reverse(w):
        return jax.jvp(lambda w: gradient(w, 0.7, weights), (w,), (vector,))[1]

    def reverse_over_reverse(w):
        return jax.grad(lambda w: jnp.vdot(gradient(w, 0.7, weights), vector))(w)

    for product in (forward_over_reverse, reverse_over_reverse):
        np.testing.assert_allclose(jax.jit(product)(w), expected, rtol=1e-5, atol=1e-6)
    by_threshold = jax.jit(lambda t: jax.jvp(lambda t: gradient(w, t, weights), (t,), (1.0,))[1])
    np.testing.assert_array_equal(by_threshold(0.7), np.zeros_like(w))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("theta", [0.0, 0.3, 2.0])
def test_theta_scales_as_the_gradient_transformation_does(theta, dtype):
    params = {
        "kernel": sample().astype(dtype).at[0, :3].set(jnp.asarray([jnp.nan, 0, jnp.inf], dtype))
    }
    grads = {"kernel": sample(seed=4).astype(dtype)}
    tx = scale_pruned_gradients(theta)
    for threshold in (0.0, 0.7, jnp.float32(0.7), jnp.abs(sample((6,), seed=5)), jnp.inf):
        expected, _ = tx.update(grads, optax.EmptyState(), params, threshold=threshold)

        @jax.jit
        def cotangent(params, threshold=threshold):
            _, vjp = jax.vjp(lambda w: sparsify(w, threshold, theta=theta), params)
            return vjp(grads)[0]

        scaled = cotangent(params)["kernel"]
        assert scaled.dtype == dtype
        np.testing.assert_array_equal(scaled, expected["kernel"])
    assert np.any(np.asarray(scaled) != np.asarray(grads["kernel"]))


def test_theta_leaves_the_result_and_scales_the_hessians_rows():
    w, weights, vector = sample(), sample(seed=4), sample(seed=5)
    np.testing.assert_array_equal(
        threshold_operator(w, 0.7, theta=0.25), threshold_operator(w, 0.7)
    )
    scale = np.where(np.abs(w) <= 0.7, np.float32(0.25), 1)
    gradient = jax.grad(partial(loss, theta=0.25))
    expected = scale * straight_through(w, 0.7, weights)
    np.testing.assert_allclose(gradient(w, 0.7, weights), expected, rtol=1e-5)
    remat = jax.grad(jax.checkpoint(partial(loss, theta=0.25)))
    np.testing.assert_allclose(jax.jit(remat)(w, 0.7, weights), expected, rtol=1e-5)
    product = jax.jvp(lambda w: gradient(w, 0.7, weights), (w,), (vector,))[1]
    np.testing.assert_allclose(product, expected * vector, rtol=1e-5)
    by_threshold = jax.grad(partial(loss, theta=0.25), argnums=1)(w, 0.7, weights)
    assert by_threshold == 0


@pytest.mark.parametrize("theta", [-0.5, np.nan, np.inf])
def test_a_bad_theta_is_an_error(theta):
    with pytest.raises(ValueError, match="must be finite and at least 0; it is"):
        threshold_operator(jnp.ones(3), 0.5, theta=theta)


def test_a_traced_theta_is_an_error():
    with pytest.raises(ValueError, match="scale theta is static: pass a Python number"):
        jax.jit(lambda theta: threshold_operator(jnp.ones(3), 0.5, theta=theta))(0.5)


@pytest.mark.parametrize("p", [3.0, 3.5])
def test_where_jax_is_strict(p):
    w = sample().astype(jnp.bfloat16)
    expected = threshold_operator(w, 0.7, p)
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_nans(True),
        jax.checking_leaks(),
    ):
        for threshold in (0.7, jnp.float32(0.7)):
            function = lambda w, t=threshold: threshold_operator(w, t, p, theta=0.5)  # noqa: E731
            value, vjp = jax.vjp(jax.jit(function), w)
            np.testing.assert_array_equal(value, expected)
            gradient = np.where(np.abs(w.astype(jnp.float32)) <= 0.7, 0.5, 1)
            np.testing.assert_array_equal(vjp(jnp.ones_like(w))[0], gradient)


def test_vmap_over_weights_and_over_thresholds():
    w, thresholds = sample(), jnp.asarray([0.0, 0.3, 1.0])
    columns = jnp.linspace(0, 1, 6)
    for in_axes, args, expected in [
        ((0, None), (w, 0.5), reference(w, np.float32(0.5), 3)),
        ((1, 0), (w, columns), reference(w, columns, 3).T),
        ((None, 0), (w, thresholds), reference(w, thresholds[:, None, None], 3)),
    ]:
        value = jax.jit(jax.vmap(threshold_operator, in_axes))(*args)
        np.testing.assert_allclose(value, expected.astype(np.float32), rtol=4e-7)
    per_example = jax.jit(jax.vmap(jax.grad(loss), (None, 0, None)))(w, thresholds, jnp.ones(()))
    expected = np.stack([straight_through(w, t, np.ones_like(w)) for t in thresholds])
    np.testing.assert_allclose(per_example, expected, rtol=1e-5, atol=1e-7)


def test_scan_over_layers_with_remat():
    w, thresholds = sample((3, 6, 6)), jnp.asarray([0.0, 0.4, 0.9])
    x = sample((2, 6))

    @jax.jit
    @partial(jax.value_and_grad, argnums=0)
    def scanned(w, x):
        def layer(x, args):
            return jnp.tanh(x @ threshold_operator(*args)), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, (w, thresholds))[0])

    def unrolled(w, x):
        for i in range(3):
            x = jnp.tanh(x @ w[i])
        return jnp.sum(x)

    value, gradient = scanned(w, x)
    sparse = reference(w, thresholds[:, None, None], 3).astype(np.float32)
    expected_value, expected = jax.value_and_grad(unrolled)(jnp.asarray(sparse), x)
    np.testing.assert_allclose(value, expected_value, rtol=1e-4)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_pmap_on_every_device():
    devices = jax.local_device_count()
    assert devices > 1
    w = sample((devices, 4, 6))
    value = jax.pmap(threshold_operator, in_axes=(0, None))(w, 0.5)
    np.testing.assert_allclose(value, reference(w, 0.5, 3).astype(np.float32), rtol=4e-7)
    gradient = jax.pmap(jax.grad(lambda w, t: threshold_operator(w, t).sum()), in_axes=(0, None))
    np.testing.assert_array_equal(gradient(w, 0.5), np.ones_like(w))


# ---- sparsify ----


def network(seed=6):
    rng = np.random.default_rng(seed)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {
        "Conv_0": {"kernel": array(3, 3, 2, 4), "bias": array(4)},
        "Norm_0": {"scale": array(4)},
        "Dense_0": {"kernel": array(4, 5), "bias": array(5)},
    }


def test_sparsify_thresholds_the_prunable_leaves_alone():
    params = network()
    sparse = sparsify(params, 0.8, p=jnp.inf)
    assert jax.tree.structure(sparse) == jax.tree.structure(params)
    for layer in ("Conv_0", "Dense_0"):
        expected = reference(params[layer]["kernel"], np.float32(0.8), np.inf)
        np.testing.assert_array_equal(sparse[layer]["kernel"], expected)
        assert sparse[layer]["bias"] is params[layer]["bias"]
    assert sparse["Norm_0"]["scale"] is params["Norm_0"]["scale"]


def test_sparsify_takes_one_threshold_a_layer():
    params = network()
    per_channel = jnp.asarray([0.0, 0.5, 1.0, jnp.inf])
    thresholds = {
        "Conv_0": {"kernel": per_channel, "bias": 9.0},  # a bias's threshold is not looked at
        "Norm_0": 9.0,
        "Dense_0": 0.3,
    }
    sparse = sparsify(params, thresholds, p=jnp.inf)
    kernel = np.asarray(params["Conv_0"]["kernel"])
    np.testing.assert_array_equal(
        sparse["Conv_0"]["kernel"], np.where(np.abs(kernel) > per_channel, kernel, 0)
    )
    kernel = np.asarray(params["Dense_0"]["kernel"])
    np.testing.assert_array_equal(
        sparse["Dense_0"]["kernel"], np.where(np.abs(kernel) > np.float32(0.3), kernel, 0)
    )
    assert sparse["Conv_0"]["bias"] is params["Conv_0"]["bias"]


@pytest.mark.parametrize(
    "thresholds",
    [{"Conv_0": 0.1}, {"Conv_0": 0.1, "Norm_0": 0.1, "Other": 0.1}, [0.1, 0.1, 0.1], None],
)
def test_sparsify_says_that_thresholds_do_not_fit(thresholds):
    with pytest.raises(ValueError, match="must be a scalar or a pytree prefix of the parameters"):
        sparsify(network(), thresholds)


def test_sparsify_under_jit_with_a_mask_and_its_gradient():
    params = network()
    mask = {"Conv_0": False, "Norm_0": True, "Dense_0": {"kernel": True, "bias": False}}

    @jax.jit
    def squares(params, threshold):
        sparse = sparsify(params, threshold, prunable=mask)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(sparse))

    gradient = jax.grad(squares)(params, 0.8)

    def expected(leaf, selected):
        value = reference(leaf, np.float32(0.8), 3) if selected else np.asarray(leaf)
        return 2 * value.astype(np.float32)

    selected = {
        "Conv_0": {"kernel": False, "bias": False},
        "Norm_0": {"scale": True},
        "Dense_0": {"kernel": True, "bias": False},
    }
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-6),
        gradient,
        jax.tree.map(expected, params, selected),
    )
