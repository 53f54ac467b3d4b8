"""Two runs that share only a work directory both go on, whatever both of them need at the same moment."""

import functools
import itertools
import threading
import time

import pytest

from sa3dist import errors
from sa3dist.data.batches.worker_shards import StreamCursor, WorkerShards
from sa3dist.data.remote.fetch import Downloads
from sa3dist.formats import atomic_directory
from sa3dist.runtime.file_lock import alone
from tests.helpers.forked_trainers import ForkedTrainer
from tests.helpers.latent_sets import write_set
from tests.helpers.latent_stream import source_of
from tests.helpers.ranks import run_ranks
from tests.helpers.servers import hostile_http

CONTENT = bytes(range(256)) * 8000


def fetch(group, url, directory):
    return Downloads(directory, lambda: False).fetch(url).read_bytes() == CONTENT


def borrow(group, url, directory):
    with Downloads(directory, lambda: False).borrowed(url) as local:
        time.sleep(0.2)
        return local.read_bytes() == CONTENT


def test_one_url_that_two_runs_need_is_downloaded_once_and_whole(tmp_path):
    with hostile_http(CONTENT) as server:
        work = functools.partial(fetch, url=f"{server.url}/throttle,etag/clips.zip", directory=tmp_path / "d")
        assert run_ranks(2, work) == [True, True]
        assert sum(method == "GET" for method, _ in server.requests) == 1
    kept = sorted(path.suffix for path in (tmp_path / "d").iterdir())
    assert kept == [".json", ".zip"]


def test_what_one_run_removes_after_use_is_not_taken_from_another_that_reads_it(tmp_path):
    with hostile_http(CONTENT) as server:
        work = functools.partial(borrow, url=f"{server.url}/throttle,etag/shard.tar", directory=tmp_path / "d")
        assert run_ranks(3, work) == [True] * 3
    assert not (tmp_path / "d").exists()


def test_a_run_that_waits_for_anothers_download_can_be_stopped(tmp_path):
    url, asked = "http://127.0.0.1:9/clips.zip", threading.Event()
    downloads = Downloads(tmp_path, asked.is_set)
    # As while the other run downloads: a server that keeps it long enough would take seconds.
    with downloads._alone(url):
        threading.Timer(0.3, asked.set).start()
        with pytest.raises(errors.Interrupted, match="stopped while another run downloads it"):
            Downloads(tmp_path, asked.is_set).fetch(url)


def stream(group, source, shards):
    clips = source.clips(WorkerShards(1, shards, 0, 1, 0, 1), StreamCursor(), 5)
    return sorted(clip.clip.key for clip, _, _ in itertools.islice(clips, 27))


def test_two_runs_stream_the_same_remote_shards(tmp_path_factory, tmp_path):
    paths = write_set(tmp_path_factory.mktemp("set"), [4, 1, 7, 2, 9, 4])
    files = {path.name: path.read_bytes() for path in paths}
    with hostile_http(files=files) as server:
        source = source_of(paths, urls=tuple(f"{server.url}/etag/{path.name}" for path in paths), scratch=tmp_path)
        found = run_ranks(3, functools.partial(stream, source=source, shards=len(paths)))
    assert len(set(found[0])) == 27
    assert found[0] == found[1] == found[2]
    assert list(tmp_path.iterdir()) == []


def make_folders(group, directory, rounds):
    """Publish folders, every other time in vain: the parent is then removed where it is empty."""
    made = 0
    for number in range(rounds):
        try:
            with atomic_directory(directory / f"{group.dist_rank}"):
                if number % 2:
                    raise KeyError
            made += 1
            (directory / f"{group.dist_rank}").rmdir()
        except KeyError:
            continue
    return made


def test_a_parent_that_another_run_removes_is_made_again(tmp_path):
    assert run_ranks(3, functools.partial(make_folders, directory=tmp_path / "shards", rounds=200)) == [100] * 3


def count_up(group, path, rounds):
    for _ in range(rounds):
        with alone(path.with_suffix(".lock")):
            path.write_text(str(int(path.read_text()) + 1))


def test_one_process_at_a_time_is_in_a_block_although_its_lock_comes_and_goes(tmp_path):
    path = tmp_path / "counter"
    path.write_text("0")
    run_ranks(4, functools.partial(count_up, path=path, rounds=100))
    assert path.read_text() == "400"
    assert list(tmp_path.iterdir()) == [path]


def test_two_runs_of_one_data_set_that_begin_together_end_with_the_same_file(demo_base, demo_clips, tmp_path):
    settings = {"model": demo_base, "work_dir": tmp_path / "work", "number_of_steps": 3, "audio_data_url": demo_clips}
    settings |= {"base_precision": "fp32", "mixed_precision": "no", "num_workers": 1, "rank": 2, "duration": 1}
    words = [f"{key}={value}" for key, value in settings.items()] + ["pre_encode=true"]
    words += ["report=false", "gradient_checkpointing=off"]
    with (
        ForkedTrainer([*words, f"output_dir={tmp_path / 'one'}"], tmp_path / "one.log") as one,
        ForkedTrainer([*words, f"output_dir={tmp_path / 'other'}"], tmp_path / "other.log") as other,
    ):
        assert [one.wait(240), other.wait(240)] == [0, 0], one.said() + other.said()
    assert (tmp_path / "one/lora.safetensors").read_bytes() == (tmp_path / "other/lora.safetensors").read_bytes()
