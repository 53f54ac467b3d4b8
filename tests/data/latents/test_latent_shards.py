"""Latent shards as the data set itself: trained on without audio, bit for bit as with it, or refused in one line."""

import functools
import shutil

import fsspec
import pytest
import torch
from safetensors.torch import load_file

from sa3dist import encode, train
from sa3dist.data.latents.shards import LatentShard, latent_shard_name, write_latent_shard
from sa3dist.data.latents.source import read_latents
from sa3dist.data.remote.disk_cache import ClipCache
from sa3dist.errors import DataError
from sa3dist.model.tiny import write_tiny_base
from tests.helpers.clips import captioned, write_zip
from tests.helpers.latent_sets import ENCODERS, clip, content


@pytest.fixture(scope="module")
def made(tmp_path_factory, demo_base):
    """(words of a run, its output directory, a folder with copies of the latent shards it left)."""
    folder = tmp_path_factory.mktemp("latents")
    # One caption for two clips; three shards.
    members = captioned(5, seconds=0.7) | {"clip4.txt": b"tone number 1"}
    words = [f"model={demo_base}", "number_of_steps=4", "rank=4", "base_precision=fp32", "mixed_precision=no"]
    words += ["deterministic=true", "batch_size=2", "num_workers=1", "pre_encode=true", "learning_rate=3e-3"]
    words += ["report=false", "gradient_checkpointing=off"]
    source = write_zip(folder / "a.zip", members)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "pack_latents", functools.partial(encode.pack_latents, max_shard_bytes=45_000))
        assert run(words, folder / "with_audio", f"audio_data_url={source}", f"work_dir={folder / 'work'}") == 0
    (shards,) = (folder / "work/latent_shards").iterdir()
    shutil.copytree(shards, folder / "copied")
    torch.use_deterministic_algorithms(False)
    return words, folder / "with_audio", folder / "copied"


def run(words, output_dir, *more):
    return train.main([*words, f"output_dir={output_dir}", *more])


def pattern(folder):
    count = len(list(folder.glob("*.tar")))
    assert count >= 3
    return f"{folder}/latents-{{000000..{count - 1:06d}}}.tar"


@pytest.mark.parametrize("named", ["folder", "pattern", "memory"])
def test_training_on_latents_equals_training_on_the_audio_to_the_last_bit(made, tmp_path, named):
    words, with_audio, shards = made
    source = {"folder": str(shards), "pattern": pattern(shards), "memory": "memory://bucket/latents"}[named]
    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        memory.pipe(f"/bucket/latents/{path.name}", path.read_bytes())
    assert run(words, tmp_path / "run", f"audio_data_url={source}", f"work_dir={tmp_path / 'work'}") == 0
    for name in ("adapter.safetensors", "moments.safetensors"):
        expected, found = (load_file(d / "checkpoints/step-00000004" / name) for d in (with_audio, tmp_path / "run"))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    # Nothing was decoded or encoded, and the checkpoint is one and the same course.
    assert not list((tmp_path / "work").rglob("*.safetensors"))
    assert not (tmp_path / "work/shards").exists()
    assert run(words, tmp_path / "run", f"audio_data_url={source}", "number_of_steps=5") == 0


def refusal(capfd, words, tmp_path, *more):
    capfd.readouterr()
    assert run(words, tmp_path / "run", f"work_dir={tmp_path / 'work'}", *more) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    return lines[-1]


def test_shards_of_another_encoder_are_refused_in_one_line(made, tmp_path, capfd):
    words, _, shards = made
    other = write_tiny_base(tmp_path / "base", seed=5)
    line = refusal(capfd, words, tmp_path, f"audio_data_url={shards}", f"model={other}")
    assert "latents-000000.tar: encoded with autoencoder" in line
    assert "this base has" in line


def test_what_is_not_whole_is_refused_and_named(made, tmp_path, capfd):
    words, _, shards = made
    broken = shutil.copytree(shards, tmp_path / "broken")
    (broken / "latents-000001.tar").unlink()
    assert "shard 1 of" in refusal(capfd, words, tmp_path, f"audio_data_url={broken}")
    shutil.copy(shards / "latents-000001.tar", broken)
    with (broken / "latents-000001.tar").open("ab") as tar:
        tar.write(b"\0")
    assert "latents-000001.tar: " in refusal(capfd, words, tmp_path, f"audio_data_url={broken}")
    (broken / "latents-000001.json").unlink()
    assert "latents-000001.json" in refusal(
        capfd, words, tmp_path, f"audio_data_url={pattern(shards)}".replace(str(shards), str(broken))
    )
    line = refusal(capfd, words, tmp_path, f"audio_data_url={shards}", "latents=crop", "pre_encode=false")
    assert "latents: crop needs audio" in line


def test_a_clip_changed_in_a_shard_stops_the_run_and_is_named(made, tmp_path, capfd):
    words, _, shards = made
    broken = shutil.copytree(shards, tmp_path / "broken")
    for path in broken.glob("*.tar"):
        data = bytearray(path.read_bytes())
        for found in LatentShard.read(path).clips:
            for place in found.places.values():
                data[place.offset + place.bytes // 2] ^= 4
        path.write_bytes(data)
    capfd.readouterr()
    assert run(words, tmp_path / "run", f"audio_data_url={broken}", f"work_dir={tmp_path / 'work'}") == 70
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert "latents-" in line
    assert "do not match their digest" in line
    assert not (tmp_path / "run/lora.safetensors").exists()


def test_an_index_that_claims_a_trillion_shards_is_refused_at_once(tmp_path):
    path = tmp_path / latent_shard_name(0)
    write_latent_shard(path, [clip(0)], ENCODERS, "made up", 0, 10**12, content)
    with pytest.raises(DataError, match="shard 1 of 1000000000000 is missing"):
        read_latents(
            str(tmp_path), [(str(path), str(path.with_suffix(".json")), None)], ClipCache(tmp_path / "cache", 0)
        )
