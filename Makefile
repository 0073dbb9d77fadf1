# make run        the notebooks, headless, at the preset at hand; pictures and executed copies in build/
# make test       every test, then every notebook
# make lab        JupyterLab on the notebooks
# make notebooks  write the stored outputs of notebooks whose code has changed
# Each sets up what it needs in $(VENV). TUTORIAL_PRESET=quick|laptop|full chooses the preset.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: run test lab notebooks clean

$(VENV)/ready: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.12"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable ".[notebooks,test]"
	touch $@

run: $(VENV)/ready
	$(BIN)/python -m tools.notebooks run

test: $(VENV)/ready
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest --nbval notebooks/

lab: $(VENV)/ready
	$(BIN)/python -m jupyter lab notebooks

notebooks: $(VENV)/ready
	$(BIN)/python -m tools.notebooks build

clean:
	rm -rf build notebooks/data
