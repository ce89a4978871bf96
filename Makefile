# `make demo` and `make test` are complete on a machine with make and Python 3.11 to 3.14:
# each first builds $(VENV) from requirements.lock, once.
#
#   make test ARGS="-k calibration"                           arguments for the command behind a target
#   make test VENV=.venv-newest PYTHON=/path/to/python3.13    a second environment

VENV ?= .venv
# The first of these that runs and fits makes the environment.
PYTHON ?= python3 python3.11 python3.12 python3.13 python3.14
ARGS ?=

BIN := $(VENV)/bin
# Tests of a file share what they compile, so a file stays in one process.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile
STAMP := $(VENV)/.installed
PARITY := .venv-parity
UV := .venv-uv/bin/uv
UV_VERSION := 0.13.9

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_NO_INPUT = 1
# pyright runs the copy inside its own wheel instead of downloading one.
export PYRIGHT_PYTHON_USE_BUNDLED_PYRIGHT = 1

.DEFAULT_GOAL := help
.PHONY: help demo test slow parity core wheel lint bench lock clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) \
	  | while IFS='|' read -r name text; do printf '%-13s %s\n' "$$name" "$$text"; done

demo: $(STAMP)  ## train a small model on the CPU, minutes: progress, table and figures
	@$(BIN)/python run.py train configs/reverse_digits.py $(ARGS)

test: $(STAMP)  ## run the test suite
	@$(BIN)/python -m pytest $(PARALLEL) -m "not slow" $(ARGS)

slow: $(STAMP)  ## run the tests that take minutes: kills, several processes, eight devices
	@$(BIN)/python -m pytest $(PARALLEL) -m slow $(ARGS)

parity: $(PARITY)/.installed  ## compare with transformers, live (its environment has torch)
	@$(PARITY)/bin/python -m pytest tests/parity $(ARGS)

core: $(STAMP) $(UV)  ## test the calibration with jax and optax alone, their oldest and newest
	@$(build_wheel)
	@$(call test_core,.venv-core-oldest,jax optax --resolution lowest-direct,jax|jaxlib|optax)
	@$(call test_core,.venv-core-newest)

wheel: $(STAMP) $(UV)  ## build the wheel, install it with [train], train in an empty folder
	@$(build_wheel)
	@$(call install_wheel,.venv-wheel,[train])
	@rm -rf build/wheel && mkdir -p build/wheel && cd build/wheel && \
	  $(CURDIR)/.venv-wheel/bin/occ-jax train reverse_digits \
	  --run.steps 2 --warm-start.steps 2 $(ARGS)

lint: $(STAMP)  ## ruff check, ruff format --check, pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(STAMP)  ## time a step of every regime
	@$(BIN)/python benchmarks/step_time.py $(ARGS)

lock: $(UV)  ## resolve requirements.lock anew from pyproject.toml (newer versions: ARGS=--upgrade)
	@$(UV) pip compile --quiet --universal --python-version 3.11 \
	  --extra test --extra dev --generate-hashes \
	  --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
	  $(ARGS) pyproject.toml -o requirements.lock

clean:  ## remove environments, caches and build outputs; runs/ stays
	rm -rf .venv .venv-* build dist .cache .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Makes the environment $(1) from the first Python that fits, unless it is there already.
define make_environment
fits='import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))'; \
if ! $(1)/bin/python -c "$$fits" 2>/dev/null; then \
  chosen=; \
  for candidate in $(PYTHON); do \
    if "$$candidate" -c "$$fits" 2>/dev/null; then chosen=$$candidate; break; fi; \
  done; \
  if [ -z "$$chosen" ]; then \
    echo "occ_jax needs Python 3.11 to 3.14, found none as: $(PYTHON)." \
      "Name one: make PYTHON=/path/to/python3.11" >&2; \
    exit 1; \
  fi; \
  "$$chosen" -m venv $(1) || exit 1; \
fi; \
$(1)/bin/python -m pip --version >/dev/null 2>&1 || $(1)/bin/python -m ensurepip >/dev/null
endef

# Installs requirements.lock and this project, editable, into the environment $(1). The lock is
# complete, hence --no-deps; hatchling, which builds the editable install, is in it.
define install_lock
$(1)/bin/python -m pip install -qq --require-hashes --no-deps -r requirements.lock && \
$(1)/bin/python -m pip install -qq --no-deps --no-build-isolation -e .
endef

build_wheel = rm -rf dist && $(BIN)/python -m hatchling build -t wheel

# Installs the built wheel with the extras $(2) into a new environment $(1), in the versions of
# requirements.lock, except for the packages $(4); $(3) goes to uv.
define install_wheel
rm -rf $(1); $(call make_environment,$(1)) && \
sed -n 's/^\([^ #].*==[^\]*\) \\$$/\1/p' requirements.lock | grep -vE '^($(4))==' \
  >$(1)/constraints.txt && \
$(UV) pip install -q -p $(1) -c $(1)/constraints.txt $(3) "$$(echo dist/*.whl)$(2)"
endef

# Runs the examples of the calibration with nothing but the wheel and what it requires, then the
# calibration's tests.
define test_core
$(call install_wheel,$(1),,$(2),$(3)) && \
$(UV) pip list -q -p $(1) && \
(cd $(1)/lib/python*/site-packages/occ_jax/calibration && \
  $(CURDIR)/$(1)/bin/python -m doctest transform.py estimators.py) && \
$(UV) pip install -q -p $(1) -c $(1)/constraints.txt pytest hypothesis && \
$(1)/bin/python -m pytest tests/test_calibration.py tests/test_estimators.py $(ARGS)
endef

$(UV): Makefile
	@$(call make_environment,.venv-uv)
	@.venv-uv/bin/python -m pip install -qq uv==$(UV_VERSION)
	@touch $@

$(STAMP): requirements.lock pyproject.toml
	@$(call make_environment,$(VENV))
	@echo "Installing requirements.lock into $(VENV) (once, about a minute)"
	@$(call install_lock,$(VENV))
	@touch $@

# Python 3.11 first, whatever else there is: the fixtures were made on it.
$(PARITY)/.installed: PYTHON := python3.11 $(PYTHON)
$(PARITY)/.installed: requirements.lock requirements-parity.txt pyproject.toml
	@$(call make_environment,$(PARITY))
	@echo "Installing requirements.lock and requirements-parity.txt into $(PARITY) (once, minutes)"
	@$(call install_lock,$(PARITY))
	@$(PARITY)/bin/python -m pip install -qq -r requirements-parity.txt
	@touch $@
