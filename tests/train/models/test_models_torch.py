"""The networks against PyTorch, in double precision: logits, and the running statistics after."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from feather_jax.masks import path_name
from train.models import build

torch = pytest.importorskip("torch")
F = torch.nn.functional


class Reference:
    """PyTorch's layers on the variables of ours, found by their path.

    `stats` is moved in training; `used` holds the paths of the parameters that were read.
    """

    def __init__(self, variables, train):
        def flat(collection):
            leaves = jax.tree_util.tree_leaves_with_path(variables.get(collection, {}))
            return {path_name(path): torch.tensor(np.asarray(leaf)) for path, leaf in leaves}

        self.params, self.stats = flat("params"), flat("batch_stats")
        self.train, self.used = train, set()

    def param(self, name):
        if name in self.params:
            self.used.add(name)
        return self.params.get(name)

    def conv(self, name, x, stride=1, groups=1, padding=None):
        kernel = self.param(f"{name}/kernel").permute(3, 2, 0, 1)
        padding = kernel.shape[-1] // 2 if padding is None else padding
        return F.conv2d(x, kernel, self.param(f"{name}/bias"), stride, padding, groups=groups)

    def layer_norm(self, name, x):
        scale, bias = self.param(f"{name}/scale"), self.param(f"{name}/bias")
        return F.layer_norm(x, x.shape[-1:], scale, bias, eps=1e-6)

    def norm(self, name, x):
        return F.batch_norm(
            x,
            self.stats[f"{name}/mean"],
            self.stats[f"{name}/var"],
            self.param(f"{name}/scale"),
            self.param(f"{name}/bias"),
            training=self.train,
            momentum=0.1,
            eps=1e-5,
        )

    def linear(self, name, x):
        return F.linear(x, self.param(f"{name}/kernel").T, self.param(f"{name}/bias"))

    def norm_relu(self, name, x):
        return F.relu(self.norm(name, x))


def basic_block(net, at, x, stride, project):
    y = net.norm_relu(f"{at}/norm1", net.conv(f"{at}/conv1", x, stride))
    y = net.norm(f"{at}/norm2", net.conv(f"{at}/conv2", y))
    if project:
        x = net.norm(f"{at}/projection_norm", net.conv(f"{at}/projection", x, stride))
    return F.relu(x + y)


def resnet20(net, x):
    x = net.norm_relu("stem_norm", net.conv("stem", x))
    for stage in (1, 2, 3):
        for block in (1, 2, 3):
            stride = 2 if (stage, block) in ((2, 1), (3, 1)) else 1
            x = basic_block(net, f"stage{stage}_block{block}", x, stride, project=stride == 2)
    return net.linear("head", x.mean((2, 3)))


def bottleneck(net, at, x, stride, project):
    y = net.norm_relu(f"{at}/norm1", net.conv(f"{at}/conv1", x))
    y = net.norm_relu(f"{at}/norm2", net.conv(f"{at}/conv2", y, stride))
    y = net.norm(f"{at}/norm3", net.conv(f"{at}/conv3", y))
    if project:
        x = net.norm(f"{at}/projection_norm", net.conv(f"{at}/projection", x, stride))
    return F.relu(x + y)


def resnet(net, x, block_of, blocks_per_stage):
    x = net.norm_relu("stem_norm", net.conv("stem", x, 2))
    x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    for stage, blocks in enumerate(blocks_per_stage, 1):
        for block in range(1, blocks + 1):
            stride = 2 if block == 1 and stage > 1 else 1
            project = block == 1 and (stage > 1 or block_of is bottleneck)
            x = block_of(net, f"stage{stage}_block{block}", x, stride, project)
    return net.linear("head", x.mean((2, 3)))


def mobilenet(net, x, stem_stride=1):
    x = net.norm_relu("stem_norm", net.conv("stem", x, stem_stride))
    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]
    for number, stride in enumerate(strides, 1):
        at = f"block{number}"
        depthwise = net.conv(f"{at}/depthwise", x, stride, groups=x.shape[1])
        x = net.norm_relu(f"{at}/depthwise_norm", depthwise)
        x = net.norm_relu(f"{at}/pointwise_norm", net.conv(f"{at}/pointwise", x))
    return net.linear("head", x.mean((2, 3)))


def mobilenet_v2(net, x):
    def norm_relu6(name, x):
        return F.relu6(net.norm(name, x))

    x = norm_relu6("stem_norm", net.conv("stem", x, 2))
    number = 0
    table = [(1, 1, 1), (6, 2, 2), (6, 3, 2), (6, 4, 2), (6, 3, 1), (6, 3, 2), (6, 1, 1)]
    for expansion, blocks, stride in table:
        for block in range(blocks):
            number += 1
            at, y = f"block{number}", x
            if expansion > 1:
                y = norm_relu6(f"{at}/expand_norm", net.conv(f"{at}/expand", y))
            y = net.conv(f"{at}/depthwise", y, stride if block == 0 else 1, groups=y.shape[1])
            y = norm_relu6(f"{at}/depthwise_norm", y)
            y = net.norm(f"{at}/project_norm", net.conv(f"{at}/project", y))
            x = x + y if block else y
    x = norm_relu6("last_norm", net.conv("last", x))
    return net.linear("head", x.mean((2, 3)))


def vit(net, x, patch, depth, heads, class_token):
    patches = F.unfold(x, patch, stride=patch).transpose(1, 2)  # channels are slowest in a patch
    embedding = net.param("patch_embedding/kernel").permute(2, 0, 1, 3).flatten(0, 2)
    x = patches @ embedding + net.param("patch_embedding/bias")
    if class_token:
        x = torch.cat([net.param("class_token").expand(len(x), 1, -1), x], dim=1)
    x = x + net.param("positions")
    batch, tokens, width = x.shape
    for number in range(1, depth + 1):
        at = f"block{number}"
        y = net.layer_norm(f"{at}/norm1", x)
        q, k, v = (
            net.linear(f"{at}/attention/{name}", y)
            .view(batch, tokens, heads, width // heads)
            .transpose(1, 2)
            for name in ("query", "key", "value")
        )
        scores = torch.softmax(q @ k.transpose(2, 3) / (width // heads) ** 0.5, dim=-1)
        y = (scores @ v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + net.linear(f"{at}/attention/out", y)
        y = F.gelu(net.linear(f"{at}/mlp1", net.layer_norm(f"{at}/norm2", x)))
        x = x + net.linear(f"{at}/mlp2", y)
    x = net.layer_norm("norm", x)
    return net.linear("head", x[:, 0] if class_token else x.mean(1))


def densenet(net, x, layers=6):
    x = net.conv("stem", x)
    for block in (1, 2, 3):
        for layer in range(1, layers + 1):
            at = f"block{block}_layer{layer}"
            y = net.conv(f"{at}_conv1", net.norm_relu(f"{at}_conv1_norm", x))
            y = net.conv(f"{at}_conv2", net.norm_relu(f"{at}_conv2_norm", y))
            x = torch.cat([x, y], dim=1)
        if block < 3:
            at = f"transition{block}"
            x = F.avg_pool2d(net.conv(at, net.norm_relu(f"{at}_norm", x)), 2)
    return net.linear("head", net.norm_relu("head_norm", x).mean((2, 3)))


def lenet300(net, x):
    x = F.relu(net.linear("hidden1", x.permute(0, 2, 3, 1).flatten(1)))
    return net.linear("head", F.relu(net.linear("hidden2", x)))


def lenet5(net, x):
    x = F.max_pool2d(F.relu(net.conv("conv1", x, padding=0)), 2)
    x = F.max_pool2d(F.relu(net.conv("conv2", x, padding=0)), 2)
    x = x.permute(0, 2, 3, 1).flatten(1)  # Flax flattens with the channels last
    return net.linear("head", F.relu(net.linear("hidden", x)))


SLOW = pytest.mark.slow
SMALL_VIT = {"name": "vit_tiny", "patch": 4, "width": 24, "depth": 2}
VIT_IMAGES = (3, 12, 16, 3)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("spec", "reference", "shape"),
    [
        ({"name": "resnet20", "widths": (8, 12, 16)}, resnet20, (3, 32, 32, 3)),
        pytest.param({"name": "mobilenet"}, mobilenet, (3, 16, 16, 3), marks=SLOW),
        pytest.param(
            {"name": "imagenet_mobilenet"},
            functools.partial(mobilenet, stem_stride=2),
            (3, 32, 32, 3),
            marks=SLOW,
        ),
        (
            {"name": "densenet40", "layers_per_block": 2, "growth": 6},
            functools.partial(densenet, layers=2),
            (3, 32, 32, 3),
        ),
        (
            {"name": "resnet50", "width": 8, "blocks_per_stage": (2, 1, 1)},
            functools.partial(resnet, block_of=bottleneck, blocks_per_stage=(2, 1, 1)),
            (3, 64, 64, 3),
        ),
        pytest.param(
            {"name": "resnet50"},
            functools.partial(resnet, block_of=bottleneck, blocks_per_stage=(3, 4, 6, 3)),
            (2, 64, 64, 3),
            marks=SLOW,
        ),
        (
            {"name": "resnet18", "width": 8, "blocks_per_stage": (2, 1, 1)},
            functools.partial(resnet, block_of=basic_block, blocks_per_stage=(2, 1, 1)),
            (3, 64, 64, 3),
        ),
        pytest.param({"name": "mobilenet_v2"}, mobilenet_v2, (2, 64, 64, 3), marks=SLOW),
        (
            SMALL_VIT,
            functools.partial(vit, patch=4, depth=2, heads=3, class_token=True),
            VIT_IMAGES,
        ),
        (
            SMALL_VIT | {"class_token": False},
            functools.partial(vit, patch=4, depth=2, heads=3, class_token=False),
            VIT_IMAGES,
        ),
        ({"name": "lenet300"}, lenet300, (3, 28, 28, 1)),
        ({"name": "lenet5"}, lenet5, (3, 28, 28, 1)),
    ],
    ids=[
        "resnet20",
        "mobilenet",
        "imagenet_mobilenet",
        "densenet",
        "bottleneck",
        "resnet50",
        "resnet18",
        "mobilenet_v2",
        "vit",
        "vit_mean",
        "lenet300",
        "lenet5",
    ],
)
def test_the_network_is_pytorchs(spec, reference, shape, train):
    rng = np.random.default_rng(0)
    images = rng.standard_normal(shape)
    with jax.enable_x64(True):
        model = build(spec, num_classes=10, dtype=jnp.float64)
        init = functools.partial(model.init, train=False)
        variables = drawn(jax.eval_shape(init, jax.random.key(0), images), rng)
        apply = functools.partial(model.apply, train=train, mutable=["batch_stats"])
        logits, changed = jax.device_get(jax.jit(apply)(variables, images))

    net = Reference(variables, train)
    with torch.no_grad():
        expected = reference(net, torch.tensor(images).permute(0, 3, 1, 2)).numpy()
    assert net.used == set(net.params)
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(logits, expected, rtol=1e-9, atol=1e-9)
    # In evaluation Flax gives back the statistics as they were.
    ours = Reference({"batch_stats": changed.get("batch_stats", {})}, train).stats
    for name, expected_stat in net.stats.items():
        np.testing.assert_allclose(ours[name], expected_stat, rtol=1e-9, atol=1e-9, err_msg=name)


def drawn(shapes, rng):
    """Variables of these shapes in which no scale is zero and no variance negative."""

    def draw(path, leaf):
        kind = path_name(path).rsplit("/", 1)[1]
        if kind == "kernel":
            return rng.standard_normal(leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        if kind in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape)
        return 0.1 * rng.standard_normal(leaf.shape)

    return jax.tree_util.tree_map_with_path(draw, shapes)
