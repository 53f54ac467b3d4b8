"""Compiling ahead: the programs it makes are those a run needs, and a run goes on whatever becomes of it."""

import io
import re
import subprocess
import sys

import pytest
import torch
from torch._guards import TracingContext

import sa3dist
from sa3dist.adapters.formed import Formed
from sa3dist.errors import Interrupted
from sa3dist.runtime import cuda_driver
from sa3dist.runtime.process_group import Group
from sa3dist.runtime.signals import StopRequest
from sa3dist.training import acceleration, compile_ahead, compile_processes
from sa3dist.training.compile_ahead import CompilingAhead, form_and_finish, small_base, take_passes
from sa3dist.training.startup_times import Startup
from tests.helpers.program import STEPS, run, short_run
from tests.helpers.trainers import make_settings

ONE = Group(0, 1, torch.device("cuda"))
FORMED = {"adapter_products": "formed", "rank": 4, "duration": 2, "base_precision": "fp32"}


class Programs:
    """A compiler that runs what it is given as it is, and keeps what a cache would find it by."""

    def __init__(self):
        self.seen = set()

    def __call__(self, graph, inputs):
        kinds = tuple((x.dtype, x.ndim, x.requires_grad) if isinstance(x, torch.Tensor) else type(x) for x in inputs)
        configs = repr([config.save_config_portable() for config in (torch._inductor.config, torch._functorch.config)])
        # Sizes that vary are numbered anew in every process.
        program = re.sub(r"\bs\d+\b", "s", graph.code)
        # What the compiler chooses by, where it is told.
        shapes = TracingContext.get().fake_mode.shape_env
        hints = sorted(shapes.var_to_hint_override.values())
        self.seen.add((program, kinds, configs, torch.backends.cuda.matmul.fp32_precision, *hints))
        return graph.forward


@pytest.mark.parametrize("deterministic", [False, True])
def test_what_is_compiled_ahead_is_what_a_run_of_more_blocks_and_other_clips_compiles(
    demo_clips, demo_base, demo_work, tmp_path, monkeypatch, deterministic
):
    ours, ahead = Programs(), Programs()
    torch._dynamo.reset()
    config = sa3dist.load_base(demo_base, encoder=False).config
    # Before the run: what it sets is for its process.
    outside = []
    with monkeypatch.context() as noted:
        for name in ("form", "finish"):
            noted.setattr(Formed, name, lambda self, name=name: outside.append(name))
        # Determinism is the same for both: what the first micro batch needs shows it.
        for has_context in (False,) if deterministic else (False, True):
            settings = make_settings(compile="on", deterministic=deterministic, **FORMED)
            if deterministic:
                # As the program does.
                acceleration.make_deterministic()
            small = small_base(config, settings, torch.device("cpu"), torch.float32)
            take_passes(small, settings, ahead, has_context)
        assert outside == []
        # The third process does what no pass does.
        form_and_finish(small_base(config, settings, torch.device("cpu"), torch.float32), settings)
        assert outside == ["form", "finish"]
    torch._dynamo.reset()
    original = acceleration.compile_blocks
    monkeypatch.setattr(
        acceleration, "compile_blocks", lambda dit, _, whole, tokens: original(dit, ours, whole, tokens)
    )
    words = [*short_run(demo_clips, demo_base, demo_work), "adapter_products=formed", "compile=on"]
    # Six steps have micro batches with given context and without, the first has one without.
    more = [f"deterministic={deterministic}".lower(), f"number_of_steps={1 if deterministic else STEPS}"]
    assert run(words, tmp_path / "run", *more) == 0
    torch._dynamo.reset()
    assert torch._inductor.config.deterministic is deterministic
    assert len(ours.seen) == (1 if deterministic else 2)
    assert ours.seen <= ahead.seen


@pytest.fixture
def started(monkeypatch, tmp_path):
    """A function that has ``program`` compile ahead, on what is taken for a CUDA device."""

    def start(program):
        class Process(subprocess.Popen):
            def __init__(self, _, **given):
                super().__init__([sys.executable, "-c", program], **given)

        monkeypatch.setattr(compile_processes.subprocess, "Popen", Process)
        monkeypatch.setattr(compile_ahead, "_mark", lambda *_: tmp_path / "mark")
        return CompilingAhead(make_settings(compile="on", **FORMED), ONE, torch.float32)

    return start


def test_a_run_waits_until_it_has_ended_and_says_what_it_said_when_it_failed(started, caplog):
    caplog.set_level("INFO")
    started("import sys; sys.stdin.buffer.read(); print('no room', file=sys.stderr); sys.exit(3)").wait(
        ONE, StopRequest(), Startup()
    )
    assert caplog.messages == ["not compiled ahead, the first steps take longer: no room"] * 3


def test_a_run_does_not_wait_for_ever(started, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(compile_ahead, "PATIENCE_SECONDS", 0.2)
    started("import time; time.sleep(60)").wait(ONE, StopRequest(), Startup())
    assert all("not done 0.2 s after" in said for said in caplog.messages)
    assert len(caplog.messages) == 3


def test_without_room_for_its_files_a_run_compiles_for_itself(started, caplog, monkeypatch):
    def full():
        raise OSError(28, "No space left on device")

    caplog.set_level("INFO")
    monkeypatch.setattr(compile_processes.tempfile, "TemporaryFile", full)
    started("pass").wait(ONE, StopRequest(), Startup())
    assert (
        caplog.messages == ["not compiled ahead, the first steps take longer: [Errno 28] No space left on device"] * 3
    )


def test_a_signal_ends_the_wait(started):
    compiling, stop = started("import time; time.sleep(60)"), StopRequest()
    stop.hear("SIGTERM on rank 0")
    with pytest.raises(Interrupted):
        compiling.wait(ONE, stop, Startup())
    for waiting in compiling._processes:
        waiting.process.kill()


def test_what_was_compiled_before_is_not_compiled_again(started, tmp_path):
    (tmp_path / "mark").touch()
    assert started("raise SystemExit(1)")._processes == []


def test_processes_started_early_are_the_ones_that_compile_and_what_is_not_needed_ends(started, monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_driver, "DEVICE_FILE", tmp_path)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    settings = make_settings(compile="on", work_dir=str(tmp_path / "work"), **FORMED)
    told = "import os, sys; print(os.environ['TORCHINDUCTOR_CACHE_DIR'], len(sys.stdin.buffer.read()), file=sys.stderr)"
    started(told)
    early = compile_processes.start_early(settings, dist_rank=0)
    assert tuple(early) == compile_processes.PROGRAMS
    unused = compile_processes.start_early(settings, dist_rank=0)
    taken = list(early.values())
    ahead = CompilingAhead(settings, ONE, torch.float32, early)
    assert (ahead._processes, early) == (taken, {})
    ahead.wait(ONE, StopRequest(), Startup())
    left = list(unused.values())
    compile_processes.end_all(unused)
    assert unused == {}
    assert [waiting.process.wait(30) for waiting in left] == [0, 0, 0]
    size = len(compile_ahead.pickle.dumps((settings, ONE.device, torch.float32)))
    for waiting, expected in [(waiting, size) for waiting in taken] + [(waiting, 0) for waiting in left]:
        waiting.errors.seek(0)
        assert waiting.errors.read().decode() == f"{(tmp_path / 'work' / 'compiled').resolve()} {expected}\n"


@pytest.mark.parametrize(
    "why", ["no driver", "another rank", "no compiler wanted", "too few steps", "told to use the CPU", "made before"]
)
def test_nothing_is_started_early_for_a_run_that_will_not_compile(started, monkeypatch, tmp_path, why):
    monkeypatch.setattr(cuda_driver, "DEVICE_FILE", tmp_path / "absent" if why == "no driver" else tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true" if why == "told to use the CPU" else "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    given = {"no compiler wanted": {"compile": "off"}, "too few steps": {"compile": "auto", "number_of_steps": 100}}
    settings = make_settings(**{"compile": "on", **given.get(why, {})}, work_dir=str(tmp_path / "work"), **FORMED)
    if why == "made before":
        (tmp_path / "work" / "compiled").mkdir(parents=True)
        (tmp_path / "work" / "compiled" / "ahead-0123").touch()
    started("raise SystemExit(1)")
    assert compile_processes.start_early(settings, int(why == "another rank")) == {}


def test_one_that_has_ended_is_told_nothing_more_and_heard(started, caplog):
    caplog.set_level("INFO")
    compiling = started("import sys; print('no interpreter', file=sys.stderr); sys.exit(1)")
    compiling.wait(ONE, StopRequest(), Startup())
    assert caplog.messages == ["not compiled ahead, the first steps take longer: no interpreter"] * 3


def test_its_input_holds_the_settings_whole():
    given = io.BytesIO()
    settings = make_settings(include=["a.*"], **FORMED)
    compile_ahead.pickle.dump((settings, torch.device("cuda", 1), torch.bfloat16), given)
    given.seek(0)
    assert compile_ahead.pickle.load(given) == (settings, torch.device("cuda", 1), torch.bfloat16)
