"""The folder one stands in: what runs have left there, results and work directories, is never part of the source."""

import json
import logging
import os

import pytest

from sa3dist import train
from sa3dist.data.source.archive import open_container
from sa3dist.data.source.build import build_shards
from sa3dist.data.source.pairing import pair_members
from sa3dist.data.source.run_outputs import RUN_OUTPUT
from sa3dist.errors import DataError
from tests.helpers.clips import captioned, encode, tone, write_folder, write_tar, write_zip

RUN = ("run.yaml", "metrics.jsonl", "status.json", "heartbeat.json", "result.json", "lora.safetensors", "config.json")
SHA = "0123456789abcdef" * 4
WORK = {
    "shards": f"{SHA[:16]}/index.json",
    "latents": "a0/x.safetensors",
    "downloads": f"{SHA}-clips.zip",
    "clip-cache": f"b1/{SHA}",
    "latent_shards": f"{SHA[:16]}/latents-000000.tar",
    "singular_bases": f"{SHA}.safetensors",
}


def run_files(folder, *names):
    """What a run leaves, and what must not be taken for clips of it: previews, reports, other sounds."""
    left = {f"{folder}/{name}": b"{}" for name in names}
    left |= {f"{folder}/previews/step-00000500/0.wav": encode(tone()), f"{folder}/previews/step-00000500/0.json": b"{}"}
    return left | {f"{folder}/gen.wav": encode(tone()), f"{folder}/gen.txt": b"made", f"{folder}/notes.txt": b"x"}


def work_files(folder):
    files = {f"{folder}/{name}/{inside}": b"x" for name, inside in WORK.items()}
    return files | {f"{folder}/shards/{SHA[:16]}/report.txt": b"report", f"{folder}/figures.safetensors": b"x"}


def keys(source, tmp_path, **options):
    with open_container(str(source), tmp_path / "elsewhere", **options) as container:
        listing = pair_members(container)
    assert not listing.problems
    assert not listing.refusals
    assert sum(kind.count for kind in listing.left_out if kind.what == RUN_OUTPUT[0]) == len(container.run_outputs)
    return [pair.key for pair in listing.pairs], container.run_outputs


CLIPS = [f"clip{number}" for number in range(4)]


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
@pytest.mark.parametrize("at", ["runs/one", "x/y/z"])
def test_runs_and_work_directories_of_any_run_are_passed_over(kind, at, tmp_path):
    members = captioned(4) | run_files(at, *RUN) | run_files(f"{at}-killed", "run.yaml", "heartbeat.json")
    members |= work_files(f"{at}-work") | {f"{at}-refused/status.json": b"{}"}
    made = {"folder": write_folder, "zip": write_zip, "tar": write_tar}[kind](tmp_path / f"source.{kind}", members)
    found, own = keys(made, tmp_path)
    assert found == CLIPS
    assert own == sorted([at, f"{at}-killed", f"{at}-refused", f"{at}-work"])
    sounds = " (2 audio files in it)" if kind == "folder" else ""
    with open_container(str(made), tmp_path / "elsewhere") as container:
        assert container.left_out[RUN_OUTPUT][0] == f"{own[0]}{sounds}"


@pytest.mark.parametrize("name", WORK)
def test_a_work_directory_is_known_by_any_of_its_parts(name, tmp_path):
    members = captioned(4) | {
        f"w/{name}/{WORK[name]}": b"x",
        f"w/{name}/{WORK[name]}.txt" if "/" in WORK[name] else "a/b": b"x",
    }
    assert keys(write_folder(tmp_path / "d", members), tmp_path) == (CLIPS, ["w"])


@pytest.mark.parametrize("folder", ["shards", "latents", "downloads", "remote", "prompts", "checkpoints", "previews"])
def test_a_data_set_may_use_the_same_names(folder, tmp_path):
    made = write_folder(tmp_path / "d", captioned(4, folder=f"{folder}/") | captioned(4, folder=f"{folder}/more/"))
    found, own = keys(made, tmp_path)
    assert (len(found), own) == (8, [])
    # A file of a run's name alone makes no run.
    write_folder(made, {f"{folder}/config.json": b"{}", f"{folder}/metrics.jsonl": b"{}"})
    assert len(keys(made, tmp_path)[0]) == 8


@pytest.mark.parametrize("extra", [run_files("d", *RUN), work_files("d")], ids=["output_dir", "work_dir"])
def test_a_source_that_is_itself_an_output_or_work_directory_keeps_its_clips(extra, tmp_path):
    run_members = {name: data for name, data in extra.items() if "gen." not in name and "notes" not in name}
    write_folder(tmp_path, run_members)
    write_folder(tmp_path / "d", captioned(4) | captioned(2, folder="kit/"))
    found, own = keys(tmp_path / "d", tmp_path)
    assert found == [*CLIPS, "kit/clip0", "kit/clip1"]
    assert own


def test_a_link_to_a_run_is_a_run(tmp_path):
    write_folder(tmp_path / "scratch", run_files("run", *RUN))
    made = write_folder(tmp_path / "d", captioned(4))
    os.symlink(tmp_path / "scratch/run", made / "latest")
    assert keys(made, tmp_path) == (CLIPS, ["latest"])


def test_an_archive_of_a_folder_that_holds_clips_and_a_run_keeps_the_clips(tmp_path):
    members = captioned(4, folder="pack/") | {f"pack/{name}": b"{}" for name in RUN}
    members |= {"pack/checkpoints/step-00000002/state.json": b"{}"} | run_files("pack/runs/x", *RUN)
    found, own = keys(write_zip(tmp_path / "a.zip", members), tmp_path)
    assert found == [f"pack/{key}" for key in CLIPS]
    assert own == sorted(["pack/runs/x", "pack/checkpoints", *(f"pack/{name}" for name in RUN)])


@pytest.mark.parametrize("which", ["output_dir", "work_dir"])
def test_clips_where_the_run_would_write_are_refused_rather_than_left_out(which, tmp_path):
    made = write_folder(tmp_path / "d", captioned(4) | captioned(2, folder="mine/"))
    places = {"work_dir": tmp_path / "w", "output_dir": tmp_path / "o"} | {which: made / "mine"}
    with pytest.raises(DataError, match="mine/clip0.wav is in mine, where this run would write; choose another"):
        build_shards(str(made), **places)
    assert build_shards(str(made), tmp_path / "w", output_dir=made).clips[-1].key == "mine/clip1"


def test_runs_in_the_folder_of_the_clips_go_on_and_leave_the_data_set_as_it_was(
    demo_base, tmp_path, monkeypatch, capfd, caplog
):
    """A second run with more steps, a run beside it and one in the folder itself train on the same clips."""
    caplog.set_level(logging.INFO)
    write_folder(tmp_path, captioned(4, seconds=1.0))
    monkeypatch.chdir(tmp_path)
    words = [
        "audio_data_url=.",
        f"model={demo_base}",
        "rank=2",
        "duration=1",
        "base_precision=fp32",
        "mixed_precision=no",
    ]
    words += ["num_workers=0", "report=false", "gradient_checkpointing=off"]

    def digest(*more):
        capfd.readouterr()
        assert train.main([*words, *more]) == 0, capfd.readouterr().err
        config = json.loads(capfd.readouterr().out)["config_file"]["url"].removeprefix("file://")
        return json.loads(open(config).read())["dataset_sha256"]

    first = digest("number_of_steps=1")
    assert digest("number_of_steps=2") == first
    assert digest("number_of_steps=1", "name=another", "pre_encode=true") == first
    assert digest("number_of_steps=1", "output_dir=here/and/there", "work_dir=kept") == first
    assert digest("number_of_steps=1", "output_dir=.") == first
    assert digest("number_of_steps=2", "output_dir=.") == first
