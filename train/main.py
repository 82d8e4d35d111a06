"""Trains a sparse network: python -m train.main --config configs/digits.py --workdir runs/digits"""

import os
import pathlib
import sys
from collections.abc import Callable, Sequence

import jax
from absl import logging as absl_logging

import train
from train import command_line, parallel, program
from train.command_line import Help
from train.config import Config
from train.errors import StorageError, UserError
from train.finish import finish
from train.run import cluster, loop
from train.run.cache import use_compilation_cache
from train.run.session import open_session
from train.run.signals import Interrupted
from train.store import checkpoint
from train.store.metrics import Record

DONE, BUG, MISTAKE = 0, 1, 2


def run(config: Config, workdir: pathlib.Path, say: Callable[[str], None] = program.say) -> Record:
    """Trains, from the newest checkpoint in `workdir` if there is one, and writes the results.

    Args:
      config: the experiment.
      workdir: its folder; the README's "The training program" says what is written there.
      say: takes a line meant for people.

    Returns:
      What `summary.json` holds.

    Raises:
      UserError: the user's mistake, in one sentence.
      Interrupted: a signal came; the state is saved.
    """
    with open_session(config, workdir, say) as session:
        progress, unsaved = loop.train(session), None
        try:
            if session.checkpoints.latest != session.experiment.steps.total:
                loop.save(session, progress, must=True)
        except StorageError as error:
            if jax.process_count() > 1:
                raise
            unsaved = error  # the finalised model may still have room
        summary = finish(session, progress.state)
        if unsaved is not None:
            raise unsaved
        return summary


def main(argv: Sequence[str]) -> int:
    """Runs the program and returns its exit status."""
    train.begin()
    sys.unraisablehook = checkpoint.quiet_about_closed_loops(sys.unraisablehook)
    absl_logging.set_verbosity(absl_logging.FATAL)  # what Orbax logs, it raises as well
    try:
        command = command_line.parse(argv)
        how = cluster.join(command.coordinator_address, command.num_processes, command.process_id)
        use_compilation_cache()
        if parallel.is_first():
            program.say(how)
        run(command.config, command.workdir)
    except Help as page:
        program.say(page)
    except UserError as error:
        print(error, file=sys.stderr)
        return MISTAKE
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        return 128 + interrupted.signum
    except KeyboardInterrupt:
        print(
            "Stopped by SIGINT; the same command goes on from the newest checkpoint, if there is "
            "one.",
            file=sys.stderr,
        )
        return 130
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        print(
            f"Process {jax.process_index()} cannot go on with the others "
            f"({str(error).splitlines()[0]}); start all of them again with the same command, and "
            "they go on from the newest checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(BUG)  # at a usual exit, JAX would wait minutes for the others
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv))
