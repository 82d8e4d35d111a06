"""The comparison of backbones goes on where it was stopped, and takes means of what is there."""

import json
import sys

import pytest

from benchmarks import backbones, common


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The results file, in a folder of its own."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(backbones, "RESULTS", tmp_path)
    return tmp_path / "backbones.jsonl"


def record(cell, accuracy=0.9, nonzero=20, sparse_macs=300):
    figures = {"accuracy": accuracy, "nonzero": nonzero, "prunable": 200}
    return {**cell._asdict(), **figures, "sparse_macs": sparse_macs, "macs": 1000}


def start(monkeypatch, *arguments):
    """Runs the program with a `run` that trains nothing; gives the cells that it ran."""
    ran = []

    def run(cell, runs):
        ran.append(cell)
        return record(cell)

    monkeypatch.setattr(backbones, "run", run)
    monkeypatch.setattr(sys, "argv", ["backbones", *map(str, arguments)])
    backbones.main()
    return ran


def test_every_cell_is_one_of_its_kind():
    cells = list(backbones.cells(["lenet", "resnet"]))
    assert len(cells) == len(set(cells)) == 14 * 3 + 14 * 2
    assert {cell.sparsity for cell in cells if cell.method == "2:4"} == {0.5}


def test_it_goes_on_where_it_was_stopped(results, tmp_path, monkeypatch):
    first = start(monkeypatch, "--runs", tmp_path, "--most", 3)
    then = start(monkeypatch, "--runs", tmp_path, "--networks", "lenet", "--methods", "asl")
    rest = start(monkeypatch, "--runs", tmp_path)
    assert len(first) == 3
    assert {cell.method for cell in then} == {"asl"}
    every = list(backbones.cells(["lenet", "resnet"]))
    assert sorted([*first, *then, *rest]) == sorted(every)
    assert start(monkeypatch, "--runs", tmp_path) == []
    assert len(results.read_text().splitlines()) == len(every)


def test_points_are_means_over_the_seeds_that_are_there(results):
    lines = [
        record(backbones.Cell("lenet", "erk", 0.9, 0), 0.8, 20, 300),
        record(backbones.Cell("lenet", "erk", 0.9, 2), 0.9, 22, 500),
        record(backbones.Cell("resnet", "erk", 0.9, 0), 0.1),
    ]
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (point,) = backbones.points("lenet", backbones.finished())
    assert point == backbones.Point(
        "erk", 0.9, [0.8, 0.9], pytest.approx(0.105), pytest.approx(0.4)
    )


def test_it_shows_tables_and_pictures(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(backbones, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    start(monkeypatch, "--runs", tmp_path, "--networks", "lenet", "--most", 4)
    assert start(monkeypatch, "--show") == []
    captured = capsys.readouterr()
    assert "| dense" in captured.out
    assert "66 runs are missing" in captured.err
    for name in ("weights_left", "macs_left"):
        assert (tmp_path / "docs" / f"backbones_{name}.png").stat().st_size > 10_000
