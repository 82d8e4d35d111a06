"""Training starts from another run's variables, or says why it cannot."""

import functools

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

import feather_jax as feather
from train import models
from train.errors import UserError
from train.experiment import TrainState
from train.run import init_from
from train.run.session import Progress
from train.store.checkpoint import Checkpoints

MODEL = nn.Dense(5)  # of no consequence where the variables are a run's


def with_variables_of(start, source, say, model=MODEL, **options):
    return init_from.with_variables_of(start, source, model, say, **options)


def state(seed: int, width: int = 5) -> TrainState:
    rng = np.random.default_rng(seed)
    params = {"hidden": {"kernel": rng.normal(size=(4, width)).astype(np.float32)}}
    return TrainState(
        step=np.int32(0),
        params=params,
        batch_stats={"norm": {"mean": rng.normal(size=3).astype(np.float32)}},
        opt_state=optax.sgd(0.1, momentum=0.9).init(params),
    )


def variables(of: TrainState):
    return {"params": of.params, "batch_stats": of.batch_stats}


@pytest.fixture
def workdir(tmp_path):
    """A run with the checkpoints of steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", 5)
    for step in (1, 2):
        checkpoints.save(Progress(state(step).replace(step=np.int32(step)), []).items(), {})
    checkpoints.close()
    return tmp_path / "run"


def assert_starts_from(source, seed, lines=()):
    said = []
    start = state(99)
    started = with_variables_of(start, source, said.append)
    jax.tree.map(np.testing.assert_array_equal, variables(started), variables(state(seed)))
    assert started.step == 0
    jax.tree.map(np.testing.assert_array_equal, started.opt_state, start.opt_state)
    expected = [*lines, f"Took 2 of the network's 2 arrays from {source}."]
    assert [line[: len(begin)] for line, begin in zip(said, expected, strict=True)] == expected


def test_a_workdir_a_folder_of_checkpoints_and_a_model_file_will_do(workdir, tmp_path):
    assert_starts_from(workdir, 2)
    assert_starts_from(workdir / "checkpoints", 2)
    feather.save(tmp_path / "model.npz", variables(state(3)))
    assert_starts_from(tmp_path / "model.npz", 3)


def test_what_orbax_and_flax_save_themselves_will_do(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", variables(state(3)))
    assert_starts_from(tmp_path / "orbax", 3)
    (tmp_path / "flax").write_bytes(flax.serialization.msgpack_serialize(variables(state(4))))
    assert_starts_from(tmp_path / "flax", 4)


def test_a_damaged_newest_checkpoint_is_passed_over_and_left_alone(workdir):
    metadata = workdir / "checkpoints" / "2" / "info" / "metadata"
    metadata.write_text("{")
    assert_starts_from(workdir, 1, lines=["Passed over the checkpoint of step 2"])
    assert metadata.read_text() == "{"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda start: state(0, width=6),
            r"kernel as float32\[4, 5\], and .*\[4, 6\]",
        ),
        (lambda start: start.replace(batch_stats={}), "has batch_stats/norm/mean, which the model"),
        (
            lambda start: start.replace(batch_stats={"more": np.zeros(2)} | start.batch_stats),
            "has no batch_stats/more",
        ),
    ],
)
def test_variables_of_another_model_are_an_error(workdir, change, message):
    with pytest.raises(UserError, match=message):
        with_variables_of(change(state(0)), workdir, print)


def test_a_head_that_does_not_fit_begins_anew_and_says_so(workdir):
    start, said = state(0, width=7), []
    started = with_variables_of(start, workdir, said.append, head="hidden/.*")
    np.testing.assert_array_equal(
        started.params["hidden"]["kernel"], start.params["hidden"]["kernel"]
    )
    jax.tree.map(np.testing.assert_array_equal, started.batch_stats, state(2).batch_stats)
    assert said == [
        f"Took 1 of the network's 2 arrays from {workdir}.",
        "The head begins anew, since it does not fit: "
        "params/hidden/kernel ([4, 5] there, [4, 7] here).",
    ]


def test_a_head_that_is_missing_begins_anew(tmp_path):
    feather.save(tmp_path / "body.npz", {"batch_stats": state(3).batch_stats})
    said = []
    with_variables_of(state(0), tmp_path / "body.npz", said.append, head="hidden/.*")
    assert "params/hidden/kernel (missing there, [4, 5] here)" in said[1]


def test_weights_that_are_no_floating_point_numbers_are_refused(tmp_path):
    whole = jax.tree.map(lambda leaf: leaf.astype(np.int8), variables(state(3)))
    feather.save(tmp_path / "whole.npz", whole)
    with pytest.raises(UserError, match=r"whole\.npz has batch_stats/norm/mean as int8"):
        with_variables_of(state(0), tmp_path / "whole.npz", print)


# PyTorch's names; that the numbers are right is tested in models/test_pretrained.py.


def network_state(spec, size):
    model = models.build(spec, num_classes=4)
    init = functools.partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return model, TrainState(0, zeros["params"], zeros.get("batch_stats", {}), ())


VIT = {"name": "vit_tiny", "width": 6, "depth": 1}
VIT_STATE_DICT = {
    "cls_token": (1, 1, 6),
    "pos_embed": (1, 5, 6),
    "patch_embed.proj.weight": (6, 3, 16, 16),
    "patch_embed.proj.bias": (6,),
    "blocks.0.norm1.weight": (6,),
    "blocks.0.norm1.bias": (6,),
    "blocks.0.attn.qkv.weight": (18, 6),
    "blocks.0.attn.qkv.bias": (18,),
    "blocks.0.attn.proj.weight": (6, 6),
    "blocks.0.attn.proj.bias": (6,),
    "blocks.0.norm2.weight": (6,),
    "blocks.0.norm2.bias": (6,),
    "blocks.0.mlp.fc1.weight": (24, 6),
    "blocks.0.mlp.fc1.bias": (24,),
    "blocks.0.mlp.fc2.weight": (6, 24),
    "blocks.0.mlp.fc2.bias": (6,),
    "norm.weight": (6,),
    "norm.bias": (6,),
    "head.weight": (1000, 6),
    "head.bias": (1000,),
}


def write(path, shapes, **changes):
    shapes = {name: shape for name, shape in (shapes | changes).items() if shape is not None}
    arrays = {name: np.ones(shape, np.float16) for name, shape in shapes.items()}
    safetensors.numpy.save_file(arrays, path)
    return path


def test_another_number_of_classes_and_another_image_size(tmp_path):
    source, said = write(tmp_path / "vit.safetensors", VIT_STATE_DICT), []
    model, start = network_state(VIT, 48)
    started = with_variables_of(start, source, said.append, model)
    assert said == [
        f"Resized the positions of 5 tokens in {source} to the network's 10.",
        f"Took 22 of the network's 24 arrays from {source}.",
        "The head begins anew, since it does not fit: params/head/bias ([1000] there, [4] here), "
        "params/head/kernel ([6, 1000] there, [6, 4] here).",
    ]
    taken = jax.tree.map(lambda leaf: bool(np.allclose(leaf, 1)), started.params)
    assert not any(taken.pop("head").values())
    assert all(jax.tree.leaves(taken))
    assert {leaf.dtype for leaf in jax.tree.leaves(started.params)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dist_token": (1, 1, 6)}, "has 'dist_token', which neither torchvision's nor timm's ViT"),
        ({"pos_embed": (1, 6, 6)}, "another vision transformer .*6 positions cannot become 5"),
        ({"norm.bias": None}, "has no params/norm/bias, which the model needs"),
        ({"norm.bias": (7,)}, r"norm/bias as float16\[7\], and the model as float32\[6\]"),
        ({"blocks.1.norm1.bias": (6,)}, "has params/block2/norm1/bias, which the model does not"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_one_sentence(tmp_path, changes, says):
    source = write(tmp_path / "vit.safetensors", VIT_STATE_DICT, **changes)
    model, start = network_state(VIT, 32)
    with pytest.raises(UserError, match=says):
        with_variables_of(start, source, print, model)


def test_pytorchs_weights_of_a_network_without_known_names(tmp_path):
    source = write(tmp_path / "vit.safetensors", VIT_STATE_DICT)
    with pytest.raises(UserError, match=r"known for ResNet, MobileNetV2, ViT, not for a Dense"):
        with_variables_of(state(0), source, print)
    model, start = network_state({"name": "resnet18"}, 32)
    with pytest.raises(UserError, match=r"neither torchvision's nor timm's ResNet has"):
        with_variables_of(start, source, print, model)
