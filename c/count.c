/* Calls whose instructions are counted (`make bench-instructions`). `count <instruction set>` prints which compiler it is of,
 * runs each call once, on one thread, and prints its name. */

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "jobs.h"

static const struct {
  const char *name;
  struct job job;
} counted[] = {
    {"softmax", {PL_SOFTMAX, PL_FLOAT32, 32, 1000, 1}},
    {"softmax", {PL_SOFTMAX, PL_FLOAT32, 3200, 10, 1}},
    {"softmax", {PL_SOFTMAX, PL_FLOAT32, 250, 128, 1}},
    {"softmax", {PL_SOFTMAX, PL_FLOAT32, 1, 32000, 1}},
    {"softmax", {PL_SOFTMAX, PL_FLOAT32, 1, 19, 1600}},
    {"softmax", {PL_SOFTMAX, PL_FLOAT32, 1, 1000, 32}},
    {"softmax", {PL_SOFTMAX, PL_FLOAT64, 32, 1000, 1}},
    {"softmax", {PL_SOFTMAX, PL_FLOAT16, 32, 1000, 1}},
    {"softmax", {PL_SOFTMAX, PL_BFLOAT16, 32, 1000, 1}},
    {"softmax", {PL_SOFTMAX, PL_FLOAT32, 1, 10, 1}},
    {"log_softmax", {PL_LOG_SOFTMAX, PL_FLOAT32, 32, 1000, 1}},
    {"logsumexp", {PL_LOGSUMEXP, PL_FLOAT32, 32, 1000, 1}},
    {"logsumexp", {PL_LOGSUMEXP, PL_FLOAT64, 32, 1000, 1}},
    {"sparse_softmax_cross_entropy", {PL_SPARSE_SOFTMAX_CROSS_ENTROPY, PL_FLOAT32, 32, 1000, 1}},
    {"sparse_softmax_cross_entropy", {PL_SPARSE_SOFTMAX_CROSS_ENTROPY, PL_FLOAT32, 3200, 10, 1}},
    {"sparse_softmax_cross_entropy", {PL_SPARSE_SOFTMAX_CROSS_ENTROPY, PL_FLOAT32, 1, 32000, 1}},
    {"cross_entropy_and_grad", {PL_CROSS_ENTROPY, PL_FLOAT32, 32, 1000, 1}},
    {"cross_entropy_and_grad", {PL_CROSS_ENTROPY, PL_FLOAT32, 3200, 10, 1}},
    {"softmax_backward", {PL_SOFTMAX_BACKWARD, PL_FLOAT32, 32, 1000, 1}},
    {"log_softmax_backward", {PL_LOG_SOFTMAX_BACKWARD, PL_FLOAT32, 32, 1000, 1}},
    {"score", {PL_SCORE, PL_FLOAT32, 32, 1000, 1}},
};

static const char *const dtype_names[] = {"float16", "bfloat16", "float32", "float64"};

int main(int count, char **arguments)
{
  static struct results results;
  if (count != 2 || pl_use_isa(arguments[1]) != 0) {
    fprintf(stderr, "this machine does not have the instruction set\n");
    return 1;
  }
#ifdef __clang__
  puts(__VERSION__);
#else
  puts("GCC " __VERSION__);
#endif
  fill();
  for (size_t i = 0; i < sizeof counted / sizeof *counted; i++) {
    const struct job job = counted[i].job;
    if (run_job(&job, 1, &results) != -1) abort();
    printf("%s %s %" PRId64 " x %" PRId64 " x %" PRId64 "\n", counted[i].name, dtype_names[job.dtype], job.outer, job.classes,
           job.inner);
  }
  return 0;
}
