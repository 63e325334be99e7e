# PocketLM: from a PyTorch language model to a bundle proved on the runtimes that phones use.
# `make` lists the targets. Nothing but Python 3.11 and make is needed; the rest goes into .venv from pinned versions.

PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/pocketlm
READY := $(VENV)/.ready
TESTABLE := $(VENV)/.testable
export PYTHONDONTWRITEBYTECODE ?= 1

# What a person may give: make android-bundle MODEL=... RECIPE=... CALIBRATION=... EVALUATION=... OUT=... SET="a.b=1 c.d=2"
GIVEN := $(if $(MODEL),--model "$(MODEL)") $(if $(RECIPE),--recipe "$(RECIPE)") $(if $(CALIBRATION),--calibration "$(CALIBRATION)") \
         $(if $(EVALUATION),--evaluation "$(EVALUATION)") $(foreach pair,$(SET),--set "$(pair)")
PLACE := $(if $(OUT),--out "$(OUT)")
BENCH_SIZES := $(if $(MODEL)$(RECIPE)$(CALIBRATION)$(EVALUATION),,$(or $(SIZE),demo 139m 139m-half 0.5b))

.DEFAULT_GOAL := help
.PHONY: help android-bundle device-test arm64-lab board-wheels test bench costs bench-peers prices demo-model readme lint format clean python-3.11

help:  ## list the targets
	@sed -n 's/^\([a-z][a-z0-9-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r target text; do printf '  %-16s %s\n' "$$target" "$$text"; done

android-bundle: $(READY)  ## model to bundle: MODEL= RECIPE= CALIBRATION= EVALUATION= OUT= SET="key=value ..." VARIANTS= SIGN= (no MODEL: the demo model)
	@$(RUN) bundle $(GIVEN) $(PLACE) $(if $(VARIANTS),--variants "$(VARIANTS)") $(if $(SIGN),--sign "$(SIGN)")

device-test: $(READY)  ## measure and judge again: DEVICE="local arm64 ssh://pi@raspberrypi.local?threads=4" BUNDLE=, or the variables of android-bundle
	@$(RUN) test $(if $(BUNDLE),"$(BUNDLE)") $(foreach device,$(DEVICE),--device "$(device)") $(GIVEN) $(PLACE)

arm64-lab: $(READY)  ## build the emulated ARM64 machine that artifacts are also tested on (Debian 12 on x86-64; android-bundle does so by itself)
	@$(VENV)/bin/python -m device_tests.devices.lab

board-wheels: $(READY)  ## pin the wheels for boards anew, after a runtime's version was moved
	@$(VENV)/bin/python -m device_tests.devices.ssh_wheels_update

test: $(TESTABLE) lint  ## run all tests
	@$(VENV)/bin/python -m pytest

bench: $(READY)  ## all artifacts and peers, at three sizes, into docs/bench: SIZE="demo 139m" THREADS="1 2" ROUNDS=3 ONLY=, or MODEL= RECIPE= OUT=
	@$(RUN) bench $(GIVEN) $(foreach size,$(BENCH_SIZES),--size "$(size)") $(foreach count,$(or $(THREADS),1 2),--threads $(count)) \
	  $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(ONLY),--only "$(ONLY)") $(if $(strip $(GIVEN)),$(PLACE),--out "$(or $(OUT),docs/bench)")

costs: $(READY)  ## what each stage of the road costs as models grow, into docs/bench: SIZE="demo 139m 0.5b 1.1b"
	@$(RUN) costs $(foreach size,$(or $(SIZE),demo 139m 0.5b 1.1b),--size "$(size)") --out "$(or $(OUT),docs/bench)"

bench-peers: $(READY)  ## install what `make bench` holds the artifacts against, each in its own environment (llama.cpp is compiled)
	@$(VENV)/bin/python -m pipeline.peers.install

prices: $(READY)  ## what every way of shrinking costs and saves, measured on the demo model; QUICK=1 is shorter
	@$(RUN) prices $(if $(QUICK),--quick)

demo-model: $(READY)  ## train the demo model again from nothing; resumes where it stopped
	@$(VENV)/bin/python -m models.train_demo $(DEMO_OPTIONS)

readme: $(READY)  ## write the README's tables from the newest bundle of the demo model
	@$(VENV)/bin/python -m pipeline.readme

lint: $(READY)
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check --quiet . && $(VENV)/bin/lint-imports --no-cache >/dev/null || { echo "make format mends what can be mended"; exit 1; }

format: $(READY)  ## format the sources
	@$(VENV)/bin/ruff check --fix --quiet . ; $(VENV)/bin/ruff format .

clean:  ## remove the environment, cached stages and bundles
	rm -rf $(VENV) .pocketlm dist

$(READY): constraints.txt pyproject.toml | python-3.11
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@$(VENV)/bin/pip check --quiet 2>/dev/null || $(VENV)/bin/pip check
	@touch $(READY)

# lm-evaluation-harness and what it wants are large; only its adapter's tests need them.
$(TESTABLE): $(READY)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,eval]'
	@$(VENV)/bin/pip check --quiet 2>/dev/null || $(VENV)/bin/pip check
	@touch $(TESTABLE)

python-3.11:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 is needed, and '$(PYTHON)' is not it ($$($(PYTHON) --version 2>&1 | head -n 1)); install it, or name it: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
