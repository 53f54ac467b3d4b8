"""Checkpoints: what is saved comes back, what is damaged is passed over, what is half-written never shows."""

import errno
import os
from pathlib import Path

import pytest
import torch

from sa3dist.errors import CheckpointError, EnvironmentFailure
from sa3dist.parallel.flat_adamw import MOMENTS, FlatAdapters
from sa3dist.runtime.exit_status import translate
from sa3dist.runtime.launcher import requeued_job
from sa3dist.runtime.peers import pack
from sa3dist.runtime.process_group import Group
from sa3dist.training import checkpoint

ALONE = Group(0, 1, torch.device("cpu"))


def make(step):
    generator = torch.Generator().manual_seed(step)
    tensors = {name: torch.randn(3, 5, generator=generator) for name in ("model.b.lora_A", "model.a.lora_B")}
    moments = {moment: {k: torch.randn(3, 5, generator=generator) for k in tensors} for moment in MOMENTS}
    return checkpoint.Checkpoint(tensors, moments, {"step": step, "identity": {"seed": 1, "include": None}})


def assert_equal(one, other):
    assert one.adapters.keys() == other.adapters.keys()
    assert all(torch.equal(one.adapters[k], other.adapters[k]) for k in one.adapters)
    assert all(torch.equal(one.moments[m][k], other.moments[m][k]) for m in MOMENTS for k in one.adapters)
    assert one.step == other.step
    assert one.state["identity"] == other.state["identity"]


def test_a_checkpoint_reads_back_as_it_was(tmp_path):
    path = checkpoint.save(tmp_path, make(500), keep=2)
    assert path == tmp_path / "checkpoints/step-00000500"
    assert_equal(checkpoint.load(path), make(500))


@pytest.mark.parametrize(
    ("without", "said"),
    [
        ("exp_avg", "checkpoint of step 5: it lacks AdamW's exp_avg of model.a.lora_B; continue from another one"),
        ("layer", "checkpoint of step 5: its layers differ from this run's, e.g. model.b.lora_A"),
    ],
)
def test_a_checkpoint_that_lacks_a_part_is_refused_in_one_line(without, said):
    saved = make(5)
    names = list(saved.adapters)
    saved.require(names)
    if without == "layer":
        del saved.adapters["model.b.lora_A"]
    else:
        del saved.moments[without]
    with pytest.raises(CheckpointError) as refusal:
        saved.require(names)
    assert str(refusal.value).startswith(said)


def test_only_the_newest_are_kept_and_nothing_else_lies_about(tmp_path):
    for step in (1, 2, 3, 10):
        checkpoint.save(tmp_path, make(step), keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000010"]


def test_a_run_started_over_leaves_no_later_checkpoint_to_resume_from(tmp_path):
    for step in (5, 9):
        checkpoint.save(tmp_path, make(step), keep=2)
    checkpoint.save(tmp_path, make(2), keep=2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert checkpoint.find(tmp_path, "auto").step == 2


def test_a_run_from_an_earlier_step_sets_later_checkpoints_aside_and_says_which(tmp_path, caplog):
    for step in (5, 9):
        checkpoint.save(tmp_path, make(step), keep=2)
    checkpoint.set_aside(tmp_path, 5)
    (record,) = caplog.records
    assert "step-00000009: this run takes another course from step 5 on" in record.getMessage()
    assert checkpoint.find(tmp_path, "auto").step == 5
    assert_equal(checkpoint.load(tmp_path / "checkpoints-aside/step-00000009"), make(9))
    checkpoint.set_aside(tmp_path, 0)
    assert checkpoint.find(tmp_path, "auto") is None


def test_a_full_disk_is_told_with_its_path_and_leaves_the_save_before(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, make(5), keep=2)

    def fail(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space") as caught:
        checkpoint.save(tmp_path, make(9), keep=2)
    explained = translate(caught.value)
    assert (type(explained), explained.exit_code) == (EnvironmentFailure, 70)
    assert "step-00000009" in str(explained)
    assert "disk full" in str(explained)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]
    assert_equal(checkpoint.load(checkpoint.path_of(tmp_path, 5)), make(5))


def test_what_a_killed_save_left_is_swept_by_the_next(tmp_path):
    (tmp_path / "checkpoints/.step-00000003.abc").mkdir(parents=True)
    checkpoint.save(tmp_path, make(4), keep=2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


@pytest.mark.parametrize("content", ["[]", "7", "null", "{}"])
def test_a_state_file_of_another_shape_is_damage(tmp_path, content):
    path = checkpoint.save(tmp_path, make(4), keep=2)
    (path / checkpoint.STATE_NAME).write_text(content)
    with pytest.raises(CheckpointError, match="step-00000004"):
        checkpoint.load(path)


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoint.save(tmp_path, make(4), keep=2)
    checkpoint.save(tmp_path, make(4), keep=2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


@pytest.mark.parametrize("name", [checkpoint.STATE_NAME, checkpoint.ADAPTER_NAME, checkpoint.MOMENTS_NAME])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, caplog, name, damage):
    checkpoint.save(tmp_path, make(5), keep=3)
    newest = checkpoint.save(tmp_path, make(9), keep=3)
    content = bytearray((newest / name).read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    elif damage == "truncate":
        del content[len(content) // 2 :]
    (newest / name).write_bytes(content)
    if damage == "remove":
        (newest / name).unlink()
    found = checkpoint.find(tmp_path, "auto")
    assert_equal(found, make(5))
    assert "step-00000009" in caplog.text
    with pytest.raises(CheckpointError, match="step-00000009"):
        checkpoint.find(tmp_path, str(newest))


def test_a_checkpoint_of_another_version_of_the_program_is_refused_not_passed_over(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, make(3), keep=2)
    monkeypatch.setattr(checkpoint, "CHECKPOINT_VERSION", checkpoint.CHECKPOINT_VERSION + 1)
    checkpoint.save(tmp_path, make(4), keep=2)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="step-00000004: checkpoint version 3, expected 2") as refusal:
        checkpoint.find(tmp_path, "auto")
    assert pack(refusal.value, 0)[0] == "CheckpointError"


@pytest.mark.parametrize(("number", "code"), [(errno.EMFILE, 70), (errno.ESTALE, 70), (errno.EACCES, 2)])
def test_a_checkpoint_that_the_system_cannot_read_now_is_not_passed_over(tmp_path, monkeypatch, number, code):
    for step in (3, 4):
        checkpoint.save(tmp_path, make(step), keep=2)
    whole = checkpoint.file_sha256

    def read(path):
        if "step-00000004" in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return whole(path)

    monkeypatch.setattr(checkpoint, "file_sha256", read)
    with pytest.raises((OSError, CheckpointError)) as failure:
        checkpoint.find(tmp_path, "auto")
    assert translate(failure.value).exit_code == code
    assert "step-00000004" in str(translate(failure.value))
    number = errno.EIO
    assert checkpoint.find(tmp_path, "auto").step == 3


def test_a_requeued_job_goes_on_from_its_own_checkpoint_whatever_it_was_told_to_begin_with(tmp_path, monkeypatch):
    other = checkpoint.save(tmp_path / "other", make(9), keep=2)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    checkpoint.save(tmp_path, make(5), keep=3)
    monkeypatch.setenv("SLURM_JOB_ID", "8")

    def steps():
        told = {resume: checkpoint.find(tmp_path, resume, requeued_job()) for resume in ("never", str(other), "auto")}
        return [found and found.step for found in told.values()]

    # The first start, and one that was requeued before it saved anything; checkpoint 5 is of an earlier job.
    assert steps() == [None, 9, 5]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert steps() == [None, 9, 5]
    for step in (2, 3):
        checkpoint.save(tmp_path / "mine", make(step), keep=2)
    for path in (tmp_path / "mine/checkpoints").iterdir():
        path.rename(tmp_path / "checkpoints" / path.name)
    assert steps() == [3, 3, 5]
    assert checkpoint.find(tmp_path, "never", requeued_job()).directory == checkpoint.path_of(tmp_path, 3)


def test_a_folder_that_is_no_checkpoint_is_told_what_one_is_called(tmp_path):
    with pytest.raises(CheckpointError, match=r"no state.json in it, .* RUN/checkpoints/step-00000500$"):
        checkpoint.load(tmp_path)


def test_nothing_to_resume_is_no_error(tmp_path):
    assert checkpoint.find(tmp_path, "auto") is None
    checkpoint.save(tmp_path, make(1), keep=1)
    assert checkpoint.find(tmp_path, "never") is None


def _parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (4, 3), "b": (7,), "c": (2, 2)}
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def _train(parameters, steps, first=1, flat=None):
    flat = flat or FlatAdapters(parameters, learning_rate=0.05, weight_decay=0.1, scalars=2)
    for step in range(first, first + steps):
        flat.zero()
        sum((p.sin() * (k + step)).sum() for k, p in enumerate(parameters.values())).backward()
        flat.step()
    return flat


def test_the_flat_optimiser_equals_adamw_over_separate_tensors():
    ours, plain = _parameters(), _parameters()
    _train(ours, 5)
    adamw = torch.optim.AdamW(plain.values(), lr=0.05, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        adamw.zero_grad()
        sum((p.sin() * (k + step)).sum() for k, p in enumerate(plain.values())).backward()
        adamw.step()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.data, plain[name].data, atol=1e-6, rtol=1e-6)


def test_a_restored_optimiser_continues_to_the_bit():
    straight = _parameters()
    _train(straight, 7)
    stopped = _parameters()
    moments = _train(stopped, 3).moments()
    adapters = {name: value.detach().clone() for name, value in stopped.items()}
    resumed = _parameters(seed=99)
    flat = FlatAdapters(resumed, learning_rate=0.05, weight_decay=0.1, scalars=2)
    flat.restore(adapters, moments, step=3)
    _train(resumed, 4, first=4, flat=flat)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
