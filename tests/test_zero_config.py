"""The launcher's DeepSpeed file: what it may not decide is refused by name, what it leaves open is filled in."""

import json
import logging
import sys
from pathlib import Path

import pytest
import yaml

from sa3dist.errors import ConfigError
from sa3dist.parallel import zero_config
from sa3dist.parallel.zero_config import FILE_VARIABLE, build, check

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))


def zero(stage=2, **more):
    return {"zero_optimization": {"stage": stage}, **more}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_files_are_accepted_and_named_by_the_shipped_launcher_files(path):
    config = json.loads(path.read_text())
    check(config)
    assert config["zero_optimization"]["stage"] == int(path.stem.removeprefix("zero"))
    launcher = yaml.safe_load((ROOT / "configs" / "accelerate" / f"{path.stem}.yaml").read_text())
    assert launcher["deepspeed_config"]["deepspeed_config_file"] == f"configs/deepspeed/{path.name}"
    # Accelerate refuses these beside a file of DeepSpeed's own.
    assert not {"gradient_accumulation_steps", "gradient_clipping", "zero_stage", "mixed_precision"} & (
        launcher.keys() | launcher["deepspeed_config"].keys()
    )


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (zero(optimizer={"type": "Adam"}), "optimizer"),
        (zero(scheduler={"type": "WarmupLR"}), "scheduler"),
        (zero(gradient_clipping=1.0), "gradient_clipping"),
        (zero(communication_data_type="fp16"), "communication_data_type"),
        (zero(data_types={"grad_accum_dtype": "bf16"}), "data_types"),
        (zero(stage=0), "stage is 0"),
    ],
)
def test_what_the_settings_decide_is_refused_by_name(config, named):
    with pytest.raises(ConfigError, match=named):
        check(config)


def test_half_precision_is_turned_off_and_said(caplog):
    config = zero(bf16={"enabled": True}, fp16={"enabled": "auto"})
    with caplog.at_level(logging.WARNING):
        check(config)
    assert "bf16.enabled is turned off" in caplog.text
    assert "fp16" not in caplog.text
    built = build(config, micro_batch=1, accumulation=1, world_size=2, compression="none")
    assert built["bf16"] == built["fp16"] == {"enabled": False}
    assert built["communication_data_type"] == "fp32"


def test_batch_sizes_are_the_runs_and_another_one_is_refused():
    config = zero(train_micro_batch_size_per_gpu="auto", train_batch_size="auto", gradient_accumulation_steps=1)
    built = build(config, micro_batch=2, accumulation=3, world_size=4, compression="bf16")
    assert built["train_micro_batch_size_per_gpu"] == 2
    assert built["gradient_accumulation_steps"] == 3
    assert built["train_batch_size"] == 24
    assert built["communication_data_type"] == "bf16"
    with pytest.raises(ConfigError, match=r"train_batch_size is 16, this run's is 24"):
        build(zero(train_batch_size=16), micro_batch=2, accumulation=3, world_size=4, compression="none")


def test_values_left_to_the_launcher_are_left_to_deepspeed():
    built = build(
        zero(reduce="auto") | {"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}, 1, 1, 1, "none"
    )
    assert built["zero_optimization"] == {"stage": 1}
    assert "reduce" not in built


@pytest.fixture
def launched(monkeypatch):
    pytest.importorskip("deepspeed")
    for variable in ("DS_ACCELERATOR", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(variable, "")
    monkeypatch.setenv("LOCAL_RANK", "0")
    return monkeypatch


def test_a_shipped_file_is_found_from_any_directory_and_ones_own_comes_first(launched, tmp_path):
    launched.chdir(tmp_path)
    launched.setenv(FILE_VARIABLE, "configs/deepspeed/zero2.json")
    zero_config.prepare_environment(on_cpu=True)
    assert zero_config.os.environ[FILE_VARIABLE] == str(ROOT / "configs/deepspeed/zero2.json")
    own = tmp_path / "configs" / "deepspeed" / "zero2.json"
    own.parent.mkdir(parents=True)
    own.write_text(json.dumps(zero()))
    launched.setenv(FILE_VARIABLE, "configs/deepspeed/zero2.json")
    zero_config.prepare_environment(on_cpu=True)
    assert zero_config.os.environ[FILE_VARIABLE] == str(own)


@pytest.mark.parametrize(("named", "told"), [("nowhere.json", "nowhere.json"), ("none", "without a file")])
def test_a_file_that_is_not_there_is_refused_before_anything_is_joined(launched, named, told):
    launched.setenv(FILE_VARIABLE, named)
    with pytest.raises(ConfigError, match=told):
        zero_config.prepare_environment(on_cpu=True)


def test_without_a_launcher_or_without_deepspeed_it_is_said(launched):
    launched.setenv(FILE_VARIABLE, str(SHIPPED[0]))
    launched.delenv("LOCAL_RANK")
    with pytest.raises(ConfigError, match="accelerate launch or torchrun"):
        zero_config.prepare_environment(on_cpu=True)
    launched.setenv("LOCAL_RANK", "0")
    launched.setitem(sys.modules, "deepspeed.ops", None)
    with pytest.raises(ConfigError, match=r"sa3dist\[deepspeed\]"):
        zero_config.prepare_environment(on_cpu=True)
