"""Several runs side by side: what is averaged, what is drawn, and what is left out."""

import json
import pathlib
import re

import pytest

from train import compare, program
from train.look import comparison
from train.store.runs import read_run

CONFIG = {
    "data": {"name": "digits"},
    "model": {"name": "resnet8"},
    "batch_size": 64,
    "epochs": 1.0,
    "learning_rate": 0.1,
    "p": 3.0,
    "sparsity": 0.0,
    "seed": 0,
}


def write_run(workdir: pathlib.Path, accuracy: float, **config: object) -> pathlib.Path:
    """A finished run of 1,000 prunable weights."""
    workdir.mkdir(parents=True)
    given = CONFIG | config
    summary = {
        "steps": 100,
        "parameters": 1100,
        "prunable": 1000,
        "nonzero": round(1000 * (1 - float(str(given["sparsity"])))),
        "sparsity": given["sparsity"],
        "eval/accuracy": accuracy,
        "eval/loss": 0.5,
        "eval/examples": 10_000,
        "wall_seconds": 90.0,
    }
    (workdir / "config.json").write_text(json.dumps(given))
    (workdir / "summary.json").write_text(json.dumps(summary))
    (workdir / "metrics.jsonl").write_text('{"step": 100}\n')
    (workdir / "model.npz").write_bytes(bytes(1500))
    return workdir


@pytest.fixture
def sweep(tmp_path) -> list[pathlib.Path]:
    """Two seeds at two sparsities and two exponents, and two dense runs, in no order."""
    accuracies = {(3.0, 0.9): 0.9, (3.0, 0.99): 0.8, (1.0, 0.9): 0.7, (1.0, 0.99): 0.5}
    workdirs = [
        write_run(tmp_path / f"{p}_{sparsity}_{seed}", mean + d, p=p, sparsity=sparsity, seed=seed)
        for (p, sparsity), mean in accuracies.items()
        for seed, d in enumerate((-0.01, 0.01))
    ]
    for seed, accuracy in enumerate((0.94, 0.96)):
        # p is nothing to a dense run, so that these two are alike.
        name = f"dense_{seed}"
        workdirs.insert(1, write_run(tmp_path / name, accuracy, seed=seed, p=1.0 + 2 * seed))
    return workdirs


def test_runs_that_differ_in_their_seed_are_one_point(sweep):
    groups = comparison.grouped([read_run(workdir) for workdir in sweep])
    found = {(group.label, group.sparsity): group for group in groups}
    assert list(found) == [
        *[("dense", 0.0), ("p = 1", 0.9), ("p = 1", 0.99)],
        *[("p = 3", 0.9), ("p = 3", 0.99)],
    ]
    assert all(len(group.runs) == 2 for group in groups)
    assert found["dense", 0.0].accuracy == pytest.approx(0.95)
    assert found["p = 3", 0.9].accuracy == pytest.approx(0.9)
    assert found["p = 1", 0.99].density == pytest.approx(0.01)


def test_a_run_that_is_given_twice_counts_once(sweep, tmp_path, capsys):
    (tmp_path / "again").symlink_to(sweep[0])
    again = [sweep[0], sweep[0].parent / "." / sweep[0].name, tmp_path / "again"]
    assert program.run(lambda: compare.main([str(path) for path in again])) == 0
    (line,) = capsys.readouterr().out.splitlines()[2:]
    assert line.split()[4] == "1"


def test_runs_of_different_data_sets_are_said_to_be(tmp_path, capsys):
    runs = [
        write_run(tmp_path / name, 0.9, sparsity=0.9, data={"name": name})
        for name in ("digits", "mnist")
    ]
    assert program.run(lambda: compare.main([str(path) for path in runs])) == 0
    assert "These runs are of different data sets: digits, mnist." in capsys.readouterr().out


def test_where_the_comparison_cannot_be_written_out_is_named(sweep, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = [*map(str, sweep), "--out", str(tmp_path / "file" / "out")]
    assert program.run(lambda: compare.main(arguments)) == 2
    assert "give a --out that can be written" in capsys.readouterr().err


def test_the_table_has_mean_and_spread(sweep):
    found = comparison.grouped([read_run(workdir) for workdir in sweep])
    table = comparison.table(found).splitlines()
    assert " ".join(table[2].split()) == "dense 0 1 95.00% 2.00% 2 1.5 kB 1 min 30 s"
    assert " ".join(table[-1].split()) == "p = 3 0.99 100 80.00% 2.00% 2 1.5 kB 1 min 30 s"
    assert len(table) == 2 + 5


def test_the_picture_has_a_line_a_group_and_the_dense_runs_as_a_level(sweep):
    found = comparison.grouped([read_run(workdir) for workdir in sweep])
    axes = comparison.figure(found).axes[0]
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_legend().texts] == ["dense", "p = 1", "p = 3"]
    lines = {str(line.get_label()): line for line in axes.lines}
    assert list(lines["dense"].get_ydata()) == pytest.approx([0.95, 0.95])
    (container,) = [c for c in axes.containers if c.get_label() == "p = 3"]
    data, _, (bars,) = container
    assert list(data.get_xdata()) == pytest.approx([0.1, 0.01])
    assert list(data.get_ydata()) == pytest.approx([0.9, 0.8])
    ends = [sorted(segment[:, 1]) for segment in bars.get_segments()]
    assert ends == [pytest.approx([0.89, 0.91]), pytest.approx([0.79, 0.81])]


def test_models_and_data_sets_are_told_apart(tmp_path):
    runs = [
        read_run(write_run(tmp_path / name, 0.9, sparsity=0.9, model={"name": name}))
        for name in ("resnet8", "lenet5")
    ]
    assert [group.label for group in comparison.grouped(runs)] == ["lenet5", "resnet8"]
    assert [group.label for group in comparison.grouped(runs[:1])] == ["sparse"]


def test_the_program_writes_a_page_markdown_and_a_picture(sweep, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [*map(str, sweep), "--out", str(out)]
    assert program.run(lambda: compare.main(arguments)) == 0
    assert "p = 3" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"compare.html", "compare.md", "compare.png"}
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "| p = 3 | 0.99 | 100 | 80.00% | 2.00% | 2 |" in (out / "compare.md").read_text()
    page = (out / "compare.html").read_text()
    assert page.count("<svg") == 1
    assert str(sweep[0]) in page


def test_columns_are_sorted_by_their_numbers(tmp_path):
    """As texts, 3 min 20 s comes before 50 s and 1.2 MB before 24.6 kB."""
    sizes = {0.9: (50.0, 24_600), 0.95: (200.0, 1_200_000), 0.0: (3600.0, 999)}
    runs = []
    for sparsity, (seconds, size) in sizes.items():
        workdir = write_run(tmp_path / str(sparsity), 0.9, sparsity=sparsity)
        summary = json.loads((workdir / "summary.json").read_text())
        (workdir / "summary.json").write_text(json.dumps(summary | {"wall_seconds": seconds}))
        (workdir / "model.npz").write_bytes(bytes(size))
        runs.append(read_run(workdir))
    comparison.write(tmp_path / "out", runs)
    text = (tmp_path / "out" / "compare.html").read_text()
    tables = re.findall(r"<tbody>(.*?)</tbody>", text, re.DOTALL)
    cells = [re.findall(r"<td(.*?)>(.*?)</td>", row) for row in tables[0].strip().splitlines()]
    by_column = list(zip(*cells, strict=True))
    for column, shown in (
        (6, ["999 bytes", "24.6 kB", "1.2 MB"]),
        (7, ["50 s", "3 min 20 s", "1 h"]),
    ):
        numbered = sorted((float(v.split('"')[1]), text) for v, text in by_column[column])
        assert [text for _, text in numbered] == shown
    assert [len(re.findall("data-value", table)) for table in tables] == [3 * 7, 3 * 4]


def test_labels_are_text_to_matplotlib_and_to_markdown(tmp_path):
    """`$` would begin a formula, `|` the next cell."""
    runs = [
        read_run(write_run(tmp_path / str(i), 0.9, sparsity=0.9, exclude=patterns))
        for i, patterns in enumerate((["(head|stem)/kernel$", "a_{$"], []))
    ]
    comparison.write(tmp_path / "out", runs)
    assert "(head|stem)/kernel$" in (tmp_path / "out" / "compare.html").read_text()
    table = comparison.markdown(runs).splitlines()
    assert r"(head\|stem)/kernel$" in table[2] + table[3]
    assert all(re.sub(r"\\\|", "", line).count("|") == 9 for line in table)


def test_what_is_no_finished_run_is_left_out_and_named(sweep, tmp_path, capsys):
    unfinished = write_run(tmp_path / "unfinished", 0.9)
    (unfinished / "summary.json").unlink()
    torn = write_run(tmp_path / "torn", 0.9)
    (torn / "summary.json").write_text('{"steps": 1')
    poor = write_run(tmp_path / "poor", 0.9)
    (poor / "summary.json").write_text('{"steps": 1}')
    strange = write_run(tmp_path / "strange", 0.9, model="resnet8")
    bad = [unfinished, torn, poor, strange, tmp_path / "absent"]
    words = ["is not finished", "cannot be read", "lacks parameters", "config.model", "no run"]
    assert program.run(lambda: compare.main([str(path) for path in [*sweep[:2], *bad]])) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(bad)
    for line, workdir, word in zip(lines, bad, words, strict=True):
        assert str(workdir) in line
        assert word in line

    assert program.run(lambda: compare.main([str(path) for path in bad])) == 2
    assert "nothing to compare" in capsys.readouterr().err
