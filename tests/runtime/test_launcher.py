"""Variables of a launcher that are there in part are refused: such a process would train alone in silence."""

import pytest

from sa3dist import train
from sa3dist.errors import ConfigError
from sa3dist.runtime import launcher

ALL = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_RANK")


@pytest.fixture
def environment(monkeypatch):
    def given(**values):
        for name in ALL:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    given()
    return given


@pytest.mark.parametrize(
    ("values", "dist_rank", "peers"),
    [
        ({}, 0, False),
        ({"RANK": 3, "LOCAL_RANK": 1, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}, 3, True),
        # Kubeflow's PyTorchJob; a job of one pod; MPI, where the rank has another name.
        ({"RANK": 1, "WORLD_SIZE": 2}, 1, True),
        ({"RANK": 0, "WORLD_SIZE": 1}, 0, False),
        ({"WORLD_SIZE": 2, "OMPI_COMM_WORLD_RANK": 1}, 0, True),
        # Left in a shell, and as good as none.
        ({"RANK": 0, "LOCAL_RANK": 0}, 0, False),
        ({"RANK": -1, "LOCAL_RANK": -1}, 0, False),
    ],
)
def test_what_launchers_set_is_taken(environment, values, dist_rank, peers):
    environment(**values)
    launcher.check()
    assert (launcher.dist_rank_from_environment(), launcher.has_peers()) == (dist_rank, peers)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"RANK": 1}, "RANK=1 in the environment, but no WORLD_SIZE"),
        ({"LOCAL_RANK": 1}, "LOCAL_RANK=1 in the environment, but no WORLD_SIZE"),
        ({"RANK": 4, "WORLD_SIZE": 4}, "RANK=4 in the environment, but WORLD_SIZE=4"),
        ({"RANK": 1, "WORLD_SIZE": 1}, "RANK=1 in the environment, but WORLD_SIZE=1"),
        ({"RANK": 1, "WORLD_SIZE": 0}, "RANK=1 in the environment, but WORLD_SIZE=0"),
        ({"WORLD_SIZE": 4}, "WORLD_SIZE=4 in the environment, but no RANK"),
        ({"WORLD_SIZE": 4, "LOCAL_RANK": 0}, "WORLD_SIZE=4 in the environment, but no RANK"),
        ({"RANK": "high"}, "RANK=high in the environment: expected a number"),
        ({"WORLD_SIZE": "", "RANK": 0}, "WORLD_SIZE= in the environment: expected a number"),
        ({"LOCAL_WORLD_SIZE": "2.5"}, "LOCAL_WORLD_SIZE=2.5 in the environment: expected a number"),
    ],
)
def test_what_no_launcher_sets_is_refused_and_reported(environment, values, told, tmp_path, capfd):
    environment(**values)
    assert train.main([f"output_dir={tmp_path / 'out'}", f"audio_data_url={tmp_path}"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(told)
    assert (tmp_path / "out/status.json").exists()


def test_a_rank_that_joins_fewer_than_there_are_is_refused(environment):
    environment(RANK=1, WORLD_SIZE=2)
    launcher.check_joined(2)
    # On a GPU Accelerate joins nobody without it.
    with pytest.raises(ConfigError, match="WORLD_SIZE=2 in the environment, but 1 joined, for LOCAL_RANK is not set"):
        launcher.check_joined(1)
    environment()
    launcher.check_joined(1)
