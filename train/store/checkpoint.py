"""The saved states of a run: Orbax, with a digest of every leaf that Orbax does not check."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

import feather_jax as feather
from train import parallel
from train.errors import StorageError, UserError, writing
from train.store.leaves import matched

ARRAYS = ("variables", "optimizer")
"""A checkpoint's items of arrays: the dense weights with the running statistics, and the rest."""

_STEP = "optimizer/step"
_DIGEST = "digest"
_UNFINISHED = ".orbax-checkpoint-tmp"


class Checkpoints:
    """Where a run saves its states.

    A checkpoint has the items of `ARRAYS`, and `info`, which is JSON: the digests of the arrays,
    what the caller adds, and a digest of all that. Saving is asynchronous: what goes wrong shows at
    the next call.

    Args:
      directory: the folder; made if need be. What an unfinished save left there is removed.
      keep: how many of the newest are kept.

    Raises:
      StorageError: the folder cannot be written.
    """

    def __init__(self, directory: pathlib.Path, keep: int):
        self._directory, self._keep = directory.resolve(), keep
        self._saving: int | None = None
        self._open()

    def _open(self) -> None:
        with writing(self._directory):
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=self._keep,
                    enable_async_checkpointing=True,
                    cleanup_tmp_directories=True,
                ),
            )

    def save(self, items: Mapping[str, PyTree], info: dict[str, Any]) -> None:
        """Begins to save a state under its step, once the one before is on disk.

        Args:
          items: pytrees by the names of `ARRAYS`; `optimizer` holds `step`.
          info: what JSON can hold.

        Raises:
          StorageError: this one, or the one before, could not be written. Those that were whole
            still are, and the next call tries again.
          UserError: the state holds NaN or infinity, or Orbax refused to save it.
        """
        # A copy: on CPU, device_get gives a view of what the next step overwrites.
        items = jax.tree.map(np.array, jax.device_get(dict(items)))
        leaves = feather.named_leaves(items)
        check_finite(leaves)
        step = int(leaves[_STEP])
        info = info | {"digests": digests(leaves)}
        arguments = ocp.args.Composite(
            info=ocp.args.JsonSave(info | {_DIGEST: info_digest(info)}),
            **{name: ocp.args.StandardSave(item) for name, item in items.items()},
        )
        self.wait()
        self._saving = step
        if not self._written(lambda: self._manager.save(step, args=arguments)):
            raise UserError(
                f"The checkpoint of step {step} was refused: {self._directory} holds a later one, "
                "which another run must have written; give each run its own --workdir."
            )

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    def save_now(self, items: Mapping[str, PyTree], info: dict[str, Any]) -> None:
        """Saves a state and waits for it, where need be in the place of all older ones.

        Raises:
          StorageError: it cannot be written, or would not fit even so, and then none is removed.
          UserError: as `save`.
        """

        def write() -> None:
            self.save(items, info)
            self.wait()

        self.make_room_for(write, least=0 if self._room_for(items) else len(self._steps()))

    def make_room_for(self, write: Callable[[], None], least: int = 1) -> None:
        """Writes; where there is no room, the oldest checkpoints make it, but the `least` newest.

        With several processes none is removed.

        Raises:
          StorageError: it cannot be written even so.
        """
        while True:
            try:
                return write()
            except StorageError:
                steps = self._steps()
                if jax.process_count() > 1 or len(steps) <= least:
                    raise
                with writing(self._directory):
                    shutil.rmtree(self._directory / str(steps[0]))
                self._open()

    def _steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def _room_for(self, items: Mapping[str, PyTree]) -> bool:
        """Whether a state would fit if all checkpoints made room for it."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(dict(items)))
        with writing(self._directory):
            files = [path for path in self._directory.rglob("*") if path.is_file()]
            there = sum(path.stat().st_size for path in files)
            return shutil.disk_usage(self._directory).free + there > 1.1 * needed

    def wait(self) -> None:
        """Waits until what was saved is on disk.

        Raises:
          StorageError: it could not be written.
        """
        self._written(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits until what was saved is on disk, and ends Orbax's threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _written(self, action: Callable[[], Any]) -> Any:
        """`action()`, and where it fails a manager that knows nothing of the failed save."""
        try:
            return action()
        except (OSError, ValueError) as error:  # TensorStore's are ValueErrors
            if jax.process_count() == 1:
                self._open()
            raise StorageError(
                f"The checkpoint of step {self._saving} could not be written to "
                f"{self._directory} ({_reason(error)}); make room there."
            ) from error


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read.

    Attributes:
      leaves: its arrays by name, `variables/params/head/kernel` for one, in host memory.
      info: what it was saved with.
      passed_over: newer ones that are damaged, a step and a reason each.
    """

    leaves: dict[str, np.ndarray]
    info: dict[str, Any]
    passed_over: dict[int, str]


def newest(directory: pathlib.Path, items: Sequence[str] = ARRAYS) -> Restored | None:
    """The newest checkpoint that is whole, on all processes; None if nothing was saved.

    Nothing is written, and nothing that a file names is imported or unpickled.

    Args:
      directory: the folder of checkpoints.
      items: which of `ARRAYS` are read.

    Raises:
      UserError: there are checkpoints, and none is whole; or the folder cannot be read.
    """
    directory = directory.resolve()  # Orbax wants absolute paths
    steps = [int(path.name) for path in _listed(directory) if path.name.isdecimal()]
    passed_over: dict[int, str] = {}
    while True:
        remaining = [step for step in steps if step not in passed_over]
        step = parallel.gather(max(remaining, default=-1))[0]
        if step < 0:
            break
        found: tuple[dict[str, np.ndarray], dict[str, Any]] | None = None
        reason = "another process cannot read it"
        try:
            found = read(directory / str(step), items)
        except Damaged as damage:
            reason = str(damage)
        if all(parallel.gather(found is not None)) and found is not None:
            return Restored(*found, passed_over)
        passed_over[step] = reason
    if not passed_over:
        return None
    step, reason = next(iter(passed_over.items()))
    raise UserError(
        f"No checkpoint in {directory} is whole (the newest, of step {step}: {reason}); nothing "
        "was changed: bring back a copy, or give a new --workdir."
    )


def restore(
    directory: pathlib.Path, like: Mapping[str, PyTree]
) -> tuple[dict[str, PyTree], Restored] | None:
    """The items of the newest checkpoint that is whole; None if nothing was saved.

    Args:
      directory: the folder of checkpoints.
      like: items of the structure, shapes and dtypes that are wanted.

    Returns:
      The items, in host memory, and the checkpoint.

    Raises:
      UserError: none is whole, or it is another model's.
    """
    found = newest(directory)
    if found is None:
        return None
    where = f"The newest checkpoint in {directory} is another model's: it"
    return matched(found.leaves, dict(like), where, "give a new --workdir"), found


class Damaged(Exception):
    """A checkpoint is not what was saved, and why."""


def read(
    checkpoint: pathlib.Path, items: Sequence[str] = ARRAYS
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of one checkpoint by name, and its info; on one process, without the others.

    Raises:
      Damaged: it is not whole, or not what was saved.
    """
    for item in ("info", *items):
        try:
            present = (checkpoint / item).is_dir()
        except OSError as error:
            raise Damaged(f"it cannot be read: {_reason(error)}") from error
        if not present:
            raise Damaged(f"it has no {item}")
    leaves: dict[str, np.ndarray] = {}
    try:
        info = ocp.JsonCheckpointHandler().restore(checkpoint / "info")
        if info.pop(_DIGEST) != info_digest(info):
            raise Damaged("its info is not what was saved, by its CRC-32")
        saved = {name: int(digest) for name, digest in info["digests"].items()}
        for item in items:
            leaves |= feather.named_leaves({item: read_arrays(checkpoint / item)})
    except Damaged:
        raise
    except Exception as error:  # of many types: damage meets Orbax, TensorStore, JSON and us
        raise Damaged(f"it cannot be read: {_reason(error)}") from error
    found = digests(leaves)
    for name in saved | found:
        if name.split("/")[0] in items and saved.get(name) != found.get(name):
            raise Damaged(f"{name} is not what was saved, by its CRC-32")
    if str(leaves.get(_STEP, checkpoint.name)) != checkpoint.name:
        raise Damaged(f"it is of step {leaves[_STEP]}")
    return leaves, info


def read_arrays(item: pathlib.Path) -> PyTree[np.ndarray]:
    """Nested dicts and lists, read by Orbax's handler without a barrier between processes."""
    handler = ocp.PyTreeCheckpointHandler()
    structure = handler.metadata(item).tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), structure)
    return handler.restore(item, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def unfinished(directory: pathlib.Path) -> list[str]:
    """The names of saves that were not finished."""
    return [path.name for path in _listed(directory) if _UNFINISHED in path.name]


def set_aside(directory: pathlib.Path, steps: Sequence[int]) -> pathlib.Path:
    """Moves checkpoints out of the way of new ones; returns the folder to which.

    Raises:
      StorageError: they cannot be moved.
    """
    aside = directory.with_name(f"{directory.name}.damaged")
    with writing(aside):
        aside.mkdir(exist_ok=True)
        for step in steps:
            names = (f"{step}.{number}" if number else f"{step}" for number in range(10**6))
            free = next(aside / name for name in names if not (aside / name).exists())
            (directory / str(step)).rename(free)
    return aside


def digests(leaves: dict[str, np.ndarray]) -> dict[str, int]:
    """A CRC-32 of every array's bytes."""

    def digest(leaf: np.ndarray) -> int:
        return zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))

    return {name: digest(leaf) for name, leaf in leaves.items()}


def info_digest(info: dict[str, Any]) -> int:
    """A CRC-32 of what JSON makes of an info, whatever the order of its keys."""
    return zlib.crc32(json.dumps(info, sort_keys=True).encode())


def check_finite(leaves: dict[str, np.ndarray]) -> None:
    """Raises UserError if an array holds NaN or infinity, so that it is never saved."""
    for name, leaf in leaves.items():
        if not np.isfinite(leaf).all():
            raise UserError(
                f"{name} became NaN or infinite before step {int(leaves[_STEP])} was saved; the "
                "checkpoints before it are kept: try a lower config.learning_rate, a longer "
                "config.warmup_epochs or a smaller config.clip_norm, in a new --workdir."
            )


def _listed(directory: pathlib.Path) -> list[pathlib.Path]:
    """What is in the folder, [] without it.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return sorted(directory.iterdir()) if directory.is_dir() else []
    except OSError as error:
        raise UserError(
            f"{directory} cannot be read ({error.strerror}); let this user read it, or give a new "
            "--workdir."
        ) from error


def _reason(error: Exception) -> str:
    """The operating system's reason where a library passes it on, or else its own first line."""
    text = str(error).strip() or type(error).__name__
    if code := re.search(r"(?:OS error |os_error_code=')(\d+)", text):  # TensorStore's
        return os.strerror(int(code[1]))
    first = text.splitlines()[0]
    return first if len(first) <= 200 else f"{first[:197]}..."


def quiet_about_closed_loops(
    hook: Callable[[Any], Any],
) -> Callable[[Any], Any]:
    """`sys.unraisablehook`, but silent about what comes after a failed save, a hundred times over.

    TensorStore goes on to call back into an event loop that Orbax has closed.
    """

    def quiet(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    return quiet
