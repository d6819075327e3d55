# What people and `make help` call; every recipe is one command, logic belongs in Python.
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo check docs lint types tests tests-slow export parity accuracy clean
.PHONY: wheel check-wheel
.PHONY: check-files check-harness check-models check-page check-quantisers check-serving bench-native real
.PHONY: advise calibrate evidence train-hybrid train-tiny
.PHONY: plugin plugin-check gpu-report
.PHONY: engines self-test preflight preflight-cuda preflight-large types-tensorrt
.PHONY: bench bench-batching bench-shape bench-claims bench-export bench-growth bench-load bench-memory bench-peers bench-quantised bench-start peers

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
GPU_PYTHON ?= $(BIN)/python
HARNESS_PYTHON ?= $(BIN)/python
TENSORRT_ROOT ?=

# make demo MODEL=Qwen/Qwen2.5-VL-3B-Instruct OUT=artifacts/3b IMAGE=photo.jpg PROMPT="..."
MODEL ?= examples/tiny-vlm
OUT ?= artifacts/$(shell basename "$(MODEL)")
DTYPE ?= float32
TARGET ?=
KEEP_RATIO ?= 0.2
IMAGE ?= examples/tiny-vlm/samples/0-colour.png
PROMPT ?= What colour is the heart?
PICTURE ?= artifacts/demo.png
# make engines BUNDLE=artifacts/3b FLAGS="--max-context 2048"
BUNDLE ?= $(OUT)
ENGINES ?= $(BUNDLE)-engines
FLAGS ?=
# make bench SHAPE=qwen2.5-vl-3b LAYERS=4: random weights of that shape
SHAPE ?=
LAYERS ?=
VISION_LAYERS ?=

# Two sets of packages in one environment: all, with torch for parity and tests; or what a demo needs.
FULL := $(VENV)/.full
LIGHT := $(VENV)/.light
READY := $(if $(wildcard $(FULL)),$(FULL),$(LIGHT))

help: ## Show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(FULL) ## Make .venv with all that development needs, torch included

demo: export ## Ask the shipped tiny model about a shipped image, with 20 % of its visual tokens
	@$(BIN)/hawk-trt run "$(OUT)" --image "$(IMAGE)" --prompt "$(PROMPT)" --keep-ratio $(KEEP_RATIO) --picture "$(PICTURE)"
	@printf '%s\n' 'Next: $(BIN)/hawk-trt chat "$(OUT)" --image "$(IMAGE)"' \
	  '      $(BIN)/hawk-trt chat Qwen/Qwen2.5-VL-3B-Instruct       a real model: 7.5 GB are downloaded' \
	  '      make setup && $(BIN)/hawk-trt serve "$(OUT)"     an OpenAI server, with a page to ask from'

check: lint types types-tensorrt docs tests ## Lint, types, tests: what CI runs

CPP := $(wildcard plugins/*.cu plugins/*.cuh plugins/*.cpp tests/plugins/*.cpp tests/plugins/*/*.h)

docs: $(FULL) ## The site of the documents, into build/site; a link or an anchor that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

lint: $(FULL)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/clang-format --dry-run -Werror $(CPP)

types: $(FULL)
	$(BIN)/mypy

types-tensorrt: $(FULL) ## mypy against the real Python API of TensorRT 10.3, 10.13, 10.16 and 11.4
	$(BIN)/python -m tests.tensorrt_types

tests: $(FULL)
	$(BIN)/pytest -q -ra -n auto --maxprocesses 8 --dist loadfile

tests-slow: $(FULL) ## The larger samples of the tests, minutes on a laptop
	$(BIN)/pytest -q -ra -m slow

export: $(READY) ## Checkpoint to ONNX bundle: MODEL=path-or-hub-id OUT=folder DTYPE=float16 TARGET=cpu (else all)
	$(BIN)/python -m export "$(MODEL)" --out "$(OUT)" --dtype $(DTYPE) $(TARGET:%=--target %)

parity: $(FULL) export ## Compare the bundle with PyTorch, stage by stage: MODEL=path OUT=folder
	$(BIN)/hawk-trt parity "$(OUT)" --checkpoint "$(MODEL)"

advise: $(READY) export ## Which keep ratio pays on this machine: MODEL=path-or-hub-id IMAGE=photo.jpg PROMPT="..."
	$(BIN)/hawk-trt advise "$(OUT)" --image "$(IMAGE)" --prompt "$(PROMPT)" $(FLAGS)

calibrate: $(FULL) ## Head weights of a checkpoint: MODEL=path-or-hub-id FLAGS="--dataset questions.jsonl --device cuda"
	$(BIN)/hawk-trt calibrate "$(MODEL)" --out "$(OUT)-head-weights.json" --work "$(OUT)-calibration" $(FLAGS)

train-hybrid: $(FULL) ## The shipped hybrid trained anew with the same lessons as the tiny model, on one thread: about an hour
	$(BIN)/python -m examples.tiny_training --like examples/tiny-hybrid --out artifacts/tiny-hybrid-new --work artifacts/hybrid-training $(FLAGS)

evidence: $(FULL) ## What pruning costs a hybrid, and what its first layers remember of dropped tokens: tables, ten minutes
	$(BIN)/python -m examples.tiny_training.evidence examples/tiny-hybrid examples/tiny-vlm $(FLAGS)

train-tiny: $(FULL) ## The shipped tiny model trained anew, on one thread: about half an hour
	$(BIN)/python -m examples.tiny_training --out artifacts/tiny-vlm-new $(FLAGS)

engines: $(READY) ## TensorRT plans of a bundle, on this GPU: BUNDLE=folder ENGINES=folder FLAGS="--max-context 2048"
	$(BIN)/python -m engines "$(BUNDLE)" --out "$(ENGINES)" $(FLAGS)

self-test: $(READY) ## Engines of the tiny model on this GPU, compared with ONNX Runtime: a report to attach to an issue
	$(BIN)/python -m engines.checks.self_test

preflight: $(FULL) ## Every graph of a bundle through NVIDIA's parser and builder, without a GPU: BUNDLE=folder
	$(BIN)/python -m engines.checks.preflight "$(BUNDLE)" $(FLAGS)

preflight-cuda: $(FULL) ## Where ONNX Runtime's CUDA provider puts every node, all families and dtypes, oldest and newest version; no GPU
	$(BIN)/python -m benchmarks.gpu_report.preflight $(FLAGS)

preflight-large: $(FULL) ## The same with graphs of 7B shapes and two layers, and of a hybrid: 6 minutes, 14 GB of memory
	$(BIN)/pytest -q -s -m slow tests/engines/test_engines_preflight.py

plugin: ## The TensorRT plugin into build/plugins: TENSORRT_ROOT=folder where it is not in a usual place
	@command -v cmake >/dev/null || { echo "error: cmake is missing: apt install cmake" >&2; exit 1; }
	cmake -S plugins -B build/plugins $(TENSORRT_ROOT:%=-DTENSORRT_ROOT=%) && cmake --build build/plugins

plugin-check: $(FULL) ## The plugin without a GPU: contract and registries; TENSORRT_ROOT="one or more folders"
	$(BIN)/python -m tests.plugins.plugin_check $(TENSORRT_ROOT)

gpu-report: ## All that only a GPU can tell, into a JSON and a table; FLAGS=--rehearse without one; GPU_PYTHON has PyTorch for CUDA
	$(GPU_PYTHON) -m benchmarks.gpu_report $(FLAGS)

bench: $(READY) $(if $(SHAPE),bench-shape,export) ## Time and memory by stage: MODEL=path-or-hub-id, or SHAPE=qwen2.5-vl-3b LAYERS=4; FLAGS="--sides 448"
	$(BIN)/hawk-trt bench $(if $(SHAPE),artifacts/$(SHAPE)-random,$(OUT)) $(FLAGS)

bench-shape: $(READY)
	$(BIN)/python -m export --shape $(SHAPE) $(LAYERS:%=--layers %) $(VISION_LAYERS:%=--vision-layers %) \
	  --out artifacts/$(SHAPE)-random --dtype $(DTYPE) $(TARGET:%=--target %)

bench-memory: $(READY) export ## Memory over 1,000 answers of the tiny model: two minutes
	$(BIN)/python -m benchmarks.memory_growth "$(OUT)" $(FLAGS)

bench-batching: $(READY) ## Concurrent requests in shared steps against one by one, 1 to 32 clients; BUNDLE=folder, else the 3B's width
	$(BIN)/python -m benchmarks.batching $(if $(filter file,$(origin BUNDLE)),,$(BUNDLE)) $(FLAGS)

bench-growth: $(FULL) ## Time and memory against the sizes of prompt, images, answer and cache: docs/growth.png
	$(BIN)/python -m benchmarks.growth $(FLAGS)

bench-quantised: $(FULL) ## int8 and int4 weights against float32: right answers of the tiny model, then speed at the 3B's width
	$(BIN)/python -m benchmarks.quantised_quality --out artifacts/quantised
	$(BIN)/python -m benchmarks.quantised_speed $(FLAGS)

bench-load: $(FULL) ## Time to load the 3B's width, the graphs optimised at load or before, and the disk that takes
	$(BIN)/python -m benchmarks.load_time $(FLAGS)

peers: ## An environment for each peer below artifacts/peers, 4 GB and more: which ones, FLAGS="openvino"
	$(PYTHON) -m benchmarks.peers.environments $(FLAGS)

bench-peers: $(FULL) ## transformers, OpenVINO GenAI and onnxruntime-genai on our weights, images and prompt: 12 minutes, 15 GB of memory; after make peers
	$(BIN)/python -m benchmarks.peers $(FLAGS)

accuracy: $(FULL) export ## Right answers of the tiny model by selector, and what must hold of them: ten minutes
	$(BIN)/python -m benchmarks.accuracy "$(OUT)"

wheel: $(FULL) ## The wheel into dist/: the core, the apps, export, engines, the plugin's sources and the tiny model
	rm -rf build/lib dist && $(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w dist .

check-wheel: wheel ## The wheel in an empty environment, away from the checkout: demo, export, chat, serve, doctor; two minutes
	$(BIN)/pytest -q -m wheel

check-harness: ## The harness tests with the packages themselves: HARNESS_PYTHON of an environment that has them (docs/reproduce.md)
	"$(HARNESS_PYTHON)" -m pytest -q tests/apps/harness -m "slow or not slow" -W default

check-serving: $(FULL) export ## The server under 100 clients, 2,000 requests for its memory, 3,000 with clients that leave, a long fuzz, Ray: ten minutes
	$(BIN)/python -m benchmarks.serving_load "$(OUT)" $(FLAGS) && HAWK_FUZZ_EXAMPLES=300 $(BIN)/pytest -q tests/apps/serve/test_serving_openapi.py
	$(BIN)/pytest -q -s -m ray

check-page: $(FULL) ## The server's page in headless Chromium (apt-get install chromium), with screenshots in artifacts/
	$(BIN)/pytest -q -m browser

check-files: $(FULL) ## 2,000 damaged files of checkpoints, bundles and engines: each a clear error or none
	PYTHONPATH=tests $(BIN)/python -m tests.fuzz_files $(FLAGS)

check-models: $(FULL) ## Real sizes, random weights: 32B and 72B linked, two layers of the 3B and 7B against numpy
	$(BIN)/python -m benchmarks.real_sizes $(FLAGS)

check-quantisers: $(FULL) ## Checkpoints that the quantising packages write, after installing them (docs/quantised.md): three minutes
	$(GPU_PYTHON) -m pytest -q -ra -m quantisers

bench-native: $(FULL) ## Memory and time of images up to 16,384 visual tokens at the 7B's width; whole: FLAGS="--depth 32"
	$(BIN)/python -m benchmarks.native_resolution $(FLAGS)

real: parity ## A released checkpoint: export, parity, an answer about IMAGE; MODEL=path-or-hub-id OUT=folder
	$(BIN)/hawk-trt run "$(OUT)" --image "$(IMAGE)" --prompt "$(PROMPT)" --keep-ratio $(KEEP_RATIO) --max-new-tokens 32

bench-export: $(FULL) ## Time and memory of an export of 7B shapes against copying the files: 18 GB of disk, 3 minutes
	$(BIN)/python -m benchmarks.export_7b $(FLAGS)

bench-claims: $(FULL) ## What pruning must bring at the 7B's width, beside transformers: ten minutes, 8 GB of memory
	$(BIN)/python -m benchmarks.claims $(FLAGS)

bench-start: $(FULL) export ## Import time, start-up time and peak memory of the runtime
	$(BIN)/python benchmarks/start.py "$(OUT)"

clean: ## Remove what was generated; .venv stays
	rm -rf artifacts build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# An environment is made, or made anew where it is half made.
$(FULL): pyproject.toml constraints.txt
	@$(PYTHON) environment.py $(VENV) $@ cpu,eval,export,video,parity,serve,ray,dev

$(LIGHT): pyproject.toml constraints.txt
	@$(PYTHON) environment.py $(VENV) $@ cpu,export
