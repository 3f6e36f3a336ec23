# Everything that a developer runs. `make help` lists it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BUILD := build-c

.DEFAULT_GOAL := help

.PHONY: help
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 20

# The stamp is newer than all that goes into the build, so that a target reinstalls only what has changed.
SOURCES := pyproject.toml meson.build meson.options Makefile $(wildcard c/*) $(wildcard pylogits/*.py pylogits/batch/*.py) $(wildcard kernels/*.py)

$(VENV)/installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check ".[test]"
	touch $@

.PHONY: run
run: $(VENV)/installed  ## score the digits logits in examples/ and show the worked example
	cd examples && ../$(BIN)/python worked_example.py
	$(BIN)/pylogits score examples/digits_logits.npy --targets examples/digits_targets.npy --top-k 3 \
		--out scores.parquet --report report.html

.PHONY: test
test: $(VENV)/installed  ## all tests
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: fuzz
fuzz: $(VENV)/installed  ## a million hostile calls of every public function (forty minutes or more)
	PYLOGITS_FUZZ_EXAMPLES=1000000 $(BIN)/pytest tests/test_fuzz.py -n 2 --dist worksteal -k hostile --durations=0

.PHONY: soak
soak: $(VENV)/installed  ## ten minutes of mixed calls from many threads (NUMBA_THREADING_LAYER=omp picks Numba's threads)
	$(BIN)/python bench/soak.py --seconds 600

.PHONY: huge
huge: $(VENV)/installed  ## more than 2^31 elements, as many rows and as one: needs 20 GiB and ten minutes
	PYLOGITS_HUGE=1 $(BIN)/pytest tests/test_large.py --durations=0

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

.PHONY: ptx
ptx: $(VENV)/installed  ## compile the CUDA kernels without a GPU: registers, spills and vector loads of each (PTX="--arch 90")
	$(BIN)/python bench/ptx.py $(PTX)

.PHONY: gpu
gpu: $(VENV)/installed  ## on a machine with a GPU and torch: the tests of the CUDA kernels, their errors, then their times beside torch's
	$(BIN)/pytest tests/test_cuda_kernels.py tests/test_gpu.py
	$(BIN)/python bench/gpu_accuracy.py
	$(BIN)/python bench/gpu.py --json gpu.json

.PHONY: docs
docs: $(VENV)/installed  ## the site, in build-docs/ (a warning is an error)
	$(BIN)/python docs/figures.py
	$(BIN)/python -m sphinx -E -a -W --keep-going -q docs build-docs

BENCHMARK := $(BIN)/pytest bench -q --benchmark-max-time=0.5 --benchmark-columns=min,median,rounds

.PHONY: bench
bench: $(VENV)/installed  ## pytest-benchmark suite, its JSON in bench.json (BENCH='-k "[softmax-float32"' selects by name)
	$(BENCHMARK) --benchmark-json=bench.json -m "not peer" $(BENCH)

.PHONY: bench-peers
bench-peers: $(VENV)/installed  ## the same beside the peers that are installed (see `make peers`), in bench-peers.json
	$(BENCHMARK) --benchmark-json=bench-peers.json $(BENCH)

.PHONY: charts
charts: $(VENV)/installed  ## draw docs/charts/ from bench-peers.json
	$(BIN)/python -m pip install --quiet --disable-pip-version-check ".[charts]"
	$(BIN)/python bench/charts.py bench-peers.json

.PHONY: bench-limits
bench-limits: $(VENV)/installed  ## times beside the peers and the limits of the memory, and the goals (LIMITS="--growth" for growth)
	$(BIN)/python bench/limits.py $(LIMITS)

.PHONY: bench-compare
bench-compare: $(VENV)/installed  ## the working tree and BASE=<revision> by turns: fails on a slowdown (COMPARE="--only numba")
	$(BIN)/python bench/compare.py $(BASE) $(COMPARE)

.PHONY: bench-instructions
bench-instructions: $(BUILD)/native/count  ## instructions of the C kernels under Valgrind: fails on 2 % more (UPDATE=1 keeps the new)
	$(PYTHON) bench/instructions.py $< $(if $(UPDATE),--update)

.PHONY: bench-losses
bench-losses: $(VENV)/installed  ## the losses, gradients and options beside the peers, the limits and the goals (LOSSES="--only softcap")
	$(BIN)/python bench/losses.py $(LOSSES)

.PHONY: tune
tune: $(VENV)/installed  ## measure from which size on a second thread pays, and write pylogits/_crossovers.py (a quarter of an hour)
	$(BIN)/python bench/dispatch.py --write

.PHONY: bench-dispatch
bench-dispatch: $(VENV)/installed  ## how often the dispatcher's choice is the fastest, or within 10 % of it: fails below 95 % of calls
	$(BIN)/python bench/dispatch.py

.PHONY: bench-cold
bench-cold: $(VENV)/installed  ## what a new process waits for: the import, the first call of each backend
	$(BIN)/python bench/cold.py

.PHONY: bench-job
bench-job: $(VENV)/installed  ## how fast a job scores files, beside reading them (files of 3 GB)
	$(BIN)/python bench/job.py

.PHONY: accuracy
accuracy: $(VENV)/installed  ## worst errors in ulp against extended precision, beside the peers that are installed
	$(BIN)/python bench/accuracy.py

.PHONY: peers
peers: $(VENV)/installed  ## install torch, JAX, SciPy and onnxruntime for the benchmarks
	$(BIN)/python -m pip install --quiet --disable-pip-version-check ".[peers]"

# ---- the C backend without Python ----

OPTIMISE := -O3
C_FLAGS := -std=gnu11 -Ic $(OPTIMISE) -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror
C_SOURCES := $(wildcard c/*.c c/*.h)
CROSS := aarch64-linux-gnu

.PHONY: c-test
c-test: $(BUILD)/native/test_kernels  ## the C test program on this machine: one hash a case
	$<

.PHONY: neon
neon: $(BUILD)/neon/test_kernels  ## the same, cross-compiled for 64-bit Arm, under qemu-user (on one thread: OpenMP hangs there)
	qemu-aarch64 -L /usr/$(CROSS) $<

.PHONY: qemu
qemu: $(BUILD)/native/test_kernels  ## the same on two emulated x86-64 CPUs: without AVX, and with AVX2
	OMP_THREAD_LIMIT=1 qemu-x86_64 -cpu Nehalem $<
	OMP_THREAD_LIMIT=1 qemu-x86_64 -cpu Haswell $<

.PHONY: guard
guard: $(BUILD)/native/guard  ## every operation, dtype and number of classes up to 600 between unreadable pages (STEP=7 for a seventh)
	$< $(STEP)

.PHONY: guard-neon
guard-neon: $(BUILD)/neon/guard  ## the same, cross-compiled for 64-bit Arm, under qemu-user
	qemu-aarch64 -L /usr/$(CROSS) $< $(STEP)

.PHONY: sanitize
sanitize: $(BUILD)/sanitize/test_kernels $(BUILD)/sanitize/stress  ## the C programs under GCC's ASan, UBSan and LSan
	$(BUILD)/sanitize/test_kernels > /dev/null
	$(BUILD)/sanitize/stress $(ROUNDS)

# GCC's OpenMP is not instrumented: ThreadSanitizer does not see how it hands work over, and would take every team for a race.
# Without OpenMP what is judged is the library's own: the instruction set in use, and calls beside each other.
.PHONY: tsan
tsan: $(BUILD)/tsan/stress  ## calls from many threads at once under TSan
	$< $(ROUNDS)

# Valgrind has no AVX-512, and does not show it to programs. It computes long double in 64 bits, so that the test program's own
# comparison (status 1) means nothing: only what Valgrind finds counts. It runs one thread at a time, and OpenMP's would wait in
# vain for each other.
MEMCHECK := OMP_THREAD_LIMIT=1 valgrind --quiet --leak-check=full --error-exitcode=99

.PHONY: valgrind
valgrind: $(BUILD)/native/test_kernels $(BUILD)/native/stress  ## the C programs under Valgrind's memcheck
	$(MEMCHECK) --log-fd=9 $(BUILD)/native/test_kernels 9>&2 > /dev/null 2>&1; test $$? -le 1
	$(MEMCHECK) $(BUILD)/native/stress $(ROUNDS) avx2
	$(MEMCHECK) $(BUILD)/native/stress $(ROUNDS) scalar

.PHONY: fuzz-c
fuzz-c: $(BUILD)/fuzz/fuzz  ## random tasks by libFuzzer under Clang's ASan and UBSan, for ten minutes (SECONDS=60 for one)
	$< -max_total_time=$(SECONDS) -artifact_prefix=$(BUILD)/fuzz/ $(FUZZ_FLAGS)

ROUNDS := 20
SECONDS := 600
# Inputs are so long from the start: most of a task's options come late in it.
FUZZ_FLAGS := -max_len=64 -len_control=0 -print_final_stats=1

# What a checker looks at is built without optimisation, which would take most of the time. The fuzzer is not told of
# comparisons: that took half of its time, and there is nothing to find by them.
$(BUILD)/native/%: BUILD_FLAGS := -g -fopenmp -fschedule-insns -fsched-pressure
$(BUILD)/sanitize/%: BUILD_FLAGS := -O0 -g -fopenmp -fsanitize=address,undefined -fno-sanitize-recover=all
$(BUILD)/tsan/%: BUILD_FLAGS := -O0 -g -fsanitize=thread
$(BUILD)/fuzz/%: BUILD_FLAGS := -O0 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
	-fno-sanitize-coverage=trace-cmp
$(BUILD)/fuzz/%: CC := clang

%/scalar.o: ISA_FLAGS := -fno-tree-vectorize
%/avx2.o: ISA_FLAGS := -mavx2 -mfma -mf16c -mprfchw
%/avx512.o: ISA_FLAGS := -mavx2 -mfma -mf16c -mprfchw -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512

$(BUILD)/neon/%: CC := $(CROSS)-gcc

X86_BUILDS := $(addprefix $(BUILD)/,native sanitize tsan fuzz)
X86_KERNELS := scalar.o avx2.o avx512.o
NEON_KERNELS := scalar.o neon.o

$(foreach build,$(X86_BUILDS),$(addprefix $(build)/,$(X86_KERNELS))) $(addprefix $(BUILD)/neon/,$(NEON_KERNELS)): c/kernel.c $(wildcard c/*.h)
	mkdir -p $(@D)
	$(CC) $(C_FLAGS) $(BUILD_FLAGS) $(ISA_FLAGS) -DPL_ISA=$(basename $(@F)) -c c/kernel.c -o $@

# A program of c/: test_kernels, stress, guard, count or fuzz.
define program
$(1)/$(2): c/dispatch.c c/$(2).c $(addprefix $(1)/,$(3))
	$$(CC) $$(C_FLAGS) $$(BUILD_FLAGS) $$^ -lm -o $$@
endef
PROGRAMS := test_kernels stress guard count fuzz
$(foreach build,$(X86_BUILDS),$(foreach name,$(PROGRAMS),$(eval $(call program,$(build),$(name),$(X86_KERNELS)))))
$(foreach name,test_kernels guard,$(eval $(call program,$(BUILD)/neon,$(name),$(NEON_KERNELS))))

.PHONY: clean
clean:  ## remove what the targets made
	rm -rf $(VENV) $(BUILD) build build-compare build-docs docs/generated scores.parquet report.html bench*.json gpu.json
