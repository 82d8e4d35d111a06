"""The end of a run: what its closing table does not leave unsaid."""

import textwrap

import pytest

from train import main

# All weights are 1, and so they stay where the learning rate is too small to move them.
ONES = """
    import flax.linen as nn

    class Network(nn.Module):
        num_classes: int

        @nn.compact
        def __call__(self, images, train=False):
            images = images.reshape(len(images), -1)
            return nn.Dense(self.num_classes, kernel_init=nn.initializers.ones)(images)
"""


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, True),
        pytest.param({"backbone": {"name": "uniform"}}, False, marks=pytest.mark.slow),
        pytest.param({"block": (2, 1)}, False, marks=pytest.mark.slow),
        pytest.param({"sparsity": 0.0}, False, marks=pytest.mark.slow),
    ],
)
def test_ties_that_prune_more_than_was_asked_are_named(tmp_path, tiny, monkeypatch, changes, says):
    (tmp_path / "ones.py").write_text(textwrap.dedent(ONES))
    monkeypatch.syspath_prepend(tmp_path)
    values = {"model": {"name": "ones:Network"}, "epochs": 0.1, "learning_rate": 1e-30}
    said: list[str] = []
    main.run(tiny(**values | {"sparsity": 0.5} | changes), tmp_path / "run", said.append)
    assert ("640 prunable weights are zero where 320 were asked for" in said[-2]) == says
