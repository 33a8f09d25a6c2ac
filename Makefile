# The project's commands; `make` without a target lists them.
#
# They use their own environment in .venv, which is created at first use. PYTHON=/path/to/python uses
# an environment that already has torch and Detectron2; nothing is installed into it. TORCH=cpu
# installs torch without CUDA, from the package index TORCH_INDEX (tools/setup_env.py).

SYSTEM_PYTHON := $(firstword $(foreach name,python3 \
	python3.14 python3.13 python3.12 python3.11 python3.10, \
	$(shell command -v $(name) 2>/dev/null)))

ifeq ($(strip $(PYTHON)),)
RUN := .venv/bin/python
ready = @$(if $(SYSTEM_PYTHON),"$(SYSTEM_PYTHON)" tools/setup_env.py install $(1) \
	$(if $(TORCH),torch=$(TORCH)), \
	echo "There is no Python on PATH: install Python 3.10 to 3.14." >&2; exit 1)
else
RUN := "$(PYTHON)"
ready = @command -v $(RUN) >/dev/null || { echo "PYTHON=$(PYTHON) is not a program." >&2; exit 1; }; \
	echo "Using PYTHON=$(PYTHON); nothing is installed into it."; \
	$(RUN) tools/setup_env.py check $(1)
endif

# One process for each of two cores, with one thread each: half the time of one with two threads.
# tests/conftest.py sorts the files.
TEST_PROCESSES := 2

# Import the package from this folder, wherever the environment is.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: help setup demo test benchmark env lint format site clean

help:  ## list the commands
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /@/' | \
		awk -F@ '{printf "make %-9s %s\n", $$1, $$2}'
	@echo 'PYTHON=/path/to/python uses that environment instead of .venv; ARGS="..." is passed on.'
	@echo 'TORCH=cpu sets .venv up with torch for the CPU: 2 GB instead of 7.'

setup:  ## create the environment .venv
	$(call ready)

demo:  ## train, evaluate and draw RelDN on the built-in dataset (RETRAIN=1: from scratch)
	$(call ready)
	$(RUN) tools/toy_demo.py $(if $(RETRAIN),--retrain) $(ARGS)

test:  ## run the tests
	$(call ready,test)
	$(RUN) -m pytest -n $(TEST_PROCESSES) --dist loadscope --no-loadscope-reorder $(or $(ARGS),tests)

benchmark:  ## train and score box models on VRD's annotations (DETECTRON2_DATASETS)
	$(call ready)
	$(RUN) tools/vrd_benchmark.py $(ARGS)

env:  ## print the versions of everything, for bug reports
	$(call ready)
	$(RUN) -m reldn_d2.env

lint:  ## check the code with ruff, black and isort
	$(call ready,dev)
	$(RUN) -m ruff check .
	$(RUN) -m black --check .
	$(RUN) -m isort --check .

format:  ## format the code with black and isort
	$(call ready,dev)
	$(RUN) -m isort .
	$(RUN) -m black .

site:  ## build the documentation site in build/site (Python 3.11 or later)
	$(call ready,test)
	$(RUN) tools/site_pages.py
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

clean:  ## remove .venv and caches; keeps trained models in output/
	@if [ -f .venv/reldn_d2_setup.json ]; then rm -rf .venv; fi
	rm -rf build *.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
