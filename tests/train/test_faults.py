"""A run that was killed, stopped, starved of disk or damaged ends as if nothing had happened."""

import json
import os
import pathlib
import re
import shutil
import signal
import struct
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

import feather_jax as feather
from train import command_line, parallel
from train import main as program
from train.errors import StorageError, UserError
from train.main import main
from train.run import journal
from train.store import checkpoint

# TensorStore calls back into an event loop that Orbax closed when the write failed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def arguments(small: pathlib.Path, workdir: pathlib.Path, *more: str) -> list[str]:
    return ["--config", str(small), "--workdir", str(workdir), *more]


def config(small: pathlib.Path, *more: str):
    return command_line.parse(["main", *arguments(small, small.parent, *more)]).config


def run(small: pathlib.Path, workdir: pathlib.Path, *more: str) -> list[str]:
    """Runs in this process, and returns what was said."""
    said: list[str] = []
    program.run(config(small, *more), workdir, said.append)
    return said


def weights(workdir: pathlib.Path) -> dict[str, bytes]:
    found = checkpoint.newest(workdir / "checkpoints")
    return {name: leaf.tobytes() for name, leaf in found.leaves.items()}


def records(workdir: pathlib.Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = (workdir / "metrics.jsonl").read_bytes().split(b"\n")
    assert lines.pop() == b""
    loaded = map(json.loads, lines)
    return [{k: v for k, v in each.items() if k != "examples_per_second"} for each in loaded]


def assert_ended_alike(workdir: pathlib.Path, reference: pathlib.Path) -> None:
    """The same bits in weights and model, the same metrics and summary."""
    assert weights(workdir) == weights(reference)
    assert records(workdir) == records(reference)
    models = [feather.load(folder / "model.npz") for folder in (workdir, reference)]
    jax.tree.map(np.testing.assert_array_equal, *models)
    summaries = [json.loads((each / "summary.json").read_text()) for each in (workdir, reference)]
    for summary in summaries:
        for name in ("wall_seconds", "inference/compiled_seconds", "inference/xla_seconds"):
            assert summary.pop(name) > 0
    assert summaries[0] == summaries[1]


def scalars(workdir: pathlib.Path) -> list[tuple[int, str, float]]:
    """TensorBoard's (step, tag, value) in the order of the file, without what the clock gives."""
    (path,) = (workdir / "tensorboard").iterdir()
    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack_from("<Q", data)
        end = 12 + length + 4  # length, its checksum, the event, its checksum
        assert len(data) >= end
        event = Event.FromString(data[12 : end - 4])
        events += [(event.step, each.tag, each.simple_value) for each in event.summary.value]
        data = data[end:]
    return [each for each in events if each[1] != "examples_per_second"]


@pytest.fixture(scope="module")
def undisturbed(small, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    run(small, workdir)
    assert [each["step"] for each in records(workdir)] == [*range(4, 22, 4), 22, *range(24, 45, 4)]
    return workdir


def files(folder: pathlib.Path) -> dict[pathlib.Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def at_step(monkeypatch, actions) -> None:
    """Calls `actions[step]()` when the metrics of `step` are read."""
    read = journal.Journal.read

    def read_after_action(self, number, metrics, evaluation=None):
        actions.get(number, lambda: None)()
        return read(self, number, metrics, evaluation)

    monkeypatch.setattr(journal.Journal, "read", read_after_action)


@pytest.mark.slow
def test_killed_and_stopped_again_and_again(small, start, tmp_path):
    """SIGKILL before the first checkpoint, in a save, in an evaluation, at the end; and others."""
    reference = tmp_path / "reference"
    assert start(*arguments(small, reference)).wait(120) == 0
    statuses = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 143, "SIGINT": 130}
    workdir = tmp_path / "run"
    faults = [
        ("SIGKILL", 5),
        ("SIGTERM", 13),
        ("SIGKILL", 22),
        ("SIGKILL", 31),
        ("SIGINT", 37),
        ("SIGKILL", 44),
        ("SIGKILL", "model.npz"),
        ("SIGKILL", "curves.png"),
        ("SIGKILL", "summary.json"),
    ]
    for name, step in faults:
        process = start(*arguments(small, workdir), fault=(name, step))
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == statuses[name], stderr
        if name != "SIGKILL":
            # The step after the one whose metrics were read had been dispatched.
            said = f"Stopped by {name} after step {step + 1}, which is saved"
            assert said in stderr
            assert checkpoint.newest(workdir / "checkpoints").leaves["optimizer/step"] == step + 1
    process = start(*arguments(small, workdir))
    stdout, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "Going on after step 44 of 44" in stdout
    # A stopped run saved more often, which is no part of what it ends with.
    assert_ended_alike(workdir, reference)
    assert scalars(workdir) == scalars(reference)
    assert {path.name for path in workdir.iterdir()} == {path.name for path in reference.iterdir()}
    steps = [step for step, tag, _ in scalars(workdir) if tag == "train/loss"]
    assert steps == [each["step"] for each in records(workdir)]


@pytest.mark.slow
def test_a_signal_to_all_processes_stops_a_run_with_workers(small, start, small_imagenet, tmp_path):
    """As a terminal and Slurm send it: to the program and to the workers that decode."""
    data = {
        "name": "imagenet2012",
        "mean": (0.5,) * 3,
        "std": (0.2,) * 3,
        "image_size": 32,
        "workers": 2,
        "data_dir": str(small_imagenet),
    }
    workdir = tmp_path / "run"
    command = arguments(
        small,
        workdir,
        f"--config.data={data}",
        "--config.batch_size=4",
        "--config.epochs=2000",
        "--config.eval_every_epochs=1000",
        "--config.log_every_steps=1",
    )
    process = start(*command, start_new_session=True)
    while process.poll() is None and not (workdir / "checkpoints" / "10").exists():
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    assert "Traceback" not in stderr
    (step,) = map(int, re.findall("Stopped by SIGTERM after step ([0-9]+), which is saved", stderr))
    assert checkpoint.newest(workdir / "checkpoints").leaves["optimizer/step"] == step


def test_a_finished_run_started_again_trains_nothing(small, undisturbed, tmp_path, monkeypatch):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    monkeypatch.setattr(journal.Journal, "read", lambda *args: pytest.fail("trained"))
    assert "Going on after step 44 of 44." in run(small, workdir)
    assert_ended_alike(workdir, undisturbed)
    for name in ("metrics.jsonl", "config.json", "model.npz"):
        assert (workdir / name).read_bytes() == (undisturbed / name).read_bytes()


def damage(workdir: pathlib.Path, step: int) -> None:
    arrays = workdir / "checkpoints" / str(step) / "variables"
    values = max(arrays.rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(values.read_bytes())
    data[len(data) // 2] ^= 1
    values.write_bytes(data)


def test_a_damaged_checkpoint_is_told_moved_aside_and_made_good(small, undisturbed, tmp_path):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    damage(workdir, 44)
    damage(workdir, 40)
    (workdir / "checkpoints" / "50.orbax-checkpoint-tmp").mkdir()
    said = "\n".join(run(small, workdir))
    assert "Going on after step 30 of 44." in said
    for step in (40, 44):
        assert f"Passed over the checkpoint of step {step} (" in said
        assert (workdir / "checkpoints.damaged" / str(step) / "variables").is_dir()
    assert "50.orbax-checkpoint-tmp is a checkpoint that was not finished; it is removed." in said
    assert_ended_alike(workdir, undisturbed)


def test_no_whole_checkpoint_is_one_sentence_and_nothing_changes(
    small, undisturbed, tmp_path, capsys
):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    for path in (workdir / "checkpoints").iterdir():
        damage(workdir, int(path.name))
    before = files(workdir)
    assert main(["main", *arguments(small, workdir)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("No checkpoint in ")
    assert before == files(workdir)


def test_results_whose_checkpoints_are_gone_are_not_overwritten(
    small, undisturbed, tmp_path, capsys
):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints")
    before = files(workdir)
    assert main(["main", *arguments(small, workdir)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{workdir} holds the results of a run and no checkpoint")
    assert before == files(workdir)


def test_a_workdir_is_one_process_s_alone(small, undisturbed, tmp_path, capsys):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    before = files(workdir)
    holding = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
    command = [sys.executable, "-c", f"{holding}print(flush=True); input()", workdir / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline()
        assert main(["main", *arguments(small, workdir)]) == 2
        assert f"Another process is training in {workdir}; " in capsys.readouterr().err
        assert before == files(workdir)
        other.communicate(b"\n")
    assert "Going on after step 44 of 44." in run(small, workdir)


def test_training_goes_on_while_the_disk_is_full(
    small, undisturbed, tmp_path, tiny_disk, monkeypatch
):
    disk = tiny_disk(8_000_000)
    filler = disk / "filler"
    at_step(monkeypatch, {14: lambda: fill(filler), 34: filler.unlink})
    said = run(small, disk / "run")
    failed = [line for line in said if "could not be written" in line or "cannot be" in line]
    assert 1 <= len(failed) <= 3
    for line in failed:
        assert line.endswith((" is tried again.", " is tried in its place."))
        assert "\n" not in line
    assert_ended_alike(disk / "run", undisturbed)


def test_a_run_that_ends_on_a_full_disk_is_saved_in_the_place_of_older_checkpoints(
    small, undisturbed, tiny_disk, monkeypatch
):
    disk = tiny_disk(8_000_000)
    filler = disk / "filler"
    at_step(monkeypatch, {24: lambda: fill(filler)})
    with pytest.raises(StorageError, match="make room"):
        run(small, disk / "run")
    monkeypatch.undo()
    assert checkpoint.newest(disk / "run" / "checkpoints").leaves["optimizer/step"] == 44
    with pytest.raises(StorageError, match="make room there"):
        run(small, disk / "run")
    filler.unlink()
    run(small, disk / "run")
    assert_ended_alike(disk / "run", undisturbed)


def fill(path: pathlib.Path) -> None:
    """Takes all the room that is left on a disk."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def test_a_disk_without_room_for_a_checkpoint_is_noticed_at_the_start(small, tiny_disk):
    disk = tiny_disk(65_536)
    with pytest.raises(StorageError, match=r"has 0\.1 MB left, and a checkpoint takes"):
        run(small, disk / "run", "--config.model.hidden=(500,)")
    assert not (disk / "run").exists()


@pytest.mark.parametrize(("every", "message"), [(10, "train/loss became nan"), (15, "NaN or inf")])
def test_divergence_keeps_the_last_good_checkpoint(small, tmp_path, monkeypatch, every, message):
    """Update 15 makes NaN of the weights, whose loss was still finite."""
    on_all_devices = parallel.on_all_devices

    def poisoned(step_function, *, donate_state):
        step = on_all_devices(step_function, donate_state=donate_state)

        def call(state, batch):
            state, metrics = step(state, batch)
            if donate_state and int(state.step) == 15:
                state = state.replace(params=jax.tree.map(lambda w: w * jnp.nan, state.params))
            return state, metrics

        return call if donate_state else step

    monkeypatch.setattr(parallel, "on_all_devices", poisoned)
    with pytest.raises(UserError, match=message) as info:
        run(small, tmp_path / "run", f"--config.checkpoint_every_steps={every}")
    assert "config.learning_rate" in str(info.value)
    if every == 10:
        assert "at step 16 (the last finite train/loss: " in str(info.value)
        assert " at step 15)" in str(info.value)
        assert checkpoint.newest(tmp_path / "run" / "checkpoints").leaves["optimizer/step"] == 10
    else:
        assert checkpoint.newest(tmp_path / "run" / "checkpoints") is None
    assert b"NaN" not in (tmp_path / "run" / "metrics.jsonl").read_bytes()
