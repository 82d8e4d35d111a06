"""Which files are pictures, by their first bytes; kept from start to start."""

import itertools
import os
import pathlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from train.data import kept

FORMATS = "a JPEG, PNG, WebP, BMP, GIF or TIFF"

_BYTES = 16
_STARTS = (
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"BM",
    b"II*\0",  # TIFF, then BigTIFF
    b"MM\0*",
    b"II+\0",
    b"MM\0+",
)

_THREADS = 32  # they wait for the storage, which may be across a network
_CHUNK = 256
_ENCODING = ("utf-8", "surrogateescape")  # Linux lets names be any bytes


class File(NamedTuple):
    """A file as the file system has it.

    Attributes:
      path: where the file is below the folder, with slashes.
      size: the file's, in bytes; -1 where it can't be told (a link to nothing).
      modified: when it last changed, in nanoseconds since 1970.
    """

    path: str
    size: int
    modified: int


def describe(path: str, entry: os.DirEntry[str]) -> File:
    """The file of a directory's entry."""
    try:
        status = entry.stat()
    except OSError:
        return File(path, -1, 0)
    return File(path, status.st_size, status.st_mtime_ns)


def is_picture(path: str | pathlib.Path) -> bool:
    """Whether a file begins as a picture does; False if it can't be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(_BYTES)
    except OSError:
        return False
    return head.startswith(_STARTS) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def are_pictures(
    root: pathlib.Path, files: Sequence[File], index: pathlib.Path
) -> tuple[list[bool], tuple[str, ...]]:
    """Which of the files of a folder are pictures, reading those that are new or have changed.

    Args:
      root: the folder.
      files: in it.
      index: where it is kept what was found.

    Returns:
      A bool for each file, and a sentence for people if the index could not be kept.
    """
    known = _read(index)
    unknown = [file for file in files if file not in known]

    def look(start: int) -> list[bool]:
        return [is_picture(f"{root}/{file.path}") for file in unknown[start : start + _CHUNK]]

    with ThreadPoolExecutor(_THREADS) as threads:
        answers = itertools.chain.from_iterable(threads.map(look, range(0, len(unknown), _CHUNK)))
        known |= dict(zip(unknown, answers, strict=True))
    are = [known[file] for file in files]
    unchanged = not unknown and len(known) == len(files)
    return are, () if unchanged else _write(index, files, are)


def _read(index: pathlib.Path) -> dict[File, bool]:
    """What an index holds; {} if there is none."""
    arrays = kept.read(index)
    if not arrays:
        return {}
    try:
        paths = arrays["paths"].tobytes().decode(*_ENCODING).split("\0")
        rows = zip(paths, arrays["sizes"].tolist(), arrays["modified"].tolist(), strict=True)
        return dict(zip(itertools.starmap(File, rows), arrays["are"].tolist(), strict=True))
    except (KeyError, ValueError):  # of another version of this program
        return {}


def _write(index: pathlib.Path, files: Sequence[File], are: Sequence[bool]) -> tuple[str, ...]:
    paths = "\0".join(file.path for file in files).encode(*_ENCODING)
    arrays: dict[str, np.ndarray] = {
        "paths": np.frombuffer(paths, np.uint8),
        "sizes": np.array([file.size for file in files], np.int64),
        "modified": np.array([file.modified for file in files], np.int64),
        "are": np.array(are, bool),
    }
    try:
        kept.write(index, arrays)
    except OSError as error:
        return (
            f"The index of {len(files):,} files can't be kept in {index.parent} "
            f"({error.strerror or error}), so that every start reads them; make room there or set "
            "XDG_CACHE_HOME to another folder.",
        )
    return ()
