PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCHRUN := $(BIN)/torchrun --nproc-per-node 2
# nproc-per-node 2 on two cores: one thread each, and no lecture from torchrun about it
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test test-faults test-gpu sanitize lint clean

quickstart: $(VENV)/installed
	test -e data/quickstart/manifest.json || \
	  $(BIN)/python scripts/prepare_data.py --source stdlib --vocab-size 1024 --sequence-length 512 --out data/quickstart
	$(TORCHRUN) scripts/train.py --recipe quickstart --until 150
	@echo "--- stopped after 150 steps; the same command resumes ---"
	$(TORCHRUN) scripts/train.py --recipe quickstart
	$(BIN)/longtrain report runs/quickstart

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "not gpu and not faults" -n 3 --dist loadfile

# the long forms of what `make test` has in short
test-faults: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m faults

# on a machine that brings its own torch: make test-gpu BIN=/usr/bin, or run the pytest line
test-gpu:
	$(BIN)/python -m pytest -m gpu

# every access of a small sample of all Triton kernels, on a GPU with CUDA's compute-sanitizer; but racecheck not of the loss: it
# reports cuBLAS's products there, and fails where it is told to leave them out
sanitize:
	for tool in memcheck racecheck synccheck initcheck; do [ $$tool = racecheck ] && some="not loss" || some=test; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --target-processes all --error-exitcode 9 \
	  $(BIN)/python -m pytest -q -m gpu -k "$$some" tests/kernels/test_sample_gpu.py || exit 1; done

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis *.egg-info
