# Short targets; CI runs only these. PYTHON, MODEL, EMBEDDER, RERANKER, HOST, PORT, N, GPU, TESTS, JOBS and ARGS can be set
# on the command line.
PYTHON ?= python3
MODEL ?=
EMBEDDER ?=
RERANKER ?=
HOST ?= 127.0.0.1
PORT ?= 8000
N ?= 3
JOBS ?= 2
BIN := .venv/bin
# MODEL is a folder (mounted), a hub id (downloaded: the way out is opened) or empty (the demonstration model). EMBEDDER
# and RERANKER are such models beside it, or empty (none).
folder = $(if $($1),$(realpath $($1)))
mounted = $(if $(call folder,$1),$1_DIR=$(call folder,$1) $1_NAME=$(notdir $(call folder,$1)) \
  $1_ARG=/models/$(notdir $(call folder,$1)),$(if $($1),$1_ARG=$($1)))
from-hub = $(if $(call folder,$1),,$($1))
BESIDE := $(if $(EMBEDDER),--profile embedder) $(if $(RERANKER),--profile reranker)
COMPOSE := PORT=$(PORT) $(foreach name,MODEL EMBEDDER RERANKER,$(call mounted,$(name))) \
  docker compose $(BESIDE) -f deploy/compose.yaml $(if $(GPU),-f deploy/compose.gpu.yaml) \
  $(if $(strip $(BESIDE)),-f deploy/compose.retrieval.yaml) \
  $(if $(strip $(foreach name,MODEL EMBEDDER RERANKER,$(call from-hub,$(name)))),-f deploy/compose.hub.yaml)
ROOMS := protos engine_service tokenizer_service frontend kernels local

.PHONY: install native serve clients test test-gpu check format protos bench bench-gpu up down logs scale clean

install: .venv/.installed native

# The CPU's small ops in C; without a compiler one line says what is lost, and torch runs them.
native: .venv/.installed
	@$(BIN)/python -m penstock.kernels.native.build || true

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Penstock needs Python 3.11 or newer; set PYTHON=")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	deploy/install-torch.sh $(BIN)/python auto
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

serve: install
	@$(BIN)/penstock serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

# Real clients in an environment of their own: their pins are not the server's.
clients: .venv/clients/.installed

.venv/clients/.installed: tests/clients/requirements.txt | install
	@test -x .venv/clients/bin/python || $(PYTHON) -m venv .venv/clients
	.venv/clients/bin/python -m pip install --quiet --disable-pip-version-check -r tests/clients/requirements.txt
	@if command -v npm >/dev/null; then npm install --silent --no-audit --no-fund --prefix .venv/clients/node openai; \
	  else echo "no npm here: the test of its openai package is skipped"; fi
	@touch $@

# Whole files side by side, in their order (the longest are in the middle): what a file shares is made once. JOBS=0 runs
# all in one process, as a debugger needs it.
test: install clients
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# Needs only what a GPU image has (torch, triton, transformers, grpc) and a checkout: no install, no network.
# The plugin stands in for packages that such an image lacks; a newer torch or triton may warn there.
test-gpu: .dev/penstock
	PYTHONPATH=.dev:tests/support $(PYTHON) -m pytest -p bare_image -o filterwarnings=default -m gpu \
	  $(or $(TESTS),tests/kernels tests/engine) $(ARGS)

check: install .dev/penstock
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.dev $(BIN)/mypy $(addprefix -p penstock.,$(ROOMS))
	$(BIN)/python -m pytest -q tests/laws

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: install
	PYTHON=$(BIN)/python protos/generate.sh

# A few minutes; ARGS="--full" takes half an hour, ARGS="--peer vllm" puts another server beside ours.
bench: install
	$(BIN)/penstock bench suite $(ARGS)

# Needs what test-gpu needs. ARGS="--parts llama-3-8b" runs one part, each under nine minutes; --out names the folder.
bench-gpu: .dev/penstock
	PYTHONPATH=.dev $(PYTHON) benchmarks/gpu.py $(ARGS)

# The namespace without an install: penstock.frontend is .dev/penstock/frontend, penstock.local a link beside it.
.dev/penstock:
	@mkdir -p $@
	@for room in protos engine_service tokenizer_service frontend kernels; do ln -sfn ../../$$room $@/$$room; done
	@ln -sfn ../../deploy/local $@/local

up:
	$(COMPOSE) up --build --detach --wait

down:
	$(COMPOSE) down --remove-orphans

logs:
	$(COMPOSE) logs --follow --tail 100

scale:
	$(COMPOSE) up --detach --wait --no-recreate --scale frontend=$(N)

clean:
	rm -rf .venv .dev build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
