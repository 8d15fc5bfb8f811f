# Each target installs what it needs into .venv on first use. The versions are those of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
SAMPLES := samples/train
# torch first, and pinned: an unpinned torch, or a package that needs a newer one, downloads gigabytes of CUDA
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo demo-audio demo-generate test check bench faults damage fuzz docs wheel clean install
.DEFAULT_GOAL := help

help:
	@echo "make demo    train, codebook, tokenize, verify, evaluate, decode on the photos in samples/ (minutes, CPU)"
	@echo "make demo-generate   after make demo: a small GPT on its tokens, and pictures that it samples (2 minutes)"
	@echo "make demo-audio   the same on the speech in samples/speech"
	@echo "make test    all tests          make check   format, lint, types"
	@echo "make bench   against the peers  make clean   remove .venv, runs, caches"
	@echo "make docs    the documentation as a site in build/site"
	@echo "make wheel   the wheel, in dist/"
	@echo "make damage  damages an output 1,000 times and repairs it (minutes)"
	@echo "make fuzz    reads 57,000 hostile files of every kind (minutes)"
	@echo "make faults  kills and breaks tokenize 114 times (one to two hours); rerun it to continue after a stop"

.venv/installed: pyproject.toml constraints.txt
	@echo "installing into .venv (about 2 minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) torch
	@$(PIP) -e '.[dev]'
	@touch $@

.venv/installed-readers: .venv/installed
	@$(PIP) -e '.[readers]'
	@touch $@

install: .venv/installed

demo: .venv/installed
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash demo.sh

demo-generate: .venv/installed
	@$(BIN)/python examples/train_ar.py runs/demo/tokens runs/demo/tokenizers/vp_vae-K1024 --out runs/demo/generate \
	  --minutes 2 --steps 400 --block 1025 --batch-size 4

demo-audio: .venv/installed
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash demo_audio.sh

# Azure's server for tests. Without npm, its tests are skipped, and say so
.venv/npm/node_modules/.bin/azurite-blob: .venv/installed
	@npm install --silent --no-audit --no-fund --prefix .venv/npm azurite@3.37.0 \
	  || echo "npm cannot install azurite: the tests of Azure are skipped"

test: .venv/installed-readers .venv/npm/node_modules/.bin/azurite-blob
	$(BIN)/python -m pytest

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/installed-readers
	@$(PIP) -e '.[bench]'
	$(BIN)/python -m benchmarks

faults: .venv/installed
	$(BIN)/python -m tests.faults

damage: .venv/installed
	$(BIN)/python -m tests.faults.damage 1000

fuzz: .venv/installed-readers
	$(BIN)/python -m tests.faults.fuzz

wheel: .venv/installed
	$(BIN)/python -m pip wheel . --no-deps --no-build-isolation --quiet --wheel-dir dist

docs: .venv/installed
	@$(PIP) -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv runs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
