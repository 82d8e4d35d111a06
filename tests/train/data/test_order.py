"""The order of examples: a function of seed and step, the same for any number of processes."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.order import Order, epoch_order


@st.composite
def orders(draw):
    """(examples, batch size, seed, processes) that fit one another."""
    processes = draw(st.integers(1, 4))
    batch_size = processes * draw(st.integers(1, 8))
    num_examples = draw(st.integers(batch_size, 100))
    return num_examples, batch_size, draw(st.integers(0, 2**63)), processes


@given(orders(), st.integers(0, 5))
def test_an_epoch_takes_no_example_twice_and_drops_only_an_incomplete_batch(order, epoch):
    num_examples, batch_size, seed, _ = order
    whole = Order(num_examples, batch_size, seed)
    steps = range(epoch * whole.steps_per_epoch, (epoch + 1) * whole.steps_per_epoch)
    seen = np.concatenate([whole.train_examples(step) for step in steps])
    assert len(set(seen.tolist())) == len(seen) == num_examples - num_examples % batch_size
    assert set(seen.tolist()) <= set(range(num_examples))


@given(orders(), st.integers(0, 50))
def test_processes_divide_the_global_batch_in_order(order, step):
    num_examples, batch_size, seed, processes = order
    whole = Order(num_examples, batch_size, seed)
    slices = [Order(num_examples, batch_size, seed, p, processes) for p in range(processes)]
    np.testing.assert_array_equal(
        np.concatenate([s.train_examples(step) for s in slices]), whole.train_examples(step)
    )
    np.testing.assert_array_equal(
        np.concatenate([s.positions() for s in slices]), np.arange(batch_size)
    )


@given(orders())
def test_evaluation_takes_every_example_once_in_equal_batches(order):
    num_examples, batch_size, seed, processes = order
    slices = [Order(num_examples, batch_size, seed, p, processes) for p in range(processes)]
    assert len({s.eval_steps for s in slices}) == 1
    seen = []
    for s in slices:
        for batch in range(s.eval_steps):
            examples, mask = s.eval_examples(batch)
            assert examples.shape == mask.shape == (batch_size // processes,)
            assert examples.min() >= 0
            assert examples.max() < num_examples
            seen += examples[mask].tolist()
    assert sorted(seen) == list(range(num_examples))


@pytest.mark.parametrize("other", [(0, 1), (1, 0), (2**40, 0)])
def test_seed_and_epoch_change_the_order(other):
    assert not np.array_equal(epoch_order(1000, 0, 0), epoch_order(1000, *other))


def test_the_order_is_the_same_for_ever():
    """A run that is resumed after an upgrade must go on in the same epoch."""
    np.testing.assert_array_equal(epoch_order(8, seed=3, epoch=5), [6, 4, 3, 2, 0, 7, 5, 1])


def test_every_order_of_an_epoch_is_equally_likely():
    drawn = collections.Counter(tuple(epoch_order(3, seed, 0).tolist()) for seed in range(1200))
    counts = [drawn[order] for order in itertools.permutations(range(3))]
    # Chi-squared with 5 degrees of freedom: 20.5 is its 99.9 % point.
    assert sum((count - 200) ** 2 / 200 for count in counts) < 20.5
