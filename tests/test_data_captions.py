"""Captions from .txt, .json and manifests: each clip gets the right one, and every fault names its line."""

import csv
import io
import json

import pytest
from clips import captioned, encode, tone, write_folder, write_tar, write_zip
from hypothesis import given, settings
from hypothesis import strategies as st

from sa3dist.data.archive import open_source, pair_members
from sa3dist.data.captions import read_caption
from sa3dist.errors import DataError
from sa3dist.shard import build_shards

SOUND = encode(tone())


def captions_of(members, tmp_path):
    with open_source(str(write_zip(tmp_path / "a.zip", members)), tmp_path / "work") as container:
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
    texts = [text for text in texts if text.strip() and "\0" not in text] or ["x"]
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(["file", "caption"])
    writer.writerows([f"{number}.wav", text] for number, text in enumerate(texts))
    members = {f"{number}.wav": b"" for number in range(len(texts))} | {"captions.csv": out.getvalue().encode()}
    found = captions_of(members, tmp_path_factory.mktemp("manifest"))
    assert found == {str(number): text.strip() for number, text in enumerate(texts)}
