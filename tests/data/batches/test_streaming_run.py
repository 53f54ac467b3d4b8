"""Streaming as it is run: two ranks, two loader processes each, unequal shards or too few; killed and continued."""

import json
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from sa3dist import train
from sa3dist.data.latents.cache import EncodedClips
from sa3dist.data.latents.encode_tasks import whole_clip_tasks
from sa3dist.data.latents.shards import latent_shard_name, write_latent_shard
from sa3dist.data.source.build import build_shards
from sa3dist.encode import encode_all
from sa3dist.model.loading import load_base
from sa3dist.runtime.process_group import Group
from sa3dist.runtime.signals import StopRequest
from tests.helpers.clips import captioned, write_zip
from tests.helpers.forked_trainers import forked_ranks

SIZES = (5, 1, 4, 2, 2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, demo_base):
    """A folder of five latent shards of unequal length: 14 clips."""
    folder = tmp_path_factory.mktemp("streaming")
    base, alone = load_base(demo_base), Group(0, 1, torch.device("cpu"))
    index = build_shards(str(write_zip(folder / "a.zip", captioned(sum(SIZES), seconds=0.4))), folder / "work")
    digests = base.autoencoder_digest(), base.text_encoder_digest()
    encoded = EncodedClips(index, folder / "work", base, *digests)
    encode_all(base, whole_clip_tasks(encoded), alone, StopRequest())
    begin = 0
    for number, size in enumerate(SIZES):
        path, clips = folder / "shards" / latent_shard_name(number), index.clips[begin : begin + size]
        write_latent_shard(path, clips, encoded.shards.encoders, index.digest, number, len(SIZES), encoded.member)
        begin += size
    return folder / "shards"


@pytest.fixture
def words(demo_base, shards, tmp_path):
    more = [f"model={demo_base}", f"work_dir={tmp_path / 'work'}", "mode=streaming", "duration=1", "rank=4"]
    more += ["base_precision=fp32", "mixed_precision=no", "learning_rate=3e-3", "log_every=1", "log_clips=true"]
    more += ["report=false", "gradient_checkpointing=off"]
    return [*more, "num_workers=2", "shuffle_buffer=3", f"audio_data_url={shards}"]


def ranks_of(words, output_dir):
    words = [*words, f"output_dir={output_dir}"]
    return forked_ranks(words, words, log=f"{output_dir}.log")


def run_both(words, output_dir) -> list[int]:
    with ranks_of(words, output_dir) as ranks:
        return [rank.wait() for rank in ranks]


def rows(output_dir):
    path = output_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_two_ranks_over_unequal_shards_killed_and_continued_equal_the_undisturbed_run(words, tmp_path):
    words += ["number_of_steps=10", "save_every=4"]
    assert run_both(words, tmp_path / "whole") == [0, 0]
    whole = rows(tmp_path / "whole")
    assert [row["step"] for row in whole] == list(range(1, 11))
    # A step is one clip of each rank, however many clips its shards hold.
    assert all(len(row["clips"]) == 2 for row in whole)
    repeated = [row["repeated_clips"] for row in whole]
    assert repeated == sorted(repeated)
    assert repeated[0] == 0
    assert 2 * 10 - sum(SIZES) <= repeated[-1] < 2 * 10
    with ranks_of(words, tmp_path / "killed") as ranks:
        deadline = time.monotonic() + 120
        # A save is finished beside the steps that follow it.
        saved = tmp_path / "killed" / "checkpoints" / "step-00000004"
        while len(rows(tmp_path / "killed")) < 6 or not saved.exists():
            assert time.monotonic() < deadline, ranks[0].said()
            time.sleep(0.01)
        for rank in ranks:
            rank.send_signal(signal.SIGKILL)
        assert [rank.wait() for rank in ranks] == [-signal.SIGKILL] * 2
    assert run_both(words, tmp_path / "killed") == [0, 0]
    continued = rows(tmp_path / "killed")
    assert [row["resumed_from"] for row in continued if "resumed_from" in row][0] in (4, 8)
    for key in ("step", "loss", "grad_norm", "clips", "repeated_clips"):
        assert [row[key] for row in continued] == [row[key] for row in whole], key
    expected, found = (load_file(tmp_path / name / "lora.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert f"20 clips trained on, {repeated[-1]} of them repeated" in (tmp_path / "whole.log-0").read_text()


@pytest.mark.slow
def test_two_ranks_share_one_shard_count_the_repeats_and_learn(words, shards, tmp_path, capfd):
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(shards / "latents-000002.tar", one)
    words += [f"audio_data_url={one}", "number_of_steps=40"]
    assert run_both(words, tmp_path / "run") == [0, 0]
    found = rows(tmp_path / "run")
    assert len(found) == 40
    assert found[-1]["repeated_clips"] == 2 * 40 - SIZES[2]
    assert len({key for row in found for key in row["clips"]}) == SIZES[2]
    first, last = (sum(row["loss"] for row in part) / 12 for part in (found[:12], found[-12:]))
    assert last < 0.9 * first
    # Other processes or loaders have no place in this run's shards.
    for changed in ("num_workers=1", "num_workers=2"):
        assert train.main([*words, changed, f"output_dir={tmp_path / 'run'}", "number_of_steps=70"]) == 2
        message = capfd.readouterr().err.strip().splitlines()[-1]
        assert "by 2 processes with num_workers 2, this run has 1 and" in message


def test_a_wrong_source_or_base_is_refused_before_anything_is_left(words, shards, tmp_path, capfd):
    from sa3dist.model.tiny import write_tiny_base

    other = write_tiny_base(tmp_path / "base", seed=5)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "latents-000000.tar").write_bytes((shards / "latents-000000.tar").read_bytes()[:2000])
    cases = {
        f"model={other}": (2, "latents-000000.tar: encoded with autoencoder"),
        f"audio_data_url={broken}": (70, "latents-000000.tar: no plain tar, or damaged at byte"),
        f"audio_data_url={tmp_path}": (2, "mode: streaming reads shards"),
        "duration=": (2, "duration: with mode: streaming it must be given"),
    }
    for number, (changed, (code, message)) in enumerate(cases.items()):
        output_dir = tmp_path / f"run-{number}"
        capfd.readouterr()
        assert train.main([*words, changed, f"output_dir={output_dir}"]) == code
        assert message in capfd.readouterr().err.strip().splitlines()[-1]
        left = {path.name for path in output_dir.iterdir()}
        assert left == {"status.json"} if code == 2 else "lora.safetensors" not in left
