"""The schedule against its formula in float64, wherever a step may come from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feather_jax import cubic_schedule, default_theta
from feather_jax.schedule import check_theta


def formula(sparsity, begin, end, step):
    """s_t = S (1 - (1 - (t - t1)/(t2 - t1))^3), 0 before and S after."""
    if step < begin:
        return 0.0
    if step >= end:
        return sparsity
    return sparsity * (1 - (1 - (step - begin) / (end - begin)) ** 3)


CASES = [(0.9, 0, 100), (0.98, 7, 31), (0.5, 3, 4), (0.95, 5, 5), (0.7, 0, 0), (0.0, 2, 9)]


@pytest.mark.parametrize(("sparsity", "begin", "end"), CASES)
def test_follows_the_formula(sparsity, begin, end):
    schedule = cubic_schedule(sparsity, begin_step=begin, end_step=end)
    steps = np.arange(110)
    expected = [formula(sparsity, begin, end, step) for step in steps]
    for values in (schedule(steps), jax.jit(jax.vmap(schedule))(steps)):
        assert values.dtype == jnp.float32
        np.testing.assert_allclose(values, expected, rtol=1e-6, atol=2e-7)
    with jax.enable_x64(True):
        values = schedule(steps)
        assert values.dtype == jnp.float64
        np.testing.assert_allclose(values, expected, rtol=1e-15, atol=3e-16)


@settings(max_examples=100)
@given(
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 2**30),
    st.integers(0, 2**30),
    st.integers(0, 2**31 - 1),
)
def test_is_within_its_bounds_and_exact_outside_the_growth(sparsity, begin, length, step):
    end = min(begin + length, 2**31 - 1)
    value = cubic_schedule(sparsity, begin_step=begin, end_step=end)(step)
    assert 0 <= value <= np.float32(sparsity)
    np.testing.assert_allclose(value, formula(sparsity, begin, end, step), rtol=1e-6, atol=5e-7)
    if step < begin:
        assert value == 0
    if step >= end:
        assert value == np.float32(sparsity)


def test_equal_begin_and_end_are_a_step():
    schedule = cubic_schedule(0.9, begin_step=10, end_step=10)
    values = schedule(np.array([0, 9, 10, 11]))
    np.testing.assert_array_equal(values, np.float32([0, 0, 0.9, 0.9]))
    np.testing.assert_array_equal(cubic_schedule(0.9, begin_step=0, end_step=0)(0), np.float32(0.9))


def test_begins_at_exactly_zero():
    for begin, end in [(0, 3), (7, 1000), (2**30, 2**30 + 10), (0, 2**31 - 1)]:
        assert cubic_schedule(0.9, begin_step=begin, end_step=end)(begin) == 0


def test_large_steps_are_told_apart():
    begin = 2**30
    schedule = cubic_schedule(0.9, begin_step=begin, end_step=begin + 8)
    steps = begin + np.arange(-2, 11)
    expected = [formula(0.9, begin, begin + 8, step) for step in steps.tolist()]
    np.testing.assert_allclose(schedule(steps), expected, rtol=1e-6)
    np.testing.assert_allclose([schedule(int(step)) for step in steps], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]
)
def test_any_integer_dtype_is_a_step(dtype):
    schedule = cubic_schedule(0.9, begin_step=10, end_step=1000)
    for step in (0, 10, 100):
        expected = formula(0.9, 10, 1000, step)
        np.testing.assert_allclose(schedule(dtype(step)), expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(
            schedule(jnp.asarray(dtype(step))), expected, rtol=1e-5, atol=1e-7
        )
    assert cubic_schedule(0.9, begin_step=10, end_step=20)(dtype(100)) == np.float32(0.9)
    assert cubic_schedule(0.9, begin_step=np.int64(10), end_step=dtype(20))(15) == cubic_schedule(
        0.9, begin_step=10, end_step=20
    )(15)


def test_runs_inside_scan():
    schedule = cubic_schedule(0.9, begin_step=2, end_step=6)
    _, values = jax.lax.scan(lambda step, _: (step + 1, schedule(step)), 0, length=8)
    np.testing.assert_array_equal(values, schedule(np.arange(8)))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1, 90, np.nan, np.inf])
def test_a_sparsity_outside_its_range_is_an_error(sparsity):
    for make in (
        lambda: cubic_schedule(sparsity, begin_step=0, end_step=1),
        lambda: default_theta(sparsity),
    ):
        with pytest.raises(ValueError, match=r"in \[0, 1\), and it is .*; for 90 % zeros give 0.9"):
            make()


def test_steps_that_are_errors():
    with pytest.raises(ValueError, match="end_step is 9, and begin_step is 10"):
        cubic_schedule(0.9, begin_step=10, end_step=9)
    with pytest.raises(ValueError, match="begin_step counts updates from 0, and it is -1"):
        cubic_schedule(0.9, begin_step=-1, end_step=9)
    with pytest.raises(ValueError, match=r"^end_step counts updates .* whole number; it is 9.5.$"):
        cubic_schedule(0.9, begin_step=0, end_step=9.5)
    for step in (np.nan, np.inf):
        with pytest.raises(ValueError, match="begin_step counts updates"):
            cubic_schedule(0.9, begin_step=step, end_step=9)
    for step in ("9", None, 9j, np.ones(2)):
        with pytest.raises(TypeError, match=r"^end_step counts updates, a whole number, and it is"):
            cubic_schedule(0.9, begin_step=0, end_step=step)
    with pytest.raises(TypeError, match=r"^end_step is static"):
        jax.jit(lambda step: cubic_schedule(0.9, begin_step=0, end_step=step)(0))(9)
    with pytest.raises(TypeError, match="positional"):  # which of two came first is easy to forget
        cubic_schedule(0.9, 0, 9)


@pytest.mark.parametrize("end", [1e1, np.ceil(9.1), np.float32(10), np.array(10.0), jnp.int8(10)])
def test_a_whole_number_of_any_type_is_a_step(end):
    schedule = cubic_schedule(0.9, begin_step=np.float64(4), end_step=end)
    np.testing.assert_allclose(schedule(7), 0.9 * (1 - 0.5**3), rtol=1e-6)
    assert schedule(10) == np.float32(0.9)


def test_default_theta_is_one_up_to_95_percent():
    assert [default_theta(s) for s in (0, 0.5, 0.95)] == [1.0, 1.0, 1.0]
    assert [default_theta(s) for s in (np.nextafter(0.95, 1), 0.96, 0.98, 0.999)] == [0.5] * 4


@pytest.mark.parametrize("theta", [-1e-9, -1, np.nan, np.inf, -np.inf])
def test_a_theta_that_is_no_scale_is_an_error(theta):
    with pytest.raises(ValueError, match="must be finite and at least 0; it is"):
        check_theta(theta)
    assert check_theta(0) == 0.0
    assert check_theta(np.float32(2)) == 2.0
