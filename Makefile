# On a fresh clone, with Python 3.11 or later and make: `make demo` shows it, `make test` tests it. Everything lives in .venv.

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS  ?=

.DEFAULT_GOAL := help
.PHONY: help venv demo test check bench soak clean

help: ## This list. ARGS="..." is passed on, as in: make test ARGS="tests/unit -x"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP) ## Make .venv and install dtr with what its developers need (done once, and again when pyproject.toml changed)

# The stamp is written last: an installation that was cut off is done again.
$(STAMP): pyproject.toml
	@rm -f $@
	@python=; for candidate in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python); do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo "dtr needs Python 3.11 or later; give one with: make venv PYTHON=/path/to/python3" >&2; exit 1; fi; \
	if ! $(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  echo "making $(VENV) with $$("$$python" --version)"; \
	  "$$python" -m venv --clear $(VENV) || { echo "Debian and Ubuntu have that in the package python3-venv" >&2; exit 1; }; \
	fi
	@echo "installing dtr into $(VENV) (a minute or two, once)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: venv ## Train for a minute, kill a worker, recover, and check that nothing was lost
	@$(BIN)/dtr demo $(ARGS)

test: venv ## All tests but the long ones
	@$(BIN)/python -m pytest -m "not soak" --numprocesses 2 --dist loadfile $(ARGS)

soak: venv ## The long tests
	@$(BIN)/python -m pytest -m soak $(ARGS)

check: venv ## Style, types, import layers, headers of the Lua scripts
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache --no-logo
	@$(BIN)/python -m pytest -q tests/lua/test_headers.py

bench: venv ## The figures, one JSON object each; beat needs redis-benchmark
	@$(BIN)/python -m bench.placement --json
	@$(BIN)/python -m bench.barrier --json
	@$(BIN)/python -m bench.stall --json
	@$(BIN)/python -m bench.upload --json
	@$(BIN)/python -m bench.restore --json
	@$(BIN)/python -m bench.delta --json
	@$(BIN)/python -m bench.data --json
	@$(BIN)/python -m bench.beat --json

clean: ## Remove .venv and what tools leave behind
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
