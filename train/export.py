"""Exports a model file for deployment: python -m train.export --model model.npz --out exported

It writes a program, and `model.json`, which says what goes in and what comes out. The program takes
images as they are decoded, uint8 [batch, height, width, channels], and gives float32 logits [batch,
classes]: the preprocessing and the weights are inside, so that nothing of this project is needed to
run it. As `stablehlo` it is `model.stablehlo`, for any batch, which `jax.export.deserialize` reads;
as `object` it is `model.o` with `model.h`, the sparse network as machine code for a batch that is
given, to be linked into a program of any language (see `feather_jax.cpu.write_object`).
"""

import functools
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from feather_jax import cpu
from train import parallel, program
from train.errors import UserError, writing
from train.models.imported import as_sentence
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

    Raises:
      UserError: it is somebody's own network, and wants to know how large the batch is.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *model.image_shape), jnp.uint8)
    logits = jax.jit(lambda images: model.logits(model.variables, images))
    with as_sentence(f"{model.metadata.model['name']} cannot be exported for a batch of any size"):
        return jax.export.export(logits, platforms=PLATFORMS)(images)


def write_stablehlo(model: SavedModel, folder: pathlib.Path) -> tuple[str, dict[str, Any]]:
    """Writes `model.stablehlo`; what was written in a line, and what `model.json` says of it."""
    exported = export(model)
    path = folder / "model.stablehlo"
    path.write_bytes(exported.serialize())
    platforms = ", ".join(exported.platforms)
    return f"{path}, {path.stat().st_size:,} bytes, for {platforms}", describe(model, exported)


def write_object(
    model: SavedModel,
    folder: pathlib.Path,
    *,
    batch: int = 1,
    target: str | None = None,
    processor: str | None = None,
) -> tuple[str, dict[str, Any]]:
    """Writes `model.o` and `model.h`, and returns what `write_stablehlo` does.

    Args:
      model: a model file.
      folder: where to.
      batch: images of a call.
      target, processor: see `feather_jax.cpu.write_object`, whose `cpu` is the processor.

    Raises:
      UserError: the network cannot be compiled, or for no such target.
    """
    images = jax.ShapeDtypeStruct((batch, *model.image_shape), jnp.uint8)
    logits = functools.partial(model.logits, model.variables)
    path = folder / "model.o"
    try:
        cpu.write_object(logits, images, path=path, target=target, cpu=processor)
    except (NotImplementedError, ValueError) as error:
        raise UserError(f"{model.path} cannot be compiled: {error}") from error
    described = {
        "function": path.stem,
        "input": {"dtype": "uint8", "shape": list(images.shape), "range": [0, 255]},
        "output": {"dtype": "float32", "shape": [batch, model.metadata.num_classes]},
        "target": target,
        "cpu": processor,
        "model": model.metadata.model_dump(mode="json"),
    }
    where = " ".join(filter(None, (target, processor))) or "this machine"
    return f"{path}, {path.stat().st_size:,} bytes, for {where}", described


def describe(model: SavedModel, exported: jax.export.Exported) -> dict[str, Any]:
    """What a user of the program needs to know, plain data."""
    (images,), (logits,) = exported.in_avals, exported.out_avals
    return {
        "input": {
            "dtype": str(images.dtype),
            "shape": [str(images.shape[0]), *images.shape[1:]],
            "range": [0, 255],  # images of another range are the caller's to scale
        },
        "output": {"dtype": str(logits.dtype), "shape": [str(logits.shape[0]), *logits.shape[1:]]},
        "platforms": list(exported.platforms),
        "jax": jax.__version__,
        "calling_convention_version": exported.calling_convention_version,
        "model": model.metadata.model_dump(mode="json"),
    }


def main(argv: Sequence[str]) -> None:
    """Writes the program and its description."""
    parser = program.ArgumentParser("train.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=program.path, required=True, help="a model.npz")
    parser.add_argument("--out", type=program.path, required=True, help="a folder, made if need be")
    parser.add_argument(
        "--format", choices=("stablehlo", "object"), default="stablehlo", help="see above"
    )
    parser.add_argument("--batch", type=int, help="images of a call, of an object; 1 by default")
    parser.add_argument("--target", help="an object's machine, such as aarch64-linux-gnu")
    parser.add_argument("--cpu", help="its processor, such as x86-64-v3, znver4 or cortex-a76")
    parser.add_allow_import()
    arguments = parser.parse_args(argv)
    parallel.devices()
    given = {"batch": arguments.batch, "target": arguments.target, "processor": arguments.cpu}
    options = {name: value for name, value in given.items() if value is not None}
    if options and arguments.format != "object":
        raise UserError("--batch, --target and --cpu are of --format object; a stablehlo has none.")
    if options.get("batch", 1) < 1:
        raise UserError(f"--batch is {arguments.batch}; a call takes at least one image.")
    model = model_file.load(arguments.model, allow_import=arguments.allow_import)
    with writing(arguments.out, "--out"):
        arguments.out.mkdir(parents=True, exist_ok=True)
        if arguments.format == "object":
            line, described = write_object(model, arguments.out, **options)
        else:
            line, described = write_stablehlo(model, arguments.out)
        description = json.dumps(described, indent=2)
        (arguments.out / "model.json").write_text(description + "\n", encoding="utf-8")
    program.say(line)


if __name__ == "__main__":
    sys.exit(program.run(lambda: main(sys.argv[1:])))
