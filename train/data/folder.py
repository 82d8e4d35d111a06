"""A folder of pictures, one subfolder a class: what is in it, and which of it is for evaluation."""

import dataclasses
import hashlib
import itertools
import os
import pathlib
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from train.data import heads, kept
from train.data.heads import File
from train.errors import UserError

TRAIN = "train"
EVALUATION = ("eval", "val", "validation", "test")  # the first that is there


@dataclasses.dataclass(frozen=True)
class Pictures:
    """One split of a folder, its files left encoded. It may be sent to other processes.

    Attributes:
      folder: where the files are.
      paths: where each file is below the folder.
      labels: the class of each file.
    """

    folder: pathlib.Path
    paths: tuple[str, ...]
    labels: Int32[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """A picture: `image`, its file's bytes, and `label`.

        Raises:
          UserError: if the file can't be read.
        """
        try:
            content = (self.folder / self.paths[number]).read_bytes()
        except OSError as error:
            raise self.error(number, f"can't be read ({error.strerror or error})") from error
        return {"image": content, "label": int(self.labels[number])}

    def name(self, number: int) -> str:
        """What people call a picture: its path below the folder."""
        return self.paths[number]

    def error(self, number: int, complaint: str) -> UserError:
        """What to raise about a picture."""
        return UserError(
            f"{self.folder / self.paths[number]} {complaint}; mend or delete it, or pass over such "
            "files with --config.data.skip_damaged=True."
        )


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder of pictures.

    Attributes:
      classes: the names of the classes, in the order of the labels.
      train: the pictures to train on.
      evaluation: the pictures to evaluate on.
      notes: what people should know about it, a sentence each.
    """

    classes: tuple[str, ...]
    train: Pictures
    evaluation: Pictures
    notes: tuple[str, ...] = ()


def open_folder(
    path: str,
    *,
    classes: Sequence[str] = (),
    eval_fraction: float = 0.1,
    skip_damaged: bool = False,
) -> Folder:
    """Finds the classes and the pictures of a folder.

    A class is a subfolder, and all pictures below it are of this class. If all subfolders have the
    names of splits (`TRAIN`, `EVALUATION`), the classes are below these. Otherwise a picture is
    evaluated on if `evaluation_rank` of its path is less than `eval_fraction`. Links are followed;
    files and folders whose names begin with a dot are passed over, as are files beside the classes.

    Args:
      path: the folder; `~` is the home directory.
      classes: names of the classes to take, in the order of their labels; () for all, by name.
      eval_fraction: the fraction of the pictures to evaluate on, where the folder does not say.
      skip_damaged: whether to pass over files that are no pictures.

    Raises:
      UserError: if there is no such folder or it can't be read; it has fewer than two classes, two
        whose names differ in case alone, an empty one, not the ones that are asked for, or in
        evaluation others than in training; links in it lead in a circle; files are no pictures; or
        nothing is left to evaluate on.
    """
    root = pathlib.Path(os.path.expanduser(path))
    if not root.is_dir():
        raise UserError(
            f"data.path is {path!r}, where there is no folder; give one that holds a subfolder for "
            "each class."
        )
    train_folder, eval_folder = _splits(root)
    found = _classes(root / train_folder)
    names = _chosen(root / train_folder, found, classes)
    files = [file for name in names for file in _files(root, f"{train_folder}{name}")]
    if eval_folder:
        there = _subfolders(root / eval_folder)
        if foreign := sorted(set(there) - set(found)):
            raise UserError(
                f"{root / eval_folder} has the class {foreign[0]!r}, which {root / train_folder} "
                "has not; give both the same subfolders."
            )
        both = [name for name in names if name in there]
        files += [file for name in both for file in _files(root, f"{eval_folder}{name}")]
    paths, notes = _pictures(root, names, files, skip_damaged)
    label_of = {name: label for label, name in enumerate(names)}
    depth = 1 if train_folder else 0
    labels = np.array([label_of[path.split("/")[depth]] for path in paths], np.int32)

    def held_out(path: str) -> bool:
        if eval_folder:
            return path.startswith(eval_folder)
        return evaluation_rank(path) < eval_fraction

    held = np.array([held_out(path) for path in paths], bool)

    def split(chosen: Bool[np.ndarray, " n"]) -> Pictures:
        return Pictures(root, tuple(itertools.compress(paths, chosen)), labels[chosen])

    train, evaluation = split(~held), split(held)
    _check_counts(root, names, train, evaluation, eval_fraction)
    return Folder(names, train, evaluation, notes)


def evaluation_rank(path: str) -> float:
    """A number in [0, 1) by a picture's path below the folder, the same wherever the folder is."""
    normal = unicodedata.normalize("NFC", path)  # file systems differ in how they write an accent
    digest = hashlib.blake2b(normal.encode("utf-8", "surrogateescape"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _splits(root: pathlib.Path) -> tuple[str, str]:
    """Where the classes are, as prefixes of paths: for training, and for evaluation or ""."""
    names = {name.casefold(): name for name in _subfolders(root)}
    if not names or not names.keys() <= {TRAIN, *EVALUATION}:
        return "", ""
    if TRAIN not in names:
        raise UserError(
            f"{root} has {', '.join(sorted(names.values()))} and no {TRAIN}; give it one, with a "
            "subfolder for each class."
        )
    evaluation = next((names[name] for name in EVALUATION if name in names), "")
    return f"{names[TRAIN]}/", f"{evaluation}/" if evaluation else ""


def _classes(folder: pathlib.Path) -> list[str]:
    """The names of the classes, sorted."""
    names = sorted(_subfolders(folder))
    if len(names) < 2:
        has = f"one class, {names[0]!r}" if names else "no subfolder"
        raise UserError(f"{folder} has {has}; give it a subfolder for each of two classes or more.")
    seen: dict[str, str] = {}
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{folder} has the class {name!r}, which is no UTF-8; rename it."
            ) from error
        other = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise UserError(
                f"{folder} has the classes {other!r} and {name!r}, which look the same; rename "
                "one, or put the pictures of both into one."
            )
    return names


def _chosen(folder: pathlib.Path, found: Sequence[str], classes: Sequence[str]) -> tuple[str, ...]:
    for name in classes:
        if name not in found:
            raise UserError(
                f"data.classes has {name!r}, which is no subfolder of {folder}; those are "
                f"{', '.join(found)}."
            )
    return tuple(classes or found)


def _subfolders(folder: pathlib.Path) -> list[str]:
    return [entry.name for entry in _entries(folder) if entry.is_dir()]


def _entries(folder: pathlib.Path) -> list[os.DirEntry[str]]:
    """What is in a folder and not hidden."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(
            f"{folder} can't be read ({error.strerror or error}); mend that or take it away."
        ) from error


def _files(root: pathlib.Path, below: str) -> Iterator[File]:
    """All files below a folder of `root`, in the order of their paths.

    Raises:
      UserError: a folder can't be read, or holds a link to one that it is in.
    """

    def walk(path: str, above: frozenset[tuple[int, int]]) -> Iterator[File]:
        folder = root / path
        try:
            status = folder.stat()
        except OSError as error:
            raise UserError(
                f"{folder} can't be read ({error.strerror or error}); mend that or take it away."
            ) from error
        this = (status.st_dev, status.st_ino)
        if this in above:
            raise UserError(
                f"{folder} leads back to {folder.resolve()}, in which it is itself; delete the "
                "link."
            )
        for entry in sorted(_entries(folder), key=lambda entry: entry.name):
            if entry.is_dir():
                yield from walk(f"{path}/{entry.name}", above | {this})
            else:
                yield heads.describe(f"{path}/{entry.name}", entry)

    status = root.stat()
    yield from walk(below, frozenset({(status.st_dev, status.st_ino)}))


def _pictures(
    root: pathlib.Path, names: Sequence[str], files: Sequence[File], skip_damaged: bool
) -> tuple[list[str], tuple[str, ...]]:
    """The paths of those files that begin as pictures do, and what to say about it."""
    made_of = "\0".join([os.path.realpath(root), *sorted(names)])
    are, notes = heads.are_pictures(root, files, kept.place("folder", made_of))
    others = [file.path for file, is_one in zip(files, are, strict=True) if not is_one]
    if others:
        more = f", as {len(others) - 1:,} other(s)" if len(others) > 1 else ""
        what = f"{root / others[0]} can't be read or is not {heads.FORMATS}{more}"
        if not skip_damaged:
            raise UserError(
                f"{what}; delete what is no picture, or pass over such files with "
                "--config.data.skip_damaged=True."
            )
        notes += (f"{what}; passed over.",)
    return [file.path for file, is_one in zip(files, are, strict=True) if is_one], notes


def _check_counts(
    root: pathlib.Path,
    names: Sequence[str],
    train: Pictures,
    evaluation: Pictures,
    eval_fraction: float,
) -> None:
    """Raises UserError unless there is something to train on of every class, and to evaluate on."""
    counts = np.bincount(train.labels, minlength=len(names))
    for name, count in zip(names, counts, strict=True):
        if not count:
            raise UserError(
                f"The class {name!r} of {root} has no pictures to train on; put some into its "
                "folder, delete it, or name the others in data.classes."
            )
    if not len(evaluation):
        raise UserError(
            f"{root} has no pictures to evaluate on, as none of {len(train):,} falls to "
            f"data.eval_fraction = {eval_fraction}; choose that larger, or put some into "
            f"{root / EVALUATION[0]}."
        )
