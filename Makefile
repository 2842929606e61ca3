# Every target sets itself up: the Python environment and the tools are made in a cache outside of the clone.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help env generate verify fix test gpu nightly tools test-unit demo cluster-up cluster-down guides bench

export PYTHONPATH := $(CURDIR)/crds:$(CURDIR)/operator:$(CURDIR)/trainer:$(CURDIR)/tests
# Numbers must not depend on how many threads a machine has, and two test processes must not fight for two cores.
export OMP_NUM_THREADS ?= 1
# `python` stands for the environment's interpreter; made on first use.
python = $(eval python := $$(shell python3 tests/testkit/env.py))$(if $(python),$(python),$(error the Python environment could not be made; see above))

help: ## show this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

env: ## make the Python environment and print its interpreter
	@echo $(python)

generate: ## write every file that is derived from the contract
	$(python) -m diffusion_api.generate

verify: ## format, lint, types, import rules, generated files
	$(python) -m ruff format --check .
	$(python) -m ruff check .
	$(python) -m mypy
	$(dir $(python))lint-imports
	$(python) -m diffusion_api.generate --check

fix: ## mend what the formatter and the linter can
	$(python) -m ruff format .
	$(python) -m ruff check --fix .

# Three parts side by side: the tests with the cluster wait more than they work. Outputs are shown whole, one by one.
e2e := tests/e2e
first := tests/unit tests/contract $(wildcard tests/integration/test_[a-l]*.py tests/integration/test_m[ae]t*.py)
second := $(filter-out $(first),$(wildcard tests/integration/test_*.py))
test: tools ## every tier but gpu and nightly
	@own=$$(mktemp -d); \
	part() { $(python) -m pytest -m "not gpu and not nightly" -p no:cacheprovider --durations=15 \
	  --basetemp "$$own/$$1" $${@:2} > "$$own/$$1.log" 2>&1; }; \
	part e2e $(e2e) & e2e=$$!; \
	part first $(first) & first=$$!; \
	part second $(second) & second=$$!; \
	failed=0; for one in first second e2e; do wait $${!one} || failed=1; cat "$$own/$$one.log"; done; \
	rm -rf "$$own"; exit $$failed

gpu: ## what needs a CUDA device; skipped without one
	$(python) -m pytest -m gpu tests/gpu

nightly: tools ## the long sweeps
	$(python) -m pytest -m nightly --timeout=3600 tests

tools: ## build Kubernetes and the other programs that tests start, where they are missing
	@$(python) -m testkit.tools > /dev/null

test-unit: ## the fast tier
	$(python) -m pytest tests/unit

demo: ## a job from kubectl apply to weights in a bucket, with its pod deleted in the middle
	$(python) -m testkit.demo

cluster-up: ## start the local cluster and keep it
	$(python) -m testkit.cluster up

cluster-down: ## end it
	$(python) -m testkit.cluster down

guides: ## run the commands of the guides and renew what they show
	$(python) -m testkit.transcript docs/guides/first-job.md

bench: ## measure; writes bench/results
	$(python) -m bench.whole_process
	$(python) -m bench.operator
