"""All stages as a user runs them: request in, files out; two ranks, interruptions, and what must not happen."""

import hashlib
import json
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sa3dist
from sa3dist import cli, encode
from sa3dist.data.latents.tensor_files import digest_of_tensors
from sa3dist.training import checkpoint
from tests.helpers.forked_trainers import ForkedTrainer, forked_ranks
from tests.helpers.program import STEPS, rows, run, short_run, status
from tests.helpers.servers import hostile_http


@pytest.fixture(scope="module")
def straight(tmp_path_factory, demo_base, demo_clips, demo_work):
    """The output directory of one undisturbed run, shared by the tests that compare with it."""
    output_dir = tmp_path_factory.mktemp("straight") / "run"
    words = short_run(demo_clips, demo_base, demo_work)
    assert run(words, output_dir) == 0
    torch.use_deterministic_algorithms(False)
    return output_dir


def test_a_run_leaves_the_promised_files(straight, demo_base):
    assert {path.name for path in straight.iterdir()} == {
        "lora.safetensors",
        "config.json",
        "result.json",
        "README.md",
        "NOTICE",
        "curves.svg",
        "health.jsonl",
        "metrics.jsonl",
        "heartbeat.json",
        "run.yaml",
        "status.json",
        "checkpoints",
    }
    result = json.loads((straight / "result.json").read_text())
    assert result["lora_file"]["file_name"] == "lora.safetensors"
    assert result["lora_file"]["file_size"] == (straight / "lora.safetensors").stat().st_size
    assert result["config_file"]["content_type"] == "application/json"
    assert status(straight) | {"host": ""} == {
        "state": "done",
        "exit_code": 0,
        "message": "done",
        "dist_rank": 0,
        "host": "",
        "step": STEPS,
    }
    assert [row["step"] for row in rows(straight)] == list(range(1, STEPS + 1))
    described = json.loads((straight / "config.json").read_text())
    assert described["lora_config"]["rank"] == 4
    with safe_open(straight / "lora.safetensors", "pt") as file:
        header = file.metadata()
        config = json.loads(header["lora_config"])
        # What the reference's own trainer writes, then what other programs look for.
        fields = ["rank", "alpha", "adapter_type", "dropout", "include", "exclude", "step", "epoch", "base_model"]
        assert list(config) == fields
        assert config["adapter_type"] == "dora-rows"
        # The directory's name; where it lies is nobody's business.
        assert (config["step"], config["base_model"]) == (STEPS, Path(described["base_model"]).name)
        assert not any(str(Path(described["base_model"]).parent) in value for value in header.values())
        clips = STEPS * described["effective_batch_size"]
        assert config["epoch"] == described["epoch"] == clips // described["dataset_clips"]
        spec = {key for key in header if key.startswith("modelspec.")}
        names = ["sai_model_spec", "architecture", "implementation", "title", "description", "license", "hash_sha256"]
        assert spec == {f"modelspec.{name}" for name in names}
        assert header["modelspec.sai_model_spec"] == "1.0.1"
        assert header["modelspec.title"] == described["settings"]["name"]
        content = (straight / "lora.safetensors").read_bytes()
        data = content[8 + int.from_bytes(content[:8], "little") :]
        assert header["modelspec.hash_sha256"] == f"0x{hashlib.sha256(data).hexdigest()}"
        assert file.metadata()["step"] == str(STEPS)
        assert file.metadata()["base_sha256"] == described["base_sha256"]
        assert {str(file.get_tensor(key).dtype) for key in file.keys()} == {"torch.float16"}  # noqa: SIM118


def test_the_trained_file_changes_the_velocity(straight, demo_base):
    base = sa3dist.load_base(demo_base)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, base.latent_channels, 20, generator=generator)
    prompt, mask = base.encode_prompts(["a bright tone"])
    arguments = (x, torch.tensor([0.5]), prompt, mask, torch.tensor([2.0]))
    with torch.no_grad():
        before = base.velocity(*arguments)
        sa3dist.load_adapter(base, straight / "lora.safetensors")
        after = base.velocity(*arguments)
    assert (after - before).norm() > 0.01 * before.norm()


def test_a_runs_norms_are_baked_into_a_file_of_their_own(straight, tmp_path, capsys):
    before = (straight / "lora.safetensors").read_bytes()
    output = tmp_path / "lora.normbaked.safetensors"
    assert cli.main(["export", str(straight), "--baked-norms", "--output", str(output)]) == 0
    landed, total = capsys.readouterr().out.split()[-3].split("/")
    assert landed == total
    assert (straight / "lora.safetensors").read_bytes() == before
    own, baked = load_file(straight / "lora.safetensors"), load_file(output)
    assert all(torch.equal(baked[key], own[key]) for key in own)
    assert {baked[key].dtype for key in baked.keys() - own.keys()} == {torch.float32}
    assert len(baked) - len(own) == int(total)
    with safe_open(output, "pt") as file, safe_open(straight / "lora.safetensors", "pt") as plain:
        config, held = json.loads(file.metadata()["lora_config"]), json.loads(plain.metadata()["lora_config"])
        assert file.metadata()["modelspec.title"] == plain.metadata()["modelspec.title"]
    assert config == {**held, "baked_norms": int(total), "norm_base": held["base_model"]}


def test_the_last_line_of_stdout_is_the_result_also_where_the_memory_of_a_step_is_counted(
    words, tmp_path, capsys, caplog
):
    assert run(words, tmp_path / "run", "number_of_steps=1", "gradient_checkpointing=auto") == 0
    assert " blocks recomputed" in caplog.text
    printed = capsys.readouterr().out.strip().splitlines()
    assert json.loads(printed[-1]) == json.loads((tmp_path / "run/result.json").read_text())


def test_the_same_command_twice_gives_the_same_bits(words, straight, tmp_path):
    assert run(words, tmp_path / "run", "resume=never") == 0
    assert (tmp_path / "run/lora.safetensors").read_bytes() == (straight / "lora.safetensors").read_bytes()


def test_neither_workers_nor_encoding_ahead_change_the_result(words, straight, tmp_path):
    more = ["num_workers=1", "pre_encode=true", f"work_dir={tmp_path / 'fresh'}", "gradient_checkpointing=on"]
    assert run(words, tmp_path / "run", *more) == 0
    expected, found = (load_file(p / "lora.safetensors") for p in (straight, tmp_path / "run"))
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_resuming_equals_not_stopping(words, straight, tmp_path):
    output_dir = tmp_path / "run"
    assert run(words, output_dir, "number_of_steps=2") == 0
    assert run(words, output_dir) == 0
    assert (output_dir / "lora.safetensors").read_bytes() == (straight / "lora.safetensors").read_bytes()
    expected, found = rows(straight), rows(output_dir)
    assert [row["loss"] for row in found] == [row["loss"] for row in expected]
    assert [row["clips"] for row in found] == [row["clips"] for row in expected]
    assert [row.get("resumed_from") for row in found] == [None, None, 2, None, None, None]


def test_a_finished_run_is_not_trained_again(words, straight, tmp_path):
    before = (straight / "metrics.jsonl").read_bytes()
    assert run(words, straight) == 0
    assert (straight / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("base_precision", ["bf16", "fp16", "fp32"])
def test_every_base_precision_trains_under_autocast(words, straight, tmp_path, base_precision):
    more = [f"base_precision={base_precision}", "mixed_precision=bf16", "number_of_steps=2"]
    assert run(words, tmp_path / "run", *more) == 0
    for found, exact in zip(rows(tmp_path / "run"), rows(straight)[:2], strict=True):
        assert found["loss"] == pytest.approx(exact["loss"], rel=0.02)
        assert found["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.1)


def test_every_clip_is_used_once_per_epoch(straight, words, tmp_path):
    assert run(words, tmp_path / "run", "batch_size=4", "number_of_steps=4") == 0
    used = [clip for row in rows(tmp_path / "run") for clip in row["clips"]]
    assert sorted(used[:8]) == sorted(used[8:]) == sorted(set(used))


@pytest.mark.parametrize("changed", ["seed=7", "rank=5", "adapter_type=lora", "batch_size=2", "duration=3"])
def test_a_checkpoint_of_other_settings_is_refused(words, straight, capfd, changed):
    before = sorted(straight.rglob("*"))
    assert run(words, straight, changed, "number_of_steps=9") == 2
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert (
        changed.split("=")[0]
        .replace("rank", "lora_config")
        .replace("adapter_type", "lora_config")
        .replace("duration", "crop_frames")
        in message
    )
    assert "resume=never" in message
    assert sorted(straight.rglob("*")) == before


def test_fewer_steps_than_are_trained_are_refused(words, straight, capfd):
    assert run(words, straight, "number_of_steps=3") == 2
    assert "number_of_steps is 3" in capfd.readouterr().err


def test_starting_over_sets_the_old_course_aside(words, tmp_path, capfd):
    output_dir = tmp_path / "run"
    assert run(words, output_dir, "number_of_steps=3") == 0
    assert run(words, output_dir, "number_of_steps=2", "seed=9", "resume=never") == 0
    assert [path.name for path in (output_dir / "checkpoints").iterdir()] == ["step-00000002"]
    assert [path.name for path in (output_dir / "checkpoints-aside").iterdir()] == ["step-00000003"]
    assert [row["step"] for row in rows(output_dir)] == [1, 2]


def test_a_results_url_is_a_warm_start(words, straight, tmp_path):
    copied = tmp_path / "a b%c ü" / "lora.safetensors"
    copied.parent.mkdir()
    copied.write_bytes((straight / "lora.safetensors").read_bytes())
    more = [f"lora_checkpoint_url={copied.as_uri()}", "number_of_steps=1"]
    assert run(words, tmp_path / "run", *more) == 0


def test_a_warm_start_begins_where_the_file_ends(words, straight, tmp_path):
    first = rows(straight)[0]["loss"]
    assert (
        run(words, tmp_path / "run", f"lora_checkpoint_url={straight / 'lora.safetensors'}", "number_of_steps=1") == 0
    )
    # The same first draws, seen by the adapter that six steps of training made.
    assert rows(tmp_path / "run")[0]["loss"] != pytest.approx(first, rel=1e-3)
    assert rows(tmp_path / "run")[0]["clips"] == rows(straight)[0]["clips"]


def same_state(one, other):
    one, other = (checkpoint.find(output_dir, "auto") for output_dir in (one, other))
    return one.step == other.step and all(torch.equal(one.adapters[key], other.adapters[key]) for key in one.adapters)


@pytest.mark.parametrize("remote", [False, True])
def test_a_run_that_continues_needs_no_warm_start_file_but_the_same_address(words, straight, tmp_path, capfd, remote):
    trained = straight / "lora.safetensors"
    with hostile_http(trained.read_bytes()) as server:
        address = (
            f"{server.url}/etag/lora.safetensors?signature={{}}" if remote else str(tmp_path / "start.safetensors")
        )
        if not remote:
            shutil.copy(trained, address)
        url = f"lora_checkpoint_url={address}"
        assert run(words, tmp_path / "whole", url.format(1)) == 0
        assert run(words, tmp_path / "run", url.format(1), "number_of_steps=3") == 0
    if not remote:
        Path(address).unlink()
    capfd.readouterr()
    for other, found in ((f"lora_checkpoint_url={trained}x", "cannot be read"), ("lora_checkpoint_url=null", "None")):
        assert run(words, tmp_path / "run", other) == 2
        assert found in capfd.readouterr().err.splitlines()[-1]
    assert run(words, tmp_path / "run", url.format(2)) == 0
    assert same_state(tmp_path / "run", tmp_path / "whole")
    # The same file at another address is the same start; a fresh run has none.
    assert run(words, tmp_path / "run", f"lora_checkpoint_url={trained}") == 0
    assert run(words, straight, f"lora_checkpoint_url={trained}") == 2
    assert "holds a checkpoint with lora_checkpoint_url None" in capfd.readouterr().err.splitlines()[-1]


def test_a_continued_run_encodes_ahead_for_the_batch_of_its_checkpoint(words, tmp_path, monkeypatch):
    ahead = []
    monkeypatch.setattr(encode, "encode_all", lambda base, tasks, *_: ahead.append(sum(task.count for task in tasks)))
    words = [*words, "latents=crop", "pre_encode=true"]
    assert run(words, tmp_path / "whole", "gradient_accumulation_steps=2") == 0
    assert run(words, tmp_path / "run", "gradient_accumulation_steps=2", "number_of_steps=1") == 0
    assert run(words, tmp_path / "run", "gradient_accumulation_steps=1") == 0
    assert ahead[2] == ahead[0] > ahead[1]


@pytest.mark.parametrize("change", ["seed=9", "number_of_steps=3", "batch_size=2"])
def test_what_no_continued_run_may_change_is_refused_before_anything_is_prepared(
    words, straight, tmp_path, capfd, change
):
    assert run(words, straight, change, f"work_dir={tmp_path / 'none'}", "model=/nowhere") == 2
    assert change.partition("=")[0] in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_one_rank_that_cannot_load_takes_the_other_along_with_its_reason(words, tmp_path):
    words = [*words, f"output_dir={tmp_path / 'run'}"]
    with forked_ranks(words, [*words, "model=/nowhere"], log=tmp_path / "said") as ranks:
        assert [rank.wait(90) for rank in ranks] == [2, 2]
        said = [rank.said() for rank in ranks]
    assert f"rank 1 on {socket.gethostname()}: model=/nowhere" in said[0]
    assert status(tmp_path / "run")["message"] == said[0].strip().splitlines()[-1]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["status.json"]


@pytest.mark.slow
def test_two_ranks_equal_one_rank_with_two_accumulated(words, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(words, one, "gradient_accumulation_steps=2") == 0
    more = [*words, f"output_dir={two}", "num_workers=1"]
    with forked_ranks(more, more, log=tmp_path / "said") as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].said()
    for expected, found in zip(rows(one), rows(two), strict=True):
        assert found["clips"] == expected["clips"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    adapters = [load_file(d / f"checkpoints/step-{STEPS:08d}/adapter.safetensors") for d in (one, two)]
    for key, expected in adapters[0].items():
        assert (adapters[1][key] - expected).norm() <= 1e-5 * expected.norm() + 1e-9
    assert json.loads((two / "config.json").read_text())["world_size"] == 2


@pytest.mark.slow
def test_a_run_of_one_rank_continues_on_two_with_the_same_global_batch(words, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    assert run(words, one, "gradient_accumulation_steps=2") == 0
    assert run(words, other, "gradient_accumulation_steps=2", "number_of_steps=3") == 0
    more = [*words, f"output_dir={other}", "gradient_accumulation_steps=2"]
    with forked_ranks(more, more, log=tmp_path / "said") as ranks:
        assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].said()
        assert "2 clips per step" in ranks[0].said()
    for expected, found in zip(rows(one), rows(other), strict=True):
        assert (found["clips"], found["loss"]) == (expected["clips"], pytest.approx(expected["loss"], rel=1e-5))


def stopped_by(number, words, output_dir):
    """A run that gets a signal twice in the middle of training; the step that it saved."""
    more = [f"output_dir={output_dir}", "number_of_steps=2000", "save_every=2000", "num_workers=1"]
    with ForkedTrainer([*words, *more], output_dir.with_name("said")) as process:
        deadline = time.monotonic() + 120
        while not (output_dir / "metrics.jsonl").exists() or len(rows(output_dir)) < 3:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.said()
            time.sleep(0.05)
        process.send_signal(number)
        process.send_signal(number)
        assert process.wait(30) == 75
    stopped = status(output_dir)
    assert (stopped["state"], stopped["exit_code"]) == ("interrupted", 75)
    saved = stopped["step"]
    assert [path.name for path in (output_dir / "checkpoints").iterdir()] == [f"step-{saved:08d}"]
    return saved


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_every_signal_saves(words, tmp_path, number):
    stopped_by(number, words, tmp_path / "run")


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_continues(words, tmp_path):
    output_dir = tmp_path / "run"
    saved = stopped_by(signal.SIGTERM, words, output_dir)
    # Continue three steps and compare with a run that never stopped.
    assert run(words, output_dir, f"number_of_steps={saved + 3}") == 0
    assert run(words, tmp_path / "whole", f"number_of_steps={saved + 3}") == 0
    assert (output_dir / "lora.safetensors").read_bytes() == (tmp_path / "whole/lora.safetensors").read_bytes()


def spoil(latents_dir: Path, keep_digest: bool) -> None:
    """Put one NaN into every latents file; with ``keep_digest`` the digest is made to fit."""
    for path in latents_dir.rglob("*.safetensors"):
        tensors = load_file(path)
        tensors["latents"][0, 0] = torch.nan
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        if keep_digest:
            metadata = {"sha256": digest_of_tensors(tensors)}
        save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize("keep_digest", [True, False])
def test_a_nan_in_a_latent_stops_the_run_names_the_clip_and_keeps_the_last_save(words, tmp_path, capfd, keep_digest):
    output_dir, work_dir = tmp_path / "run", tmp_path / "work"
    more = [f"work_dir={work_dir}", "save_every=1", "num_workers=1"]
    assert run(words, output_dir, *more, "number_of_steps=2") == 0
    # Encodes what the later steps need.
    assert run(words, tmp_path / "ahead", *more) == 0
    saved = {path: path.read_bytes() for path in (output_dir / "checkpoints/step-00000002").iterdir()}
    exported = (output_dir / "lora.safetensors").read_bytes()
    capfd.readouterr()
    spoil(work_dir / "latents", keep_digest)
    assert run(words, output_dir, *more, "number_of_steps=6") == 70
    message = capfd.readouterr().err.strip().splitlines()[-1]
    # The clip that an undisturbed run meets at step 3.
    assert rows(tmp_path / "ahead")[2]["clips"][0] in message
    assert {path: path.read_bytes() for path in saved} == saved
    assert (output_dir / "lora.safetensors").read_bytes() == exported
    assert status(output_dir)["exit_code"] == 70


def test_a_loss_that_overflows_stops_the_run_and_names_the_clip(words, tmp_path, capfd):
    assert run(words, tmp_path / "run", "learning_rate=1e30", "number_of_steps=20") == 70
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert "not finite" in message
    assert "Look at that clip" in message
    assert not (tmp_path / "run/lora.safetensors").exists()
    # Finite losses: there is no clip to look at.
    assert run(words, tmp_path / "steep", "alpha=3e38") == 70
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert message.endswith(
        "step 1: the gradient is not finite; training stopped, state is as last saved. Lower learning_rate"
    )


@pytest.mark.parametrize("of", ["run", "checkpoint", "config"])
def test_an_export_from_the_checkpoint_alone_equals_what_the_run_published(straight, tmp_path, of):
    copy = tmp_path / "run"
    shutil.copytree(straight / "checkpoints", copy / "checkpoints")
    checkpoint = copy / f"checkpoints/step-{STEPS:08d}"
    # A config of the run, whose data and base are gone.
    config = [f"output_dir={copy}", "audio_data_url=/gone.zip", "model=/gone"]
    words = {"run": [str(copy)], "checkpoint": [str(checkpoint)], "config": config}[of]
    written = copy / f"exported/step-{STEPS:08d}" if of == "checkpoint" else copy
    assert cli.main(["export", *words]) == 0
    assert (written / "lora.safetensors").read_bytes() == (straight / "lora.safetensors").read_bytes()
    described, published = (json.loads((path / "config.json").read_text()) for path in (written, straight))
    # A timing of the process that trained, which no checkpoint holds.
    assert published.pop("startup_seconds")
    assert list(described.items()) == list(published.items())
    result = json.loads((written / "result.json").read_text().replace(str(written), str(straight)))
    assert result["lora_file"] == json.loads((straight / "result.json").read_text())["lora_file"]
    assert result["config_file"]["file_size"] == (written / "config.json").stat().st_size


def test_a_damaged_checkpoint_is_not_exported(straight, tmp_path, capsys):
    shutil.copytree(straight / "checkpoints", tmp_path / "run/checkpoints")
    with (tmp_path / f"run/checkpoints/step-{STEPS:08d}/adapter.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    assert cli.main(["export", str(tmp_path / "run/checkpoints" / f"step-{STEPS:08d}")]) == 2
    assert "adapter.safetensors: content does not match its digest" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoints"}
