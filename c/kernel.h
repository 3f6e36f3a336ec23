#ifndef PL_KERNEL_H
#define PL_KERNEL_H

#include <stdint.h>

#include "api.cdef.h"

/* Rows are numbered i * inner + j. A kernel works on rows [begin, end), serially, and returns -1 or the lowest flat index
 * of a label that it found outside [0, classes), or -2 where it could not allocate. */
typedef int64_t pl_run_rows(const struct pl_task *task, int64_t begin, int64_t end);

struct pl_kernels {
  pl_run_rows *run_f32, *run_f64;
};

extern const struct pl_kernels pl_kernels_scalar, pl_kernels_avx2, pl_kernels_avx512, pl_kernels_neon;

#endif
