# The two commands of the README are `make demo` and `make test`; the rest serves those who develop.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test unit coverage slow nightly slurm lint docs format bench peaks models signatures plans dry-runs operators fuzz soak faults mutants versions pythons study schemas features pictures against-gpus gpu-bundle gpu-check clean

help: ## Say what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[train]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.train

demo: $(VENV)/.train ## Real DeepSpeed ranks on this machine, measured and reconciled with the estimate
	$(BIN)/bf16prof measure --profile cpu-demo --simulate

# The oldest DeepSpeed that is supported, and the one that the published run was made with: the dry run is tested against both.
OTHER_DEEPSPEEDS := $(VENV)/deepspeed-0.18.3 $(VENV)/deepspeed-0.18.4

$(VENV)/deepspeed-%: | $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ deepspeed==$*

test: lint docs unit slow ## Lint, strict types, documents, all tests: what is quick first

unit: $(VENV)/.dev ## The unit tests only: no processes, no ranks, no engine (two minutes)
	$(BIN)/pytest --numprocesses auto tests/unit

coverage: $(VENV)/.dev ## How much of the package the tests of this process execute; fails below the floor in pyproject.toml (twice their time)
	$(BIN)/pytest --numprocesses auto --cov --cov-report=term tests/unit tests/commands

# Tests that share a measurement or a dry run are a group, which one process runs (see "Tests" in CONTRIBUTING.md).
slow: $(VENV)/.dev $(OTHER_DEEPSPEEDS) ## The tests with whole commands, ranks, an engine or a browser
	$(BIN)/pytest --numprocesses auto --dist loadgroup -m "not alone and not nightly" tests/commands tests/integration tests/browser tests/dry_runs tests/scripts
	$(BIN)/pytest -m "alone and not nightly" tests/integration

nightly: $(VENV)/.dev $(OTHER_DEEPSPEEDS) ## The tests that take long: other versions, more ranks than cores, every variant, other examples
	$(BIN)/pytest -m nightly tests/integration tests/dry_runs tests/scripts
	$(BIN)/pytest --numprocesses auto --hypothesis-profile=default tests/unit tests/commands

slurm: $(VENV)/.dev ## Batch jobs on a small Slurm cluster of Debian's packages, on this machine (root; two minutes; nightly)
	command -v slurmd >/dev/null || apt-get install --yes --quiet --no-install-recommends slurmctld slurmd slurm-client munge
	$(BIN)/pytest -m nightly tests/slurm

lint: $(VENV)/.dev ## Lint and strict types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.dev ## Build the documents and the reference into docs/_build; any warning fails
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs docs/_build

format: $(VENV)/.dev ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev ## Print benchmarks as ratios measured in one run
	$(BIN)/python benchmarks/estimate.py
	$(BIN)/python benchmarks/simulate.py
	$(BIN)/python benchmarks/script_cost.py

peaks: $(VENV)/.dev ## Search the closed form's worst case against the dry run (ten minutes)
	PYTHONPATH=tests/dry_runs $(BIN)/python benchmarks/peaks.py

dry-runs: $(VENV)/.dev ## Dry-run drawn jobs and write tests/data/dry-runs.json, which unit tests hold the closed form to (five minutes)
	PYTHONPATH=tests/dry_runs $(BIN)/python benchmarks/dry_runs.py

models: $(VENV)/.dev ## Which model types have a closed form, against the dry run; writes docs/models.md (hours; goes on where it was stopped; nightly)
	PYTHONPATH=tests/dry_runs $(BIN)/python benchmarks/models.py

signatures: $(VENV)/.dev ## Record the presets' signatures that ship anew; fails when they change, saying which bytes did (an hour; goes on where it was stopped)
	$(BIN)/python benchmarks/signatures.py

plans: $(VENV)/.dev ## Hold plans that say "fits" against the dry run
	PYTHONPATH=tests/dry_runs $(BIN)/python benchmarks/plan.py 0

operators: $(VENV)/.dev ## The census of PyTorch's operators, real and in the dry run (twenty minutes; goes on where it was stopped; nightly)
	PYTHONPATH=tests/dry_runs $(BIN)/python benchmarks/operators.py

fuzz: $(VENV)/.dev ## Ten thousand mutants of valid files, to every reader (ten minutes; nightly)
	PYTHONPATH=tests/unit $(BIN)/python benchmarks/fuzz.py

soak: $(VENV)/.dev ## Two hundred small runs with a random fault each, and what they leave behind (twenty minutes; nightly)
	PYTHONPATH=tests/integration $(BIN)/python benchmarks/soak.py

faults: $(VENV)/.dev ## Every fault class on every command, five times; writes docs/faults.md (half an hour; nightly)
	PYTHONPATH=tests/integration $(BIN)/python benchmarks/faults.py

MUTMUT := $(VENV)/mutmut

$(MUTMUT): | $(VENV)/.dev
	$(INSTALL) --target $@ mutmut==3.8.1

mutants: $(VENV)/.dev $(MUTMUT) ## Mutate the formulas and see which mutants the unit tests let live; writes docs/mutants.md (an hour or two; goes on where it was stopped; ONLY='bf16prof.closed_form.wrappers.*')
	PYTHONPATH=$(MUTMUT) $(BIN)/python benchmarks/mutants.py run $(ONLY)
	PYTHONPATH=$(MUTMUT) $(BIN)/python benchmarks/mutant_page.py
	PYTHONPATH=$(MUTMUT) $(BIN)/python benchmarks/mutants.py results

versions: $(VENV)/.dev ## Dry runs with every supported release of DeepSpeed and of transformers (ten minutes; nightly)
	$(BIN)/python benchmarks/versions.py

pythons: $(VENV)/.dev ## The light commands under every other Python that is supported and found (two minutes; nightly)
	$(BIN)/python benchmarks/pythons.py

study: $(VENV)/.dev ## Train one small model under every recipe, three seeds, and write docs/study.md (ten minutes on two cores; needs Chromium)
	PYTHONPATH=docs $(BIN)/python benchmarks/study.py

schemas: $(VENV)/.dev ## Write the JSON Schemas that ship anew
	$(BIN)/python -m bf16prof.commands.schemas bf16prof/schemas

features: $(VENV)/.dev ## Write docs/features.md anew: what can be described, and what not
	$(BIN)/python docs/make_features.py

pictures: $(VENV)/.dev ## Make the README's pictures anew (needs Chromium)
	$(BIN)/python docs/make_pictures.py

against-gpus: $(VENV)/.dev ## Hold the dry run against every public measurement of a GPU, and write docs/against-gpus.md (ten minutes; needs Chromium)
	$(BIN)/python docs/make_against_gpus.py

gpu-bundle: $(VENV)/.dev ## Write dist/gpu-bundle: what `make gpu-check` needs on a node without network, for this Python and 3.12
	$(BIN)/python benchmarks/bundle.py dist/gpu-bundle

gpu-check: $(VENV)/.train ## On a GPU machine: the whole chain in eight minutes, and one table of what was predicted and measured
	$(BIN)/python -m bf16prof.check

clean: ## Remove the environment and what tools left behind
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
