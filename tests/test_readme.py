"""What the documents show is run: every Python block of the README and of the pages."""

import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent


def blocks(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


BLOCKS = blocks("README.md")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(source, name="README.md", names=None):
    names = {"__name__": "readme"} if names is None else names
    exec(compile(source, name, "exec"), names)
    return names


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[0][:30])
def test_python_blocks_run(block):
    run(block)


def test_the_first_example_is_one_line_and_leaves_what_it_says(capsys, tmp_path):
    assert "wrap(" in BLOCKS[0]
    names = run(BLOCKS[0])
    printed = capsys.readouterr().out.splitlines()
    total = next(line.split() for line in printed if line.startswith("all prunable"))
    # floor(0.95 (784 128 + 128 10 - 1)) + 1 of them are zero.
    assert total == ["all", "prunable", "101,632", "5,082", "95.00%"]
    assert 24_000 < (tmp_path / "model.npz").stat().st_size < 25_500
    assert sum(leaf.size * 4 for leaf in jax.tree.leaves(names["state"].params)) == 407_080


def test_the_pieces_leave_the_sparsity_that_they_ask_for(capsys):
    run(next(block for block in BLOCKS if "# 5" in block))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in printed if line.startswith("kernel")] == [
        ["kernel", "784x10", "7,840", "392", "95.00%"]
    ]


def test_the_blocks_of_backbones_are_one_program():
    names = {"__name__": "backbones"}
    for block in blocks("docs/backbones.md"):
        run(block, "docs/backbones.md", names)
    weights = (names["params"], names["r"])
    gradient = jax.grad(names["loss_fn"])(weights, jax.numpy.ones((8, 64)))
    assert gradient[1]["kernel"] != 0


def test_the_blocks_of_your_loop_are_one_program(capsys):
    names = {"__name__": "your_loop"}
    for block in blocks("docs/your-loop.md"):
        run(block, "docs/your-loop.md", names)
    assert "95.00%" in capsys.readouterr().out


def test_there_are_blocks():
    assert len(BLOCKS) >= 8
    assert sum("wrap(" in block for block in BLOCKS[:4]) == 4
