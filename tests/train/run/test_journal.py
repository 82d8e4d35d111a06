"""What the progress bar says."""

from train.run.journal import headline


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
