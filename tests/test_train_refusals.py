"""Wrong input, told in one line that names it, exit 2, and nothing left behind but status.json."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sa3dist
from sa3dist import errors, train
from sa3dist.model.loading import load_base
from sa3dist.runtime.exit_status import report
from tests.helpers.servers import hostile_http


@pytest.fixture
def refuse(demo_base, demo_clips, tmp_path, capfd):
    """Run with some words changed; returns the message after checking everything every refusal must do."""

    def refused(**changes) -> list[str]:
        output_dir, work_dir = tmp_path / "out", tmp_path / "work"
        values = {"audio_data_url": demo_clips, "model": demo_base, "output_dir": output_dir, "work_dir": work_dir}
        values |= {"number_of_steps": 1, "base_precision": "fp32", "mixed_precision": "no", "num_workers": 0}
        capfd.readouterr()
        code = train.main([f"{key}={value}" for key, value in (values | changes).items()])
        captured = capfd.readouterr()
        lines = [
            line
            for line in captured.err.strip().splitlines()
            if not line.startswith(("check clips", "encode", "sa3dist: ")) and line.strip()
        ]
        assert code == 2, captured.err
        assert "Traceback" not in captured.err
        assert [path.name for path in output_dir.iterdir()] == ["status.json"]
        status = json.loads((output_dir / "status.json").read_text())
        assert (status["state"], status["exit_code"], status["message"]) == ("refused", 2, "\n".join(lines))
        left = [path for path in work_dir.rglob("*") if path.is_file()] if work_dir.exists() else []
        assert not [path for path in left if ".tmp" in path.name]
        assert captured.out == ""
        return lines

    return refused


def only_line(lines: list[str], *names: str) -> bool:
    """Whether there is one line and it holds all names."""
    return len(lines) == 1 and all(name in lines[0] for name in names)


def test_an_unknown_key(refuse):
    assert only_line(refuse(learning_rte="1e-4"), "learning_rte", "learning_rate")


def test_a_value_out_of_range(refuse):
    assert only_line(refuse(rank=300), "rank", "300", "1..256")


def test_a_model_directory_that_is_none(refuse, tmp_path):
    assert only_line(refuse(model=tmp_path / "nowhere"), "nowhere", "medium-base")


def test_a_source_that_is_not_there_before_any_model_is_looked_for(refuse, tmp_path):
    lines = refuse(audio_data_url=tmp_path / "none.zip", model=tmp_path / "nowhere")
    assert only_line(lines, "none.zip", "no such file or folder")


def damaged(demo_base: Path, target: Path, change) -> Path:
    shutil.copytree(demo_base, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


def test_missing_model_keys_are_named_up_to_three(refuse, demo_base, tmp_path):
    keys = [f"model.model.transformer.layers.0.{part}" for part in ("ff.ff.2.weight", "ff.ff.2.bias", "ff_norm.gamma")]

    def remove(tensors):
        for key in [*keys, "model.model.transformer.layers.1.ff_norm.gamma"]:
            del tensors[key]

    (line,) = refuse(model=damaged(demo_base, tmp_path / "base", remove))
    assert "4 missing" in line
    assert sum(key in line for key in keys) == 3


def test_a_model_tensor_of_the_wrong_shape(refuse, demo_base, tmp_path):
    key = "model.model.transformer.project_in.weight"

    def widen(tensors):
        tensors[key] = torch.zeros(3, 5)

    assert only_line(refuse(model=damaged(demo_base, tmp_path / "base", widen)), key, "[3, 5]")


@pytest.mark.parametrize(("key", "value"), [("include", "[layers[0-11]]"), ("exclude", "[model, conditioners]")])
def test_patterns_that_select_nothing_show_real_names(refuse, key, value):
    assert only_line(refuse(**{key: value}), key, "model.")


def test_a_rank_the_layers_do_not_allow(refuse):
    assert only_line(refuse(rank=200, adapter_type="lora"), "rank", "200", "64")


@pytest.mark.parametrize(
    ("trained", "asked", "named"),
    [
        ({"adapter_type": "lora", "rank": 4}, {"adapter_type": "dora-rows", "rank": 4}, "adapter_type"),
        ({"adapter_type": "lora", "rank": 4}, {"adapter_type": "lora", "rank": 8}, "rank"),
    ],
)
def test_an_adapter_file_of_another_kind(refuse, demo_base, tmp_path, trained, asked, named):
    base = load_base(demo_base)
    sa3dist.attach_adapter(base, **trained)
    sa3dist.save_adapter(base, tmp_path / "other.safetensors", metadata={})
    assert only_line(refuse(lora_checkpoint_url=tmp_path / "other.safetensors", **asked), "other.safetensors", named)


def test_an_adapter_file_of_another_base(refuse, demo_base, tmp_path):
    base = load_base(demo_base)
    sa3dist.attach_adapter(base, adapter_type="lora", rank=4)
    sa3dist.save_adapter(base, tmp_path / "other.safetensors", metadata={"base_sha256": "0" * 64})
    asked = {"lora_checkpoint_url": tmp_path / "other.safetensors", "adapter_type": "lora", "rank": 4}
    assert only_line(refuse(**asked), "other.safetensors", "base")


def test_an_adapter_file_that_is_none(refuse, tmp_path):
    (tmp_path / "noise.safetensors").write_bytes(b"not safetensors")
    assert only_line(refuse(lora_checkpoint_url=tmp_path / "noise.safetensors"), "noise.safetensors")


def test_a_fetched_adapter_file_that_is_none_is_named_by_its_address(refuse):
    with hostile_http(b"not safetensors") as server:
        url = f"{server.url}/etag/noise.safetensors"
        lines = refuse(lora_checkpoint_url=f"{url}?token=secret")
    assert only_line(lines, url)
    assert not [word for word in ("downloads", "secret") if word in lines[0]]


def test_a_source_that_is_no_archive(refuse, tmp_path):
    (tmp_path / "clips.zip").write_bytes(b"PK but not really")
    assert only_line(refuse(audio_data_url=tmp_path / "clips.zip"), "clips.zip")


def test_a_source_that_is_not_there(refuse, tmp_path):
    assert only_line(refuse(audio_data_url=tmp_path / "gone.zip"), "gone.zip")


def test_all_faulty_clips_are_reported_together(refuse, demo_clips, tmp_path):
    path = tmp_path / "some.zip"
    with zipfile.ZipFile(demo_clips) as good, zipfile.ZipFile(path, "w") as bad:
        for name in good.namelist():
            bad.writestr(name, good.read(name))
        bad.writestr("lonely.wav", good.read(next(n for n in good.namelist() if n.endswith(".wav"))))
        bad.writestr("orphan.txt", "a caption without audio")
        bad.writestr("broken.flac", b"fLaC but no more")
        bad.writestr("broken.txt", "a broken file")
    lines = refuse(audio_data_url=path)
    for name in ("lonely.wav", "orphan.txt", "broken.flac"):
        assert sum(name in line for line in lines) == 1
    assert len(lines) == 3


def test_too_few_clips_say_how_to_lift_the_limit(refuse, demo_clips, tmp_path):
    path = tmp_path / "three.zip"
    with zipfile.ZipFile(demo_clips) as good, zipfile.ZipFile(path, "w") as few:
        for name in sorted(good.namelist())[:6]:
            few.writestr(name, good.read(name))
    assert only_line(refuse(audio_data_url=path), "three.zip", "3", "allow_any_dataset_size")


def test_a_refusal_behind_warnings_leaves_none_of_them_or_those_of_before(refuse, demo_base, demo_clips, tmp_path):
    path = tmp_path / "more.zip"
    shutil.copy(demo_clips, path)
    with zipfile.ZipFile(path, "a") as more:
        more.writestr("notes.pdf", b"x")
    words = {"audio_data_url": path, "validation": "[nope]"}
    assert only_line(refuse(**words), "validation: 'nope' is no clip")
    earlier = b'{"message": "of an earlier run"}\n'
    (tmp_path / "out/warnings.jsonl").write_bytes(earlier)
    same = {**words, "model": demo_base, "output_dir": tmp_path / "out", "work_dir": tmp_path / "work"}
    assert train.main([f"{key}={value}" for key, value in same.items()]) == 2
    assert (tmp_path / "out/warnings.jsonl").read_bytes() == earlier


def test_a_base_without_text_encoder(refuse, demo_base, tmp_path):
    shutil.copytree(demo_base, tmp_path / "base")
    shutil.rmtree(tmp_path / "base/t5gemma-b-b-ul2")
    (line,) = refuse(model=tmp_path / "base")
    assert "text_encoder" in line


def test_a_checkpoint_to_resume_that_is_none(refuse, tmp_path):
    assert only_line(refuse(resume=tmp_path / "step-00000001"), "step-00000001")


@pytest.mark.parametrize(
    ("key", "what"), [("output_dir", "is a file"), ("work_dir", "is a file"), ("work_dir", "is a link to")]
)
def test_a_directory_that_is_a_file_or_a_link_to_nothing(demo_base, demo_clips, tmp_path, capfd, key, what):
    if what == "is a file":
        (tmp_path / "taken").write_text("")
    else:
        (tmp_path / "taken").symlink_to(tmp_path / "unmounted")
    values = {"audio_data_url": demo_clips, "model": demo_base, "output_dir": tmp_path / "out"}
    assert train.main([f"{k}={v}" for k, v in (values | {key: tmp_path / "taken"}).items()]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{key}: {tmp_path / 'taken'} {what}")


def test_a_directory_that_is_a_file_is_left_to_rank_0_to_refuse(tmp_path, monkeypatch, capfd):
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for dist_rank in range(2):
        monkeypatch.setenv("RANK", str(dist_rank))
        report(errors.ConfigError("output_dir: a file"), tmp_path / "taken", 0, patience_seconds=0.1)
    assert capfd.readouterr().err == "output_dir: a file\n"


def test_a_name_that_is_a_path(refuse):
    assert only_line(refuse(name="a/../../b"), "name", "output_dir")


def test_a_global_batch_that_does_not_divide(refuse):
    assert only_line(refuse(global_batch_size=3, batch_size=2), "global_batch_size", "multiple of 2")


def test_a_released_model_that_cannot_be_fetched(refuse, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    (line,) = refuse(model="small-music-base")
    assert "stable-audio-3-small-music-base" in line


def test_an_unknown_option_is_a_refusal_with_a_status(tmp_path, capfd):
    assert train.main([f"output_dir={tmp_path}/run", "--steps", "5"]) == 2
    assert "--steps 5: unknown option" in json.loads((tmp_path / "run/status.json").read_text())["message"]
    assert capfd.readouterr().err.count("\n") == 1
