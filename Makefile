# make env | test | run | lint | notebooks | parity | matrix | ring | aot | plan | bench | clean.
# Extra arguments: make run ARGS="--context 65536"

PYTHON ?= python3
TORCH ?= torch==2.13.0+cpu
PY := .venv/bin/python
STAMP := .venv/.installed
PARITY_STAMP := .venv-parity/.installed
BENCH_STAMP := .venv-bench/.installed
AOT_STAMP := .venv-aot/.installed
PIP := -m pip install -q --disable-pip-version-check -c constraints.txt
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
HAS_PIP := -c 'import importlib.metadata; importlib.metadata.version("pip")'

.PHONY: env venv test run lint notebooks parity matrix ring aot plan bench clean

# An environment of its own that sees the packages of `env`: $(call beside,FOLDER).
define beside
rm -rf $(1)
$(PY) -m venv $(1)
$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
  > $$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/env.pth
endef

env: $(STAMP)

test: env
	$(PY) -m pytest -q $(ARGS)

run: env
	$(PY) -m experiments.needle_2m --out runs/needle_2m $(ARGS)

lint: env
	$(PY) -m ruff check . $(ARGS)

# From top to bottom, index_choices over fewer tokens. tests/notebooks.py draws their pictures anew.
notebooks: env
	$(PY) -m pytest -q -n 0 -m slow tests/test_notebooks.py $(ARGS)

# Every layer in every way over eight virtual devices against one; SAMPLE=1: every pair of values.
matrix: env
	$(PY) -m tests.parallel.matrix $(if $(SAMPLE),--sample) $(ARGS)

# What transformers makes of our exports. torch and transformers come from the extra [parity] into an
# environment of their own, beside that of `env`; without a CPU build of torch it is skipped.
parity: $(PARITY_STAMP)
	@if [ -s $(PARITY_STAMP) ]; then cat $(PARITY_STAMP); else \
	  .venv-parity/bin/python -m pytest -q -n 0 --override-ini filterwarnings= tests/parity $(ARGS); fi

$(PARITY_STAMP): $(STAMP)
	$(call beside,.venv-parity)
	@if .venv-parity/bin/python -m pip install -q --disable-pip-version-check \
	  "$(TORCH)" "transformers==5.23.0"; then : > $@; \
	else echo "parity: skipped, $(TORCH) is not on offer here; name another with TORCH=" | tee $@; fi

# Our kernels compiled for TPUs that are not there: every case, for every chip; SAMPLE=1: the tests,
# some cases for one chip. The compiler is the package libtpu, from the extra [aot]. It has an
# environment of its own because jax, where it finds libtpu, looks for a TPU and says what it misses.
aot: $(AOT_STAMP)
	@if [ -s $(AOT_STAMP) ]; then cat $(AOT_STAMP); else \
	  JAX_PLATFORMS=cpu .venv-aot/bin/python -m $(if $(SAMPLE),pytest -q \
	  tests/kernels/test_aot.py tests/parallel/test_aot.py tests/parallel/test_planner_aot.py,\
	  kernels_pallas.aot) $(ARGS); fi

# make plan ARGS="--model kimi_k2 --job decode --context 2097152 --topology v5p:8x8x8 --prove"
plan: $(AOT_STAMP)
	@if [ -s $(AOT_STAMP) ]; then cat $(AOT_STAMP); else .venv-aot/bin/kimijax plan $(ARGS); fi

$(AOT_STAMP): $(STAMP)
	$(call beside,.venv-aot)
	@if .venv-aot/bin/python $(PIP) libtpu; then .venv-aot/bin/python $(PIP) --no-deps -e . && : > $@; \
	else echo "aot: skipped, libtpu is not on offer here" | tee $@; fi

# Our ring, and our kernels, beside those of other packages, which come from the extra [bench] into
# an environment of their own. make bench ARGS="--aot v5p": cycles by the compiler.
ring: $(BENCH_STAMP)
	.venv-bench/bin/python -m experiments.ring_speed $(ARGS)

bench: $(BENCH_STAMP)
	JAX_PLATFORMS=cpu .venv-bench/bin/python -m kernels_pallas.bench $(ARGS)

# ringattention without its dependencies, which are those of `env`.
$(BENCH_STAMP): $(STAMP)
	$(call beside,.venv-bench)
	.venv-bench/bin/python $(PIP) libtpu tokamax
	.venv-bench/bin/python $(PIP) --no-deps ringattention
	: > $@

# Undoes `env` and removes caches; the results under runs/ stay.
clean:
	rm -rf .venv .venv-parity .venv-bench .venv-aot build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# The stamp is written last, so an install that failed or was interrupted is done again. A .venv
# that is there is kept if its Python runs, is new enough and has pip (whose metadata come last).
$(STAMP): pyproject.toml setup.cfg constraints.txt
	@rm -f $@
	@$(PY) $(NEW_ENOUGH) 2>/dev/null && $(PY) $(HAS_PIP) 2>/dev/null || \
	  $(MAKE) --no-print-directory venv
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

venv:
	@$(PYTHON) $(NEW_ENOUGH) 2>/dev/null || { echo "error: kimijax needs Python 3.11 or newer," \
	  "but $(PYTHON) is: $$($(PYTHON) --version 2>&1); install one and name it, as in" \
	  "make env PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
