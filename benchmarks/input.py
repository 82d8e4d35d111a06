"""What the input pipelines deliver on one core: python -m benchmarks.input

In memory: batches of 128 gathered from 50,000 images of 32x32. ImageNet: 500x375 JPEGs of quality
90, cut from scikit-learn's two photographs, prepared by TFDS's own builder and read, decoded,
cropped, flipped and put into batches; the same files read from a folder; and tf.data doing the same
as we with tf.image.decode_and_crop_jpeg. They take turns in one process, which keeps to one core
with all of its threads and workers, and the time is the processor's, so that figures are per core
whatever else runs. The ImageNet part needs TensorFlow (`pip install '.[prepare]'`).
"""

import argparse
import importlib.util
import io
import multiprocessing
import os
import pathlib
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.common import append_result, keep_to_one_core, print_table
from train import data
from train.data import memory, photographs
from train.data.order import Order
from train.prepare import ARCHIVES, prepare

SIZE = 224
BATCH = 64
TURN = 4_096  # images that a pipeline makes in its turn, at least
CROPS = {"random_resized_crop": 0.08, "flip": True, "image_size": SIZE}
GPU = 3_000  # images a second that a GPU takes


def main() -> None:
    """Measures, prints the tables and appends them to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="turns that each pipeline takes")
    parser.add_argument("--photographs", type=int, default=512, help="to generate")
    arguments = parser.parse_args()
    keep_to_one_core()

    record: dict[str, Any] = {"in_memory_images_per_second": in_memory(arguments.rounds)}
    print_table(
        ["in memory, 32x32", "images/s"], [["gather", record["in_memory_images_per_second"]]]
    )

    files = generate(arguments.photographs)
    record["jpeg_bytes"] = round(statistics.mean(map(len, files)))
    record["decoders_images_per_second"] = rates = decoders(files, arguments.rounds)
    print_table([f"decode, crop, resize to {SIZE}", "images/s"], list(rates.items()))

    if importlib.util.find_spec("tensorflow") is None:
        print("The ImageNet pipelines need TensorFlow: pip install '.[prepare]'")
    else:
        record |= pipelines(files, arguments.rounds)
    append_result("input", record)


def in_memory(rounds: int) -> int:
    """Images a second, the median over `rounds` of 400 batches of 128."""
    images = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), np.uint8)
    labels = np.zeros(len(images), np.int32)
    arrays = memory.Arrays(images, labels, images[:1], labels[:1])
    batches = memory.Reader(arrays, Order(len(images), 128), Order(1, 128)).train_batches(0)
    return round(statistics.median(measure(batches, 400 * 128) for _ in range(rounds)))


def generate(count: int) -> list[bytes]:
    """JPEGs of 500x375, windows of two photographs at their own scale, some mirrored.

    Each has its own brightness by channel, so that no two are alike; nothing is scaled, as that
    would take away the detail that makes a photograph slow to decode.
    """
    rng = np.random.default_rng(0)
    originals: list[Any] = load_sample_images().images
    files = []
    for i in range(count):
        original = originals[i % len(originals)]
        top, left = (
            rng.integers(0, n - m + 1) for n, m in zip(original.shape, (375, 500), strict=False)
        )
        window = original[top : top + 375, left : left + 500]
        window = window[:, :: rng.choice([-1, 1])] * rng.uniform(0.85, 1.1, 3)
        pixels = np.ascontiguousarray(window.clip(0, 255).round().astype(np.uint8))
        files.append(simplejpeg.encode_jpeg(pixels, quality=90, colorsubsampling="420"))
    return files


def decoders(files: list[bytes], rounds: int) -> dict[str, int]:
    """Images a second from a JPEG to a random resized crop, by decoder."""

    def chosen(encoded: bytes, box: photographs.Box) -> np.ndarray:
        out = np.empty((SIZE, SIZE, 3), np.uint8)
        photographs.crop_and_resize(encoded, lambda height, width: box, out, fast=True)
        return out

    def opencv(encoded: bytes, box: photographs.Box) -> np.ndarray:
        image: Any = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
        part = image[box.top : box.top + box.height, box.left : box.left + box.width]
        return cv2.cvtColor(cv2.resize(part, (SIZE, SIZE)), cv2.COLOR_BGR2RGB)

    def pillow(encoded: bytes, box: photographs.Box) -> np.ndarray:
        edges = (box.left, box.top, box.left + box.width, box.top + box.height)
        image = Image.open(io.BytesIO(encoded))
        return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=edges))

    boxes = [photographs.random_box(375, 500, u) for u in photographs.uniforms(0, 0, 0, len(files))]
    decode = {"simplejpeg and OpenCV": chosen, "OpenCV": opencv, "Pillow": pillow}
    rates: dict[str, list[int]] = {name: [] for name in decode}
    for _ in range(rounds):
        for name, function in decode.items():
            images = map(function, files, boxes)
            rates[name].append(measure(({"label": [0]} for _ in images), len(files)))
    return {name: round(statistics.median(values)) for name, values in rates.items()}


def pipelines(files: list[bytes], rounds: int) -> dict[str, Any]:
    """Whole pipelines taking turns: images a CPU-second of each, ratios turn by turn."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        write_archives(root, files)
        prepare("imagenet2012", str(root / "array_record"), folder)
        iterators = {
            "ours, a worker": ours(root, workers=1),
            "ours, threads": ours(root, workers=0),
            "a folder, a worker": from_folder(root, files, workers=1),
            "a folder, threads": from_folder(root, files, workers=0),
            "tf.data, bilinear": tf_data(root, "bilinear"),
            "tf.data, bicubic": tf_data(root, "bicubic"),
        }
        rates: dict[str, list[int]] = {name: [] for name in iterators}
        for iterator in iterators.values():
            measure(iterator, len(files))
        for _ in range(rounds):
            for name, iterator in iterators.items():
                rates[name].append(measure(iterator, TURN))
    first = rates["ours, a worker"]
    rows = []
    for name, values in rates.items():
        ratios = [a / b for a, b in zip(first, values, strict=True)]
        rate = statistics.median(values)
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append([name, rate, round(statistics.median(ratios), 2), spread, round(GPU / rate, 1)])
    headers = ["ImageNet, one core", "images/s", "a worker's ratio to it", "range"]
    print_table([*headers, f"cores for {GPU:,}/s"], rows)
    return {"imagenet_images_per_second": rates, "worker_ratio": {row[0]: row[2] for row in rows}}


def write_archives(folder: pathlib.Path, files: list[bytes]) -> None:
    """ImageNet's archives, all photographs of one class, and one for validation."""

    def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))

    images = io.BytesIO()
    with tarfile.open(fileobj=images, mode="w") as archive:
        for i, content in enumerate(files):
            add(archive, f"n01440764_{i}.JPEG", content)
    train, validation = ARCHIVES
    with tarfile.open(folder / train, "w") as archive:
        add(archive, "n01440764.tar", images.getvalue())
    with tarfile.open(folder / validation, "w") as archive:
        add(archive, "ILSVRC2012_val_00000001.JPEG", files[0])


def ours(root: pathlib.Path, workers: int) -> Iterator[Any]:
    """The training batches of `train.data`."""
    spec = {"name": "imagenet2012", "data_dir": str(root / "array_record"), "workers": workers}
    return data.load(spec | CROPS, batch_size=BATCH, seed=0).train_batches(0)


def from_folder(root: pathlib.Path, files: list[bytes], workers: int) -> Iterator[Any]:
    """The same from a folder of the files, of two classes."""
    for i, content in enumerate(files):
        path = root / "folder" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    spec = {"name": "folder", "path": str(root / "folder"), "workers": workers}
    return data.load(spec | CROPS, batch_size=BATCH, seed=0).train_batches(0)


def tf_data(root: pathlib.Path, method: str) -> Iterator[Any]:
    """The same in tf.data, as ImageNet pipelines for TPUs do it, from TFDS's TFRecords.

    It has one thread to itself, as more would cost it time per image.
    """
    import tensorflow as tf
    import tensorflow_datasets as tfds

    def example(record: Any) -> Any:
        shape = tf.image.extract_jpeg_shape(record["image"])
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            shape,
            tf.zeros((1, 0, 4)),
            area_range=(0.08, 1),
            aspect_ratio_range=(3 / 4, 4 / 3),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([begin[:2], size[:2]], axis=0)
        image = tf.image.decode_and_crop_jpeg(record["image"], window, channels=3)
        image = tf.image.resize(image, (SIZE, SIZE), method)
        image = tf.image.random_flip_left_right(image)
        return {"image": tf.saturate_cast(image, tf.uint8), "label": record["label"]}

    builder = tfds.builder("imagenet2012", data_dir=root / "tfrecord", file_format="tfrecord")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=root, try_download_gcs=False)
    )
    records = builder.as_dataset("train", decoders={"image": tfds.decode.SkipDecoding()})
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    batches = records.repeat().map(example, num_parallel_calls=1).batch(BATCH).prefetch(1)
    return iter(batches.with_options(options).as_numpy_iterator())


def measure(batches: Iterator[Any], images: int) -> int:
    """Takes that many images; how many a second of the processor's time.

    What is made ahead for the next turn is waited for, as it was there at the beginning of this.
    """
    taken, start = 0, cpu_seconds()
    while taken < images:
        taken += len(next(batches)["label"])
    before, now = start, cpu_seconds()
    while now - before > 0.02:
        time.sleep(0.5)
        before, now = now, cpu_seconds()
    return round(taken / (now - start))


def cpu_seconds() -> float:
    """The processor's time so far of this process and its workers, all threads of them."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = pathlib.Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime and stime of proc(5)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
