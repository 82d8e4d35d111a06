"""Any number of devices trains the same network, as far as float32 goes."""

import json
import pathlib

import jax
import numpy as np
import pytest

from train import command_line, experiment, parallel
from train import config as config_lib
from train.step import make_train_step

DIGITS = pathlib.Path(__file__).parents[2] / "configs" / "digits.py"


def test_devices_go_process_by_process_as_in_pmap(monkeypatch):
    """Two hosts of a slice where the numbers of the devices interleave."""
    devices = jax.devices()[:4]
    hosts = [devices[0::2], devices[1::2]]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "local_devices", lambda process_index: hosts[process_index])
    assert parallel.device_mesh().devices.tolist() == [*hosts[0], *hosts[1]]


def test_on_one_process_that_is_the_order_of_jax():
    assert parallel.device_mesh().devices.tolist() == jax.devices()


def test_the_state_is_given_away_if_the_step_says_so():
    mesh = parallel.device_mesh()
    batch = parallel.shard({"x": np.ones(mesh.size, np.float32)}, mesh)
    for donate in (True, False):
        step = parallel.on_all_devices(
            lambda state, batch, axis_name: {"w": state["w"] + batch["x"].sum()},
            donate_state=donate,
        )
        state = parallel.replicate({"w": np.ones(3, np.float32)}, mesh)
        jax.block_until_ready(step(state, batch))
        assert state["w"].is_deleted() == donate


@pytest.mark.slow
def test_one_step_in_float32_agrees_on_one_device_and_on_eight():
    """The whole recipe of configs/digits.py on a narrower network, to float32's rounding."""
    config = config_lib.parse(
        command_line.load(str(DIGITS)).to_dict()
        | {"model": {"name": "resnet8", "widths": (4,)}, "prune_end": 0.0}
    )
    built = experiment.build(config)
    batch = next(built.data.train_batches(0))
    state = experiment.initial_state(built)
    one, metrics = jax.jit(make_train_step(built))(state, batch)
    mesh = parallel.device_mesh()
    step = parallel.on_all_devices(make_train_step(built), donate_state=False)
    eight, metrics_8 = step(parallel.replicate(state, mesh), parallel.shard(batch, mesh))
    assert mesh.size == 8
    assert float(metrics["sparsity"]) == pytest.approx(0.95)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        jax.device_get((one, metrics)),
        jax.device_get((eight, metrics_8)),
    )


@pytest.mark.slow
def test_the_accuracy_on_one_device_and_on_eight_differs_as_that_of_seeds(start, tmp_path):
    """Training is chaotic in float32, so the weights differ, and the accuracy by chance alone."""
    accuracies = []
    for devices in (1, 8):
        workdir = tmp_path / str(devices)
        process = start("--config", DIGITS, "--workdir", workdir, devices=devices)
        _, stderr = process.communicate(timeout=600)
        assert process.returncode == 0, stderr
        summary = json.loads((workdir / "summary.json").read_text())
        accuracies.append(summary["eval/accuracy"])
    assert min(accuracies) >= 0.97
    assert abs(accuracies[0] - accuracies[1]) < 4 / 360  # of three seeds: 2 examples of 360
