"""The report: that it stands alone, that anyone can read it, and that its figures are right."""

import html.parser
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

import feather_jax as feather
from train import program, report
from train.errors import UserError
from train.look import inspection, page
from train.look import report as page_of
from train.store import model_file
from train.store.runs import differences, read_run

VOID = {"meta", "br", "path", "use", "rect", "img"}


class Page(html.parser.HTMLParser):
    """The elements of a page, which must close in the order in which they opened."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1][-1] += data


@pytest.fixture(scope="module")
def text(finished_run) -> str:
    return (finished_run / "report.html").read_text()


def test_the_page_stands_alone(text):
    for _, attributes in Page(text).elements:
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert not re.search(r"[^-]#00fe", text), "a colour that no variable replaced"


def test_those_who_see_no_pictures_are_told(text):
    elements = Page(text).elements
    pictures = [attributes for tag, attributes in elements if tag == "svg"]
    assert len(pictures) == 6 + 2 + 2
    for picture in pictures:
        assert picture["role"] == "img"
        assert len(str(picture["aria-label"])) > 40
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert ("html", {"lang": "en"}) in elements
    assert [tag for tag, _ in elements if re.fullmatch("h[1-6]", tag)] == ["h1"] + ["h2"] * 5


def test_the_layer_table_has_the_models_own_counts(finished_run, text):
    rows = [row for row in Page(text).cells if len(row) == 8]
    model = model_file.load(finished_run / "model.npz")
    kernel = model.variables["params"]["stage2_block1"]["conv2"]["kernel"]
    trained = report.trained_params(read_run(finished_run), model)
    trained = trained["stage2_block1"]["conv2"]["kernel"]
    (row,) = (row for row in rows if row[0] == "stage2_block1/conv2")
    left = np.count_nonzero(kernel)
    # At stride 2, 4 x 4 positions of 3 x 3 x 8 x 8 products, each weight used once at each.
    assert row[1:] == [
        "3 \N{MULTIPLICATION SIGN} 3 \N{MULTIPLICATION SIGN} 8 \N{MULTIPLICATION SIGN} 8",
        "576",
        str(left),
        f"{left / 576:.2%}",
        f"{np.abs(trained)[kernel == 0].max():.4g}",
        f"{576 * 16:,}",
        f"{left * 16:,}",
    ]
    assert [row[0] for row in rows[1:3]] == ["stem", "stage1_block1/conv1"]
    summary = json.loads((finished_run / "summary.json").read_text())
    assert rows[-1][0] == "All prunable"
    assert rows[-1][2:4] == [f"{summary['prunable']:,}", f"{summary['nonzero']:,}"]
    assert not [row for row in rows if row[0] == "head"], "it was excluded from pruning"


def test_the_figures_at_the_head(finished_run, text):
    summary = json.loads((finished_run / "summary.json").read_text())
    assert f"<dd>{summary['eval/accuracy']:.2%}</dd>" in text
    assert f"<dd>{page.size((finished_run / 'model.npz').stat().st_size)}</dd>" in text
    assert f"<dd>{summary['nonzero'] / summary['prunable']:.2%}</dd>" in text
    assert "Trained from scratch for 8 epochs" in text


def test_the_macs_are_those_of_the_whole_network(finished_run, text):
    """Counted here by hand, 3 x 3 taps on 8 x 8 or 4 x 4 positions, the dense head included."""
    positions = {"stem": 64, "stage1_block1": 64, "stage2_block1": 16, "head": 1}
    params = feather.load(finished_run / "model.npz")["params"]
    dense = sparse = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key == "kernel":
            dense += leaf.size * positions[path[0].key]
            sparse += np.count_nonzero(leaf) * positions[path[0].key]
    assert f"<dd>{page.short(sparse)}</dd><dd>dense {page.short(dense)}: " in text


def test_every_cell_of_the_layer_table_but_the_name_has_a_number_to_sort_by(text):
    body = re.search(r"Table of layers.*?<tbody>(.*?)</tbody>", text, re.DOTALL)[1]
    for row in body.strip().splitlines():
        assert [float(value) for value in re.findall(r'data-value="(.*?)"', row)]
        assert row.count("data-value") == row.count("<td") - 1 == 7


def with_config(folder: pathlib.Path, **values: object) -> pathlib.Path:
    """A run's folder with other values in its config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


def test_a_dense_run_is_next_to_nothing(finished_run, tmp_path):
    run = read_run(with_config(shutil.copytree(finished_run, tmp_path / "r"), sparsity=0.0))
    model = model_file.load(finished_run / "model.npz")
    page_of.write(run, model, model.variables["params"])
    text = (run.workdir / "report.html").read_text()
    assert "<h1>resnet8 on digits, dense</h1>" in text
    assert "times less" not in text
    assert "around the threshold" not in text
    assert len([tag for tag, _ in Page(text).elements if tag == "svg"]) == 6 + 2


def test_a_run_that_started_from_another_says_so(finished_run, tmp_path):
    folder = with_config(shutil.copytree(finished_run, tmp_path / "r"), init_from="runs/<first>")
    model = model_file.load(finished_run / "model.npz")
    page_of.write(read_run(folder), model, model.variables["params"])
    text = (folder / "report.html").read_text()
    assert "Trained from runs/&lt;first&gt; for 8 epochs" in text
    assert "from scratch" not in text


def test_a_twin_has_the_whole_configuration(finished_run, tmp_path, capsys):
    other = shutil.copytree(finished_run, tmp_path / "other")
    with_config(other, sparsity=0.0, seed=1, p=1.0, prune_end=1.0, log_every_steps=3)
    read = read_run(finished_run), read_run(other)
    assert differences(read) == []
    with_config(other, epochs=4.0, label_smoothing=0.1)
    assert program.run(lambda: report.main([str(finished_run), "--dense", str(other)])) == 2
    assert "they differ in epochs, label_smoothing; give" in capsys.readouterr().err


def test_the_program_writes_it_anew_beside_the_dense_twin(finished_run, tmp_path, capsys):
    run = shutil.copytree(finished_run, tmp_path / "run")
    first = (run / "report.html").read_text()
    (run / "report.html").unlink()
    assert program.run(lambda: report.main([str(run)])) == 0
    again = (run / "report.html").read_text()
    assert again.replace("run, trained", "finished, trained") == first

    twin = shutil.copytree(finished_run, tmp_path / "twin")
    config = json.loads((twin / "config.json").read_text()) | {"sparsity": 0.0}
    summary = json.loads((twin / "summary.json").read_text())
    (twin / "config.json").write_text(json.dumps(config))
    better = summary["eval/accuracy"] + 0.0123
    (twin / "summary.json").write_text(json.dumps(summary | {"eval/accuracy": better}))
    arguments = [str(run), "--dense", str(twin)]
    assert program.run(lambda: report.main(arguments)) == 0
    assert f"dense twin {better:.2%}: -1.23 points" in (run / "report.html").read_text()

    arguments = [str(run), "--dense", str(finished_run)]
    assert program.run(lambda: report.main(arguments)) == 2
    assert "is no dense twin" in capsys.readouterr().err


def test_the_threshold_and_the_histogram(finished_run):
    model = model_file.load(finished_run / "model.npz")
    rng = np.random.default_rng(0)
    weights = {"layer": {"kernel": rng.normal(size=(100, 100)).astype(np.float32)}}
    threshold = np.sort(np.abs(weights["layer"]["kernel"]).ravel())[8999]
    kept = np.abs(weights["layer"]["kernel"]) > threshold
    sparse = {"layer": {"kernel": np.where(kept, weights["layer"]["kernel"] / 8, 0)}}
    prunable = {"layer": {"kernel": True}}
    histogram = inspection.histogram_of(weights, sparse, prunable)
    assert histogram is not None
    assert histogram.threshold == pytest.approx(threshold)
    # The cumulative distribution of |w| at T is the sparsity, as 0, T and -T are edges of bins.
    inside = (histogram.edges[:-1] >= -1) & (histogram.edges[1:] <= 1)
    assert histogram.dense[inside].sum() == pytest.approx(9000, abs=1)
    assert histogram.dense.sum() == (np.abs(weights["layer"]["kernel"]) <= 3 * threshold).sum()
    assert (histogram.weights, histogram.pruned) == (10_000, 9000)
    assert histogram.sparse.sum() == 1000
    assert (
        histogram.sparse[(histogram.edges[1:] > 0.75) | (histogram.edges[:-1] < -0.75)].sum() == 0
    )
    assert inspection.histogram_of(weights, weights, prunable) is None
    assert model.metadata.trained.examples == 1437


@pytest.mark.parametrize(
    ("number", "short", "size"),
    [
        (0, "0", "0 bytes"),
        (999, "999", "999 bytes"),
        (999.6, "1k", "1 kB"),
        (24_613, "24.6k", "24.6 kB"),
        (999_999, "1M", "1 MB"),
        (4_089_184_256, "4.09G", "4.09 GB"),
    ],
)
def test_numbers_for_people(number, short, size):
    assert (page.short(number), page.size(number)) == (short, size)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.4, "3 s"), (59.6, "1 min"), (200, "3 min 20 s"), (3600, "1 h"), (90_061, "25 h 1 min")],
)
def test_durations_for_people(seconds, text):
    assert page.duration(seconds) == text


def test_what_comes_from_outside_is_escaped():
    text = page.render("compare.html", title="<b>", picture="", headers=["<i>"], rows=[], runs=[])
    assert "&lt;b&gt;" in text
    assert "<b>" not in text
    assert "<i>" not in text


def test_a_damaged_newest_checkpoint_is_one_sentence(finished_run, tmp_path, capsys):
    """An older one holds other weights than those that model.npz was made of."""
    run = shutil.copytree(finished_run, tmp_path / "run")
    before = (run / "report.html").read_bytes()
    newest = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name))
    shutil.copytree(newest, newest.with_name("1"))
    shutil.rmtree(newest / "variables")
    assert program.run(lambda: report.main([str(run)])) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert f"The checkpoint of step {newest.name}" in printed
    assert (run / "report.html").read_bytes() == before


def test_another_models_checkpoint_is_one_sentence(finished_run):
    model = model_file.load(finished_run / "model.npz")
    model.variables["params"]["stem"]["kernel"] = np.zeros((3, 3, 1, 5), np.float32)
    with pytest.raises(UserError, match=r"stem/kernel as .*, and the model as float32\[3, 3, 1, 5"):
        report.trained_params(read_run(finished_run), model)


def test_a_missing_checkpoint_is_one_sentence(finished_run, tmp_path, capsys):
    run = shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    assert program.run(lambda: report.main([str(run)])) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert pathlib.Path(run / "report.html").exists()


def test_thresholds_of_blocks_are_of_blocks():
    rng = np.random.default_rng(0)
    dense = {"layer": {"kernel": rng.normal(size=(8, 6)).astype(np.float32), "bias": np.zeros(6)}}
    magnitude = feather.block_magnitude((4, 1))
    blocks = np.sort(np.asarray(magnitude(dense["layer"]["kernel"])).ravel())
    sparse = feather.sparsify(dense, blocks[20], magnitude=magnitude)
    found = inspection.thresholds_of(dense, sparse, magnitude)
    assert found == {"layer/bias": 0.0, "layer/kernel": blocks[20]}
