"""What a run does before its first step: singular bases found once and kept, and every part's seconds told."""

import gc
import importlib
import json
import math
import subprocess
import sys
import time

import pytest
import torch
import triton

from sa3dist import train
from sa3dist.adapters import BasesCache, adapter_parameters, attach_adapter, svd_bases
from sa3dist.adapters.svd_bases import gram_bases, singular_bases
from sa3dist.errors import EnvironmentFailure
from sa3dist.model.loading import load_base
from sa3dist.runtime.lasting_imports import lasting_imports
from sa3dist.runtime.process_group import Group
from sa3dist.training import rank_checks, startup_times
from sa3dist.training.startup_times import Startup, imported_beside, keep_kernels_in, libraries_beside
from tests.helpers.golden import golden

CPU = torch.device("cpu")


def weight(fan_out, fan_in):
    return torch.randn(fan_out, fan_in, generator=torch.Generator().manual_seed(fan_out))


@pytest.mark.parametrize("shape", [(40, 13), (13, 40), (20, 20)])
def test_bases_by_the_gram_matrix_are_those_of_a_float64_svd(shape):
    given = weight(*shape)
    left, right = gram_bases(given, 5)
    exact_left, _, exact_right = torch.linalg.svd(given.double(), full_matrices=False)
    signs = torch.sign((left * exact_left[:, :5]).sum(0))
    torch.testing.assert_close(left * signs, exact_left[:, :5], rtol=0, atol=1e-10)
    torch.testing.assert_close(right * signs, exact_right[:5].t(), rtol=0, atol=1e-10)


def test_a_weight_of_too_low_a_rank_is_left_to_the_svd():
    assert gram_bases(weight(30, 3) @ weight(3, 20), 4) is None
    assert gram_bases(torch.zeros(6, 4), 1) is None


def test_kept_bases_are_the_ones_found_and_are_not_found_again(tmp_path, monkeypatch):
    given = weight(12, 9)
    found = BasesCache(tmp_path / "kept", "a base", CPU)("layer", given, 3)
    for mine, expected in zip(found, singular_bases(given, 3), strict=True):
        assert torch.equal(mine, expected)
    asked = []
    monkeypatch.setattr(svd_bases, "singular_bases", lambda *_: asked.append(_) or found)
    again = BasesCache(tmp_path / "kept", "a base", CPU)("layer", given, 3)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert asked == []
    # Another base, layer or rank is another file.
    BasesCache(tmp_path / "kept", "another base", CPU)("layer", given, 3)
    BasesCache(tmp_path / "kept", "a base", CPU)("another layer", given, 3)
    BasesCache(tmp_path / "kept", "a base", CPU)("layer", given, 2)
    assert len(asked) == 3


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_damaged_bases_are_made_anew_and_said(tmp_path, caplog, damage):
    cache, given = BasesCache(tmp_path, "a base", CPU), weight(12, 9)
    found = cache("layer", given, 3)
    path = cache.path("layer", 3)
    whole = path.read_bytes()
    damaged = {"flip": whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], "cut": whole[:-20], "empty": b""}[damage]
    path.write_bytes(damaged)
    again = cache("layer", given, 3)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert "computed again" in caplog.text
    assert path.read_bytes() == whole


def test_an_adapter_over_kept_bases_is_the_one_attached_without(tmp_path):
    attached = []
    for kept in (None, BasesCache(tmp_path, "a base", CPU), BasesCache(tmp_path, "a base", CPU)):
        base = load_base(golden("tiny-sa3"))
        attach_adapter(base, "bora-xs", rank=3, bases=kept)
        x = torch.randn(1, base.latent_channels, 6, generator=torch.Generator().manual_seed(1))
        for value in adapter_parameters(base).values():
            value.data += 0.1
        with torch.no_grad():
            prompt = torch.ones(1, base.prompt_tokens, base.config.cond_dim)
            attached.append(base.velocity(x, torch.tensor([0.5]), prompt, prompt[..., 0], torch.tensor([4.0])))
    assert torch.equal(attached[0], attached[1])
    assert torch.equal(attached[0], attached[2])


def test_a_part_counted_twice_adds_up_and_nothing_counts_after_the_first_step():
    startup = Startup()
    for part in ("load", "attach", "load", "first_step"):
        startup.begin(part)
        time.sleep(0.02)
    startup.first_step_done(0.015)
    startup.begin("later")
    startup.begin("later still")
    seconds = dict(startup.seconds)
    assert list(seconds) == ["before_run", "load", "attach", "first_batch", "first_step", "total"]
    assert seconds["load"] >= 0.04
    assert seconds["attach"] >= 0.02
    assert (seconds["first_batch"], seconds["first_step"]) == (0.015, pytest.approx(0.005, abs=1))
    assert seconds.pop("total") == pytest.approx(sum(seconds.values()))


def test_age_of_the_process_is_what_the_clock_says_since_it_was_started():
    begin = time.monotonic()
    code = "import time; time.sleep(0.3); from sa3dist.runtime.signals import seconds_since_start as s; print(s())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.3 <= float(done.stdout) <= time.monotonic() - begin + 0.02


def test_a_module_imported_beside_is_there_afterwards_and_a_failing_one_fails_where_it_is_needed(tmp_path, monkeypatch):
    (tmp_path / "imported_late.py").write_text("VALUE = 7\n")
    (tmp_path / "breaks_late.py").write_text("raise ImportError('no such part')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("imported_late", "breaks_late"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        with imported_beside(name):
            pass
    assert sys.modules["imported_late"].VALUE == 7
    with pytest.raises(ImportError, match="no such part"):
        importlib.import_module("breaks_late")


def test_libraries_are_used_beside_and_what_fails_there_stops_nothing(monkeypatch):
    used = []
    monkeypatch.setattr(startup_times, "use_libraries", lambda device: used.append(device) or 1 / 0)
    monkeypatch.setattr(startup_times, "hash_triton", lambda: 1 / 0)
    for device in (CPU, torch.device("cuda", 1)):
        with libraries_beside(device):
            pass
    assert used == [torch.device("cuda", 1)]
    monkeypatch.undo()
    startup_times.use_libraries(CPU)
    startup_times.hash_triton()
    assert triton.runtime.cache.triton_key.cache_info().currsize == 1


def test_while_a_start_imports_nothing_is_searched_for_garbage_and_afterwards_it_is():
    collections = []
    gc.callbacks.append(lambda phase, info: collections.append(phase))
    try:
        with lasting_imports():
            made = [[number] for number in range(100_000)]
            assert collections == []
        assert gc.is_tracked(made)
        # What was there stays: it is among what no collection looks through.
        assert gc.get_freeze_count() > len(made)
        assert gc.isenabled()
        del made
        circle = [[number] for number in range(100_000)]
        assert collections != []
        del circle
    finally:
        gc.callbacks.pop()
        gc.unfreeze()


def test_a_process_alone_hashes_no_adapters_and_still_refuses_those_that_are_not_finite(monkeypatch):
    monkeypatch.setattr(rank_checks, "tensors_digest", lambda tensors: pytest.fail("nobody to compare with"))
    alone, good = Group(0, 1, CPU), torch.ones(3)
    rank_checks.check_ranks_agree(alone, 4, {"a": good})
    for bad in (torch.tensor([1.0, math.nan]), torch.empty(0)):
        with pytest.raises(EnvironmentFailure, match="step 4: b is empty or not finite"):
            rank_checks.check_ranks_agree(alone, 4, {"a": good, "b": bad})


@pytest.mark.parametrize("told", [None, "/elsewhere"])
def test_kernels_are_kept_in_work_dir_unless_the_environment_names_a_place(monkeypatch, tmp_path, told):
    # Set first, so that what the function sets is undone.
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    if told:
        monkeypatch.setenv("TRITON_CACHE_DIR", told)
    keep_kernels_in(tmp_path / "kernels")
    from triton import knobs

    assert knobs.cache.dir == (told or str(tmp_path / "kernels"))


def test_a_run_tells_where_its_start_went_and_keeps_its_bases(words, tmp_path):  # noqa: F811
    more = ["adapter_type=dora-rows-xs", "include=[to_qkv]", "number_of_steps=2", f"work_dir={tmp_path / 'work'}"]
    seconds = []
    for name in ("first", "second"):
        output_dir = tmp_path / name
        assert train.main([*words, *more, f"output_dir={output_dir}"]) == 0
        rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
        assert "startup_seconds" in rows[0]
        assert "startup_seconds" not in rows[1]
        seconds.append(rows[0]["startup_seconds"])
        assert json.loads((output_dir / "config.json").read_text())["startup_seconds"] == seconds[-1]
        files = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "singular_bases").iterdir()}
        assert len(files) == 2
        seconds[-1]["files"] = files
    assert seconds[0].pop("files") == seconds[1].pop("files")
    expected = ["before_run", "load_base", "compiler", "singular_bases", "attach", "check_clips", "encode", "prepare"]
    assert list(seconds[0]) == [*expected, "acceleration", "health", "first_batch", "first_step", "total"]
    for parts in seconds:
        total = parts.pop("total")
        assert 0.5 * total < sum(parts.values()) < total + 0.1
