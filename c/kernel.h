#ifndef PL_KERNEL_H
#define PL_KERNEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "api.cdef.h"

static inline bool pl_is_backward(const struct pl_task *task)
{
  return task->operation == PL_SOFTMAX_BACKWARD || task->operation == PL_LOG_SOFTMAX_BACKWARD;
}

/* The result that is as large as the logits, or NULL where there are one or some numbers a row. */
static inline const struct pl_view *pl_whole(const struct pl_task *task)
{
  if (task->operation == PL_SOFTMAX || task->operation == PL_LOG_SOFTMAX || pl_is_backward(task)) return &task->out;
  return task->operation == PL_CROSS_ENTROPY && task->losses.grad.data ? &task->losses.grad : NULL;
}

/* Rows are numbered i * inner + j. A kernel works on rows [begin, end), serially, and returns -1 or the lowest flat index
 * of a label that it found outside [0, classes), or -2 where it could not allocate. */
typedef int64_t pl_run_rows(const struct pl_task *task, int64_t begin, int64_t end);

/* For a row longer than a block, a part at a time: some of its blocks are reduced to `numbers_size` bytes of numbers each; when
 * all are, they are joined, the row's behind the last block's; then the results of some are written. What keeps the terms
 * writes to a result's row from the beginning. Not for PL_SCORE, the backward forms and probabilities. */
struct pl_parts {
  int64_t block; /* elements */
  size_t numbers_size;
  void (*reduce)(const struct pl_task *task, int64_t r, int64_t first, int64_t last, bool keep, void *numbers);
  void (*join)(const struct pl_task *task, void *numbers);
  int64_t (*write)(const struct pl_task *task, int64_t r, int64_t first, int64_t last, bool kept, const void *numbers);
};

struct pl_kernels {
  pl_run_rows *run_f32, *run_f64;
  const struct pl_parts *parts_f32, *parts_f64;
};

extern const struct pl_kernels pl_kernels_scalar, pl_kernels_avx2, pl_kernels_avx512, pl_kernels_neon;

#endif
