"""Anyone's own network: imported on request alone, called as it wishes, and its mistakes named."""

import itertools
import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import models
from train.errors import UserError
from train.models import imported
from train.models.calling import call_arguments, parameters_of, takes

NUMBERS = itertools.count()
IMPORTS = "import flax.linen as nn\nimport jax\nimport jax.numpy as jnp\n"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of the user's and gives its name, new each time."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str) -> str:
        name = f"users_network_{next(NUMBERS)}"
        (tmp_path / f"{name}.py").write_text(IMPORTS + textwrap.dedent(source))
        return name

    return write


def build(name, image_shape=(8, 8, 1), num_classes=5, **options):
    return models.build(
        {"name": name, **options},
        num_classes=num_classes,
        image_shape=image_shape,
        allow_import=True,
    )


PLAIN = """
class Network(nn.Module):
    num_classes: int
    widths: tuple = (4,)
    settings: object = None

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.num_classes)(x)

class Outer:
    Inner = Network

def make(**options):
    return Network(**{name: options[name] for name in ("num_classes",)})

number = 3
"""


def test_nothing_is_imported_unless_it_is_allowed(module):
    name = module("raise SystemExit('imported')")
    with pytest.raises(UserError, match=f"'{name}:Network' is code .*give --allow-import"):
        models.build({"name": f"{name}:Network"}, num_classes=5)


def test_a_class_with_options_a_nested_one_and_a_function(module):
    name = module(PLAIN)
    network = build(f"{name}:Network", widths=[3, 2], settings={"a": [1]})
    assert (network.num_classes, network.widths) == (5, (3, 2))
    hash(network)
    assert build(f"{name}:Outer.Inner").widths == (4,)
    assert build(f"{name}:make").num_classes == 5


DEMANDING = """
class Network(nn.Module):
    num_classes: int
    dtype: object

    @nn.compact
    def __call__(self, images, train, axis_name):
        x = nn.Dense(16, dtype=self.dtype)(images.reshape(len(images), -1))
        x = nn.BatchNorm(not train, axis_name=axis_name)(x)
        return nn.Dense(self.num_classes)(nn.Dropout(0.5, deterministic=not train)(x))
"""


def test_it_is_called_with_what_it_takes_and_linens_dropout_has_a_key(module):
    network = build(f"{module(DEMANDING)}:Network")
    assert network.dtype == jnp.float32
    images, keys = jnp.ones((3, 8, 8, 1)), jax.random.split(jax.random.key(1), 3)
    assert set(call_arguments(network, train=True, keys=keys)) == {"train", "axis_name", "rngs"}
    variables = network.init(keys[0], images, **call_arguments(network, train=False))

    def logits(**arguments):
        arguments = call_arguments(network, **arguments)
        return network.apply(variables, images, **arguments, mutable=["batch_stats"])[0]

    np.testing.assert_array_equal(logits(train=True, keys=keys), logits(train=True, keys=keys))
    assert np.ptp(logits(train=True, keys=keys) - logits(train=True, keys=keys[::-1])) > 0
    assert np.all(np.isfinite(logits(train=False)))


def test_ours_take_keys_and_need_no_rngs():
    keys = jax.random.split(jax.random.key(1), 3)
    vit = models.build({"name": "vit_tiny"}, num_classes=5)
    assert call_arguments(vit, train=True, axis_name="batch", keys=keys) == {
        "train": True,
        "axis_name": "batch",
        "keys": keys,
    }


def test_a_network_that_names_the_axis_itself(module):
    source = DEMANDING.replace("axis_name=axis_name", "axis_name='batch'")
    build(f"{module(source.replace(', axis_name)', ')'))}:Network")


def test_parameters_by_name():
    def function(a, /, b, *c, d=1): ...

    def anything(a, **options): ...

    assert list(parameters_of(function)) == ["b", "d"]
    assert parameters_of(anything) is None

    class Anything(nn.Module):
        def __call__(self, images, **options):
            return images

    assert takes(Anything(), "train")


@pytest.mark.parametrize(
    ("source", "attribute", "says"),
    [
        (PLAIN, "Nothing", "no class or function 'Nothing'; name a Linen network as package"),
        (PLAIN, "", "no class or function ''"),
        (PLAIN, "number", "no class or function 'number'"),
        (PLAIN, "Outer", "which gives a Outer; name a subclass of flax.linen.Module"),
        ("1 / 0", "Network", r"imported \(ZeroDivisionError: .*users_network_\d+\.py line 4\)"),
        ("def make(:", "make", r"imported \(SyntaxError: .*users_network_\d+\.py, line 4\)"),
        ("import no_such", "Network", "cannot be imported .*No module named 'no_such'"),
    ],
)
def test_what_cannot_be_imported_or_built(module, source, attribute, says):
    with pytest.raises(UserError, match=says):
        build(f"{module(source)}:{attribute}")


def test_a_module_that_is_not_there():
    with pytest.raises(UserError, match="there is no module no_such; start from the folder"):
        build("no_such.module:Network")


def test_an_unknown_option_is_answered_with_the_known_ones(module):
    with pytest.raises(UserError, match=r"no option 'width'; its options are: widths, settings\."):
        build(f"{module(PLAIN)}:Network", width=3)


CALL = """
class Network(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images{more}):
        x = images.reshape(len(images), -1)
        {body}
"""


@pytest.mark.parametrize(
    ("more", "body", "says"),
    [
        ("", "return nn.Dense(3)(x)", r"gives float32\[2, 3\] for 2 images, .*float32\[2, 5\]"),
        ("", "return jnp.argmax(nn.Dense(5)(x), -1)", r"gives int32\[2\] for 2 images"),
        ("", "return nn.Dense(5)(x), x", "gives a tuple; let it give the logits alone"),
        ("", "return x[:, :5]", "has no parameters to train"),
        (
            ", *, deterministic",
            "return nn.Dense(5)(x)",
            r"called with images \[8, 8, 1\] .*'determin",
        ),
        ("", "return nn.Dense(5)(x @ x)", r"cannot be called .*users_network_\d+\.py line 11\)"),
        (
            "",
            "self.variable('cache', 'seen', jnp.zeros, ()); return nn.Dense(5)(x)",
            "variables in the collection 'cache', and a run keeps those of params and batch_stats",
        ),
    ],
)
def test_what_is_no_network_for_a_run(module, more, body, says):
    name = module(CALL.format(more=more, body=body))
    with pytest.raises(UserError, match=says):
        build(f"{name}:Network")


def test_statistics_of_a_device_are_noted_where_there_are_several(module):
    network = build(f"{module(PLAIN)}:Network")
    note = imported.note_on_statistics
    assert note("a:B", network, {"mean": 0}, 1) is None
    assert note("a:B", network, {}, 2) is None
    said = note("a:B", network, {"mean": 0}, 2)
    assert said.startswith("a:B takes no axis_name: the batch statistics that it trains with are")
    resnet = models.build({"name": "resnet8"}, num_classes=5)
    assert note("resnet8", resnet, {"mean": 0}, 2) is None
