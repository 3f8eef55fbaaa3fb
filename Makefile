# Every target works from a bare clone: tests/host/install.py makes .venv and fetches a real ComfyUI.
PYTHON ?= python3
BIN := $(if $(filter Windows_NT,$(OS)),.venv/Scripts,.venv/bin)

.PHONY: setup demo test lint bench clean

setup:
	@$(PYTHON) tests/host/install.py

demo: setup
	$(BIN)/python examples/demo/run.py

# Two at a time, whole files each. pytest's stderr goes to stdout, so that `make test 2>/dev/null` ends with pytest's summary.
test: setup
	@$(PYTHON) tests/host/install.py --browser
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS) 2>&1

# mypy needs a folder named like the package, whatever the clone is called.
lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@mkdir -p .venv/mypy && ln -sfn "$(CURDIR)" .venv/mypy/comfyui_svdquant
	$(BIN)/mypy

bench: setup
	$(BIN)/svdquant bench

clean:
	rm -rf .venv .host build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
