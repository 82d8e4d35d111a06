"""Mask churn against NumPy's bools."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train import main
from train.run.churn import all_kept, mask_churn
from train.run.signals import Interrupted, Interruption


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), sizes=st.sampled_from([(1,), (7, 8), (3, 17, 64)]))
def test_churn_is_the_fraction_of_differing_masks(seed, sizes):
    rng = np.random.default_rng(seed)
    before = [rng.normal(size=n) * rng.integers(0, 2, n) for n in sizes]
    after = [rng.normal(size=n) * rng.integers(0, 2, n) for n in sizes]
    _, kept = mask_churn(all_kept(before), [jnp.asarray(leaf, jnp.float32) for leaf in before])
    churn, _ = mask_churn(kept, [jnp.asarray(leaf, jnp.float32) for leaf in after])
    differing = [(a != 0) != (b != 0) for a, b in zip(before, after, strict=True)]
    assert churn == np.concatenate(differing).mean()


def test_at_first_all_weights_are_kept():
    weights = [jnp.asarray([[0.0, 1.0, 2.0], [0.0, 0.0, jnp.nan]])]
    churn, kept = mask_churn(all_kept(weights), weights)
    assert churn == 0.5
    assert mask_churn(kept, weights)[0] == 0


def test_the_bits_take_an_eighth_of_a_byte_a_weight():
    assert [leaf.nbytes for leaf in all_kept([jnp.ones((5, 5)), jnp.ones(16)])] == [4, 2]


def test_churn_is_the_same_after_a_restart(tmp_path, tiny, monkeypatch):
    """Stopped between two evaluations: what the first of them kept comes back from disk."""
    config = tiny(model={"name": "lenet300", "hidden": [16]}, epochs=0.5, eval_every_epochs=3 / 22)

    def churns(workdir: pathlib.Path) -> dict[int, float]:
        main.run(config, workdir, say=lambda line: None)
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        return {r["step"]: r["mask_churn"] for r in map(json.loads, lines) if "mask_churn" in r}

    whole = churns(tmp_path / "whole")
    assert list(whole) == [3, 6, 9, 11]
    assert 0 < min(whole.values()) <= max(whole.values()) < 1
    with monkeypatch.context() as patch:
        patch.setattr(Interruption, "signal_after", lambda self, step: 15 if step == 5 else 0)
        with pytest.raises(Interrupted):
            churns(tmp_path / "restarted")
    assert churns(tmp_path / "restarted") == whole
