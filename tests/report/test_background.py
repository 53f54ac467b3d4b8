"""The automatic page: another process writes it, its failure is said once, and a run's warnings are kept."""

import json
import logging
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from sa3dist.report import background
from sa3dist.report.recorder import recorded_warnings
from sa3dist.runtime.process_group import Group
from sa3dist.runtime.signals import StopRequest
from tests.helpers.program import ENVIRONMENT, run
from tests.helpers.run_folders import make_run
from tests.helpers.trainers import make_settings

ALONE = Group(0, 1, torch.device("cpu"))


def writer(folder, **changes):
    settings = make_settings(output_dir=str(folder), number_of_steps=4, **changes)
    return background.of_run(settings, ALONE, 0)


@pytest.fixture(autouse=True)
def _package_is_found(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])


def test_the_last_save_is_in_the_page_though_it_came_while_another_was_written(tmp_path):
    folder = tmp_path / "run"
    make_run(folder, steps=3, preview_steps=(0,))
    observer = writer(folder)
    observer.begin(StopRequest())
    observer.after_save(2, last=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "loss": 0.123456}) + "\n")
    observer.after_save(4, last=True)
    (folder / "status.json").write_text(json.dumps({"state": "interrupted", "message": "stopped after step 4"}))
    observer.finish(early=False)
    observer.on_exit()
    page = (folder / "report.html").read_text()
    assert "step 4 of 3, interrupted, can be continued: stopped after step 4" in page
    assert "0.123456" in page
    (start,) = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
    assert start["torch"] == torch.__version__
    # None is left, and nothing half-written.
    assert not list(folder.glob(".report*"))


def test_a_page_that_fails_is_said_once_and_ends_nothing(tmp_path, caplog):
    folder = tmp_path / "run"
    folder.mkdir()
    observer = writer(folder)
    observer.after_save(2, last=False)
    observer.finish(early=False)
    observer.on_exit()
    said = [record.message for record in caplog.records if "report.html" in record.message]
    assert len(said) == 1
    assert "no run's folder" in said[0]


def test_a_page_that_takes_too_long_is_stopped_at_the_end(tmp_path, caplog, monkeypatch):
    folder = tmp_path / "run"
    make_run(folder, steps=3, preview_steps=(0,))
    started, popen = [], subprocess.Popen

    def hanging(command, **how):
        started.append(popen([sys.executable, "-c", "import time; time.sleep(600)"], **how))
        return started[-1]

    # The process itself: a page that hangs cannot be had from the real one.
    monkeypatch.setattr(background.subprocess, "Popen", hanging)
    monkeypatch.setattr(background, "LAST_PAGE_SECONDS", 0.1)
    monkeypatch.setattr(background, "LEAST_SECONDS", 0.1)
    observer = writer(folder)
    observer.after_save(2, last=False)
    observer.after_save(3, last=False)
    # One at a time.
    assert len(started) == 1
    observer.finish(early=False)
    observer.on_exit()
    assert [process.poll() for process in started] == [-signal.SIGTERM, -signal.SIGTERM]
    # How long that was is the machine's affair.
    assert re.search(r"not written within \d+\.\d s", caplog.text)


def test_a_signal_while_the_last_page_is_written_ends_the_wait(tmp_path):
    folder = tmp_path / "run"
    make_run(folder, steps=3, preview_steps=(0,))
    stop, observer = StopRequest(), writer(folder)
    observer.begin(stop)
    observer.finish(early=False)
    stop.hear("SIGTERM")
    begin = time.monotonic()
    observer.on_exit()
    assert time.monotonic() - begin < background.LAST_PAGE_SECONDS
    assert not (folder / "report.html").exists()


def test_a_run_without_a_report_starts_no_process():
    assert background.of_run(make_settings(report=False), ALONE, 0) is None


def test_warnings_are_kept_without_keys_and_a_run_that_continues_appends(tmp_path):
    log = logging.getLogger("sa3dist.somewhere")
    for anew in (True, False, True):
        with recorded_warnings(tmp_path, anew):
            log.warning("%s is slow", "https://host/x?key=secret")
            log.info("not this")
        lines = (tmp_path / "warnings.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert {(row["level"], row["message"]) for row in rows} == {("warning", "https://host/x is slow")}
        assert len(rows) == (1 if anew else 2)
    log.warning("after the run")
    assert len((tmp_path / "warnings.jsonl").read_text().splitlines()) == 1


def test_a_training_writes_its_page_and_is_the_same_to_the_bit_without(words, tmp_path):
    assert run(words, tmp_path / "with", "report=true") == 0
    assert run(words, tmp_path / "without") == 0
    assert "step 6 of 6, finished" in (tmp_path / "with/report.html").read_text()
    assert not (tmp_path / "without/report.html").exists()
    # As a kill behind the last save leaves it.
    (tmp_path / "with/report.html").unlink()
    assert run(words, tmp_path / "with", "report=true") == 0
    assert "step 6 of 6, finished" in (tmp_path / "with/report.html").read_text()
    one, other = (path / "lora.safetensors" for path in (tmp_path / "with", tmp_path / "without"))
    assert one.read_bytes() == other.read_bytes()
