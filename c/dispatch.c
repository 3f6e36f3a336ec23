/* Entry points: which instruction set, which threads, and the check of the labels. Compiled for the baseline CPU. */

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "half.h"
#include "kernel.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __x86_64__
#include <cpuid.h>
#endif
#ifdef __SSE2__
#include <xmmintrin.h>
#endif

/* ---- instruction sets: an ordered table, best first ---- */

struct isa {
  const char *name;
  const struct pl_kernels *kernels;
  bool (*supported)(void);
};

static bool always(void)
{
  return true;
}

#ifdef __x86_64__
/* Conversions from and to float16, of which Clang's detection does not know. */
static bool has_f16c(void)
{
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}

/* GCC's and Clang's detection reads XCR0 as well: an OS that does not save the wide registers counts as no support. */
static bool has_avx2(void)
{
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

static bool has_avx512(void)
{
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

static const struct isa isas[] = {
#ifdef __x86_64__
    {"avx512", &pl_kernels_avx512, has_avx512},
    {"avx2", &pl_kernels_avx2, has_avx2},
#endif
#ifdef __aarch64__
    {"neon", &pl_kernels_neon, always}, /* part of every 64-bit Arm */
#endif
    {"scalar", &pl_kernels_scalar, always},
};

static _Atomic(const struct isa *) current;

static const struct isa *supported_isa(int index)
{
  for (size_t i = 0; i < sizeof isas / sizeof *isas; i++)
    if (isas[i].supported() && index-- == 0) return &isas[i];
  return NULL;
}

static const struct isa *current_isa(void)
{
  const struct isa *isa = atomic_load_explicit(&current, memory_order_relaxed);
  if (!isa) {
    isa = supported_isa(0);
    atomic_store_explicit(&current, isa, memory_order_relaxed);
  }
  return isa;
}

int pl_isa_count(void)
{
  int count = 0;
  while (supported_isa(count)) count++;
  return count;
}

const char *pl_isa_name(int index)
{
  const struct isa *isa = supported_isa(index);
  return isa ? isa->name : NULL;
}

const char *pl_isa(void)
{
  return current_isa()->name;
}

int pl_use_isa(const char *name)
{
  const struct isa *isa;
  for (int i = 0; (isa = supported_isa(i)); i++) {
    if (strcmp(isa->name, name) == 0) {
      atomic_store(&current, isa);
      return 0;
    }
  }
  return -1;
}

/* ---- the floating-point environment ---- */

/* Round to nearest, subnormals kept, no traps, whatever the caller (or a library built with -ffast-math) has set. */
#if defined(__SSE2__)
#define FLOAT_DEFAULT 0x1f80u
static unsigned get_float_state(void)
{
  return _mm_getcsr();
}
static void set_float_state(unsigned state)
{
  _mm_setcsr(state);
}
#elif defined(__aarch64__)
#define FLOAT_DEFAULT 0u
static unsigned get_float_state(void)
{
  uint64_t state;
  __asm__ volatile("mrs %0, fpcr" : "=r"(state));
  return (unsigned)state;
}
static void set_float_state(unsigned state)
{
  __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)state));
}
#else
#define FLOAT_DEFAULT 0u
static unsigned get_float_state(void)
{
  return FLOAT_DEFAULT;
}
static void set_float_state(unsigned state)
{
  (void)state;
}
#endif

static int64_t run_range(const struct pl_kernels *kernels, const struct pl_task *task, int64_t begin, int64_t end)
{
  const unsigned state = get_float_state();
  set_float_state(FLOAT_DEFAULT);
  const int64_t status = (task->dtype == PL_FLOAT64 ? kernels->run_f64 : kernels->run_f32)(task, begin, end);
  set_float_state(state);
  return status;
}

/* ---- threads ---- */

/* OpenMP's threads do not survive a fork, and entering a team in the child hangs: a forked child computes serially. */
static bool forked;

static void in_child(void)
{
  forked = true;
}

__attribute__((constructor)) static void watch_forks(void)
{
  pthread_atfork(NULL, NULL, in_child);
}

int pl_max_threads(void)
{
#ifdef _OPENMP
  if (!forked) return omp_get_max_threads();
#endif
  return 1;
}

/* The lower of two statuses, where -1 is none and -2 (out of memory) wins. */
static int64_t worse(int64_t a, int64_t b)
{
  if (a == -2 || b == -2) return -2;
  if (a == -1) return b;
  return b == -1 || a < b ? a : b;
}

#ifdef _OPENMP
static void *wait_for(void *gate)
{
  pthread_mutex_lock(gate);
  pthread_mutex_unlock(gate);
  return NULL;
}

/* How many of so many threads there can be. OpenMP ends the process where it can't start one (a limit on processes, no memory
 * for a stack), so they are tried before, all at once; once it has started them, it keeps them for this thread's next team. */
static int possible_threads(int wanted)
{
  static _Thread_local int kept = 1;
  pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
  pthread_t *tried = NULL;
  int possible = 1;
  if (wanted <= kept) return kept = wanted;
  pthread_mutex_lock(&gate);
  tried = malloc((size_t)(wanted - 1) * sizeof *tried);
  while (tried && possible < wanted && pthread_create(&tried[possible - 1], NULL, wait_for, &gate) == 0) possible++;
  pthread_mutex_unlock(&gate);
  for (int i = 0; i < possible - 1; i++) pthread_join(tried[i], NULL);
  free(tried);
  return kept = possible;
}
#else
static int possible_threads(int wanted)
{
  return wanted;
}
#endif

/* A second call beside a running one stays on its caller's thread: teams of teams would only wait for cores. */
static atomic_bool busy;

static void end_team(void)
{
  atomic_store(&busy, false);
}

/* How many threads the team has, of those that are wanted; 1: there is none, and nothing to end. */
static int begin_team(int threads)
{
  if (threads <= 1 || forked || atomic_exchange(&busy, true)) return 1;
  threads = possible_threads(threads);
  if (threads == 1) end_team();
  return threads;
}

static const struct pl_parts *parts_of(const struct pl_kernels *kernels, int dtype)
{
  return dtype == PL_FLOAT64 ? kernels->parts_f64 : kernels->parts_f32;
}

/* A team works on this many pieces a thread, so that one that is held up does not hold up the others. */
#define PIECES_PER_THREAD 8
#define PIECE_ROWS 16 /* a whole tile of floats */

static int64_t run_team(const struct pl_kernels *kernels, const struct pl_task *task, int64_t rows, int threads)
{
  int64_t status = -1;
  int64_t piece = (rows + threads * PIECES_PER_THREAD - 1) / (threads * PIECES_PER_THREAD);
  piece = (piece + PIECE_ROWS - 1) / PIECE_ROWS * PIECE_ROWS;
  const int64_t fair = (rows + threads - 1) / threads;
  if (piece > fair) piece = fair;
  const int64_t pieces = (rows + piece - 1) / piece;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
#endif
  for (int64_t p = 0; p < pieces; p++) {
    const int64_t end = (p + 1) * piece < rows ? (p + 1) * piece : rows;
    const int64_t found = run_range(kernels, task, p * piece, end);
    if (found != -1) {
#ifdef _OPENMP
#pragma omp critical(pl_status)
#endif
      status = worse(status, found);
    }
  }
  return status;
}

int pl_has_parts(const struct pl_task *task)
{
  return task->operation != PL_SCORE && !pl_is_backward(task) && !task->losses.probabilities.data;
}

/* Whether threads should share rows: there are too few to go round, and long enough. */
static bool shares_rows(const struct pl_parts *parts, const struct pl_task *task, int64_t rows, int threads)
{
  return rows < 4 * threads && task->classes >= 2 * parts->block && pl_has_parts(task);
}

static int64_t block_count(const struct pl_parts *parts, const struct pl_task *task)
{
  return (task->classes + parts->block - 1) / parts->block;
}

/* Blocks [first, last) of each row, in pieces for each thread of the team: they are reduced, or their results are written.
 * Returns the worst status. `keep`: terms stay in the result between the two. */
struct part {
  int64_t first, last;
  bool write, keep;
};

/* The numbers of a row's blocks, and after them the row's. */
static size_t row_numbers(const struct pl_parts *parts, const struct pl_task *task)
{
  return (size_t)(block_count(parts, task) + 1) * parts->numbers_size;
}

static int64_t run_team_on_part(const struct pl_parts *parts, const struct pl_task *task, struct part p, char *numbers,
                                int threads)
{
  const int64_t rows = task->outer * task->inner, count = p.last - p.first;
  const int64_t wanted = (threads * PIECES_PER_THREAD + rows - 1) / rows; /* pieces of a row */
  const bool one_number = p.write && !pl_whole(task);                     /* a row, which is not worth sharing */
  const int64_t piece = threads == 1 || one_number ? count : (count + wanted - 1) / wanted;
  const int64_t each = (count + piece - 1) / piece;
  int64_t status = -1;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
  {
    const unsigned state = get_float_state();
    set_float_state(FLOAT_DEFAULT);
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
    for (int64_t i = 0; i < rows * each; i++) {
      const int64_t r = i / each, first = p.first + i % each * piece;
      const int64_t last = first + piece < p.last ? first + piece : p.last;
      char *of_row = numbers + (size_t)r * row_numbers(parts, task);
      if (!p.write) {
        parts->reduce(task, r, first, last, p.keep, of_row);
        continue;
      }
      const int64_t found = parts->write(task, r, first, last, p.keep, of_row);
      if (found != -1) {
#ifdef _OPENMP
#pragma omp critical(pl_status)
#endif
        status = worse(status, found);
      }
    }
    set_float_state(state);
  }
  return status;
}

static void join_parts(const struct pl_parts *parts, const struct pl_task *task, char *numbers)
{
  const size_t size = row_numbers(parts, task);
  for (int64_t r = 0; r < task->outer * task->inner; r++) parts->join(task, numbers + (size_t)r * size);
}

static int64_t share_rows(const struct pl_parts *parts, const struct pl_task *task, int64_t rows, int threads)
{
  struct part all = {0, block_count(parts, task), false, true};
  char *numbers = malloc((size_t)rows * row_numbers(parts, task));
  if (!numbers) return -2;
  run_team_on_part(parts, task, all, numbers, threads);
  join_parts(parts, task, numbers);
  all.write = true;
  const int64_t status = run_team_on_part(parts, task, all, numbers, threads);
  free(numbers);
  return status;
}

/* ---- entry points ---- */

/* Has the highest bit where one of the labels, which lie side by side, is negative or above the last class, and not ignored.
 * Two loops, as the compiler's vectors can do the first. */
static uint64_t signs_of(const char *labels, int64_t count, int64_t classes, bool ignore, int64_t ignored)
{
  uint64_t signs = 0, label;
  for (int64_t n = 0; !ignore && n < count; n++) {
    memcpy(&label, labels + 8 * n, sizeof label);
    signs |= label | ((uint64_t)classes - 1 - label);
  }
  for (int64_t n = 0; ignore && n < count; n++) {
    memcpy(&label, labels + 8 * n, sizeof label);
    signs |= label == (uint64_t)ignored ? 0 : label | ((uint64_t)classes - 1 - label);
  }
  return signs;
}

int64_t pl_find_bad_label(const struct pl_task *task)
{
  const struct pl_view *labels = &task->labels;
  /* Scoring has one label a row; its picks are the k of top-k. A dimension of one has any stride. */
  const int64_t inner = task->inner, picks = task->operation == PL_SCORE ? 1 : task->picks;
  const int64_t count = labels->data ? task->outer * picks * inner : 0;
  const bool ignore = task->losses.has_ignore_index;
  if ((inner == 1 || labels->inner == 8) && (picks == 1 || labels->classes == 8 * inner) &&
      (task->outer == 1 || labels->outer == 8 * inner * picks) &&
      signs_of(labels->data, count, task->classes, ignore, task->losses.ignore_index) >> 63 == 0)
    return -1;
  for (int64_t n = 0; n < count; n++) {
    const int64_t j = n % inner, k = n / inner % picks, i = n / inner / picks;
    int64_t label;
    memcpy(&label, (const char *)labels->data + i * labels->outer + k * labels->classes + j * labels->inner, sizeof label);
    if ((label < 0 || label >= task->classes) && !(ignore && label == task->losses.ignore_index)) return n;
  }
  return -1;
}

int64_t pl_run(const struct pl_task *task, int threads)
{
  const struct pl_kernels *kernels = current_isa()->kernels;
  const int64_t rows = task->outer * task->inner;
  if (rows == 0) return -1;
  const int64_t bad = pl_find_bad_label(task);
  if (bad != -1) return bad;
  const struct pl_parts *parts = parts_of(kernels, task->dtype);
  const bool shared = shares_rows(parts, task, rows, threads);
  if (threads > rows && !shared) threads = (int)rows;
  threads = begin_team(threads);
  if (threads > 1) {
    const int64_t status = shared ? share_rows(parts, task, rows, threads) : run_team(kernels, task, rows, threads);
    end_team();
    return status;
  }
  return run_range(kernels, task, 0, rows);
}

int64_t pl_run_contiguous(int operation, int dtype, const void *logits, const void *labels, const void *probabilities,
                          void *grad, void *out, int64_t size, int64_t classes, double temperature, double scale,
                          double scale_lo, int threads)
{
  const int64_t item = pl_itemsize(dtype), row = classes * item;
  struct pl_task task = {
      .operation = operation,
      .dtype = dtype,
      .out_dtype = dtype,
      .outer = size / classes,
      .classes = classes,
      .inner = 1,
      .picks = 1,
      .temperature = temperature,
      .logits = {(void *)logits, row, item, item},
      .labels = {(void *)labels, sizeof(int64_t), sizeof(int64_t), sizeof(int64_t)},
      .out = {out, item, item, item},
      .losses = {.scale = scale, .scale_lo = scale_lo, .probabilities = {(void *)probabilities, row, item, item}},
  };
  *(pl_is_backward(&task) ? &task.grad : &task.losses.grad) = (struct pl_view){grad, row, item, item};
  if (pl_whole(&task) == &task.out) {
    task.out.outer = row;
  } else if (item < (int64_t)sizeof(float) && operation != PL_SELECTIVE_LOG_SOFTMAX) {
    task.out_dtype = PL_FLOAT32;
    task.out.outer = task.out.classes = task.out.inner = sizeof(float);
  }
  return pl_run(&task, threads);
}

int64_t pl_block(int dtype)
{
  return parts_of(current_isa()->kernels, dtype)->block;
}

int64_t pl_numbers_size(const struct pl_task *task)
{
  return task->outer * task->inner * (int64_t)row_numbers(parts_of(current_isa()->kernels, task->dtype), task);
}

static int64_t run_part(const struct pl_task *task, struct part p, void *numbers, int threads)
{
  threads = begin_team(threads);
  const int64_t status = run_team_on_part(parts_of(current_isa()->kernels, task->dtype), task, p, numbers, threads);
  if (threads > 1) end_team();
  return status;
}

void pl_reduce_part(const struct pl_task *task, int64_t first, int64_t last, void *numbers, int threads)
{
  run_part(task, (struct part){first, last, false, false}, numbers, threads);
}

void pl_join_parts(const struct pl_task *task, void *numbers)
{
  const unsigned state = get_float_state();
  set_float_state(FLOAT_DEFAULT);
  join_parts(parts_of(current_isa()->kernels, task->dtype), task, numbers);
  set_float_state(state);
}

int64_t pl_write_part(const struct pl_task *task, int64_t first, int64_t last, void *numbers, int threads)
{
  return run_part(task, (struct part){first, last, true, false}, numbers, threads);
}
