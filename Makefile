# Everything one types here. `make` alone lists the targets.
#
# ARGS               Hydra overrides for `bench` and `smoke`: make bench ARGS='seed=1 train.num_steps=200'
# PYTHON             the Python to build .venv with, 3.11 to 3.13: make test PYTHON=python3.12
# TORCH_INDEX_URL    where the first installation takes torch from; https://download.pytorch.org/whl/cpu
#                    has builds without CUDA, a tenth of the size
# EXPERIMENT         the folder of outputs/ that `report` renders, default the one written last
# PYTEST_ARGS        what to test: make test PYTEST_ARGS='tests/archs -x'

PYTHON ?=
TORCH_INDEX_URL ?=
ARGS ?=
EXPERIMENT ?=
PYTEST_ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
PIP_INSTALL = $(RUN) -m pip install --no-compile --disable-pip-version-check $(if $(MAKE_TERMOUT),,--quiet)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help bench smoke test regress baseline report lint format slurm-test python-fits reinstall

help: ## list the targets
	@echo "longarch: train and measure long-context architectures side by side."
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  make bench ARGS='seed=1 train.num_steps=200'    passes Hydra overrides (smoke too)"
	@echo "  make bench PYTHON=python3.12                    builds .venv with that Python (3.11 to 3.13)"
	@echo "  make bench TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu"
	@echo "                                                  installs torch without CUDA, when .venv is new"
	@echo "  make test PYTEST_ARGS='tests/archs -x'          runs some of the tests"
	@echo "  make report EXPERIMENT=smoke                    renders outputs/smoke, default the latest"
	@echo
	@echo "  Every target installs what it needs into .venv first, once."

bench: $(INSTALLED) ## train and measure everything, then the report: cpu_small, or gpu_small with a GPU
	@$(RUN) -m harness.bench $(ARGS)

smoke: $(INSTALLED) ## every architecture and every task in minutes, to see that all of it runs
	@$(RUN) -m harness experiment=smoke $(ARGS)

test: $(INSTALLED) ## run the tests, in two processes of one thread each; PYTEST_ARGS='-m ""' runs the longest too
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal -m "not (published_widths or whole_models or compiles)" $(PYTEST_ARGS)

regress: $(INSTALLED) ## the smoke sweep on tests/corpus, compared with tests/baselines
	@sh .ci/regress

baseline: $(INSTALLED) ## the same sweep, kept as the new baseline
	@sh .ci/regress --renew

report: $(INSTALLED) ## render the report of measured results again
	@folder='$(if $(EXPERIMENT),outputs/$(EXPERIMENT))'; \
	[ -n "$$folder" ] || folder=$$(ls -td outputs/*/records 2>/dev/null | head -n 1 | sed 's,/records$$,,'); \
	[ -n "$$folder" ] || { echo "outputs/ holds no results yet; run make bench or make smoke first." >&2; exit 2; }; \
	$(RUN) -m reports "$$folder"

slurm-test: $(INSTALLED) ## a sweep with launcher=slurm on a Slurm of its own: as root, on Debian, half a minute
	@bash .ci/slurm

lint: $(INSTALLED) ## check style, types and who imports whom
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy
	@$(RUN) $(VENV)/bin/lint-imports --no-logo --no-cache

format: $(INSTALLED) ## apply the style
	@$(RUN) -m ruff check --fix-only --quiet .
	@$(RUN) -m ruff format .

# The stamp is newer than pyproject.toml when all of it is installed. A .venv whose Python is gone
# (upgraded, moved) or does not fit is built anew. Byte code is written by all cores, and only for what may be
# imported: pip would take a minute more.
$(INSTALLED): pyproject.toml $(if $(shell $(RUN) -c "" 2>/dev/null || echo gone),reinstall) | python-fits
	@sh .ci/find-python $(RUN) >/dev/null 2>&1 && $(RUN) -c 'import pip' 2>/dev/null || \
	{ python=$$(sh .ci/find-python $(PYTHON)) && echo "Creating $(VENV) with $$python." && \
	$$python -m venv --clear $(VENV); }
	@echo "Installing longarch and what it needs into $(VENV); torch is large, this can take minutes."
ifneq ($(TORCH_INDEX_URL),)
	@$(PIP_INSTALL) --index-url '$(TORCH_INDEX_URL)' "$$($(RUN) -c '$(PRINT_TORCH_REQUIREMENT)')"
endif
	@$(PIP_INSTALL) --editable '.[dev]'
	@$(RUN) -m compileall -qq -j 0 -x '/(tests?|testing|models)/' $(VENV)/lib || true
	@touch $@

reinstall:

# A Python that is named is held to what is asked of it even where .venv is there already.
python-fits:
	@$(if $(PYTHON),sh .ci/find-python $(PYTHON) >/dev/null,:)

define PRINT_TORCH_REQUIREMENT
import tomllib; \
project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
print(next(line for line in project["dependencies"] if line.startswith("torch")))
endef
