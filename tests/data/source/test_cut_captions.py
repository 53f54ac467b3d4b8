"""Captions beyond the text encoder's limit are named wherever somebody looks, if there is a tokenizer to count with."""

import json
import shutil
from pathlib import Path

import pytest

from sa3dist import cli, config, train
from sa3dist.data.source.cut_captions import CutCaptions, cut_captions, text_source
from sa3dist.model.config import PromptConfig
from sa3dist.model.text import TextSource
from sa3dist.model.tiny import byte_tokenizer
from tests.helpers.clips import captioned, write_zip

LONG = " ".join(f"word{n}" for n in range(200))


@pytest.fixture
def source(tmp_path):
    """Of 20 tokens, each a byte."""
    byte_tokenizer().save_pretrained(tmp_path / "text")
    (tmp_path / "text" / "config.json").write_text("{}")
    return TextSource(PromptConfig(max_length=20), override=str(tmp_path / "text"))


def test_only_captions_of_more_tokens_than_the_limit_are_cut(source):
    captions = [("short", "x"), ("fits", "y" * 20), ("longer", "z" * 21), ("wide", "\u00fc" * 11), ("long", LONG)]
    found = cut_captions(source, captions)
    assert found == CutCaptions(20, {"longer": 21, "wide": 22, "long": len(LONG)})
    assert found.line(most=2).startswith(
        f"3 captions are longer than the 20 tokens the text encoder reads, and cut there: long has {len(LONG)}, longer "
        "has 21 and 1 more; "
    )
    assert cut_captions(source, captions[:2]).line() == ""


def test_without_a_tokenizer_nothing_is_said_and_nothing_is_fetched(source, tmp_path, monkeypatch):
    shutil.rmtree(tmp_path / "text")
    assert cut_captions(source, [("a", LONG)]) is None
    # Where all are short nobody has to count.
    assert cut_captions(source, [("a", "x")]) == CutCaptions(20, {})
    asked = []

    def download(repo_id, **options):
        asked.append(options.get("local_files_only"))
        from huggingface_hub.errors import LocalEntryNotFoundError

        raise LocalEntryNotFoundError("not here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    released = text_source(config.build({"audio_data_url": "x", "model": "medium-base"}))
    assert released.config.max_length == 256
    assert cut_captions(released, [("a", LONG)]) is None
    assert asked == [True]


@pytest.fixture
def long_set(tmp_path):
    return write_zip(tmp_path / "a.zip", captioned(4) | {"clip2.txt": LONG.encode()})


def test_shard_inspect_and_train_name_the_captions_that_are_cut(demo_base, long_set, tmp_path, caplog, capfd):
    said = f"1 caption is longer than the 128 tokens the text encoder reads, and cut there: clip2 has {len(LONG)}"
    words = [f"model={demo_base}", f"work_dir={tmp_path / 'work'}"]
    assert cli.main(["shard", f"audio_data_url={long_set}", f"output_dir={tmp_path / 'run'}", *words]) == 0
    assert caplog.text.count(said) == 1
    caplog.clear()
    page = tmp_path / "r.html"
    assert cli.main(["inspect", str(long_set), *words, "--html", str(page)]) == 0
    assert said in capfd.readouterr().out
    assert said in page.read_text()
    assert cli.main(["inspect", str(long_set), *words, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["cut_captions"] == {"limit": 128, "tokens": {"clip2": len(LONG)}}
    quick = ["number_of_steps=2", "duration=1", "base_precision=fp32", "mixed_precision=no", "num_workers=0"]
    quick += ["report=false", "gradient_checkpointing=off"]
    assert train.main([f"audio_data_url={long_set}", f"output_dir={tmp_path / 'run'}", *words, *quick]) == 0
    assert caplog.text.count(said) == 1


def test_shard_needs_no_model_to_be_there(long_set, tmp_path, caplog):
    words = [f"audio_data_url={long_set}", f"work_dir={tmp_path / 'work'}", f"output_dir={tmp_path / 'run'}"]
    assert cli.main(["shard", *words, f"model={Path('/nowhere/at/all')}"]) == 0
    assert "caption is longer" not in caplog.text
