"""Every benchmark answers --help, and measures nothing then."""

import importlib
import pathlib
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"
NAMES = [
    path.stem for path in FOLDER.glob("*.py") if 'if __name__ == "__main__"' in path.read_text()
]


@pytest.mark.parametrize("name", NAMES)
def test_help_is_a_page(name, monkeypatch, capsys):
    results = {path: path.stat().st_mtime_ns for path in (FOLDER / "results").iterdir()}
    try:
        module = importlib.import_module(f"benchmarks.{name}")
    except ModuleNotFoundError as error:
        pytest.skip(f"no {error.name} here")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as leaving:
        module.main()
    assert leaving.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")
    assert {path: path.stat().st_mtime_ns for path in (FOLDER / "results").iterdir()} == results
