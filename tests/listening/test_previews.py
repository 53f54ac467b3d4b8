"""Previews during training: what they are of, and that neither they nor their failures change a run."""

import json
import signal
import time

import pytest
import soundfile
import torch

import sa3dist
from sa3dist import cli
from sa3dist.adapters import adapter_parameters, attach_adapter, detach_adapter, formed_once
from sa3dist.listening import previews
from sa3dist.listening.previews import Previews, PreviewSteps, default_prompts
from sa3dist.model.compiled import compile_blocks, compile_elementwise, uncompiled
from sa3dist.model.dit import modulated_norm
from sa3dist.model.generation import Generation
from sa3dist.runtime.process_group import Group
from sa3dist.runtime.signals import StopRequest
from sa3dist.training import checkpoint
from tests.helpers.adapter_base import move
from tests.helpers.forked_trainers import ForkedTrainer, forked_ranks
from tests.helpers.program import STEPS, rows, run, short_run, status
from tests.helpers.same_runs import assert_same_training
from tests.helpers.trainers import make_settings

ON = ["preview_every=4", "preview_seconds=0.6", "preview_steps=2", "preview_cfg=3", "preview_seed=7"]
HOW = Generation(seconds=0.6, steps=2, cfg_scale=3.0, seed=7)
MADE_AT = [0, 4, STEPS]


@pytest.fixture(scope="module")
def short_words(demo_clips, demo_base, demo_work):
    return short_run(demo_clips, demo_base, demo_work)


@pytest.fixture(scope="module")
def silent(short_words, tmp_path_factory):
    """The output directory of a run without previews."""
    output_dir = tmp_path_factory.mktemp("silent") / "run"
    assert run(short_words, output_dir) == 0
    return output_dir


@pytest.fixture(scope="module")
def heard(short_words, tmp_path_factory):
    """The same with previews."""
    output_dir = tmp_path_factory.mktemp("heard") / "run"
    assert run(short_words, output_dir, *ON, "num_workers=1") == 0
    return output_dir


def adapters_of(output_dir):
    return checkpoint.find(output_dir, "auto").adapters


def clips(output_dir, step):
    folder = output_dir / "previews" / f"step-{step:08d}"
    found = sorted(folder.glob("*.flac"), key=lambda path: int(path.stem))
    return [torch.from_numpy(soundfile.read(path, dtype="float32")[0].T) for path in found]


def near(found, expected, tolerance=1e-5):
    torch.testing.assert_close(torch.stack(list(found)), torch.stack(list(expected)), rtol=0, atol=tolerance)


def test_previews_change_no_bit_of_the_training(silent, heard):
    assert not (silent / "previews").exists()
    assert_same_training(silent, heard)


def test_previews_are_of_the_base_at_first_and_then_of_the_adapters_as_they_were(heard, demo_base):
    assert [path.name for path in sorted((heard / "previews").iterdir())] == [f"step-{step:08d}" for step in MADE_AT]
    about = [json.loads((heard / f"previews/step-00000004/{number}.json").read_text()) for number in range(4)]
    prompts = [text["prompt"] for text in about]
    assert len(set(prompts)) == 4
    assert prompts[-1] == ""
    assert {(text["step"], text["seed"], text["seconds"], text["steps"]) for text in about} == {(4, 7, 0.6, 2)}
    base = sa3dist.load_base(demo_base, encoder=False)
    how = {"seconds": 0.6, "steps": 2, "cfg_scale": 3.0, "seed": 7}
    near(clips(heard, 0), base.generate(prompts, **how))
    attach_adapter(base, rank=4)
    saved = adapters_of(heard)
    with torch.no_grad():
        for name, parameter in adapter_parameters(base).items():
            parameter.copy_(saved[name])
    near(clips(heard, STEPS), base.generate(prompts, **how))
    assert (clips(heard, 4)[0] - clips(heard, 0)[0]).abs().max() > 1e-4
    names = {path.name for path in (heard / "previews/step-00000000").iterdir()}
    assert names == {f"{number}.{suffix}" for number in range(4) for suffix in ("flac", "json", "png")}


def test_the_command_generates_what_the_last_preview_was(heard, tmp_path):
    text = json.loads((heard / f"previews/step-{STEPS:08d}/0.json").read_text())
    words = "--seconds", "0.6", "--steps", "2", "--cfg", "3", "--seed", "7", "--prompt", text["prompt"]
    newest = heard / "checkpoints" / f"step-{STEPS:08d}"
    for number, source in enumerate((heard, newest, heard / "lora.safetensors")):
        output = tmp_path / str(number)
        assert cli.main(["generate", "--adapter", str(source), *words, "--output", str(output)]) == 0
        sound = torch.from_numpy(soundfile.read(output / "0.flac", dtype="float32")[0].T)
        # The file holds float16.
        learned = (clips(heard, STEPS)[0] - clips(heard, 0)[0]).norm()
        assert (sound - clips(heard, STEPS)[0]).norm() < 0.01 * learned


def test_their_time_is_in_the_metrics(heard):
    found = {row["step"]: row for row in rows(heard)}
    assert [step for step, row in found.items() if "previews_seconds" in row] == [1, 4, STEPS]
    assert all(found[step]["previews_missing"] == 0 for step in (1, 4, STEPS))
    assert found[1]["startup_seconds"]["previews"] > 0


def test_the_time_of_a_step_does_not_hold_that_of_previews(short_words, tmp_path, monkeypatch):
    def slow(*_):
        time.sleep(3)
        return 3.0, 1

    monkeypatch.setattr(Previews, "make", slow)
    assert run(short_words, tmp_path / "run", *ON, "number_of_steps=1") == 0
    (row,) = rows(tmp_path / "run")
    assert (row["previews_seconds"], row["previews_missing"]) == (6.0, 2)
    assert row["step_seconds"] < 3


@pytest.mark.slow
def test_two_ranks_make_the_previews_of_one(short_words, tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    short_words = [*short_words, *ON, "number_of_steps=1"]
    assert run(short_words, alone, "gradient_accumulation_steps=2") == 0
    words = [*short_words, f"output_dir={shared}"]
    with forked_ranks(words, words, log=tmp_path / "said") as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].said()
    for step in (0, 1):
        assert len(clips(shared, step)) == 4
        near(clips(shared, step), clips(alone, step))


def test_a_failing_preview_is_said_once_and_counted_and_the_run_goes_on(
    silent, short_words, tmp_path, monkeypatch, caplog
):
    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(previews, "write_audio", no_room)
    assert run(short_words, tmp_path / "run", *ON) == 0
    said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("previews of step 0 left out: OSError: [Errno 28] No space left on device; training")
    assert [row["previews_missing"] for row in rows(tmp_path / "run") if "previews_missing" in row] == [4, 4, 4]
    assert_same_training(silent, tmp_path / "run")


def test_where_they_do_not_fit_they_are_left_out_with_one_line(silent, short_words, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(previews, "free_bytes", lambda device: 1000)
    assert run(short_words, tmp_path / "run", *ON) == 0
    said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(said) == 1
    assert "GB free" in said[0]
    assert_same_training(silent, tmp_path / "run")


def test_a_signal_ends_them_at_once_and_the_run_continues_as_if_they_had_not_been(silent, short_words, tmp_path):
    output_dir = tmp_path / "run"
    words = [*short_words, f"output_dir={output_dir}"]
    long = "preview_every=3", "preview_seconds=0.6", "preview_steps=20000"
    with ForkedTrainer([*words, *long], tmp_path / "log") as trainer:
        heartbeat = output_dir / "heartbeat.json"
        deadline = time.monotonic() + 120
        while not (heartbeat.exists() and "making previews" in heartbeat.read_text()):
            assert time.monotonic() < deadline, trainer.said()
            time.sleep(0.1)
        trainer.send_signal(signal.SIGTERM)
        assert trainer.wait(60) == 75
    assert status(output_dir)["message"].startswith("stopped before step 1 (SIGTERM)")
    assert run(short_words, output_dir) == 0
    assert_same_training(silent, output_dir)


def test_a_start_that_continues_keeps_the_previews_of_the_base(short_words, tmp_path):
    output_dir = tmp_path / "run"
    assert run(short_words, output_dir, *ON, "number_of_steps=1") == 0
    first = output_dir / "previews/step-00000000/0.flac"
    before = first.stat().st_mtime_ns
    assert run(short_words, output_dir, *ON, "number_of_steps=2") == 0
    assert first.stat().st_mtime_ns == before
    # Of other noise they are others.
    assert run(short_words, output_dir, *ON, "number_of_steps=3", "preview_seed=8") == 0
    assert first.stat().st_mtime_ns != before


def test_previews_of_another_course_go_where_its_checkpoints_go(short_words, tmp_path):
    output_dir = tmp_path / "run"
    assert run(short_words, output_dir, *ON, "number_of_steps=2") == 0
    first = clips(output_dir, 2)[0]
    assert run(short_words, output_dir, *ON, "number_of_steps=1", "resume=never", "learning_rate=1e-3") == 0
    assert [path.name for path in sorted((output_dir / "previews").iterdir())] == ["step-00000000", "step-00000001"]
    (output_dir / "previews-aside").rename(tmp_path / "previews")
    near([clips(tmp_path, 2)[0]], [first], 0)


@pytest.fixture
def preview(demo_base, tmp_path):
    """Previews on a base whose adapter is moved, outside of a run."""
    base = sa3dist.load_base(demo_base, encoder=False)
    attach_adapter(base, "dora-rows", rank=4)
    move(base)
    return Previews(base, Group(0, 1, torch.device("cpu")), tmp_path, HOW, ["a bass drum"], {}, PreviewSteps(1, last=1))


def test_before_the_first_step_they_are_of_the_base_whatever_the_adapter_holds(preview):
    preview.make(0, StopRequest())
    preview.make(1, StopRequest())
    detach_adapter(preview.base)
    # Rounded to the 24 bits of a file, and no further apart.
    near(clips(preview.output_dir, 0), preview.base.generate(["a bass drum"], 0.6, 2, 3.0, 7), 2**-23)
    assert (clips(preview.output_dir, 1)[0] - clips(preview.output_dir, 0)[0]).abs().max() > 1e-3


def test_what_previews_load_is_dropped_and_what_was_there_stays(preview):
    base = preview.base
    assert preview.make(3, StopRequest())[1] == 0
    assert (base.text_encoder, base.autoencoder.decoder) == (None, None)
    assert all(getattr(layer, "fixed_weight", None) is None for layer in base.modules())
    assert {getattr(layer, "strength", 1.0) for layer in base.modules()} == {1.0}
    base.decode_latents(torch.zeros(1, base.latent_channels, 2))
    decoder = base.autoencoder.decoder
    preview.make(0, StopRequest())
    assert base.autoencoder.decoder is decoder
    assert {getattr(layer, "strength", 1.0) for layer in base.modules()} == {1.0}


def test_previews_run_what_is_compiled_as_it_is_written_and_leave_it_compiled(preview):
    dit = preview.base.dit
    plain, attributes = dit.transformer.run_block, [dict(vars(module)) for module in dit.modules()]
    assert preview.make(1, StopRequest())[1] == 0
    assert [dict(vars(module)) for module in dit.modules()] == attributes
    compile_blocks(dit, "eager")
    compile_elementwise(dit, "eager")
    attributes = [dict(vars(module)) for module in dit.modules()]
    with uncompiled(dit):
        assert dit.transformer.run_block is plain
        assert dit.transformer.layers[0].modulated_norm is modulated_norm
    assert preview.make(2, StopRequest())[1] == 0
    assert [dict(vars(module)) for module in dit.modules()] == attributes
    near(clips(preview.output_dir, 2), clips(preview.output_dir, 1), 0)


def test_formed_weights_are_given_back_when_a_preview_is_stopped(preview):
    stop = StopRequest()
    stop.hear("SIGTERM on rank 1")
    seconds, missing = preview.make(2, stop)
    assert (missing, clips(preview.output_dir, 2)) == (0, [])
    with formed_once(preview.base):
        pass
    assert preview.make(2, StopRequest())[1] == 0


def test_default_prompts_are_captions_far_apart_and_an_empty_one():
    assert default_prompts(["a", "b", "c", "d", "e", "a"]) == ["a", "c", "e", ""]
    assert default_prompts(["a", "a"]) == ["a", ""]
    assert default_prompts(["a", "b"]) == ["a", "b", ""]
    assert default_prompts([]) == [""]


def test_one_prompt_may_be_given_without_brackets_and_an_empty_list_is_unset():
    assert make_settings(preview_prompts="a drum, loud").preview_prompts == ["a drum, loud"]
    assert make_settings(preview_prompts=["x", ""]).preview_prompts == ["x", ""]
    assert make_settings(preview_prompts=[]).preview_prompts is None


def test_previews_that_cannot_be_made_are_refused_before_the_clips_are_read(words, tmp_path, capsys):
    assert run(words, tmp_path / "run", "preview_every=1", "preview_seconds=400") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("preview_seconds: 400.0 is out of range")
