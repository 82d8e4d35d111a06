"""A zip archive that is written whole or not at all, and equal bytes for equal content."""

import contextlib
import os
import secrets
import zipfile
from collections.abc import Iterable, Sequence

import numpy as np

Parts = Sequence[bytes | np.ndarray]


def write_archive(path: str | os.PathLike[str], members: Iterable[tuple[str, int, Parts]]) -> None:
    """Writes an archive beside `path`, whole and on disk, before it takes the name.

    Args:
      path: where to.
      members: a name, `zipfile.ZIP_STORED` or `ZIP_DEFLATED`, and contiguous parts that follow one
        another.

    Raises:
      OSError: it cannot be written.
    """
    target = os.path.realpath(path)
    temporary = f"{target}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                for name, compression, parts in members:
                    views = [memoryview(part) for part in parts]
                    size = sum(view.nbytes for view in views)
                    with archive.open(_member(name, size, compression), "w") as out:
                        for view in views:
                            out.write(view)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _member(name: str, size: int, compression: int) -> zipfile.ZipInfo:
    """A member's header without a date."""
    info = zipfile.ZipInfo(name)
    info.file_size = size
    info.compress_type = compression
    info.create_system = 3  # Unix, on every system
    info.external_attr = 0o644 << 16
    return info
