"""What the documents show is run: every Python block of the README, each on its own."""

import pathlib
import re

import pytest

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[0][:30])
def test_python_blocks_run(block):
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_the_first_example_prints_the_sparsity_that_it_asks_for(capsys):
    exec(compile(BLOCKS[0], "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in printed if line.startswith("kernel")] == [
        ["kernel", "784x10", "7,840", "392", "95.00%"]
    ]


def test_there_are_blocks():
    assert len(BLOCKS) >= 5
