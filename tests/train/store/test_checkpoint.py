"""Saved states come back bit for bit or not at all, whatever happened to their files."""

import contextlib
import json
import pathlib
import shutil
import sys
import time
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from train.errors import StorageError, UserError, writing
from train.experiment import TrainState
from train.run import loop
from train.run.session import Progress
from train.store import checkpoint
from train.store.checkpoint import Checkpoints


def state_at(step: int) -> TrainState:
    """A state with all kinds of leaves, different at each step."""
    rng = np.random.default_rng(step)
    params = {
        "hidden": {"kernel": rng.normal(size=(30, 20)), "bias": rng.normal(size=20)},
        "head": {"kernel": rng.normal(size=(20, 3)).astype(ml_dtypes.bfloat16)},
    }
    params = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, leaf.dtype if leaf.itemsize == 2 else jnp.float32), params
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(optax.constant_schedule(0.1), 0.9))
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params=params,
        batch_stats={"norm": {"mean": jnp.asarray(rng.normal(size=20), jnp.float32)}},
        opt_state=jax.tree.map(
            lambda leaf: leaf + 1 if leaf.ndim else leaf + step, tx.init(params)
        ),
    )


def items(state: TrainState) -> dict:
    return Progress(state, []).items()


def saved(folder: pathlib.Path, *steps: int, keep: int = 10) -> pathlib.Path:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(items(state_at(step)), {"wall_seconds": step / 2})
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory) -> pathlib.Path:
    """The checkpoints of steps 10 and 20; tests that change them take a copy."""
    return saved(tmp_path_factory.mktemp("saved") / "checkpoints", 10, 20)


@pytest.fixture
def copy(two_saved, tmp_path) -> pathlib.Path:
    return shutil.copytree(two_saved, tmp_path / "run" / "checkpoints")


def restored(folder: pathlib.Path) -> tuple[TrainState, checkpoint.Restored] | None:
    found = checkpoint.restore(folder, jax.eval_shape(lambda: items(state_at(0))))
    return found and (Progress.of(found[0]).state, found[1])


def assert_same(state: TrainState, step: int) -> None:
    def same(leaf, wanted):
        assert leaf.dtype == wanted.dtype
        assert leaf.tobytes() == np.asarray(wanted).tobytes()

    jax.tree.map(same, state, state_at(step))


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_newest_comes_back_bit_for_bit(two_saved):
    state, found = restored(two_saved)
    assert_same(state, 20)
    assert found.info["wall_seconds"] == 10
    assert found.passed_over == {}


def test_nothing_saved_is_nothing_restored(tmp_path):
    assert restored(tmp_path / "checkpoints") is None
    (tmp_path / "checkpoints").mkdir()
    assert restored(tmp_path / "checkpoints") is None


def test_the_newest_are_kept(tmp_path):
    folder = saved(tmp_path / "checkpoints", 1, 2, 3, 4, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["3", "4"]


# TensorStore calls back into an event loop that Orbax closed when the read failed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

DAMAGES = {
    "removed": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 8),
    "one bit": lambda path: path.write_bytes(flipped(path.read_bytes(), 0.5)),
    "the last bit": lambda path: path.write_bytes(flipped(path.read_bytes(), 1)),
}


def flipped(data: bytes, where: float) -> bytes:
    """`data` with a bit flipped at this fraction of it."""
    changed = bytearray(data)
    if changed:
        changed[round(where * (len(changed) - 1))] ^= 1
    return bytes(changed)


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damaged_file_is_taken_for_whole(copy, damage, tmp_path):
    """Each file in turn: either it did not matter, or the checkpoint before is used."""
    passed_over = 0
    for name in contents(copy / "20"):
        trial = shutil.copytree(copy, tmp_path / "trial")
        DAMAGES[damage](trial / "20" / name)
        state, found = restored(trial)
        assert_same(state, int(state.step))
        assert (int(state.step) == 10) == (20 in found.passed_over), name
        passed_over += len(found.passed_over)
        shutil.rmtree(trial)
    assert passed_over >= 3


def flip_in_arrays(folder: pathlib.Path) -> None:
    """Flips a bit in the largest file of arrays, which is their values."""
    values = max((folder / "variables").rglob("d/*"), key=lambda path: path.stat().st_size)
    values.write_bytes(flipped(values.read_bytes(), 0.6))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: shutil.rmtree(folder / "variables"), "it has no variables"),
        (lambda folder: shutil.rmtree(folder / "optimizer"), "it has no optimizer"),
        (lambda folder: shutil.rmtree(folder / "info"), "it has no info"),
        (lambda folder: (folder / "info" / "metadata").write_text("{"), "it cannot be read"),
        (lambda folder: (folder / "info" / "metadata").write_text("[1]"), "it cannot be read"),
        (lambda folder: (folder / "info" / "metadata").write_text("{}"), "it cannot be read"),
        (lambda folder: shutil.rmtree(folder / "variables" / "d"), "it cannot be read"),
        (flip_in_arrays, "is not what was saved, by its CRC-32"),
    ],
)
def test_what_is_passed_over_is_told_with_the_reason(copy, damage, reason):
    damage(copy / "20")
    before = contents(copy)
    state, found = restored(copy)
    assert_same(state, 10)
    assert reason in found.passed_over[20]
    assert "\n" not in found.passed_over[20]
    assert contents(copy) == before


def test_a_digest_that_was_changed_counts_as_damage(copy):
    """Also where the info's own digest agrees."""
    path = copy / "20" / "info" / "metadata"
    info = json.loads(path.read_text())
    del info["digest"]
    info["digests"]["variables/params/head/kernel"] += 1
    path.write_text(json.dumps(info | {"digest": checkpoint.info_digest(info)}))
    _, found = restored(copy)
    assert "variables/params/head/kernel is not what was saved" in found.passed_over[20]


def test_no_bit_of_the_info_is_taken_for_another(copy):
    """Each bit in turn: it says the same as before, as with white space, or is damage."""
    path = copy / "20" / "info" / "metadata"
    whole, info = path.read_bytes(), json.loads(path.read_bytes())
    damaged = 0
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            _, read = checkpoint.read(copy / "20", items=())
        except checkpoint.Damaged:
            damaged += 1
        else:
            assert read.items() <= info.items()
    assert damaged > 7.5 * len(whole)


def test_what_cannot_be_read_is_a_sentence(two_saved, monkeypatch):
    """Root may read everything, so the system's refusal is a pretended one."""

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(pathlib.Path, "iterdir", refuse)
    with pytest.raises(UserError, match=r"checkpoints cannot be read \(Permission denied\)"):
        restored(two_saved)


def test_a_renamed_checkpoint_counts_as_damage(copy):
    (copy / "10").rename(copy / "30")
    state, found = restored(copy)
    assert_same(state, 20)
    assert found.passed_over == {30: "it is of step 10"}


def test_none_whole_is_one_sentence_and_changes_nothing(copy):
    for step in ("10", "20"):
        flip_in_arrays(copy / step)
    before = contents(copy)
    with pytest.raises(
        UserError, match=r"No checkpoint in .* is whole .*20.*new --workdir"
    ) as info:
        restored(copy)
    assert "\n" not in str(info.value)
    assert contents(copy) == before


def test_damage_is_moved_aside_and_training_saves_again_below_it(copy):
    flip_in_arrays(copy / "20")
    damaged = contents(copy / "20")
    for aside_then, steps in ((["20"], (15, 20)), (["20", "20.1"], (20,))):
        _, found = restored(copy)
        aside = checkpoint.set_aside(copy, list(found.passed_over))
        assert sorted(path.name for path in aside.iterdir()) == aside_then
        saved(copy, *steps)
        assert_same(restored(copy)[0], 20)
        flip_in_arrays(copy / "20")
    assert contents(aside / "20") == damaged


def test_a_save_that_orbax_refuses_is_an_error(two_saved):
    checkpoints = Checkpoints(two_saved, 10)
    with pytest.raises(UserError, match="step 15 was refused"):
        checkpoints.save(items(state_at(15)), {})
    checkpoints.close()


def test_an_unfinished_save_is_nothing_and_is_removed(copy):
    (copy / "20").rename(copy / "20.orbax-checkpoint-tmp")
    assert checkpoint.unfinished(copy) == ["20.orbax-checkpoint-tmp"]
    state, found = restored(copy)
    assert_same(state, 10)
    assert found.passed_over == {}
    saved(copy, 20)
    assert checkpoint.unfinished(copy) == []
    assert_same(restored(copy)[0], 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.replace(params=state.params | {"head": {"kernel": np.ones(3)}}),
            r"head/kernel as bfloat16\[20, 3\], and the model as float64\[3\]",
        ),
        (
            lambda state: state.replace(params=state.params | {"more": np.ones(3)}),
            "it has no variables/params/more, which the model needs",
        ),
        (
            lambda state: state.replace(batch_stats={}),
            "it has variables/batch_stats/norm/mean, which the model does not",
        ),
    ],
)
def test_another_models_checkpoint_is_an_error(two_saved, change, message):
    with pytest.raises(UserError, match=f"another model's: .*{message}"):
        checkpoint.restore(two_saved, items(change(state_at(0))))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["params", "batch_stats", "opt_state"])
def test_what_is_not_finite_is_never_saved(copy, part, value):
    state = state_at(30)
    poisoned = jax.tree.map(
        lambda leaf: leaf.at[-1].set(value) if leaf.ndim == 1 else leaf, getattr(state, part)
    )
    checkpoints = Checkpoints(copy, 10)
    with pytest.raises(UserError, match="became NaN or infinite before step 30 was saved"):
        checkpoints.save(items(state.replace(**{part: poisoned})), {})
    checkpoints.close()
    assert_same(restored(copy)[0], 20)


def fill(path: pathlib.Path) -> None:
    """Takes all the room that is left on a disk."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_full_disk_loses_nothing_and_the_next_save_works(tiny_disk):
    folder = tiny_disk(4_000_000) / "checkpoints"
    checkpoints = Checkpoints(folder, 2)
    checkpoints.save(items(state_at(1)), {})
    checkpoints.save(items(state_at(2)), {})
    checkpoints.wait()
    filler = folder.parent / "filler"
    fill(filler)
    checkpoints.save(items(state_at(3)), {})
    with pytest.raises(StorageError, match=r"step 3 could not be written.*make room"):
        checkpoints.wait()
    assert_same(restored(folder)[0], 2)
    filler.unlink()
    checkpoints.save(items(state_at(4)), {})
    checkpoints.close()
    assert_same(restored(folder)[0], 4)
    assert checkpoint.unfinished(folder) == []


def test_where_the_disk_is_full_older_checkpoints_make_room(tiny_disk):
    folder = tiny_disk(4_000_000) / "checkpoints"
    saved(folder, 1, 2)
    fill(folder.parent / "filler")
    checkpoints = Checkpoints(folder, 10)
    checkpoints.save_now(items(state_at(3)), {})
    assert checkpoints.latest == 3
    checkpoints.close()
    assert_same(restored(folder)[0], 3)


def test_what_would_not_fit_removes_nothing(tiny_disk):
    folder = tiny_disk(1_000_000) / "checkpoints"
    saved(folder, 1, 2)
    checkpoints = Checkpoints(folder, 10)
    large = state_at(3).replace(batch_stats={"norm": np.random.default_rng(0).normal(size=10**6)})
    with pytest.raises(StorageError, match=r"step 3 could not be written.*No space left on device"):
        checkpoints.save_now(items(large), {})
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir() if path.name.isdecimal()) == ["1", "2"]


def session(checkpoints: Checkpoints, sync, say) -> types.SimpleNamespace:
    """What `loop.save` takes of a `Session`."""
    return types.SimpleNamespace(
        checkpoints=checkpoints,
        journal=types.SimpleNamespace(sync=sync, say=say),
        wall_seconds=lambda: 0.0,
        experiment=types.SimpleNamespace(data=types.SimpleNamespace(sizes={})),
    )


def test_that_the_save_before_failed_does_not_cost_the_last_one(tiny_disk):
    """There is room again when the run is stopped: its state is saved, and the failure told."""
    folder = tiny_disk(4_000_000) / "checkpoints"
    checkpoints = Checkpoints(folder, 2)
    fill(folder.parent / "filler")
    checkpoints.save(items(state_at(1)), {})
    time.sleep(0.5)  # so that it fails
    (folder.parent / "filler").unlink()
    said = []
    loop.save(session(checkpoints, lambda: None, said.append), Progress(state_at(2), []), must=True)
    assert_same(restored(folder)[0], 2)
    (line,) = said
    assert "step 1 could not be written" in line
    assert line.endswith("The present state is tried in its place.")
    checkpoints.close()


def test_what_is_still_being_saved_costs_no_older_checkpoint(tiny_disk):
    """It has the last room, which is free again when it has ended; the metrics come after it."""
    folder = saved(tiny_disk(4_000_000) / "checkpoints", 1, 2)
    being_written = folder.parent / "being_written"

    class StillSaving(Checkpoints):
        def wait(self):
            being_written.unlink(missing_ok=True)
            super().wait()

    def sync():
        with writing(folder.parent):
            (folder.parent / "metrics.jsonl").write_bytes(bytes(8192))

    checkpoints = StillSaving(folder, 10)
    fill(being_written)
    loop.save(session(checkpoints, sync, print), Progress(state_at(3), []), must=True)
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3"]


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        Checkpoints(tmp_path / "file" / "checkpoints", 3)


def test_nothing_that_a_file_names_is_imported_or_unpickled(copy, monkeypatch):
    """Every name of a Python type in the metadata is replaced by that of a module on the path."""
    module = copy.parent / "hostile_module.py"
    module.write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(module.parent)
    replaced = 0
    for path in (copy / "20").rglob("*"):
        if path.name in ("_METADATA", "_CHECKPOINT_METADATA"):
            text = path.read_text()
            for name in ("np.ndarray", "orbax.checkpoint._src", "numpy.ndarray"):
                replaced += text.count(name)
                text = text.replace(name, "hostile_module.Hostile")
            path.write_text(text)
    assert replaced
    events = []
    watching = True

    def watch(event, arguments):
        if watching and event in ("pickle.find_class", "import", "exec", "compile"):
            events.append((event, str(arguments[0])))

    sys.addaudithook(watch)
    state, _ = restored(copy)
    watching = False
    assert_same(state, int(state.step))
    assert "hostile_module" not in sys.modules
    assert not [event for event in events if event[0] == "pickle.find_class"]
    assert not [event for event in events if "hostile" in event[1]]
