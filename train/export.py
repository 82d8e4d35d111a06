"""Exports a model file for deployment: python -m train.export --model model.npz --out exported

It writes `model.stablehlo`, a program that `jax.export.deserialize` reads, and `model.json`, which
says what goes in and what comes out. The program takes images as they are decoded, uint8 [batch,
height, width, channels] with any batch, and gives float32 logits [batch, classes]: the
preprocessing and the weights are inside, so that nothing of this project is needed to run it.
"""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from train import program
from train.errors import writing
from train.store import model_file
from train.store.model_file import SavedModel

PLATFORMS = ("cpu", "cuda", "tpu")


def export(model: SavedModel) -> jax.export.Exported:
    """The network with its preprocessing and weights as one program, for every one of `PLATFORMS`.

    Args:
      model: a model file.

    Returns:
      A function of images, uint8 [batch, height, width, channels], that gives float32 logits
      [batch, classes]. Weights are constants in it, zeros included.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *model.image_shape), jnp.uint8)
    logits = jax.jit(lambda images: model.logits(model.variables, images))
    return jax.export.export(logits, platforms=PLATFORMS)(images)


def describe(model: SavedModel, exported: jax.export.Exported) -> dict[str, Any]:
    """What a user of the program needs to know, plain data."""
    (images,), (logits,) = exported.in_avals, exported.out_avals
    return {
        "input": {"dtype": str(images.dtype), "shape": [str(images.shape[0]), *images.shape[1:]]},
        "output": {"dtype": str(logits.dtype), "shape": [str(logits.shape[0]), *logits.shape[1:]]},
        "platforms": list(exported.platforms),
        "jax": jax.__version__,
        "calling_convention_version": exported.calling_convention_version,
        "model": model.metadata.model_dump(mode="json"),
    }


def main(argv: Sequence[str]) -> None:
    """Writes the program and its description."""
    parser = program.ArgumentParser("train.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, required=True, help="a model.npz")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a folder, made if need be")
    parser.add_allow_import()
    arguments = parser.parse_args(argv)
    model = model_file.load(arguments.model, allow_import=arguments.allow_import)
    exported = export(model)
    with writing(arguments.out):
        arguments.out.mkdir(parents=True, exist_ok=True)
        path = arguments.out / "model.stablehlo"
        path.write_bytes(exported.serialize())
        description = json.dumps(describe(model, exported), indent=2)
        (arguments.out / "model.json").write_text(description + "\n", encoding="utf-8")
    print(f"{path}, {path.stat().st_size:,} bytes, for {', '.join(exported.platforms)}")


if __name__ == "__main__":
    sys.exit(program.run(lambda: main(sys.argv[1:])))
