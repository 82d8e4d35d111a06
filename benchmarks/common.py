"""What every benchmark needs: where it ran, where its results go, and a table for people."""

import datetime
import json
import os
import pathlib
import platform
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

RESULTS = pathlib.Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The machine and the versions that a figure depends on, as plain data."""
    devices = jax.devices()
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "devices": [f"{devices[0].device_kind} x {len(devices)}"],
        "system": platform.platform(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
    }


def _cpu() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def keep_to_one_core() -> None:
    """Binds this process, and what it starts from here on, to one core where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def append_result(name: str, record: dict[str, Any]) -> None:
    """Appends one run to `benchmarks/results/{name}.jsonl`, with its date, command and machine.

    Args:
      name: the benchmark's.
      record: its figures, as JSON.
    """
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {module.name}" if module else sys.argv[0]
    line = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", program, *sys.argv[1:]]),
        "machine": machine(),
        **record,
    }
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}.jsonl", "a") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")


def print_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a Markdown table of `rows`, numbers to the right and anything else to the left."""
    cells = [list(headers), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    numeric = [
        all(isinstance(row[column], int | float) for row in rows) for column in range(len(headers))
    ]

    def line(row: Sequence[str]) -> str:
        aligned = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        return f"| {' | '.join(aligned)} |"

    rule = ["-" * (width - 1) + ("-:"[right]) for width, right in zip(widths, numeric, strict=True)]
    for row in [cells[0], rule, *cells[1:]]:
        print(line(row))
