"""Validation: which clips are held out, that its losses mean the same everywhere, and what is decided by them."""

import hashlib
import io
import zipfile

import numpy as np
import pytest
import soundfile

from sa3dist import config, shard
from sa3dist.errors import ConfigError
from sa3dist.formats import ClipEntry, dataset_digest
from sa3dist.runtime.process_group import Group
from sa3dist.runtime.signals import StopRequest
from sa3dist.validation.split import chosen_by_name, chosen_by_share, grouped, hold_out, source_of
from tests.helpers.trainers import make_settings


def clip(key, audio=None):
    sha256 = hashlib.sha256((audio or key).encode()).hexdigest()
    return ClipEntry(key, "s.tar", 0, 10, sha256, "wav", 44100, 44100, 2, "a sound")


CLIPS = [clip(f"takes/t{number:02d}") for number in range(30)]


def test_a_share_holds_out_whole_groups_drawn_by_the_seed_alone():
    groups = grouped(CLIPS, [("takes/t00", "takes/t29"), ("takes/t29", "takes/t15")])
    assert ["takes/t00", "takes/t15", "takes/t29"] in groups
    assert sum(groups, []) != sorted(sum(groups, []))
    seen = {seed: chosen_by_share(groups, 0.2, seed) for seed in range(20)}
    assert {len(keys) for keys in seen.values()} == {6}
    assert all(len({"takes/t00", "takes/t15", "takes/t29"} & set(keys)) in (0, 3) for keys in seen.values())
    assert len({tuple(keys) for keys in seen.values()}) > 15
    assert all(chosen_by_share(groups[::-1], 0.2, seed) == keys for seed, keys in seen.items())


def test_of_a_small_set_one_file_is_held_out_and_the_smallest_group_where_none_is_alone():
    assert len(chosen_by_share([[f"c{n}"] for n in range(19)], 0.5, 1)) == 1
    assert chosen_by_share([["a", "b", "c"], ["d", "e"]], 0.1, 1) == ["d", "e"]


@pytest.mark.parametrize(
    ("key", "source"),
    [
        ("Song_part2", "song"),
        ("a/song-chunk003", "a/song"),
        ("a/song.seg 4", "a/song"),
        ("song_12", "song_12"),
        ("apart2", "apart2"),
        ("part2", "part2"),
    ],
)
def test_clips_cut_from_one_recording_are_known_by_the_words_of_their_names(key, source):
    assert source_of(key) == source


def test_equal_audio_and_cuts_of_one_recording_belong_together():
    clips = [clip("a_part1"), clip("a_part2"), clip("b", "same"), clip("c", "same"), clip("a"), clip("d")]
    assert grouped(clips, []) == [["a", "a_part1", "a_part2"], ["b", "c"], ["d"]]


def test_names_are_clips_files_or_folders_and_what_belongs_to_them_follows():
    groups = grouped(CLIPS, [("takes/t03", "takes/t07")])
    assert chosen_by_name(CLIPS, groups, ["takes/t03.wav"]) == ["takes/t03", "takes/t07"]
    assert chosen_by_name(CLIPS, groups, ["takes/t01", "takes/t02"]) == ["takes/t01", "takes/t02"]
    assert len(chosen_by_name(CLIPS, groups, ["takes/"])) == 30
    with pytest.raises(ConfigError, match="validation: 'takes/t0l' is no clip, .*, did you mean 'takes/t"):
        chosen_by_name(CLIPS, groups, ["takes/t0l"])


@pytest.fixture
def alike(tmp_path):
    """A zip of 20 noises, one of which is there again at -3 dB as OGG, opened as a data set; and its settings."""
    rng = np.random.default_rng(3)
    with zipfile.ZipFile(tmp_path / "clips.zip", "w") as archive:

        def store(name, audio_N, extension, **codec):
            held = io.BytesIO()
            soundfile.write(held, audio_N, 44100, format=extension.upper(), **codec)
            archive.writestr(f"{name}.{extension}", held.getvalue())
            archive.writestr(f"{name}.txt", "a noise")

        for number in range(20):
            pieces = [rng.standard_normal(4410) * rng.uniform(0.01, 0.2) for _ in range(20)]
            noise_N = np.convolve(np.concatenate(pieces), rng.standard_normal(24) / 5, "same").clip(-1, 1)
            store(f"n{number:02d}", noise_N, "flac")
            if number == 4:
                store("again", 0.708 * noise_N, "ogg", subtype="VORBIS")
    settings = make_settings(audio_data_url=str(tmp_path / "clips.zip"), work_dir=str(tmp_path / "work"))

    def split(**changes):
        changed = config.build(settings.model_dump() | changes)
        group, stop = Group(0, 1, "cpu"), StopRequest()
        return hold_out(changed, shard.open_dataset(changed, group, stop), group, stop)

    return split


@pytest.mark.parametrize("order", [["again"], ["n04"]])
def test_near_duplicates_lie_on_one_side(alike, order):
    index, held_out = alike(validation=order)
    assert [clip.key for clip in held_out] == ["again", "n04"]
    assert len(index.clips) == 19
    assert index.digest == dataset_digest(index.clips)
    for seed in range(30):
        index, held_out = alike(validation=0.1, seed=seed)
        assert len(held_out) == 2
        assert len({"again", "n04"} & {clip.key for clip in held_out}) in (0, 2)
