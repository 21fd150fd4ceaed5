# Every target sets up what it needs: a machine with Python >= 3.10 and a C++ compiler is enough.
# ARGS goes to the command, as in: make test ARGS='-k lion -x'. PYTHON names another Python.

PYTHON ?= python3
ARGS ?=

RUN := .venv/bin
PIP := $(RUN)/python -m pip --disable-pip-version-check
SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc python -type f -not -name '*.pyc')
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

# Tests of what optimizers do, wherever parameters are.
ON_DEVICES := tests/contract tests/muon $(addprefix tests/test_,amp.py torch_oracle.py lookahead.py ema.py ema_around.py ema_life.py ema_swapped.py kept_streams.py traps.py bad_input.py norm.py repeated_params.py streams_apart.py pending_clip.py clip_to_infinity.py spikes.py spikes_kept.py spikes_beside.py statistics.py statistics_paths.py)

# Files of tests side by side, each in one process.
SIDE_BY_SIDE := --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: help demo docs site test-site site-links test bench bench-peers bench-docs count lint format wheel test-machines
.PHONY: wheels test-wheels test-torches lint-release
.PHONY: test-ecosystem gpu-check gpu-rows gpu-sanitize clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

## make demo           train a small GPT with torch's optimizer and with fusedopt's, and compare
demo: .venv/installed
	$(RUN)/python examples/train_gpt.py $(ARGS)

## make docs           the pictures and measured tables of docs/choosing.md, memory.md, muon.md, watching.md
docs: .venv/installed
	$(RUN)/python -m tools.make_guide
	$(RUN)/python -m tools.memory_quality
	$(RUN)/python -m tools.memory_speed
	$(RUN)/python -m tools.memory_page --write
	$(RUN)/python -m tools.muon_page
	$(RUN)/python -m examples.watch_gpt --out docs/watching.png

## make site           the documentation as a site, in build/site
site: .venv/site .venv/installed
	$(RUN)/python -m sphinx --quiet --fail-on-warning --keep-going \
	  -c tools/site -d build/site-doctrees docs build/site

## make test-site      open its pages in Chromium, as wide as a desktop and a telephone
test-site: site
	$(RUN)/python -m pytest $(ARGS) tests/site

## make site-links     look whether what it links to elsewhere is there: asks other machines
site-links: .venv/site .venv/installed
	$(RUN)/python -m sphinx --quiet --keep-going --builder linkcheck \
	  -c tools/site -d build/site-doctrees docs build/site-links

## make test           all tests, some of them once more with a GPU that the CPU plays
test: .venv/installed
	$(RUN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS)
	$(RUN)/python -m pytest $(SIDE_BY_SIDE) --quiet --device emulated $(ON_DEVICES) $(ARGS)

## make bench          what fusedopt gains on this machine; ARGS=--quick takes a few minutes
bench: .venv/installed
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/python -m fusedopt.bench $(ARGS)

## make bench-peers    the same, with all peers that it knows installed beside torch
bench-peers: .venv/peers bench

## make bench-docs     measure docs/performance.md anew, an hour and a half; ARGS="--rows TEXT" less
bench-docs: export PATH := $(CURDIR)/$(RUN):$(PATH)
bench-docs: .venv/peers .venv/installed
	$(RUN)/python -m tools.measure_page $(ARGS)
	$(RUN)/python -m tools.performance_page

## make count          instructions of a step under valgrind, against recorded bounds
count: .venv/installed
	$(RUN)/python tools/count_instructions.py $(ARGS)

## make lint           formatting, style, types and layers
lint: .venv/dependencies
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/clang-format --dry-run --Werror $(CPP)
	$(RUN)/python tools/check_layers.py

## make format         what lint asks for, done where a tool can do it
format: .venv/dependencies
	$(RUN)/ruff check --fix-only .
	$(RUN)/ruff format .
	$(RUN)/clang-format -i $(CPP)
	$(RUN)/python tools/check_layers.py --write

## make wheel          the wheel, in dist/
wheel: .venv/dependencies
	$(PIP) wheel --no-deps --build-constraint constraints.txt --wheel-dir dist .

## make wheels         a checked manylinux wheel a Python, PYTHONS="..."; with CUDA="80 90", kernels
wheels: .venv/wheels
	$(RUN)/python -m tools.make_wheels $(PYTHONS) $(if $(CUDA),--cuda "$(CUDA)") $(ARGS)
	$(RUN)/python -m tools.support_page --write

## make test-wheels    the wheel in dist/ installed, and the sdist built in several ways
test-wheels: .venv/wheels .venv/installed
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/python -m pytest $(ARGS) tests/wheels

## make test-torches   that wheel with each torch from the oldest on: gigabytes of downloads
test-torches: .venv/wheels
	$(RUN)/python -m tools.test_torches $(or $(WHEEL),$(firstword $(wildcard dist/*-cp311-*manylinux*))) $(ARGS)
	$(RUN)/python -m tools.support_page --write

## make lint-release   workflows, citation and issue templates
lint-release: SCHEMA := $(RUN)/check-jsonschema --builtin-schema vendor.
lint-release: .venv/release
	$(RUN)/zizmor --offline .github
	$(SCHEMA)github-workflows .github/workflows/*.yml
	$(SCHEMA)dependabot .github/dependabot.yml
	$(SCHEMA)github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(SCHEMA)github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(SCHEMA)citation-file-format CITATION.cff

## make test-machines  the kernels on processors that this machine is not, under emulation
test-machines: .venv/dependencies
	tests/machines/run

## make test-ecosystem what torch is used with, from FSDP2 to Lightning: a few minutes
test-ecosystem: .venv/ecosystem .venv/installed
	$(RUN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS) tests/ecosystem

## make gpu-check      build and test the CUDA kernels, where there is a GPU, in at most nine minutes
gpu-check:
	$(PYTHON) -m tools.gpu_check check $(ARGS)

## make gpu-rows       measure what gpu-check has built, in at most nine minutes
gpu-rows:
	$(PYTHON) -m tools.gpu_check rows $(ARGS)

## make gpu-sanitize   run it under compute-sanitizer, in at most nine minutes
gpu-sanitize:
	$(PYTHON) -m tools.gpu_check sanitize $(ARGS)

## make clean          remove all that was made here
clean:
	rm -rf .venv build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The pinned pip comes first, because old ones know no --group.
.venv/dependencies: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fusedopt needs \
	Python 3.10 or newer, but $(PYTHON) is %d.%d: name another one with make PYTHON=..." \
	% sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt pip
	$(PIP) install --constraint constraints.txt --group dev
	@touch $@

.venv/peers: .venv/dependencies
	$(PIP) install --constraint constraints.txt --group peers
	@touch $@

.venv/wheels .venv/release: .venv/dependencies
	$(PIP) install --constraint constraints.txt --group $(notdir $@)
	@touch $@

.venv/ecosystem: .venv/dependencies
	$(PIP) install --constraint constraints.txt --group ecosystem
	@touch $@

.venv/site: .venv/dependencies
	$(PIP) install --constraint constraints.txt --group site
	@touch $@

.venv/installed: .venv/dependencies $(SOURCES)
	$(PIP) install --quiet --no-deps --build-constraint constraints.txt \
	  --config-settings cmake.define.FUSEDOPT_EMULATED_DEVICE=ON .
	@touch $@
