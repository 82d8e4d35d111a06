"""What the progress bar says."""

import contextlib

import numpy as np

import feather_jax as feather
from train import config as config_lib
from train.run.journal import Journal, headline


def test_a_record_is_one_short_line():
    record = {
        "step": 10,
        "epoch": 0.5,
        "train/loss": 0.12345,
        "train/accuracy": 0.95,
        "eval/accuracy": 0.99167,
        "eval/loss": 1.0,
        "sparsity": 0.9,
        "threshold": 0.01,
        "examples_per_second": 12345.6,
    }
    assert headline(record) == "loss 0.123 acc 95.0% eval 99.17% sparsity 90.0% ex/s 12,346"


def test_what_was_not_recorded_is_left_out():
    assert headline({"step": 1, "train/loss": 2.0}) == "loss 2.000"


def test_a_starved_layer_is_named_once(tmp_path, tiny):
    def summary(*kept):
        layers = {f"layer{i}": {"kernel": np.zeros((8, 4))} for i in range(3)}
        for i, count in enumerate(kept):
            layers[f"layer{i}"]["kernel"].flat[:count] = 1
        return feather.summarize(layers)

    said = []
    config = tiny()
    steps = config_lib.steps(config, num_train=1437)
    with contextlib.closing(Journal(tmp_path, config, steps, 0, said.append)) as journal:
        journal.warn_of_starved(10, summary(32, 4, 32))
        assert said == []
        journal.warn_of_starved(20, summary(32, 3, 0))
        journal.warn_of_starved(30, summary(2, 0, 0))
    assert said == [
        "After step 20: Pruned whole: layer2/kernel.",
        "After step 20: Pruned nearly whole: layer1/kernel (3 of 32 left).",
        "After step 30: Pruned nearly whole: layer0/kernel (2 of 32 left).",
    ]
