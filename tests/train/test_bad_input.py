"""Whatever a user gets wrong is one sentence on stderr, status 2, and nothing written or lost."""

import pathlib
import re

import cv2
import numpy as np
import pytest

from train.main import main

CIFAR = pathlib.Path(__file__).parents[2] / "configs" / "cifar.py"

HEAD = "import ml_collections\n\ndef get_config():\n"

# What each file of configs holds, by the name that the table below uses.
FILES = {
    "raises.py": HEAD + '    raise ValueError("no such recipe\\nwhatever")\n',
    "divides.py": "1 / 0\n",
    "exits.py": "import sys\nsys.exit(3)\n",
    "syntax.py": "def get_config(:\n",
    "latin1.py": "# caf\xe9\ndef get_config():\n    return {}\n".encode("latin-1"),
    "no_get_config.py": "config = {}\n",
    "returns_none.py": HEAD + "    config = {}\n",
    "returns_3.py": HEAD + "    return 3\n",
    "wants_more.py": "def get_config(name):\n    return {}\n",
    "imports.py": "import nonesuch\n",
    "empty.py": HEAD + "    return ml_collections.ConfigDict()\n",
    "key_1.py": HEAD + "    return {1: 2}\n",
    "keys_mixed.py": HEAD + "    return {1: 2, 'seed': 3}\n",
    "key_in_data.py": HEAD + "    return {'data': {3: 4}}\n",
    "key_with_dot.py": HEAD + "    return {'a.b': 2}\n",
    "placeholder.py": HEAD
    + "    seed = ml_collections.config_dict.required_placeholder(int)\n"
    + "    return ml_collections.ConfigDict({'seed': seed})\n",
    "not_a_model.npz": "x",
}

# arguments after `--config SMALL --workdir NEW`, and what the sentence says
CHANGES = [
    (["--wrokdir=x"], "'--wrokdir=x' is no argument"),
    (["x"], "'x' is no argument"),
    (["--config.epochs", "3"], "--config.FIELD=VALUE"),
    (["--flagfile=/nonesuch"], "/nonesuch"),
    (["--num_processes=two"], "'two'"),
    (["--coordinator_address=localhost:1234"], "--num_processes and --process_id not given"),
    (
        ["--coordinator_address=localhost", "--num_processes=2", "--process_id=0"],
        "'localhost'; give .*port",
    ),
    (
        ["--coordinator_address=localhost:123456", "--num_processes=2", "--process_id=0"],
        "'localhost:123456'",
    ),
    (
        ["--coordinator_address=localhost:1", "--num_processes=2", "--process_id=2"],
        "--process_id is 2",
    ),
    (["--config.learnig_rate=1"], "learnig_rate is not a field.*nearest is 'learning_rate'"),
    (["--config.batch_size.x=3"], "batch_size.x"),
    (["--config.batch_size=64.5"], "batch_size=64.5"),
    (["--config.batch_size=many"], "batch_size=many"),
    (["--config.batch_size=0"], "batch_size is 0"),
    (["--config.batch_size=2000"], "2000.*only 1437 examples"),
    (["--config.batch_size=60"], "60, which 8 devices cannot share"),
    (["--config.accumulate_steps=7"], "accumulate_steps = 7"),
    (
        ['--config.model={"name": "densenet40", "growth": 1000000000}', "--config.sparsity=0"],
        "MB left, and a checkpoint takes .* MB; make room",
    ),
    (["--config.epochs=4x"], "epochs=4x"),
    (["--config.epochs=-1"], "epochs is -1.0"),
    (["--config.epochs=inf"], "epochs is inf, and it must be a finite number"),
    (["--config.epochs=1e300"], r"1e\+300, which is .* updates"),
    (["--config.learning_rate=0"], "learning_rate is 0.0"),
    (["--config.learning_rate=nan"], "learning_rate is nan"),
    (["--config.sparsity=1.0"], r"sparsity is 1.0, and it must be in \[0, 1\)"),
    (["--config.sparsity=-0.1"], "sparsity is -0.1"),
    (["--config.sparsity=90"], "sparsity is 90.0"),
    (["--config.sparsity=0.9x"], "sparsity=0.9x"),
    (["--config.p=0.5"], r"p is 0.5, and it must be in \[1, inf\]"),
    (["--config.p=nan"], "p is 'nan'"),
    (["--config.theta=-1"], "theta is -1"),
    (["--config.optimizer=adam"], "optimizer is 'adam', and it must be 'sgd' or 'adamw'"),
    (["--config.momentum=1"], "momentum is 1, and it must be less than 1"),
    (["--config.nesterov=3"], "nesterov is 3, of type int"),
    (["--config.warmup_epochs=2"], "warmup_epochs is 2.0"),
    (["--config.prune_end=3"], "ends at epoch 3.0"),
    (["--config.label_smoothing=1"], "label_smoothing is 1, and it must be less than 1"),
    (["--config.compute_dtype=float16"], "compute_dtype is 'float16'"),
    (["--config.compute_dtype=float64"], "JAX_ENABLE_X64=1"),
    (["--config.seed=-1"], "seed is -1"),
    (
        ["--config.exclude=('nothing',)"],
        "'nothing', which matches no parameter's whole path",
    ),
    (["--config.exclude=('(',)"], r"'\(', which is no regular expression"),
    (["--config.exclude=head"], "exclude is 'head', and it must be a tuple"),
    (["--config.exclude=('.*',)"], "leaves nothing to prune"),
    (["--config.freeze=('(',)"], r"freeze has '\(', which is no regular expression"),
    (["--config.freeze=('nothing',)"], "config.freeze holds 'nothing', which matches no"),
    (["--config.freeze=('.*',)"], "config.freeze leaves nothing to train"),
    (["--config.freeze=('.*kernel',)"], "and config.freeze leave nothing to prune"),
    (["--config.head=top", "--config.head_learning_rate=10"], "config.head holds 'top'"),
    (["--config.head_learning_rate=0"], "head_learning_rate is 0"),
    (["--config.log_every_steps=0"], "log_every_steps is 0"),
    (["--config.keep_checkpoints=0"], "keep_checkpoints is 0"),
    (["--config.data=digits"], "digits"),
    (["--config.data.name=imagenot"], "'imagenot'; choose one of digits"),
    (["--config.data.colour=3"], "data.colour is not a field of digits; its fields are name, mean"),
    (["--config.data.mean=(0.1,0.2)"], r"mean is \(0.1, 0.2\); digits has 1 channel"),
    (["--config.data.flip=3"], "flip is 3"),
    (["--config.model.name=resnet9000"], "'resnet9000'; known are"),
    (["--config.model.depth=3"], "model.depth is not a field of lenet300; its fields are hidden"),
    (['--config.model={"name": "lenet5"}'], "at least 16x16 pixels.*8, 8, 1"),
    (["--config.init_from=/nonesuch"], "'/nonesuch', and there is no such file or folder"),
    (["--config.init_from=FILES/not_a_model.npz"], "not_a_model.npz is damaged"),
    (["--config.init_from=FILES"], "there is no checkpoint in"),
    ([f"--config.init_from={'x' * 300}"], "x', (which cannot be read|and there is no such)"),
    (["--config.model.hidden[0]=3"], r"hidden\[0\]=3: .*see the config file"),
    (["--config.model.hidden[9]=3"], r"hidden\[9\]=3: .*see the config file"),
    (["--config..seed=1"], r"--config\.\.seed=1: "),
    (["--config."], r"--config\.: "),
    (["--config.seed.=1"], r"--config\.seed\.=1: "),
    (['--config.data={"name": "digits", 3: 4}'], "keys of several types"),
    (["--config.data[name]=3"], "keys of several types"),
    (
        ["--config.epochs=0.05", "--config.warmup_epochs=0.04"],
        "warmup_epochs is 0.04, which is 1 of all 1 updates",
    ),
    (
        ['--config.model={"name": "densenet40", "reduction": 0.001}'],
        "reduction is 0.001, which leaves none of 192 channels",
    ),
]

# whole command lines
COMMANDS = [
    ([], "Give --config"),
    (["--config", "SMALL"], "Give --config.*and --workdir"),
    (["--workdir", "NEW"], "Give --config"),
    (["--workdir", "NEW", "--config"], "Missing value for flag --config"),
    (["--config", "nonesuch.py", "--workdir", "NEW"], "'nonesuch.py', and there is no such file"),
    (["--config", "FILES", "--workdir", "NEW"], "there is no such file"),
    (
        ["--config", "x" * 300, "--workdir", "NEW"],
        "x', (which cannot be read|and there is no such)",
    ),
    (["--config", "SMALL", "--workdir", "gs://bucket/run"], "'gs://bucket/run'.*mount"),
    (["--config", "SMALL", "--workdir", "SMALL"], "small.py', which is a file"),
    (["--config", "SMALL", "--workdir", "SMALL/run"], r"cannot be written \(Not a directory\)"),
    (["--config", "SMALL", "--workdir", "/proc/run"], "/proc/run cannot be written"),
    (["--config", "SMALL", "--workdir", f"FILES/{'x' * 300}"], "File name too long"),
    *[
        (["--config", f"FILES/{name}", "--workdir", "NEW"], f"{name}.*{what}")
        for name, what in [
            ("raises.py", "ValueError in line 4: no such recipe whatever; correct the file"),
            ("divides.py", "ZeroDivisionError in line 1"),
            ("exits.py", "SystemExit in line 2: 3"),
            ("syntax.py", r"SyntaxError.*line 1"),
            ("latin1.py", "utf-8.*0xe9"),
            ("no_get_config.py", r"defines no get_config\(\)"),
            ("returns_none.py", "returned None; let it return"),
            ("returns_3.py", "returned 3; let it return"),
            ("wants_more.py", "missing 1 required positional argument: 'name'"),
            ("imports.py", "No module named 'nonesuch'"),
            ("key_1.py", "config has the key 1"),
            ("keys_mixed.py", "keys of several types"),
            ("key_in_data.py", "config.data has the key 3"),
            ("key_with_dot.py", "a.b contains one; rename it"),
            ("placeholder.py", "required_placeholder; give a value"),
        ]
    ],
    (
        ["--config", "FILES/raises.py:x", "--workdir", "NEW"],
        r"TypeError: get_config\(\) takes 0 .* was given; correct the file or its argument, 'x'",
    ),
    (
        ["--config", "FILES/cifar.py:resnet20", "--workdir", "NEW"],
        r"cifar.py raised ValueError in line \d+: .*correct the file or its argument, 'resnet20'",
    ),
    (["--config", "FILES/cifar.py:resnet20,cifar", "--workdir", "NEW"], "'cifar'; choose one of"),
    (["--config", "FILES/empty.py", "--workdir", "NEW"], "lacks the field 'data'"),
]

ALL = [
    *COMMANDS,
    *[(["--config", "SMALL", "--workdir", "NEW", *more], what) for more, what in CHANGES],
]


@pytest.fixture
def folder(tmp_path, monkeypatch, small) -> pathlib.Path:
    """The folder in which a command runs: `files`, which it may read, and nothing else."""
    (tmp_path / "files").mkdir()
    for name, text in FILES.items():
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "files" / name).write_bytes(data)
    (tmp_path / "files" / "small.py").write_bytes(small.read_bytes())
    (tmp_path / "files" / "cifar.py").write_bytes(CIFAR.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def filled_in(arguments: list[str], folder: pathlib.Path) -> list[str]:
    replaced = {
        "SMALL": str(folder / "files" / "small.py"),
        "FILES": str(folder / "files"),
        "NEW": str(folder / "run"),
    }
    return [re.sub("SMALL|FILES|NEW", lambda match: replaced[match[0]], each) for each in arguments]


def everything(folder: pathlib.Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def assert_one_sentence(stderr: str, what: str) -> None:
    assert len(stderr.splitlines()) == 1, stderr
    assert re.search(what, stderr)
    assert stderr.endswith(".\n")
    assert "Traceback" not in stderr


def test_the_table_has_forty_wrong_inputs():
    assert len(ALL) >= 40


@pytest.mark.parametrize(("arguments", "what"), ALL, ids=[" ".join(args)[-60:] for args, _ in ALL])
def test_a_mistake_is_a_sentence_and_changes_nothing(folder, arguments, what, capsys):
    before = everything(folder)
    status = main(["train.main", *filled_in(arguments, folder)])
    assert_one_sentence(capsys.readouterr().err, what)
    assert status == 2
    assert everything(folder) == before


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--config", "SMALL", "--wrokdir=x"], "Give --config"),
        (["--config", "FILES/raises.py", "--workdir", "NEW"], "no such recipe"),
        (
            ["--config", "SMALL", "--workdir", "NEW", "--config.batch_size=2000"],
            "only 1437 examples",
        ),
    ],
)
def test_so_it_is_in_a_process(folder, start, arguments, what):
    before = everything(folder)
    process = start(*filled_in(arguments, folder))
    _, stderr = process.communicate(timeout=120)
    assert_one_sentence(stderr, what)
    assert process.returncode == 2
    assert everything(folder) == before


def test_another_configuration_on_an_old_workdir_names_what_differs(folder, capsys):
    """And which fields may change: a run of 4 steps is made first."""
    run = ["train.main", "--config", str(folder / "files" / "small.py"), "--workdir", "run"]
    short = ["--config.epochs=0.2", "--config.data.flip=True"]
    assert main([*run, *short]) == 0
    before = everything(folder)
    capsys.readouterr()

    assert main([*run, *short, "--config.seed=1", "--config.sparsity=0.5"]) == 2
    stderr = capsys.readouterr().err
    assert_one_sentence(stderr, r"differs in sparsity \(was 0.9, is 0.5\), seed \(was 0, is 1\); ")
    assert everything(folder) == before

    intervals = ["log_every_steps=1", "eval_every_epochs=0.5", "checkpoint_every_steps=3"]
    changed = [f"--config.{each}" for each in (*intervals, "keep_checkpoints=1")]
    assert main([*run, *short, *changed]) == 0

    (folder / "run" / "config.json").write_text("{")
    assert main([*run, *short]) == 2
    assert_one_sentence(capsys.readouterr().err, "config.json cannot be read")


def test_a_workdir_that_may_not_be_searched_is_a_sentence(folder, monkeypatch, capsys):
    """Root may search everything, so the system's refusal is a pretended one."""
    exists = pathlib.Path.exists

    def refused(path):
        if path.name == "config.json":
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path)

    monkeypatch.setattr(pathlib.Path, "exists", refused)
    arguments = filled_in(["--config", "SMALL", "--workdir", "NEW"], folder)
    assert main(["train.main", *arguments]) == 2
    assert_one_sentence(capsys.readouterr().err, r"run cannot be written \(Permission denied\)")


def png(fill: int) -> bytes:
    return cv2.imencode(".png", np.full((32, 32, 3), fill, np.uint8))[1].tobytes()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"image": b"no image"}, "Record 3 of cifar10's split 'train' in .* is not an image; "),
        ({"label": 10}, r"Record 3 of .* has label 10, not one in \[0, 10\); "),
        (None, "cifar10 in .* has no examples in its split 'test'; "),
    ],
)
def test_bad_data_in_memory_is_a_sentence(
    folder, write_prepared, monkeypatch, capsys, change, what
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    train = [{"image": png(i), "label": i % 10} for i in range(20)]
    train[3] |= change or {}
    splits = {"train": train, "test": train[:2] if change else []}
    write_prepared(folder / "files" / "data", "cifar10", splits)
    data = {"name": "cifar10", "mean": (0.5,) * 3, "std": (0.2,) * 3, "data_dir": "files/data"}
    before = everything(folder)
    arguments = ["--config", "SMALL", "--workdir", "NEW", f"--config.data={data}"]
    status = main(["train.main", *filled_in([*arguments, "--config.batch_size=8"], folder)])
    assert_one_sentence(capsys.readouterr().err, what + "delete .*`python -m train.prepare cifar10")
    assert status == 2
    assert everything(folder) == before


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"image": b"no image"}, "Record 2 of imagenet2012's split 'train' in .* is damaged "),
        ({"label": 1000}, r"Record 2 of .* has label 1000, not one in \[0, 1000\); "),
        (None, "imagenet2012 in .* has no examples in its split 'validation'; "),
    ],
)
def test_bad_data_in_records_is_a_sentence(
    folder, write_prepared, jpeg_photographs, capsys, change, what
):
    """ImageNet's records are read as training goes, so the run's folder is there by then."""
    train = [{"image": image, "label": 1} for image in jpeg_photographs[:8]]
    train[2] |= change or {}
    splits = {"train": train, "validation": train[:2] if change else []}
    write_prepared(folder / "files" / "data", "imagenet2012", splits)
    data = {
        "name": "imagenet2012",
        "mean": (0.5,) * 3,
        "std": (0.2,) * 3,
        "image_size": 32,
        "data_dir": "files/data",
    }
    arguments = ["--config", "SMALL", "--workdir", "NEW", f"--config.data={data}"]
    status = main(["train.main", *filled_in([*arguments, "--config.batch_size=8"], folder)])
    stderr = capsys.readouterr().err.splitlines()  # with the progress bar before it
    assert_one_sentence(f"{stderr[-1]}\n", what)
    assert "Traceback" not in "".join(stderr)
    assert status == 2


def test_help_is_a_page_that_names_every_field(capsys):
    assert main(["train.main", "--help"]) == 0
    page = capsys.readouterr().out
    for name in ("--config", "--workdir", "--num_processes", "learning_rate", "keep_checkpoints"):
        assert name in page
    assert "momentum = 0.9" in page
