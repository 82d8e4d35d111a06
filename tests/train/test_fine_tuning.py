"""What fine-tuning adds to the step, and whole runs of it and of anyone's own network."""

import dataclasses
import functools
import itertools
import textwrap

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import feather_jax as feather
from tests.train.stepping import assert_close, on_devices
from train import evaluate, export, main, parallel, program, report
from train.errors import UserError
from train.experiment import build, initial_state
from train.step import make_train_step
from train.store import checkpoint, model_file


@pytest.fixture(scope="module")
def config(tiny):
    """config(**changes): of a run of five steps."""
    return functools.partial(tiny, epochs=0.25, learning_rate=0.05, sparsity=0.5)


@pytest.fixture
def states_on(config):
    """states_on(devices, steps, **changes): the experiment, its states, and the last loss.

    The states are those before and after each step.
    """

    def train(devices, steps, **changes):
        experiment = build(config(**changes))
        step_on_devices, mesh = on_devices(make_train_step(experiment), devices)
        state = parallel.replicate(initial_state(experiment), mesh)
        states = [jax.device_get(state)]
        for batch in itertools.islice(experiment.data.train_batches(0), steps):
            state, metrics = step_on_devices(state, parallel.shard(batch, mesh))
            states.append(jax.device_get(state))
        return experiment, states, float(metrics["train/loss"])

    return train


def first_batch(experiment):
    batch = next(experiment.data.train_batches(0))
    return experiment.data.eval_preprocess(batch["image"]), batch["label"]


def loss_of(logits, labels):
    return float(optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean())


@pytest.mark.slow
def test_dropout_and_stochastic_depth_are_the_same_on_any_number_of_devices(states_on):
    vit = {"name": "vit_tiny", "patch": 4, "width": 6, "depth": 2, "heads": 2}
    rates = {"dropout": 0.3, "stochastic_depth": 0.5}
    options = {"model": vit | rates, "compute_dtype": "float64"}
    with jax.enable_x64(True):
        experiment, one, loss = states_on(1, 1, **options)
        _, many, same = states_on(4, 1, **options, accumulate_steps=2)
        images, labels = first_batch(experiment)
        variables = {"params": one[0].params}
        without = loss_of(experiment.model.apply(variables, images, train=True), labels)
    assert_close((many[1].params, same), (one[1].params, loss), 1e-10)
    assert abs(without - loss) > 1e-4


def test_frozen_statistics_stay_and_are_trained_with(states_on):
    experiment, (before, after), loss = states_on(1, 1, freeze_statistics=True)
    jax.tree.map(np.testing.assert_array_equal, after.batch_stats, before.batch_stats)
    images, labels = first_batch(experiment)
    logits = experiment.model.apply(before.result, images, train=False)
    np.testing.assert_allclose(loss, loss_of(logits, labels), rtol=1e-5)


def test_the_average_of_weights_and_statistics(states_on):
    _, (expected, *states), _ = states_on(1, 3, average_decay=0.15)
    expected = expected.average
    for number, state in enumerate(states):
        now = {"params": state.params, "batch_stats": state.batch_stats}
        decay = min(0.15, (1 + number) / (10 + number))  # 0.1, and 0.15 from then on
        expected = jax.tree.map(lambda a, b, d=decay: d * a + (1 - d) * b, expected, now)
        assert_close(state.average, expected, 1e-5)
        assert state.result is state.average


OWN_STATISTICS = """
    import flax.linen as nn

    class Network(nn.Module):
        @nn.compact
        def __call__(self, images, train):
            x = nn.BatchNorm(not train, momentum=0.0)(images.reshape(len(images), -1))
            return nn.Dense(10)(x)
"""


def test_statistics_of_each_device_are_averaged_where_the_network_knows_no_axis(
    states_on, tmp_path, monkeypatch
):
    (tmp_path / "own_statistics.py").write_text(textwrap.dedent(OWN_STATISTICS))
    monkeypatch.syspath_prepend(tmp_path)
    experiment, (_, after), _ = states_on(2, 1, model={"name": "own_statistics:Network"})
    images, _ = first_batch(experiment)
    halves = np.asarray(images, np.float64).reshape(2, 32, -1)
    found = after.batch_stats["BatchNorm_0"]
    np.testing.assert_allclose(found["mean"], halves.mean((0, 1)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["var"], halves.var(1).mean(0), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def run(config):
    """run(workdir, **changes): the lines that a run says."""

    def train(workdir, **changes):
        said = []
        main.run(config(**changes), workdir, said.append)
        return said

    return train


def newest(workdir):
    return checkpoint.newest(workdir / "checkpoints").leaves


@pytest.fixture(scope="module")
def first(run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("first") / "run"
    run(workdir)
    return workdir


@pytest.fixture(scope="module")
def tuned(run, first, tmp_path_factory):
    """What a run said that does all that fine-tuning can, and its workdir."""
    workdir = tmp_path_factory.mktemp("tuned") / "run"
    changes = {
        "init_from": str(first),
        "freeze": ["stem/.*", "stage1.*kernel"],
        "freeze_statistics": True,
        "average_decay": 0.5,
        "head_learning_rate": 10.0,
    }
    return run(workdir, **changes), workdir, changes


@pytest.mark.slow
def test_frozen_weights_and_statistics_stay_to_the_last_bit(first, tuned):
    said, workdir, _ = tuned
    before, after = newest(first), feather.load(workdir / "model.npz")
    total = sum(name.startswith("variables/") for name in before)
    assert f"Took {total} of the network's {total} arrays from {first}." in said
    params = after["params"]
    np.testing.assert_array_equal(params["stem"]["kernel"], before["variables/params/stem/kernel"])
    np.testing.assert_array_equal(
        params["stage1_block1"]["conv1"]["kernel"],
        before["variables/params/stage1_block1/conv1/kernel"],
    )
    np.testing.assert_array_equal(
        after["batch_stats"]["stem_norm"]["mean"], before["variables/batch_stats/stem_norm/mean"]
    )
    assert np.any(params["head"]["bias"] != before["variables/params/head/bias"])
    # Half of what is prunable is zero, and what is frozen is not among it.
    assert np.all(params["stem"]["kernel"] != 0)
    kernels = [params["stage2_block1"][name]["kernel"] for name in ("conv1", "conv2", "projection")]
    weights = np.concatenate([kernel.ravel() for kernel in [*kernels, params["head"]["kernel"]]])
    assert np.count_nonzero(weights == 0) == int(0.5 * (weights.size - 1)) + 1


@pytest.mark.slow
def test_the_finalised_model_is_that_of_the_average(config, tuned):
    _, workdir, changes = tuned
    leaves = newest(workdir)
    kernel = "params/stage2_block1/conv2/kernel"
    assert np.any(leaves[f"variables/average/{kernel}"] != leaves[f"variables/{kernel}"])
    experiment = build(config(**changes))
    model = model_file.load(workdir / "model.npz")
    average = jax.tree_util.tree_map_with_path(
        lambda path, _: leaves[
            "variables/average/params/" + jax.tree_util.keystr(path, simple=True, separator="/")
        ],
        model.variables["params"],
    )
    expected = experiment.prune.finalize(average)
    jax.tree.map(np.testing.assert_array_equal, model.variables["params"], expected)


@pytest.mark.slow
def test_a_second_start_goes_on_and_ends_the_same(run, tuned):
    _, workdir, changes = tuned
    before = feather.load(workdir / "model.npz")
    said = run(workdir, **changes)
    assert said[0].startswith("Going on after step 6 of 6")
    jax.tree.map(np.testing.assert_array_equal, feather.load(workdir / "model.npz"), before)


@pytest.mark.slow
def test_a_run_starts_from_anothers_averages(run, tuned, tmp_path):
    _, workdir, _ = tuned
    run(tmp_path / "run", init_from=str(workdir), freeze=["stem.*"])
    started, averages = newest(tmp_path / "run"), newest(workdir)
    np.testing.assert_array_equal(
        started["variables/params/stem_norm/bias"],
        averages["variables/average/params/stem_norm/bias"],
    )
    assert program.run(lambda: report.main([str(workdir)])) == 0


NETWORK = """
    import flax.linen as nn

    class Network(nn.Module):
        num_classes: int
        width: int = 3

        @nn.compact
        def __call__(self, images, train):
            x = nn.Dense(self.width)(images.reshape(images.shape[0], -1))
            x = nn.Dropout(0.1, deterministic=not train)(nn.BatchNorm(not train)(nn.relu(x)))
            return nn.Dense(self.num_classes, name="last")(x)
"""


@pytest.mark.slow
def test_a_run_of_ones_own_network(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_network.py").write_text(textwrap.dedent(NETWORK))
    monkeypatch.syspath_prepend(tmp_path)
    spec = {"name": "my_network:Network", "width": 8}
    said = run(tmp_path / "run", model=spec, head="last/.*", head_learning_rate=2.0)
    devices = jax.device_count()
    assert (devices > 1) == any("takes no axis_name" in line for line in said)

    path = tmp_path / "run" / "model.npz"
    assert feather.load_metadata(path)["model"] == spec
    for command in (
        lambda *more: evaluate.main(["--model", str(path), *more]),
        lambda *more: export.main(["--model", str(path), "--out", str(tmp_path / "out"), *more]),
        lambda *more: report.main([str(tmp_path / "run"), *more]),
    ):
        assert program.run(command) == 2
        assert "'my_network:Network' is code that would be imported" in capsys.readouterr().err
        assert program.run(lambda command=command: command("--allow-import")) == 0

    class CountsExamples(nn.Module):
        def __call__(self, images):
            return images.reshape(len(images), -1)[:, :10]

    model = model_file.load(path, allow_import=True)
    with pytest.raises(UserError, match="my_network:Network cannot be exported for a batch of any"):
        export.export(dataclasses.replace(model, network=CountsExamples()))

    # Another number of classes would have a new last layer.
    again = run(tmp_path / "again", model=spec, init_from=str(path), head="last/.*")
    assert f"Took 8 of the network's 8 arrays from {path}." in again
