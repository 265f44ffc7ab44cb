# SPDX-License-Identifier: Apache-2.0
# Two commands do all the set-up on a fresh Debian 12 or 13 machine: `make demo` and `make test`.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

export MOAT_CACHE ?= $(HOME)/.cache/moat
export UV_CACHE_DIR := $(MOAT_CACHE)/uv
export PYTHONDONTWRITEBYTECODE := 1
PY := .venv/bin/python

.PHONY: help setup demo demo-down test lint unit integration acceptance molecule bench lock clean

help: ## Show this list
	@echo "Moat: signed offline bundles of the LiteLLM gateway"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Settings: YES=1 (ask nothing), MOAT_CACHE=DIR (downloads and built layers, default ~/.cache/moat)"

setup: ## Install what this machine lacks: Debian packages, docker, uv, .venv (asks once)
	@scripts/host-setup.sh

demo: setup ## Build, verify and install a bundle with the network off; get a streamed answer from a real model
	@$(PY) -m moat.demo up

demo-down: ## Stop the demo and remove what it made (keeps the cache and the bundle)
	@$(PY) -m moat.demo down

test: setup ## Everything CI runs: linters, unit, integration and acceptance tests
	@$(PY) tests/run.py

lint: setup ## ruff, mypy --strict, yamllint, shellcheck, ansible-lint, and the house rules (tests/unit/house)
	@$(PY) tests/run.py lint

unit: setup ## Fast tests, no engine
	@$(PY) tests/run.py unit

integration: setup ## Tests with real servers and programs
	@$(PY) tests/run.py integration

acceptance: setup ## Tests of the whole product through the running demo
	@$(PY) tests/run.py acceptance

molecule: setup ## The USB install on hosts without a network (SCENARIO=default: one of them; KEEP=1: leave the hosts)
	@$(PY) molecule/run.py $(SCENARIO) $(if $(KEEP),--keep)

bench: setup ## Measurements, as ratios against stock tools (nothing is asserted)
	@$(PY) tests/benchmarks/run.py

lock: setup ## Resolve every input anew into bundles/locks/ (review the diff)
	@.venv/bin/moat lock

clean: ## Remove what the build made in this checkout (not the cache)
	rm -rf .moat/bundles .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
