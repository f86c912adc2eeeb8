# `make demo` and `make test` build their environment themselves; Python 3.11 or newer is all they ask for.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test chaos cluster-test check audit clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,test]'
	touch $@

demo: $(VENV)/.installed  ## photos in a bucket -> masks, IoU, overlays, in a minute
	$(BIN)/python -m jobs.demo.run

test: $(VENV)/.installed  ## every test, on a CPU
	$(BIN)/python -m pytest

chaos: $(VENV)/.installed  ## faults injected into real runs, for minutes; ends with a table ($CHAOS_TABLE, $CHAOS_SEED)
	$(BIN)/python -m pytest -m chaos tests/chaos

cluster-test: $(VENV)/.installed  ## several nodes on this machine (as root: a network), minutes
	$(BIN)/python -m pytest -m cluster

check: $(VENV)/.installed  ## lint, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --cache-dir $(VENV)/import-linter

audit:  ## known vulnerabilities of what constraints.txt pins, dated exceptions left out
	test -x $(VENV)-audit/bin/pip-audit || ($(PYTHON) -m venv $(VENV)-audit && \
		$(VENV)-audit/bin/python -m pip install --quiet pip-audit==2.10.1)
	PATH="$(CURDIR)/$(VENV)-audit/bin:$$PATH" $(VENV)-audit/bin/python .ci/audit.py $(AUDIT)

clean:  ## the environment and what the demo left
	rm -rf $(VENV) $(VENV)-audit demo-out
