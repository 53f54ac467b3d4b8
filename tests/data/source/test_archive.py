"""Sources from strangers: what is listed, what is refused, and that refusing costs neither time, memory nor files."""

import bz2
import io
import os
import re
import stat
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sa3dist.data.source import containers, zips
from sa3dist.data.source.archive import expand_braces, open_container
from sa3dist.data.source.build import build_shards
from sa3dist.data.source.captions import read_caption
from sa3dist.data.source.pairing import pair_members
from sa3dist.errors import DataError
from tests.helpers.clips import captioned, declare, encode, tone, write_folder, write_tar, write_zip


def listing_of(source, tmp_path):
    with open_container(str(source), tmp_path / "work") as container:
        return pair_members(container)


def refusal(source, tmp_path, **kwargs):
    """The message of the DataError; asserts that nothing was left behind."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError) as caught:
        build_shards(str(source), tmp_path / "work", **kwargs)
    assert sorted(tmp_path.rglob("*")) == before
    return str(caught.value)


def test_a_nested_archive_is_listed_by_key_whatever_else_it_holds(tmp_path):
    members = {
        "set/b.FLAC": b"1",
        "set/b.txt": b"2",
        "set/Deep/a.b.aiff": b"3",
        "set/Deep/a.b.TXT": b"4",
        "set/": b"",
        "set/readme.pdf": b"5",
        "__MACOSX/set/._b.FLAC": b"6",
        "set/.DS_Store": b"7",
        "set/.hidden/c.wav": b"8",
    }
    listing = listing_of(write_zip(tmp_path / "a.zip", members), tmp_path)
    assert [(pair.key, pair.extension) for pair in listing.pairs] == [("set/Deep/a.b", "aiff"), ("set/b", "flac")]
    assert (listing.problems, listing.refusals) == ({}, ())
    assert [(kind.what, kind.count, kind.names) for kind in listing.left_out] == [
        ("hidden audio file", 1, ("set/.hidden/c.wav",)),
        ("other file", 1, ("set/readme.pdf",)),
        ("system file", 2, ()),
    ]


KNOWN = ["wav", "wave", "FLAC", "mp3", "ogg", "oga", "Opus", "aif", "aiff", "AIFC", "au", "caf", "w64"]


@pytest.mark.parametrize("extension", KNOWN)
def test_every_audio_extension_is_known_in_any_case(tmp_path, extension):
    listing = listing_of(write_zip(tmp_path / "a.zip", {f"x.{extension}": b"1", "x.txt": b"2"}), tmp_path)
    assert [(pair.key, pair.extension) for pair in listing.pairs] == [("x", extension.lower())]


def test_zip_folder_and_tar_of_the_same_files_give_the_same_clips(tmp_path):
    members = captioned(5, folder="kit/")
    sources = [
        write_zip(tmp_path / "a.zip", members, zipfile.ZIP_DEFLATED),
        write_folder(tmp_path / "folder", members),
        write_tar(tmp_path / "a.tar", members),
    ]
    indices = [build_shards(str(source), tmp_path / f"work{n}") for n, source in enumerate(sources)]
    assert indices[0].clips == indices[1].clips == indices[2].clips
    assert len({index.digest for index in indices}) == 1
    assert build_shards(sources[0].as_uri(), tmp_path / "work0").digest == indices[0].digest


def test_shards_are_a_source_by_braces_or_by_folder(tmp_path):
    (tmp_path / "s").mkdir()
    for number in range(3):
        part = {name.replace("clip", f"part{number}-"): data for name, data in captioned(2).items()}
        write_tar(tmp_path / "s" / f"x-{number:03d}.tar", part)
    braces = listing_of(tmp_path / "s" / "x-{000..002}.tar", tmp_path)
    assert [pair.key for pair in braces.pairs] == [f"part{n}-{c}" for n in range(3) for c in range(2)]
    assert [pair.key for pair in listing_of(tmp_path / "s", tmp_path).pairs] == [pair.key for pair in braces.pairs]
    with pytest.raises(DataError, match=r"x-003.tar: no such file or folder"):
        listing_of(tmp_path / "s" / "x-{000..003}.tar", tmp_path)


def test_names_that_several_shards_share_are_told_apart_by_shard(tmp_path):
    for number in range(2):
        write_tar(tmp_path / f"x-{number}.tar", captioned(2))
    listing = listing_of(tmp_path / "x-{0..1}.tar", tmp_path)
    assert [pair.key for pair in listing.pairs] == ["x-0/clip0", "x-0/clip1", "x-1/clip0", "x-1/clip1"]


def test_braces_expand_to_padded_numbers_and_are_bounded():
    assert expand_braces("s3://b/x-{008..010}.tar") == [f"s3://b/x-{n}.tar" for n in ("008", "009", "010")]
    assert expand_braces("{0..1}-{3..4}.tar") == ["0-3.tar", "0-4.tar", "1-3.tar", "1-4.tar"]
    assert expand_braces("odd{name}.zip") == ["odd{name}.zip"]
    for typo in ("x-{0..99999999}.tar", "x-{5..1}.tar"):
        with pytest.raises(DataError, match="expected a range of 1 to 100000 shards"):
            expand_braces(typo)


OUTSIDE = [
    ("../evil.wav", r"points outside the archive with '\.\.'"),
    ("a/../../evil.wav", r"points outside the archive with '\.\.'"),
    ("/etc/evil.wav", "has an absolute path"),
    ("C:/evil.wav", "has an absolute path"),
    ("..\\evil.wav", r"points outside the archive with '\.\.'"),
    ("set\\..\\..\\evil.pdf", r"points outside the archive with '\.\.'"),
    ("C:\\evil.wav", "has an absolute path"),
    ("new\nline.wav", r"new\\nline.wav: has a control character in its name"),
]
# A tar header cannot say these.
OUTSIDE_ZIP = [
    ("nul\0.wav", "has a control character in its name"),
    ("a/../", r"points outside the archive with '\.\.'"),
    ("", "has no name"),
]


@pytest.mark.parametrize(
    ("kind", "name", "fault"),
    [("zip", *case) for case in OUTSIDE + OUTSIDE_ZIP] + [("tar", *case) for case in OUTSIDE],
)
def test_names_that_could_lead_outside_are_refused(tmp_path, kind, name, fault):
    members = captioned(4) | {name: b"x"}
    if kind == "zip":
        info = zipfile.ZipInfo("placeholder")
        # The constructor would cut the name at a NUL.
        info.filename = info.orig_filename = name
        members = captioned(4) | {info: b"x"}
    source = (write_zip if kind == "zip" else write_tar)(tmp_path / f"a.{kind}", members)
    message = refusal(source, tmp_path, on_bad_clip="skip")
    assert "\n" not in message
    assert re.search(fault, message)


def _special(kind, name="odd.wav"):
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = (kind | 0o644) << 16
    return info


def test_links_and_devices_in_a_zip_are_refused(tmp_path):
    members = captioned(4) | {_special(stat.S_IFLNK): b"/etc/passwd"}
    message = refusal(write_zip(tmp_path / "a.zip", members), tmp_path)
    assert message.endswith("odd.wav: is a symbolic link, expected a file; put the file itself into the archive")
    members = captioned(4) | {_special(stat.S_IFIFO): b""}
    assert "odd.wav: is a device or pipe" in refusal(write_zip(tmp_path / "a.zip", members), tmp_path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    source = write_tar(tmp_path / "a.tar", captioned(4))
    with tarfile.open(source, "a") as archive:
        info = tarfile.TarInfo("odd.wav")
        info.type, info.linkname = kind, "clip0.wav"
        archive.addfile(info)
    message = refusal(source, tmp_path)
    assert "odd.wav: is a " in message
    assert "\n" not in message


def test_a_folder_of_links_to_files_and_folders_elsewhere_is_the_set_they_make(tmp_path):
    members = captioned(4)
    elsewhere = write_folder(tmp_path / "elsewhere", members | {"deep/er.flac": encode(tone(), container="FLAC")})
    (elsewhere / "deep" / "er.txt").write_text("behind two links")
    folder = tmp_path / "in"
    folder.mkdir()
    for name in members:
        (folder / name).symlink_to(elsewhere / name)
    (folder / "more").symlink_to(elsewhere / "deep")
    keys = [pair.key for pair in listing_of(folder, tmp_path).pairs]
    assert keys == ["clip0", "clip1", "clip2", "clip3", "more/er"]
    assert build_shards(str(folder), tmp_path / "work").clips[0].caption == "tone number 0"
    # The folder itself may be a link too.
    (tmp_path / "link").symlink_to(folder)
    assert [pair.key for pair in listing_of(tmp_path / "link", tmp_path).pairs] == keys


def test_links_that_loop_or_lead_to_what_is_read_already_are_named_and_end(tmp_path):
    folder = write_folder(tmp_path / "in", {f"a/{name}": data for name, data in captioned(4).items()})
    (folder / "a" / "up").symlink_to(folder)
    (folder / "parent").symlink_to(tmp_path)
    (folder / "again").symlink_to(folder / "a")
    other = tmp_path / "other"
    (other / "deep").mkdir(parents=True)
    (other / "deep" / "back").symlink_to(other)
    (folder / "other").symlink_to(other)
    listing = listing_of(folder, tmp_path)
    assert [pair.key for pair in listing.pairs] == [f"a/clip{n}" for n in range(4)]
    named = {kind.what: kind.names for kind in listing.left_out}
    assert named == {"linked folder": ("again",), "looping link": ("a/up", "other/deep/back", "parent")}


def test_links_to_nothing_and_pipes_are_refused_where_they_are_called_clips(tmp_path):
    folder = write_folder(tmp_path / "in", captioned(4))
    for name in ("dangling.wav", "dangling.pdf"):
        (folder / name).symlink_to("nowhere")
    (folder / "round.wav").symlink_to("round.wav")
    for name in ("pipe.wav", "pipe.sock"):
        os.mkfifo(folder / name)
    lines = refusal(folder, tmp_path, on_bad_clip="skip").split("\n")
    assert len(lines) == 2
    assert "dangling.wav, round.wav: is a link to nothing" in "".join(lines)
    assert "pipe.wav: is a device or pipe" in "".join(lines)
    assert [kind.names for kind in listing_of(folder, tmp_path).left_out] == [("dangling.pdf", "pipe.sock")]


def test_encrypted_members_are_refused_in_one_line_for_all(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in captioned(4).items():
            archive.writestr(name, data)
        for info in archive.infolist():
            info.flag_bits |= 1
    message = refusal(path, tmp_path)
    assert message == (
        f"{path}: clip0.txt, clip0.wav, clip1.txt and 5 more: is encrypted; make the zip again without a password"
    )


def test_a_compression_without_bounded_reads_is_refused(tmp_path):
    source = write_zip(tmp_path / "a.zip", captioned(4), zipfile.ZIP_BZIP2)
    assert "is compressed with bzip2, expected deflate or stored" in refusal(source, tmp_path)


def test_two_members_of_one_name_are_refused(tmp_path):
    source = write_zip(tmp_path / "a.zip", captioned(4) | {zipfile.ZipInfo("./clip0.wav"): b"x"})
    assert refusal(source, tmp_path).endswith("clip0.wav: is there twice under one name; make the archive again")


@pytest.mark.parametrize("rival", ["clip1.mp3", "CLIP1.wav", "Clip1.flac"])
def test_two_audio_files_cannot_claim_one_caption(tmp_path, rival):
    source = write_zip(tmp_path / "a.zip", captioned(4) | {rival: encode(tone())})
    message = refusal(source, tmp_path)
    assert "\n" not in message
    assert rival in message
    assert "clip1.wav" in message
    assert message.endswith("2 audio files claim one caption; rename or remove all but one")


def test_a_folder_and_a_name_of_it_are_paired_in_any_unicode_form(tmp_path):
    # macOS writes e + combining accent, Windows the one letter.
    members = {"caf\u0065\u0301.wav": b"1", "caf\u00e9.txt": b"2"}
    listing = listing_of(write_zip(tmp_path / "a.zip", members), tmp_path)
    assert [pair.key for pair in listing.pairs] == ["caf\u0065\u0301"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "caption is empty"),
        (b"\xef\xbb\xbf \r\n\t", "caption is empty"),
        (b"caf\xe9", r"caption is not UTF-8 \(byte 3\); save it as UTF-8"),
        ("\u30ad\u30c3\u30af".encode("utf-16-le"), "caption is not UTF-8"),
        (b"x" * 65537, "caption of 65537 bytes, expected at most 65536"),
    ],
)
def test_captions_that_say_nothing_are_refused(tmp_path, content, message):
    source = write_zip(tmp_path / "a.zip", captioned(4) | {"clip2.txt": content})
    with open_container(str(source), tmp_path) as container:
        pair = pair_members(container).pairs[2]
        with pytest.raises(DataError, match=message):
            read_caption(container, pair.caption)
    assert f"{source}: clip2.txt: caption" in refusal(source, tmp_path)


def test_captions_lose_their_byte_order_mark_and_outer_space(tmp_path):
    source = write_zip(tmp_path / "a.zip", {"a.wav": b"", "a.txt": "\ufeff  Glöckchen, \n leise \r\n".encode()})
    with open_container(str(source), tmp_path) as container:
        assert read_caption(container, pair_members(container).pairs[0].caption) == "Glöckchen, \n leise"


def test_sources_that_are_none_are_refused(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"not a zip at all")
    assert "a.zip: no readable zip (File is not a zip file)" in refusal(tmp_path / "a.zip", tmp_path)
    whole = write_zip(tmp_path / "b.zip", captioned(4)).read_bytes()
    (tmp_path / "b.zip").write_bytes(whole[:-30])
    assert "b.zip: no readable zip" in refusal(tmp_path / "b.zip", tmp_path)
    assert "nowhere.zip: no such file or folder; check the path" in refusal(tmp_path / "nowhere.zip", tmp_path)
    (tmp_path / "c.tar").write_bytes(bz2.compress(whole))
    assert "c.tar: is compressed with bzip2" in refusal(tmp_path / "c.tar", tmp_path)
    tar = write_tar(tmp_path / "d.tar", captioned(4))
    tar.write_bytes(tar.read_bytes()[: 2 * 512 + 5000])
    assert "d.tar is no readable plain tar" in refusal(tar, tmp_path)
    (tmp_path / "empty").mkdir()
    assert "found 0 usable clips, expected 4 to 2000" in refusal(tmp_path / "empty", tmp_path)


def test_zips_and_tars_that_were_joined_are_refused_for_one_of_them_would_be_lost(tmp_path):
    first, second = captioned(4), captioned(5, "more/")
    for write, name in ((write_zip, "a.zip"), (write_tar, "a.tar")):
        one, two = (write(tmp_path / f"{n}-{name}", members).read_bytes() for n, members in enumerate((first, second)))
        for joined in (one + two, one + two + one):
            (tmp_path / name).write_bytes(joined)
            message = refusal(tmp_path / name, tmp_path)
            assert "joined with cat" in message
        assert f"at byte {len(one)}," in message or name == "a.zip"
    with zipfile.ZipFile(tmp_path / "0-a.zip", "a") as archive:
        archive.comment = b"with a comment" * 100
    (tmp_path / "a.zip").write_bytes((tmp_path / "0-a.zip").read_bytes() + (tmp_path / "1-a.zip").read_bytes())
    assert "holds another zip in front" in refusal(tmp_path / "a.zip", tmp_path)


def test_a_zip_that_unpacks_itself_and_a_tar_with_a_filled_up_record_are_read(tmp_path):
    whole = write_zip(tmp_path / "a.zip", captioned(4)).read_bytes()
    # Its program searches for the record at the end of a zip.
    for program in (b"MZ" + bytes(1000), b"MZ" + b"PK\5\6" * 9, b"MZ" + b"PK\5\6" + bytes(18)):
        (tmp_path / "a.zip").write_bytes(program + whole)
        assert len(listing_of(tmp_path / "a.zip", tmp_path).pairs) == 4
    tar = write_tar(tmp_path / "a.tar", captioned(4))
    tar.write_bytes(tar.read_bytes() + bytes(10240) + b"left in memory" * 300)
    assert len(listing_of(tar, tmp_path).pairs) == 4
    members = sum(1024 + -(-len(data) // 512) * 512 - 512 for data in captioned(4).values())
    # Some programs write no end.
    tar.write_bytes(tar.read_bytes()[:members])
    assert len(listing_of(tar, tmp_path).pairs) == 4


def test_a_tar_with_a_damaged_header_is_refused_though_what_comes_before_it_could_be_read(tmp_path):
    tar = write_tar(tmp_path / "a.tar", captioned(6))
    data = bytearray(tar.read_bytes())
    at = data.index(b"clip5.wav")
    data[at + 20] ^= 1
    tar.write_bytes(data)
    assert f"a.tar is damaged at byte {at}" in refusal(tar, tmp_path)


def test_a_damaged_member_is_named(tmp_path):
    source = write_zip(tmp_path / "a.zip", captioned(4))
    data = bytearray(source.read_bytes())
    data[data.index(b"RIFF", 40000) + 2000] ^= 0xFF
    source.write_bytes(data)
    message = refusal(source, tmp_path)
    assert "\n" not in message
    assert "clip2.wav: damaged inside the zip (Bad CRC-32" in message


def _measured_refusal(source, tmp_path):
    tracemalloc.start()
    # Processor time: others may keep this process waiting.
    start = time.process_time()
    try:
        return (
            refusal(source, tmp_path, on_bad_clip="skip"),
            time.process_time() - start,
            tracemalloc.get_traced_memory()[1],
        )
    finally:
        tracemalloc.stop()


def test_a_member_that_declares_ten_gigabytes_is_refused_unread(tmp_path):
    members = captioned(4) | {"bomb.wav": bytes(10 << 20)}
    source = declare(tmp_path / "a.zip", members, file_size=10 << 30)
    message, seconds, peak = _measured_refusal(source, tmp_path)
    assert "bomb.wav: unpacks to 10737418240 bytes, over 200 times its packed size" in message
    assert "\n" not in message
    assert seconds < 1
    assert peak < 4 << 20


def test_a_member_that_declares_less_than_it_unpacks_to_is_read_no_further(tmp_path):
    members = captioned(4) | {"liar.txt": b"liar", "liar.wav": bytes(64 << 20)}
    source = declare(tmp_path / "a.zip", members, file_size=1000)
    tracemalloc.start()
    message = refusal(source, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "liar.wav: damaged inside the zip" in message
    assert peak < 16 << 20


def test_members_that_share_their_bytes_are_refused_together(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.wav", bytes(zips.RATIO_CHECKED_ABOVE_BYTES))
        for number in range(1, 100):
            # Each is small enough to pass alone; all point at the same 16 kB.
            copy = zipfile.ZipInfo(f"{number}.wav")
            for field in ("file_size", "compress_size", "CRC", "compress_type", "header_offset"):
                setattr(copy, field, getattr(archive.infolist()[0], field))
            archive.filelist.append(copy)
    message, _, peak = _measured_refusal(path, tmp_path)
    assert message == f"{path}: unpacks to {100 << 24} bytes, over 200 times its size; no audio does"
    assert peak < 4 << 20


def test_limits_on_size_and_number_hold_for_every_kind(tmp_path, monkeypatch):
    members = captioned(4)
    sources = [
        write_zip(tmp_path / "a.zip", members),
        write_folder(tmp_path / "folder", members),
        write_tar(tmp_path / "a.tar", members),
    ]
    size = len(members["clip0.wav"])
    for limit, value, message in [
        ("MAX_MEMBER_BYTES", size - 1, f" and 1 more: is {size} bytes, expected at most {size - 1}; cut it"),
        ("MAX_TOTAL_BYTES", 4 * size, f"unpacks to more than {4 * size} bytes; split it"),
        ("MAX_MEMBERS", 7, "more than 7 files; split it"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(containers, limit, value)
            for source in sources:
                assert message in refusal(source, tmp_path)


def test_bombs_are_refused_under_a_memory_limit(tmp_path):
    bomb = {"bomb.wav": bytes(200 << 20), "bomb.txt": b"boom"}
    declare(tmp_path / "real.zip", captioned(4) | bomb)
    declare(tmp_path / "ten.zip", captioned(4) | {"x.wav": bytes(10 << 20)}, file_size=10 << 30, compress_size=9 << 30)
    program = """
import resource, sys
from sa3dist.errors import DataError
from sa3dist.data.source.build import build_shards
import soundfile
# Half a gigabyte beyond what the imports take.
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (1 << 29),) * 2)
for source in sys.argv[2:]:
    try:
        build_shards(source, sys.argv[1], num_workers=2)
    except DataError as error:
        print(error)
"""
    sources = [str(tmp_path / "real.zip"), str(tmp_path / "ten.zip")]
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "work"), *sources],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        timeout=60,
        check=True,
    )
    real, ten = run.stdout.splitlines()
    assert "bomb.wav: unpacks to 209715200 bytes, over 200 times its packed size" in real
    assert f"x.wav: is {10 << 30} bytes, expected at most {1 << 30}" in ten


def _zipped(members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return out.getvalue()


def _tarred(members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


_SMALL = {f"{n}.{e}": d for n in range(4) for e, d in (("wav", encode(tone(0.02, hertz=99 * n + 99))), ("txt", b"t"))}
_ARCHIVES = {"zip": _zipped(_SMALL), "tar": _tarred(_SMALL)}


_PLACES = st.integers(0, 1 << 20)
_DAMAGE = st.lists(
    st.tuples(st.sampled_from(["flip", "set", "cut", "drop", "repeat"]), st.booleans(), _PLACES, st.integers(1, 64)),
    min_size=1,
    max_size=6,
)


def _mutated(data, damage):
    data = bytearray(data)
    for action, near_end, number, amount in damage:
        # The directory at a zip's end is where damage is most interesting.
        place = max(0, len(data) - 1 - number % 700) if near_end else number % len(data)
        if action == "flip":
            data[place] ^= 1 << amount % 8
        elif action == "set":
            data[place : place + 4] = (b"\xff" * 4, bytes(4), b"../x", b"/\\:\0")[amount % 4]
        elif action == "cut":
            del data[max(place, 1) :]
        elif action == "drop":
            del data[max(place, 1) : place + amount]
        else:
            data[place:place] = data[place : place + amount]
    return bytes(data)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.sampled_from(["zip", "tar"]), _DAMAGE, st.sampled_from(["raise", "skip"]))
def test_no_mutated_archive_does_more_than_be_refused(tmp_path_factory, kind, damage, on_bad_clip):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / f"a.{kind}").write_bytes(_mutated(_ARCHIVES[kind], damage))
    try:
        index = build_shards(str(folder / f"a.{kind}"), folder / "work", on_bad_clip=on_bad_clip, num_workers=1)
    except DataError as error:
        lines, left = str(error).split("\n"), set()
    else:
        lines, left = [], {folder / "work"}
        assert len(index.clips) == 4
    assert all(line.startswith(f"{folder}/a.{kind}: ") for line in lines)
    assert set(folder.iterdir()) == {folder / f"a.{kind}"} | left
