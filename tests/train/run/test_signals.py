"""SIGINT and SIGTERM are noted and leave as found; a second SIGINT does not wait."""

import pathlib
import signal
import subprocess
import sys

import pytest

from train import main as program
from train.main import main
from train.run.signals import Interrupted, Interruption

DIGITS = pathlib.Path(__file__).parents[3] / "configs" / "digits.py"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_the_handlers_come_back(signum):
    before = signal.getsignal(signum)
    with Interruption() as interruption:
        assert interruption.signal_after(1) == 0
        signal.raise_signal(signum)
        assert interruption.signal_after(2) == signum
    assert signal.getsignal(signum) == before


def test_the_first_signal_counts():
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert interruption.signal_after(1) == signal.SIGTERM


def test_a_second_sigint_ends_the_process_at_once():
    program = (
        "import signal\n"
        "from train.run.signals import Interruption\n"
        "with Interruption():\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    print('noted', flush=True)\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    print('still here')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGINT
    assert done.stdout == "noted\n"


def test_the_message_says_what_came_and_what_is_saved():
    assert str(Interrupted(signal.SIGTERM, 7)) == (
        "Stopped by SIGTERM after step 7, which is saved; the same command goes on."
    )


def test_before_the_first_step_an_interrupt_is_a_sentence(monkeypatch, tmp_path, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "run", interrupted)
    arguments = ["--config", str(DIGITS), "--workdir", str(tmp_path)]
    assert main(["train.main", *arguments]) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Stopped by SIGINT; ")
