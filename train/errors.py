"""The kinds of error that are the user's to mend."""

import contextlib
import pathlib
from collections.abc import Iterator


class UserError(Exception):
    """A mistake in what the user gave: one sentence that says what is wrong and what to do.

    The programs print it to stderr as it is, without a traceback, and exit with status 2.
    """


class StorageError(UserError):
    """Something could not be written: the disk is full, a quota reached, a folder read-only."""


@contextlib.contextmanager
def writing(path: pathlib.Path, flag: str = "--workdir") -> Iterator[None]:
    """Turns what the operating system refuses while `path` is written into a `StorageError`.

    Args:
      path: what is written.
      flag: the program's argument that says where.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written ({error.strerror or error}); make room there or give a "
            f"{flag} that can be written, and start again."
        ) from error


def one_line(error: Exception) -> str:
    """An error's type and the first line of its message."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
