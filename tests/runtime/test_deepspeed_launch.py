"""The DeepSpeed file of a launcher is found, and what DeepSpeed lacks is said before any rank is joined."""

import os
import sys

import pytest

from sa3dist.errors import ConfigError
from sa3dist.runtime.deepspeed_launch import FILE_VARIABLE, prepare_environment
from sa3dist.runtime.process_group import connect
from tests.helpers.golden import ROOT


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
    prepare_environment(on_cpu=True)
    assert os.environ[FILE_VARIABLE] == str(ROOT / "configs/deepspeed/zero2.json")
    own = tmp_path / "configs" / "deepspeed" / "zero2.json"
    own.parent.mkdir(parents=True)
    own.write_text('{"zero_optimization": {"stage": 1}}')
    launched.setenv(FILE_VARIABLE, "configs/deepspeed/zero2.json")
    prepare_environment(on_cpu=True)
    assert os.environ[FILE_VARIABLE] == str(own)


@pytest.mark.parametrize(("named", "told"), [("nowhere.json", "nowhere.json"), ("none", "without a file")])
def test_a_file_that_is_not_there_is_refused_before_anything_is_joined(launched, named, told):
    launched.setenv(FILE_VARIABLE, named)
    with pytest.raises(ConfigError, match=told):
        prepare_environment(on_cpu=True)


@pytest.mark.parametrize("text", ["{bad", "[1]", "{}", '{"zero_optimization": true}'])
def test_a_file_that_deepspeed_or_accelerate_could_not_take_is_refused_by_its_name(launched, tmp_path, text):
    path = tmp_path / "zero.json"
    path.write_text(text)
    launched.setenv(FILE_VARIABLE, str(path))
    with pytest.raises(ConfigError, match=f"^{path}: ") as caught:
        prepare_environment(on_cpu=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"ACCELERATE_CONFIG_DS_FIELDS": "gradient_clipping"}, "accelerate launch: When using `deepspeed_config_file`"),
        ({"ACCELERATE_USE_FSDP": "true"}, "accelerate launch: FSDP divides nothing here"),
    ],
)
def test_what_the_launcher_asks_for_in_vain_is_refused_in_one_line(launched, variables, told):
    launched.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    launched.setenv(FILE_VARIABLE, "configs/deepspeed/zero2.json")
    for name, value in variables.items():
        launched.setenv(name, value)
    with pytest.raises(ConfigError, match=told) as caught:
        connect(60.0)
    assert "\n" not in str(caught.value)


def test_without_a_launcher_or_without_deepspeed_it_is_said(launched):
    launched.setenv(FILE_VARIABLE, "configs/deepspeed/zero2.json")
    launched.delenv("LOCAL_RANK")
    with pytest.raises(ConfigError, match="accelerate launch or torchrun"):
        prepare_environment(on_cpu=True)
    launched.setenv("LOCAL_RANK", "0")
    launched.setitem(sys.modules, "deepspeed.ops", None)
    with pytest.raises(ConfigError, match=r"sa3dist\[deepspeed\]"):
        prepare_environment(on_cpu=True)
