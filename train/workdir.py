"""A run's folder as it is found: whether it is this run's, whole, and can be written."""

import json
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping

import jax
from jaxtyping import PyTree

from train import checkpoint, parallel
from train.config import RESUMABLE, Config
from train.errors import StorageError, UserError, writing
from train.metrics import write_json

# Network file systems show a new file to the other hosts after a while.
VISIBLE_SECONDS = 60


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
    differing = [
        f"{name} (was {was.get(name)!r}, is {value!r})"
        for name, value in config.as_dict().items()
        if name not in RESUMABLE and was.get(name) != value
    ]
    if differing:
        raise UserError(
            f"{workdir} holds a run of another configuration, which differs in "
            f"{', '.join(differing)}; give the same values to go on with it, or a new --workdir, "
            f"with --config.init_from={workdir} to start from its weights."
        )


def open_workdir(workdir: pathlib.Path, config: Config, state: PyTree) -> None:
    """Makes the run's folder, and sees to it that it can be written, by all processes.

    Raises:
      StorageError: it cannot be, has no room for a checkpoint, or is not the same for all.
    """
    if parallel.is_first():
        with writing(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            write_json(workdir / "config.json", config.as_dict())
            free = shutil.disk_usage(workdir).free
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    seen = parallel.gather(int(_appears(workdir / "config.json")))
    if not all(seen):
        raise StorageError(
            f"Process {seen.index(0)} does not see what process 0 writes to {workdir}; give a "
            "--workdir on a file system that all processes share."
        )
    if parallel.is_first() and free < needed:
        raise StorageError(
            f"{workdir} has {free / 1e6:,.1f} MB left, and a checkpoint takes "
            f"{needed / 1e6:,.1f} MB; make room there or give a --workdir elsewhere."
        )


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
