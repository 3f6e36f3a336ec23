/* A test of the C backend without Python, for machines that are only emulated (`make neon`) and for checkers.
 *
 * For every instruction set at hand it computes fixed pseudo-random rows, compares with long double, and prints a hash of the
 * bits of each case: the lines of two instruction sets, or of two machines, must be the same. */

#include <inttypes.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api.cdef.h"

static const int64_t class_counts[] = {1, 2, 3, 7, 10, 16, 17, 31, 64, 65, 100, 127, 1000, 4096, 4097, 5001};
static const char *const operation_names[] = {
    "softmax", "log_softmax", "logsumexp", "selective_log_softmax", "sparse_softmax_cross_entropy", "cross_entropy"};
#define ROWS 19
#define FLOAT_ULP 4
#define DOUBLE_ULP 8

static uint64_t state;

/* Integers, scaled by powers of two: the same inputs on every machine. */
static double uniform(void)
{
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (double)(int64_t)(state >> 33) * 0x1p-31;
}

static double get(const void *array, int dtype, int64_t index)
{
  return dtype == PL_FLOAT32 ? (double)((const float *)array)[index] : ((const double *)array)[index];
}

static void set(void *array, int dtype, int64_t index, double value)
{
  if (dtype == PL_FLOAT32) {
    ((float *)array)[index] = (float)value;
  } else {
    ((double *)array)[index] = value;
  }
}

static double error_in_ulp(double got, long double want, int dtype)
{
  const double size = fabs((double)want);
  if (size < (dtype == PL_FLOAT32 ? 0x1p-126 : 0x1p-1022)) return 0; /* bounds are for normal results */
  const double ulp =
      dtype == PL_FLOAT32 ? (double)nextafterf((float)size, INFINITY) - (double)(float)size : nextafter(size, INFINITY) - size;
  return (double)(fabsl((long double)got - want) / (long double)ulp);
}

struct row {
  long double max, log_sum; /* log of the sum of exp(x - max) */
};

static struct row reduce(const void *logits, int dtype, int64_t classes, int64_t r)
{
  int64_t top = 0;
  long double others = 0;
  for (int64_t i = 1; i < classes; i++)
    if (get(logits, dtype, r * classes + i) > get(logits, dtype, r * classes + top)) top = i;
  const long double max = get(logits, dtype, r * classes + top);
  for (int64_t i = 0; i < classes; i++)
    if (i != top) others += expl(get(logits, dtype, r * classes + i) - max);
  return (struct row){max, log1pl(others)};
}

/* What row r should give, for its class c where it is about one. */
static long double expected(int operation, const void *logits, const void *dense, int dtype, int64_t classes, struct row row,
                            int64_t r, int64_t c)
{
  long double loss = 0;
  const long double log_probability = get(logits, dtype, r * classes + c) - row.max - row.log_sum;
  switch (operation) {
    case PL_SOFTMAX:
      return expl(log_probability);
    case PL_LOGSUMEXP:
      return row.max + row.log_sum;
    case PL_CROSS_ENTROPY:
      for (int64_t i = 0; i < classes; i++)
        loss += get(dense, dtype, r * classes + i) * (row.max - get(logits, dtype, r * classes + i) + row.log_sum);
      return loss;
    case PL_SPARSE_SOFTMAX_CROSS_ENTROPY:
      return -log_probability;
    default:
      return log_probability;
  }
}

/* Runs one case, prints its line and returns whether it is within bounds. */
static int run_case(int operation, int dtype, int64_t classes)
{
  const int64_t size = dtype == PL_FLOAT32 ? 4 : 8;
  char *logits = malloc((size_t)(ROWS * classes * size)), *dense = malloc((size_t)(ROWS * classes * size));
  char *out = calloc((size_t)(ROWS * classes), (size_t)size);
  int64_t labels[ROWS];
  if (!logits || !dense || !out) abort();
  state = 1;
  for (int64_t i = 0; i < ROWS * classes; i++) {
    set(logits, dtype, i, (uniform() - 0.5) * 40);
    set(dense, dtype, i, floor(uniform() * 1024) * 0x1p-10);
  }
  for (int r = 0; r < ROWS; r++) labels[r] = (int64_t)(uniform() * (double)classes);

  const int is_full = operation == PL_SOFTMAX || operation == PL_LOG_SOFTMAX;
  const int is_dense = operation == PL_CROSS_ENTROPY;
  struct pl_task task = {.operation = operation, .dtype = dtype, .out_dtype = dtype, .outer = ROWS, .classes = classes};
  task.inner = task.picks = 1;
  task.temperature = 1;
  task.logits = (struct pl_view){logits, classes * size, size, size};
  task.out = (struct pl_view){out, is_full ? classes * size : size, size, size};
  if (is_dense) {
    task.losses.probabilities = (struct pl_view){dense, classes * size, size, size};
  } else if (!is_full && operation != PL_LOGSUMEXP) {
    task.labels = (struct pl_view){labels, 8, 8, 8};
  }
  if (pl_run(&task, 2) != -1) abort();

  double worst = 0;
  uint64_t hash = 14695981039346656037u; /* FNV-1a */
  const int64_t bytes = (is_full ? ROWS * classes : ROWS) * size;
  for (int64_t i = 0; i < bytes; i++) hash = (hash ^ (unsigned char)out[i]) * 1099511628211u;
  for (int64_t r = 0; r < ROWS; r++) {
    const struct row row = reduce(logits, dtype, classes, r);
    for (int64_t c = is_full ? 0 : labels[r]; c < (is_full ? classes : labels[r] + 1); c++) {
      const double got = get(out, dtype, is_full ? r * classes + c : r);
      const double error = error_in_ulp(got, expected(operation, logits, dense, dtype, classes, row, r, c), dtype);
      if (error > worst) worst = error;
    }
  }
  printf("%s %s %" PRId64 " %016" PRIx64 "\n", operation_names[operation], dtype == PL_FLOAT32 ? "float32" : "float64", classes,
         hash);
  free(logits);
  free(dense);
  free(out);
  /* long double is double on some machines: then float64 has no wider reference */
  const int checked = dtype == PL_FLOAT32 || sizeof(long double) > 8;
  return !checked || worst <= (dtype == PL_FLOAT32 ? FLOAT_ULP : DOUBLE_ULP);
}

/* The operations with a gradient, of labels and all options together: their lines only. */
static void run_gradient(int operation, int dtype, int64_t classes)
{
  const int64_t size = dtype == PL_FLOAT32 ? 4 : 8, count = ROWS * classes;
  char *logits = malloc((size_t)(count * size)), *grad = malloc((size_t)(count * size)), *out = malloc((size_t)(count * size));
  char *weight = malloc((size_t)(classes * size)), *per_row = malloc((size_t)(ROWS * size)), *where = malloc((size_t)count);
  int64_t labels[ROWS];
  if (!logits || !grad || !out || !weight || !per_row || !where) abort();
  state = 1;
  for (int64_t i = 0; i < count; i++) {
    set(logits, dtype, i, operation == PL_LOG_SOFTMAX_BACKWARD ? -uniform() * 20 : (uniform() - 0.5) * 40);
    set(grad, dtype, i, uniform() - 0.5);
    where[i] = uniform() < 0.75;
  }
  for (int64_t i = 0; i < classes; i++) set(weight, dtype, i, uniform());
  for (int64_t r = 0; r < ROWS; r++) {
    set(per_row, dtype, r, uniform());
    labels[r] = r == 3 ? -100 : (int64_t)(uniform() * (double)classes);
    if (r != 3) where[r * classes + labels[r]] = 1;
  }
  const struct pl_view full = {logits, classes * size, size, size}, slopes = {grad, classes * size, size, size};
  struct pl_task task = {.operation = operation, .dtype = dtype, .out_dtype = dtype, .outer = ROWS, .classes = classes};
  task.inner = task.picks = 1;
  task.temperature = 0.75;
  task.logits = full;
  task.out = (struct pl_view){out, classes * size, size, size};
  task.grad = slopes;
  if (operation == PL_CROSS_ENTROPY) {
    task.out = (struct pl_view){out, size, size, size};
    task.labels = (struct pl_view){labels, 8, 8, 8};
    task.where = (struct pl_view){where, classes, 1, 1};
    task.losses = (struct pl_loss){.softcap = 10,
                                   .label_smoothing = 0.125,
                                   .z_loss = 0.25,
                                   .scale = 0.5,
                                   .ignore_index = -100,
                                   .has_ignore_index = 1,
                                   .weight = weight,
                                   .sample_weight = per_row,
                                   .loss_grad = per_row,
                                   .grad = slopes};
  }
  if (pl_run(&task, 2) != -1) abort();
  uint64_t hash = 14695981039346656037u;
  const int64_t bytes = (operation == PL_CROSS_ENTROPY ? ROWS : count) * size;
  for (int64_t i = 0; i < bytes; i++) hash = (hash ^ (unsigned char)out[i]) * 1099511628211u;
  for (int64_t i = 0; i < count * size; i++) hash = (hash ^ (unsigned char)grad[i]) * 1099511628211u;
  printf("%s %s %" PRId64 " %016" PRIx64 "\n",
         operation == PL_CROSS_ENTROPY ? "cross_entropy_and_grad"
                                       : (operation == PL_SOFTMAX_BACKWARD ? "softmax_backward" : "log_softmax_backward"),
         dtype == PL_FLOAT32 ? "float32" : "float64", classes, hash);
  free(logits);
  free(grad);
  free(out);
  free(weight);
  free(per_row);
  free(where);
}

int main(void)
{
  setvbuf(stdout, NULL, _IOLBF, 0); /* a crash or a hang should show where */
  int failures = 0;
  for (int index = 0; index < pl_isa_count(); index++) {
    pl_use_isa(pl_isa_name(index));
    printf("# %s\n", pl_isa());
    for (int operation = PL_SOFTMAX; operation <= PL_CROSS_ENTROPY; operation++)
      for (size_t i = 0; i < sizeof class_counts / sizeof *class_counts; i++)
        for (int dtype = PL_FLOAT32; dtype <= PL_FLOAT64; dtype++)
          if (!run_case(operation, dtype, class_counts[i])) {
            failures++;
            fprintf(stderr, "%s: %s with %" PRId64 " classes is off\n", pl_isa(), operation_names[operation], class_counts[i]);
          }
    for (int operation = PL_CROSS_ENTROPY; operation <= PL_LOG_SOFTMAX_BACKWARD; operation++)
      for (size_t i = 0; i < sizeof class_counts / sizeof *class_counts; i++)
        for (int dtype = PL_FLOAT32; dtype <= PL_FLOAT64; dtype++) run_gradient(operation, dtype, class_counts[i]);
  }
  return failures ? 1 : 0;
}
