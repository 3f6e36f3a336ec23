/* The gradients through softmax and log_softmax, from their results; once for float and once for double. With g the gradient
 * of what follows: p (g - sum(g p)), and g - exp(log p) sum(g). The sums are pairs, by the tree of rows.inc.h. */

INLINE VEC FN(softmax_slope)(VEC p, VEC g, VEC sum, VEC sum_lo)
{
  VEC lo;
  const VEC hi = FN(vec_two_sum)(g, -sum, &lo);
  return p * (hi + (lo - sum_lo));
}

INLINE VEC FN(log_softmax_slope)(VEC log_p, VEC g, VEC sum, VEC sum_lo)
{
  const VEC zero = FN(vec_fill)(0), unscale = FN(vec_fill)(-1 / EXP_SCALE);
  const VEC at = log_p - FN(vec_fill)(EXP_CENTER);
  VEC scale;
  const VEC less_one = FN(exp_less_one)(at, log_p, zero, zero, false, &scale);
  const VEC p = FN(vec_unless_below)(FN(vec_fma)(less_one, scale, scale), at, FN(vec_fill)(EXP_LOWEST));
  return FN(vec_fma)(p, sum * unscale, FN(vec_fma)(p, sum_lo * unscale, g));
}

/* Without the low part of a sum that is not finite: it is a NaN. */
static inline struct FN(pair) FN(usable)(struct FN(pair) sum)
{
  return (struct FN(pair)){sum.hi, FN(finite)(sum.hi) ? sum.lo : 0};
}

/* g p and the products' rounding errors, or g, are added lane by lane. */
INLINE void FN(add_products)(struct FN(lanes) * dot, struct FN(lanes) * low, const REAL *p, const REAL *g, bool log)
{
  EACH_VEC(v)
  {
    VEC product[LINES_PER_GROUP], error[LINES_PER_GROUP];
    for (int i = 0; i < LINES_PER_GROUP; i++) {
      const VEC grad = FN(vec_load)(g + i * LANES + v);
      const VEC at = log ? FN(vec_fill)(1) : FN(vec_load)(p + i * LANES + v);
      product[i] = grad * at;
      error[i] = FN(vec_fma)(grad, at, -product[i]);
    }
    FN(add_line)(dot, v / VEC_LANES, (product[0] + product[1]) + (product[2] + product[3]));
    if (!log) FN(add_line)(low, v / VEC_LANES, (error[0] + error[1]) + (error[2] + error[3]));
  }
}

/* Lane by lane: the sums of g p (or of g), and of those products' rounding errors. */
struct FN(products) {
  struct FN(lanes) dot, low;
};

/* `to` is where the results will go: it is asked for. */
INLINE void FN(sum_each)(struct FN(products) * sums, const REAL *p, const REAL *g, const REAL *to, int64_t n, bool log)
{
  const VEC zero = FN(vec_fill)(0);
  const int64_t whole = n / GROUP * GROUP;
  struct FN(lanes) dot, low;
  for (int v = 0; v < LINE_VECS; v++) dot.sum[v] = dot.lo[v] = low.sum[v] = low.lo[v] = zero;
  for (int64_t c = 0; c < whole; c += GROUP) {
    for (int i = 0; i < LINES_PER_GROUP; i++) __builtin_prefetch(to + c + i * LANES, 1);
    FN(add_products)(&dot, &low, p + c, g + c, log);
  }
  if (whole < n) {
    REAL p_tail[GROUP], g_tail[GROUP];
    FN(pad)(p_tail, p + whole, n - whole, zero);
    FN(pad)(g_tail, g + whole, n - whole, zero);
    FN(add_products)(&dot, &low, p_tail, g_tail, log);
  }
  sums->dot = dot;
  sums->low = low;
}

/* Block b of row r. */
static void FN(sum_block)(const struct pl_task *task, int64_t r, int64_t b, REAL *p_room, REAL *g_room,
                          struct FN(products) * sums)
{
  const struct FN(sink) sink = FN(sink_at)(task, r);
  const int64_t n = FN(block_length)(task, b);
  const REAL *p = FN(elements)(task, &task->logits, r, b * BLOCK, n, p_room);
  const REAL *g = FN(elements)(task, &task->grad, r, b * BLOCK, n, g_room);
  const REAL *to = FN(place)(&sink, b, p_room);
  if (task->operation == PL_LOG_SOFTMAX_BACKWARD) {
    FN(sum_each)(sums, p, g, to, n, true);
  } else {
    FN(sum_each)(sums, p, g, to, n, false);
  }
}

static struct FN(pair) FN(sum_row)(const struct pl_task *task, int64_t r, REAL *p_room, REAL *g_room)
{
  struct FN(products) sums;
  struct FN(pair) sum = {0, 0};
  for (int64_t b = 0; b < FN(block_count)(task); b++) {
    struct FN(pair) part;
    REAL low_lo;
    FN(sum_block)(task, r, b, p_room, g_room, &sums);
    part.hi = FN(join_lanes)(&sums.dot, &part.lo);
    part.lo += FN(join_lanes)(&sums.low, &low_lo);
    sum = b ? FN(gather)(sum, part) : part;
  }
  return FN(usable)(sum);
}

/* Of short rows, at most LANES: side by side, as the last steps of a sum wait for one another. */
static void FN(sum_rows)(const struct pl_task *task, int64_t r, int64_t rows, REAL *p_room, REAL *g_room,
                         struct FN(pair) * result)
{
  struct FN(products) sums[LANES];
  REAL hi[LANES], lo[LANES], low[LANES], low_lo[LANES];
  for (int64_t i = 0; i < LANES; i++) {
    if (i < rows) {
      FN(sum_block)(task, r + i, 0, p_room, g_room, &sums[i]);
    } else {
      sums[i] = sums[0];
    }
  }
  FN(join_rows)(&sums->dot, sizeof *sums, hi, lo);
  FN(join_rows)(&sums->low, sizeof *sums, low, low_lo);
  for (int64_t i = 0; i < rows; i++) result[i] = FN(usable)((struct FN(pair)){hi[i], lo[i] + low[i]});
}

/* `next_p` and `next_g` are what is needed after this: they are asked for. */
INLINE void FN(slope_block)(const REAL *p, const REAL *g, REAL *result, int64_t n, struct FN(pair) sum, bool log,
                            const REAL *next_p, const REAL *next_g)
{
  const VEC hi = FN(vec_fill)(sum.hi), lo = FN(vec_fill)(sum.lo), zero = FN(vec_fill)(0);
  int64_t c = 0;
#pragma GCC unroll 4
  for (; c + VEC_LANES <= n; c += VEC_LANES) {
    __builtin_prefetch(next_p + c);
    __builtin_prefetch(next_g + c);
    const VEC at = FN(vec_load)(p + c), grad = FN(vec_load)(g + c);
    FN(vec_store)(result + c, log ? FN(log_softmax_slope)(at, grad, hi, lo) : FN(softmax_slope)(at, grad, hi, lo));
  }
  if (c < n) {
    const VEC at = FN(vec_load_part)(p + c, n - c, zero), grad = FN(vec_load_part)(g + c, n - c, zero);
    const VEC slope = log ? FN(log_softmax_slope)(at, grad, hi, lo) : FN(softmax_slope)(at, grad, hi, lo);
    FN(vec_store_part)(result + c, n - c, slope);
  }
}

/* `next`: the row that is asked for while the last block of this one is written. */
static void FN(slope_row)(const struct pl_task *task, int64_t r, int64_t next, int64_t end, struct FN(pair) sum, REAL *p_room,
                          REAL *g_room)
{
  const struct FN(sink) sink = FN(sink_at)(task, r);
  for (int64_t b = 0; b < FN(block_count)(task); b++) {
    const int64_t first = b * BLOCK, n = FN(block_length)(task, b);
    const REAL *p = FN(elements)(task, &task->logits, r, first, n, p_room);
    const REAL *g = FN(elements)(task, &task->grad, r, first, n, g_room);
    const REAL *next_p = FN(next_block)(task, &task->logits, next - 1, first + BLOCK, end, p);
    const REAL *next_g = FN(next_block)(task, &task->grad, next - 1, first + BLOCK, end, g);
    REAL *result = FN(place)(&sink, b, p_room);
    if (task->operation == PL_LOG_SOFTMAX_BACKWARD) {
      FN(slope_block)(p, g, result, n, sum, true, next_p, next_g);
    } else {
      FN(slope_block)(p, g, result, n, sum, false, next_p, next_g);
    }
    FN(put)(&sink, b, p_room, n);
  }
}

/* g p, and in low the product's rounding error. */
static void FN(multiply)(const REAL *p, const REAL *g, REAL *product, REAL *low, int64_t n)
{
  for (int64_t c = 0; c < n; c++) {
    product[c] = g[c] * p[c];
    low[c] = FMA(g[c], p[c], -product[c]);
  }
}

/* LANES short rows at once, [class][row]. */
static void FN(backward_tile)(const struct pl_task *task, int64_t r, int64_t rows, REAL *p, REAL *g, REAL *product, REAL *low)
{
  const bool log = task->operation == PL_LOG_SOFTMAX_BACKWARD;
  const int64_t classes = task->classes, size = classes * LANES;
  REAL sum[LANES], sum_lo[LANES], rest[LANES], rest_lo[LANES];
  if (task->inner == 1) {
    FN(ask_for)(task, &task->logits, r + LANES, rows, false);
    FN(ask_for)(task, &task->grad, r + LANES, rows, false);
    FN(ask_for)(task, &task->out, r, rows, true);
  }
  FN(load_tile)(task, &task->logits, task->dtype, r, rows, p);
  FN(load_tile)(task, &task->grad, task->dtype, r, rows, g);
  if (!log) FN(multiply)(p, g, product, low, size);
  FN(sum_tile)(log ? g : product, classes, sum, sum_lo);
  if (!log) {
    FN(sum_tile)(low, classes, rest, rest_lo);
    for (int l = 0; l < LANES; l++) sum_lo[l] += rest[l];
  }
  for (int l = 0; l < LANES; l++) sum_lo[l] = FN(finite)(sum[l]) ? sum_lo[l] : 0;
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
  if (by_tile) {
    for (int64_t r = begin; r < end; r += LANES)
      FN(backward_tile)(task, r, end - r < LANES ? end - r : LANES, p, g, product, low);
    return;
  }
  /* Both inputs and the results of a batch, half a block each, fit the first-level cache. */
  const int64_t fitting = BLOCK / 2 / task->classes;
  const int64_t batch = fitting < MANY ? 1 : fitting < LANES ? fitting : LANES;
  struct FN(pair) sums[LANES];
  for (int64_t r = begin; r < end; r += batch) {
    const int64_t rows = end - r < batch ? end - r : batch;
    if (rows < MANY) {
      for (int64_t i = 0; i < rows; i++) sums[i] = FN(sum_row)(task, r + i, p, g);
    } else {
      FN(sum_rows)(task, r, rows, p, g, sums);
    }
    for (int64_t i = 0; i < rows; i++) FN(slope_row)(task, r + i, r + i + rows, end, sums[i], p, g);
  }
  pl_stream_end();
}
