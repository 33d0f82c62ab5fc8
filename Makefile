# Two commands do everything, set-up included: `make demo` and `make test`.
VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/ready

help: ## what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

install: $(READY) ## .venv with the project, its tests and FFCV

$(READY): pyproject.toml install.sh
	@if [ -e $@ ]; then echo "$? is newer than $(VENV): installing again"; fi
	./install.sh $(VENV)
	@touch $@

demo: $(READY) ## train vanilla, SAM and GSAM on real digits, a run per core; print the table, draw the figure
	$(VENV)/bin/sam-repro run demo --per-gpu $(shell nproc)
	$(VENV)/bin/sam-repro table demo
	$(VENV)/bin/sam-repro figures demo

test: $(READY) ## the tests that need neither a GPU nor SLURM, without the slow ones (5 to 6 minutes on 2 cores)
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY) ## the tests that take minutes each
	$(PYTHON) -m pytest -m slow

test-slurm: $(READY) ## a two-node SLURM on this machine, and runs on it (as root; 7 minutes)
	tests/slurm/install.sh
	$(PYTHON) -m pytest -m slurm

test-gpu: $(READY) ## the tests that need an NVIDIA GPU
	$(PYTHON) -m pytest -m gpu

lint: $(READY) ## formatting, lint and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(PYTHON)

check: $(READY) ## derive every published number from the ledger again and compare
	$(VENV)/bin/sam-repro check
	$(PYTHON) benchmarks/report.py --check

format: $(READY) ## let ruff rewrite the formatting
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

API := optim curvature data models.build config.schema records.ledger paper.spec
api: $(READY) ## pages about the public classes and functions in build/api, from the docstrings
	$(PYTHON) -m pdoc --docformat google --footer-text sam-repro -o build/api $(API:%=sam_repro.%)
	@echo "open build/api/index.html"

clean: ## remove the environment; runs/ (weights) and data/ stay
	rm -rf $(VENV)

.PHONY: api help install demo test test-slurm check test-slow test-gpu lint format clean
