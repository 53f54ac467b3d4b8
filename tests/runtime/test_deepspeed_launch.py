"""The DeepSpeed file of a launcher is found, and what DeepSpeed lacks is said before any rank is joined."""

import os
import sys

import pytest

from sa3dist.errors import ConfigError
from sa3dist.runtime.deepspeed_launch import FILE_VARIABLE, prepare_environment
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
    own.write_text("{}")
    launched.setenv(FILE_VARIABLE, "configs/deepspeed/zero2.json")
    prepare_environment(on_cpu=True)
    assert os.environ[FILE_VARIABLE] == str(own)


@pytest.mark.parametrize(("named", "told"), [("nowhere.json", "nowhere.json"), ("none", "without a file")])
def test_a_file_that_is_not_there_is_refused_before_anything_is_joined(launched, named, told):
    launched.setenv(FILE_VARIABLE, named)
    with pytest.raises(ConfigError, match=told):
        prepare_environment(on_cpu=True)


def test_without_a_launcher_or_without_deepspeed_it_is_said(launched):
    launched.setenv(FILE_VARIABLE, "configs/deepspeed/zero2.json")
    launched.delenv("LOCAL_RANK")
    with pytest.raises(ConfigError, match="accelerate launch or torchrun"):
        prepare_environment(on_cpu=True)
    launched.setenv("LOCAL_RANK", "0")
    launched.setitem(sys.modules, "deepspeed.ops", None)
    with pytest.raises(ConfigError, match=r"sa3dist\[deepspeed\]"):
        prepare_environment(on_cpu=True)
