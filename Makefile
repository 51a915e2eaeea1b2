PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test slow campaign clean

demo: $(INSTALLED) ## Export the bundled sample to ONNX and verify it.
	$(BIN)/diffdeploy export --format onnx --output artifacts/demo --force

test: $(INSTALLED) ## All checks and tests of a change.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

slow: $(INSTALLED) ## The long tests.
	$(BIN)/pytest -m slow -rP

campaign: $(INSTALLED) ## 1,000 right exports and runs must pass; goes on where it was stopped.
	$(BIN)/python -m tests.campaign

clean:
	rm -rf $(VENV) build dist *.egg-info

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch setuptools
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[cpu,test]'
	touch $@
