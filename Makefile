# The targets create the virtual environment they need; the only requirement is Python 3.11 or newer.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo quick test interop chaos cluster-test check audit clean

# The tests that start no process, no server and no Ray, and take less than five seconds each.
QUICK := not ray and not s3 and not process and not slow and not gpu and not interop and not cluster and not chaos

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,test]'
	touch $@

demo: $(VENV)/.installed  ## images in a bucket -> masks, IoU and overlays, in a minute
	$(BIN)/python -m jobs.demo.run

quick: $(VENV)/.installed  ## the tests that take under two minutes in all
	$(BIN)/python -m pytest -m '$(QUICK)'

test: $(VENV)/.installed  ## every test that the README promises, on a CPU
	$(BIN)/python -m pytest

interop: $(VENV)/.installed  ## other libraries as oracles; installs them
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[oracles]'
	$(BIN)/python -m pytest -m interop

chaos: $(VENV)/.installed  ## faults injected into real runs, for minutes; ends with a table ($CHAOS_TABLE, $CHAOS_SEED)
	$(BIN)/python -m pytest -m chaos

cluster-test: $(VENV)/.installed  ## several nodes on this machine (as root: a network), minutes
	$(BIN)/python -m pytest -m cluster

check: $(VENV)/.installed  ## lint, types, and the layers of imports
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
