# Everything that a developer runs. `make help` lists it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BUILD := build-c

.DEFAULT_GOAL := help

.PHONY: help
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 16

# The stamp is newer than all that goes into the build, so that a target reinstalls only what has changed.
SOURCES := pyproject.toml meson.build meson.options Makefile $(wildcard c/*) $(wildcard pylogits/*.py) $(wildcard kernels/*.py)

$(VENV)/installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check ".[test]"
	touch $@

.PHONY: run
run: $(VENV)/installed  ## score the digits logits in examples/ and show the worked example
	cd examples && ../$(BIN)/python worked_example.py
	$(BIN)/pylogits score examples/digits_logits.npy --targets examples/digits_targets.npy --top-k 3 --out scores.parquet

.PHONY: test
test: $(VENV)/installed  ## all tests
	$(BIN)/pytest

.PHONY: lint
lint: $(VENV)/installed  ## ruff, mypy --strict, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror c/*.c c/*.h

.PHONY: format
format: $(VENV)/installed  ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i c/*.c c/*.h

.PHONY: bench
bench: $(VENV)/installed  ## pytest-benchmark suite, beside the peers that are installed (see `make peers`)
	$(BIN)/pytest bench -q --benchmark-columns=min,median,rounds --benchmark-group-by=group

.PHONY: bench-limits
bench-limits: $(VENV)/installed  ## times beside the peers and the limits of the memory, and the goals (LIMITS="--growth" for growth)
	$(BIN)/python bench/limits.py $(LIMITS)

.PHONY: bench-losses
bench-losses: $(VENV)/installed  ## the losses, gradients and options beside the peers, the limits and the goals (LOSSES="--only softcap")
	$(BIN)/python bench/losses.py $(LOSSES)

.PHONY: accuracy
accuracy: $(VENV)/installed  ## worst errors in ulp against extended precision, beside the peers that are installed
	$(BIN)/python bench/accuracy.py

.PHONY: peers
peers: $(VENV)/installed  ## install torch, JAX, SciPy and onnxruntime for the benchmarks
	$(BIN)/python -m pip install --quiet --disable-pip-version-check ".[peers]"

# ---- the C backend without Python ----

C_FLAGS := -std=gnu11 -Ic -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror
C_SOURCES := $(wildcard c/*.c c/*.h)
CROSS := aarch64-linux-gnu

.PHONY: c-test
c-test: $(BUILD)/native/test_kernels  ## the C test program on this machine: one hash a case
	$<

.PHONY: neon
neon: $(BUILD)/neon/test_kernels  ## the same, cross-compiled for 64-bit Arm, under qemu-user (on one thread: OpenMP hangs there)
	qemu-aarch64 -L /usr/$(CROSS) $<

$(BUILD)/native/test_kernels: $(C_SOURCES)
	mkdir -p $(@D)
	$(CC) $(C_FLAGS) -fno-tree-vectorize -DPL_ISA=scalar -c c/kernel.c -o $(@D)/scalar.o
	$(CC) $(C_FLAGS) -mavx2 -mfma -DPL_ISA=avx2 -c c/kernel.c -o $(@D)/avx2.o
	$(CC) $(C_FLAGS) -mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512 -DPL_ISA=avx512 \
		-c c/kernel.c -o $(@D)/avx512.o
	$(CC) $(C_FLAGS) -fopenmp c/dispatch.c c/test_kernels.c $(@D)/*.o -lm -o $@

$(BUILD)/neon/test_kernels: $(C_SOURCES)
	mkdir -p $(@D)
	$(CROSS)-gcc $(C_FLAGS) -fno-tree-vectorize -DPL_ISA=scalar -c c/kernel.c -o $(@D)/scalar.o
	$(CROSS)-gcc $(C_FLAGS) -DPL_ISA=neon -c c/kernel.c -o $(@D)/neon.o
	$(CROSS)-gcc $(C_FLAGS) c/dispatch.c c/test_kernels.c $(@D)/*.o -lm -o $@

.PHONY: clean
clean:  ## remove what the targets made
	rm -rf $(VENV) $(BUILD) build scores.parquet
