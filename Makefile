# Two commands for a newcomer: `make demo` and `make test`. Everything else is for developers.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
PART ?= tests
GPU_PYTHON ?= python3
OUT ?= kernels/benchmarks/results
# Three for two cores: a test waits for a fifth of its time. Whole files stay together: they share what they prepare.
PARALLEL ?= --numprocesses 3 --dist loadfile
# `make test-services` runs these, the other two targets leave them out: what needs more than the install; the programs
# that measure, which are no part of the product and take two minutes of processor time; and a minute of runs
# whose blocks a C++ compiler compiles.
SERVICES := tests/serve/test_clients.py tests/serve/test_openapi.py tests/report/test_browser.py tests/serve/test_page_browser.py
MEASURING := $(addprefix tests/benchmarks/,test_check_gpu.py test_bench_formed.py test_bench_step.py test_compile_kernels.py \
	test_counted_steps.py test_plan_block.py test_profile_step.py)
COMPILING := tests/training/test_deterministic_compiling.py
APART := $(SERVICES) $(MEASURING) $(COMPILING)

# A dozen of processes at a time import torch and the tests: without compiled files each compiles all of it anew, which
# is a third of what a start costs.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-services fast-test lint format bench gpu-check clean

# The stamp, not the folder, says that an install finished.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(RUN) -m sa3dist.commands.demo

test: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(RUN) -m pytest $(PARALLEL) $(APART:%=--ignore=%)

fast-test: $(VENV)/.installed
	$(RUN) -m pytest $(PARALLEL) $(APART:%=--ignore=%) -m "not slow"

# What needs more than the install: the hosted endpoint's own clients (node and npm), the pages in a browser
# (chromium), two web servers on PostgreSQL, and a minute of 500 requests a second (wrk). And the programs that measure.
test-services: $(VENV)/.installed
	$(RUN) -m pip install --quiet --editable ".[dev,browser,fuzzing]"
	rm -rf $(VENV)/clients
	$(RUN) -m pip install --quiet --target $(VENV)/clients/fal-client-newest fal-client
	$(RUN) -m pip install --quiet --target $(VENV)/clients/fal-client-1.0.0 fal-client==1.0.0
	npm install --silent --no-audit --prefix $(VENV)/clients @fal-ai/client
	SA3_REQUIRE_TOOLS=1 $(RUN) -m pytest $(SERVICES)
	$(RUN) -m pytest $(PARALLEL) $(MEASURING) $(COMPILING)
	folder=$$(mktemp -d) && $(RUN) tests/survival/serve_web.py $$folder && rm -r $$folder
	folder=$$(mktemp -d) && $(RUN) tests/survival/serve_load.py $$folder/load --seconds 60 && rm -r $$folder

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Without bfloat16 instructions torch emulates the baseline's products: one repeat of it takes minutes.
bench: $(VENV)/.installed
	$(RUN) kernels/benchmarks/bench_step.py --precision fp32
	$(RUN) kernels/benchmarks/bench_step.py --precision bf16 --repeats 1

# From the source tree on a bare machine: no install, no network. PART=tests|step|ops|run|ranks|all; wheels of what `run`
# and `ranks` lack there (pydantic, webdataset, soundfile and what these need) are taken from .whl beside this file.
gpu-check:
	PYTHONPATH=.:kernels OUT=$(OUT) $(GPU_PYTHON) kernels/benchmarks/gpu_check.py $(PART)

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .ruff_cache .hypothesis
