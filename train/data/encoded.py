"""Encoded pictures, read, decoded and cropped by Grain's workers or threads."""

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import pathlib
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from typing import Any, Protocol

import cv2
import grain
import numpy as np
from absl import flags
from grain.multiprocessing import SharedMemoryArray
from jaxtyping import Int32, UInt8

from train.data import photographs
from train.data.dataset import Batch
from train.data.order import Order
from train.data.photographs import Box
from train.data.spec import Folder, Photographs
from train.errors import UserError, one_line

ChooseBox = Callable[[int, int], Box]

_MAX_THREADS = 16

# A terminal and Slurm send these to every process of a job; what to do is the parent's to decide.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Source(Protocol):
    """One split of encoded pictures. It may be sent to other processes."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Mapping[str, Any]:
        """`image`, encoded bytes, and `label`, or a UserError if it can't be read."""

    def error(self, number: int, complaint: str) -> UserError:
        """What to raise about a picture."""

    def name(self, number: int) -> str:
        """What people call it."""


@dataclasses.dataclass(frozen=True)
class Pictures:
    """A whole data set, its pictures left encoded.

    Attributes:
      train: the pictures to train on.
      evaluation: the pictures to evaluate on.
      classes: the names of the classes.
      channels: 3 for RGB, 1 for grey.
    """

    train: Source
    evaluation: Source
    classes: tuple[str, ...]
    channels: int

    @property
    def num_train(self) -> int:
        """Training examples."""
        return len(self.train)

    @property
    def num_eval(self) -> int:
        """Evaluation examples."""
        return len(self.evaluation)


@dataclasses.dataclass(frozen=True)
class Reader:
    """Batches of pictures, cropped to squares, in the given orders."""

    spec: Photographs
    pictures: Pictures
    train_order: Order
    eval_order: Order

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.spec.image_size, self.spec.image_size, self.pictures.channels

    def train_batches(self, step: int) -> Generator[Batch, None, None]:
        """As `DataSet.train_batches`; a random resized crop and a flip happen here, on the host."""
        return _batches(self._train_batch, step, sys.maxsize, self.spec.workers)

    def eval_batches(self) -> Generator[Batch, None, None]:
        """As `DataSet.eval_batches`: the central crop."""
        return _batches(self._eval_batch, 0, self.eval_order.eval_steps, self.spec.workers)

    def train_image(self, number: int) -> UInt8[np.ndarray, "s s c"]:
        """A training picture as evaluation would have it."""
        return self._image(self.pictures.train, number)

    def eval_image(self, number: int) -> UInt8[np.ndarray, "s s c"]:
        """An evaluation picture."""
        return self._image(self.pictures.evaluation, number)

    def eval_name(self, number: int) -> str:
        """What people call an evaluation picture."""
        return self.pictures.evaluation.name(number)

    def _train_batch(self, step: int) -> Batch:
        positions = self.train_order.positions()
        u = photographs.uniforms(self.train_order.seed, step, int(positions[0]), len(positions))
        boxes = [self._center] * len(positions)
        if least_area := self.spec.random_resized_crop:
            boxes = [
                functools.partial(photographs.random_box, u=row, least_area=least_area) for row in u
            ]
        images, labels = self._empty(len(positions))
        for i, number in enumerate(self.train_order.train_examples(step).tolist()):
            labels[i] = self._decode_or_next(number, boxes[i], images[i])
        if self.spec.flip:
            for i in np.flatnonzero(u[:, -1] < 0.5).tolist():
                images[i] = cv2.flip(images[i], 1).reshape(self.image_shape)
        return {"image": images, "label": labels, "index": positions}

    def _eval_batch(self, batch: int) -> Batch:
        examples, mask = self.eval_order.eval_examples(batch)
        images, labels = self._empty(len(examples))
        for i, number in enumerate(examples.tolist()):
            try:
                labels[i] = self._decode(self.pictures.evaluation, number, self._center, images[i])
            except UserError:
                if not self._skips_damaged:
                    raise
                images[i], mask[i] = 0, False
        return {"image": images, "label": labels, "mask": mask}

    def _decode_or_next(self, number: int, choose: ChooseBox, out: np.ndarray) -> int:
        """`_decode`, of the next whole picture where damaged ones are passed over."""
        count = len(self.pictures.train)
        for _ in range(count - 1 if self._skips_damaged else 0):
            try:
                return self._decode(self.pictures.train, number, choose, out, fast=True)
            except UserError:
                number = (number + 1) % count
        return self._decode(self.pictures.train, number, choose, out, fast=True)

    def _decode(
        self, source: Source, number: int, choose: ChooseBox, out: np.ndarray, fast: bool = False
    ) -> int:
        """Writes a part of a picture to `out`; its label."""
        record = source[number]
        try:
            photographs.crop_and_resize(
                record["image"], choose, out, fast=fast, upright=isinstance(self.spec, Folder)
            )
        except ValueError as error:
            raise source.error(number, f"is damaged ({error})") from error
        return record["label"]

    def _image(self, source: Source, number: int) -> UInt8[np.ndarray, "s s c"]:
        image = np.zeros(self.image_shape, np.uint8)
        self._decode(source, number, self._center, image)
        return image

    def _center(self, height: int, width: int) -> Box:
        return photographs.center_box(height, width, self.spec.center_crop)

    def _empty(self, count: int) -> tuple[UInt8[np.ndarray, "b s s c"], Int32[np.ndarray, " b"]]:
        return np.empty((count, *self.image_shape), np.uint8), np.zeros(count, np.int32)

    @property
    def _skips_damaged(self) -> bool:
        return isinstance(self.spec, Folder) and self.spec.skip_damaged


def _batches(
    make: Callable[[int], Batch], start: int, stop: int, workers: int
) -> Generator[Batch, None, None]:
    """make(start), ..., make(stop - 1), made ahead by worker processes, or by threads without them.

    Workers make whole batches, so that each sends one array and their number changes nothing.
    """
    flags.FLAGS.mark_as_parsed()  # Grain reads its own there; the program keeps none in them
    threads = 1 if workers else min(_cores(), _MAX_THREADS)
    prefix = f"feather_{os.getpid()}_{secrets.token_hex(4)}_"
    if workers and sys.platform == "linux":
        make = functools.partial(_shared, make, prefix)
    batches = iter(
        grain.MapDataset.range(start, stop)
        .map(make)
        .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
        .mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), _begin_worker)
    )
    taken = start
    try:
        with _held_back() if workers else contextlib.nullcontext():
            first = next(batches, None)  # which starts the workers
        if first is not None:
            taken += 1
            yield first
        for batch in batches:
            taken += 1
            yield batch
    finally:
        batches.close()
        _free(prefix, taken)


def _cores() -> int:
    """How many this process may use, which a job's scheduler often restricts."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _shared(make: Callable[[int], Batch], prefix: str, step: int) -> Batch:
    """The batch of a step, its arrays in memory that Grain shares with the parent process.

    Grain would do that itself, by copying into the mapped memory: with a page fault every 4 KiB,
    that takes three times as long as writing to the file behind it, and where the memory is used
    up, the kernel kills the process.
    """
    batch, shared = make(step), {}
    try:
        for name, array in batch.items():
            memory = SharedMemory(f"{prefix}{step}_{name}", create=True, size=array.nbytes)
            shared[name] = SharedMemoryArray.from_shared_memory(memory, array.shape, array.dtype)
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


def _free(prefix: str, step: int) -> None:
    """Frees the batches from `step` on, which workers made ahead and nobody took.

    Grain leaves them to the end of the process, which warns of leaked objects then.
    """
    for path in pathlib.Path("/dev/shm").glob(f"{prefix}*"):
        if int(path.name.removeprefix(prefix).partition("_")[0]) >= step:
            memory = SharedMemory(path.name)
            memory.close()
            memory.unlink()


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
