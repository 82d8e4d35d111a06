"""A run's folder: whose it is, what another start may change, what all processes must agree on."""

import pytest

from train import parallel
from train.errors import StorageError, UserError
from train.run.workdir import check_same_run, open_workdir


def opened(workdir, config):
    with open_workdir(workdir, config):
        return {path.name for path in workdir.iterdir()}


def test_another_start_may_change_intervals_alone(tmp_path, tiny):
    opened(tmp_path, tiny())
    check_same_run(tiny(log_every_steps=7, eval_every_epochs=0.5, keep_checkpoints=9), tmp_path)
    with pytest.raises(UserError, match=r"differs in seed \(was 0, is 1\); give"):
        check_same_run(tiny(seed=1), tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"name": "resnet8", "widths": [4, 16]}}, r"model.widths \(was \[4, 8\], is \["),
        ({"model": {"name": "resnet8"}}, r"model.widths \(was \[4, 8\], is None\)"),
        ({"data": {"name": "digits", "flip": True}}, r"data.flip \(was None, is True\)"),
    ],
)
def test_a_field_of_a_mapping_is_named_alone(tmp_path, tiny, changes, says):
    opened(tmp_path, tiny())
    with pytest.raises(UserError, match=rf"which differs in {says}"):
        check_same_run(tiny(**changes), tmp_path)


def test_what_a_kill_left_of_a_model_file_is_removed(tmp_path, tiny):
    (tmp_path / "model.npz.01234567.tmp").write_bytes(b"half")
    (tmp_path / "model.npz").write_bytes(b"whole")
    assert opened(tmp_path, tiny()) == {".lock", "config.json", "model.npz"}


def test_all_processes_have_one_configuration(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(parallel, "gather", lambda value: [value, value, value ^ 1])
    with pytest.raises(UserError, match="Process 2 was started with another configuration"):
        opened(tmp_path / "run", tiny())
    assert not (tmp_path / "run").exists()


def test_all_processes_see_the_folder(tmp_path, tiny, monkeypatch):
    answers = [[5, 5], [1, 0]]
    monkeypatch.setattr(parallel, "gather", lambda value: answers.pop(0))
    with pytest.raises(StorageError, match="Process 1 does not see what process 0 writes"):
        opened(tmp_path, tiny())
