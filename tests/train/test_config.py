"""Every field from the command line, and a configuration that survives JSON."""

import json
import math

import pytest

from train import command_line
from train import config as config_lib
from train.errors import UserError

# Each field as a user types it, and what it becomes.
TYPED = {
    "data.name": ("digits", "digits"),
    "data.flip": ("True", True),
    "data.mean": ("(0.5,)", [0.5]),
    "model.name": ("lenet300", "lenet300"),
    "model.hidden": ("(8, 8)", [8, 8]),
    "batch_size": ("32", 32),
    "epochs": ("3", 3.0),
    "learning_rate": ("1e-2", 0.01),
    "sparsity": ("0", 0.0),
    "prune_begin": ("0.5", 0.5),
    "prune_end": ("1", 1.0),
    "p": ("inf", math.inf),
    "theta": ("0.25", 0.25),
    "backbone": ("{'name': 'n_m', 'n': 2, 'm': 4}", {"name": "n_m", "n": 2, "m": 4}),
    "block": ("(4, None)", (4, None)),
    "exclude": ("('head/kernel','.*1/kernel')", ("head/kernel", ".*1/kernel")),
    "optimizer": ("adamw", "adamw"),
    "momentum": ("0", 0.0),
    "nesterov": ("True", True),
    "b2": ("0.99", 0.99),
    "weight_decay": ("1e-4", 1e-4),
    "clip_norm": ("0", 0.0),
    "warmup_epochs": ("1", 1.0),
    "label_smoothing": ("0.1", 0.1),
    "accumulate_steps": ("2", 2),
    "compute_dtype": ("bfloat16", "bfloat16"),
    "mixup": ("0.2", 0.2),
    "cutmix": ("1", 1.0),
    "seed": ("7", 7),
    "init_from": ("runs/before", "runs/before"),
    "head": ("last/.*", "last/.*"),
    "head_learning_rate": ("10", 10.0),
    "freeze_statistics": ("True", True),
    "average_decay": ("0.99", 0.99),
    "freeze": ("('stem/.*',)", ("stem/.*",)),
    "log_every_steps": ("1", 1),
    "eval_every_epochs": ("2", 2.0),
    "checkpoint_every_steps": ("5", 5),
    "keep_checkpoints": ("1", 1),
}


def parsed(small, *changes):
    arguments = ["main", "--config", str(small), "--workdir", "run"]
    return command_line.parse([*arguments, *changes]).config


def test_the_table_has_every_field():
    assert {name.split(".")[0] for name in TYPED} == {*config_lib.Config.model_fields}


@pytest.mark.parametrize("name", TYPED)
def test_a_field_is_changed_on_the_command_line(small, name):
    typed, meant = TYPED[name]
    value = parsed(small, f"--config.{name}={typed}")
    for part in name.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    assert value == meant
    assert type(value) is type(meant)


def test_flags_stand_in_any_order_and_booleans_without_a_value(small):
    arguments = ["--config.nesterov", "--workdir=run", "--config.seed=3", f"--config={small}"]
    command = command_line.parse(["main", *arguments])
    assert command.config.nesterov is True
    assert command.config.seed == 3
    assert str(command.workdir) == "run"


def test_all_that_was_typed_survives_json(small):
    """What config.json holds is strict JSON and gives the same configuration again."""
    changes = {name: typed for name, (typed, _) in TYPED.items() if name != "prune_end"}
    config = parsed(small, *[f"--config.{name}={typed}" for name, typed in changes.items()])

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = json.dumps(config.as_dict(), allow_nan=False)
    values = json.loads(text, parse_constant=refuse)
    assert values["p"] == "inf"
    again = config_lib.parse(values)
    assert again == config
    assert again.as_dict() == values


def test_durations_become_updates():
    values = {
        "data": {"name": "digits"},
        "model": {"name": "lenet300"},
        "batch_size": 100,
        "epochs": 10.0,
        "learning_rate": 0.1,
        "sparsity": 0.9,
        "prune_begin": 0.5,
        "warmup_epochs": 0.26,
        "eval_every_epochs": 0.001,
    }
    steps = config_lib.steps(config_lib.parse(values), num_train=1437)
    assert steps == config_lib.Steps(
        per_epoch=14, total=140, warmup=4, prune_begin=7, prune_end=70, eval_every=1
    )
    with pytest.raises(UserError, match="100, and the training split has only 99 examples"):
        config_lib.steps(config_lib.parse(values), num_train=99)
