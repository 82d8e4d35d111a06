"""Variables saved by Orbax and Flax themselves, in the forms that people save."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from train.errors import UserError
from train.store import foreign

PARAMS = {"head": {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3)}}
STATS = {"norm": {"mean": np.ones(3, np.float32)}}
FORMS = {
    "parameters": PARAMS,
    "variables": {"params": PARAMS, "batch_stats": STATS},
    "a train state": {"step": np.int32(3), "params": PARAMS, "opt_state": {"0": np.zeros(2)}},
}


def check(found, form):
    expected = {"params/head/kernel": PARAMS["head"]["kernel"]}
    if form == "variables":
        expected["batch_stats/norm/mean"] = STATS["norm"]["mean"]
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf)


@pytest.mark.parametrize("form", FORMS)
def test_orbax_checkpoints_of_one_tree(form, tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", jax.tree.map(jnp.asarray, FORMS[form]))
    check(foreign.read_orbax(tmp_path / "saved"), form)


@pytest.mark.parametrize("composite", [False, True])
def test_the_newest_step_of_an_orbax_manager(composite, tmp_path):
    with ocp.CheckpointManager(tmp_path / "managed") as manager:
        for step in (9, 10):
            tree = jax.tree.map(lambda leaf, step=step: jnp.asarray(leaf + step - 10), PARAMS)
            args = ocp.args.StandardSave(tree)
            if composite:
                other = ocp.args.StandardSave({"0": jnp.zeros(2)})
                args = ocp.args.Composite(params=args, opt_state=other)
            manager.save(step, args=args)
        manager.wait_until_finished()
    check(foreign.read_orbax(tmp_path / "managed"), "parameters")


def test_no_orbax_checkpoint_is_none(tmp_path):
    assert foreign.read_orbax(tmp_path) is None


def test_a_damaged_orbax_checkpoint_is_a_sentence(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", jax.tree.map(jnp.asarray, PARAMS))
    (tmp_path / "saved" / "_METADATA").write_text("{")
    with pytest.raises(UserError, match=r"saved cannot be read \(.*; bring back a copy\.$"):
        foreign.read_orbax(tmp_path / "saved")


@pytest.mark.parametrize("form", FORMS)
def test_flax_files(form, tmp_path):
    (tmp_path / "saved").write_bytes(flax.serialization.msgpack_serialize(FORMS[form]))
    check(foreign.read_msgpack(tmp_path / "saved"), form)


def test_other_files_are_none_and_damaged_ones_a_sentence(tmp_path):
    (tmp_path / "text").write_text("nothing of ours")
    assert foreign.read_msgpack(tmp_path / "text") is None
    np.savez(tmp_path / "arrays.npz", a=np.ones(2))
    assert foreign.read_msgpack(tmp_path / "arrays.npz") is None
    whole = flax.serialization.msgpack_serialize(FORMS["variables"])
    (tmp_path / "cut").write_bytes(whole[:-5])
    with pytest.raises(UserError, match="cut is damaged"):
        foreign.read_msgpack(tmp_path / "cut")
