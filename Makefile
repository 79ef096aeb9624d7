# `make demo` and `make test` do all of their own set-up; a second call installs nothing.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= out/quickstart
INSTALLED := $(VENV)/.installed
DEMO      := $(VENV)/.demo-packages
# The oldest ONNX Runtime that is promised, beside the newest: a folder that tests put first on their path.
OLDEST    := 1.22
OLD       := $(VENV)/onnxruntime-$(OLDEST)

.PHONY: help setup demo test lint unit docs bench clean

help:
	@echo "make demo    tune, merge, sparsify, export, verify, profile and gate a real 135M model ($(OUT))"
	@echo "make test    ruff, mypy --strict, pytest"
	@echo "make setup   only the virtual environment in $(VENV)"
	@echo "make docs    write docs/methods and docs/schemas from the code"
	@echo "make clean   remove out/ and caches; the virtual environment stays"

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(DEMO): demo-requirements.txt $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r demo-requirements.txt
	@touch $@

# Where there is no wheel of it for this Python its tests are skipped, and say so.
$(OLD)/.installed: $(INSTALLED)
	rm -rf $(OLD)
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(OLD) \
		'onnxruntime==$(OLDEST).*' && touch $@

setup: $(DEMO)

demo: $(DEMO)
	$(BIN)/edgesft run quickstart demo:smollm2-135m demo:sst2 -o $(OUT)

test: lint unit

lint: $(DEMO)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(DEMO) $(OLD)/.installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not gpu and not tensorrt and not bench"

docs: $(INSTALLED)
	$(BIN)/edgesft docs -o docs/methods --schemas docs/schemas

clean:
	rm -rf out .pytest_cache .mypy_cache .ruff_cache build
