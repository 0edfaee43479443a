# Every target sets up what it needs from nothing but python3 and a package index, and is instant the second time:
# a stamp in the environment carries a checksum of pyproject.toml and constraints.txt.
#
#   make test PYTHON=python3.12      another interpreter
#   make test ARGS="-m slow"         anything more for pytest
#   make test WORKERS=0              in one process, for a debugger
#
# torch comes first and pinned, so that nothing that follows can bring another build of it. On Linux the package index
# serves a CUDA build; for the smaller CPU build name PyTorch's own CPU index in PIP_EXTRA_INDEX_URL.

PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
ARGS    ?=

# What the suite needs. `ray` stays out: it is large, and its tests skip without it.
TEST_EXTRAS ?= train,adapt,dense,video,generate,language,robust,curate,evaluate,search,serve,export,demo
DEMO_EXTRAS ?= demo

KEY   := $(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
BIN   := $(VENV)/bin
PIP    = $(BIN)/python -m pip install --quiet --disable-pip-version-check
TORCH := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt)

READY_DEMO := $(VENV)/.ready-demo-$(KEY)
READY_TEST := $(VENV)/.ready-test-$(KEY)

PEERS      := .venv-peers
PEERS_KEY  := $(shell cat pyproject.toml constraints.txt benchmarks/peers/requirements.txt 2>/dev/null | cksum | cut -d' ' -f1)
PEERS_OK   := $(PEERS)/.ready-$(PEERS_KEY)
OLDEST     := .venv-oldest
OLDEST_OK  := $(OLDEST)/.ready-$(KEY)$(TORCH_OLDEST)

.DEFAULT_GOAL := help
.PHONY: help demo test check contracts bench proofs peers docs check-oldest hook clean
.DELETE_ON_ERROR:

help:  ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY_DEMO)  ## the main job on real photographs
	$(BIN)/clipworks demo $(ARGS)

test: $(READY_TEST)  ## the tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

check: $(READY_TEST)  ## the gate: style, types, import direction, docstrings, documentation
	$(BIN)/python checks/gate.py $(ARGS)

contracts: $(READY_TEST)  ## run the families' contracts and record what passed for the register
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --record-evidence -m "contract or checkpoint" $(ARGS)

bench: $(READY_TEST) $(PEERS_OK)  ## ours against the peers (NAME=encode for one of benchmarks/)
	for name in $(or $(NAME),startup tokenizer encode world loss train curate adapt engines dense); do \
	  $(BIN)/python benchmarks/$$name.py $(ARGS) || exit 1; \
	done

proofs: $(READY_TEST)  ## rerun the experiments behind the papers' claims (SLUG=coop for one)
	$(BIN)/clipworks prove $(if $(SLUG),$(SLUG),--all) $(ARGS)

peers: $(PEERS_OK)  ## the environment of the peers that tests and benchmarks compare with

docs: $(READY_TEST)  ## the site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir site

check-oldest: $(OLDEST_OK)  ## the tests with the oldest versions that pyproject.toml allows
	$(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist worksteal -W default $(ARGS)

hook: $(READY_TEST)  ## let git run the gate before each commit
	$(BIN)/pre-commit install

clean:  ## remove environments, caches and whatever was built
	rm -rf $(VENV) $(PEERS) $(OLDEST) build dist site runs .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find src tests checks benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "clipworks needs Python 3.10 or newer; this is $$($(PYTHON) --version): make … PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(READY_DEMO): | $(BIN)/python
	test -f $(READY_TEST) || $(PIP) -c constraints.txt $(TORCH)
	test -f $(READY_TEST) || $(PIP) -c constraints.txt -e ".[$(DEMO_EXTRAS)]"
	@rm -f $(VENV)/.ready-demo-*; touch $@

$(READY_TEST): | $(BIN)/python
	$(PIP) -c constraints.txt $(TORCH)
	$(PIP) -c constraints.txt -e ".[$(TEST_EXTRAS),dev]"
	@rm -f $(VENV)/.ready-test-*; touch $@

# torchvision is left out (see benchmarks/peers/stubs): its usual wheel does not load beside a CPU build of torch.
$(PEERS_OK): benchmarks/peers/requirements.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r benchmarks/peers/requirements.txt
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/peers/without-dependencies.txt
	$(PEERS)/bin/python benchmarks/peers/link.py
	@rm -f $(PEERS)/.ready-*; touch $@

# Older CPU builds of torch are not everywhere to be had, so torch stays the pinned one unless
# TORCH_OLDEST names a version: make check-oldest TORCH_OLDEST=2.10.0
$(OLDEST_OK):
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_OLDEST),torch==$(TORCH_OLDEST),$(TORCH)) packaging tomli
	$(OLDEST)/bin/python checks/oldest.py --extras "$(TEST_EXTRAS)" --torch "$(if $(TORCH_OLDEST),$(TORCH_OLDEST),$(subst torch==,,$(TORCH)))" > $(OLDEST)/oldest.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/oldest.txt -e ".[$(TEST_EXTRAS),test]"
	@rm -f $(OLDEST)/.ready-*; touch $@
