"""Starting NVIDIA's driver ahead: only where a GPU is expected, and whatever becomes of it."""

import threading

import pytest

from sa3dist.runtime import cuda_driver


class Library:
    """A driver that notes how it was started, in which thread."""

    def __init__(self):
        self.started = []

    def cuInit(self, flags):
        self.started.append((flags, threading.current_thread().name))


@pytest.fixture
def library(monkeypatch, tmp_path):
    made = Library()
    monkeypatch.setattr(cuda_driver, "DEVICE_FILE", tmp_path)
    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", lambda name: made)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return made


def wait():
    for thread in threading.enumerate():
        if thread.name == "start the driver":
            thread.join(10)


def test_it_is_started_by_a_thread_of_its_own(library):
    cuda_driver.start()
    wait()
    assert library.started == [(0, "start the driver")]


@pytest.mark.parametrize(
    "told", [{"ACCELERATE_USE_CPU": "True"}, {"CUDA_VISIBLE_DEVICES": ""}, {}], ids=["cpu", "no device", "no driver"]
)
def test_it_is_left_alone_where_no_gpu_is_expected(library, monkeypatch, tmp_path, told):
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    if not told:
        monkeypatch.setattr(cuda_driver, "DEVICE_FILE", tmp_path / "absent")
    cuda_driver.start()
    wait()
    assert library.started == []


def test_a_driver_without_its_library_is_for_torch_to_tell(library, monkeypatch):
    asked, raised = [], []

    def absent(name):
        asked.append(name)
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", absent)
    monkeypatch.setattr(threading, "excepthook", raised.append)
    cuda_driver.start()
    wait()
    assert asked == [cuda_driver.LIBRARY]
    assert raised == []
