"""A wrong `config.data` is one sentence that names what is wrong."""

import pytest

from train.data import digits, spec
from train.errors import UserError

DIGITS = {"name": "digits", "mean": (0.3,), "std": (0.4,)}
IMAGENET = {"name": "imagenet2012", "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"mean": (0.3,), "std": (0.4,)}, "data.name is None; choose one of digits, "),
        (DIGITS | {"name": "cifar"}, "'cifar'.*cifar10, cifar100"),
        (DIGITS | {"name": ["digits"]}, r"data.name is \['digits'\]"),
        (DIGITS | {"crop": 4}, "data.crop is not a field of digits; .*crop_padding"),
        (DIGITS | {"workers": 4}, "data.workers is not a field of digits; .*crop_padding"),
        (
            IMAGENET | {"eval_fraction": 0.1},
            "eval_fraction is not a field of imagenet2012",
        ),
        (
            DIGITS | {"mean": (0.3, 0.3, 0.3)},
            r"mean is \(0.3, 0.3, 0.3\); digits has 1 channel",
        ),
        (DIGITS | {"mean": 0.3}, "data.mean is 0.3, .*must be a tuple of numbers, one a channel"),
        (DIGITS | {"mean": ("0.3",)}, "data.mean"),
        (DIGITS | {"mean": (float("nan"),)}, "data.mean"),
        (DIGITS | {"std": (0.0,)}, "data.std .* positive"),
        (IMAGENET | {"std": (0.5,)}, "imagenet2012 has 3 channel"),
        (
            DIGITS | {"crop_padding": True},
            "is True, of type bool, and it must be a valid integer",
        ),
        (DIGITS | {"crop_padding": 1.0}, "data.crop_padding is 1.0"),
        (DIGITS | {"crop_padding": -1}, "data.crop_padding is -1"),
        (
            DIGITS | {"crop_padding": 9},
            "data.crop_padding is 9; images of digits are only 8 pixels",
        ),
        (DIGITS | {"flip": 1}, "data.flip is 1, .*must be a valid boolean"),
        (DIGITS | {"data_dir": None}, "data.data_dir is None, .*must be a valid string"),
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
    assert parsed == spec.InMemory(name="digits", mean=(0.0,), std=(1.0,))


@pytest.mark.parametrize("name", spec.KNOWN)
def test_a_data_set_knows_its_own_mean_and_deviation(name):
    known, parsed = spec.KNOWN[name], spec.parse({"name": name})
    assert (parsed.mean, parsed.std) == (known.mean, known.std)
    channels = known.shape[-1] if known.shape else 3
    assert len(parsed.mean) == len(parsed.std) == channels


def test_the_mean_of_the_digits_is_theirs():
    pixels = digits.load().train_images / 255
    known = spec.KNOWN["digits"]
    assert (pixels.mean(), pixels.std()) == pytest.approx((*known.mean, *known.std), abs=1e-3)
