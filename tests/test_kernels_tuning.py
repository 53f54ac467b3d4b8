"""Choosing and remembering the fastest configuration of a kernel: measured once per device, format and sizes."""

import json
import logging

import pytest
import torch

pytest.importorskip("triton")
from sa3dist_kernels import tuning  # noqa: E402

SLOW, FAST = {"block": 16}, {"block": 32}
LIKE = torch.ones(3, 2)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A device on which ``FAST`` is the faster; lists every configuration that is timed."""
    asked = []
    tuning._table.cache_clear()
    monkeypatch.setattr(tuning, "_may_choose", lambda like: True)
    monkeypatch.setattr(tuning, "_recording", lambda: False)
    monkeypatch.setattr(tuning, "_path", lambda device: tmp_path / "cache" / "device.json")

    def milliseconds(run):
        run()
        return 1.0 if asked[-1] == FAST else 2.0

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    yield asked
    tuning._table.cache_clear()


def choose(asked, sizes=(64, 8), candidates=(SLOW, FAST)):
    return tuning.chosen("op", sizes, LIKE, candidates, asked.append)


def test_the_fastest_is_measured_once_and_remembered_across_processes(measured, tmp_path):
    assert choose(measured) == FAST
    assert measured == [SLOW, FAST]
    assert choose(measured) == FAST
    # What a new process does: it has only the file.
    tuning._table.cache_clear()
    assert choose(measured) == FAST
    assert len(measured) == 2
    assert json.loads((tmp_path / "cache/device.json").read_text()) == {"op, torch.float32, 64, 8": FAST}
    choose(measured, sizes=(128, 8))
    assert len(measured) == 4


def test_choices_of_two_processes_end_in_one_file(measured, tmp_path):
    choose(measured)
    path = tmp_path / "cache/device.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of another process": SLOW}))
    choose(measured, sizes=(128, 8))
    assert set(json.loads(path.read_text())) == {
        "op, torch.float32, 64, 8",
        "of another process",
        "op, torch.float32, 128, 8",
    }


@pytest.mark.parametrize("content", ["{", json.dumps({"op, torch.float32, 64, 8": {"block": 7}})])
def test_a_damaged_file_or_a_forgotten_configuration_is_measured_anew(measured, tmp_path, content, caplog):
    path = tmp_path / "cache/device.json"
    path.parent.mkdir()
    path.write_text(content)
    assert choose(measured) == FAST
    assert json.loads(path.read_text())["op, torch.float32, 64, 8"] == FAST
    assert ("cannot be read" in caplog.text) == (content == "{")


def test_a_folder_that_cannot_be_written_is_said_and_costs_only_the_memory(measured, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert choose(measured) == choose(measured) == FAST
    assert len(measured) == 2
    assert "cannot be written" in caplog.text


def test_while_a_graph_is_captured_a_known_choice_serves_and_nothing_is_measured(measured, monkeypatch):
    assert choose(measured) == FAST
    monkeypatch.setattr(tuning, "_recording", lambda: True)
    assert choose(measured) == FAST
    assert choose(measured, sizes=(128, 8)) == SLOW
    assert len(measured) == 2
    monkeypatch.setattr(tuning, "_recording", lambda: False)
    assert choose(measured, sizes=(128, 8)) == FAST


def test_without_a_device_to_measure_the_first_candidate_serves():
    asked = []
    assert choose(asked) == SLOW
    assert asked == []


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.folder() == tmp_path / "sa3dist" / "tuning"
    monkeypatch.setenv(tuning.FOLDER_VARIABLE, str(tmp_path / "own"))
    assert tuning.folder() == tmp_path / "own"


def test_clips_of_like_length_share_a_choice():
    assert [tuning.bucket(tokens) for tokens in (0, 1, 16, 17, 387, 512, 4160)] == [16, 16, 16, 32, 512, 512, 8192]
