"""Object files, linked by the machine's C compiler and run."""

import shutil
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, nn

from feather_jax import cpu

rng = np.random.default_rng(0)
STEM, BODY = (
    (rng.standard_normal(shape) * (rng.random(shape) < 0.3)).astype(np.float32)
    for shape in ((3, 3, 3, 16), (3, 3, 16, 16))
)
HEAD = rng.standard_normal((16, 5)).astype(np.float32)
IMAGES = rng.integers(0, 256, (1, 12, 12, 3), np.uint8)

MAIN = """
#include <stdio.h>
#include "network.h"

int main(void) {
  static uint8_t x[12 * 12 * 3];
  static float y[5];
  if (fread(x, 1, sizeof x, stdin) != sizeof x) return 1;
  network(x, y);
  return fwrite(y, 1, sizeof y, stdout) != sizeof y;
}
"""

EXTERNAL = """
#include <stdio.h>
#include <stdlib.h>
#include "network.h"

static void *aligned(size_t size) { return aligned_alloc(64, (size + 63) / 64 * 64); }

int main(void) {
  static uint8_t x[12 * 12 * 3];
  static float y[5];
  void *weights = aligned(NETWORK_WEIGHTS_BYTES), *workspace = aligned(NETWORK_WORKSPACE_BYTES);
  FILE *file = fopen("network.weights", "rb");
  if (fread(weights, 1, NETWORK_WEIGHTS_BYTES, file) != NETWORK_WEIGHTS_BYTES) return 1;
  if (fread(x, 1, sizeof x, stdin) != sizeof x) return 1;
  network(weights, workspace, x, y);
  return fwrite(y, 1, sizeof y, stdout) != sizeof y;
}
"""


def network(images):
    def convolve(x, kernel, stride):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (stride,) * 2, "SAME", dimension_numbers=numbers)

    x = nn.relu(convolve(images.astype(jnp.float32) / 255, STEM, 1))
    x = nn.silu(x + convolve(x, BODY, 1))
    return nn.softmax(x.mean((1, 2)) @ HEAD)


def run(folder, compiler, emulator=(), source=MAIN):
    (folder / "main.c").write_text(source)
    command = [compiler, "-std=c11", "-Wall", "-Werror", "main.c", "network.o", "-o", "main"]
    static = ["-static"] if emulator else []  # so that the emulator needs no C library
    subprocess.run(command + static, cwd=folder, check=True)
    done = subprocess.run(
        [*emulator, "./main"],
        cwd=folder,
        input=IMAGES.tobytes(),
        stdout=subprocess.PIPE,
        check=True,
    )
    return np.frombuffer(done.stdout, np.float32)[None]


def check(result):
    np.testing.assert_allclose(result, network(IMAGES), atol=1e-6)


needs_cc = pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler")


@needs_cc
@pytest.mark.parametrize("target", [None, "x86-64", "x86-64-v3"])
def test_this_machine(tmp_path, target):
    cpu.write_object(network, IMAGES, path=tmp_path / "network.o", cpu=target)
    check(run(tmp_path, "cc"))


@needs_cc
def test_memory_of_the_caller(tmp_path):
    cpu.write_object(network, IMAGES, path=tmp_path / "network.o", external=True)
    assert (tmp_path / "network.o").stat().st_size < 100_000
    check(run(tmp_path, "cc", source=EXTERNAL))


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-gcc") and shutil.which("qemu-aarch64")),
    reason="there is no compiler or no emulator for AArch64",
)
@pytest.mark.parametrize("external", [False, True])
def test_aarch64(tmp_path, external):
    path, target = tmp_path / "network.o", "aarch64-linux-gnu"
    cpu.write_object(network, IMAGES, path=path, target=target, external=external)
    source = EXTERNAL if external else MAIN
    check(run(tmp_path, "aarch64-linux-gnu-gcc", ["qemu-aarch64"], source))


@needs_cc
def test_several_arguments_and_results_in_cplusplus(tmp_path):
    def fn(tree, flags):
        return jnp.where(flags, tree["a"] + tree["b"], 0), tree["b"].argmax(-1)

    examples = (
        {"a": np.ones((2, 3), np.float32), "b": np.ones((2, 3), np.float32)},
        np.ones(3, bool),
    )
    cpu.write_object(fn, *examples, path=tmp_path / "anything.obj", name="my_function")
    header = (tmp_path / "anything.h").read_text()
    assert "const float x0[6], const float x1[6], const uint8_t x2[3]" in header
    assert "float y0[6], int32_t y1[2]);" in header
    (tmp_path / "user.cc").write_text('#include "anything.h"\nvoid *f = (void *)&my_function;\n')
    if shutil.which("c++"):
        subprocess.run(["c++", "-c", "user.cc"], cwd=tmp_path, check=True)
    symbols = subprocess.run(
        ["nm", "--defined-only", "--extern-only", "anything.obj"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert symbols.stdout.split()[2:] == ["my_function"]


@pytest.mark.parametrize(
    "target",
    [
        *("riscv64-linux-gnu", "wasm32-unknown-unknown", "arm64-apple-macosx"),
        *("x86_64-pc-windows-msvc", "thumbv7em-none-eabihf", "i386-linux-gnu"),
    ],
)
def test_other_targets_are_emitted(tmp_path, target):
    cpu.write_object(network, IMAGES, path=tmp_path / "network.o", target=target)
    assert (tmp_path / "network.o").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "vax-dec-vms"}, "vax-dec-vms"),
        ({"target": "aarch64_be-linux-gnu"}, "little-endian.*'aarch64_be-linux-gnu' is none"),
        ({"target": "avr-none"}, "32 or 64 bits, and 'avr-none' is none"),
        ({"target": "x86_64-linux-gnu", "cpu": "pentium-99"}, "pentium-99"),
        ({"name": "my-model"}, "'my-model' cannot be the name of a C function"),
        ({"name": "größe"}, "'größe' cannot be"),
    ],
)
def test_bad_input(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        cpu.write_object(network, IMAGES, path=tmp_path / "network.o", **options)
    assert not list(tmp_path.iterdir())
