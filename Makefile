# What people and `make help` call; every recipe is one command, logic belongs in Python.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo check lint types tests tests-slow export parity clean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# make demo MODEL=Qwen/Qwen2.5-VL-3B-Instruct OUT=artifacts/3b IMAGE=photo.jpg PROMPT="..."
MODEL ?= examples/tiny-vlm
OUT ?= artifacts/$(notdir $(MODEL:%/=%))
DTYPE ?= float32
PROFILE ?=
KEEP_RATIO ?= 0.2
IMAGE ?= examples/tiny-vlm/samples/0-colour.png
PROMPT ?= What colour is the heart?
PICTURE ?= artifacts/demo.png

# Two sets of packages in one environment: all, with torch for parity and tests; or what a demo needs.
FULL := $(VENV)/.full
LIGHT := $(VENV)/.light
READY := $(if $(wildcard $(FULL)),$(FULL),$(LIGHT))

help: ## Show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(FULL) ## Make .venv with all that development needs, torch included

demo: export ## Ask the shipped tiny model about a shipped image, with 20 % of its visual tokens
	@$(BIN)/hawk-trt run $(OUT) --image $(IMAGE) --prompt "$(PROMPT)" --keep-ratio $(KEEP_RATIO) --picture $(PICTURE)

check: lint types tests ## Lint, types, tests: what CI runs

lint: $(FULL)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(FULL)
	$(BIN)/mypy

tests: $(FULL)
	$(BIN)/pytest -q -ra

tests-slow: $(FULL) ## The larger samples of the tests, minutes on a laptop
	$(BIN)/pytest -q -ra -m slow

export: $(READY) ## Checkpoint to ONNX bundle: MODEL=path-or-hub-id OUT=folder DTYPE=float16 PROFILE=portable (else both)
	$(BIN)/python -m export $(MODEL) --out $(OUT) --dtype $(DTYPE) $(PROFILE:%=--profile %)

parity: $(FULL) export ## Compare the bundle with PyTorch, stage by stage: MODEL=path OUT=folder
	$(BIN)/hawk-trt parity $(OUT) --checkpoint $(MODEL)

clean: ## Remove what was generated; .venv stays
	rm -rf artifacts build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(FULL): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[cpu,export,video,parity,dev]' && touch $@

$(LIGHT): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[cpu,export]' && touch $@
