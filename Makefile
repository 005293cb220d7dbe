# The commands of this project. Everything runs in .venv, which is made once from constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RANKS ?= 2
FREE_PORT = $(shell $(PYTHON) -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
# One thread per rank: two ranks on two cores are fastest so.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format clean

help:  ## list the commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## make .venv with the exact tested versions

# torch is pinned by constraints.txt and installed first, so that no newer build is drawn in.
$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'megamoe needs Python 3.11 or newer: make PYTHON=/path/to/python3.11'; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## train tiny_enwik8 on two expert-parallel ranks and score it (about five minutes)
	DS_ACCELERATOR=cpu $(BIN)/deepspeed --num_gpus $(RANKS) --master_port $(FREE_PORT) --module megamoe train \
		--preset tiny_enwik8 --deepspeed_config ds_configs/zero1_auto.json name=demo

test: $(STAMP)  ## run the whole test suite, for which root on Debian gets Slurm and Open MPI
	tests/slurm/install.sh
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests

lint: $(STAMP)  ## check style, types and the layering of the rooms
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## rewrite the sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove .venv and caches; run folders stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
