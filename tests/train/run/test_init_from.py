"""Training starts from another run's variables, or says why it cannot."""

import jax
import numpy as np
import optax
import pytest

import feather_jax as feather
from train.errors import UserError
from train.run.init_from import with_variables_of
from train.step import TrainState
from train.store.checkpoint import Checkpoints


def state(seed: int, width: int = 5) -> TrainState:
    rng = np.random.default_rng(seed)
    params = {"hidden": {"kernel": rng.normal(size=(4, width)).astype(np.float32)}}
    return TrainState(
        step=np.int32(0),
        params=params,
        batch_stats={"norm": {"mean": rng.normal(size=3).astype(np.float32)}},
        opt_state=optax.sgd(0.1, momentum=0.9).init(params),
    )


def variables(of: TrainState):
    return {"params": of.params, "batch_stats": of.batch_stats}


@pytest.fixture
def workdir(tmp_path):
    """A run with the checkpoints of steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", 5)
    for step in (1, 2):
        checkpoints.save(state(step).replace(step=np.int32(step)), {})
    checkpoints.close()
    return tmp_path / "run"


def assert_starts_from(source, seed, lines=()):
    said = []
    start = state(99)
    started = with_variables_of(start, source, said.append)
    jax.tree.map(np.testing.assert_array_equal, variables(started), variables(state(seed)))
    assert started.step == 0
    jax.tree.map(np.testing.assert_array_equal, started.opt_state, start.opt_state)
    assert [line[: len(begin)] for line, begin in zip(said, lines, strict=True)] == list(lines)


def test_a_workdir_a_folder_of_checkpoints_and_a_model_file_will_do(workdir, tmp_path):
    assert_starts_from(workdir, 2)
    assert_starts_from(workdir / "checkpoints", 2)
    feather.save(tmp_path / "model.npz", variables(state(3)))
    assert_starts_from(tmp_path / "model.npz", 3)


def test_a_damaged_newest_checkpoint_is_passed_over_and_left_alone(workdir):
    metadata = workdir / "checkpoints" / "2" / "info" / "metadata"
    metadata.write_text("{")
    assert_starts_from(workdir, 1, lines=["Passed over the checkpoint of step 2"])
    assert metadata.read_text() == "{"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda start: state(0, width=6), r"has the shape \(4, 5\) in .* and \(4, 6\)"),
        (lambda start: start.replace(batch_stats={}), "has batch_stats/norm/mean, which the model"),
        (
            lambda start: start.replace(batch_stats={"more": np.zeros(2)} | start.batch_stats),
            "has no batch_stats/more",
        ),
    ],
)
def test_variables_of_another_model_are_an_error(workdir, change, message):
    with pytest.raises(UserError, match=message):
        with_variables_of(change(state(0)), workdir, print)
