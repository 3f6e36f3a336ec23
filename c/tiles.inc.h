/* LANES short rows at once, once for float and once for double: the tree of rows.inc.h with the rows in the lanes. A tile
 * holds [class][row], so that a step of the tree is one vector operation for all its rows. */

/* Pointers to the rows of a tile; true where they lie side by side, as with a class axis that is not the last. */
static bool FN(row_pointers)(const struct pl_task *task, const struct pl_view *view, int64_t r, int64_t rows, int dtype,
                             char **base)
{
  bool adjacent = true;
  for (int64_t l = 0; l < rows; l++) {
    base[l] = FN(row_at)(task, view, r + l);
    adjacent &= base[l] == base[0] + l * pl_itemsize(dtype);
  }
  return adjacent;
}

/* Missing rows of the last tile are zeros. */
static void FN(load_tile)(const struct pl_task *task, const struct pl_view *view, int dtype, int64_t r, int64_t rows, REAL *x)
{
  char *base[LANES];
  const bool adjacent = FN(row_pointers)(task, view, r, rows, dtype, base);
  const int64_t classes = task->classes;
  if (rows < LANES) memset(x, 0, (size_t)(classes * LANES) * sizeof *x);
  if (adjacent) {
    for (int64_t c = 0; c < classes; c++)
      FN(load_many)(x + c * LANES, base[0] + c * view->classes, pl_itemsize(dtype), rows, dtype);
  } else if (dtype == NATIVE_DTYPE) {
    for (int64_t l = 0; l < rows; l++)
      for (int64_t c = 0; c < classes; c++) x[c * LANES + l] = FN(load)(base[l] + c * view->classes, NATIVE_DTYPE);
  } else {
    for (int64_t l = 0; l < rows; l++)
      for (int64_t c = 0; c < classes; c++) x[c * LANES + l] = FN(load)(base[l] + c * view->classes, dtype);
  }
}

static void FN(store_tile)(const struct pl_task *task, int64_t r, int64_t rows, const REAL *x)
{
  char *base[LANES];
  const int dtype = task->out_dtype;
  const int64_t classes = task->classes, stride = task->out.classes;
  if (FN(row_pointers)(task, &task->out, r, rows, dtype, base)) {
    for (int64_t c = 0; c < classes; c++) FN(store_many)(base[0] + c * stride, x + c * LANES, pl_itemsize(dtype), rows, dtype);
  } else if (dtype == NATIVE_DTYPE) {
    for (int64_t l = 0; l < rows; l++)
      for (int64_t c = 0; c < classes; c++) FN(store)(base[l] + c * stride, x[c * LANES + l], NATIVE_DTYPE);
  } else {
    for (int64_t l = 0; l < rows; l++)
      for (int64_t c = 0; c < classes; c++) FN(store)(base[l] + c * stride, x[c * LANES + l], dtype);
  }
}

/* Masked elements become `fill`. */
static void FN(mask_tile)(const struct pl_task *task, int64_t r, int64_t rows, REAL *x, REAL fill)
{
  if (!task->where.data) return;
  for (int64_t l = 0; l < rows; l++) {
    const char *where = FN(row_at)(task, &task->where, r + l);
    for (int64_t c = 0; c < task->classes; c++)
      if (!where[c * task->where.classes]) x[c * LANES + l] = fill;
  }
}

/* Step 1. e holds the terms of the sum, those of the maximum counted in ones; `keep` leaves every term in x as well. */
static void FN(exp_tile)(REAL *x, REAL *e, int64_t classes, struct FN(temperature) t, bool keep, REAL *max, REAL *ones)
{
  const REAL *from = x;
  REAL near[LANES];
  bool any_far = false;
  for (int l = 0; l < LANES; l++) max[l] = x[l];
  for (int64_t c = 1; c < classes; c++)
    for (int l = 0; l < LANES; l++) max[l] = x[c * LANES + l] > max[l] ? x[c * LANES + l] : max[l];
  for (int l = 0; l < LANES; l++) {
    const bool far = FN(is_far)(max[l], t);
    near[l] = far ? 0 : max[l];
    any_far |= far;
  }
  if (any_far) {
    for (int64_t c = 0; c < classes; c++)
      for (int l = 0; l < LANES; l++) e[c * LANES + l] = x[c * LANES + l] - (max[l] - near[l]);
    from = e;
  }
  EACH_VEC(v)
  {
    const VEC one = FN(vec_fill)(1);
    const struct FN(origin) o = FN(origin_at)(FN(vec_load)(near + v), t);
    VEC count = FN(vec_fill)(0);
    for (int64_t c = v; c < classes * LANES; c += LANES) {
      const VEC logits = FN(vec_load)(from + c);
      const VEC term = FN(terms)(logits, &o);
      count = count + (one - FN(vec_unless_equal)(one, logits, o.max));
      FN(vec_store)(e + c, FN(vec_unless_equal)(term, logits, o.max));
      if (keep) FN(vec_store)(x + c, term);
    }
    FN(vec_store)(ones + v, count);
  }
}

/* Steps 2 and 3: the sums over the classes of each row, as pairs. */
static void FN(sum_tile)(const REAL *restrict e, int64_t classes, REAL *restrict sum, REAL *restrict sum_lo)
{
  static const REAL zeros[LANES] = {0};
  REAL s[LANES][LANES], s_lo[LANES][LANES]; /* [lane of the tree][row] */
  const int64_t used = classes < LANES ? classes : LANES;
  memset(s, 0, sizeof s[0] * (size_t)used);
  memset(s_lo, 0, sizeof s_lo[0] * (size_t)used);
  for (int64_t c = 0; c < classes; c += GROUP) {
    for (int64_t j = 0; j < LANES && c + j < classes; j++) {
      const REAL *line[LINES_PER_GROUP];
      for (int64_t i = 0; i < LINES_PER_GROUP; i++) {
        const int64_t from = c + i * LANES + j;
        line[i] = from < classes ? e + from * LANES : zeros;
      }
      for (int l = 0; l < LANES; l++) {
        REAL lo;
        s[j][l] = FN(two_sum)(s[j][l], (line[0][l] + line[1][l]) + (line[2][l] + line[3][l]), &lo);
        s_lo[j][l] += lo;
      }
    }
  }
  for (int64_t half = LANES / 2; half; half /= 2) {
    for (int64_t j = 0; j < half && j + half < used; j++) {
      for (int l = 0; l < LANES; l++) {
        REAL lo;
        s[j][l] = FN(two_sum)(s[j][l], s[j + half][l], &lo);
        s_lo[j][l] = (s_lo[j][l] + s_lo[j + half][l]) + lo;
      }
    }
  }
  for (int l = 0; l < LANES; l++) {
    REAL lo;
    const REAL hi = FN(fast_two_sum)(s[0][l], s_lo[0][l], &lo);
    const bool finite = FN(finite)(s[0][l]);
    sum[l] = finite ? hi : s[0][l];
    sum_lo[l] = finite ? lo : 0;
  }
}

/* As in reduce_block: a row without a finite maximum has no sum, but a NaN in it must show. */
static void FN(spoil_tile)(const REAL *x, int64_t classes, const REAL *max, REAL *sum, REAL *sum_lo)
{
  for (int l = 0; l < LANES; l++) {
    if (FN(finite)(max[l])) continue;
    sum[l] = sum_lo[l] = 0;
    for (int64_t c = 0; c < classes; c++)
      if (x[c * LANES + l] != x[c * LANES + l]) sum[l] = x[c * LANES + l];
  }
}

static int64_t FN(run_tile)(const struct pl_task *task, int64_t r, int64_t rows, struct FN(temperature) t,
                            struct FN(scratch) * scratch)
{
  const int64_t classes = task->classes;
  const bool keep = task->operation == PL_SOFTMAX;
  REAL *x = scratch->x, *e = scratch->e;
  REAL max[LANES], ones[LANES], sum[LANES], sum_lo[LANES], result[LANES];
  int64_t bad = -1;

  FN(load_tile)(task, &task->logits, task->dtype, r, rows, x);
  FN(mask_tile)(task, r, rows, x, -INFINITY);
  FN(exp_tile)(x, e, classes, t, keep, max, ones);
  FN(sum_tile)(e, classes, sum, sum_lo);
  int infinite = 0;
  for (int l = 0; l < LANES; l++) {
    sum[l] = FN(add_ones)(sum[l], sum_lo[l], ones[l], &sum_lo[l]);
    infinite |= !FN(finite)(max[l]);
  }
  if (infinite) FN(spoil_tile)(x, classes, max, sum, sum_lo);
  struct FN(closings) f;
  FN(close_rows)(task->operation, max, sum, sum_lo, &f);

  switch (task->operation) {
    case PL_SOFTMAX:
      for (int64_t c = 0; c < classes; c++)
        for (int l = 0; l < LANES; l++) x[c * LANES + l] = FN(probability)(x[c * LANES + l], FN(closing_of)(&f, l));
      FN(mask_tile)(task, r, rows, x, 0);
      FN(store_tile)(task, r, rows, x);
      return -1;
    case PL_LOG_SOFTMAX:
      for (int64_t c = 0; c < classes; c++)
        for (int l = 0; l < LANES; l++) x[c * LANES + l] = FN(log_probability)(x[c * LANES + l], max[l], FN(closing_of)(&f, l), t);
      FN(mask_tile)(task, r, rows, x, -INFINITY);
      FN(store_tile)(task, r, rows, x);
      return -1;
    case PL_LOGSUMEXP:
      for (int l = 0; l < LANES; l++) result[l] = FN(log_sum)(max[l], sum[l], FN(closing_of)(&f, l), t);
      break;
    case PL_SOFTMAX_CROSS_ENTROPY: {
      REAL mass[LANES], mass_lo[LANES], dot[LANES], dot_lo[LANES], low[LANES], low_lo[LANES];
      FN(load_tile)(task, &task->labels, task->dtype, r, rows, e);
      FN(sum_tile)(e, classes, mass, mass_lo);
      for (int64_t c = 0; c < classes; c++)
        for (int l = 0; l < LANES; l++) x[c * LANES + l] = FN(weigh)(x[c * LANES + l], &e[c * LANES + l], max[l]);
      FN(sum_tile)(x, classes, dot, dot_lo);
      FN(sum_tile)(e, classes, low, low_lo);
      for (int l = 0; l < LANES; l++) result[l] = FN(dense_loss)(dot[l], dot_lo[l] + low[l], mass[l], mass_lo[l], FN(closing_of)(&f, l));
      break;
    }
    default: /* PL_SELECTIVE_LOG_SOFTMAX and PL_SPARSE_SOFTMAX_CROSS_ENTROPY */
      for (int64_t l = 0; l < rows; l++) {
        char *out = FN(row_at)(task, &task->out, r + l);
        for (int64_t k = 0; k < task->picks; k++) {
          const int64_t label = FN(label)(task, r + l, k);
          const bool inside = label >= 0 && label < classes;
          const REAL picked = inside ? x[label * LANES + l] : NAN;
          if (!inside) bad = FN(flat_label)(task, r + l, k);
          FN(store_pick)(task, out, k, FN(log_probability)(picked, max[l], FN(closing_of)(&f, l), t));
        }
      }
      return bad;
  }
  for (int64_t l = 0; l < rows; l++) FN(store)(FN(row_at)(task, &task->out, r + l), result[l], task->out_dtype);
  return -1;
}
