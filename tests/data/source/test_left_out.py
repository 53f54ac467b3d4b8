"""Nothing is left out in silence: each file is a clip, a used caption, named, or counted as a system's own."""

import json
import os
import struct
import zipfile
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sa3dist import cli
from sa3dist.data.latents.source import latent_shards_of, streamed_shards
from sa3dist.data.source.archive import open_container
from sa3dist.data.source.build import build_shards
from sa3dist.data.source.pairing import pair_members
from sa3dist.errors import DataError
from tests.helpers.clips import captioned, encode, tone, write_folder, write_tar, write_zip

SOUND = encode(tone())


def listing_of(source, tmp_path):
    with open_container(str(source), tmp_path / "work") as container:
        return pair_members(container)


def left_out_of(source, tmp_path):
    """{what: names}; system files have none."""
    return {kind.what: kind.names or kind.count for kind in listing_of(source, tmp_path).left_out}


def refusal(source, tmp_path):
    with pytest.raises(DataError) as caught:
        build_shards(str(source), tmp_path / "work")
    return str(caught.value)


@pytest.mark.parametrize("tar", ["old_backup.tar", "OLD.TAR"])
@pytest.mark.parametrize("folder", ["", "drums/", "a/b/c/"])
def test_a_folder_of_clips_with_a_tar_on_top_is_refused_naming_both(tmp_path, folder, tar):
    source = write_folder(tmp_path / "set", captioned(8, folder=folder))
    write_tar(source / tar, captioned(4))
    message = refusal(source, tmp_path)
    assert message.startswith(
        f"{source}: holds shards ({tar}) and clips ({folder}clip0.wav), and only one can be meant"
    )
    assert "\n" not in message
    assert not (tmp_path / "work").exists()


def test_latent_shards_beside_clips_or_other_shards_are_refused(tmp_path):
    source = write_folder(tmp_path / "set", captioned(4, folder="drums/"))
    write_tar(source / "latents-000000.tar", {"x": b""})
    with pytest.raises(DataError, match=r"holds shards \(latents-000000.tar\) and clips \(drums/clip0.wav\)"):
        latent_shards_of(str(source))
    other = write_folder(tmp_path / "other", {})
    other.mkdir()
    for name in ("latents-000000.tar", "shard-000000.tar"):
        write_tar(other / name, {"x": b""})
    with pytest.raises(DataError, match="latent shards and others side by side"):
        latent_shards_of(str(other))


def test_what_lies_beside_shards_or_below_clips_is_named(tmp_path):
    source = write_folder(
        tmp_path / "shards", {"captions.csv": b"file,caption\n", "sub/note.md": b"", ".DS_Store": b""}
    )
    write_tar(source / "x-0.tar", captioned(4))
    (source / "x-1.tar.gz").write_bytes(b"\x1f\x8b")
    named = ("captions.csv", "sub/note.md", "x-1.tar.gz")
    assert left_out_of(source, tmp_path) == {"file": named, "system file": 1}
    clips = write_folder(tmp_path / "clips", captioned(4))
    (clips / "sub").mkdir()
    write_tar(clips / "sub" / "more.tar", captioned(4))
    assert left_out_of(clips, tmp_path) == {"tar archive": ("sub/more.tar",)}


def test_what_lies_beside_latent_or_streamed_shards_is_named(tmp_path, caplog):
    source = write_folder(tmp_path / "set", {"latents-000000.json": b"{}", "index.json": b"{}", "old/notes.md": b""})
    write_tar(source / "latents-000000.tar", {"x": b""})
    assert latent_shards_of(str(source)) == [str(source / "latents-000000.tar")]
    assert f"{source}: left out: 1 file (old/notes.md): beside shards" in caplog.text
    caplog.clear()
    (source / "latents-000000.tar").rename(source / "x-000000.tar")
    assert streamed_shards(str(source)).urls == (str(source / "x-000000.tar"),)
    assert "2 files (latents-000000.json, old/notes.md): beside shards" in caplog.text


def test_a_report_that_cannot_be_written_again_is_said_and_harms_nothing(tmp_path, monkeypatch, caplog):
    first = build_shards(str(write_zip(tmp_path / "a.zip", captioned(4))), tmp_path / "work")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sa3dist.data.source.shard_split.write_report", full)
    other = str(write_zip(tmp_path / "b.zip", captioned(4) | {"song.m4a": b""}))
    assert build_shards(other, tmp_path / "work").clips == first.clips
    assert f"{first.directory / 'report.txt'}: cannot be written (No space left on device)" in caplog.text


UNREAD = {
    "song.m4a": b"\0\0\0\x20ftypM4A ",
    "song.json": b'{"caption": "a song"}',
    "b/take.wma": b"\x30\x26\xb2\x75",
    "b/take.txt": b"a take",
    "inner.zip": b"PK\5\6" + bytes(18),
    "cover.jpg": b"\xff\xd8",
    "od\x01d.pdf": b"",
    "Thumbs.db": b"",
    "Icon\r": b"",
    "__MACOSX/._clip0.wav": b"",
}


def test_audio_that_cannot_be_read_is_said_with_count_names_and_cure_in_shard_inspect_and_report(
    tmp_path, capfd, caplog
):
    source = write_zip(tmp_path / "a.zip", captioned(4) | UNREAD)
    work = tmp_path / "work"
    assert cli.main(["shard", f"audio_data_url={source}", f"work_dir={work}", f"output_dir={tmp_path / 'run'}"]) == 0
    shard = caplog.text
    capfd.readouterr()
    assert cli.main(["inspect", str(source), f"work_dir={work}"]) == 0
    inspect = capfd.readouterr().out
    assert cli.main(["inspect", str(source), f"work_dir={work}", "--json"]) == 0
    as_json = {kind["what"]: kind for kind in json.loads(capfd.readouterr().out)["left_out"]}
    (report,) = work.glob("shards/*/report.txt")
    for text in (shard, inspect, report.read_text()):
        assert "1 m4a file (song.m4a): audio of a kind that cannot be read here; convert it: ffmpeg -i" in text
        assert "1 wma file (b/take.wma)" in text
        assert "1 caption (b/take.txt): of audio that is left out" in text
        assert "1 zip archive (inner.zip): an archive inside the data set is not opened; unpack it" in text
        assert "3 other files (cover.jpg, od\\x01d.pdf, song.json): neither audio nor a caption" in text
        assert "3 system files: left by operating systems and file managers" in text
    assert as_json["other file"]["names"] == ["cover.jpg", "od\x01d.pdf", "song.json"]
    assert as_json["system file"]["count"] == 3


def test_many_files_of_a_kind_are_one_line_with_the_first_names_and_inspect_has_them_all(tmp_path, capfd):
    source = write_zip(tmp_path / "a.zip", captioned(4) | {f"{n:02d}.m4a": b"" for n in range(40)})
    index = build_shards(str(source), tmp_path / "work")
    (kind,) = index.left_out
    assert kind.line().startswith("40 m4a files (00.m4a, 01.m4a, 02.m4a and 37 more): ")
    assert cli.main(["inspect", str(source), f"work_dir={tmp_path / 'work'}"]) == 0
    shown = capfd.readouterr().out
    assert all(f"{n:02d}.m4a" in shown for n in range(40))


def test_the_report_is_that_of_the_last_source_with_these_clips(tmp_path):
    sources = [captioned(4) | {"song.m4a": b""}, captioned(4) | {"notes.pdf": b""}, captioned(4)]
    for number, (members, expected) in enumerate(
        zip(sources, ["song.m4a", "notes.pdf", "left out     0"], strict=True)
    ):
        index = build_shards(str(write_zip(tmp_path / f"{number}.zip", members)), tmp_path / "work")
        assert expected in (index.directory / "report.txt").read_text()
    assert len(list((tmp_path / "work" / "shards").iterdir())) == 1


def test_recordings_in_other_names_of_known_formats_are_read(tmp_path):
    members = captioned(1) | {
        "a.aifc": encode(tone(), container="AIFF", subtype="FLOAT"),
        "b.oga": encode(tone(), container="OGG", subtype="VORBIS"),
        "c.wave": encode(tone()),
        "d.caf": encode(tone(), container="CAF"),
        "e.au": encode(tone(), container="AU"),
        "f.w64": encode(tone(), container="W64"),
    }
    members |= {f"{name[0]}.txt": b"a tone" for name in list(members) if not name.startswith("clip")}
    index = build_shards(str(write_zip(tmp_path / "a.zip", members)), tmp_path / "work")
    assert [(clip.key, clip.samples) for clip in index.clips] == [
        (key, len(tone())) for key in sorted([*"abcdef", "clip0"])
    ]
    assert index.left_out == ()


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_what_cannot_matter_refuses_nothing(tmp_path, kind):
    members = captioned(4) | {"no\x7fte.pdf": b"", "a\x01b/notes.txt": b"", "Icon\r": b"", "set/.\x02": b""}
    if kind == "folder":
        source = write_folder(tmp_path / "set", members)
        os.symlink("nowhere", source / "link.md")
        (source / os.fsdecode(b"caf\xe9.pdf")).write_bytes(b"")
        expected = {"other file": ("a\x01b/notes.txt", "caf\\udce9.pdf", "link.md", "no\x7fte.pdf")}
    else:
        locked = zipfile.ZipInfo("locked.psd")
        source = write_zip(tmp_path / "a.zip", members | {locked: b"x"})
        data = bytearray(source.read_bytes())
        # Encrypted, says the flag of the last entry in the directory.
        data[data.rindex(b"PK\1\2") + 8] |= 1
        source.write_bytes(data)
        expected = {"other file": ("a\x01b/notes.txt", "locked.psd", "no\x7fte.pdf")}
    assert left_out_of(source, tmp_path) == expected | {"system file": 2}
    assert len(build_shards(str(source), tmp_path / "work").clips) == 4


def test_an_odd_name_of_a_clip_is_still_refused(tmp_path):
    source = write_zip(tmp_path / "a.zip", captioned(4) | {"no\x01.wav": SOUND, "no\x01.txt": b"x"})
    message = refusal(source, tmp_path)
    assert message.endswith("no\\x01.wav: has a control character in its name; rename it")


PACKED = {
    "set.tar.gz": (b"\x1f\x8b\x08", "compressed with gzip", "tar -xzf set.tar.gz"),
    "set.tgz": (b"\x1f\x8b\x08", "compressed with gzip", "tar -xzf set.tgz"),
    "set.tar.zst": (b"\x28\xb5\x2f\xfd", "compressed with zstandard", "tar --zstd -xf set.tar.zst"),
    "set.tar.xz": (b"\xfd7zXZ\0", "compressed with xz", "tar -xJf set.tar.xz"),
    "set.tar": (b"BZh9", "compressed with bzip2", "tar -xjf set.tar"),
    "set.7z": (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "7z x set.7z"),
    "set.zip": (b"Rar!\x1a\x07\x01", "a RAR archive", "unrar x set.zip"),
}


@pytest.mark.parametrize("name", PACKED)
def test_an_archive_of_another_kind_is_one_line_with_cause_and_cure(tmp_path, name):
    start, what, command = PACKED[name]
    (tmp_path / name).write_bytes(start + bytes(600))
    message = refusal(tmp_path / name, tmp_path)
    assert message.startswith(f"{tmp_path / name}: is {what}, expected a zip, a plain .tar or a folder; unpack it")
    assert f"({command})" in message
    assert "\n" not in message


def test_a_packed_shard_among_others_is_named(tmp_path):
    folder = write_folder(tmp_path / "set", {"x-1.tar": b"\x1f\x8b" + bytes(600)})
    write_tar(folder / "x-0.tar", captioned(4))
    for source in (folder, folder / "x-{0..1}.tar"):
        message = refusal(source, tmp_path)
        assert message.startswith(f"{source}: x-1.tar: is compressed with gzip, expected a zip, a plain .tar")


def test_a_tar_is_one_whatever_it_is_called_and_so_is_a_zip(tmp_path):
    clips = listing_of(write_zip(tmp_path / "a.zip", captioned(4)), tmp_path).pairs
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.zip").read_bytes())
    write_tar(tmp_path / "b.zip", captioned(4))
    for name in ("a.tar", "b.zip"):
        assert [pair.key for pair in listing_of(tmp_path / name, tmp_path).pairs] == [pair.key for pair in clips]
    (tmp_path / "kick.wav").write_bytes(SOUND)
    assert "kick.wav: is one recording" in refusal(tmp_path / "kick.wav", tmp_path)


def test_a_zip_of_zips_and_a_folder_of_archives_are_one_line_with_cause_and_cure(tmp_path):
    inner = write_zip(tmp_path / "inner.zip", captioned(4)).read_bytes()
    source = write_zip(tmp_path / "a.zip", {"one.zip": inner, "two.zip": inner})
    folder = write_folder(tmp_path / "set", {"a.tar.gz": b"\x1f\x8b", "b.tar.gz": b"\x1f\x8b"})
    for place, what in (
        (source, "2 zip archives (one.zip, two.zip)"),
        (folder, "2 tar.gz archives (a.tar.gz, b.tar.gz)"),
    ):
        assert refusal(place, tmp_path) == (
            f"{place}: found no usable clip, but {what}: an archive inside the data set is not opened; unpack it, or "
            f"give it by itself"
        )


def zip_of_raw_names(path, members, extra=b"", flags=0):
    """Names in raw bytes, as other systems write them."""
    stand_ins = {raw: f"~{number}~".ljust(len(raw), "x") for number, raw in enumerate(members)}
    with zipfile.ZipFile(path, "w") as archive:
        for raw, data in members.items():
            info = zipfile.ZipInfo(stand_ins[raw])
            info.extra = extra(raw) if extra else b""
            archive.writestr(info, data)
    data = path.read_bytes()
    for raw, stand_in in stand_ins.items():
        data = data.replace(stand_in.encode(), raw)
    if flags:
        for magic, offset in ((b"PK\3\4", 7), (b"PK\1\2", 9)):
            at = data.find(magic)
            while at >= 0:
                data = data[: at + offset] + bytes([data[at + offset] | flags]) + data[at + offset + 1 :]
                at = data.find(magic, at + 1)
    path.write_bytes(data)
    return path


def named(names, encoding, separator="/"):
    """Raw names of clips of various lengths, none the start of another, with their captions."""
    members = {}
    for number, name in enumerate(names):
        for extension, data in ((".wav", encode(tone(hertz=200 + 30 * number))), (".txt", b"a tone")):
            members[name.replace("/", separator).encode(encoding) + extension.encode()] = data
    return members


GERMAN = ["Gl\u00f6ckchen gro\u00df", "Kl\u00e4nge/\u00dcbung 1", "Bass", "caf\u00e9 cr\u00e8me br\u00fbl\u00e9e"]
JAPANESE = ["\u30c9\u30e9\u30e0", "\u97f3\u697d/\u30bd", "\u4e00", "\u30d4\u30a2\u30ce \u66f2"]
CHINESE = ["\u9f13\u58f0", "\u97f3\u4e50/\u7b1b\u5b50", "\u4e00", "\u94a2\u7434\u66f2"]
RUSSIAN = [
    "\u0411\u0430\u0440\u0430\u0431\u0430\u043d",
    "\u0431\u0430\u0441/\u041d\u0418\u0417",
    "\u043d",
    "\u0413\u0438\u0442\u0430\u0440\u0430",
]


def unicode_path(encoding):
    def extra(raw):
        name = raw.decode(encoding).encode()
        field = b"\x01" + struct.pack("<I", zlib.crc32(raw)) + name
        return struct.pack("<HH", 0x7075, len(field)) + field

    return extra


@pytest.mark.parametrize(("names", "encoding"), [(GERMAN, "cp437"), (JAPANESE, "utf-8"), (RUSSIAN, "utf-8")])
def test_names_without_a_flag_are_read_where_their_code_page_shows(tmp_path, names, encoding):
    source = zip_of_raw_names(tmp_path / "a.zip", named(names, encoding))
    assert [clip.key for clip in build_shards(str(source), tmp_path / "work").clips] == sorted(names)


@pytest.mark.parametrize(("names", "encoding"), [(JAPANESE, "cp932"), (CHINESE, "gbk"), (RUSSIAN, "cp866")])
def test_the_unicode_path_field_says_what_a_name_is(tmp_path, names, encoding):
    source = zip_of_raw_names(tmp_path / "a.zip", named(names, encoding), unicode_path(encoding))
    assert [clip.key for clip in build_shards(str(source), tmp_path / "work").clips] == sorted(names)


@pytest.mark.parametrize(
    ("names", "encoding"),
    [
        (JAPANESE, "cp932"),
        (["\u30c9\u30e9\u30e0"], "cp932"),
        (CHINESE, "gbk"),
        (CHINESE[:1], "big5"),
        (["\ub4dc\ub7fc"], "cp949"),
        (RUSSIAN, "cp866"),
        (["\u0411\u0410\u0421"], "cp866"),
        (RUSSIAN, "cp1251"),
        (GERMAN, "cp1252"),
        (["Don\u2019t stop"], "cp1252"),
    ],
)
def test_names_in_a_code_page_nobody_can_tell_are_refused_in_one_line_with_the_cure(tmp_path, names, encoding):
    if encoding == "big5":
        names = ["\u9f13\u8072"]
    source = zip_of_raw_names(tmp_path / "a.zip", named(names, encoding))
    message = refusal(source, tmp_path)
    assert message.startswith(f"{source}: names of clips are in a code page it does not state, ")
    assert "make it again with names in UTF-8, or unpack it with the right code page (unzip -O cp932" in message
    assert message.isascii()
    assert "\n" not in message


def test_a_zip_that_claims_utf_8_and_holds_something_else_is_refused_with_cause_and_cure(tmp_path):
    source = zip_of_raw_names(tmp_path / "a.zip", named(GERMAN, "cp1252"), flags=0x08)
    message = refusal(source, tmp_path)
    assert message.startswith(f"{source}: names of clips are said to be UTF-8 and are not; make it again")


@pytest.mark.parametrize("kind", ["zip", "tar", "folder"])
def test_backslashes_between_folders_are_read_as_what_they_were_meant_to_be(tmp_path, kind):
    members = {f"set\\deep\\{name}": data for name, data in captioned(4).items()}
    write = {"zip": write_zip, "tar": write_tar, "folder": write_folder}[kind]
    source = write(tmp_path / f"a.{kind}", members | ({"set\\deep\\": b""} if kind == "zip" else {}))
    index = build_shards(str(source), tmp_path / "work")
    assert [clip.key for clip in index.clips] == [f"set/deep/clip{n}" for n in range(4)]


def test_a_backslash_name_that_meets_another_is_refused(tmp_path):
    source = write_zip(tmp_path / "a.zip", captioned(4, folder="set/") | {"set\\clip0.wav": b"x"})
    assert refusal(source, tmp_path).endswith("set/clip0.wav: is there twice under one name; make the archive again")


def test_after_a_faulty_table_only_the_table_is_named(tmp_path, capfd):
    sounds = {f"clip{n:02d}.wav": SOUND for n in range(40)}
    for name, content in [
        ("captions.csv", b"\xff"),
        ("captions.jsonl", b'{"file": "clip00.wav", "text": "x"}\n{'),
        ("captions.csv", b"a;b\n"),
    ]:
        members = {f"a/{file}": data for file, data in sounds.items()} | {f"a/{name}": content}
        source = write_zip(tmp_path / "a.zip", members | {"b/lone.wav": SOUND})
        first, second = refusal(source, tmp_path).split("\n")
        assert first.startswith(f"{source}: a/{name}")
        # What does not lie below the table is a fault of its own.
        assert second.endswith("b/lone.wav: audio without a caption; add lone.txt beside it")
        listing = listing_of(source, tmp_path)
        assert len(listing.pairs) + len(listing.unread) == 40
        assert cli.main(["inspect", str(source), f"work_dir={tmp_path / 'work'}"]) == 0
        skipped = [line for line in capfd.readouterr().out.splitlines() if line.startswith("skipped: ")]
        assert len(skipped) == 2
        assert skipped[0].endswith(
            f"and {len(listing.unread) - 3} more): its caption may be in a/{name}, which is refused"
        )


_STEMS = st.sampled_from(
    ["a", "b", "C", "sub/a", "sub/\u00e9", ".hid", "sub/.deep/x", "__MACOSX/._a", "a b", "od\x02d"]
)
_EXTENSIONS = st.sampled_from(
    [".wav", ".flac", ".txt", ".json", ".m4a", ".zip", ".pdf", ".tar.gz", "", ".TXT", ".Wave", ".csv"]
)
_SPECIAL = st.sampled_from(
    ["Thumbs.db", "sub/desktop.ini", ".DS_Store", "captions.csv", "sub/captions.jsonl", "metadata.csv", "Icon\r"]
)
_NAMES = st.lists(st.one_of(st.builds(str.__add__, _STEMS, _EXTENSIONS), _SPECIAL), max_size=16, unique_by=str.casefold)
_CONTENT = {
    "captions.csv": b"file,caption\na.wav,one\nsub/a.flac,two\nnot there.wav,three\n",
    "captions.jsonl": b'{"file": "a.wav", "text": "x"}\n',
    "metadata.csv": b"id,bpm\n1,2\n",
}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_NAMES, st.sampled_from(["zip", "tar", "folder"]))
def test_every_file_is_a_clip_a_used_caption_named_or_counted_as_a_systems_own(tmp_path_factory, names, kind):
    folder = tmp_path_factory.mktemp("files")
    members = {name: _CONTENT.get(name.rpartition("/")[2], b"x") for name in names if name}
    write = {"zip": write_zip, "tar": write_tar, "folder": write_folder}[kind]
    source = write(folder / f"in.{kind}", members)
    source.mkdir(exist_ok=True) if kind == "folder" else None
    with open_container(str(source), folder / "work") as container:
        listing = pair_members(container)
    used = {pair.audio.name for pair in listing.pairs}
    used |= {name.partition(", line")[0] for name in (pair.caption_name for pair in listing.pairs)}
    left_out = [name for kind in listing.left_out for name in kind.names]
    said = [*listing.refusals, *(line for lines in listing.problems.values() for line in lines)]
    system = sum(kind.count for kind in listing.left_out if kind.what == "system file")

    # By the list in docs/data.md; recordings among them are named.
    systems_own = [name for name in members if _is_system(name) and name not in left_out]
    assert len(systems_own) == system

    def is_said(name):
        shown = name if name.isprintable() else name.encode("unicode_escape").decode()
        lines = [*said, *(one for one in left_out if one.startswith(f"{name}, line "))]
        # What a refused table leaves without a caption is listed by key.
        listed = name in used or name in left_out or name.rpartition(".")[0] in listing.unread
        return listed or any(shown in line for line in lines)

    assert [name for name in members if name not in systems_own and not is_said(name)] == []


def _is_system(name):
    parts = name.casefold().split("/")
    return parts[-1] in ("thumbs.db", "desktop.ini", "icon\r") or any(p[:1] == "." or p == "__macosx" for p in parts)
