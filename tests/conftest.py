"""Shared fixtures: the two tiny reference models, and the demo's base and clips."""

import collections
import gc
import os
import signal
from importlib.util import find_spec
from pathlib import Path

import pytest

# Read when torch is imported: the trainer asks for it before that, and some tests fork it from this process.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

# Read when Triton is first imported: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from sa3dist.model.loading import load_base  # noqa: E402
from sa3dist.runtime.signals import SIGNALS  # noqa: E402
from tests.helpers.golden import THREADS, TINY_MODELS, golden  # noqa: E402

# The GPU check runs without Hypothesis.
if find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    # How fast this machine is today is no property of the code.
    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")

torch.set_num_threads(THREADS)
# At its first backward pass autograd decides whether it needs threads of its own, and a process that has them cannot be
# forked into ranks. The compiler's fake tensors make it count a CUDA device, so this pass comes before them.
torch.ones(1, requires_grad=True).sum().backward()

# Where gpu-marked tests with a ``device`` run; "cpu" exercises their code on a machine without a GPU.
TEST_DEVICE = os.environ.get("SA3DIST_TEST_DEVICE", "cuda")


@pytest.fixture(autouse=True)
def _what_a_run_leaves_set():
    """A run in this process decides over its signals and its arithmetic to the process's end; tests must not."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    # One that a later test sends itself would end the run it belonged to.
    signal.set_wakeup_fd(-1)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _fixed_seed_and_threads():
    torch.manual_seed(0)
    # Some commands set another number, for their process. Behind a test as well: fixtures of the next file's module are
    # made before this one, and what they compute is compared with what its tests compute, to the bit.
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(params=TINY_MODELS)
def tiny_name(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def _tiny_tensors() -> dict:
    return {name: load_file(golden(f"{name}/golden.safetensors")) for name in TINY_MODELS}


@pytest.fixture
def recorded(tiny_name, _tiny_tensors) -> dict[str, torch.Tensor]:
    """The tensors the reference implementation gave for this tiny model."""
    return _tiny_tensors[tiny_name]


@pytest.fixture
def tiny_base(tiny_name):
    """A fresh base: a test may cast or damage it."""
    return load_base(golden(tiny_name))


@pytest.fixture
def device() -> torch.device:
    """Where a gpu-marked test computes."""
    return torch.device(TEST_DEVICE)


def pytest_configure(config):
    # pytest-xdist would hand out the files with the fewest tests last, which are the longest.
    config.option.loadscopereorder = False


def pytest_collection_finish():
    """Keep what imports and collection have made out of the collector's passes, and of the pages that forks copy."""
    gc.collect()
    gc.freeze()
    # Torch's compiler and Triton's interpreter make many small objects: passes are a twentieth of what the suite takes.
    gc.set_threshold(50_000, 20, 50)


def pytest_collection_modifyitems(items):
    # The files with the most long tests first: a long one begun last would keep one process busy alone.
    long = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -long[item.path])
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") and not (TEST_DEVICE == "cpu" and "device" in item.fixturenames):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def demo_base(tmp_path_factory) -> Path:
    """The demo's tiny base: official format, real framing, its own text encoder."""
    from sa3dist.model.tiny import write_tiny_base

    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def demo_clips(tmp_path_factory) -> Path:
    """A zip of eight captioned clips of every format, 0.5 to 12 s."""
    from sa3dist.commands.demo import synthesise_clips

    path = tmp_path_factory.mktemp("clips") / "clips.zip"
    synthesise_clips(path, seed=1, count=8)
    return path


@pytest.fixture(scope="session")
def demo_work(tmp_path_factory) -> Path:
    """One work directory for all runs on ``demo_clips``: what one has encoded the others find."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def words(demo_base, demo_clips, demo_work) -> list[str]:
    """key=value words of a small deterministic float32 run."""
    from tests.helpers.program import short_run

    return short_run(demo_clips, demo_base, demo_work)
