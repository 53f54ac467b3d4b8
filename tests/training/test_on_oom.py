"""``on_oom: adapt`` over several starts of a run: which of them recompute blocks, and that this changes no loss."""

import json

import pytest
import torch

from sa3dist import errors
from sa3dist.runtime.exit_status import STATUS_NAME, forget_status, translate
from sa3dist.training import trainer
from tests.helpers.program import rows, run, status


@pytest.fixture
def small_memory(monkeypatch):
    """The fourth micro batch, and later ones, fit only with recomputed blocks."""
    whole, calls = trainer.micro_batch_loss, []

    def micro_batch_loss(base, *arguments, **keywords):
        calls.append(base.gradient_checkpointing)
        if len(calls) >= 4 and not base.gradient_checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return whole(base, *arguments, **keywords)

    monkeypatch.setattr(trainer, "micro_batch_loss", micro_batch_loss)
    return calls


def test_the_next_start_recomputes_blocks_and_ends_with_the_losses_of_an_undisturbed_run(words, tmp_path, small_memory):
    assert run(words, tmp_path / "undisturbed", "gradient_checkpointing=on") == 0
    small_memory.clear()
    output_dir, more = tmp_path / "run", ["on_oom=adapt", "save_every=2"]
    assert run(words, output_dir, *more) == 75
    said = status(output_dir)
    assert (said["state"], said["step"], said["out_of_memory_at_step"]) == ("interrupted", 3, 4)
    assert "run the same command to continue with recomputed blocks" in said["message"]
    # Nothing new is saved: the rows and checkpoints are those of step 2.
    assert [path.name for path in (output_dir / "checkpoints").iterdir()] == ["step-00000002"]
    assert small_memory == [False] * 4
    # A stop in between: the note is in the checkpoint by then.
    assert run(words, output_dir, *more, "number_of_steps=4") == 0
    assert "out_of_memory_at_step" not in status(output_dir)
    assert run(words, output_dir, *more) == 0
    assert all(small_memory[4:])
    assert [row["loss"] for row in rows(output_dir)] == [row["loss"] for row in rows(tmp_path / "undisturbed")]
    described = json.loads((output_dir / "config.json").read_text())
    assert (described["gradient_checkpointing"], described["out_of_memory_at_step"]) == (True, 4)


def test_on_oom_fail_ends_with_70_and_its_next_start_recomputes_nothing(words, tmp_path, small_memory):
    assert run(words, tmp_path / "run") == 70
    said = status(tmp_path / "run")
    assert "out_of_memory_at_step" not in said
    assert "on_oom=adapt" in said["message"]
    small_memory.clear()
    assert run(words, tmp_path / "run") == 70
    assert not any(small_memory)


@pytest.mark.parametrize(
    ("content", "noted"), [('{"out_of_memory_at_step": 4}', 4), ('{"step": 4}', None), ("[1]", None), ("{", None)]
)
def test_a_status_is_forgotten_whatever_it_holds_and_only_its_note_is_kept(tmp_path, content, noted):
    (tmp_path / STATUS_NAME).write_text(content)
    assert forget_status(tmp_path) == noted
    assert list(tmp_path.iterdir()) == []
    assert forget_status(tmp_path) is None
    assert forget_status(tmp_path / "none") is None


def test_a_product_that_finds_no_memory_of_its_own_is_out_of_memory_and_one_that_cannot_be_made_is_not():
    # What a rank under a memory limit said, once in four runs: else torch's allocator fails first.
    assert isinstance(translate(RuntimeError("could not execute a primitive")), errors.OutOfMemory)
    # Said where a machine forbids code made at run time, or of sizes a kernel does not take.
    assert translate(RuntimeError("could not create a primitive")) is None
