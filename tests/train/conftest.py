"""What the tests of whole runs share: a small experiment, and the program as a process."""

import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FAULT = ROOT / "tests" / "train" / "fault.py"

SMALL = """
import ml_collections

def get_config():
    config = ml_collections.ConfigDict()
    config.data = {"name": "digits", "mean": (0.305,), "std": (0.376,), "crop_padding": 1}
    config.model = {"name": "lenet300", "hidden": (16,)}
    config.batch_size = 64
    config.epochs = 2.0
    config.learning_rate = 0.1
    config.sparsity = 0.9
    config.log_every_steps = 4
    config.checkpoint_every_steps = 10
    return config
"""
"""44 steps, checkpoints after 10, 20, 30, 40 and 44, evaluations after 22 and 44."""


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A config file that trains in a second."""
    path = tmp_path_factory.mktemp("configs") / "small.py"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def start(
    compilation_cache: pathlib.Path,
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the program as a process of its own: start(*arguments, devices=1, fault=None).

    `fault` is a signal and a step, such as ("SIGKILL", 20) (see fault.py). Processes that
    tests leave running are killed.
    """
    processes = []

    def start_program(
        *arguments: object,
        devices: int = 1,
        fault: tuple[str, int] | None = None,
        **environment: str,
    ) -> subprocess.Popen[str]:
        program = ["-m", "train.main"] if fault is None else [str(FAULT), fault[0], str(fault[1])]
        inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        process = subprocess.Popen(
            [sys.executable, *program, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=inherited
            | {
                "PYTHONPATH": str(ROOT),
                "JAX_PLATFORMS": "cpu",
                "JAX_COMPILATION_CACHE_DIR": str(compilation_cache),
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            }
            | environment,
        )
        processes.append(process)
        return process

    yield start_program
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def tiny_disk(tmp_path: pathlib.Path) -> Iterator[Callable[[int], pathlib.Path]]:
    """tiny_disk(bytes) mounts a file system of that size, which only root may."""
    mounted = []

    def mount(size: int) -> pathlib.Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no file system can be mounted here: {error}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The workdir of a small convolutional network on digits, whose last layer stays dense."""
    from train import config, loop

    workdir = tmp_path_factory.mktemp("runs") / "finished"
    values = {
        "data": {"name": "digits", "mean": [0.305], "std": [0.376], "crop_padding": 1},
        "model": {"name": "resnet8", "widths": [4, 8]},
        "batch_size": 64,
        "epochs": 8.0,
        "eval_every_epochs": 2.0,
        "learning_rate": 0.1,
        "sparsity": 0.9,
        "exclude": ["head/kernel"],
    }
    loop.run(config.parse(values), workdir, say=lambda line: None)
    return workdir
