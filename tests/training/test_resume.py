"""What a checkpoint must agree with to be continued."""

import dataclasses
import json

import pytest
import torch

from sa3dist.errors import CheckpointError
from sa3dist.runtime.process_group import Group
from sa3dist.runtime.signals import StopRequest
from sa3dist.settings import Settings
from sa3dist.training import checkpoint, resume
from sa3dist.training.checkpoint import Checkpoint
from sa3dist.training.metrics import RowsFile
from sa3dist.training.row_files import METRICS_NAME
from sa3dist.validation.history import LOSS, SET, History

# Another value of each setting that decides the numbers of a step.
OTHERS = {
    "batch_size": 2,
    "seed": 1,
    "base_precision": "fp32",
    "latents": "crop",
    "prompt_dropout": 0.2,
    "context_weight": 0.5,
    "seconds_total_of": "clip",
    "reference_numerics": True,
    "mixed_precision": "no",
    "gradient_compression": "bf16",
    "bucket_batches": 4,
}


def settings_with(**values):
    return Settings(audio_data_url="clips.zip", name="here", **values)


def checkpoint_of(settings, without=()):
    identity = {k: v for k, v in resume.identity(settings, dataset_sha256="d").items() if k not in without}
    return Checkpoint({}, {}, {"step": 3, "identity": identity})


def test_every_setting_that_decides_a_step_is_known_and_no_other():
    assert settings_with().identity().keys() == OTHERS.keys()


@pytest.mark.parametrize("key", OTHERS)
def test_a_checkpoint_of_before_a_setting_counts_as_made_with_its_default(key):
    default, other = settings_with(), settings_with(**{key: OTHERS[key]})
    for saved in (checkpoint_of(default), checkpoint_of(default, without=[key])):
        resume.check_identity(saved, resume.identity(default, dataset_sha256="d"), default)
        with pytest.raises(CheckpointError, match=f"here: holds a checkpoint with {key} .* this run has"):
            resume.check_identity(saved, resume.identity(other, dataset_sha256="d"), other)


def test_a_value_that_this_version_does_not_know_is_refused_not_ignored():
    settings = settings_with()
    newer = checkpoint_of(settings)
    newer.state["identity"]["loss_kind"] = "huber"
    with pytest.raises(CheckpointError, match="holds a checkpoint with loss_kind 'huber', this run has None"):
        resume.check_identity(newer, resume.identity(settings, dataset_sha256="d"), settings)
    newer.state["identity"] |= {"loss_kind": None, "held_out": "none"}
    resume.check_identity(newer, resume.identity(settings, dataset_sha256="d"), settings)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_that_continues_reads_and_verifies_its_checkpoint_once(tmp_path, monkeypatch, damaged):
    tensor = torch.arange(3.0)
    for step in (1, 2):
        state = {"step": step, "identity": {}}
        saved = Checkpoint(
            {"a": tensor * step}, {"exp_avg": {"a": tensor.clone()}, "exp_avg_sq": {"a": tensor.clone()}}, state
        )
        checkpoint.save(tmp_path, saved, keep=2)
    if damaged:
        (checkpoint.path_of(tmp_path, 2) / checkpoint.ADAPTER_NAME).write_bytes(b"torn")
    hashed, whole = [], checkpoint.file_sha256
    monkeypatch.setattr(checkpoint, "file_sha256", lambda path: hashed.append(path) or whole(path))
    settings = settings_with(output_dir=tmp_path, resume="auto")
    found = resume.find_checkpoint(settings, Group(0, 1, torch.device("cpu")), StopRequest())
    assert found.step == (1 if damaged else 2)
    assert torch.equal(found.adapters["a"], tensor * found.step)
    assert len(hashed) == len(set(hashed)) == (3 if damaged else 2)


def test_another_data_set_is_refused_and_a_new_measured_value_is_not_taken_for_a_default():
    settings = settings_with()
    for saved in (checkpoint_of(settings), dataclasses.replace(checkpoint_of(settings, without=["dataset_sha256"]))):
        with pytest.raises(CheckpointError, match="dataset_sha256"):
            resume.check_identity(saved, resume.identity(settings, dataset_sha256="e"), settings)


def test_rows_that_a_disk_has_damaged_are_dropped_and_keep_no_run_from_going_on(tmp_path):
    path = tmp_path / METRICS_NAME
    rows = [{"step": 0, SET: "a"}, {"step": 1}, {"step": 2}]
    good = [json.dumps({**row, LOSS: 1.0}).encode() + b"\n" for row in rows]
    path.write_bytes(good[0] + b"\xff\0\x80\n" + good[1] + good[2])
    assert [step for step, _ in History.read(tmp_path, "a").losses] == [1, 2]
    RowsFile(path, 1)
    assert path.read_bytes() == good[0] + good[1]
