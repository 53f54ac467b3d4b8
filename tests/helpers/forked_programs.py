"""Programs of this tree as __main__ in processes forked from one that has imported torch and the trainer."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helpers.program import ENVIRONMENT

# A program ends as it would by itself: handlers of its own run at its exit. It finds no terminal and nothing to read.
# What was imported is not taken apart at that end, nor looked through for garbage: each fork would copy all of it.
_SERVER = """
import atexit, gc, json, os, runpy, sys, threading, traceback
import accelerate, transformers
import torch._dynamo
from sa3dist import pipeline, train
gc.collect()
gc.freeze()
gc.set_threshold(50_000, 20, 50)
for line in sys.stdin:
    program, words, out, err = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, (path, flags) in enumerate([(os.devnull, os.O_RDONLY), (out, os.O_WRONLY), (err, os.O_WRONLY)]):
            os.dup2(os.open(path, flags), number)
        sys.argv = [program, *words]
        sys.path.insert(0, os.path.dirname(program))
        code = 0
        try:
            runpy.run_path(program, run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class ForkedPrograms:
    def __enter__(self):
        # What the programs set before they import torch; the ranks they fork have its threads no more.
        environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_):
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def run(self, program: Path, *words) -> tuple[int, str, str]:
        """Exit code of a program, and what it wrote to stdout and stderr."""
        with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
            asked = [str(program), [str(word) for word in words], out.name, err.name]
            print(json.dumps(asked), file=self._server.stdin, flush=True)
            return int(self._server.stdout.readline()), out.read(), err.read()
