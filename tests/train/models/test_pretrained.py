"""Other libraries' weights in our networks: every array in its place, and the same logits."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import feather_jax as feather
from train import models
from train.experiment import TrainState
from train.models.pretrained import LAYOUTS, translate
from train.models.vit import resize_positions
from train.run.init_from import with_variables_of

# The names and shapes of torchvision 0.29.1's and timm 1.0.31's own state dicts.
STATE_DICTS = json.loads((pathlib.Path(__file__).parent / "state_dicts.json").read_text())
SLOW = pytest.mark.slow


def abstract_state(model, size) -> TrainState:
    """The shapes of a network's variables; there is nothing to train."""
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    init = functools.partial(model.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), images)
    return TrainState(0, variables["params"], variables.get("batch_stats", {}), ())


@pytest.mark.parametrize("name", STATE_DICTS)
def test_every_name_has_its_place(name):
    model = models.build({"name": name.split()[0]}, num_classes=1000)
    # Numbers, so that a transposed square would show.
    given = {
        key: np.random.default_rng(number).standard_normal(shape).astype(np.float32)
        for number, (key, shape) in enumerate(STATE_DICTS[name].items())
    }
    translated = [translate(layout, given) for layout in LAYOUTS[type(model)]]
    found = min(translated, key=lambda it: len(it.unknown))
    assert not found.unknown
    state = abstract_state(model, 224)
    wanted = feather.named_leaves({"params": state.params, "batch_stats": state.batch_stats})
    assert {key: leaf.shape for key, leaf in found.leaves.items()} == {
        key: leaf.shape for key, leaf in wanted.items()
    }
    floats = sum(given[key].size for key in given if "num_batches" not in key)
    assert sum(leaf.size for leaf in found.leaves.values()) == floats
    np.testing.assert_allclose(
        sum(leaf.sum(dtype=np.float64) for leaf in found.leaves.values()),
        sum(given[key].sum(dtype=np.float64) for key in given if "num_batches" not in key),
    )


@pytest.mark.parametrize("layouts", LAYOUTS.values())
def test_what_no_rule_matches_is_named(layouts):
    strange = {
        "aux.0.weight": np.zeros((3, 3)),
        "scalar": np.zeros(()),
        "running_mean": np.zeros(3),
        "blocks.0.attn.qkv.weight": np.zeros((4, 4)),  # four rows are not three parts
    }
    for layout in layouts:
        assert translate(layout, strange).unknown == list(strange)


# The libraries themselves. Their weights cannot be had here, so these are drawn.


def torchvision_of(name, **options):
    return getattr(pytest.importorskip("torchvision").models, name)(**options)


def timm_of(name, **options):
    return pytest.importorskip("timm").create_model(name, **options)


def shallow_resnet():
    resnet = pytest.importorskip("torchvision").models.resnet
    return resnet.ResNet(resnet.BasicBlock, [2, 1, 1, 1])


def shallow_vit():
    return pytest.importorskip("torchvision").models.VisionTransformer(64, 16, 2, 3, 48, 192)


def shallow_timm_vit(**options):
    sizes = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}
    return timm_of("vit_tiny_patch16_224", **sizes | options)


def drawn(network):
    """The network with statistics, scales and biases such as training leaves, in evaluation."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
                tensor.uniform_(0.3, 0.9)
            elif tensor.ndim == 1 or "head" in name or "pos_embed" in name:
                tensor.normal_(0, 0.2)
    return network.eval()


SHALLOW_RESNET = {"name": "resnet18", "blocks_per_stage": (2, 1, 1, 1)}
SHALLOW_VIT = {"name": "vit_tiny", "depth": 2, "width": 48, "heads": 3}


@pytest.mark.parametrize(
    ("build", "spec", "size"),
    [
        (shallow_resnet, SHALLOW_RESNET, 64),
        (shallow_vit, SHALLOW_VIT, 64),
        (shallow_timm_vit, SHALLOW_VIT, 64),
        pytest.param(lambda: torchvision_of("resnet18"), {"name": "resnet18"}, 96, marks=SLOW),
        pytest.param(lambda: timm_of("resnet34"), {"name": "resnet34"}, 96, marks=SLOW),
        pytest.param(lambda: torchvision_of("resnet50"), {"name": "resnet50"}, 96, marks=SLOW),
        pytest.param(
            lambda: torchvision_of("mobilenet_v2"), {"name": "mobilenet_v2"}, 96, marks=SLOW
        ),
        pytest.param(lambda: timm_of("mobilenetv2_100"), {"name": "mobilenet_v2"}, 96, marks=SLOW),
        pytest.param(
            lambda: timm_of("vit_tiny_patch16_224"), {"name": "vit_tiny"}, 224, marks=SLOW
        ),
        pytest.param(
            lambda: timm_of("deit_small_patch16_224"), {"name": "vit_small"}, 224, marks=SLOW
        ),
        pytest.param(lambda: torchvision_of("vit_b_16"), {"name": "vit_base"}, 224, marks=SLOW),
    ],
)
def test_logits_are_pytorchs(build, spec, size, tmp_path):
    torch = pytest.importorskip("torch")
    network, path = drawn(build()), tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    images = np.random.default_rng(1).standard_normal((2, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        expected = network(torch.tensor(images).permute(0, 3, 1, 2)).numpy()

    model, lines = models.build(spec, num_classes=1000), []
    state = with_variables_of(abstract_state(model, size), path, model, lines.append)
    apply = jax.jit(functools.partial(model.apply, train=False))
    logits = apply({"params": state.params, "batch_stats": state.batch_stats}, images)
    assert 0.1 < np.ptp(expected) < 100
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    leaves = len(jax.tree.leaves((state.params, state.batch_stats)))
    assert lines == [f"Took {leaves} of the network's {leaves} arrays from {path}."]


def test_a_file_of_safetensors_is_taken_too(tmp_path):
    pytest.importorskip("torch")
    import safetensors.torch

    network, path = drawn(shallow_vit()), tmp_path / "weights.safetensors"
    safetensors.torch.save_file(network.state_dict(), path)
    model = models.build(SHALLOW_VIT, num_classes=1000)
    state = with_variables_of(abstract_state(model, 64), path, model, print)
    expected = network.encoder.layers[1].mlp[0].weight.detach().numpy().T
    np.testing.assert_array_equal(state.params["block2"]["mlp1"]["kernel"], expected)


def test_positions_are_resized_as_timm_does_it():
    torch = pytest.importorskip("torch")
    resample = pytest.importorskip("timm.layers").resample_abs_pos_embed
    positions = np.random.default_rng(0).standard_normal((1, 1 + 14**2, 8)).astype(np.float32)
    for new in (24, 7):
        expected = resample(torch.tensor(positions), [new, new], num_prefix_tokens=1).numpy()
        ours = resize_positions(positions, 1 + new**2)
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_another_image_size_has_timms_logits(tmp_path):
    torch = pytest.importorskip("torch")
    small, large = drawn(shallow_timm_vit()), shallow_timm_vit(img_size=96)
    torch.save(small.state_dict(), tmp_path / "small.pth")
    resample = pytest.importorskip("timm.layers").resample_abs_pos_embed
    resized = resample(small.pos_embed, [6, 6], num_prefix_tokens=1)
    large.load_state_dict(small.state_dict() | {"pos_embed": resized})
    images = np.random.default_rng(1).standard_normal((2, 96, 96, 3)).astype(np.float32)
    with torch.no_grad():
        expected = large.eval()(torch.tensor(images).permute(0, 3, 1, 2)).numpy()

    model, lines = models.build(SHALLOW_VIT, num_classes=1000), []
    source = tmp_path / "small.pth"
    state = with_variables_of(abstract_state(model, 96), source, model, lines.append)
    logits = model.apply({"params": state.params}, images, train=False)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert lines[0] == f"Resized the positions of 17 tokens in {source} to the network's 37."
