"""What is said in numbers: one clip is one, short sets have seconds, and a run of one process names no rank."""

import errno
import json
import re
from pathlib import Path

import pytest

from sa3dist import cli, errors, train
from sa3dist.errors import counted, span
from sa3dist.formats import write_whole
from sa3dist.runtime.exit_status import report, translate
from tests.helpers.clips import captioned, write_folder


def test_a_write_in_whose_place_stands_a_folder_is_told_with_its_path_not_a_temporary_one(tmp_path):
    (tmp_path / "run.yaml").mkdir()
    with pytest.raises(IsADirectoryError) as failure:
        write_whole(tmp_path / "run.yaml", "x")
    assert str(translate(failure.value)) == f"{tmp_path / 'run.yaml'}: Is a directory; state is as last saved"


def test_a_write_that_finds_the_disk_full_is_told_with_its_path(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space") as caught:
        write_whole(tmp_path / "latents", b"")
    assert str(translate(caught.value)).startswith(f"{tmp_path}/latents: disk full")
    assert not list(tmp_path.iterdir())


def test_one_is_singular():
    assert [counted(n, "clip") for n in (0, 1, 2)] == ["0 clips", "1 clip", "2 clips"]
    assert [counted(n, "process", "processes") for n in (1, 2)] == ["1 process", "2 processes"]


def test_a_span_has_the_unit_that_shows_it():
    spans = [span(seconds) for seconds in (0.04, 4, 59.9, 60, 3599, 3600, 9000)]
    assert spans == ["0.0 s", "4.0 s", "59.9 s", "1.0 minutes", "60.0 minutes", "1.00 hours", "2.50 hours"]


def test_a_tiny_set_is_told_in_few_lines_without_plurals_of_one_or_hours_of_nothing(demo_base, tmp_path, capfd, caplog):
    source = write_folder(tmp_path / "packs/Loops #1", captioned(1, seconds=1.0))
    write_folder(tmp_path / "packs/Loops", captioned(7))
    words = [f"audio_data_url={source}", f"model={demo_base}", f"output_dir={tmp_path / 'out'}", "duration=1"]
    words += ["allow_any_dataset_size=true", "number_of_steps=2", "base_precision=fp32", "mixed_precision=no"]
    words += ["pre_encode=true", "num_workers=0", "report=false", "gradient_checkpointing=off"]
    assert train.main(words) == 0
    said = capfd.readouterr().err + caplog.text
    assert "dataset: 1 clip, 1.0 s, in " in said
    assert "training 2 steps of 1 clip (batch_size 1 x 1 process x 1 accumulated)" in said
    assert not re.search(r"\b1 (clips|steps|shards|processes|words|batches|blocks)\b|hours", said)
    for title in ("check clips", "encode", "train"):
        assert len(re.findall(rf"^{title} [0-9]", said, re.MULTILINE)) == 1
    (report_file,) = (tmp_path / "sa3dist-work/shards").glob("*/report.txt")
    assert "clips        1, 1.0 s, " in report_file.read_text()
    assert cli.main(["inspect", str(source), f"model={demo_base}", "allow_any_dataset_size=true"]) == 0
    assert not re.search(r"\b1 (clips|words)\b|hours", capfd.readouterr().out)


@pytest.mark.parametrize(("world_size", "dist_rank"), [("", ""), ("many", "0"), ("2", "x")])
def test_a_rank_that_is_no_number_keeps_no_end_from_being_reported(world_size, dist_rank, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", dist_rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    report(errors.ConfigError("rank: wrong"), tmp_path, 3, patience_seconds=0.0)
    assert json.loads((tmp_path / "status.json").read_text())["dist_rank"] == 0


@pytest.mark.parametrize(
    ("world_size", "dist_rank", "prefix"), [(None, 0, ""), (1, 0, ""), (2, 0, "rank 0 on "), (2, 1, "rank 1 on ")]
)
def test_a_rank_is_named_where_there_are_several(world_size, dist_rank, prefix, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("RANK", str(dist_rank))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size:
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
    report(errors.EnvironmentFailure("disk full"), tmp_path, 3, patience_seconds=0.0)
    said = capfd.readouterr().err
    assert said.startswith(prefix or "disk full")
    assert said.endswith("disk full\n")
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["message"], status["dist_rank"]) == (said.strip(), dist_rank)
    assert status["host"]
