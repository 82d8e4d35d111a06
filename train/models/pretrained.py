"""torchvision's and timm's names for the weights of our networks, and their layout of kernels.

References:
  torchvision 0.29's `models/resnet.py`, `mobilenetv2.py` and `vision_transformer.py`
  timm 1.0's `models/resnet.py`, `mobilenetv3.py` (which builds MobileNetV2) and
  `vision_transformer.py`, whose names DeiT's released weights have
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import TypeAlias

import flax.linen as nn
import numpy as np

from train.models.mobilenet_v2 import GROUPS, MobileNetV2
from train.models.resnet import ResNet
from train.models.vit import ViT

Rule: TypeAlias = tuple[str, Callable[..., str | tuple[str, ...]]]
"""An expression over a module's whole path, and what makes our path of the numbers in it.

Of several paths, each has an equal part of the rows of the weight and of the bias.
"""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one library names the parts of a network.

    Attributes:
      modules: rules, of which the first that matches holds.
      parameters: those that belong to the whole network, and ours.
    """

    modules: tuple[Rule, ...]
    parameters: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _stage_block(stage: int, block: int) -> str:
    return f"stage{stage}_block{block + 1}"


_RESNET = Layout(  # timm has torchvision's names
    (
        (r"conv1", lambda: "stem"),
        (r"bn1", lambda: "stem_norm"),
        (r"layer(\d+)\.(\d+)\.conv(\d)", lambda s, b, n: f"{_stage_block(s, b)}/conv{n}"),
        (r"layer(\d+)\.(\d+)\.bn(\d)", lambda s, b, n: f"{_stage_block(s, b)}/norm{n}"),
        (r"layer(\d+)\.(\d+)\.downsample\.0", lambda s, b: f"{_stage_block(s, b)}/projection"),
        (r"layer(\d+)\.(\d+)\.downsample\.1", lambda s, b: f"{_stage_block(s, b)}/projection_norm"),
        (r"fc", lambda: "head"),
    ),
)

_MOBILENET_V2_TORCHVISION = Layout(
    (
        (r"features\.0\.0", lambda: "stem"),
        (r"features\.0\.1", lambda: "stem_norm"),
        (r"features\.18\.0", lambda: "last"),
        (r"features\.18\.1", lambda: "last_norm"),
        (r"features\.1\.conv\.0\.0", lambda: "block1/depthwise"),
        (r"features\.1\.conv\.0\.1", lambda: "block1/depthwise_norm"),
        (r"features\.1\.conv\.1", lambda: "block1/project"),
        (r"features\.1\.conv\.2", lambda: "block1/project_norm"),
        (r"features\.(\d+)\.conv\.0\.0", lambda n: f"block{n}/expand"),
        (r"features\.(\d+)\.conv\.0\.1", lambda n: f"block{n}/expand_norm"),
        (r"features\.(\d+)\.conv\.1\.0", lambda n: f"block{n}/depthwise"),
        (r"features\.(\d+)\.conv\.1\.1", lambda n: f"block{n}/depthwise_norm"),
        (r"features\.(\d+)\.conv\.2", lambda n: f"block{n}/project"),
        (r"features\.(\d+)\.conv\.3", lambda n: f"block{n}/project_norm"),
        (r"classifier\.1", lambda: "head"),
    ),
)


def _group_block(group: int, block: int) -> str:
    before = sum(blocks for _, _, blocks, _ in GROUPS[:group])
    return f"block{before + block + 1}"


_MOBILENET_V2_TIMM = Layout(
    (
        (r"conv_stem", lambda: "stem"),
        (r"bn1", lambda: "stem_norm"),
        (r"conv_head", lambda: "last"),
        (r"bn2", lambda: "last_norm"),
        (r"blocks\.0\.0\.conv_dw", lambda: "block1/depthwise"),
        (r"blocks\.0\.0\.bn1", lambda: "block1/depthwise_norm"),
        (r"blocks\.0\.0\.conv_pw", lambda: "block1/project"),
        (r"blocks\.0\.0\.bn2", lambda: "block1/project_norm"),
        (r"blocks\.(\d+)\.(\d+)\.conv_pw", lambda g, b: f"{_group_block(g, b)}/expand"),
        (r"blocks\.(\d+)\.(\d+)\.bn1", lambda g, b: f"{_group_block(g, b)}/expand_norm"),
        (r"blocks\.(\d+)\.(\d+)\.conv_dw", lambda g, b: f"{_group_block(g, b)}/depthwise"),
        (r"blocks\.(\d+)\.(\d+)\.bn2", lambda g, b: f"{_group_block(g, b)}/depthwise_norm"),
        (r"blocks\.(\d+)\.(\d+)\.conv_pwl", lambda g, b: f"{_group_block(g, b)}/project"),
        (r"blocks\.(\d+)\.(\d+)\.bn3", lambda g, b: f"{_group_block(g, b)}/project_norm"),
        (r"classifier", lambda: "head"),
    ),
)


def _attention(block: int) -> tuple[str, ...]:
    return tuple(f"block{block + 1}/attention/{name}" for name in ("query", "key", "value"))


_VIT_TORCHVISION = Layout(
    (
        (r"conv_proj", lambda: "patch_embedding"),
        (r"encoder\.layers\.encoder_layer_(\d+)\.ln_(\d)", lambda b, n: f"block{b + 1}/norm{n}"),
        (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj", _attention),
        (
            r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj",
            lambda b: f"block{b + 1}/attention/out",
        ),
        # The older of torchvision's files have the second names.
        (
            r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:0|linear_1)",
            lambda b: f"block{b + 1}/mlp1",
        ),
        (
            r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:3|linear_2)",
            lambda b: f"block{b + 1}/mlp2",
        ),
        (r"encoder\.ln", lambda: "norm"),
        (r"heads\.head", lambda: "head"),
    ),
    {"class_token": "class_token", "encoder.pos_embedding": "positions"},
)

_VIT_TIMM = Layout(
    (
        (r"patch_embed\.proj", lambda: "patch_embedding"),
        (r"blocks\.(\d+)\.norm(\d)", lambda b, n: f"block{b + 1}/norm{n}"),
        (r"blocks\.(\d+)\.attn\.qkv", _attention),
        (r"blocks\.(\d+)\.attn\.proj", lambda b: f"block{b + 1}/attention/out"),
        (r"blocks\.(\d+)\.mlp\.fc(\d)", lambda b, n: f"block{b + 1}/mlp{n}"),
        (r"norm", lambda: "norm"),
        (r"head", lambda: "head"),
    ),
    {"cls_token": "class_token", "pos_embed": "positions"},
)

LAYOUTS: dict[type[nn.Module], tuple[Layout, ...]] = {
    ResNet: (_RESNET,),
    MobileNetV2: (_MOBILENET_V2_TORCHVISION, _MOBILENET_V2_TIMM),
    ViT: (_VIT_TORCHVISION, _VIT_TIMM),
}
"""The layouts that are known of a network."""


@dataclasses.dataclass(frozen=True)
class Translated:
    """A state dict in our names and layout.

    Attributes:
      leaves: arrays by our names, such as `params/head/kernel`; views of the given ones.
      unknown: the names that no rule matches.
    """

    leaves: dict[str, np.ndarray]
    unknown: list[str]


def translate(layout: Layout, tensors: Mapping[str, np.ndarray]) -> Translated:
    """A state dict in our names: convolutions' kernels HWIO instead of OIHW, dense ones transposed.

    Batch normalisation's `num_batches_tracked` is passed over: nothing here needs it.
    """
    leaves, unknown = {}, []
    for name, tensor in tensors.items():
        if name in layout.parameters:
            leaves[f"params/{layout.parameters[name]}"] = tensor
            continue
        module, _, kind = name.replace(".in_proj_", ".in_proj.").rpartition(".")
        if kind == "num_batches_tracked":
            continue
        modules, leaf = _modules(layout, module), _leaf(kind, tensor)
        if not modules or leaf is None or len(tensor) % len(modules):
            unknown.append(name)
            continue
        collection, ours, array = leaf
        parts = np.split(array, len(modules), axis=-1)  # what were rows are columns now
        for ours_module, part in zip(modules, parts, strict=True):
            leaves[f"{collection}/{ours_module}/{ours}"] = part
    return Translated(leaves, unknown)


def _modules(layout: Layout, module: str) -> tuple[str, ...]:
    """Our modules for one of theirs; () if no rule matches it."""
    for pattern, ours in layout.modules:
        match = re.fullmatch(pattern, module)
        if match:
            found = ours(*map(int, match.groups()))
            return (found,) if isinstance(found, str) else found
    return ()


def _leaf(kind: str, tensor: np.ndarray) -> tuple[str, str, np.ndarray] | None:
    """The collection, the name and the array that we have for one of a module's; None if none."""
    match kind, tensor.ndim:
        case "weight", 4:
            return "params", "kernel", tensor.transpose(2, 3, 1, 0)
        case "weight", 2:
            return "params", "kernel", tensor.T
        case "weight", 1:
            return "params", "scale", tensor
        case "bias", 1:
            return "params", "bias", tensor
        case "running_mean", 1:
            return "batch_stats", "mean", tensor
        case "running_var", 1:
            return "batch_stats", "var", tensor
    return None
