# Two commands do everything, set-up included: `make repro` and `make test`.
PROFILE ?= laptop
DEMOS ?= scripted
JOBS ?= $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || sysctl -n hw.ncpu)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export DVC_NO_ANALYTICS := 1
# One thread per process, one process per core: nets this small lose by more.
export OMP_NUM_THREADS := 1
READY := $(VENV)/.ready-$(shell cat constraints.txt pyproject.toml | cksum | cut -d' ' -f1)

.PHONY: help repro test lab docs params install clean
help:
	@echo "make repro [PROFILE=smoke|laptop|workstation|paper] [DEMOS=scripted|human] [JOBS=n] [ONLY=part of a stage name]   regenerate the tables"
	@echo "make test      export check, notebooks, pytest"
	@echo "make lab       JupyterLab"
	@echo "make docs      the site, into site/"
	@echo "make params    reset params.yaml to the profile"
	@echo "make clean     remove the virtual environment and the site (results stay)"

$(READY): constraints.txt pyproject.toml
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 …")'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/uv pip install --quiet --system-certs --python $(BIN)/python -c constraints.txt -e '.[dev]' || $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/uv pip install --quiet --system-certs --python $(BIN)/python -c constraints.txt --no-deps robomimic robosuite || $(BIN)/python -m pip install --quiet -c constraints.txt --no-deps robomimic robosuite
	@rm -f $(VENV)/.ready-*; touch $@
install: $(READY)

repro: $(READY)
	@$(BIN)/python -m dpag.pipeline --profile $(PROFILE) --demos $(DEMOS) --jobs $(JOBS) --only "$(ONLY)"

test: $(READY)
	@tools/check_export.sh
	nbdev_test --n_workers $(JOBS) --timing
	pytest

lab: $(READY)
	jupyter lab nbs

docs: $(READY)
	$(BIN)/uv pip install --quiet --system-certs --python $(BIN)/python -c constraints.txt -e '.[docs]'
	mkdocs build --quiet && echo "open site/index.html"

params: $(READY)
	@$(BIN)/python -m dpag.config --reset $(PROFILE) $(DEMOS)

clean:
	rm -rf $(VENV) site
