"""The encode stage killed at any moment; shards with a byte flipped anywhere: noticed, named or harmless."""

import errno
import json
import os
import random
import shutil

import pytest
import torch

from sa3dist.data.latents.cache import EncodedClips
from sa3dist.data.latents.encode_tasks import whole_clip_tasks
from sa3dist.data.latents.shards import LatentShard
from sa3dist.data.source.audio import load_clip_audio
from sa3dist.data.source.build import build_shards
from sa3dist.encode import encode_all
from sa3dist.errors import DataError, EnvironmentFailure
from sa3dist.formats import DatasetIndex
from sa3dist.model.loading import load_base
from sa3dist.model.tiny import write_tiny_base
from sa3dist.runtime.signals import StopRequest
from tests.helpers.clips import captioned, write_zip
from tests.helpers.encode_stage import ALONE, encode_everything
from tests.helpers.golden import ROOT
from tests.helpers.kills import Killable
from tests.helpers.ranks import run_ranks


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    source = write_zip(folder / "a.zip", captioned(3, seconds=0.5))
    return build_shards(str(source), folder / "work", allow_any_dataset_size=True)


def published(folder):
    """What is there under its final name, but for files of single clips."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".") and path.suffix != ".safetensors"
    }


def files_of_clips(folder):
    return [path for path in folder.rglob("*.safetensors") if not path.name.startswith(".")]


@pytest.mark.slow
def test_a_kill_at_any_moment_costs_one_clip_at_most_and_the_files_are_those_of_an_undisturbed_run(
    base_dir, index, tmp_path
):
    setup = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import torch
torch.set_num_threads(1)
from sa3dist.data.latents import cache
from sa3dist.formats import DatasetIndex
from sa3dist.model.loading import load_base
from tests.helpers.encode_stage import encode_everything
# Less silence to encode: more of the kills fall on other moments.
cache.SILENCE_TAIL_FRAMES = 4
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
        assert len(whole) == 2 * 3
        assert files_of_clips(tmp_path / "whole") == []
        for moment in range(4):
            work = tmp_path / f"killed-{moment}"
            seconds, was_killed = process.run(work, kill_after=draw.uniform(0, duration))
            killed += was_killed
            if not was_killed:
                # The run that the moments are drawn by was a slow one.
                duration = seconds
            held = published(work) if work.exists() else {}
            assert held.items() <= whole.items(), moment
            process.run(work)
            assert published(work) == whole, moment
            assert files_of_clips(work) == [], moment
    assert killed >= 2


@pytest.mark.slow
def test_a_kill_while_shards_are_collected_loses_nothing(base_dir, index, tmp_path):
    base = load_base(base_dir)
    encode_all(base, whole_clip_tasks(EncodedClips(index, tmp_path / "loose", base, "a", "t")), ALONE, StopRequest())
    setup = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from sa3dist.data.latents.cache import EncodedClips
from sa3dist.encode import pack_latents
from sa3dist.formats import DatasetIndex
from sa3dist.model.loading import load_base
from sa3dist.runtime.signals import StopRequest
from tests.helpers.encode_stage import ALONE
base = load_base({str(base_dir)!r})
index = DatasetIndex.read(Path({str(index.directory)!r}))
def work(target):
    # Nothing here can encode: what a kill loses would be missing.
    pack_latents(EncodedClips(index, Path(target), base, "a", "t"), ALONE, StopRequest(), max_shard_bytes=30_000)
"""
    draw = random.Random(5)
    partly = 0
    with Killable(setup) as process:
        shutil.copytree(tmp_path / "loose", tmp_path / "whole")
        duration, _ = process.run(tmp_path / "whole")
        whole = published(tmp_path / "whole")
        assert len(whole) == 2 * 3
        # Six of them at least, and as many as it takes until one has come between two shards.
        for moment in range(60):
            if moment >= 6 and partly:
                break
            work = tmp_path / f"killed-{moment}"
            shutil.copytree(tmp_path / "loose", work)
            seconds, was_killed = process.run(work, kill_after=draw.uniform(0, duration))
            if not was_killed:
                # The run that the moments are drawn by was a slow one.
                duration = seconds
            held = published(work)
            assert held.items() <= whole.items(), moment
            partly += 0 < len(held) < len(whole)
            process.run(work)
            assert published(work) == whole, moment
            assert files_of_clips(work) == [], moment
    assert partly >= 1


def test_only_what_a_lost_shard_held_is_encoded_again(base_dir, index, tmp_path, monkeypatch):
    base = load_base(base_dir)
    encoded = encode_everything(base, index, tmp_path)
    whole = published(tmp_path)
    (lost,) = (shard for shard in encoded.shards_dir.glob("*.tar") if holds(shard, index.clips[2]))
    lost.unlink()
    audio, captions = [], []
    encode_audio, encode_hidden = type(base).encode_audio, type(base).encode_hidden
    monkeypatch.setattr(type(base), "encode_audio", lambda self, a: audio.append(a) or encode_audio(self, a))
    monkeypatch.setattr(type(base), "encode_hidden", lambda self, c: captions.extend(c) or encode_hidden(self, c))
    encode_everything(base, index, tmp_path)
    # The clip in both polarities, and the silence that follows it.
    assert len(audio) == 3
    assert captions == [index.clips[2].caption]
    assert published(tmp_path) == whole


def test_what_is_all_there_is_found_in_a_folder_that_nothing_can_be_written_to(base_dir, index, tmp_path, monkeypatch):
    base = load_base(base_dir)
    encode_everything(base, index, tmp_path)

    def read_only(path, *rest):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    # As root no mode of a folder keeps from writing.
    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(os, "unlink", read_only)
    encode_everything(base, index, tmp_path)


def holds(shard, clip):
    return any(found.clip.key == clip.key for found in LatentShard.read(shard).clips)


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
    base = load_base(base_dir)
    whole = _everything_read(index.directory, encode_everything(base, index, tmp_path))
    files = sorted(path for folder in (index.directory, tmp_path) for path in folder.rglob("*") if path.is_file())
    contents = {path: path.read_bytes() for path in files}
    draw = random.Random(11)
    noticed = []
    for _ in range(60):
        # Every kind of file as often, whatever its size.
        kind = draw.choice(["shard-000000.tar", "index.json", "latents-*.tar", "latents-*.json"])
        path = draw.choice([path for path in files if path.match(kind)])
        data = contents[path]
        place, bit = draw.randrange(len(data)), 1 << draw.randrange(8)
        path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
        try:
            # The stage runs again, as before every training.
            encoded = encode_everything(base, index, tmp_path)
            assert _everything_read(index.directory, encoded) == whole, (path, place)
        except (DataError, EnvironmentFailure) as problem:
            noticed.append((path.name, str(problem)))
        finally:
            for changed, content in contents.items():
                changed.write_bytes(content)
    assert len(noticed) > 30
    assert [pair for pair in noticed if pair[0] not in pair[1] or "\n" in pair[1]] == []
    assert _everything_read(index.directory, encode_everything(base, index, tmp_path)) == whole


def test_a_member_that_lies_in_the_place_of_another_is_noticed(base_dir, index, tmp_path):
    encoded = encode_everything(load_base(base_dir), index, tmp_path)
    path, *others = sorted(encoded.shards_dir.glob("*.tar"))
    kept = path.read_bytes()
    # Whole in itself, of the right size, and of another clip.
    path.write_bytes(others[0].read_bytes())
    (clip,) = (found.clip for found in LatentShard.read(path).clips)
    with pytest.raises(EnvironmentFailure, match=f"{path.name}: the latents of clip {clip.key} do not match"):
        encoded.latents(clip, False)
    path.write_bytes(kept)
    assert encoded.latents(clip, False).valid_frames == 6


def test_clips_with_one_sound_or_one_caption_share_what_is_encoded(base_dir, tmp_path):
    members = captioned(3, seconds=0.5)
    members["again.wav"], members["again.txt"] = members["clip0.wav"], members["clip1.txt"]
    source = write_zip(tmp_path / "a.zip", members)
    index = build_shards(str(source), tmp_path / "work", allow_any_dataset_size=True)
    encoded = encode_everything(load_base(base_dir), index, tmp_path / "one")
    clips = {clip.key: clip for clip in index.clips}
    again, first = (encoded.latents(clips[key], True) for key in ("again", "clip0"))
    assert torch.equal(again.latents_DT, first.latents_DT)
    assert files_of_clips(tmp_path / "one") == []
    # Every shard can be read alone: the caption's features are in both shards that need them.
    held = [found for path in sorted(encoded.shards_dir.glob("*.tar")) for found in LatentShard.read(path).clips]
    assert [found.clip.key for found in held] == ["again", "clip0", "clip1", "clip2"]
    assert all("prompt" in found.places for found in held)


def test_a_second_data_set_takes_over_what_the_first_has_encoded(base_dir, index, tmp_path, monkeypatch):
    base = load_base(base_dir)
    first = encode_everything(base, index, tmp_path / "work")
    members = captioned(4, seconds=0.5)
    source = write_zip(tmp_path / "b.zip", members)
    grown = build_shards(str(source), tmp_path / "grown", allow_any_dataset_size=True)
    encoded = []
    original = type(base).encode_audio
    monkeypatch.setattr(type(base), "encode_audio", lambda self, audio: encoded.append(audio) or original(self, audio))
    second = encode_everything(base, grown, tmp_path / "work")
    # The new clip in both polarities, and the silence that follows it.
    assert len(encoded) == 3
    assert second.shards_dir != first.shards_dir
    for clip in index.clips:
        assert torch.equal(first.latents(clip, True).latents_DT, second.latents(clip, True).latents_DT)


def test_two_ranks_leave_the_shards_that_one_leaves(base_dir, index, tmp_path):
    base = load_base(base_dir)
    # As many as forked ranks have: the number decides over last bits.
    torch.set_num_threads(1)
    encode_everything(base, index, tmp_path / "one")
    whole = published(tmp_path / "one")
    run_ranks(2, lambda group: bool(encode_everything(base, index, tmp_path / "two", group)))
    assert published(tmp_path / "two") == whole
    assert files_of_clips(tmp_path / "two") == []
