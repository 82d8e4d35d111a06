"""Several processes are one run: the same numbers, stopped together, resumed by any number."""

import json
import os
import pathlib
import re
import signal
import socket

import numpy as np
import pytest

from train.store import checkpoint

pytestmark = pytest.mark.slow

X64 = {"JAX_ENABLE_X64": "1"}
# Batch normalisation makes the processes' parts of a batch depend on one another.
FORTY_STEPS = (
    '--config.model={"name": "resnet8", "widths": (4, 8)}',
    "--config.batch_size=32",
    "--config.epochs=0.91",
    "--config.compute_dtype=float64",
    "--config.log_every_steps=1",
    "--config.checkpoint_every_steps=15",
    "--config.eval_every_epochs=0.5",
)

# What gloo's threads print, sometimes one in the middle of the other's line.
GLOO = r"\[Gloo\] Rank |\d+ is connected to \d+ peer ranks\. Expected .* is : \d+"


def arguments(small: pathlib.Path, workdir: pathlib.Path) -> list[str]:
    return ["--config", str(small), "--workdir", str(workdir), *FORTY_STEPS]


def free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("localhost", 0))
        return any_port.getsockname()[1]


def start_two(start, arguments, *, devices=2, fault=None, faulty=1):
    """Two processes of one job; `faulty` is the one that sends itself a signal."""
    address = f"--coordinator_address=localhost:{free_port()}"
    return [
        start(
            *arguments,
            address,
            "--num_processes=2",
            f"--process_id={index}",
            devices=devices,
            fault=fault if index == faulty else None,
            **X64,
        )
        for index in (0, 1)
    ]


def ended(processes, seconds=240):
    """Waits for all: (status, stdout, stderr) of each."""
    outputs = [process.communicate(timeout=seconds) for process in processes]
    return [
        (process.returncode, *output) for process, output in zip(processes, outputs, strict=True)
    ]


def assert_same_run(workdir: pathlib.Path, reference: pathlib.Path, tolerance: float = 1e-9):
    """Weights and metrics agree, and each step is logged once."""
    records = [
        [json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()]
        for each in (workdir, reference)
    ]
    assert [record["step"] for record in records[0]] == list(range(1, 41))
    for record, wanted in zip(*records, strict=True):
        record.pop("examples_per_second", None)
        wanted.pop("examples_per_second", None)
        assert record == pytest.approx(wanted, rel=tolerance)
    leaves, wanted = (
        checkpoint.newest(each / "checkpoints").leaves for each in (workdir, reference)
    )
    assert leaves["optimizer/step"] == 40
    assert leaves["variables/params/stem/kernel"].dtype == np.float64
    for name, leaf in leaves.items():
        np.testing.assert_allclose(leaf, wanted[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.fixture(scope="module")
def reference(small, start, tmp_path_factory) -> pathlib.Path:
    """The run of one process with four devices."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    ((status, _, stderr),) = ended([start(*arguments(small, workdir), devices=4, **X64)])
    assert status == 0, stderr
    return workdir


def test_two_processes_compute_what_one_does_and_only_the_first_speaks(
    small, start, reference, tmp_path
):
    first, second = ended(start_two(start, arguments(small, tmp_path / "run")))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "Running in 2 processes (as the flags say) on 4 x cpu." in first[1]
    assert not re.sub(GLOO, "", second[1]).strip()
    assert_same_run(tmp_path / "run", reference)
    summaries = [
        json.loads((each / "summary.json").read_text()) for each in (tmp_path / "run", reference)
    ]
    summaries = [
        {name: value for name, value in each.items() if not name.endswith("_seconds")}
        for each in summaries
    ]
    assert summaries[0] == pytest.approx(summaries[1], rel=1e-9)


def test_a_cluster_that_jax_detects_needs_no_flags(small, start, tmp_path):
    """Slurm's environment, as srun gives it to two tasks on this machine."""
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
    processes = [
        start(
            *arguments(small, tmp_path / "run"),
            "--config.epochs=0.1",
            devices=2,
            **X64,
            **job,
            SLURM_NTASKS="2",
            SLURM_PROCID=str(index),
            SLURM_LOCALID=str(index),
        )
        for index in (0, 1)
    ]
    first, second = ended(processes)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "Running in 2 processes (detected by JAX) on 4 x cpu." in first[1]


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_to_one_stops_all_at_one_step_and_one_process_goes_on(
    small, start, reference, tmp_path, name, status
):
    """The signal reaches process 1, JAX's service tells process 0: both save the same step."""
    workdir = tmp_path / "run"
    slowly = ("--config.checkpoint_every_steps=1",)  # the service looks once a second
    command = [*arguments(small, workdir), *slowly]
    results = ended(start_two(start, command, fault=(name, 3)))
    assert [result[0] for result in results] == [status, status], results
    step = int(checkpoint.newest(workdir / "checkpoints").leaves["optimizer/step"])
    assert 3 < step < 40
    for _, _, stderr in results:
        assert f"Stopped by {name} after step {step}, which is saved" in stderr
    # The other number of processes and of devices: 1 x 8 after 2 x 2.
    ((status, _, stderr),) = ended([start(*arguments(small, workdir), devices=8, **X64)])
    assert status == 0, stderr
    assert_same_run(workdir, reference)


def test_a_process_that_dies_takes_the_other_down_and_the_job_resumes(
    small, start, reference, tmp_path
):
    workdir = tmp_path / "run"
    processes = start_two(start, arguments(small, workdir), fault=("SIGKILL", 20))
    (status, _, stderr), dead = ended(processes)
    assert dead[0] == -signal.SIGKILL
    # By the collective that failed, or by the heartbeat of JAX's service, whichever is first.
    assert status in (1, -signal.SIGABRT)
    assert "cannot go on with the others" in stderr or "another task died" in stderr
    first, second = ended(start_two(start, arguments(small, workdir)))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "Going on after step 15 of 40." in first[1]
    assert_same_run(workdir, reference)


def test_from_one_device_to_eight_and_back(small, start, reference, tmp_path):
    """One process: stopped on 1 device, then on 8, ended on 2."""
    workdir = tmp_path / "run"
    for devices, fault in ((1, ("SIGTERM", 12)), (8, ("SIGTERM", 25)), (2, None)):
        process = start(*arguments(small, workdir), devices=devices, fault=fault, **X64)
        ((status, _, stderr),) = ended([process])
        assert status == (143 if fault else 0), stderr
    assert_same_run(workdir, reference)


def test_a_damaged_checkpoint_is_passed_over_by_all(small, start, reference, tmp_path):
    workdir = tmp_path / "run"
    fault = ("SIGTERM", 31)
    process = start(*arguments(small, workdir), devices=4, fault=fault, **X64)
    ((status, _, stderr),) = ended([process])
    assert status == 143, stderr
    for step in (30, 32):  # the next save, of step 30, is below the newest
        (workdir / "checkpoints" / str(step) / "info" / "metadata").write_text("{")
    first, second = ended(start_two(start, arguments(small, workdir)))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "Passed over the checkpoint of step 30" in first[1]
    assert "Passed over the checkpoint of step 32" in first[1]
    assert "Going on after step 15 of 40." in first[1]
    assert_same_run(workdir, reference)
