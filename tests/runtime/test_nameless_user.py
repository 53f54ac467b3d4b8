"""A container may be started as a user that the system has no name for."""

import subprocess
import sys

import pytest

from tests.helpers.program import ENVIRONMENT

BY_PROGRAM = "from sa3dist.runtime.own_process import as_process\nas_process(use)"
BY_IMPORT = "import sa3dist\nbase = sa3dist.load_base(sys.argv[1])\nuse()"


@pytest.mark.parametrize("begin", [BY_PROGRAM, BY_IMPORT])
def test_what_compiles_is_imported_and_keeps_its_caches_where_there_is_room(begin, demo_base, tmp_path):
    program = """
import os, pwd, sys
def nameless(number):
    raise KeyError(f"getpwuid(): uid not found: {number}")
pwd.getpwuid = nameless
def use():
    import torch._dynamo, transformers.models.t5gemma.modeling_t5gemma
    print(os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ["TRITON_CACHE_DIR"])
    return 0
"""
    names = ("LOGNAME", "USER", "LNAME", "USERNAME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in names}
    environment |= {"HOME": "/nowhere", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", program + begin, str(demo_base)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    places = [place.rsplit("_", 1)[0] for place in done.stdout.split()]
    assert places == [f"{tmp_path}/torchinductor", f"{tmp_path}/triton"]
