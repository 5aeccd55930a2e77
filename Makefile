# Two commands: `make demo` and `make test`. Both make their own environment in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-gpu sanitize lint fuzz wheel clean

demo: $(INSTALLED)
	$(BIN)/rt-lynx demo

test: lint
	$(BIN)/python -m pytest tests -n 2

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest tests/gpu -m gpu

sanitize: $(INSTALLED)
	$(BIN)/python -m tests.gpu.sanitize

# The packages live in four top-level folders; the type checker sees them as they are installed.
lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/typing/lynx_compile
	ln -sfn $(CURDIR)/lynx_compile/* $(CURDIR)/passes $(CURDIR)/runtime $(CURDIR)/csrc build/typing/lynx_compile/
	MYPYPATH=build/typing $(BIN)/mypy -p lynx_compile

fuzz: $(INSTALLED)
	$(BIN)/python -m tests.fuzz --seconds $(or $(SECONDS),600)

wheel: $(INSTALLED)
	$(BIN)/python -m build --wheel

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt torch
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt -e ".[cuda,demo,calibration,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist demo_out *.egg-info
