"""Names what pictures show, with a run's sparse network compiled for this CPU.

python examples/classify.py runs/mine/model.npz picture.jpg other.png
"""

import argparse
import functools
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

from feather_jax import cpu
from train import program
from train.data import photographs
from train.errors import UserError
from train.store import model_file

REPETITIONS = 200


def main() -> None:
    """Prints a line for each picture, and how long one takes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=pathlib.Path, help="a model.npz")
    parser.add_argument("pictures", type=pathlib.Path, nargs="+")
    arguments = parser.parse_args()

    model = model_file.load(arguments.model)
    classes, data = model.metadata.classes, model.metadata.data
    center = functools.partial(photographs.center_box, part=data.get("center_crop", 1.0))
    images = np.empty((1, *model.image_shape), np.uint8)

    def logits(images: jax.Array) -> jax.Array:
        return model.logits(model.variables, images)

    compiled = cpu.compile(logits, images)
    for path in arguments.pictures:
        try:
            content = path.read_bytes()
            photographs.crop_and_resize(content, center, images[0], fast=False, upright=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be taken ({error}); give a picture.") from error
        scores = np.exp(compiled(images)[0].astype(np.float64))
        best = int(scores.argmax())
        print(f"{path}: {classes[best]} ({scores[best] / scores.sum():.1%})")
    ours, xla = median_time(compiled, images), median_time(jax.jit(logits), images)
    print(f"{1e6 * ours:.0f} us a picture, {xla / ours:.1f} times as fast as XLA's {1e6 * xla:.0f}")


def median_time(function: Callable[[np.ndarray], object], images: np.ndarray) -> float:
    """Seconds that a call takes."""
    jax.block_until_ready(function(images))
    times = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        jax.block_until_ready(function(images))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(program.run(main))
