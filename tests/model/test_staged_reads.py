"""Tensors read in pieces are those of the mapped file, by any number of threads; a file that was cut is said."""

import itertools
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from sa3dist.adapters import adapted_layers, attach_adapter
from sa3dist.errors import CheckpointError
from sa3dist.model import staged_reads
from sa3dist.model.checkpoint import CheckpointFile
from sa3dist.model.loading import load_base
from sa3dist.model.staged_reads import StagedFile, in_threads
from tests.helpers.golden import golden


@pytest.fixture
def file(tmp_path):
    """Tensors of every stored format, of no, one and many entries, whose values round in every direction."""
    draw = torch.Generator().manual_seed(1)
    shapes = (), (0,), (1, 0, 1), (1,), (3, 7), (257,), (5, 1, 41)
    formats = torch.float32, torch.bfloat16, torch.float16, torch.float64
    tensors = {
        f"{number}.{stored}": torch.randn(shape, generator=draw, dtype=torch.float64).mul(3e4).to(stored)
        for number, (shape, stored) in enumerate(itertools.product(shapes, formats))
    }
    tensors["integers"] = torch.arange(9, dtype=torch.int16)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("staged_bytes", [8, 64, 1 << 20])
def test_pieces_of_any_size_read_by_several_threads_round_to_the_bits_of_the_whole(file, monkeypatch, staged_bytes):
    monkeypatch.setattr(staged_reads, "STAGED_BYTES", staged_bytes)
    expected, opened = load_file(file), StagedFile(file)
    wanted = [
        (name, dtype)
        for name in expected
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        if name != "integers"
    ]
    random.Random(2).shuffle(wanted)
    with ThreadPoolExecutor(4) as executor:
        found = list(executor.map(lambda one: opened.read(one[0], "cpu", one[1]), wanted))
    for (name, dtype), value in zip(wanted, found, strict=True):
        assert value.dtype == dtype
        assert torch.equal(value, expected[name].to(dtype))
    assert not opened.holds("integers")


def test_no_more_memory_is_taken_than_the_tensor_and_one_piece(tmp_path, monkeypatch):
    save_file({"large": torch.randn(1 << 16)}, tmp_path / "large.safetensors")
    monkeypatch.setattr(staged_reads, "STAGED_BYTES", 1 << 12)
    made, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **named: made.append(empty(*a, **named)) or made[-1])
    opened = StagedFile(tmp_path / "large.safetensors")
    opened.read("large", "cpu", torch.bfloat16)
    assert sorted(value.nbytes for value in made) == [1 << 12, 2 << 16]


def test_a_file_cut_after_it_was_opened_is_refused_and_not_read_past_its_end(file):
    opened = StagedFile(file)
    # The format puts the widest numbers first.
    begin = opened.begin_of("23.torch.float64")
    with file.open("r+b") as cut:
        cut.truncate(begin + 803)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ends before its last tensor; the file is cut off"):
        opened.read("23.torch.float64", "cpu", torch.float32)


def test_what_takes_the_place_of_a_file_that_was_checked_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3)}, path)
    monkeypatch.setattr(staged_reads, "staged", lambda device: True)
    opened = CheckpointFile(path)
    save_file({"b": torch.zeros(2)}, tmp_path / "other")
    (tmp_path / "other").replace(path)
    assert torch.equal(opened.read("a", (3,), "cpu", torch.float32), torch.ones(3))


def test_a_base_and_its_adapter_read_by_threads_are_those_of_the_mapped_file(monkeypatch):
    def made(kind):
        base = load_base(golden("tiny-sa3"), dtype=torch.bfloat16)
        attach_adapter(base, kind, rank=2)
        return base.state_dict() | {
            f"{name} {what}": value
            for name, layer in adapted_layers(base).items()
            for what, value in vars(layer.adapter.frozen).items()
            if value is not None
        }

    expected, by_pieces, read = [made("bora"), made("dora-rows-xs")], [], StagedFile.read
    monkeypatch.setattr(staged_reads, "staged", lambda device: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(StagedFile, "read", lambda self, *given: by_pieces.append(given) or read(self, *given))
    for mapped, found in zip(expected, [made("bora"), made("dora-rows-xs")], strict=True):
        assert found.keys() == mapped.keys()
        assert all(torch.equal(found[name], mapped[name]) for name in mapped)
    assert len(by_pieces) > 100


def test_work_in_threads_keeps_its_order_and_after_a_failure_nothing_more_begins(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(staged_reads, "THREADS", 3)
    done, failed = [], threading.Event()

    def work(number):
        if number == 5:
            failed.set()
            raise OSError("no more")
        if number > 5:
            failed.wait(10)
            # All of it would take 3 s: a failure that ends it is heard of earlier, on a busy machine too.
            time.sleep(1e-3)
        done.append(number)
        return -number

    for device in ("cpu", "cuda:0"):
        done.clear()
        failed.clear()
        assert list(in_threads(work, range(5), device)) == [0, -1, -2, -3, -4]
        with pytest.raises(OSError, match="no more"):
            list(in_threads(work, range(10_000), device))
        assert len(done) < 10_000
