"""The exported program, run where there is nothing but JAX, against the network itself."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest

import feather_jax as feather
from train import export, program
from train.store import model_file

RUN = """
import sys
for name in ("feather_jax", "train", "flax", "optax"):
    sys.modules[name] = None  # importing it raises
import jax
import jax.export
import numpy as np
program = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
images = np.load(sys.argv[2])
logits = [program.call(images[:size]) for size in (1, 7, len(images))]
np.savez(sys.argv[3], *logits)
"""


@pytest.fixture(scope="module")
def exported(finished_run, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("exported")
    arguments = ["--model", str(finished_run / "model.npz"), "--out", str(folder)]
    assert program.run(lambda: export.main(arguments)) == 0
    return folder


def test_it_runs_without_this_project(finished_run, exported, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), np.uint8)
    np.save(tmp_path / "images.npy", images)
    paths = (exported / "model.stablehlo", tmp_path / "images.npy", tmp_path / "logits.npz")
    command = [sys.executable, "-I", "-c", RUN, *map(str, paths)]
    subprocess.run(command, check=True, cwd=tmp_path)
    network = model_file.load(finished_run / "model.npz").network
    pixels = (images / np.float32(255) - np.float32(0.305)) / np.float32(0.376)
    variables = feather.load(finished_run / "model.npz")
    expected = np.asarray(network.apply(variables, pixels.astype(np.float32), train=False))
    for logits in np.load(tmp_path / "logits.npz").values():
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected[: len(logits)], rtol=1e-4, atol=1e-5)


def test_the_weights_are_in_it_to_the_bit_and_zeros_stay_zeros(finished_run, exported):
    """Read from the program's text, which has large constants as bytes: dense<"0x...">."""
    text = jax.export.deserialize(
        bytearray((exported / "model.stablehlo").read_bytes())
    ).mlir_module()
    constants = [bytes.fromhex(digits) for digits in re.findall(r'dense<"0x([0-9A-F]+)">', text)]
    params = feather.load(finished_run / "model.npz")["params"]
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.size > 100]
    assert len(kernels) == 4
    assert np.mean(np.concatenate([kernel.ravel() for kernel in kernels]) == 0) > 0.8
    for kernel in kernels:
        assert kernel.tobytes() in constants


def test_the_description_says_what_goes_in_and_what_comes_out(finished_run, exported):
    description = json.loads((exported / "model.json").read_text())
    assert description["input"] == {
        "dtype": "uint8",
        "shape": ["batch", 8, 8, 1],
        "range": [0, 255],
    }
    assert description["output"] == {"dtype": "float32", "shape": ["batch", 10]}
    assert description["platforms"] == ["cpu", "cuda", "tpu"]
    assert description["model"] == feather.load_metadata(finished_run / "model.npz")
    assert description["model"]["classes"] == list("0123456789")


def test_a_file_that_is_no_model_is_one_sentence(tmp_path, capsys):
    (tmp_path / "model.npz").write_text("nothing")
    arguments = ["--model", str(tmp_path / "model.npz"), "--out", str(tmp_path / "out")]
    assert program.run(lambda: export.main(arguments)) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler")
def test_an_object_file_linked_into_a_c_program(finished_run, tmp_path, capsys):
    path, out = finished_run / "model.npz", tmp_path / "out"
    arguments = ["--model", str(path), "--out", str(out), "--format", "object", "--batch", "3"]
    assert program.run(lambda: export.main(arguments)) == 0
    assert str(out / "model.o") in capsys.readouterr().out
    described = json.loads((out / "model.json").read_text())
    assert described["input"]["shape"] == [3, 8, 8, 1]
    assert described["output"]["shape"] == [3, 10]
    (out / "main.c").write_text(
        '#include <stdio.h>\n#include "model.h"\n'
        "int main(void) { static uint8_t x[192]; static float y[30];"
        " if (fread(x, 1, sizeof x, stdin) != sizeof x) return 1;"
        " model(x, y); return fwrite(y, 1, sizeof y, stdout) != sizeof y; }\n"
    )
    subprocess.run(["cc", "main.c", "model.o", "-o", "main"], cwd=out, check=True)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    done = subprocess.run(
        [out / "main"], input=images.tobytes(), stdout=subprocess.PIPE, check=True
    )
    model = model_file.load(path)
    expected = np.asarray(model.logits(model.variables, images))
    logits = np.frombuffer(done.stdout, np.float32).reshape(3, 10)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "aarch64-linux-gnu"], "--format object"),
        (["--format", "object", "--batch", "0"], "--batch is 0"),
        (["--format", "object", "--target", "vax-dec-vms"], "LLVM knows no target 'vax-dec-vms'"),
        (["--format", "onnx"], "onnx"),
    ],
)
def test_bad_options_are_a_sentence(finished_run, tmp_path, capsys, options, message):
    arguments = ["--model", str(finished_run / "model.npz"), "--out", str(tmp_path), *options]
    assert program.run(lambda: export.main(arguments)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
