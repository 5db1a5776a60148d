# make demo | make test | make bench | make docs: each first sets up .venv, and only when that is out of date.
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
EXPERIMENTS := mnist fashionmnist multimnist celeba celeba19 vision

.PHONY: demo test lint bench tables docs clean

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[test]'
	touch $@

# Real MNIST if it is there or can be downloaded, otherwise synthetic digits; some minutes. Run again, it resumes.
demo: .venv/ready
	@set -e; data="$${MVAE_DATA_DIR:-data}"; run=demo/mnist; \
	if ! $(BIN)/python mnist/datasets.py --data-dir "$$data"; then \
	  echo "demo: real MNIST is not available; using synthetic digits"; \
	  data=demo/data; run=demo/synthetic; $(BIN)/python -m synthetic digits $$data; \
	fi; \
	export MVAE_DATA_DIR="$$data"; set -x; \
	$(BIN)/python mnist/train.py --preset fast --epochs 10 --annealing-epochs 4 --cuda --out-dir $$run --resume; \
	$(BIN)/python mnist/sample.py $$run/model_best.pth.tar --cuda --out-dir $$run/prior; \
	$(BIN)/python mnist/sample.py $$run/model_best.pth.tar --condition-on-text 5 --cuda --out-dir $$run/five; \
	$(BIN)/python mnist/loglike.py $$run/model_best.pth.tar --cuda --limit 500 --n-samples 200; \
	set +x; \
	echo "pictures: $$run/prior/sample_image.png (from the prior), $$run/five/sample_image.png (given the label 5)"

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy mvae synthetic tests benchmarks baselines minimal.py hubconf.py $(EXPERIMENTS)

test: export OMP_NUM_THREADS = 1
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile tests

bench: .venv/ready
	$(BIN)/python benchmarks/step.py

# Tables of the READMEs and docs/, and plots, from the files that runs left in results/.
tables: .venv/ready
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/plots.py

# API reference of what mvae exports.
docs: .venv/ready
	$(BIN)/python -m pip install --disable-pip-version-check --quiet pdoc
	$(BIN)/python -m pdoc mvae --output-directory build/docs

clean:
	rm -rf .venv demo build
