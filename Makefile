# make demo | make test | make bench: each sets up what it needs in .venv, only when that is out of date.
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
EXPERIMENTS := mnist
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint bench clean

.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt -e '.[test]'
	touch $@

demo: .venv/ready
	$(BIN)/python benchmarks/demo.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy mvae tests benchmarks
	for folder in $(EXPERIMENTS); do (cd $$folder && $(BIN)/mypy .) || exit 1; done

test: lint
	$(BIN)/python -m pytest -n 2 tests

bench: .venv/ready
	$(BIN)/python benchmarks/step.py

clean:
	rm -rf .venv demo
