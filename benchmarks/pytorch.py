"""ResNet-20's dense step at batch 128 next to PyTorch's, on the same cores.

    python -m benchmarks.pytorch [--pairs N]
    XLA_FLAGS=--xla_cpu_prefer_vector_width=512 python -m benchmarks.pytorch

Both crop, flip and normalise, go forward and backward, clip, decay and take a step of SGD with
momentum; PyTorch eagerly, with channels first and with channels last. They take turns on random
data. Needs PyTorch. Appends to `benchmarks/results/pytorch.jsonl`.
"""

import argparse
import itertools
import os
import statistics
from collections.abc import Callable
from typing import Any

import jax
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.common import append_result, print_table
from benchmarks.program import CASES, in_turns, make, random_batch, ratio, running

CASE = CASES["resnet20"]


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the width changes."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        stride = 1 if inputs == width else 2
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != width:
            projection = nn.Conv2d(inputs, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet20() -> nn.Module:
    """Widths 32, 64 and 128, as in `train.models.resnet.CifarResNet`."""
    widths = [32, 32, 32, 32, 64, 64, 64, 128, 128, 128]
    blocks = [Block(a, b) for a, b in itertools.pairwise(widths)]
    stem = [nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, CASE.num_classes)]
    return nn.Sequential(*stem, *blocks, *head)


def torch_step(layout: torch.memory_format) -> Callable[[], None]:
    """A function that does one more step."""
    model: Any = resnet20()
    model.to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4)
    batch = random_batch(CASE)
    pixels = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(batch["label"]).long()

    def step() -> None:
        top, left = torch.randint(0, 2 * CASE.crop_padding + 1, (2,)).tolist()
        padded = F.pad(pixels, [CASE.crop_padding] * 4)[..., top : top + 32, left : left + 32]
        flipped = torch.where(torch.rand(len(padded), 1, 1, 1) < 0.5, padded.flip(3), padded)
        images = ((flipped / 255 - 0.5) / 0.5).to(memory_format=layout)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=10, help="of steps that are timed")
    arguments = parser.parse_args()
    program = make(CASE, sparsity=0.0)
    steps = {
        "JAX": running(program.lower().compile(), program),
        "PyTorch, channels first": torch_step(torch.contiguous_format),
        "PyTorch, channels last": torch_step(torch.channels_last),
    }
    for step in steps.values():
        step()
    times = dict(zip(steps, in_turns(list(steps.values()), arguments.pairs), strict=True))
    rows: list[dict[str, Any]] = [
        {
            "step": name,
            "median, ms": round(1e3 * statistics.median(taken.clock), 1),
            "min, ms": round(1e3 * min(taken.clock), 1),
            "JAX / it": round(ratio(times["JAX"], taken)["median"], 2),
        }
        for name, taken in times.items()
    ]
    print_table(list(rows[0]), [list(row.values()) for row in rows])
    flags = os.environ.get("XLA_FLAGS", "")
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    append_result("pytorch", {"xla_flags": flags, "jax": jax.__version__, **versions, "rows": rows})


if __name__ == "__main__":
    main()
