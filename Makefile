PYTHON    ?= python3
VENV      := .venv
BIN       := $(VENV)/bin
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
NB        ?=
KILLS     ?= 100

.DEFAULT_GOAL := help
.PHONY: help tour lab todo-gpu setup setup-cpu test lint mutants kills check-export check-clean notebooks export readme run evidence results site look clean

help:             ## this list
	@echo "dfkd_nb: data-free knowledge distillation, a book that is a package. Start with: make tour"
	@grep -E '^[a-z-]+: .*## |^[a-z-]+:  *## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1|/' | \
	  awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'

# --- reading ------------------------------------------------------------------------------------------------------
tour: book        ## four minutes: images from a network, students trained on them; prints accuracies, page and pictures in _tour
	@$(BIN)/python tools/tour.py

lab: book         ## JupyterLab on the book
	$(BIN)/jupyter lab --notebook-dir=nbs nbs/index.ipynb

todo-gpu: book    ## the recipes that have no full-scale result yet
	@$(BIN)/dfkd list --missing-full

# --- installation: each target below and above calls it; a second call is instant -----------------------------------
setup: dev        ## the environment with everything (on Linux, PyPI's torch is the CUDA build)

setup-cpu:        ## the same with PyTorch's CPU build, for Linux without a GPU
	@$(PYTHON) tools/environment.py dev --cpu-index $(CPU_INDEX)

.PHONY: book dev
book:
	@$(PYTHON) tools/environment.py book
dev:
	@$(PYTHON) tools/environment.py dev

# --- checking -----------------------------------------------------------------------------------------------------
test: lint check-export  ## lint, package against notebooks, then every notebook at quick scale and tests/
	$(BIN)/pytest

mutants: dev      ## deliberate faults, each in a copy: tests must notice all: make mutants ONLY=replay JOBS=4 tries some, side by side
	$(BIN)/python tests/mutants.py --only '$(ONLY)' --jobs $(or $(JOBS),2)

lint: dev         ## ruff, mypy, and the order of imports
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

kills: dev        ## a hundred kills over every kind of run, and what is left compared byte by byte (KILLS=100)
	OMP_NUM_THREADS=1 DFKD_PROGRESS=0 MPLBACKEND=Agg $(BIN)/python tests/test_kill.py --kills $(KILLS)

check-export: dev ## the package is exactly what the notebooks export
	@$(BIN)/python tools/check_export.py

check-clean: dev  ## notebooks are stored without counts, errors and an editor's metadata
	@$(BIN)/pytest -q tests/test_sync.py

notebooks: dev    ## only the notebooks, as tests: make notebooks NB=priors runs those whose name contains it
	$(BIN)/pytest tests/test_notebooks.py $(if $(NB),-k '$(NB)')

# --- writing ------------------------------------------------------------------------------------------------------
export: dev       ## notebooks -> package
	$(BIN)/nbdev_export

readme: dev       ## nbs/index.ipynb -> README.md
	$(BIN)/python tools/readme.py

run: dev          ## execute notebooks and store their outputs: make run NB=nbs/dreams/03_priors.ipynb (default: all)
	$(BIN)/python tools/run_nbs.py $(NB)

evidence: book    ## the missing runs at the hour scale, one core, most valuable first: make evidence MINUTES=170 stops in time
	@$(BIN)/dfkd evidence $(if $(MINUTES),--max-minutes $(MINUTES)) || test $$? -eq 3

results: dev      ## the chapters that show results, again, after a run has left a new one
	$(BIN)/python tools/run_nbs.py nbs/index.ipynb nbs/lab/21_comparison.ipynb nbs/lab/22_methods.ipynb
	$(BIN)/python tools/readme.py

# --- publishing ---------------------------------------------------------------------------------------------------
site: dev         ## the site in _site, with Quarto where it is installed, else in pure Python
	$(BIN)/python -m tools.website

look: dev         ## screenshots of every page of _site in _look, with errors and foreign requests (needs Chromium)
	$(BIN)/python tools/look.py

clean:            ## remove what was built (environment and runs stay)
	rm -rf _site _proc _tour _look build dist .pytest_cache .mypy_cache .ruff_cache
