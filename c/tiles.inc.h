/* LANES short rows at once, once for float and once for double: the tree of rows.inc.h with the rows in the lanes. A tile
 * holds [class][row], so that a step of the tree is one vector operation for all its rows. */

/* Pointers to the rows of a tile; true where they lie side by side, as with a class axis that is not the last. */
static bool FN(row_pointers)(const struct pl_task *task, const struct pl_view *view, int64_t r, int64_t rows, int dtype,
                             char **base)
{
  bool adjacent = true;
  base[0] = FN(row_at)(task, view, r);
  for (int64_t l = 1; l < rows; l++) {
    base[l] = FN(row_at)(task, view, r + l);
    adjacent &= base[l] == base[0] + l * pl_itemsize(dtype);
  }
  return adjacent;
}

/* Whether rows are contiguous and long enough to be moved in blocks of ACROSS x ACROSS. */
static inline bool FN(in_blocks)(int64_t classes, int64_t stride, int dtype)
{
  return dtype == NATIVE_DTYPE && stride == (int64_t)sizeof(REAL) && classes >= ACROSS;
}

/* Missing rows of the last tile are zeros. */
static void FN(load_tile)(const struct pl_task *task, const struct pl_view *view, int dtype, int64_t r, int64_t rows, REAL *x)
{
  char *base[LANES];
  const bool adjacent = FN(row_pointers)(task, view, r, rows, dtype, base);
  const int64_t classes = task->classes;
  int64_t l = 0;
  if (rows < LANES) memset(x, 0, (size_t)(classes * LANES) * sizeof *x);
  if (adjacent) {
    for (int64_t c = 0; c < classes; c++)
      FN(load_many)(x + c * LANES, base[0] + c * view->classes, pl_itemsize(dtype), rows, dtype);
    return;
  }
  if (FN(in_blocks)(classes, view->classes, dtype)) {
    for (; l + ACROSS <= rows; l += ACROSS) {
      for (int64_t c = 0; c < classes; c += ACROSS) {
        const int64_t at = c + ACROSS <= classes ? c : classes - ACROSS; /* the last block overlaps the one before */
        FN(quad) q[ACROSS];
        for (int i = 0; i < ACROSS; i++) memcpy(&q[i], base[l + i] + at * (int64_t)sizeof(REAL), sizeof *q);
        FN(transpose)(q);
        for (int i = 0; i < ACROSS; i++) memcpy(x + (at + i) * LANES + l, &q[i], sizeof *q);
      }
    }
  }
  for (; l < rows; l++)
    for (int64_t c = 0; c < classes; c++) x[c * LANES + l] = FN(load)(base[l] + c * view->classes, dtype);
}

static void FN(store_tile)(const struct pl_task *task, int64_t r, int64_t rows, const REAL *x)
{
  char *base[LANES];
  const int dtype = task->out_dtype;
  const int64_t classes = task->classes, stride = task->out.classes;
  int64_t l = 0;
  if (FN(row_pointers)(task, &task->out, r, rows, dtype, base)) {
    for (int64_t c = 0; c < classes; c++) FN(store_many)(base[0] + c * stride, x + c * LANES, pl_itemsize(dtype), rows, dtype);
    return;
  }
  if (FN(in_blocks)(classes, stride, dtype)) {
    for (; l + ACROSS <= rows; l += ACROSS) {
      for (int64_t c = 0; c < classes; c += ACROSS) {
        const int64_t at = c + ACROSS <= classes ? c : classes - ACROSS;
        FN(quad) q[ACROSS];
        for (int i = 0; i < ACROSS; i++) memcpy(&q[i], x + (at + i) * LANES + l, sizeof *q);
        FN(transpose)(q);
        for (int i = 0; i < ACROSS; i++) memcpy(base[l + i] + at * (int64_t)sizeof(REAL), &q[i], sizeof *q);
      }
    }
  }
  for (; l < rows; l++)
    for (int64_t c = 0; c < classes; c++) FN(store)(base[l] + c * stride, x[c * LANES + l], dtype);
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

/* e holds the terms of the sum, those of the maximum counted in ones; `keep` leaves every term in `terms` as well. */
INLINE void FN(exp_lines)(const REAL *x, REAL *e, REAL *terms, int64_t classes, const struct FN(origin) * o, bool keep,
                          REAL *ones)
{
  const VEC one = FN(vec_fill)(1);
  VEC count = FN(vec_fill)(0);
#pragma GCC unroll 4
  for (int64_t c = 0; c < classes * LANES; c += LANES) {
    const VEC logits = FN(vec_load)(x + c);
    const VEC term = FN(terms)(logits, o);
    count = count + (one - FN(vec_unless_equal)(one, logits, o->max));
    FN(vec_store)(e + c, FN(vec_unless_equal)(term, logits, o->max));
    if (keep) FN(vec_store)(terms + c, term);
  }
  FN(vec_store)(ones, count);
}

/* Step 1; `keep` leaves the terms in x, in place of the logits. */
static void FN(exp_tile)(REAL *x, REAL *e, int64_t classes, struct FN(temperature) t, bool keep, REAL *max, REAL *ones)
{
  const REAL *from = x;
  const bool plain = t.inverse == 1 && t.inverse_lo == 0;
  REAL near[LANES];
  int any_far = 0;
  EACH_VEC(v)
  {
    VEC top = FN(vec_load)(x + v);
    for (int64_t c = LANES + v; c < classes * LANES; c += LANES) top = FN(vec_larger)(FN(vec_load)(x + c), top);
    FN(vec_store)(max + v, top);
  }
  for (int l = 0; l < LANES; l++) {
    const int far = plain & FN(finite)(max[l]) & ((max[l] >= FAR) | (max[l] <= -FAR));
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
    struct FN(origin) o = FN(origin_at)(FN(vec_load)(near + v), t);
    if (!plain) {
      FN(exp_lines)(from + v, e + v, x + v, classes, &o, keep, ones + v);
      continue;
    }
    o.plain = true; /* as the compiler now knows */
    if (keep) {
      FN(exp_lines)(from + v, e + v, x + v, classes, &o, true, ones + v);
    } else {
      FN(exp_lines)(from + v, e + v, x + v, classes, &o, false, ones + v);
    }
  }
}

/* One result a row. */
static void FN(store_line)(const struct pl_task *task, int64_t r, int64_t rows, const REAL *result)
{
  char *base[LANES];
  const int dtype = task->out_dtype;
  if (FN(row_pointers)(task, &task->out, r, rows, dtype, base)) {
    FN(store_many)(base[0], result, pl_itemsize(dtype), rows, dtype);
  } else {
    for (int64_t l = 0; l < rows; l++) FN(store)(base[l], result[l], dtype);
  }
}

/* Steps 2 and 3: the sums over the classes of each row, as pairs. */
static void FN(sum_tile)(const REAL *restrict e, int64_t classes, REAL *restrict sum, REAL *restrict sum_lo)
{
  static const REAL zeros[LANES] = {0};
  REAL s[LANES][LANES], s_lo[LANES][LANES]; /* [lane of the tree][row] */
  const int64_t used = classes < LANES ? classes : LANES;
  memcpy(s, e, sizeof s[0] * (size_t)used); /* the first line of each lane, added to zeros */
  memset(s_lo, 0, sizeof s_lo[0] * (size_t)used);
  for (int64_t c = classes > LANES ? 0 : classes; c < classes; c += GROUP) {
    for (int64_t j = 0; j < LANES && c + j < classes; j++) {
      const REAL *line[LINES_PER_GROUP];
      for (int64_t i = 0; i < LINES_PER_GROUP; i++) {
        const int64_t from = c + i * LANES + j;
        line[i] = from < classes ? e + from * LANES : zeros;
      }
      for (int l = 0; l < LANES; l++) {
        REAL lo;
        const REAL before = c ? s[j][l] : 0;
        s[j][l] = FN(two_sum)(before, (line[0][l] + line[1][l]) + (line[2][l] + line[3][l]), &lo);
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

/* A tile under way. */
struct FN(tile) {
  int64_t r, rows;
  REAL *x, *e; /* [class][row] */
  REAL max[LANES], ones[LANES], sum[LANES], sum_lo[LANES];
  struct FN(closings) f;
};

static void FN(close_tile)(const struct pl_task *task, struct FN(tile) * tile)
{
  int infinite = 0;
  for (int l = 0; l < LANES; l++) {
    tile->sum[l] = FN(add_ones)(tile->sum[l], tile->sum_lo[l], tile->ones[l], &tile->sum_lo[l]);
    infinite |= !FN(finite)(tile->max[l]);
  }
  if (infinite) FN(spoil_tile)(tile->x, task->classes, tile->max, tile->sum, tile->sum_lo);
  FN(close_rows)(task->operation, tile->max, tile->sum, tile->sum_lo, &tile->f);
}

static int64_t FN(write_tile)(const struct pl_task *task, struct FN(tile) * tile, struct FN(temperature) t)
{
  const int64_t classes = task->classes, r = tile->r, rows = tile->rows;
  REAL *x = tile->x, *e = tile->e;
  REAL result[LANES];
  int64_t bad = -1;

  switch (task->operation) {
    case PL_SOFTMAX:
      for (int64_t c = 0; c < classes; c++)
        for (int l = 0; l < LANES; l++) x[c * LANES + l] = FN(probability)(x[c * LANES + l], FN(closing_of)(&tile->f, l));
      FN(mask_tile)(task, r, rows, x, 0);
      FN(store_tile)(task, r, rows, x);
      return -1;
    case PL_LOG_SOFTMAX:
      for (int64_t c = 0; c < classes; c++)
        for (int l = 0; l < LANES; l++)
          x[c * LANES + l] = FN(log_probability)(x[c * LANES + l], tile->max[l], FN(closing_of)(&tile->f, l), t);
      FN(mask_tile)(task, r, rows, x, -INFINITY);
      FN(store_tile)(task, r, rows, x);
      return -1;
    case PL_LOGSUMEXP:
      for (int l = 0; l < LANES; l++) result[l] = FN(log_sum)(tile->max[l], tile->sum[l], FN(closing_of)(&tile->f, l), t);
      break;
    case PL_SOFTMAX_CROSS_ENTROPY: {
      REAL mass[LANES], mass_lo[LANES], dot[LANES], dot_lo[LANES], low[LANES], low_lo[LANES];
      FN(load_tile)(task, &task->labels, task->dtype, r, rows, e);
      FN(sum_tile)(e, classes, mass, mass_lo);
      for (int64_t c = 0; c < classes; c++)
        for (int l = 0; l < LANES; l++) x[c * LANES + l] = FN(weigh)(x[c * LANES + l], &e[c * LANES + l], tile->max[l]);
      FN(sum_tile)(x, classes, dot, dot_lo);
      FN(sum_tile)(e, classes, low, low_lo);
      for (int l = 0; l < LANES; l++)
        result[l] = FN(dense_loss)(dot[l], dot_lo[l] + low[l], mass[l], mass_lo[l], FN(closing_of)(&tile->f, l));
      break;
    }
    default: /* PL_SELECTIVE_LOG_SOFTMAX and PL_SPARSE_SOFTMAX_CROSS_ENTROPY */
      for (int64_t k = 0; k < task->picks; k++) {
        for (int64_t l = 0; l < LANES; l++) {
          const int64_t label = l < rows ? FN(label)(task, r + l, k) : 0;
          const bool inside = label >= 0 && label < classes;
          result[l] = inside ? x[label * LANES + l] : NAN;
          if (!inside && bad == -1) bad = FN(flat_label)(task, r + l, k);
        }
        for (int l = 0; l < LANES; l++)
          result[l] = FN(log_probability)(result[l], tile->max[l], FN(closing_of)(&tile->f, l), t);
        if (task->operation == PL_SPARSE_SOFTMAX_CROSS_ENTROPY) {
          for (int l = 0; l < LANES; l++) result[l] = 0 - result[l]; /* so that a certain row's loss is not -0 */
          FN(store_line)(task, r, rows, result);
        } else {
          for (int64_t l = 0; l < rows; l++) FN(store_pick)(task, FN(row_at)(task, &task->out, r + l), k, result[l]);
        }
      }
      return bad;
  }
  FN(store_line)(task, r, rows, result);
  return -1;
}

/* Step by step, so that the operations of a step, each waiting for the one before, overlap with the other tiles'. */
static int64_t FN(run_tiles)(const struct pl_task *task, int64_t r, int64_t rows, struct FN(temperature) t,
                             struct FN(tile) * tiles, int64_t count)
{
  int64_t bad = -1;
  for (int64_t i = 0; i < count; i++) {
    struct FN(tile) *tile = &tiles[i];
    tile->r = r + i * LANES;
    tile->rows = rows - i * LANES < LANES ? rows - i * LANES : LANES;
    FN(load_tile)(task, &task->logits, task->dtype, tile->r, tile->rows, tile->x);
    FN(mask_tile)(task, tile->r, tile->rows, tile->x, -INFINITY);
  }
  for (int64_t i = 0; i < count; i++)
    FN(exp_tile)(tiles[i].x, tiles[i].e, task->classes, t, task->operation == PL_SOFTMAX, tiles[i].max, tiles[i].ones);
  for (int64_t i = 0; i < count; i++) FN(sum_tile)(tiles[i].e, task->classes, tiles[i].sum, tiles[i].sum_lo);
  for (int64_t i = 0; i < count; i++) FN(close_tile)(task, &tiles[i]);
  for (int64_t i = 0; i < count; i++) {
    const int64_t found = FN(write_tile)(task, &tiles[i], t);
    if (bad == -1) bad = found;
  }
  return bad;
}
