"""A process joins what it is told to, or what JAX detects, or runs alone and says so."""

import jax
import pytest
from jax._src.distributed import State

from train.errors import UserError
from train.run import cluster


def test_on_a_plain_machine_it_is_alone_and_says_so():
    assert cluster.join(None, None, None) == (
        "Running in one process (no cluster detected) on 8 x cpu."
    )


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"])
def test_a_launcher_of_one_task_is_no_cluster(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: pytest.fail("joined"))
    assert "no cluster detected" in cluster.join(None, None, None)


@pytest.mark.parametrize("given", [("host:1", None, None), (None, 2, 1), ("host:1", 2, None)])
def test_the_three_flags_go_together(given):
    with pytest.raises(UserError, match="together, or none of them"):
        cluster.join(*given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host", 2, 0), "--coordinator_address is 'host'"),
        (("host:", 2, 0), "--coordinator_address is 'host:'"),
        (("host:0", 2, 0), "'host:0'"),
        (("host:65536", 2, 0), "'host:65536'"),
        (("host:http", 2, 0), "'host:http'"),
        (("host:1", 2, 2), "--process_id is 2 and --num_processes 2"),
        (("host:1", 2, -1), "--process_id is -1"),
        (("host:1", 0, 0), "--num_processes 0"),
    ],
)
def test_a_wrong_flag_is_named(given, message):
    with pytest.raises(UserError, match=message):
        cluster.join(*given)


def test_half_a_cluster_in_the_environment_is_a_sentence(monkeypatch):
    """Each process would run alone, all of them in one workdir.

    JAX is in use here, so a fresh state of its takes the place of the process's own.
    """
    monkeypatch.setattr(jax.distributed, "initialize", State().initialize)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1234")
    with pytest.raises(UserError, match=r"Number of processes .*JAX_COORDINATOR_ADDRESS"):
        cluster.join(None, None, None)
