# make run        notebooks 01 to 05, headless, at the preset at hand; pictures and executed copies in build/
#                 (NOTEBOOKS=all for every notebook, NOTEBOOKS="06 07" for these two)
# make test       every test, then every notebook
# make lab        JupyterLab on the notebooks
# make notebooks  write the stored outputs of notebooks whose code has changed
# make site       the notebooks and the library's reference as pages, in build/site
# Each sets up what it needs in $(VENV). TUTORIAL_PRESET=quick|laptop|full chooses the preset.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
NOTEBOOKS ?=
# On Linux, PyTorch asks for large memory pages: steps on a CPU take up to a tenth less time (notebook 10).
THP_MEM_ALLOC_ENABLE ?= 1
export THP_MEM_ALLOC_ENABLE

.PHONY: run test lab notebooks site clean

$(VENV)/ready: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.12"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable ".[notebooks,test]"
	touch $@

run: $(VENV)/ready
	$(BIN)/python -m tools.notebooks run $(NOTEBOOKS)

test: $(VENV)/ready
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest --nbval notebooks/

lab: $(VENV)/ready
	$(BIN)/python -m jupyter lab notebooks

notebooks: $(VENV)/ready
	$(BIN)/python -m tools.notebooks build

$(VENV)/site-ready: $(VENV)/ready
	$(BIN)/python -m pip install --editable ".[site]"
	touch $@

site: $(VENV)/site-ready
	$(BIN)/python docs/build.py

clean:
	rm -rf build
