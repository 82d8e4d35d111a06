"""What the programs have in common: arguments, output, exit statuses."""

import argparse
import os
import pathlib
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import logging as absl_logging

import train
from train.errors import UserError

MISTAKE, INTERRUPTED = 2, 130


class ArgumentParser(argparse.ArgumentParser):
    """argparse, but that a wrong argument is one sentence, as any other mistake is."""

    def add_allow_import(self) -> None:
        """Adds `--allow-import`, which every program has that builds a model file's network."""
        self.add_argument(
            "--allow-import",
            action="store_true",
            help="import the network that the file names, if it is somebody's own",
        )

    def print_help(self, file: object = None) -> None:
        say(self.format_help().rstrip())

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[:1].upper()}{message[1:]}; --help says what there is.")


def path(text: str) -> pathlib.Path:
    """A path as users write it, with ~ for their home: shells leave it as it is after a "="."""
    return pathlib.Path(os.path.expanduser(text))


def say(line: object) -> None:
    """Prints a line for people, whoever reads it.

    A reader who is gone misses it, and one without a character gets its escape: neither is a reason
    to stop.
    """
    try:
        print(line, flush=True)
    except UnicodeEncodeError as error:
        escaped = str(line).encode(error.encoding, "backslashreplace")
        print(escaped.decode(error.encoding), flush=True)
    except OSError:  # what is left in the buffer has to go somewhere, at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(program: Callable[[], None]) -> int:
    """Runs a program and returns its exit status: 0, or 2 with one sentence on stderr."""
    train.begin()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        program()
    except UserError as error:
        print(error, file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("Stopped by SIGINT.", file=sys.stderr)
        return INTERRUPTED
    return 0
