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
export PYTHONUTF8 := 1
# One thread per process, one process per core: nets this small lose by more.
export OMP_NUM_THREADS := 1
READY := $(VENV)/.ready-$(shell cat constraints.txt pyproject.toml | cksum | cut -d' ' -f1)
UV := $(BIN)/uv pip install --quiet --system-certs --python $(BIN)/python -c constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

BENCH := .bench-venv
BENCH_READY := $(BENCH)/.ready-$(shell cat constraints.txt tools/bench-requirements.txt | cksum | cut -d' ' -f1)
BENCH_PIP := $(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
BENCH_UV := $(BENCH)/bin/uv pip install --quiet --system-certs --python $(BENCH)/bin/python
LEROBOT := .lerobot-venv

.PHONY: help demo repro ray test lint lab docs install bench lerobot hashes audit clean
help:
	@echo "make demo      two trained policies at work: films, in less than a minute after the installation"
	@echo "make repro [PROFILE=smoke|laptop|workstation|interplay|paper|paper-core] [DEMOS=scripted|human] [JOBS=n] [ONLY=parts of stage names] [RAY=auto|ray://…] [DRY=1]"
	@echo "               regenerate the tables, into results/runs"
	@echo "make test      formatting, types, export check, notebooks, pytest"
	@echo "make lint      formatting and types alone"
	@echo "make lab       JupyterLab"
	@echo "make docs      the site, into site/"
	@echo "make ray       Ray, for RAY=…, into the environment"
	@echo "make install   the environment, and the plan that dvc repro reads"
	@echo "make bench     time acting and training beside lerobot, into results/bench.md [BENCH_ARGS=...]"
	@echo "make lerobot   test LeRobot datasets and the plug-in beside lerobot itself, 0.3.3 and 0.4.4"
	@echo "make hashes    write requirements-hashed.txt anew: the same versions, each file with its SHA-256"
	@echo "make audit     look those versions up in the public lists of known faults (needs a network)"
	@echo "make clean     remove the virtual environments and the site (results stay)"

$(READY): constraints.txt pyproject.toml
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 …")'
	$(PIP) uv
	$(UV) -e '.[sims,pipeline,parallel,lerobot,onnx,docs,dev]' || $(PIP) -e '.[sims,pipeline,parallel,lerobot,onnx,docs,dev]'
	$(UV) --no-deps robomimic robosuite || $(PIP) --no-deps robomimic robosuite
	@$(UV) ur_rtde 2>/dev/null || $(PIP) ur_rtde 2>/dev/null || echo "ur_rtde has no package for this machine: everything but a real arm works"
	@rm -f $(VENV)/.ready-*; touch $@

results/runs/stages.json: $(READY)
	@test -f $@ || $(BIN)/python -m dpag.plan --run $(PROFILE)-$(DEMOS)
	@touch $@

install: $(READY) results/runs/stages.json
	@if [ -e .git ]; then git update-index --skip-worktree dvc.lock; fi

demo: $(READY)
	@echo "Loading two trained policies …"
	@$(BIN)/python -m dpag.demo

repro: $(READY)
	@$(BIN)/python -m dpag.pipeline --profile $(PROFILE) --demos $(DEMOS) --jobs $(JOBS) --only "$(ONLY)" --ray "$(RAY)" --dry "$(DRY)"

ray: $(READY)
	$(UV) -e '.[ray]' || $(PIP) -e '.[ray]'

lint: $(READY)
	ruff format --check --quiet .
	ruff check --quiet .
	mypy dpag

test: install ray lint
	@tools/check_export.sh
	nbdev_test --n_workers $(JOBS) --timing
	pytest

lab: $(READY)
	jupyter lab --LabApp.default_url=/lab/tree/nbs/index.ipynb

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet && echo "open site/index.html"

# An environment of its own: lerobot wants another torch than the one that both are timed with.
$(BENCH_READY): constraints.txt tools/bench-requirements.txt
	@test -d $(BENCH) || $(PYTHON) -m venv $(BENCH)
	$(BENCH_PIP) uv
	$(BENCH_UV) -c constraints.txt -r tools/bench-requirements.txt || $(BENCH_PIP) -r tools/bench-requirements.txt
	$(BENCH_UV) --no-deps lerobot==0.4.4 || $(BENCH_PIP) --no-deps lerobot==0.4.4
	@rm -f $(BENCH)/.ready-*; touch $@

# Each in an environment of its own: a lerobot writes one version of datasets.
$(LEROBOT)/%: tools/lerobot-%.txt $(READY)
	uv venv --quiet --clear --python $(BIN)/python $@
	uv pip install --quiet --system-certs --python $@/bin/python -r $<
	uv pip install --quiet --system-certs --python $@/bin/python --no-deps lerobot==$(if $(findstring v21,$@),0.3.3,0.4.4) torchvision==0.25.0
	@touch $@

lerobot: $(LEROBOT)/v21 $(LEROBOT)/v30
	DPAG_LEROBOT_V21=$(LEROBOT)/v21/bin/python DPAG_LEROBOT_V30=$(LEROBOT)/v30/bin/python pytest tests/test_lerobot.py tests/test_lerobot_policy.py

# Not from a folder of wheels: the files of the public index are the ones that have these hashes.
HASHES := env -u UV_FIND_LINKS $(BIN)/uv pip compile --quiet --system-certs --python-version 3.11.7 \
  --python-platform x86_64-unknown-linux-gnu -c constraints.txt --generate-hashes --no-header --no-annotate
hashes: $(READY)
	$(HASHES) --extra sims --extra pipeline --extra parallel --extra lerobot --extra onnx --extra docs --extra dev pyproject.toml -o $(VENV)/hashed.txt >/dev/null
	printf 'robomimic\nrobosuite\n' | $(HASHES) --no-deps - >> $(VENV)/hashed.txt
	{ echo "# By make hashes, for Linux on x86-64 and Python 3.11. To install exactly these files:"; \
	  echo "# pip install --require-hashes --no-deps -r requirements-hashed.txt"; cat $(VENV)/hashed.txt; } > requirements-hashed.txt

audit: $(READY)
	$(BIN)/uv tool run --system-certs pip-audit --disable-pip --require-hashes -r requirements-hashed.txt

bench: $(BENCH_READY)
	$(BENCH)/bin/python tools/bench.py $(BENCH_ARGS)

clean:
	rm -rf $(VENV) $(BENCH) $(LEROBOT) site
