"""The comparison on CPUs: what is pruned, and the tables of what was measured."""

import json
import math

import pytest

pytest.importorskip("onnx")

from benchmarks import inference

KERNELS = {"stem": (7, 7, 3, 64), "body": (3, 3, 64, 64), "head": (1, 1, 64, 1000)}


@pytest.mark.parametrize("sparsity", [0.0, 0.8, 0.95])
@pytest.mark.parametrize("masks", inference.MASKS)
def test_shares_add_up(sparsity, masks):
    shares = inference.kept_shares(KERNELS, sparsity, masks)
    sizes = {name: math.prod(shape) for name, shape in KERNELS.items()}
    stem = shares.pop("stem")  # of which a global threshold leaves more than the rule says
    assert stem >= 1 - sparsity
    left = sum(shares[name] * sizes[name] for name in shares) / sum(sizes[n] for n in shares)
    assert left == pytest.approx(1 - sparsity, rel=0.15)
    if masks == "global" and sparsity:
        assert shares["body"] < shares["head"]


def row(sparsity, masks="uniform", **figures):
    case = {"network": "net", "batch": 1, "threads": 1, "sparsity": sparsity, "masks": masks}
    fixed = {"compile_seconds": 2.5, "program_bytes": 4_000_000, "difference": 1e-6}
    return {**case, **fixed, "openvino ms": 40.0, "over the better fp32": 2.0, **figures}


def test_tables_have_the_latest_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inference, "RESULTS", tmp_path)
    runs = [
        [row(0.9, ms=9.0, **{"over the better int8": 1.5}), row(0.9, "global", ms=12.0)],
        [row(0.9, ms=8.0), row(0.0, ms=39.0)],
    ]
    text = "".join(json.dumps({"rows": rows}) + "\n" for rows in runs)
    (tmp_path / "inference.jsonl").write_text(text)
    monkeypatch.setattr("sys.argv", ["inference", "--tables"])
    inference.main()
    printed = capsys.readouterr().out
    (nine,) = (line for line in printed.splitlines() if line.startswith("| 90%"))
    assert [cell.strip() for cell in nine.split("|")[2:-1]] == ["8.0", "2.0", "1.5", "12.0", "2.0"]
    assert "| 0% " in printed
    assert "Compiled in 2.5 to 2.5 s, into 4.0 to 4.0 MB" in printed
