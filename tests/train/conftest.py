"""What tests share: small data sets in the real formats, a small run, the program as a process."""

import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import simplejpeg

ROOT = pathlib.Path(__file__).parents[2]
FAULT = ROOT / "tests" / "train" / "fault.py"

SMALL = """
import ml_collections

def get_config():
    config = ml_collections.ConfigDict()
    config.data = {"name": "digits", "crop_padding": 1}
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


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """tiny(**changes): the `Config` of a small network on digits, one epoch of 22 steps."""
    from train import config

    values = {
        "data": {"name": "digits"},
        "model": {"name": "resnet8", "widths": [4, 8]},
        "batch_size": 64,
        "epochs": 1.0,
        "learning_rate": 0.1,
        "sparsity": 0.9,
    }
    return lambda **changes: config.parse(values | changes)


@pytest.fixture(scope="module")
def start(
    compilation_cache: pathlib.Path,
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the program as a process of its own: start(*arguments, devices=1, fault=None).

    `fault` is a signal and a step, such as ("SIGKILL", 20) (see fault.py). With
    `start_new_session` it leads a process group of its own, workers included. Processes that tests
    leave running are killed.
    """
    processes = []

    def start_program(
        *arguments: object,
        devices: int = 1,
        fault: tuple[str, int] | None = None,
        start_new_session: bool = False,
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
            start_new_session=start_new_session,
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
def finished_run(
    tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Any]
) -> pathlib.Path:
    """The workdir of a small convolutional network on digits, whose last layer stays dense."""
    from train import main

    workdir = tmp_path_factory.mktemp("runs") / "finished"
    config = tiny(
        data={"name": "digits", "crop_padding": 1},
        epochs=8.0,
        eval_every_epochs=2.0,
        exclude=["head/kernel"],
    )
    main.run(config, workdir, say=lambda line: None)
    return workdir


# The versions that TFDS's builders have; a test that prepares with TFDS itself holds them to it.
VERSIONS = {
    "imagenet2012": "5.1.0",
    "fashion_mnist": "3.0.1",
    "cifar10": "3.0.2",
    "cifar100": "3.0.2",
    "emnist/letters": "3.1.0",
    "oxford_flowers102": "2.1.1",
    "eurosat/rgb": "2.0.0",
}

Example = dict[str, bytes | int]


def _write_records(path: pathlib.Path, examples: Iterable[Example]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for example in examples:
        record = tf_example_pb2.Example()
        for key, value in example.items():
            feature = record.features.feature[key]
            if isinstance(value, bytes):
                feature.bytes_list.value.append(value)
            else:
                feature.int64_list.value.append(value)
        writer.write(record.SerializeToString())
    writer.close()


@pytest.fixture
def write_prepared() -> Callable[..., pathlib.Path]:
    """Writes what TFDS reads as a prepared data set, without TensorFlow: (data_dir, name, splits).

    `splits` maps a split's name to its examples, dicts of bytes and integers.
    """

    def write(data_dir: pathlib.Path, name: str, splits: dict[str, list[Example]]) -> pathlib.Path:
        directory = data_dir / name / VERSIONS[name]
        directory.mkdir(parents=True)
        builder = name.split("/")[0]
        for split, examples in splits.items():
            _write_records(directory / f"{builder}-{split}.array_record-00000-of-00001", examples)
        info = {
            "name": builder,
            "version": VERSIONS[name],
            "fileFormat": "array_record",
            "splits": [
                {
                    "name": split,
                    "shardLengths": [str(len(examples))],
                    "numBytes": "1",
                    "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                }
                for split, examples in splits.items()
            ],
        }
        (directory / "dataset_info.json").write_text(json.dumps(info))
        return directory

    return write


def photograph(number: int, height: int = 90, width: int = 120) -> np.ndarray:
    """A smooth image, uint8 [height, width, 3], different for every number."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:height, :width][..., None] / max(height, width)
    frequency, phase = rng.uniform(1, 6, (2, 3)), rng.uniform(0, 6, (2, 3))
    waves = np.sin(frequency[0] * x + phase[0]) * np.sin(frequency[1] * y + phase[1])
    return np.rint(127.5 + 120 * waves).astype(np.uint8)


def jpeg(image: np.ndarray) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=95)


@pytest.fixture(scope="session")
def jpeg_photographs() -> list[bytes]:
    """JPEGs of several shapes, the kind of files that ImageNet holds."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(60, 200, (30, 2))
    return [jpeg(photograph(i, *size)) for i, size in enumerate(sizes.tolist())]


@pytest.fixture
def small_imagenet(tmp_path, write_prepared, jpeg_photographs) -> pathlib.Path:
    """A data_dir with an imagenet2012 of 22 training and 8 validation photographs."""
    examples = [
        {"image": image, "label": 7 * i, "file_name": f"n{i:08}.JPEG".encode()}
        for i, image in enumerate(jpeg_photographs)
    ]
    splits = {"train": examples[:22], "validation": examples[22:]}
    write_prepared(tmp_path / "data", "imagenet2012", splits)
    return tmp_path / "data"


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="session")
def imagenet_archives(tmp_path_factory, jpeg_photographs) -> pathlib.Path:
    """A manual_dir with ImageNet's two archives in the real format, 22 and 8 photographs.

    The training archive holds one archive a class, the validation archive the files themselves.
    """
    folder = tmp_path_factory.mktemp("archives")
    synsets = ("n01440764", "n01443537", "n15075141")
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as archive:
        for k, synset in enumerate(synsets):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as images:
                for i in range(k, 22, len(synsets)):
                    _add(images, f"{synset}_{i}.JPEG", jpeg_photographs[i])
            _add(archive, f"{synset}.tar", inner.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as archive:
        for i, image in enumerate(jpeg_photographs[22:], start=1):
            _add(archive, f"ILSVRC2012_val_{i:08}.JPEG", image)
    return folder
