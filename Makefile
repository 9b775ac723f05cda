# Two commands do everything: `make demo` and `make test`. Both make .venv when it is missing or out of date.
SHELL := /bin/bash
VENV ?= .venv
SUPPORTED := 3.11 3.12 3.13

# The first supported interpreter that starts; `make PYTHON=/path/to/python demo` overrules the choice.
# (A shim of a version manager may stand in PATH and not start, so each candidate is run once.)
FOUND = $(shell for v in $(SUPPORTED); do for p in python$$v \
	$$(ls -d $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$$v.*/bin/python$$v /usr/local/bin/python$$v 2>/dev/null); do \
	if "$$p" -c "import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != '$$v')" >/dev/null 2>&1; \
	then echo $$p; exit; fi; done; done)
PYTHON ?= $(FOUND)

# Tests of one file stay in one process; most of them wait, so that even two cores gain.
TEST_PROCESSES ?= auto

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-arm64 test-mcu lint conversion zoo bench-detection bench-repair bench-inspection art-strip bench-agent bench-update bench-fleet bench-ingest bench-rollout bench-store bench-mcu bench-private documents conformance fuzz wheel clean

help: ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): setup.cfg pyproject.toml
	@if [ -z "$(PYTHON)" ]; then echo "EdgeGuard needs one of Python $(SUPPORTED) with venv; found none." \
		"Install one (Debian: apt-get install python3 python3-venv) or set PYTHON=/path/to/python." >&2; exit 2; fi
	@echo "Python: $(PYTHON) ($$($(PYTHON) --version 2>&1)); environment: $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP) ## the whole loop on your machine: attack, convert, detect, report, repair, roll out (ARGS="--data fashion_mnist")
	$(BIN)/edgeguard demo $(ARGS)

test: $(STAMP) ## the test suite (ARGS="-k hub")
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile $(ARGS)

test-all: ## the test suite on every supported interpreter found, each in its own environment
	@ran=0; for v in $(SUPPORTED); do \
		p=$$($(MAKE) --no-print-directory -s print-found SUPPORTED=$$v); \
		if [ -z "$$p" ]; then echo "Python $$v: not found, not tested"; continue; fi; \
		echo "=== Python $$v ($$p)"; ran=1; $(MAKE) --no-print-directory test PYTHON=$$p VENV=.venv-$$v || exit 1; done; \
	if [ $$ran = 0 ]; then echo "no supported interpreter found" >&2; exit 2; fi

test-arm64: $(STAMP) ## the package on an emulated arm64 Debian 12 (as root; debootstrap, qemu-user-static, mosquitto)
	bash tests/arm64/run.sh $(BIN)/python

test-mcu: $(STAMP) ## firmware on an emulated Cortex-M3, through gateway and broker to the hub (gcc-arm-none-eabi, libnewlib-arm-none-eabi, qemu-system-arm, mosquitto)
	$(BIN)/python -m pytest -s tests/mcu/firmware.py $(ARGS)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

conversion: $(STAMP) ## what a guard costs: latency, size and time, side by side; writes benchmarks/results
	$(BIN)/python -m benchmarks.conversion --json benchmarks/results/conversion.json $(ARGS)

zoo: $(STAMP) ## train the attack zoo; resumes (ARGS="--data digits")
	$(BIN)/python -m benchmarks.zoo --json benchmarks/results/zoo.json $(ARGS)

bench-detection: $(STAMP) ## our detector beside published ones on the zoo; resumes; writes docs/detection.md
	$(BIN)/python -m benchmarks.detection $(ARGS)
	$(BIN)/python -m benchmarks.detection --report

bench-inspection: $(STAMP) ## audits the zoo: right labels, false accusations, time; resumes; writes benchmarks/results (ARGS="--data digits")
	$(BIN)/python -m benchmarks.inspection $(ARGS)
	$(BIN)/python -m benchmarks.inspection --report

bench-repair: $(STAMP) ## backdoors removed, method by method and by auto, on the zoo; resumes; writes docs/repair.md (ARGS="--part auto --data digits --limit 3")
	$(BIN)/python -m benchmarks.repair $(ARGS)
	$(BIN)/python -m benchmarks.repair --report

art-strip: $(STAMP) ## our STRIP and cascade beside the Adversarial Robustness Toolbox's; writes benchmarks/results
	$(BIN)/python -m benchmarks.art_strip --json benchmarks/results/art_strip.json $(ARGS)

bench-update: $(STAMP) ## an update's memory, in the daemon and in its children, and the delay at the swap; writes benchmarks/results
	$(BIN)/python -m benchmarks.update --json benchmarks/results/update.json $(ARGS)

bench-agent: $(STAMP) ## what the daemon costs: memory, time per input, hours with a broker that dies; writes benchmarks/results
	$(BIN)/python -m benchmarks.agent --json benchmarks/results/agent.json $(ARGS)

bench-fleet: $(STAMP) ## time to a case, false alarms and liars in simulated fleets; writes benchmarks/results
	$(BIN)/python -m benchmarks.fleet --json benchmarks/results/fleet.json $(ARGS)

bench-ingest: $(STAMP) ## how fast the hub takes reports beside a bare subscriber; writes benchmarks/results (ARGS=--quick)
	$(BIN)/python -m benchmarks.ingest --json benchmarks/results/ingest.json $(ARGS)

bench-rollout: $(STAMP) ## a staged roll-out to 100 agents of which ten fail, paused, resumed, taken back; writes benchmarks/results
	$(BIN)/python -m benchmarks.rollout --json benchmarks/results/rollout.json $(ARGS)

bench-store: $(STAMP) ## what a report costs the database, and how large a year of 10,000 devices is; writes benchmarks/results
	$(BIN)/python -m benchmarks.store_size --json benchmarks/results/store_size.json $(ARGS)
	$(BIN)/python -m benchmarks.store_apply --json benchmarks/results/store_apply.json $(ARGS)

bench-mcu: $(STAMP) ## the microcontroller library: bytes, a bad line, fuzzing (gcc, clang, gcc-arm-none-eabi); writes benchmarks/results
	$(BIN)/python -m benchmarks.mcu --json benchmarks/results/mcu.json $(ARGS)

bench-private: $(STAMP) ## what private computation costs beside the same in clear; writes benchmarks/results and docs/private.md
	$(BIN)/python -m benchmarks.private --json benchmarks/results/private.json
	$(BIN)/python -m benchmarks.private_inspection --all $(ARGS)
	$(BIN)/python -m benchmarks.private_report

documents: $(STAMP) ## docs/openapi.json and docs/asyncapi.json, from the code
	$(BIN)/edgeguard hub openapi -o docs/openapi.json
	$(BIN)/python -m edgeguard.contract.asyncapi > docs/asyncapi.json

conformance: $(STAMP) ## ONNX import against the onnx package's own tests; writes benchmarks/results
	$(BIN)/python -m benchmarks.onnx_conformance --json benchmarks/results/onnx_conformance.json

fuzz: $(STAMP) ## 20,000 damaged model files (ARGS="--count 1000"); writes benchmarks/results
	$(BIN)/python -m benchmarks.fuzz --json benchmarks/results/fuzz.json $(ARGS)

wheel: $(STAMP) ## build the wheel and the source distribution into dist/
	$(BIN)/python -m build

clean: ## remove environments and build outputs
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

.PHONY: print-found
print-found:
	@echo $(FOUND)
