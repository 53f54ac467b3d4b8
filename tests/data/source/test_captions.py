"""Captions from .txt, .json and manifests: each clip gets the right one, and every fault names its line."""

import csv
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sa3dist.data.source.archive import open_container
from sa3dist.data.source.build import build_shards
from sa3dist.data.source.captions import is_blank, read_caption
from sa3dist.data.source.pairing import pair_members
from sa3dist.errors import DataError
from tests.helpers.clips import captioned, encode, tone, write_folder, write_tar, write_zip

SOUND = encode(tone())


def captions_of(members, tmp_path):
    with open_container(str(write_zip(tmp_path / "a.zip", members)), tmp_path / "work") as container:
        listing = pair_members(container)
        assert (listing.refusals, listing.problems) == ((), {})
        return {pair.key: read_caption(container, pair.caption) for pair in listing.pairs}


def faults_of(members, tmp_path):
    with pytest.raises(DataError) as caught:
        build_shards(str(write_zip(tmp_path / "a.zip", captioned(4) | members)), tmp_path / "work")
    assert not (tmp_path / "work" / "shards").exists()
    return str(caught.value).replace(f"{tmp_path / 'a.zip'}: ", "").split("\n")


@pytest.mark.parametrize("field", ["caption", "prompt", "text"])
def test_a_json_beside_the_clip_holds_its_caption(tmp_path, field):
    description = json.dumps({"tempo": 120, field: " ein Glöckchen \n"}).encode()
    assert captions_of({"a/x.wav": SOUND, "a/x.JSON": description}, tmp_path) == {"a/x": "ein Glöckchen"}


def test_a_txt_wins_over_a_json_which_then_is_something_else(tmp_path):
    members = {"x.wav": SOUND, "x.txt": b"from txt", "x.json": b"not even json", "package.json": b"{}"}
    assert captions_of(members, tmp_path) == {"x": "from txt"}


def test_manifests_name_files_relative_to_themselves(tmp_path):
    table = '\ufefffile_name,Text,bpm\r\nx.wav,"one, two",3\r\nsub/y.FLAC, three ,\r\n'
    lines = '{"path": "z.wav", "prompt": "four"}\n\n{"path": "./w.wav", "caption": "fünf"}\n'
    members = {"x.wav": SOUND, "sub/y.FLAC": SOUND, "deep/z.wav": SOUND, "deep/w.wav": SOUND}
    members |= {"captions.csv": table.encode(), "deep/captions.jsonl": lines.encode()}
    expected = {"x": "one, two", "sub/y": "three", "deep/z": "four", "deep/w": "fünf"}
    assert captions_of(members, tmp_path) == expected


def test_the_same_captions_in_any_form_give_the_same_data_set(tmp_path):
    members = captioned(4)
    sounds = {name: data for name, data in members.items() if name.endswith(".wav")}
    texts = {name[:-4]: data.decode() for name, data in members.items() if name.endswith(".txt")}
    forms = [
        members,
        sounds | {f"{stem}.json": json.dumps({"caption": text}).encode() for stem, text in texts.items()},
        sounds | {"captions.csv": ("file,caption\n" + "".join(f"{s}.wav,{t}\n" for s, t in texts.items())).encode()},
        sounds
        | {"captions.jsonl": "\n".join(json.dumps({"file": f"{s}.wav", "text": t}) for s, t in texts.items()).encode()},
    ]
    writers = [write_zip, write_tar, write_folder, write_zip]
    digests = set()
    for number, (form, write) in enumerate(zip(forms, writers, strict=True)):
        source = write(tmp_path / f"{number}{'.tar' if write is write_tar else ''}", form)
        digests.add(build_shards(str(source), tmp_path / f"work{number}").digest)
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions.csv", b"", "captions.csv: its first line says nothing, expected column names such as file,caption"),
        ("captions.csv", b"name,words\na,b\n", "captions.csv: its first line says name, words, expected column names"),
        ("captions.csv", b"file,caption\n,b\n", "captions.csv, line 2: names no file"),
        ("captions.csv", b"file,caption\nx.wav\n", "captions.csv, line 2: holds no caption"),
        ("captions.csv", b"file,caption\nx.wav," + b"y" * 200_000, "captions.csv, line 2: no valid CSV"),
        ("captions.csv", b"file,caption\n\xff,b\n", "captions.csv: manifest is not UTF-8 (byte 13)"),
        ("captions.jsonl", b"[1]\n", "captions.jsonl, line 1: holds a JSON list, expected an object"),
        ("captions.jsonl", b'{"file": "clip0.wav"', "captions.jsonl, line 1: is not valid JSON"),
        ("captions.jsonl", b"[" * 100_000, "captions.jsonl, line 1: is not valid JSON"),
        ("captions.jsonl", b'{"file": "a.wav", "text": 3}', "captions.jsonl, line 1: holds no caption"),
        ("captions.jsonl", b'{"file": "a.wav", "text": "\\ud800"}', "captions.jsonl, line 1: caption is not valid Un"),
        ("captions.csv", b"file,caption\nno.wav,b\n", "captions.csv, line 2: caption of no.wav, which is not there"),
        (
            "captions.csv",
            b"file,caption\nclip1.wav,b\n",
            "captions.csv, line 2 and clip1.txt: 2 captions",
        ),
        ("captions.csv", b"file,caption\n../clip1.wav,b\n", "caption of ../clip1.wav, which is not there"),
    ],
)
def test_a_faulty_manifest_is_refused_in_one_line_that_names_the_place(tmp_path, name, content, message):
    (line,) = faults_of({name: content}, tmp_path)
    assert message in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "x.json: is not valid JSON"),
        (b"{}", "x.json: holds no caption, expected text under caption or prompt or text"),
        (b'{"caption": " "}', "x.json: caption is empty"),
        (b'{"caption": "' + b"x" * 70_000 + b'"}', "x.json: caption of 70000 characters"),
        (b"\xff", "x.json: caption is not UTF-8"),
    ],
)
def test_a_faulty_json_caption_is_refused_in_one_line(tmp_path, content, message):
    (line,) = faults_of({"x.wav": SOUND, "x.json": content}, tmp_path)
    assert line.startswith(message)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=8))
@settings(deadline=None, max_examples=60)
def test_any_text_survives_a_manifest(tmp_path_factory, texts):
    texts = [text for text in texts if not is_blank(text) and "\0" not in text] or ["x"]
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(["file", "caption"])
    writer.writerows([f"{number}.wav", text] for number, text in enumerate(texts))
    members = {f"{number}.wav": b"" for number in range(len(texts))} | {"captions.csv": out.getvalue().encode()}
    found = captions_of(members, tmp_path_factory.mktemp("manifest"))
    assert found == {str(number): text.strip() for number, text in enumerate(texts)}


FORMS = {
    "utf-8 with a mark": lambda text: text.encode("utf-8-sig"),
    "utf-16 with a mark": lambda text: text.encode("utf-16"),
    "utf-16 of big ends with a mark": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "utf-16 without a mark": lambda text: text.encode("utf-16-le"),
    "utf-16 of big ends without a mark": lambda text: text.encode("utf-16-be"),
    "utf-32 with a mark": lambda text: text.encode("utf-32"),
}


@pytest.mark.parametrize("form", FORMS)
def test_captions_and_tables_in_any_form_of_unicode_are_read(tmp_path, form):
    table = FORMS[form]("file,caption\r\nb.wav,Glöckchen, leise\u2028 und hell\r\n")
    lines = FORMS[form]('{"file": "c.wav", "text": "tief \u0085 laut"}\n')
    members = {"a.wav": SOUND, "b.wav": SOUND, "deep/c.wav": SOUND, "d.wav": SOUND}
    members |= {"a.txt": FORMS[form](" Bässe\r\n"), "captions.csv": table, "deep/captions.jsonl": lines}
    members |= {"d.json": FORMS[form]('{"caption": "ein Klang"}')}
    expected = {"a": "Bässe", "b": "Glöckchen, leise\u2028 und hell", "deep/c": "tief \u0085 laut", "d": "ein Klang"}
    assert captions_of(members, tmp_path) == expected


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1e", "\t", "\r"])
def test_a_separator_inside_a_line_of_json_is_part_of_the_caption(tmp_path, separator):
    lines = "".join(f'{{"file": "{n}.wav", "caption": "warm{separator}slow {n}"}}\n' for n in range(3))
    members = {f"{n}.wav": SOUND for n in range(3)} | {"captions.jsonl": lines.encode()}
    assert captions_of(members, tmp_path) == {f"{n}": f"warm{separator}slow {n}" for n in range(3)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"kick\0", "x.txt: caption holds NUL bytes; save it as UTF-8"),
        (b"ki\0\0ck", "x.txt: caption holds NUL bytes"),
        (b"caf\xe9s\0", "x.txt: caption holds NUL bytes"),
        ("\u200b\u200d\ufeff \u2060".encode(), "x.txt: caption is empty"),
        ("\u3164\u2800\u00ad".encode(), "x.txt: caption is empty"),
        (b"\xff\xfe", "x.txt: caption is empty"),
        (b"\xff\xfek", "x.txt: caption is not UTF-16 (byte 2)"),
    ],
)
def test_captions_of_nul_or_of_nothing_that_shows_are_refused_by_name(tmp_path, content, message):
    (line,) = faults_of({"x.wav": SOUND, "x.txt": content}, tmp_path)
    assert line.startswith(message)


def test_a_nul_that_json_escapes_is_refused_by_its_line(tmp_path):
    members = {"a.wav": SOUND, "captions.jsonl": b'{"file": "a.wav", "text": "ki\\u0000ck"}\n'}
    (line,) = faults_of(members, tmp_path)
    assert line == "captions.jsonl, line 1: caption holds NUL characters; save it again as plain text"


def test_a_caption_with_commas_is_read_whole_where_it_is_the_last_column_without_quotes(tmp_path):
    table = (
        "file,caption\n"
        "a.wav,warm pad, slow, 120 bpm\n"
        'b.wav,"quoted, too"\n'
        'c.wav, "after a space, quoted"\n'
        'd.wav,a 12" kick, an 8" snare\n'
        "e.wav,trailing,\n"
    )
    members = {f"{name}.wav": SOUND for name in "abcde"} | {"captions.csv": table.encode()}
    assert captions_of(members, tmp_path) == {
        "a": "warm pad, slow, 120 bpm",
        "b": "quoted, too",
        "c": "after a space, quoted",
        "d": 'a 12" kick, an 8" snare',
        "e": "trailing,",
    }
    wide = b"bpm,file_name,text\r\n120,a.wav,warm, slow\r\n"
    assert captions_of({"a.wav": SOUND, "captions.csv": wide}, tmp_path) == {"a": "warm, slow"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            b"caption,file\nwarm, slow,clip0.wav\n",
            "line 2: 3 cells, its header has 2; put a caption with commas in quotes",
        ),
        (b"file,caption,bpm\nclip0.wav,warm, slow,120\n", "line 2: 4 cells, its header has 3"),
        (b'file,caption\nclip0.wav,warm,"slow, deep"\n', "line 2: 3 cells, its header has 2"),
        (b'file,caption\nclip0.wav,"warm" pad, slow\n', "line 2: no valid CSV"),
        (b'file,caption\nclip0.wav,x\nclip1.wav,"12 inch\nclip2.wav,y\n', "line 3: no valid CSV"),
    ],
)
def test_a_row_that_can_be_cut_in_two_ways_is_refused_by_its_line(tmp_path, table, message):
    sounds = {f"clip{n}.wav": SOUND for n in range(4)}
    source = write_zip(tmp_path / "a.zip", sounds | {"captions.csv": table})
    with pytest.raises(DataError) as caught:
        build_shards(str(source), tmp_path / "work")
    assert str(caught.value).startswith(f"{source}: captions.csv, {message}")
    assert "\n" not in str(caught.value)


def test_tables_with_semicolons_or_tabs_are_read(tmp_path):
    members = {"a.wav": SOUND, "captions.csv": b"file;caption\na.wav;warm, slow; deep\n"}
    assert captions_of(members, tmp_path) == {"a": "warm, slow; deep"}
    members = {"a.wav": SOUND, "captions.csv": "file\tcaption\na.wav\twarm, slow\n".encode("utf-16")}
    assert captions_of(members, tmp_path) == {"a": "warm, slow"}


def test_the_tables_of_audio_folders_are_read_and_other_tables_of_that_name_are_named(tmp_path):
    members = {"train/a.wav": SOUND, "train/metadata.csv": b"file_name,genre,text\na.wav,pop,one\n"}
    members |= {"test/b.flac": SOUND, "test/metadata.jsonl": b'{"file_name": "b.flac", "caption": "two"}\n'}
    assert captions_of(members, tmp_path) == {"test/b": "two", "train/a": "one"}
    for name, content in [("metadata.csv", b"id,bpm\n1,120\n"), ("metadata.jsonl", b'{"id": 1, "bpm": 120}\n')]:
        source = write_zip(tmp_path / "b.zip", captioned(4) | {name: content})
        (kind,) = build_shards(str(source), tmp_path / "work").left_out
        assert (kind.what, kind.names) == ("table", (name,))
        assert "line" in kind.why


def test_where_no_clip_has_a_caption_the_table_without_captions_is_what_is_named(tmp_path):
    sounds = {f"a/{n}.wav": SOUND for n in range(30)}
    source = write_zip(tmp_path / "a.zip", sounds | {"a/metadata.csv": b"file_name,transcription\n0.wav,hello\n"})
    with pytest.raises(DataError) as caught:
        build_shards(str(source), tmp_path / "work")
    assert str(caught.value) == (
        f"{source}: a/metadata.csv: its first line says file_name, transcription, no columns of files and captions; "
        "expected names such as file_name and text"
    )
    # With one of thirty it is the clips that lack something.
    source = write_zip(tmp_path / "b.zip", sounds | {"a/metadata.csv": b"id\n1\n", "a/3.txt": b"the one"})
    with pytest.raises(DataError, match="a/0.wav: audio without a caption; add 0.txt beside it"):
        build_shards(str(source), tmp_path / "work")


def test_tables_of_windows_name_files_with_backslashes_and_marks_in_front_go(tmp_path):
    table = b"file,caption\nsub\\a.wav,x\n"
    members = {"sub/a.wav": SOUND, "captions.csv": table, "b.wav": SOUND, "b.txt": "\ufeff\ufeff kick \ufeff".encode()}
    assert captions_of(members, tmp_path) == {"sub/a": "x", "b": "kick"}


def test_two_captions_of_one_clip_are_refused_also_where_one_is_in_the_table_of_an_audio_folder(tmp_path):
    (line,) = faults_of({"metadata.csv": b"file_name,text\nclip1.wav,another\n"}, tmp_path)
    assert "metadata.csv, line 2: 2 captions for one clip" in line
