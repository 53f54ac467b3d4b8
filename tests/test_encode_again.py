"""The encode stage killed at any moment; artefacts with a byte flipped anywhere: noticed, named or harmless."""

import json
import random

import pytest
import torch
from clips import captioned, write_zip
from kills import Killable

from sa3dist.data.audio import load_clip_audio
from sa3dist.data.latents import EncodedClips
from sa3dist.encode import encode_all
from sa3dist.errors import DataError, EnvironmentFailure
from sa3dist.formats import DatasetIndex
from sa3dist.model.loading import load_base
from sa3dist.model.tiny import write_tiny_base
from sa3dist.parallel.group import Group
from sa3dist.parallel.signals import StopRequest
from sa3dist.shard import build_shards


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    source = write_zip(folder / "a.zip", captioned(3, seconds=0.5))
    return build_shards(str(source), folder / "work", allow_any_dataset_size=True)


def encode_everything(base, index, work_dir):
    encoded = EncodedClips(index, work_dir, base, "a", "t")
    encode_all(base, encoded, Group(0, 1, torch.device("cpu")), StopRequest())
    return encoded


def published(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*.safetensors")
        if not path.name.startswith(".")
    }


@pytest.mark.slow
def test_a_kill_at_any_moment_costs_one_clip_at_most_and_the_files_are_those_of_an_undisturbed_run(
    base_dir, index, tmp_path
):
    setup = f"""
import sys
sys.path.insert(0, {str(__file__.rsplit("/", 1)[0])!r})
from pathlib import Path
import torch
torch.set_num_threads(1)
from sa3dist.data import latents
from test_encode_again import DatasetIndex, encode_everything, load_base
# Less silence to encode: more of the kills fall on other moments.
latents.SILENCE_TAIL_FRAMES = 4
base = load_base({str(base_dir)!r})
# Loaded once, before the processes that are killed part from this one.
base.encode_audio(torch.zeros(1, 2, 4096)), base.encode_hidden(["x"])
index = DatasetIndex.read(Path({str(index.directory)!r}))
def work(target): encode_everything(base, index, Path(target))
"""
    draw = random.Random(3)
    killed = 0
    with Killable(setup) as process:
        process.run(tmp_path / "warm")
        duration, _ = process.run(tmp_path / "whole")
        whole = published(tmp_path / "whole")
        assert len(whole) == 3 * 2 + 3
        for moment in range(20):
            work = tmp_path / f"killed-{moment}"
            killed += process.run(work, kill_after=draw.uniform(0, duration))[1]
            held = published(work) if work.exists() else {}
            assert held.items() <= whole.items(), moment
            process.run(work)
            assert published(work) == whole, moment
    assert killed >= 10


def test_finished_pieces_are_not_encoded_again(base_dir, index, tmp_path, monkeypatch):
    base = load_base(base_dir)
    encoded = encode_everything(base, index, tmp_path)
    whole = published(tmp_path)
    gone = encoded.latents_path(index.clips[2], True)
    gone.unlink()
    lengths = []
    original = type(base).encode_audio
    monkeypatch.setattr(type(base), "encode_audio", lambda self, audio: lengths.append(audio) or original(self, audio))
    monkeypatch.setattr(type(base), "encode_hidden", lambda *_: pytest.fail("encoded a caption again"))
    encode_everything(base, index, tmp_path)
    # The clip, and the silence that follows it.
    assert len(lengths) == 2
    assert published(tmp_path) == whole


def _everything_read(directory, encoded):
    """All values that training takes from the artefacts, as bytes. Raises what reading them raises."""
    index = DatasetIndex.read(directory)
    values = [json.dumps(vars(clip)) for clip in index.clips]
    for clip in index.clips:
        values.append(load_clip_audio(index, clip, 44100).numpy().tobytes())
        values += [tensor.numpy().tobytes() for tensor in encoded.prompt(clip.caption)]
        for flipped in (False, True):
            latents = encoded.latents(clip, flipped)
            values += [t.numpy().tobytes() for t in (latents.latents_DT, latents.silence_D2, latents.peaks_T)]
    return values


def test_a_flipped_byte_anywhere_is_noticed_and_named_or_changes_nothing(base_dir, index, tmp_path):
    encoded = encode_everything(load_base(base_dir), index, tmp_path)
    whole = _everything_read(index.directory, encoded)
    files = sorted(path for folder in (index.directory, tmp_path) for path in folder.rglob("*") if path.is_file())
    draw = random.Random(11)
    noticed = []
    for _ in range(50):
        # Every kind of file as often, whatever its size.
        kind = draw.choice(["shard-000000.tar", "index.json", "latents", "prompts"])
        path = draw.choice([path for path in files if kind in path.parts])
        data = path.read_bytes()
        place, bit = draw.randrange(len(data)), 1 << draw.randrange(8)
        path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
        try:
            assert _everything_read(index.directory, encoded) == whole, (path, place)
        except (DataError, EnvironmentFailure) as problem:
            noticed.append((path.name, str(problem)))
        finally:
            path.write_bytes(data)
    assert len(noticed) > 35
    assert all(name in message and "\n" not in message for name, message in noticed)
    assert _everything_read(index.directory, encoded) == whole
