# Every target does its own set-up in .venv; the first one takes some minutes and about 6 GB.
PYTHON ?= python3
# More arguments for the program a target runs: make sample ARGS="sag_scale=1.0 steps=20"
ARGS ?=

# What make sample draws without ARGS: the picture at the top of README.md.
SHOWN := num_images=12 "classes=[happy face,animal face,person,worker,athlete,monster,vehicle,$\
	plant,place,heart,fruit or vegetable,flag]"

VENV := .venv
READY := $(VENV)/.installed
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help sample studio train-digits test lint types docs bench gpu fuzz torture lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

sample: $(READY) ## Draw emoji with and without guidance; ends with the path of the gallery
	@$(RUN) sample.py $(or $(ARGS),$(SHOWN))

studio: $(READY) ## Open a page on which sliders draw; Ctrl-C ends it
	@$(RUN) studio.py $(ARGS)

train-digits: $(READY) ## Train the bundled digits model anew, on a CPU
	@$(RUN) train.py experiment=digits $(ARGS)

test: $(READY) ## Run the tests
	@$(RUN) -m pytest $(ARGS)

lint: $(READY) ## Check style and formatting
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

types: $(READY) ## Check types
	@$(RUN) -m mypy

docs: $(READY) ## Build the site of the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet $(ARGS)
	@echo "site: site/index.html"

bench: $(READY) ## Measure speed and memory
	@$(RUN) -m benchmarks $(ARGS)

gpu: $(READY) ## Test and measure on a GPU, in at most eight minutes
	@$(RUN) -m benchmarks.gpu $(ARGS)

fuzz: $(READY) ## Give every loader damaged and hostile files: ARGS="--cases 100000"
	@$(RUN) -m benchmarks.fuzz $(ARGS)

torture: $(READY) ## Kill commands at random moments, some 200 times: ARGS="--seconds 600"
	@$(RUN) -m benchmarks.torture $(ARGS)

lock: ## Renew constraints.txt with the newest releases that pyproject.toml allows
	@rm -rf $(VENV)-lock
	@$(PYTHON) -m venv $(VENV)-lock
	@$(VENV)-lock/bin/python -m pip --disable-pip-version-check install -qq -e ".[dev]"
	@sed '/^[^#]/,$$d' constraints.txt > $(VENV)-lock/constraints.txt
	@$(VENV)-lock/bin/python -m pip freeze --all --exclude-editable --exclude pip \
		>> $(VENV)-lock/constraints.txt
	@mv $(VENV)-lock/constraints.txt constraints.txt
	@rm -rf $(VENV)-lock

clean: ## Remove .venv, caches and builds; outputs/ stays
	rm -rf $(VENV) $(VENV)-lock build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sag_dit needs Python 3.11 \
	or newer, and $(PYTHON) is %d.%d: make PYTHON=python3.11 ..." % sys.version_info[:2])'
	@echo "Setting up $(VENV) (some minutes and about 6 GB the first time) ..."
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -qq --constraint constraints.txt --editable ".[dev]"
	@touch $@
