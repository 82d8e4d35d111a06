"""A run's folder as it is found: whether it is this run's, whole, and can be written."""

import contextlib
import errno
import fcntl
import json
import pathlib
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping

import jax
from jaxtyping import PyTree

from train import parallel
from train.config import RESUMABLE, Config, flat
from train.data.spec import COMPUTED
from train.errors import StorageError, UserError, writing
from train.files import write_json
from train.store import checkpoint

# Network file systems show a new file to the other hosts after a while.
VISIBLE_SECONDS = 60


def with_found(config: Config, workdir: pathlib.Path) -> Config:
    """The configuration with what the run's first start found out about its data set.

    So the run goes on with the classes that it began with, and with the mean and the deviation
    that were computed then, whatever has come to its folder of pictures since.
    """
    try:
        was = json.loads((workdir / "config.json").read_text(encoding="utf-8"))["data"]
        found = {name: was[name] for name in ("classes", "mean", "std") if name in was}
    except (OSError, ValueError, TypeError, LookupError):  # `check_same_run` says what is wrong
        return config
    asked = {
        name: value
        for name, value in found.items()
        if config.data.get(name) == COMPUTED or (name == "classes" and not config.data.get(name))
    }
    return config.model_copy(update={"data": config.data | asked})


def check_same_run(config: Config, workdir: pathlib.Path) -> None:
    """Sees to it that `workdir` is new, or belongs to a run of this configuration.

    Raises:
      UserError: it does not.
    """
    with writing(workdir):  # a name may be too long, or not ours to look up
        is_file = workdir.exists() and not workdir.is_dir()
    if is_file:
        raise UserError(f"--workdir is {str(workdir)!r}, which is a file; give a folder.")
    path = workdir / "config.json"
    with writing(workdir):
        exists = path.exists()
    if not exists:
        return
    try:
        was = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); bring back a copy, or give a new --workdir."
        ) from error
    before, now = flat(was), flat(config.as_dict())
    differing = [
        f"{name} (was {before.get(name)!r}, is {now.get(name)!r})"
        for name in {**before, **now}
        if name not in RESUMABLE and before.get(name) != now.get(name)
    ]
    if differing:
        raise UserError(
            f"{workdir} holds a run of another configuration, which differs in "
            f"{', '.join(differing)}; give the same values to go on with it, or a new --workdir, "
            f"with --config.init_from={workdir} to start from its weights."
        )


def check_same_examples(
    were: Mapping[str, int] | None, are: Mapping[str, int], workdir: pathlib.Path
) -> None:
    """Sees to it that a run goes on with as many examples as it began with.

    Args:
      were: how many its checkpoint says, by their use; None if it is of a version that did not say.
      are: how many there are.
      workdir: the run's folder.

    Raises:
      UserError: they are not as many.
    """
    for use, number in (were or {}).items():
        if number != are[use]:
            raise UserError(
                f"{workdir} holds a run with {number:,} {use} examples, and the data set has "
                f"{are[use]:,} now; bring it back as it was to go on, or give a new --workdir, "
                f"with --config.init_from={workdir} to start from its weights."
            )


def check_unfinished(workdir: pathlib.Path) -> None:
    """Sees to it that a run that begins anew overwrites no results.

    Raises:
      UserError: there are some.
    """
    if (workdir / "summary.json").exists():
        raise UserError(
            f"{workdir} holds the results of a run and no checkpoint, so that training would begin "
            "anew and overwrite them; bring checkpoints/ back, or give a new --workdir."
        )


def check_room(workdir: pathlib.Path, state: PyTree) -> None:
    """Sees to it, on the first process, that a checkpoint of `state` has room.

    Raises:
      StorageError: it has not.
    """
    if not parallel.is_first():
        return
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    with writing(workdir):
        there = next(folder for folder in (workdir, *workdir.parents) if folder.exists())
        total, _, free = shutil.disk_usage(there)
    if total and free < needed:  # what is no disk says 0
        raise StorageError(
            f"{workdir} has {free / 1e6:,.1f} MB left, and a checkpoint takes "
            f"{needed / 1e6:,.1f} MB; make room there or give a --workdir elsewhere."
        )


@contextlib.contextmanager
def open_workdir(workdir: pathlib.Path, config: Config) -> Iterator[None]:
    """Makes the run's folder, for this run alone, and sees to it that all processes can use it.

    Raises:
      StorageError: it cannot be written, or is not the same for all.
      UserError: another start of the run has it, or the processes differ in their configuration.
    """
    digests = parallel.gather(zlib.crc32(json.dumps(config.as_dict()).encode()) >> 1)
    for number, digest in enumerate(digests):
        if digest != digests[0]:
            raise UserError(
                f"Process {number} was started with another configuration than process 0; give "
                "all processes the same command line."
            )
    with contextlib.ExitStack() as stack:
        if parallel.is_first():
            with writing(workdir):
                workdir.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_locked(workdir))
                write_json(workdir / "config.json", config.as_dict())
                for unfinished in workdir.glob("model.npz.*.tmp"):  # by a start that was killed
                    unfinished.unlink()
        seen = parallel.gather(int(_appears(workdir / "config.json")))
        if not all(seen):
            raise StorageError(
                f"Process {seen.index(0)} does not see what process 0 writes to {workdir}; give a "
                "--workdir on a file system that all processes share."
            )
        yield


@contextlib.contextmanager
def _locked(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the folder's lock, which ends with the process, however it ends.

    A file system without locks is used without.

    Raises:
      UserError: another process holds it.
    """
    with (workdir / ".lock").open("ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"Another process is training in {workdir}; wait for its end, or give another "
                    "--workdir."
                ) from error
        yield


def _appears(path: pathlib.Path) -> bool:
    """Whether a file that another process may just have written is there, soon."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    return path.exists()


def clear_damage(
    folder: pathlib.Path, passed_over: Mapping[int, str], say: Callable[[str], None]
) -> None:
    """Moves damaged checkpoints out of the way, and says which, and what was not finished.

    Args:
      folder: of the checkpoints.
      passed_over: the damaged ones, a step and a reason each.
      say: takes the lines.

    Raises:
      StorageError: they cannot be moved.
    """
    if not parallel.is_first():
        return
    for name in checkpoint.unfinished(folder):
        say(f"{folder / name} is a checkpoint that was not finished; it is removed.")
    aside = checkpoint.set_aside(folder, list(passed_over)) if passed_over else folder
    for step, reason in passed_over.items():
        say(f"Passed over the checkpoint of step {step} ({reason}); it is in {aside} now.")
