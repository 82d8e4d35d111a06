"""What the smaller programs (evaluate, export, report, compare) have in common."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import logging as absl_logging

from train.errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """argparse, but that a wrong argument is one sentence, as any other mistake is."""

    def add_allow_import(self) -> None:
        """Adds `--allow-import`, which every program has that builds a model file's network."""
        self.add_argument(
            "--allow-import",
            action="store_true",
            help="import the network that the file names, if it is somebody's own",
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[:1].upper()}{message[1:]}; --help says what there is.")


def run(program: Callable[[], None]) -> int:
    """Runs a program and returns its exit status: 0, or 2 with one sentence on stderr."""
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        program()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
