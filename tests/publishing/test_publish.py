"""A run's card, and its way to a hub on loopback through an unmodified huggingface_hub."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
import xml.etree.ElementTree

import pytest
import yaml
from huggingface_hub import ModelCard, constants

from sa3dist import export
from sa3dist.adapters import read_adapter_file
from sa3dist.commands import publish
from sa3dist.publishing import card, curves, files
from sa3dist.training import checkpoint
from tests.helpers.hub_server import hub_server
from tests.helpers.program import ENVIRONMENT, run, short_run

NAME = 'a: "b" #c *d* <b>e | `f` [g](h) {j}'
PROMPTS = ['a "loud" drum: #1 | <b>', ""]


@pytest.fixture(scope="module")
def trained(demo_clips, demo_base, demo_work, tmp_path_factory):
    """The folder of a run whose name and prompts are full of markup."""
    folder = tmp_path_factory.mktemp("trained")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({"name": NAME, "preview_prompts": PROMPTS}))
    words = [str(config), *short_run(demo_clips, demo_base, demo_work)]
    more = ["preview_every=3", "preview_seconds=0.6", "preview_steps=1", "number_of_steps=4"]
    assert run(words, folder / "run", *more) == 0
    return folder / "run"


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running hub that this process publishes to, as alice."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    with hub_server() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = f"{running.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield running


def one_line(capsys):
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_run_leaves_a_card_that_the_hub_reads_back(trained):
    read = ModelCard.load(trained / "README.md")
    assert read.data.to_dict() == {
        "license": "other",
        "license_name": "stability-ai-community-license",
        "license_link": "https://stability.ai/license",
        "library_name": "stable-audio-3",
        "pipeline_tag": "text-to-audio",
        "tags": ["lora", "stable-audio-3", "sa3dist"],
        "widget": [
            {"text": text or " ", "output": {"url": f"previews/step-00000004/{number}.flac"}}
            for number, text in enumerate(PROMPTS)
        ],
    }
    assert all((trained / shown["output"]["url"]).is_file() for shown in read.data.widget)
    xml.etree.ElementTree.parse(trained / "curves.svg")
    assert card.is_as_written((trained / "README.md").read_text())


def test_the_notice_has_the_licences_own_sentence_and_says_what_was_changed(trained):
    first, rest = (trained / "NOTICE").read_text().split("\n", 1)
    assert first == (
        "This Stability AI Model is licensed under the Stability AI Community License, "
        "Copyright © Stability AI Ltd. All Rights Reserved"
    )
    assert "What was changed" in rest
    assert "rank 4) was trained on other audio for 4 steps" in rest
    assert rest.endswith("https://stability.ai/license\nPowered by Stability AI\n")


def links_of(text):
    """Every address that a card's Markdown, its HTML and its metadata lead to."""
    read = ModelCard(text, ignore_metadata_errors=False)
    markdown_it = pytest.importorskip("markdown_it")
    blocks = markdown_it.MarkdownIt("gfm-like", {"linkify": False}).parse(read.text)
    tokens = [token for block in blocks for token in [block, *(block.children or [])]]
    found = [token.attrs[name] for token in tokens for name in ("href", "src") if name in token.attrs]
    html = "".join(token.content for token in tokens if token.type.startswith("html"))
    found += re.findall(r'(?:src|href)="([^"]*)"', html)
    return [*found, read.data.license_link, *(shown["output"]["url"] for shown in read.data.widget)]


def test_every_link_of_the_card_is_an_https_address_or_a_file_beside_it(trained):
    released = {**json.loads((trained / "config.json").read_text()), "base_model": "medium-base"}
    previews = files.previews_of(trained, released, with_captions=True)
    of_a_released_base = card.write(released, previews, "curves.svg", ["lora.safetensors"])
    assert "https://huggingface.co/stabilityai/stable-audio-3-medium-base" in links_of(of_a_released_base)
    for link in [*links_of((trained / "README.md").read_text()), *links_of(of_a_released_base)]:
        parts = urllib.parse.urlsplit(link)
        beside = (trained / urllib.parse.unquote(link)).is_file()
        assert beside or (parts.scheme == "https" and "." in parts.netloc), link


def test_no_adapter_that_goes_out_says_where_its_base_lies(trained, demo_base):
    content = (trained / "lora.safetensors").read_bytes()
    assert demo_base.name.encode() in content
    assert str(demo_base.parent).encode() not in content
    # Beside the run's own files it is found nevertheless.
    assert read_adapter_file(trained / "lora.safetensors").base == str(demo_base)


def test_a_card_for_which_there_is_no_room_is_said_once_and_the_adapter_is_out(trained, tmp_path, monkeypatch, caplog):
    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_whole", no_room)
    result = export.publish_saved(checkpoint.find(trained, "auto"), tmp_path)
    assert result["lora_file"]["file_size"] == (tmp_path / "lora.safetensors").stat().st_size
    assert json.loads((tmp_path / "result.json").read_text()) == result
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{tmp_path}: no card beside the adapter (No space left on device)")


def test_a_name_and_prompts_with_markup_stay_text(trained):
    markdown_it = pytest.importorskip("markdown_it")
    text = ModelCard.load(trained / "README.md").text
    tokens = markdown_it.MarkdownIt("gfm-like", {"linkify": False}).parse(text)
    title = next(tokens[i + 1] for i, token in enumerate(tokens) if token.type == "heading_open")
    assert {child.type for child in title.children} <= {"text", "text_special"}
    assert "".join(child.content for child in title.children) == NAME
    cells = [tokens[i + 1] for i, token in enumerate(tokens) if token.type == "td_open"]
    assert "".join(child.content for child in cells[0].children) == PROMPTS[0]


def test_a_released_base_is_named_and_the_ways_of_use_follow_the_type():
    about = {"base_model": "medium-base", "step": 3, "settings": {"name": "x"}}
    for kind, told, missing in (
        ("lora", ["--format peft", "--format comfy`", "peft/transformer"], "merge it instead"),
        ("bora", ["--format comfy-diff`", "merge it instead"], "--format peft"),
    ):
        lora_config = {"adapter_type": kind, "rank": 4, "alpha": 4}
        text = card.write({**about, "lora_config": lora_config}, [], None, ["lora.safetensors"])
        assert ModelCard(text).data.base_model == "stabilityai/stable-audio-3-medium-base"
        assert ModelCard(text).data.base_model_relation == "adapter"
        assert all(words in text for words in told)
        assert missing not in text


def test_captions_and_names_of_clips_are_told_only_when_asked_for(folder):
    described = json.loads((folder / "config.json").read_text())
    captions = ["a secret caption", "another one"]
    described["settings"]["preview_prompts"] = None
    described["skipped_clips"] = ["secret_clip.wav: too short"]
    (folder / "config.json").write_text(json.dumps(described))
    for number, caption in enumerate(captions):
        path = folder / f"previews/step-00000004/{number}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "prompt": caption}))
    files.write_beside(folder)
    told = (folder / "README.md").read_text()
    assert "secret" not in told
    assert "1 clip that could not be used was left out" in told
    assert "| a caption of the data set |" in told
    assert ModelCard(told).data.get("widget") is None
    assert not any(str(part) in told for part in (folder, described["settings"]["audio_data_url"], "clips.zip"))
    files.write_beside(folder, with_captions=True)
    told = (folder / "README.md").read_text()
    assert [shown["text"] for shown in ModelCard(told).data.widget] == captions
    assert "secret_clip" not in told


def test_curves_follow_the_rows_and_a_single_point_is_none():
    assert curves.draw([{"step": 1, "loss": 2.0}]) is None
    rows = [
        {"step": step, "loss": 1 / step, **({"val/loss": 0.5} if step % 10 == 0 else {})} for step in range(1, 1001)
    ]
    picture = xml.etree.ElementTree.fromstring(curves.draw(rows))
    loss, validation = picture.findall("{*}polyline")
    heights = [float(point.split(",")[1]) for point in loss.get("points").split()]
    assert heights == sorted(heights)
    assert len(heights) < 500
    assert len({point.split(",")[1] for point in validation.get("points").split()}) == 1


def test_what_arrives_is_what_lies_there_and_nothing_else_and_private(folder, hub, capsys):
    assert publish.main([str(folder), "alice/drums"]) == 0
    arrived = hub.repos["alice/drums"]
    assert arrived["private"]
    heard = [f"previews/step-00000004/{i}.{kind}" for i in (0, 1) for kind in ("flac", "png")]
    heard += [f"previews/step-00000000/{i}.flac" for i in (0, 1)]
    assert set(arrived["files"]) == {"README.md", "NOTICE", "curves.svg", "lora.safetensors", *heard}
    for name, content in arrived["files"].items():
        assert content == (folder / name).read_bytes()
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"published at {hub.url}/alice/drums (private)"
    assert {line.split()[-1] for line in printed[:-1]} == set(arrived["files"])
    # The same again sends no byte of a file, and leaves the repository as it is.
    sha, sent = arrived["sha"], len(hub.sent())
    assert publish.main([str(folder), "alice/drums"]) == 0
    assert (hub.repos["alice/drums"]["sha"], len(hub.sent())) == (sha, sent)
    assert publish.main([str(folder), "alice/open", "--public"]) == 0
    assert not hub.repos["alice/open"]["private"]


def test_a_killed_upload_shows_nothing_and_goes_on_with_what_has_not_arrived(folder, hub):
    digests = {path: hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in files.to_upload(folder)}
    lora = digests["lora.safetensors"]
    others = {oid for path, oid in digests.items() if path.endswith((".flac", ".png"))}
    reached, killed = threading.Event(), threading.Event()

    def hold(oid, part):
        if (oid, part) == (lora, "1"):
            reached.set()
            killed.wait()

    hub.hold = hold
    environment = ENVIRONMENT | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_alice"}
    words = [sys.executable, "-m", "sa3dist.cli", "publish", str(folder), "alice/drums"]
    with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        assert reached.wait(120)
        deadline = threading.Event()
        while not others <= hub.objects.keys() and process.poll() is None:
            deadline.wait(0.05)
        process.kill()
    killed.set()
    assert others <= hub.objects.keys()
    assert hub.repos["alice/drums"]["files"] == {}
    hub.hold, hub.requests[:] = lambda oid, part: None, []
    assert publish.main([str(folder), "alice/drums"]) == 0
    assert set(hub.sent()) == {lora}
    assert hub.repos["alice/drums"]["files"]["lora.safetensors"] == (folder / "lora.safetensors").read_bytes()


def test_a_card_edited_there_is_replaced_only_when_asked_and_one_edited_here_is_published_as_it_is(folder, hub, capsys):
    assert publish.main([str(folder), "alice/drums"]) == 0
    there = hub.repos["alice/drums"]["files"]
    there["README.md"] += b"mine\n"
    hub.repos["alice/drums"]["sha"] = "1" * 40
    capsys.readouterr()
    assert publish.main([str(folder), "alice/drums"]) == 2
    assert one_line(capsys) == "alice/drums: its README.md was edited by hand; --replace-card replaces it"
    assert there["README.md"].endswith(b"mine\n")
    assert publish.main([str(folder), "alice/drums", "--replace-card"]) == 0
    assert card.is_as_written(there["README.md"].decode())
    edited = (folder / "README.md").read_text().replace("## Use", "## How I use it")
    (folder / "README.md").write_text(edited)
    assert publish.main([str(folder), "alice/drums"]) == 0
    assert there["README.md"].decode() == edited
    capsys.readouterr()
    assert publish.main([str(folder), "alice/drums", "--with-captions"]) == 2
    assert "edited by hand" in one_line(capsys)


def test_a_dry_run_lists_what_would_go_and_writes_and_sends_nothing(folder, hub, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    (folder / "README.md").unlink()
    assert publish.main([str(folder), "alice/drums", "--dry-run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert {"README.md", "lora.safetensors"} < {line.split()[-1] for line in printed[:-1]}
    assert printed[-1] == "nothing sent; these files would go to alice/drums (private if it is new)"
    assert hub.requests == []
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize(
    ("words", "token", "message"),
    [
        (["alice/drums"], None, "no token of the Hugging Face hub here; run hf auth login, or set HF_TOKEN"),
        (["alice/drums"], "hf_wrong", "the hub does not know this token"),
        (["bob/drums"], "hf_alice", "alice may not write there"),
        (["bob/taken", "--public"], "hf_alice", "alice may not write there"),
        (["bob/hidden"], "hf_alice", "alice may not write there"),
        (["alice/public"], "hf_alice", "is public, and a run is published privately; say --public"),
        (["drums"], "hf_alice", "expected user/name"),
        (["a/b/c"], "hf_alice", "no name of a repository"),
        (["alice/dr ums"], "hf_alice", "no name of a repository"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_2(folder, hub, capsys, monkeypatch, words, token, message):
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    hub.add("bob/taken", private=False)
    hub.add("bob/hidden", private=True)
    hub.add("alice/public", private=False)
    assert publish.main([str(folder), *words]) == 2
    assert message in one_line(capsys)
    assert hub.objects == {}


def test_a_run_without_a_finished_adapter_is_one_line_and_2(folder, hub, capsys):
    (folder / "config.json").unlink()
    assert publish.main([str(folder), "alice/drums"]) == 2
    assert f"{folder / 'config.json'}: not the config.json of a run" in one_line(capsys)
    (folder / "lora.safetensors").unlink()
    assert publish.main([str(folder), "alice/drums"]) == 2
    assert "no lora.safetensors: the run has not ended" in one_line(capsys)


def test_a_hub_that_fails_or_is_not_there_is_one_line_and_70(folder, hub, capsys, monkeypatch):
    hub.status = 503
    assert publish.main([str(folder), "alice/drums"]) == 70
    assert "alice/drums: the hub fails" in one_line(capsys)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert publish.main([str(folder), "alice/drums"]) == 70
    assert "alice/drums: the hub cannot be reached" in one_line(capsys)


def test_a_token_of_the_login_file_is_used(folder, hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text("hf_alice\n")
    os.chmod(tmp_path / "token", 0o600)
    assert publish.main([str(folder), "alice/drums"]) == 0
    assert "lora.safetensors" in hub.repos["alice/drums"]["files"]
