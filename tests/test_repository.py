"""What the repository promises as such: its layout, its light imports, and that it hides no other package."""

import subprocess
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.golden import ROOT

# Missing on the machines the GPU check runs on.
ABSENT = ("webdataset", "soundfile", "deepspeed", "diffusers", "pydantic", "rich")
# What a training step needs of the product. ZeRO is DeepSpeed's.
ROOMS = ("adapters", "data", "flow", "model", "parallel", "runtime", "tracking", "training")
NEEDS_MORE = {"sa3dist.parallel.zero", "sa3dist.parallel.zero_blocks"}


def gpu_path() -> list[str]:
    """Names of all modules that the GPU check may import."""
    files = [path.relative_to(ROOT) for room in ROOMS for path in (ROOT / "sa3dist" / room).rglob("*.py")]
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files}
    return sorted(names - NEEDS_MORE) + ["sa3dist.loop", "sa3dist_kernels"]


def python(program: str, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_binding_top_level_is_there():
    for name in ("pyproject.toml", "launch", "sa3dist", "kernels", "tests", "configs", "docker", "README.md"):
        assert (ROOT / name).exists(), name
    for command in ("make demo", "make test"):
        assert command in (ROOT / "README.md").read_text()


def test_the_kernels_folder_does_not_pass_for_hugging_faces_package(tmp_path):
    assert not (ROOT / "kernels/__init__.py").exists()
    asking = [package for package in ("transformers", "diffusers") if find_spec(package)]
    assert asking
    try:
        version("kernels")
    except PackageNotFoundError:
        # Where it is not installed, both say so. This process finds the folder as a run in the root does.
        assert find_spec("kernels").origin is None
        libraries = [import_module(f"{package}.utils.import_utils") for package in asking]
        assert not any(library.is_kernels_available() for library in libraries)
        return
    # Both are asked in forks of one process that has imported what takes longest.
    said = ", ".join(f"{package}_utils.is_kernels_available()" for package in asking)
    lines = [
        "import os, torch",
        f"for place in {[str(ROOT), str(tmp_path)]}:",
        "    if os.fork() == 0:",
        "        os.chdir(place)",
        *(f"        import {package}.utils.import_utils as {package}_utils" for package in asking),
        f"        print({said}, flush=True)",
        "        os._exit(0)",
        "    os.wait()",
    ]
    here, elsewhere = python("\n".join(lines)).splitlines()
    assert here == elsewhere


def test_an_installed_package_has_every_module_and_file_of_this_one():
    tomllib = pytest.importorskip("tomllib")
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    files = [path for path in (ROOT / "sa3dist").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    rooms = {".".join(path.parent.relative_to(ROOT).parts) for path in files if path.name == "__init__.py"}
    assert rooms <= set(told["packages"])
    listed = {
        path
        for room, patterns in told["package-data"].items()
        for pattern in patterns
        for path in ROOT.glob(f"{room.replace('.', '/')}/{pattern}")
    }
    assert {path for path in files if path.suffix != ".py"} <= listed


def test_the_gpu_path_imports_without_what_gpu_machines_lack():
    block = (
        "import sys, importlib, importlib.abc\n"
        "class Block(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {ABSENT}: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    assert python(block + "".join(f"import {name}\n" for name in gpu_path()) + "print('imported')") == "imported\n"


def test_a_runner_starts_without_what_takes_seconds_to_import():
    # Its lease runs from before it is started.
    program = "import sa3dist.serve.runner, sys; print({'torch', 'pydantic', 'fsspec', 'fastapi'} & {*sys.modules})"
    assert python(program) == "set()\n"


@pytest.mark.parametrize("module", ["sa3dist", "sa3dist.config", "sa3dist.supervise"])
def test_importing_the_package_or_reading_settings_imports_no_framework(module):
    assert python(f"import {module}, sys; print('torch' in sys.modules)") == "False\n"


def test_an_uncompiled_step_of_the_optimiser_imports_no_compiler_also_in_a_deterministic_run():
    # A second of processor time at every start.
    program = (
        "import sys, torch\n"
        "from sa3dist.parallel.flat_adamw import FlatAdapters\n"
        "from sa3dist.training.acceleration import make_deterministic\n"
        "make_deterministic()\n"
        "flat = FlatAdapters({'a': torch.nn.Parameter(torch.ones(3))}, 1e-3, 0.0, scalars=0)\n"
        "flat.parameters['a'].square().sum().backward()\n"
        "flat.step()\n"
        "exact = torch.are_deterministic_algorithms_enabled()\n"
        "print(flat.parameters['a'][0].item() < 1, exact, 'torch._dynamo' in sys.modules)"
    )
    assert python(program) == "True True False\n"
