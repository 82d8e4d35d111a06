"""What all programs do alike: paths with a ~, readers who are gone, threads, interrupts, no GPU."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from train import compare, evaluate, export, main, prepare, program, report

ROOT = pathlib.Path(__file__).parents[2]
SHORT = ("--config.epochs=0.1",)


def started(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    )


@pytest.fixture
def home(tmp_path, monkeypatch) -> pathlib.Path:
    """A home of one's own, and another current directory."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_a_tilde_is_the_users_home_in_every_program(home, small, capsys):
    command = ["main", f"--config={small}", *SHORT]
    assert main.main([*command, "--workdir=~/runs/x"]) == 0
    model = "--model=~/runs/x/model.npz"
    assert program.run(lambda: evaluate.main([model])) == 0
    assert program.run(lambda: export.main([model, "--out=~/exported"])) == 0
    assert program.run(lambda: report.main(["~/runs/x"])) == 0
    assert program.run(lambda: compare.main(["~/runs/x", "--out=~/compared"])) == 0
    assert main.main([*command, "--workdir=second", "--config.init_from=~/runs/x"]) == 0
    assert {path.name for path in home.iterdir()} >= {"runs", "exported", "compared"}
    assert [path.name for path in pathlib.Path().iterdir()] == ["second"]
    (home / "small.py").write_bytes(small.read_bytes())
    assert main.main(["main", "--config=~/small.py", *SHORT, "--workdir=~/runs/x"]) == 0
    assert program.path("~nobody_of_this_name/x") == pathlib.Path("~nobody_of_this_name/x")
    capsys.readouterr()


def test_it_trains_in_a_thread_and_leaves_the_signals_alone(small, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    statuses = []

    def work():
        arguments = ["main", f"--config={small}", f"--workdir={tmp_path / 'run'}", *SHORT]
        statuses.append(main.main(arguments))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert statuses == [0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.slow
def test_a_reader_who_is_gone_is_no_error(small, tmp_path):
    with started("train.main", f"--config={small}", f"--workdir={tmp_path / 'a'}", *SHORT) as run:
        run.stdout.close()
        assert run.wait(120) == 0
        assert "Traceback" not in run.stderr.read()
    assert (tmp_path / "a" / "summary.json").exists()


@pytest.mark.slow
def test_a_character_that_stdout_lacks_is_no_error(small, tmp_path):
    arguments = ("train.main", f"--config={small}", f"--workdir={tmp_path / 'ü'}", *SHORT)
    stdout, stderr = started(*arguments, PYTHONIOENCODING="ascii").communicate(timeout=120)
    assert r"everything is in" in stdout
    assert r"\xfc" in stdout
    assert "Traceback" not in stderr


PROGRAMS = {
    "train.main": ["--config=configs/digits.py", "--workdir=nowhere"],
    "train.evaluate": ["--model=nowhere"],
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.slow
def test_a_machine_without_a_gpu_is_a_sentence(name):
    process = started(name, *PROGRAMS[name], JAX_PLATFORMS="cuda")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert re.search(r"^JAX started no device \(.*\); correct JAX_PLATFORMS", stderr, re.M)
    assert "Traceback" not in stderr


@pytest.mark.parametrize("seconds", [0.3, 1.0])
@pytest.mark.slow
def test_an_interrupt_while_importing_is_a_sentence(seconds):
    process = started("train.evaluate", "--model=nowhere")
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert "Traceback" not in stderr
    if process.returncode != 2:  # on a fast machine it has read its arguments by then
        assert process.returncode == 130
        assert stderr.startswith("Stopped by SIGINT")


def test_importing_the_program_as_a_library_changes_no_signal():
    handler = signal.getsignal(signal.SIGINT)
    assert not getattr(handler, "__module__", "").startswith("train")


@pytest.mark.parametrize("each", [compare, evaluate, export, prepare, report])
def test_help_is_a_page(each, capsys):
    with pytest.raises(SystemExit) as leaving:
        each.main(["--help"])
    assert leaving.value.code == 0
    assert "usage: train." in capsys.readouterr().out
