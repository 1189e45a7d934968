# `make demo` and `make test` do everything on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The constraint keeps pip from fetching a CUDA build of torch.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt

.PHONY: demo test lint fuzz docs clean

demo: $(VENV)/.demo
	$(BIN)/python benchmarks/demo.py

test: $(VENV)/.test lint
	$(BIN)/python -m pytest --numprocesses auto

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fuser passes

fuzz: $(VENV)/.test
	$(BIN)/python -m pytest -m fuzz

docs: $(VENV)/.test
	$(BIN)/python -m fuser passes --pages passes/docs

$(VENV)/.%: pyproject.toml .ci/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
