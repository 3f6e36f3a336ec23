/* The gradients through softmax and log_softmax, from their results; once for float and once for double. With g the gradient
 * of what follows: p (g - sum(g p)), and g - exp(log p) sum(g). The sums are pairs, by the tree of rows.inc.h. */

static inline bool FN(is_backward)(const struct pl_task *task)
{
  return task->operation == PL_SOFTMAX_BACKWARD || task->operation == PL_LOG_SOFTMAX_BACKWARD;
}

/* g p, and in low the product's rounding error. */
static void FN(multiply)(const REAL *p, const REAL *g, REAL *product, REAL *low, int64_t n)
{
  for (int64_t c = 0; c < n; c++) {
    product[c] = g[c] * p[c];
    low[c] = FMA(g[c], p[c], -product[c]);
  }
}

INLINE VEC FN(softmax_slope)(VEC p, VEC g, VEC sum, VEC sum_lo)
{
  VEC lo;
  const VEC hi = FN(vec_two_sum)(g, -sum, &lo);
  return p * (hi + (lo - sum_lo));
}

INLINE VEC FN(log_softmax_slope)(VEC log_p, VEC g, VEC sum, VEC sum_lo)
{
  const VEC zero = FN(vec_fill)(0), unscale = FN(vec_fill)(-1 / EXP_SCALE);
  const VEC p = FN(exp_scaled)(log_p, log_p, zero, zero);
  return FN(vec_fma)(p, sum * unscale, FN(vec_fma)(p, sum_lo * unscale, g));
}

/* The slopes of n elements in place of p, up to the end of the last vector. */
static void FN(slope_block)(bool log, REAL *p, const REAL *g, int64_t n, struct FN(pair) sum)
{
  const VEC hi = FN(vec_fill)(sum.hi), lo = FN(vec_fill)(sum.lo);
  for (int64_t c = 0; c < n; c += VEC_LANES) {
    const VEC at = FN(vec_load)(p + c), grad = FN(vec_load)(g + c);
    FN(vec_store)(p + c, log ? FN(log_softmax_slope)(at, grad, hi, lo) : FN(softmax_slope)(at, grad, hi, lo));
  }
}

static void FN(backward_row)(const struct pl_task *task, int64_t r, REAL *p, REAL *g, REAL *product, REAL *low)
{
  const bool log = task->operation == PL_LOG_SOFTMAX_BACKWARD;
  const int64_t count = FN(block_count)(task);
  const struct pl_view *result = &task->logits, *grad = &task->grad;
  const char *p_row = FN(row_at)(task, result, r), *g_row = FN(row_at)(task, grad, r);
  char *out = FN(row_at)(task, &task->out, r);
  struct FN(pair) sum = {0, 0}, part;
  for (int64_t pass = 0; pass < 2; pass++) {
    for (int64_t b = 0; b < count; b++) {
      const int64_t first = b * BLOCK, n = FN(block_length)(task, b), groups = ROUND_UP(n, GROUP);
      if (pass == 0 || count > 1) {
        FN(load_many)(p, p_row + first * result->classes, result->classes, n, task->dtype);
        FN(load_many)(g, g_row + first * grad->classes, grad->classes, n, task->dtype);
        for (int64_t c = n; c < groups; c++) p[c] = g[c] = 0;
      }
      if (pass == 0) {
        if (!log) FN(multiply)(p, g, product, low, groups);
        part.hi = FN(sum)(log ? g : product, groups, &part.lo);
        if (!log) {
          REAL low_lo;
          part.lo += FN(sum)(low, groups, &low_lo);
        }
        sum = FN(plus)(sum, part);
      } else {
        FN(slope_block)(log, p, g, n, sum);
        FN(store_many)(out + first * task->out.classes, p, task->out.classes, n, task->out_dtype);
      }
    }
  }
}

/* LANES short rows at once, [class][row]. */
static void FN(backward_tile)(const struct pl_task *task, int64_t r, int64_t rows, REAL *p, REAL *g, REAL *product, REAL *low)
{
  const bool log = task->operation == PL_LOG_SOFTMAX_BACKWARD;
  const int64_t classes = task->classes, size = classes * LANES;
  REAL sum[LANES], sum_lo[LANES], rest[LANES], rest_lo[LANES];
  FN(load_tile)(task, &task->logits, task->dtype, r, rows, p);
  FN(load_tile)(task, &task->grad, task->dtype, r, rows, g);
  if (!log) FN(multiply)(p, g, product, low, size);
  FN(sum_tile)(log ? g : product, classes, sum, sum_lo);
  if (!log) {
    FN(sum_tile)(low, classes, rest, rest_lo);
    for (int l = 0; l < LANES; l++) sum_lo[l] += rest[l];
  }
  for (int64_t c = 0; c < size; c += LANES) {
    EACH_VEC(v)
    {
      const VEC at = FN(vec_load)(p + c + v), grad = FN(vec_load)(g + c + v);
      const VEC hi = FN(vec_load)(sum + v), lo = FN(vec_load)(sum_lo + v);
      FN(vec_store)(p + c + v, log ? FN(log_softmax_slope)(at, grad, hi, lo) : FN(softmax_slope)(at, grad, hi, lo));
    }
  }
  FN(store_tile)(task, &task->out, task->out_dtype, r, rows, p);
}

static void FN(run_backward)(const struct pl_task *task, int64_t begin, int64_t end, bool by_tile, REAL *scratch)
{
  REAL *p = scratch, *g = scratch + ROOM / 2, *product = scratch + ROOM, *low = scratch + ROOM + ROOM / 2;
  const int64_t step = by_tile ? LANES : 1;
  for (int64_t r = begin; r < end; r += step) {
    const int64_t rows = end - r < step ? end - r : step;
    if (by_tile) {
      FN(backward_tile)(task, r, rows, p, g, product, low);
    } else {
      FN(backward_row)(task, r, p, g, product, low);
    }
  }
}
