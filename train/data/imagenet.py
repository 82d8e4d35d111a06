"""ImageNet: JPEGs read, decoded and cropped by Grain's workers or threads."""

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing import resource_tracker

import cv2
import grain
import numpy as np
from absl import flags
from grain.multiprocessing import SharedMemoryArray
from jaxtyping import Int32, UInt8

from train.data import augment, photographs
from train.data.dataset import Batch, DataSet
from train.data.order import Order
from train.data.photographs import Box
from train.data.prepared import Prepared, Records, one_line
from train.data.spec import KNOWN, Photographs
from train.errors import UserError

_MAX_THREADS = 16

# A terminal and Slurm send these to every process of a job; what to do is the parent's to decide.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def data_set(
    spec: Photographs, prepared: Prepared, train_order: Order, eval_order: Order
) -> DataSet:
    """Batches of ImageNet's photographs, cropped to squares, in the given orders.

    Training takes a random resized crop and flips it, evaluation the central crop. Both happen
    here, on the host; normalisation is left to the device.
    """
    train = functools.partial(_train_batch, prepared.train, train_order, spec)
    evaluation = functools.partial(_eval_batch, prepared.evaluation, eval_order, spec)
    return DataSet(
        name=spec.name,
        image_shape=(spec.image_size, spec.image_size, 3),
        num_classes=KNOWN[spec.name].num_classes,
        num_train=len(prepared.train),
        num_eval=len(prepared.evaluation),
        train_batches=lambda step: _batches(train, step, sys.maxsize, spec.workers),
        eval_batches=lambda: _batches(evaluation, 0, eval_order.eval_steps, spec.workers),
        train_preprocess=functools.partial(
            augment.augment_and_normalize,
            mean=spec.mean,
            std=spec.std,
            augmentation=augment.Augmentation(),
        ),
        eval_preprocess=functools.partial(augment.normalize, mean=spec.mean, std=spec.std),
        classes=prepared.classes,
    )


def _batches(
    make: Callable[[int], Batch], start: int, stop: int, workers: int
) -> Generator[Batch, None, None]:
    """make(start), ..., make(stop - 1), made ahead by worker processes, or by threads without them.

    Workers make whole batches, so that each sends one array and their number changes nothing.
    """
    flags.FLAGS.mark_as_parsed()  # Grain reads its own there; the program keeps none in them
    threads = 1 if workers else min(_cores(), _MAX_THREADS)
    if workers and sys.platform == "linux":
        make = functools.partial(_shared, make)
    batches = iter(
        grain.MapDataset.range(start, stop)
        .map(make)
        .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
        .mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), _begin_worker)
    )
    try:
        with _held_back() if workers else contextlib.nullcontext():
            first = next(batches, None)  # which starts the workers
        if first is not None:
            yield first
        yield from batches
    finally:
        batches.close()


def _cores() -> int:
    """How many this process may use, which a job's scheduler often restricts."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _shared(make: Callable[[int], Batch], step: int) -> Batch:
    """The batch of a step, its arrays in memory that Grain shares with the parent process.

    Grain would do that itself, by copying into the mapped memory: with a page fault every 4 KiB,
    that takes three times as long as writing to the file behind it, and where the memory is used
    up, the kernel kills the process.
    """
    batch, shared = make(step), {}
    try:
        for name, array in batch.items():
            shared[name] = SharedMemoryArray(array.shape, array.dtype)
            with open(f"/dev/shm/{shared[name].shm.name}", "r+b") as file:
                file.write(array)
    except OSError as error:
        for array in shared.values():
            array.unlink_on_del()
        raise UserError(
            f"A batch can't be shared with the training process ({one_line(error)}); give /dev/shm "
            "more room (docker run --shm-size) or decode in threads (--config.data.workers=0)."
        ) from error
    return shared


def _begin_worker(index: int, count: int) -> None:
    """Ties a worker process to its parent: it outlives signals to all, and not the parent."""
    for signum in _SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Processes that are started here hold `_SIGNALS` back, till `_begin_worker` ignores them.

    Starting takes seconds. In this process, the other threads take the signals meanwhile.
    """
    resource_tracker.ensure_running()  # Python 3.11 would let them through again when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _train_batch(records: Records, order: Order, spec: Photographs, step: int) -> Batch:
    positions, examples = order.positions(), order.train_examples(step)
    u = photographs.uniforms(order.seed, step, int(positions[0]), len(positions))
    boxes = [functools.partial(photographs.random_box, u=row) for row in u]
    images, labels = _decode(records, examples, boxes, spec.image_size, fast=True)
    if spec.flip:
        for i in np.flatnonzero(u[:, -1] < 0.5):
            cv2.flip(images[i], 1, dst=images[i])
    return {"image": images, "label": labels, "index": positions}


def _eval_batch(records: Records, order: Order, spec: Photographs, batch: int) -> Batch:
    examples, mask = order.eval_examples(batch)
    boxes = [photographs.center_box] * len(examples)
    images, labels = _decode(records, examples, boxes, spec.image_size, fast=False)
    return {"image": images, "label": labels, "mask": mask}


def _decode(
    records: Records,
    examples: Int32[np.ndarray, " b"],
    boxes: Sequence[Callable[[int, int], Box]],
    size: int,
    *,
    fast: bool,
) -> tuple[UInt8[np.ndarray, "b s s 3"], Int32[np.ndarray, " b"]]:
    images = np.empty((len(examples), size, size, 3), np.uint8)
    labels = np.empty(len(examples), np.int32)
    for i, (number, box) in enumerate(zip(examples, boxes, strict=True)):
        record = records[number]
        try:
            photographs.crop_and_resize(record["image"], box, images[i], fast=fast)
        except ValueError as error:
            raise records.error(number, f"is damaged ({error})") from error
        labels[i] = record["label"]
    return images, labels
