"""A deterministic run that compiles whole blocks: the same bits in every process, warm or cold, from any step on."""

import re
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from sa3dist.training import acceleration, shape_ladder
from tests.helpers.processors import trust_instructions
from tests.helpers.program import run
from tests.helpers.same_runs import assert_same_training
from tests.helpers.trainers import make_settings

STEPS, CONTINUED_AT = 2, 1


def programs(work_dir):
    """What the compiler has written there, but for the number by which a process counts its programs."""
    texts = [path.read_text() for path in (work_dir / "compiled").rglob("*") if path.suffix in (".py", ".cpp")]
    return {re.sub("# AOT ID: .*", "", text) for text in texts}


@pytest.mark.parametrize(
    ("choice", "deterministic", "may_fail"), [("auto", False, True), ("on", False, False), ("auto", True, False)]
)
@pytest.mark.parametrize("tiny_name", ["tiny-sa3"])
def test_a_deterministic_run_ends_where_the_compiler_fails_and_compiles_for_its_longest_micro_batch(
    tiny_base, monkeypatch, choice, deterministic, may_fail
):
    told, falls_back = [], []
    monkeypatch.setattr(acceleration, "compile_blocks", lambda *_, **given: told.append(given))
    monkeypatch.setattr(acceleration, "fall_back_on_failure", lambda: falls_back.append(True))
    settings = make_settings(compile=choice, deterministic=deterministic, duration=2, batch_size=3)
    acceleration.compile_whole_blocks(tiny_base, settings)
    frames = int(min(2.0, tiny_base.native_seconds) * tiny_base.sample_rate_hz) // tiny_base.samples_per_frame
    tokens = 3 * (tiny_base.dit.transformer.memory + frames) if deterministic else None
    assert told == [{"whole": not may_fail, "tokens": tokens}]
    assert falls_back == [True] * may_fail


@pytest.fixture
def compiled_run(words, tmp_path, monkeypatch):
    """A function that trains as a new process would, on a cache of kernels of its own or one that another has left.

    Returns the output directory, of micro batches with given context and without the tokens of the first, and how many
    graphs were compiled.
    """
    fill, first = shape_ladder.ShapeLadder.__call__, {}

    def filled(ladder, batch):
        found = fill(ladder, batch)
        first.setdefault(found.has_context, found.packing.table_5K.shape[1])
        return found

    trust_instructions(monkeypatch)
    # The clips are short: else all of them were filled up to one length.
    monkeypatch.setattr(shape_ladder, "LEAST_TOKENS", 16)
    monkeypatch.setattr(shape_ladder.ShapeLadder, "__call__", filled)

    def start(name, kernels):
        torch._dynamo.reset()
        torch._inductor.utils.clear_caches()
        counters.clear()
        first.clear()
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / kernels / "compiled"))
        given = [f"number_of_steps={STEPS}", "save_every=1", f"keep_checkpoints={STEPS}"]
        given += ["duration=12", "adapter_products=formed", "compile=on"]
        assert run(words, tmp_path / name, *given) == 0
        return tmp_path / name, dict(first), counters["inductor"]["fxgraph_cache_miss"]

    yield start
    torch._dynamo.reset()


@pytest.mark.slow
# Processes that compile beside it would each import torch first, and so would those that try this CPU's instructions.
@torch._inductor.config.patch({"compile_threads": 1})
def test_a_deterministic_run_has_the_same_bits_however_its_kernels_were_come_by(compiled_run, tmp_path):
    straight, first, compiled = compiled_run("straight", "first")
    assert compiled > 0
    warm, _, compiled = compiled_run("warm", "first")
    assert compiled == 0
    assert_same_training(straight, warm)
    # As one that was killed, and compiles anew where it is continued: clips of another length come first.
    shutil.copytree(straight, tmp_path / "continued")
    for step in range(CONTINUED_AT + 1, STEPS + 1):
        shutil.rmtree(tmp_path / "continued" / "checkpoints" / f"step-{step:08d}")
    continued, others, compiled = compiled_run("continued", "second")
    assert compiled > 0
    assert any(tokens != first[has_context] for has_context, tokens in others.items())
    assert_same_training(straight, continued)
    assert programs(tmp_path / "second") <= programs(tmp_path / "first")
