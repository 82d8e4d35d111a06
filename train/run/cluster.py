"""Joining the processes of one job: one a host of a TPU pod, one a task of a Slurm job."""

import os
import re
import sys
import threading
from typing import Any

import jax

from train import parallel
from train.errors import UserError

# A process that died, or that leaves alone, takes the others down within this time.
HEARTBEAT_SECONDS = 60
# The processes of a job have this long to find one another.
INITIALIZATION_SECONDS = 300

# Where a launcher says that it started one process, there is nothing to join, and JAX would give it
# the first GPU alone.
_TASKS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


def join(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
) -> str:
    """Connects this process to the others of its job, before JAX is used for anything else.

    Args:
      coordinator_address: host and port of process 0; None, as for the two below, to let JAX
        detect the cluster. On a plain machine it detects none, and the process is alone.
      num_processes: of the job.
      process_id: of this one, from 0.

    Returns:
      A line that says how the program runs.

    Raises:
      UserError: a flag is missing or wrong, the processes cannot meet, or there is no device.
    """
    given: dict[str, Any] = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    lacking = [f"--{name}" for name, value in given.items() if value is None]
    if len(lacking) == 3:
        how = "detected by JAX" if _detected() else "no cluster detected"
    elif lacking:
        raise UserError(
            f"{' and '.join(lacking)} not given; give --coordinator_address, --num_processes and "
            "--process_id together, or none of them where JAX detects the cluster."
        )
    else:
        _check(**given)
        _initialize(**given)
        how = "as the flags say"
    devices = parallel.devices()
    count = jax.process_count()
    processes = f"{count} processes" if count > 1 else "one process"
    return f"Running in {processes} ({how}) on {len(devices)} x {devices[0].device_kind}."


def _check(coordinator_address: str, num_processes: int, process_id: int) -> None:
    _, _, port = coordinator_address.rpartition(":")
    if not re.fullmatch(r"\S+:\d{1,5}", coordinator_address) or not 0 < int(port) < 65536:
        raise UserError(
            f"--coordinator_address is {coordinator_address!r}; give process 0's host and a free "
            "port there, such as 10.0.0.1:8476."
        )
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id is {process_id} and --num_processes {num_processes}; number the "
            "processes from 0 to one less than their number."
        )


def _detected() -> bool:
    """Joins the cluster that JAX detects; whether there is one."""
    if any(os.environ.get(name) == "1" for name in _TASKS):
        return False
    try:
        _initialize()
    except ValueError as error:
        if "coordinator_address" in str(error):  # it is not known: JAX detects no cluster
            return False
        raise UserError(
            f"JAX finds part of a cluster in the environment ({_first_line(error)}); give "
            "--coordinator_address, --num_processes and --process_id, or unset "
            "JAX_COORDINATOR_ADDRESS and the like to run alone."
        ) from error
    except RuntimeError:  # JAX is in use already, by whoever called the program as a function
        return False
    return True


def _initialize(**given: Any) -> None:
    """`jax.distributed.initialize`, which aborts with a stack trace when its time is up."""

    def give_up() -> None:
        print(
            f"The processes of this job did not all meet within {INITIALIZATION_SECONDS} s; start "
            "all of them with the same --coordinator_address, which each must be able to reach.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(INITIALIZATION_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=INITIALIZATION_SECONDS + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"The processes of this job cannot meet ({_first_line(error)}); give "
            "--coordinator_address a port that is free on the host of process 0."
        ) from error
    finally:
        timer.cancel()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
