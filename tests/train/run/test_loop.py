"""Whole runs on real digits: what they write, in which order, and that restarts change nothing."""

import functools
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

import feather_jax as feather
from feather_jax.masks import prunable_leaves
from train import config as config_lib
from train import experiment, main, parallel
from train.errors import UserError
from train.look import curves
from train.run import journal, loop, session
from train.run.evaluation import evaluate
from train.step import make_eval_step
from train.store import checkpoint

STEPS = 2 * (1437 // 64)
SAID: list[str] = []  # by the run that `finished` gives


@pytest.fixture(scope="module")
def config(tiny):
    """config(**changes): of a run of two epochs with a checkpoint in each."""
    return functools.partial(
        tiny,
        data={"name": "digits", "crop_padding": 1},
        epochs=2.0,
        log_every_steps=4,
        checkpoint_every_steps=15,
    )


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def lasting(record):
    """A record without what depends on the clock."""
    return {key: value for key, value in record.items() if key != "examples_per_second"}


def weights(workdir, built):
    """The newest checkpoint's weights."""
    like = session.beginning(built, experiment.abstract_state(built)).items()
    items, _ = checkpoint.restore(workdir / "checkpoints", like)
    return session.Progress.of(items).state


class Crash(Exception):
    """What ends a run in the middle."""


def crash_at(step, monkeypatch):
    def check_finite(number, values, last_finite):
        if number == step:
            raise Crash

    monkeypatch.setattr(journal, "check_finite", check_finite)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, config) -> tuple[pathlib.Path, dict]:
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, main.run(config(), workdir, say=SAID.append)


def test_the_workdir_holds_what_the_contract_says(finished, config):
    workdir, summary = finished
    present = {path.name for path in workdir.iterdir()}
    assert present >= {
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "checkpoints",
        "curves.png",
        "tensorboard",
    }
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert set(summary) >= {
        "steps",
        "parameters",
        "prunable",
        "nonzero",
        "sparsity",
        "eval/accuracy",
        "eval/loss",
        "eval/examples",
        "wall_seconds",
    }
    assert summary["steps"] == STEPS
    assert summary["eval/examples"] == 360
    assert config_lib.parse(json.loads((workdir / "config.json").read_text())) == config()
    assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))


def test_the_end_says_what_is_left_of_each_layer(finished):
    workdir, summary = finished
    table, last = SAID[-2:]
    assert re.search(r"^head/kernel +8x10 +80 +\d+ +[\d.]+%$", table, re.MULTILINE)
    total = f"all prunable +{summary['prunable']:,} +{summary['nonzero']:,} +90.00%"
    assert re.search(f"^{total}$", table, re.MULTILINE)
    assert "\n1 in 10.0 prunable weights is left." in table
    right = round(summary["eval/accuracy"] * 360)
    assert last.startswith(f"{right / 360:.2%} of 360 evaluation examples right; ")
    assert last.endswith(f"everything is in {workdir}.")


def test_the_curves_are_those_of_the_metrics(finished):
    logged = records(finished[0])
    figure = curves.draw(logged, "a run")
    drawn = {axes.get_title(): axes.lines for axes in figure.axes}
    assert {*drawn} >= {"Loss", "Accuracy", "Sparsity", "Threshold"}
    training, evaluation = drawn["Loss"]
    assert training.get_xydata().tolist() == [[r["step"], r["train/loss"]] for r in logged]
    evaluated = [[r["step"], r["eval/loss"]] for r in logged if "eval/loss" in r]
    assert evaluation.get_xydata().tolist() == evaluated


def test_a_run_starts_from_the_weights_of_another(finished, tmp_path, config):
    """And only at its start: the second time the other one is not needed any more."""
    shutil.copytree(finished[0] / "checkpoints", tmp_path / "first" / "checkpoints")
    second = config(
        init_from=str(tmp_path / "first"), learning_rate=1e-9, epochs=1 / 22, sparsity=0.0
    )
    main.run(second, tmp_path / "second", say=lambda line: None)
    given = weights(tmp_path / "first", experiment.build(config())).params
    taken = weights(tmp_path / "second", experiment.build(second)).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), given, taken)
    shutil.rmtree(tmp_path / "first")
    main.run(second, tmp_path / "second", say=lambda line: None)


@pytest.mark.parametrize("step", [0, 1, 5, 21, 22, 23])
def test_evaluation_prunes_as_the_last_step_did(step, config):
    """By the sparsity of the update before, of the weights as they are after it."""
    built = experiment.build(config())
    state = experiment.initial_state(built).replace(step=np.int32(step))
    variables = loop.current_variables(built.prune, state)
    kernels = [np.asarray(leaf) for leaf in prunable_leaves(state.params)]
    magnitudes = np.abs(np.concatenate([kernel.ravel() for kernel in kernels])).astype(float)
    sparsity = 0.9 * (1 - (1 - min(max(step - 1, 0), 22) / 22) ** 3)
    zeros = int(np.floor(sparsity * (magnitudes.size - 1))) + 1 if sparsity else 0
    found = np.concatenate([np.ravel(leaf) for leaf in prunable_leaves(variables["params"])])
    assert np.count_nonzero(found == 0) == pytest.approx(zeros, abs=1)
    assert np.all(magnitudes[found == 0] <= magnitudes[found != 0].min())


def test_the_finalised_model_has_the_exact_sparsity(finished):
    _, summary = finished
    zeros = int(np.floor((summary["prunable"] - 1) * 0.9)) + 1
    assert summary["nonzero"] == summary["prunable"] - zeros
    assert summary["sparsity"] == pytest.approx(zeros / summary["prunable"], abs=1e-12)


def test_metrics_are_logged_once_in_order_with_what_was_used(finished):
    logged = records(finished[0])
    steps = [record["step"] for record in logged]
    evaluated = [record["step"] for record in logged if "eval/accuracy" in record]
    assert steps == sorted({*range(4, STEPS + 1, 4), 22, 44})
    assert evaluated == [22, 44]
    prune = feather.Feather(sparsity=0.9, end_step=22)
    for record in logged:
        assert record["epoch"] == pytest.approx(record["step"] / 22)
        assert record["sparsity"] == pytest.approx(float(prune.sparsity_at(record["step"] - 1)))
        cosine = 0.05 * (1 + np.cos(np.pi * (record["step"] - 1) / STEPS))
        assert record["learning_rate"] == pytest.approx(cosine, rel=1e-4)
        assert {"train/loss", "train/accuracy", "threshold"} <= set(record)
    assert any("examples_per_second" in record for record in logged)


def test_accuracy_is_a_multiple_of_one_in_360(finished):
    for record in records(finished[0]):
        if "eval/accuracy" in record:
            assert record["eval/examples"] == 360
            right = record["eval/accuracy"] * 360
            assert right == pytest.approx(round(right), abs=1e-9)


def test_a_second_start_goes_on_to_the_same_bits(finished, tmp_path, monkeypatch, config):
    """Stopped after the checkpoint at step 15 and started again: as if never stopped."""
    built = experiment.build(config())

    crash_at(18, monkeypatch)
    with pytest.raises(Crash):
        main.run(config(), tmp_path / "run", say=lambda line: None)
    monkeypatch.undo()
    assert not (tmp_path / "run" / "summary.json").exists()
    lines = []
    summary = main.run(config(), tmp_path / "run", say=lines.append)
    assert "Going on after step 15" in lines[0]
    again, before = weights(tmp_path / "run", built), weights(finished[0], built)
    jax.tree.map(np.testing.assert_array_equal, again, before)
    assert list(map(lasting, records(tmp_path / "run"))) == list(map(lasting, records(finished[0])))
    different = {key for key in summary if summary[key] != finished[1][key]}
    assert {key for key in different if not key.endswith("_seconds")} == set()


def test_the_dense_twin_keeps_every_weight(tmp_path, config):
    summary = main.run(config(sparsity=0.0, epochs=0.2), tmp_path / "run", say=lambda line: None)
    assert summary["nonzero"] == summary["prunable"]
    assert all("threshold" not in record for record in records(tmp_path / "run"))


def test_nothing_is_transferred_unasked(tmp_path, monkeypatch, config):
    """The whole loop, evaluation and checkpoints included, under a transfer guard."""
    unguarded = loop.train

    def train(*args):
        with jax.transfer_guard("disallow"):
            return unguarded(*args)

    monkeypatch.setattr(loop, "train", train)
    main.run(config(), tmp_path / "run", say=lambda line: None)


def test_a_step_is_dispatched_before_the_one_before_is_read(tmp_path, monkeypatch, config):
    """At most two steps in flight: dispatch 1, dispatch 2, read 1, dispatch 3, read 2, ...

    At an evaluation none is left over from training, and its own steps go likewise.
    """
    events = []
    on_all_devices, device_get = parallel.on_all_devices, jax.device_get

    def recording(step, *, donate_state):
        compiled = on_all_devices(step, donate_state=donate_state)

        def call(*args):
            events.append("dispatch" if donate_state else "dispatch evaluation")
            return compiled(*args)

        return call

    def reading(tree):
        if isinstance(tree, dict) and isinstance(tree.get("train/loss"), jax.Array):
            events.append("read")
        if isinstance(tree, dict) and "prediction" in tree:
            events.append("read evaluation")
        return device_get(tree)

    monkeypatch.setattr(parallel, "on_all_devices", recording)
    monkeypatch.setattr(jax, "device_get", reading)
    crash_at(24, monkeypatch)
    with pytest.raises(Crash):
        main.run(config(checkpoint_every_steps=100), tmp_path / "run", say=lambda line: None)
    epoch = ["dispatch", *["dispatch", "read"] * 21, "read"]
    batches = -(-360 // 64)
    evaluation = ["dispatch", *["dispatch", "read"] * (batches - 1), "read"]
    evaluation = [f"{event} evaluation" for event in evaluation]
    assert events == [*epoch, *evaluation, "dispatch", *["dispatch", "read"] * 2]


@pytest.mark.parametrize("batch_size", [8, 64, 400, 1432])
def test_evaluation_covers_every_example_once(batch_size, config):
    """Whatever the batch: 360 examples, and the same number right, counted without batches."""
    built = experiment.build(config(batch_size=batch_size))
    mesh = parallel.device_mesh()
    state = experiment.initial_state(built)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    images = np.concatenate(
        [batch["image"][batch["mask"]] for batch in experiment.build(config()).data.eval_batches()]
    )
    labels = np.concatenate(
        [batch["label"][batch["mask"]] for batch in experiment.build(config()).data.eval_batches()]
    )
    logits = built.model.apply(variables, built.data.eval_preprocess(images), train=False)
    right = int(np.sum(np.argmax(logits, -1) == labels))
    eval_step = make_eval_step(built.model, built.data.eval_preprocess)
    eval_step = parallel.on_all_devices(eval_step, donate_state=False)
    result = evaluate(eval_step, parallel.replicate(variables, mesh), built.data, mesh)
    assert result.example.tolist() == list(range(360))
    assert result.label.tolist() == labels.tolist()
    assert result.figures["eval/examples"] == 360
    assert result.figures["eval/accuracy"] * 360 == pytest.approx(right, abs=1e-9)


def test_excluded_parameters_stay_dense(tmp_path, config):
    """The head and the stem keep every weight, and the others make up the sparsity."""
    excluding = config(exclude=["head/kernel", "stem/.*"], epochs=0.2, sparsity=0.5)
    built = experiment.build(excluding)
    params = built.prune.finalize(experiment.initial_state(built).params)
    layers = {layer.name: layer for layer in feather.summarize(params).layers}
    assert layers["head/kernel"].nonzero == layers["head/kernel"].weights
    assert layers["stem/kernel"].nonzero == layers["stem/kernel"].weights
    pruned = feather.summarize(params, prunable=built.prunable)
    assert pruned.sparsity == pytest.approx(0.5, abs=1e-3)
    assert pruned.prunable < feather.summarize(params).prunable


def test_an_exclusion_that_matches_nothing_is_an_error(config):
    with pytest.raises(UserError, match=r"'Dense_0/kernel', which.* ones are head/kernel"):
        experiment.build(config(exclude=["Dense_0/kernel"]))


def test_a_batch_that_devices_cannot_share_is_an_error(tmp_path, config):
    with pytest.raises(UserError, match=r"batch_size is 60.*multiple of 8"):
        main.run(config(batch_size=60), tmp_path / "run")
    assert not (tmp_path / "run").exists()
