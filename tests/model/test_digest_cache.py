"""Digests kept between runs: found again for the same file, made anew for any other, whatever has happened to them."""

import os
import shutil
import threading

import pytest

from sa3dist import train
from sa3dist.formats import file_sha256
from sa3dist.model import base as base_module
from sa3dist.model import checkpoint, text
from sa3dist.model.config import PromptConfig
from sa3dist.model.digest_cache import DigestCache

LONG_AGO = 10**18


@pytest.fixture
def file(tmp_path):
    """A file that was last changed long ago."""
    path = tmp_path / "odd näme #1.bin"
    path.write_bytes(b"some weights")
    os.utime(path, ns=(LONG_AGO, LONG_AGO))
    return path


@pytest.fixture
def kept(tmp_path):
    """The digest of a file as a new process would find it, and how many were made."""
    made = []

    def digest(path, verify=False, what="file"):
        def make():
            made.append(path)
            return file_sha256(path)

        return DigestCache(tmp_path / "kept", verify).of(path, what, make)

    digest.made = made
    return digest


def test_a_digest_is_made_once_for_a_file_that_stays_as_it_is(file, kept):
    assert kept(file) == kept(file) == file_sha256(file)
    assert len(kept.made) == 1
    # By whatever path it is reached.
    link = file.with_name("link")
    link.symlink_to(file)
    assert kept(link) == file_sha256(file)
    assert len(kept.made) == 1


def test_two_kinds_of_digest_of_one_file_are_kept_beside_each_other(file, kept):
    for _ in range(2):
        kept(file)
        kept(file, what="a part of it")
    assert len(kept.made) == 2


def resize(path):
    path.write_bytes(b"more weights than before")
    os.utime(path, ns=(LONG_AGO, LONG_AGO))


def rewrite(path):
    path.write_bytes(b"SOME weights")
    os.utime(path, ns=(LONG_AGO + 1, LONG_AGO + 1))


def replace(path):
    other = path.with_name("other")
    other.write_bytes(b"OTHER weight")
    os.utime(other, ns=(LONG_AGO, LONG_AGO))
    os.replace(other, path)


@pytest.mark.parametrize("change", [resize, rewrite, replace])
def test_another_size_time_or_inode_has_the_digest_made_anew_and_kept(file, kept, change):
    before = kept(file)
    change(file)
    assert kept(file) == kept(file) == file_sha256(file) != before
    assert len(kept.made) == 2


def test_another_path_with_equal_bytes_is_another_file(file, kept, tmp_path):
    kept(file)
    copy = tmp_path / "copy"
    shutil.copy2(file, copy)
    kept(copy)
    assert len(kept.made) == 2


def test_verify_hashes_a_file_that_looks_unchanged_and_keeps_what_it_found(file, kept):
    kept(file)
    # What no figure of the file tells: the same inode, size and time, other bytes.
    file.write_bytes(b"evil weights")
    os.utime(file, ns=(LONG_AGO, LONG_AGO))
    assert kept(file) != file_sha256(file)
    assert kept(file, verify=True) == file_sha256(file)
    assert kept(file) == file_sha256(file)


@pytest.mark.parametrize("damage", [b"", b"{}", b"not json", None])
def test_a_damaged_record_is_made_anew(file, kept, tmp_path, damage):
    kept(file)
    (record,) = (tmp_path / "kept").iterdir()
    whole = record.read_bytes()
    digest = file_sha256(file).encode()
    record.write_bytes(whole.replace(digest, digest[::-1]) if damage is None else damage)
    assert kept(file) == file_sha256(file)
    assert record.read_bytes() == whole


def test_nothing_is_kept_of_a_file_that_was_written_just_now_or_changes_meanwhile(file, tmp_path):
    fresh = tmp_path / "fresh"
    fresh.write_bytes(b"still being written")
    keeper = DigestCache(tmp_path / "kept")
    assert keeper.of(fresh, "file", lambda: "digest") == "digest"
    assert keeper.of(file, "file", lambda: rewrite(file) or "digest") == "digest"
    assert not (tmp_path / "kept").exists()


def test_a_digest_that_has_begun_is_waited_for_and_its_failure_is_raised_where_it_is_asked_for(file, tmp_path):
    keeper, go, made = DigestCache(tmp_path / "kept"), threading.Event(), []

    def slow():
        go.wait(10)
        made.append("begun")
        return "digest"

    keeper.begin(file, "file", slow)
    threading.Timer(0.05, go.set).start()
    never = pytest.fail
    assert keeper.of(file, "file", never) == "digest"
    assert keeper.of(file, "file", never) == "digest"
    assert made == ["begun"]

    def breaks():
        raise OSError("the disk went away")

    keeper.begin(file, "other", breaks)
    with pytest.raises(OSError, match="the disk went away"):
        keeper.of(file, "other", never)
    assert keeper.of(file, "other", lambda: "found later") == "found later"


def test_a_second_run_hashes_no_weights_and_verify_base_does(words, tmp_path, demo_base, monkeypatch):  # noqa: F811
    base, asked = tmp_path / "base", []
    shutil.copytree(demo_base, base)
    for path in base.rglob("*"):
        os.utime(path, ns=(LONG_AGO, LONG_AGO))
    monkeypatch.setattr(text, "LARGE_BYTES", 1)

    def counting(module, name):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arguments: asked.append(name) or original(*arguments))

    counting(text, "file_sha256")
    counting(base_module, "tensors_sha256")
    whole = checkpoint.CheckpointFile.digest.func
    monkeypatch.setattr(
        checkpoint.CheckpointFile, "digest", property(lambda self: asked.append("digest") or whole(self))
    )
    everything = {"file_sha256", "tensors_sha256", "digest"}
    more = [f"model={base}", f"work_dir={tmp_path / 'work'}", "number_of_steps=1"]
    for number, (extra, expected) in enumerate([([], everything), ([], set()), (["verify_base=true"], everything)]):
        asked.clear()
        assert train.main([*words, *more, *extra, f"output_dir={tmp_path / str(number)}"]) == 0
        assert set(asked) == expected
        # What threads have begun is not made again where it is asked for.
        assert asked.count("tensors_sha256") <= 1


def test_a_file_of_the_text_encoder_that_cannot_be_read_is_left_to_who_asks_for_the_digest(tmp_path):
    for name in text.NEEDED_FILES:
        (tmp_path / name).write_text("{}")
    (tmp_path / "model.safetensors").symlink_to("nowhere")
    source, kept = text.TextSource(PromptConfig(max_length=20), override=str(tmp_path)), DigestCache(tmp_path / "kept")
    source.begin_digest(kept)
    with pytest.raises(FileNotFoundError):
        source.digest(kept)
