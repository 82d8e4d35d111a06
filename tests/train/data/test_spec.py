"""A wrong `config.data` is one sentence that names what is wrong."""

import pytest

from train import data
from train.data import spec
from train.errors import UserError

DIGITS = {"name": "digits", "mean": (0.3,), "std": (0.4,)}
IMAGENET = {"name": "imagenet2012", "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"mean": (0.3,), "std": (0.4,)}, "data.name is None; choose one of digits, "),
        (DIGITS | {"name": "cifar"}, "'cifar'.*cifar10, cifar100"),
        (DIGITS | {"name": ["digits"]}, r"data.name is \['digits'\]"),
        (DIGITS | {"crop": 4}, "'crop', which digits has no use for.*crop_padding"),
        (DIGITS | {"workers": 4}, "'workers', which digits has no use for"),
        (IMAGENET | {"crop_padding": 4}, "'crop_padding', which imagenet2012 has no use for"),
        ({"name": "digits", "std": (0.4,)}, "data.mean is None; give 1 number"),
        (DIGITS | {"mean": (0.3, 0.3, 0.3)}, "data.mean .*; give 1 number"),
        (DIGITS | {"mean": 0.3}, "data.mean is 0.3; give 1 number"),
        (DIGITS | {"mean": ("0.3",)}, "data.mean"),
        (DIGITS | {"mean": (float("nan"),)}, "data.mean"),
        (DIGITS | {"std": (0.0,)}, "data.std .* positive"),
        (IMAGENET | {"std": (0.5,)}, "give 3 positive number"),
        (DIGITS | {"crop_padding": True}, "data.crop_padding is True; it must be an integer"),
        (DIGITS | {"crop_padding": 1.0}, "data.crop_padding is 1.0"),
        (DIGITS | {"crop_padding": -1}, "data.crop_padding is -1; choose it between 0 and 8"),
        (DIGITS | {"flip": 1}, "data.flip is 1; it must be True or False"),
        (DIGITS | {"data_dir": None}, "data.data_dir is None; it must be a path"),
        (IMAGENET | {"image_size": 0}, "data.image_size is 0"),
        (IMAGENET | {"workers": -1}, "data.workers is -1"),
    ],
)
def test_a_wrong_specification_is_one_sentence(given, says):
    with pytest.raises(UserError, match=says) as error:
        spec.parse(given)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_sequences_become_tuples_and_the_rest_has_defaults():
    parsed = spec.parse({"name": "digits", "mean": [0], "std": [1]})
    assert parsed == spec.Spec("digits", (0.0,), (1.0,))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"batch_size": 0, "seed": 0}, "batch_size is 0"),
        ({"batch_size": 33, "seed": 0, "process_count": 2}, "batch_size is 33.*processes, 2"),
        ({"batch_size": 32, "seed": -1}, "seed is -1"),
    ],
)
def test_a_batch_that_does_not_fit_is_one_sentence(arguments, says):
    with pytest.raises(UserError, match=says):
        data.load(DIGITS, **arguments)
