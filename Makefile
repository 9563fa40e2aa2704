# make validate   the agreement run: both operations, both frameworks, on real text, against a float64 oracle
# make test       the tests
#
# Each makes .venv from $(PYTHON) when it is missing or out of date, then runs; a second call starts at once.
# With an environment that already has the packages (a GPU machine without a registry), nothing is installed:
#   make validate VENV= PYTHON=python3

PYTHON ?= python3
VENV ?= .venv
VENV312 ?= .venv312
WORKERS ?= 2
PYTEST_ARGS ?=
VALIDATE_ARGS ?=

export PYTHONPATH := $(CURDIR)

# Each worker takes one end of the list: neighbouring tests share what JAX has compiled
PYTEST := -m pytest --numprocesses $(WORKERS) --dist worksteal
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --no-input --progress-bar off
# Prints the requirements of the named extras, so that they can be installed before the project itself is built
REQUIREMENTS := -c 'import sys, tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*sum((p["optional-dependencies"][x] for x in sys.argv[1:]), p["dependencies"]), sep="\n")'
EXTRAS := build jax torch bridge validate test models lint notebooks
EXTENSION := $(wildcard setup.py) $(shell find torch_power/csrc -type f 2>/dev/null)

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.project
endif

.DEFAULT_GOAL := help
.PHONY: help validate test test-gpu test-sanitize primitives test-jax312 lint types notebooks wheel ci clean
.DELETE_ON_ERROR:

help:
	@echo "make validate | test | test-gpu | primitives | test-sanitize | test-jax312 | lint | types | notebooks | wheel | ci | clean   (README.md explains)"

$(VENV)/.packages: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"Python 3.11 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}: set PYTHON=")'
	@echo "Making $(VENV) (a few minutes the first time)"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python $(REQUIREMENTS) $(EXTRAS) > $(VENV)/requirements.txt
	@$(VENV)/bin/python $(PIP_INSTALL) --constraint constraints.txt --requirement $(VENV)/requirements.txt
	@touch $@

# Not isolated, so that the compiled operators are built against the torch that was just installed
$(VENV)/.project: $(VENV)/.packages $(EXTENSION)
	@echo "Building the compiled operators (a few minutes the first time)"
	@$(VENV)/bin/python $(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

validate: $(READY)
	$(PY) -m bridge.validate $(VALIDATE_ARGS)

test: $(READY)
	$(PY) $(PYTEST) $(PYTEST_ARGS)

# The C++ operators too: a GPU machine usually has another torch than the one they were built against
test-gpu: $(READY)
	$(PY) -m pytest tests/gpu tests/test_cpp.py tests/test_dropin.py $(PYTEST_ARGS)

# The programs of tests/gpu/test_primitives.py, to be carried to a GPU machine: POWER_PRIMITIVES=build/primitives there
PRIMITIVES := $(patsubst tests/gpu/primitives/%.cu,build/primitives/%,$(wildcard tests/gpu/primitives/*.cu))
primitives: $(PRIMITIVES)
build/primitives/%: tests/gpu/primitives/%.cu tests/gpu/primitives/check.cuh $(wildcard torch_power/csrc/sm90/*.cuh)
	@mkdir -p $(@D)
	nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a $< -o $@

# CPU operators under AddressSanitizer and UndefinedBehaviorSanitizer, built in a copy so that the ordinary build stays
SANITIZED := build/sanitized
SANITIZED_TESTS ?= tests/test_cpp.py tests/test_dropin.py tests/test_power.py tests/test_sdpa_torch.py tests/test_sdpa_torch_transforms.py tests/test_power_laws.py
test-sanitize: $(READY)
	@mkdir -p $(SANITIZED)
	@tar -cf - --exclude='*.so' setup.py pyproject.toml README.md LICENSE bridge jax_power torch_power tests | tar -xf - -C $(SANITIZED)
	cd $(SANITIZED) && PYTHONPATH=$$PWD POWER_SANITIZE=1 POWER_CUDA=0 $(abspath $(PY)) setup.py -q build_ext --inplace
	cd $(SANITIZED) && PYTHONPATH=$$PWD LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
	    $(abspath $(PY)) -m pytest -n0 -s -p no:cacheprovider $(SANITIZED_TESTS) -k "cpp or dropin" $(PYTEST_ARGS)

lint: $(READY)
	$(PY) -m ruff check .

types: $(READY)
	$(PY) -m mypy

notebooks: $(READY)
	$(PY) -m jupyter execute --timeout=120 notebooks/*.ipynb

wheel: $(READY)
	$(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls -l dist/*.whl

# The second leg: Python 3.12, a current JAX, no torch. A name on PATH is no proof that the interpreter runs (pyenv's shims), so each is tried.
PYTHON312 ?= $(shell for p in python3.12 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.12*/bin/python /usr/local/bin/python3.12 /usr/bin/python3.12; do \
	"$$p" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && echo "$$p" && break; done)

# What another version of JAX could break shows in one dtype; the numbers of all are the first leg's.
ONLY_312 := -k "not float64 and not bfloat16 and not float16"

test-jax312:
	@python312="$(PYTHON312)"; if [ -n "$$python312" ]; then \
		$(MAKE) --no-print-directory PYTHON312="$$python312" $(VENV312)/.project && \
		$(VENV312)/bin/python $(PYTEST) $(ONLY_312) $(PYTEST_ARGS); \
	else echo "SKIPPED: the Python 3.12 leg, since no working python3.12 was found (PYTHON312=/path/to/python3.12 names one)"; fi

$(VENV312)/.project: pyproject.toml constraints-py312.txt
	@echo "Making $(VENV312) from $(PYTHON312)"
	@test -x $(VENV312)/bin/python || $(PYTHON312) -m venv $(VENV312)
	@$(VENV312)/bin/python $(PIP_INSTALL) --constraint constraints-py312.txt --editable '.[jax,test]'
	@touch $@

ci:
	bash .ci/run

clean:
	rm -rf $(VENV) $(VENV312) build dist out torch_power/_C.*.so torch_power/lib *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
