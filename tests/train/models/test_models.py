"""The networks: sizes and work by the table, initial weights by moments."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.tree_util import keystr, tree_leaves_with_path

from feather_jax import prunable_weights
from feather_jax.macs import count_macs
from train import models
from train.errors import UserError
from train.models.layers import uniform_bias

# name: image shape, classes, parameters, prunable weights, prunable layers, MACs an image. The
# first three rows were counted on the released definitions; the parameters of the ImageNet networks
# are published, and so are their MACs: torchvision lists 1.814, 3.664 and 4.089 G for ResNet-18, 34
# and 50, 0.301 G for MobileNetV2 and 17.564 G for ViT-B/16.
TABLE = {
    "resnet20": ((32, 32, 3), 100, 1_096_196, 1_092_960, 22, 162_378_240),
    "mobilenet": ((32, 32, 3), 100, 3_315_428, 3_287_488, 28, 46_446_592),
    "densenet40": ((32, 32, 3), 100, 714_196, 703_920, 40, 288_155_424),
    "resnet50": ((224, 224, 3), 1000, 25_557_032, 25_502_912, 54, 4_089_184_256),
    "resnet18": ((224, 224, 3), 1000, 11_689_512, 11_678_912, 21, 1_814_073_344),
    "resnet34": ((224, 224, 3), 1000, 21_797_672, 21_779_648, 37, 3_663_761_408),
    "imagenet_mobilenet": ((224, 224, 3), 1000, 4_231_976, 4_209_088, 28, 568_740_352),
    "mobilenet_v2": ((224, 224, 3), 1000, 3_504_872, 3_469_760, 53, 300_774_272),
    "vit_tiny": ((224, 224, 3), 1000, 5_717_416, 5_647_872, 74, 1_253_683_200),
    "vit_small": ((224, 224, 3), 1000, 22_050_664, 21_912_576, 74, 4_598_882_304),
    "vit_base": ((224, 224, 3), 1000, 86_567_656, 86_292_480, 74, 17_563_828_224),
    "lenet300": ((28, 28, 1), 10, 266_610, 266_200, 3, 266_200),
    "lenet5": ((28, 28, 1), 10, 431_080, 430_500, 4, 2_293_000),
    "resnet8": ((8, 8, 1), 10, 308_074, 306_720, 10, 3_034_368),
}


def shapes(model, image_shape, *, batch=1, dtype=jnp.float32):
    """Images and variables without values."""
    images = jax.ShapeDtypeStruct((batch, *image_shape), dtype)
    init = functools.partial(model.init, train=False)
    return jax.eval_shape(init, jax.random.key(0), images), images


@functools.cache
def initialise(model, image_shape):
    key = jax.random.key(0, impl="rbg")  # compiles in a fraction of the default's time
    init = jax.jit(functools.partial(model.init, train=False))
    return init(key, jnp.zeros((1, *image_shape)))


@pytest.mark.parametrize("name", TABLE)
def test_counts_are_those_of_the_table(name):
    image_shape, classes, parameters, prunable, layers, macs = TABLE[name]
    model = models.build({"name": name}, num_classes=classes)
    variables, images = shapes(model, image_shape)

    leaves = jax.tree.leaves(variables["params"])
    mask = jax.tree.leaves(prunable_weights(variables["params"]))
    assert sum(leaf.size for leaf in leaves) == parameters
    assert sum(leaf.size for leaf, chosen in zip(leaves, mask, strict=True) if chosen) == prunable
    assert sum(mask) == layers
    counted = count_macs(functools.partial(model.apply, train=False), variables, images)
    assert counted.total == macs
    kernels = [
        keystr(path, simple=True, separator="/")
        for (path, _), chosen in zip(tree_leaves_with_path(variables["params"]), mask, strict=True)
        if chosen
    ]
    layers = [layer.name for layer in counted.layers if "/attention/b" not in layer.name]
    assert sorted(layers) == sorted(kernels)


def test_every_model_is_in_the_table():
    assert set(TABLE) == set(models.MODELS)


def test_resnet50_macs_counted_by_hand():
    macs, size, inputs = 112**2 * 7 * 7 * 3 * 64, 56, 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            before = size  # v1.5: the first 1x1 convolution still works at the old resolution
            if block == 0 and stage > 0:
                size //= 2
            macs += (
                before**2 * inputs * width + size**2 * 9 * width**2 + size**2 * width * 4 * width
            )
            if block == 0:
                macs += size**2 * inputs * 4 * width
            inputs = 4 * width
    macs += 2048 * 1000
    assert macs == TABLE["resnet50"][-1]


@pytest.mark.parametrize(("name", "width"), [("tiny", 192), ("small", 384), ("base", 768)])
def test_vit_macs_counted_by_hand(name, width):
    tokens = 14 * 14 + 1
    embedding = (tokens - 1) * 16 * 16 * 3 * width
    projections, attention, mlp = (
        4 * tokens * width**2,
        2 * tokens**2 * width,
        8 * tokens * width**2,
    )
    macs = embedding + 12 * (projections + attention + mlp) + width * 1000
    assert macs == TABLE[f"vit_{name}"][-1]


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_statistics_and_logits_are_float32(name, dtype):
    image_shape, classes, *_ = TABLE[name]
    model = models.build({"name": name}, num_classes=classes, dtype=dtype)
    variables, images = shapes(model, image_shape, batch=2)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}

    apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    logits, changed = jax.eval_shape(apply, variables, images)
    assert (logits.shape, logits.dtype) == ((2, classes), jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(changed)} <= {jnp.dtype(jnp.float32)}

    traced = str(jax.make_jaxpr(apply)(variables, images))
    computed = re.findall(r":(\w+)\[[\d,]*\] = conv_general_dilated", traced)
    assert set(computed) <= {"bf16" if dtype == jnp.bfloat16 else "f32"}
    assert computed or name == "lenet300"


def test_bfloat16_computes_nearly_the_same():
    image_shape = (8, 8, 1)
    images = jax.random.normal(jax.random.key(1), (16, *image_shape))
    results = []
    for dtype in (jnp.float32, jnp.bfloat16):
        model = models.build({"name": "resnet8", "widths": (8, 16)}, num_classes=10, dtype=dtype)
        apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
        results.append(jax.jit(apply)(initialise(model, image_shape), images))
    (exact, stats), (rounded, rounded_stats) = results
    assert 0 < np.abs(exact - rounded).max() < 0.05 * np.abs(exact).max()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=0.05 * np.abs(a).max()),
        stats,
        rounded_stats,
    )


# Initial weights. They depend on a layer's kind and shape, so a few layers of each kind will do.

SHALLOW_RESNET20 = {"name": "resnet20", "blocks_per_stage": 1}
SHALLOW_DENSENET = {"name": "densenet40", "layers_per_block": 1}
NARROW_RESNET50 = {"name": "resnet50", "width": 16, "blocks_per_stage": (1, 2, 1, 1)}


def kernels_of(params):
    return {
        keystr(path, simple=True, separator="/"): np.asarray(leaf, np.float64)
        for path, leaf in tree_leaves_with_path(params)
        if keystr(path[-1:], simple=True) == "kernel"
    }


def assert_moments(values, variance, fourth):
    """Mean 0, the given variance and E[z^4] in units of it, each within six standard errors."""
    values = values.ravel() / np.sqrt(variance)
    n = values.size
    assert abs(values.mean()) < 6 / np.sqrt(n)
    assert abs((values**2).mean() - 1) < 6 * np.sqrt((fourth - 1) / n)
    assert abs((values**4).mean() - fourth) < 6 * np.std(values**4) / np.sqrt(n)


def assert_normal(values, variance):
    assert_moments(values, variance, fourth=3)


def assert_uniform(values, bound):
    assert_moments(values, bound**2 / 3, fourth=9 / 5)
    assert np.abs(values).max() <= bound


@pytest.mark.parametrize(
    ("spec", "image_shape", "classes"),
    [
        (SHALLOW_RESNET20, (32, 32, 3), 100),
        (SHALLOW_DENSENET, (32, 32, 3), 100),
        (NARROW_RESNET50, (64, 64, 3), 1000),
    ],
)
def test_convolutions_begin_he_normal_by_fan_out(spec, image_shape, classes):
    params = initialise(models.build(spec, num_classes=classes), image_shape)["params"]
    for name, kernel in kernels_of(params).items():
        if not name.startswith("head"):
            height, width, _, outputs = kernel.shape
            assert_normal(kernel, 2 / (height * width * outputs))


def test_last_layer_of_resnet20_begins_normal_with_deviation_one_hundredth():
    model = models.build(SHALLOW_RESNET20, num_classes=100)
    head = initialise(model, (32, 32, 3))["params"]["head"]
    assert_normal(np.asarray(head["kernel"], np.float64), 0.01**2)
    assert not np.any(head["bias"])


def test_last_layer_of_densenet_begins_as_pytorch_builds_it_with_zero_bias():
    model = models.build(SHALLOW_DENSENET, num_classes=100)
    head = initialise(model, (32, 32, 3))["params"]["head"]
    assert_uniform(np.asarray(head["kernel"], np.float64), 1 / np.sqrt(head["kernel"].shape[0]))
    assert not np.any(head["bias"])


@pytest.mark.slow
def test_mobilenet_begins_as_pytorch_builds_it():
    model = models.build({"name": "mobilenet"}, num_classes=100)
    params = initialise(model, (32, 32, 3))["params"]
    for kernel in kernels_of(params).values():
        assert_uniform(kernel, 1 / np.sqrt(np.prod(kernel.shape[:-1])))
    for layer in (params["head"], *(params[f"block{i}"]["pointwise"] for i in range(1, 14))):
        bound = 1 / np.sqrt(layer["kernel"].shape[-2])
        assert_uniform(np.asarray(layer["bias"], np.float64), bound)


def test_uniform_bias_reaches_its_bounds():
    bias = uniform_bias(25)(jax.random.key(0), (100_000,))
    assert_uniform(np.asarray(bias, np.float64), 0.2)
    assert bias.max() > 0.1999
    assert bias.min() < -0.1999


def test_resnet50_blocks_begin_as_the_identity():
    model = models.build(NARROW_RESNET50, num_classes=1000)
    params = initialise(model, (64, 64, 3))["params"]
    blocks = [value for name, value in params.items() if name.startswith("stage")]
    assert len(blocks) == 5
    for block in blocks:
        assert not np.any(block["norm3"]["scale"])
        others = {name for name in block if "norm" in name} - {"norm3"}
        assert all(np.all(block[name]["scale"] == 1) for name in others)
    head = params["head"]
    assert_uniform(np.asarray(head["kernel"], np.float64), 1 / np.sqrt(512))
    assert_uniform(np.asarray(head["bias"], np.float64), 1 / np.sqrt(512))


@pytest.mark.parametrize("name", ["lenet300", "lenet5"])
def test_lenets_begin_glorot_normal(name):
    params = initialise(models.build({"name": name}, num_classes=10), (28, 28, 1))["params"]
    for kernel in kernels_of(params).values():
        taps = np.prod(kernel.shape[:-2])
        variance = 2 / (taps * (kernel.shape[-2] + kernel.shape[-1]))
        # Truncated at two deviations and scaled back: E[z^4] / E[z^2]^2 of that is 2.3655.
        assert_moments(kernel, variance, fourth=2.3655)
    assert not any(np.any(layer["bias"]) for layer in params.values())


# What a configuration may say.


def test_spec_may_be_a_config_dict_and_hold_lists():
    spec = ml_collections.ConfigDict({"name": "resnet20", "widths": [4, 8], "blocks_per_stage": 2})
    model = models.build(spec, num_classes=7)
    variables, images = shapes(model, (8, 8, 1))
    assert model.widths == (4, 8)
    assert {name for name in variables["params"] if name.startswith("stage")} == {
        f"stage{stage}_block{block}" for stage in (1, 2) for block in (1, 2)
    }
    hash(model)
    assert jax.eval_shape(functools.partial(model.apply, train=False), variables, images).shape == (
        1,
        7,
    )


@pytest.mark.parametrize("name", ["resnet21", None, ["resnet20"]])
def test_unknown_name_is_answered_with_the_known_ones(name):
    with pytest.raises(UserError, match=re.escape(repr(name))) as error:
        models.build({"name": name} if name else {}, num_classes=10)
    assert all(known in str(error.value) for known in models.MODELS)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"name": "resnet20", "width": 3}, "not a field of resnet20; the nearest is 'widths'"),
        ({"name": "lenet5", "hidden": 3}, r"hidden is not a field of lenet5; .* none"),
        ({"name": "resnet20", "num_classes": 3}, "resnet20; .* widths, blocks_per_stage"),
        ({"name": "resnet20", "dtype": "bfloat16"}, "dtype is not a field of resnet20"),
        ({"name": "resnet20", "widths": 32}, r"model\.widths is 32, .*must be a sequence of whole"),
        ({"name": "resnet20", "widths": ()}, r"model\.widths is \(\)"),
        ({"name": "resnet20", "widths": (32, 0)}, r"model\.widths is \(32, 0\), and"),
        ({"name": "resnet20", "widths": (32, 6.5)}, r"model\.widths is \(32, 6\.5\)"),
        ({"name": "resnet20", "blocks_per_stage": True}, "is True, .*a whole number above 0"),
        ({"name": "resnet20", "blocks_per_stage": "3"}, "is '3', .*must be a whole number above 0"),
        ({"name": "densenet40", "reduction": 0}, "is 0, and it must be greater than 0"),
        (
            {"name": "densenet40", "reduction": 1.5},
            r"is 1\.5, and it must be less than or",
        ),
        ({"name": "mobilenet", "pointwise_bias": 1}, "is 1, .*must be a valid boolean"),
    ],
)
def test_wrong_options_are_one_sentence(spec, says):
    with pytest.raises(UserError, match=says):
        models.build(spec, num_classes=10)


def test_reduction_and_bias_are_taken():
    model = models.build({"name": "densenet40", "reduction": 1, "growth": 2}, num_classes=10)
    variables, _ = shapes(model, (8, 8, 3))
    assert variables["params"]["transition1"]["kernel"].shape == (1, 1, 16, 16)
    model = models.build({"name": "mobilenet", "pointwise_bias": False}, num_classes=100)
    variables, _ = shapes(model, (32, 32, 3))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 3_315_428 - 5_952


@pytest.mark.parametrize(
    ("name", "smallest"),
    [
        ("resnet20", 4),
        ("resnet8", 4),
        ("mobilenet", 16),
        ("densenet40", 4),
        ("resnet18", 32),
        ("resnet34", 32),
        ("resnet50", 32),
        ("imagenet_mobilenet", 32),
        ("mobilenet_v2", 32),
        ("vit_tiny", 16),
        ("lenet5", 16),
    ],
)
def test_images_that_are_too_small_are_refused(name, smallest):
    model = models.build({"name": name}, num_classes=10)
    variables, images = shapes(model, (smallest, smallest, 3), batch=2)
    fn = functools.partial(model.apply, train=False)
    assert jax.eval_shape(fn, variables, images).shape == (2, 10)
    given = (smallest - 1, smallest, 3)
    with pytest.raises(
        UserError, match=rf"at least {smallest}x{smallest} .* \[1, {given[0]}, {given[1]}, 3\]"
    ):
        shapes(model, given)
    with pytest.raises(UserError, match=r"layout \[batch, height, width, channels\]"):
        shapes(model, (smallest, smallest))
