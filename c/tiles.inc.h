/* LANES short rows at once, once for float and once for double: the tree of rows.inc.h with the rows in the lanes. A tile
 * holds [class][row], so that a step of the tree is one vector operation for all its rows. */

/* The same class of `count` full tiles is one strip of memory, and is moved as one: class by class and tile by tile, each line
 * of a tall array would come from another page. */
static void FN(load_strips)(const struct pl_task *task, const struct pl_view *view, int64_t r, int64_t count, REAL *const *x)
{
  const char *base = FN(row_at)(task, view, r);
  for (int64_t c = 0; c < task->classes; c++, base += view->classes)
    for (int64_t i = 0; i < count; i++) EACH_VEC(v)
  FN(vec_store)(x[i] + c * LANES + v, FN(vec_load)((const REAL *)(const void *)base + i * LANES + v));
}

static void FN(store_strips)(const struct pl_task *task, const struct pl_view *view, int64_t r, int64_t count, REAL *const *x)
{
  char *base = FN(row_at)(task, view, r);
  for (int64_t c = 0; c < task->classes; c++, base += view->classes)
    for (int64_t i = 0; i < count; i++)
      EACH_VEC(v) FN(vec_store)((REAL *)(void *)base + i * LANES + v, FN(vec_load)(x[i] + c * LANES + v));
}

/* Whether rows are contiguous and long enough to be moved in blocks of VEC_LANES rows x ACROSS classes. */
static inline bool FN(in_blocks)(const struct pl_task *task, const struct pl_view *view, int dtype, int64_t r, int64_t rows)
{
  const bool contiguous = dtype == NATIVE_DTYPE && view->classes == (int64_t)sizeof(REAL);
  return contiguous && task->classes >= ACROSS && FN(in_step)(task, r, rows);
}

/* Whether rows follow one another without a gap. */
static inline bool FN(in_one_run)(const struct pl_task *task, const struct pl_view *view, int64_t r, int64_t rows)
{
  return FN(step)(task, view) == task->classes * view->classes && FN(in_step)(task, r, rows);
}

/* Rows of another type that are contiguous, and short: they are converted, and then moved in blocks. Element by element it
 * took two to eight times as long. */
#define SHORT_ROW 128
static inline bool FN(is_converted)(const struct pl_task *task, const struct pl_view *view, int dtype)
{
  return dtype != NATIVE_DTYPE && view->classes == pl_itemsize(dtype) && task->classes <= SHORT_ROW;
}

/* The task whose logits are such rows, converted. */
static struct pl_task FN(rows_in)(REAL *room, int64_t classes)
{
  const int64_t size = (int64_t)sizeof(REAL);
  return (struct pl_task){.classes = classes, .inner = 1, .logits = {room, classes * size, size, size}};
}

/* Whether a full tile of fewer classes than a block has lies in one piece: with their number known, the compiler moves it in
 * vectors (floats of 2 or 3 classes in half the time; doubles are blocks). */
static inline bool FN(in_one_piece)(const struct pl_task *task, const struct pl_view *view, int dtype, int64_t rows)
{
  const int64_t size = (int64_t)sizeof(REAL), classes = task->classes;
  const bool adjacent = task->inner == 1 && view->classes == size && view->outer == classes * size;
  return adjacent && rows == LANES && dtype == NATIVE_DTYPE && (classes == 2 || classes == 3) && classes < ACROSS;
}

INLINE void FN(load_piece)(REAL *x, const char *from, int64_t classes)
{
  REAL piece[LANES * 3];
  memcpy(piece, from, (size_t)(LANES * classes) * sizeof *piece);
  for (int64_t c = 0; c < classes; c++)
    for (int l = 0; l < LANES; l++) x[c * LANES + l] = piece[l * classes + c];
}

INLINE void FN(store_piece)(char *to, const REAL *x, int64_t classes)
{
  REAL piece[LANES * 3];
  for (int l = 0; l < LANES; l++)
    for (int64_t c = 0; c < classes; c++) piece[l * classes + c] = x[c * LANES + l];
  memcpy(to, piece, (size_t)(LANES * classes) * sizeof *piece);
}

/* Missing rows of the last tile are zeros. */
static void FN(load_tile)(const struct pl_task *task, const struct pl_view *view, int dtype, int64_t r, int64_t rows, REAL *x)
{
  const int64_t classes = task->classes, step = FN(step)(task, view);
  const char *first = FN(row_at)(task, view, r);
  int64_t l = 0;
  if (rows < LANES) memset(x, 0, (size_t)(classes * LANES) * sizeof *x);
  if (FN(adjacent)(task, view, r, rows, dtype)) {
    if (rows == LANES && dtype == NATIVE_DTYPE) {
      FN(load_strips)(task, view, r, 1, &x);
      return;
    }
    for (int64_t c = 0; c < classes; c++)
      FN(load_many)(x + c * LANES, first + c * view->classes, pl_itemsize(dtype), rows, dtype);
    return;
  }
  if (FN(in_one_piece)(task, view, dtype, rows)) {
    if (classes == 2) {
      FN(load_piece)(x, first, 2);
    } else {
      FN(load_piece)(x, first, 3);
    }
    return;
  }
  if (FN(is_converted)(task, view, dtype)) {
    REAL room[LANES * SHORT_ROW];
    const struct pl_task native = FN(rows_in)(room, classes);
    const int64_t each = FN(in_one_run)(task, view, r, rows) ? rows : 1;
    for (; l < rows; l += each)
      FN(load_many)(room + l * classes, FN(row_at)(task, view, r + l), view->classes, each * classes, dtype);
    FN(load_tile)(&native, &native.logits, NATIVE_DTYPE, 0, rows, x);
    return;
  }
  if (FN(in_blocks)(task, view, dtype, r, rows)) {
    const int64_t last = classes - ACROSS; /* this block overlaps the one before */
    for (; l + VEC_LANES <= rows; l += VEC_LANES) {
      const char *row = first + l * step;
      for (int64_t c = 0; c < last; c += ACROSS) FN(load_block)(x + c * LANES + l, row + c * (int64_t)sizeof(REAL), step);
      FN(load_block)(x + last * LANES + l, row + last * (int64_t)sizeof(REAL), step);
    }
  }
  for (; l < rows; l++) {
    const char *row = FN(row_at)(task, view, r + l);
    for (int64_t c = 0; c < classes; c++) x[c * LANES + l] = FN(load)(row + c * view->classes, dtype);
  }
}

static void FN(store_tile)(const struct pl_task *task, const struct pl_view *view, int dtype, int64_t r, int64_t rows, REAL *x)
{
  const int64_t classes = task->classes, step = FN(step)(task, view);
  char *first = FN(row_at)(task, view, r);
  int64_t l = 0;
  if (FN(adjacent)(task, view, r, rows, dtype)) {
    if (rows == LANES && dtype == NATIVE_DTYPE) {
      FN(store_strips)(task, view, r, 1, &x);
      return;
    }
    for (int64_t c = 0; c < classes; c++)
      FN(store_many)(first + c * view->classes, x + c * LANES, pl_itemsize(dtype), rows, dtype);
    return;
  }
  if (FN(in_one_piece)(task, view, dtype, rows)) {
    if (classes == 2) {
      FN(store_piece)(first, x, 2);
    } else {
      FN(store_piece)(first, x, 3);
    }
    return;
  }
  if (FN(is_converted)(task, view, dtype)) {
    REAL room[LANES * SHORT_ROW];
    const struct pl_task native = FN(rows_in)(room, classes);
    const int64_t each = FN(in_one_run)(task, view, r, rows) ? rows : 1;
    FN(store_tile)(&native, &native.logits, NATIVE_DTYPE, 0, rows, x);
    for (; l < rows; l += each)
      FN(store_many)(FN(row_at)(task, view, r + l), room + l * classes, view->classes, each * classes, dtype);
    return;
  }
  if (FN(in_blocks)(task, view, dtype, r, rows)) {
    const int64_t last = classes - ACROSS;
    for (; l + VEC_LANES <= rows; l += VEC_LANES) {
      char *row = first + l * step;
      for (int64_t c = 0; c < last; c += ACROSS) FN(store_block)(row + c * (int64_t)sizeof(REAL), step, x + c * LANES + l);
      FN(store_block)(row + last * (int64_t)sizeof(REAL), step, x + last * LANES + l);
    }
  }
  for (; l < rows; l++) {
    char *row = FN(row_at)(task, view, r + l);
    for (int64_t c = 0; c < classes; c++) FN(store)(row + c * view->classes, x[c * LANES + l], dtype);
  }
}

/* Whether all rows have the same mask. */
static inline bool FN(masked_by_class)(const struct pl_task *task)
{
  return task->where.outer == 0 && (task->inner == 1 || task->where.inner == 0);
}

/* Masked elements become `fill`. */
static void FN(mask_tile)(const struct pl_task *task, int64_t r, int64_t rows, REAL *x, REAL fill)
{
  if (!task->where.data) return;
  if (FN(masked_by_class)(task)) {
    const char *where = task->where.data;
    for (int64_t c = 0; c < task->classes; c++)
      if (!where[c * task->where.classes]) EACH_VEC(v) FN(vec_store)(x + c * LANES + v, FN(vec_fill)(fill));
    return;
  }
  for (int64_t l = 0; l < rows; l++) {
    const char *where = FN(row_at)(task, &task->where, r + l);
    for (int64_t c = 0; c < task->classes; c++) x[c * LANES + l] = where[c * task->where.classes] ? x[c * LANES + l] : fill;
  }
}

/* The terms of one class of LANES rows, but for those of the maximum, which are counted; `keep` leaves all in place of the
 * logits. */
INLINE struct FN(parts) FN(take_class)(REAL *x, const struct FN(origin) * o, VEC shift, bool keep, VEC *ones)
{
  const VEC one = FN(vec_fill)(1), logits = FN(vec_load)(x) - shift;
  struct FN(parts) term = FN(parts_of)(logits, o);
  if (keep) FN(vec_store)(x, term.value);
  FN(leave_out)(&term, logits, o->max);
  *ones = *ones + (one - FN(vec_unless_equal)(one, logits, o->max));
  return term;
}

/* Steps 1 and 2 for the rows of one vector, the maxima given: lane by lane. The first term of a lane is what adding it to 0
 * would give. */
INLINE void FN(plant)(REAL *x, int64_t classes, const struct FN(origin) * o, VEC shift, bool keep, REAL *sum, REAL *lo,
                      REAL *ones)
{
  VEC count = FN(vec_fill)(0);
  for (int64_t j = 0; j < LANES && j < classes; j++) {
    const struct FN(parts) first = FN(take_class)(x + j * LANES, o, shift, keep, &count);
    VEC total = first.value, total_lo = FN(vec_fma)(first.less_one, first.scale, first.scale - total);
    for (int64_t c = j + LANES; c < classes; c += LANES)
      FN(add_term)(&total, &total_lo, FN(take_class)(x + c * LANES, o, shift, keep, &count));
    FN(vec_store)(sum + j * LANES, total);
    FN(vec_store)(lo + j * LANES, total_lo);
  }
  FN(vec_store)(ones, count);
}

/* The sum of a group of numbers that are no exponentials is added to its lane; the first one is all that is there. */
INLINE void FN(add_group_to_lane)(REAL *lane, REAL *lane_lo, VEC sum, bool first)
{
  const VEC zero = FN(vec_fill)(0);
  if (first) {
    FN(vec_store)(lane, sum);
    FN(vec_store)(lane_lo, zero);
  } else {
    FN(add_to_lane)(lane, lane_lo, sum, zero);
  }
}

static void FN(maximum_of_tile)(const REAL *x, int64_t classes, REAL *max)
{
  EACH_VEC(v)
  {
    VEC top = FN(vec_load)(x + v);
    for (int64_t c = LANES + v; c < classes * LANES; c += LANES) top = FN(vec_larger)(FN(vec_load)(x + c), top);
    FN(vec_store)(max + v, top);
  }
}

/* Rows with a large maximum are moved by it, see origin. */
INLINE void FN(split_maxima)(const REAL *max, struct FN(temperature) t, REAL *near, REAL *shift)
{
  for (int l = 0; l < LANES; l++) {
    const REAL scaled = max[l] * t.inverse;
    const int far = FN(finite)(max[l]) & ((scaled >= FAR) | (scaled <= -FAR));
    near[l] = far ? 0 : max[l];
    shift[l] = far ? max[l] : 0;
  }
}

/* The terms of a logit of each row. */
static void FN(term_of_each)(const REAL *x, const REAL *max, struct FN(temperature) t, REAL *terms)
{
  REAL near[LANES], shift[LANES];
  FN(split_maxima)(max, t, near, shift);
  EACH_VEC(v)
  {
    const struct FN(origin) o = FN(origin_at)(FN(vec_load)(near + v), t);
    FN(vec_store)(terms + v, FN(terms)(FN(vec_load)(x + v) - FN(vec_load)(shift + v), &o));
  }
}

/* Steps 1 and 2, the maxima given. */
static void FN(plant_tile)(REAL *x, int64_t classes, struct FN(temperature) t, bool keep, const REAL *max,
                           struct FN(tree) * tree, REAL *ones)
{
  const bool plain = FN(is_plain)(t);
  REAL near[LANES], shift[LANES];
  FN(split_maxima)(max, t, near, shift);
  EACH_VEC(v)
  {
    struct FN(origin) o = FN(origin_at)(FN(vec_load)(near + v), t);
    const VEC by = FN(vec_load)(shift + v);
    REAL *sum = tree->sum[0] + v, *lo = tree->lo[0] + v;
    if (!plain) {
      FN(plant)(x + v, classes, &o, by, keep, sum, lo, ones + v);
      continue;
    }
    o.plain = true; /* as the compiler now knows */
    if (keep) {
      FN(plant)(x + v, classes, &o, by, true, sum, lo, ones + v);
    } else {
      FN(plant)(x + v, classes, &o, by, false, sum, lo, ones + v);
    }
  }
}

/* Steps 2 and 3 for numbers that are no exponentials. */
static void FN(sum_tile)(const REAL *e, int64_t classes, REAL *sum, REAL *sum_lo)
{
  static const REAL zeros[LANES];
  struct FN(tree) tree;
  for (int64_t c = 0; c < classes; c += GROUP) {
    for (int64_t j = c; j < c + LANES && j < classes; j++) {
      EACH_VEC(v)
      {
        VEC line[LINES_PER_GROUP];
        for (int i = 0; i < LINES_PER_GROUP; i++) {
          const int64_t at = j + i * LANES;
          line[i] = FN(vec_load)((at < classes ? e + at * LANES : zeros) + v);
        }
        FN(add_group_to_lane)
        (tree.sum[j - c] + v, tree.lo[j - c] + v, (line[0] + line[1]) + (line[2] + line[3]), c == 0);
      }
    }
  }
  FN(join_tree)(&tree, classes, sum, sum_lo);
}

/* As in start_block: a row without a finite maximum has no sum, but a NaN in it must show. */
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
  REAL *x;         /* logits, then terms, then results: [class][row] */
  REAL *q, *other; /* PL_CROSS_ENTROPY and PL_SCORE: two more */
  struct FN(tree) tree;
  REAL max[LANES], ones[LANES], sum[LANES], sum_lo[LANES];
  struct FN(closings) f;
  struct FN(losses) loss; /* PL_CROSS_ENTROPY */
};

static void FN(finish_tile)(struct FN(tile) * tile, int64_t classes)
{
  int infinite = 0;
  FN(join_tree)(&tile->tree, classes, tile->sum, tile->sum_lo);
  for (int l = 0; l < LANES; l++) {
    tile->sum[l] = FN(add_ones)(tile->sum[l], tile->sum_lo[l], tile->ones[l], &tile->sum_lo[l]);
    infinite |= !FN(finite)(tile->max[l]);
  }
  if (infinite) FN(spoil_tile)(tile->x, classes, tile->max, tile->sum, tile->sum_lo);
}

/* From terms to probabilities: as `probability`. */
static void FN(scale_tile)(REAL *x, int64_t classes, const struct FN(closings) * f)
{
  VEC factor[LINE_VECS], factor_lo[LINE_VECS];
  EACH_VEC(v)
  {
    factor[v / VEC_LANES] = FN(vec_load)(f->reciprocal + v) * FN(vec_fill)(LIFT);
    factor_lo[v / VEC_LANES] = FN(vec_load)(f->reciprocal_lo + v) * FN(vec_fill)(LIFT);
  }
  for (REAL *at = x; at < x + classes * LANES; at += LANES) {
    EACH_VEC(v)
    {
      const VEC e = FN(vec_load)(at + v);
      const VEC result = FN(vec_fma)(e, factor[v / VEC_LANES], e * factor_lo[v / VEC_LANES]);
      FN(vec_store)(at + v, result * FN(vec_fill)(1 / LIFT));
    }
  }
}

/* From logits to log-probabilities: as write_logs. */
static void FN(log_tile)(REAL *x, int64_t classes, const REAL *max, const struct FN(closings) * f, struct FN(temperature) t)
{
  if (!FN(is_plain)(t)) {
    const struct FN(closings) closings = *f; /* which writing to x plainly leaves as it is: else GCC has a scalar loop */
    for (REAL *at = x; at < x + classes * LANES; at += LANES)
      for (int l = 0; l < LANES; l++) at[l] = FN(log_probability)(at[l], max[l], FN(closing_of)(&closings, l), t);
    return;
  }
  REAL hi[LANES], lo[LANES];
  for (int l = 0; l < LANES; l++) {
    const struct FN(pair) log_sum = FN(log_sum_pair)(max[l], FN(closing_of)(f, l), t);
    hi[l] = log_sum.hi;
    lo[l] = log_sum.lo;
  }
  EACH_VEC(v)
  {
    const VEC top = FN(vec_load)(max + v), log1p = FN(vec_load)(f->log1p + v);
    const VEC sum = FN(vec_load)(hi + v), sum_lo = FN(vec_load)(lo + v);
    for (REAL *at = x + v; at < x + classes * LANES; at += LANES)
      FN(vec_store)(at, FN(plain_log_probability)(FN(vec_load)(at), top, log1p, sum, sum_lo));
  }
}

/* The results: stored where they are a number a row, left in x where they are as many as the logits. */
static int64_t FN(write_tile)(const struct pl_task *task, struct FN(tile) * tile, struct FN(temperature) t)
{
  const int64_t classes = task->classes, r = tile->r, rows = tile->rows;
  REAL *x = tile->x;
  REAL result[LANES];
  int64_t bad = -1;

  switch (task->operation) {
    case PL_SOFTMAX:
      FN(scale_tile)(x, classes, &tile->f);
      FN(mask_tile)(task, r, rows, x, 0);
      return -1;
    case PL_LOG_SOFTMAX:
      FN(log_tile)(x, classes, tile->max, &tile->f, t);
      FN(mask_tile)(task, r, rows, x, -INFINITY);
      return -1;
    case PL_LOGSUMEXP:
      FN(write_log_sums)(task, r, rows, tile->max, tile->sum, &tile->f, t);
      return -1;
    default: /* PL_SELECTIVE_LOG_SOFTMAX and PL_SPARSE_SOFTMAX_CROSS_ENTROPY */
      for (int64_t k = 0; k < task->picks; k++) {
        for (int64_t l = 0; l < LANES; l++) {
          const int64_t label = l < rows ? FN(label)(task, r + l, k) : 0;
          const bool inside = label >= 0 && label < classes;
          result[l] = inside ? x[label * LANES + l] : NAN;
          if (!inside && bad == -1) bad = FN(flat_label)(task, r + l, k);
        }
        FN(write_picks)(task, r, rows, k, result, tile->max, &tile->f, t);
      }
      return bad;
  }
}

/* ---- scores ---- */

/* Each row's largest logit, and its class: as keep_largest has them. */
static void FN(largest_of_tile)(const REAL *x, int64_t classes, REAL *top_x, int32_t *top_index)
{
  for (int l = 0; l < LANES; l++) {
    top_x[l] = x[l];
    top_index[l] = 0;
  }
  for (int32_t c = 1; c < classes; c++) {
    for (int l = 0; l < LANES; l++) {
      const REAL logit = x[c * LANES + l];
      const bool above = FN(above)(logit, top_x[l]);
      top_x[l] = above ? logit : top_x[l];
      top_index[l] = above ? c : top_index[l];
    }
  }
}

/* Each row's k largest. For one this takes twice the time of the above. */
static void FN(top_of_tile)(const REAL *x, int64_t classes, int64_t k, REAL (*top_x)[LANES], int32_t (*top_index)[LANES])
{
  for (int32_t c = 0; c < classes; c++) {
    REAL logit[LANES];
    int32_t index[LANES], moved[LANES] = {0}; /* whether its place is taken, and the one before it moves on */
    for (int l = 0; l < LANES; l++) {
      logit[l] = x[c * LANES + l];
      index[l] = c;
    }
    for (int64_t i = 0; i < k && i < c; i++) {
      for (int l = 0; l < LANES; l++) {
        const REAL other = top_x[i][l];
        const int32_t other_index = top_index[i][l];
        const bool above = moved[l] | FN(above)(logit[l], other);
        top_x[i][l] = above ? logit[l] : other;
        top_index[i][l] = above ? index[l] : other_index;
        logit[l] = above ? other : logit[l];
        index[l] = above ? other_index : index[l];
        moved[l] = above;
      }
    }
    if (c < k) {
      memcpy(top_x[c], logit, sizeof logit);
      memcpy(top_index[c], index, sizeof index);
    }
  }
}

/* As sum_scores, from the terms in q, which are lost. The squares are summed only where they are wanted: at ten classes they
 * are an eighth of the time. */
static void FN(sum_score_tile)(const struct FN(tile) * tile, int64_t classes, REAL inverse, REAL *dot, REAL *squares)
{
  const VEC by = FN(vec_fill)(inverse);
  REAL lo[LANES];
  for (int64_t c = 0; squares && c < classes * LANES; c += LANES) {
    EACH_VEC(v)
    {
      const VEC square = FN(square)(FN(vec_load)(tile->q + c + v));
      FN(vec_store)
      (tile->other + c + v, FN(vec_unless_equal)(square, FN(vec_load)(tile->x + c + v), FN(vec_load)(tile->max + v)));
    }
  }
  for (int64_t c = 0; c < classes * LANES; c += LANES) {
    EACH_VEC(v)
    {
      REAL *term = tile->q + c + v;
      FN(vec_store)
      (term, FN(entropy_term)(FN(vec_load)(term), FN(vec_load)(tile->x + c + v), FN(vec_load)(tile->max + v), by));
    }
  }
  FN(sum_tile)(tile->q, classes, dot, lo);
  if (squares) FN(sum_tile)(tile->other, classes, squares, lo);
  for (int l = 0; l < LANES; l++) {
    const bool finite = FN(finite)(tile->max[l]);
    dot[l] = finite ? -dot[l] / EXP_SCALE : 0;
    if (squares) squares[l] = finite ? squares[l] / EXP_SCALE + (tile->ones[l] - 1) : 0;
  }
}

/* Puts a number a row into an array of one axis. */
static inline void FN(put_rows)(void *array, const struct FN(tile) * tile, const REAL *numbers)
{
  memcpy((REAL *)array + tile->r, numbers, (size_t)tile->rows * sizeof(REAL));
}

/* The term of the largest is that of 0, or of no number. */
INLINE void FN(write_top)(const struct pl_task *task, const struct FN(tile) * tile, struct FN(temperature) t, int64_t k,
                          REAL (*top_x)[LANES], int32_t (*top_index)[LANES])
{
  REAL p[LANES];
  for (int64_t i = 0; i < k; i++) {
    if (i > 0) {
      FN(term_of_each)(top_x[i], tile->max, t, p);
    } else {
      for (int l = 0; l < LANES; l++) p[l] = EXP_SCALE + (top_x[0][l] - top_x[0][l]);
    }
    for (int l = 0; l < LANES; l++) p[l] = FN(probability)(p[l], tile->f.reciprocal[l], tile->f.reciprocal_lo[l]);
    if (i == 0) FN(put_rows)(task->confidence, tile, p);
    for (int64_t l = 0; l < tile->rows; l++) {
      ((REAL *)task->top_k_probabilities)[(tile->r + l) * k + i] = p[l];
      task->top_k_indices[(tile->r + l) * k + i] = top_index[i][l];
    }
  }
  for (int64_t l = 0; l < tile->rows; l++) task->prediction[tile->r + l] = top_index[0][l];
}

/* As score_row. */
static int64_t FN(write_score_tile)(const struct pl_task *task, struct FN(tile) * tile, struct FN(temperature) t)
{
  REAL top_x[TILE_PICKS][LANES], dot[LANES], squares[LANES], logsumexp[LANES], entropy[LANES];
  REAL picked[LANES], terms[LANES], loss[LANES], brier[LANES];
  int32_t top_index[TILE_PICKS][LANES] = {{0}};
  int64_t bad = -1;
  if (task->picks == 1) {
    FN(largest_of_tile)(tile->x, task->classes, top_x[0], top_index[0]);
    FN(write_top)(task, tile, t, 1, top_x, top_index);
  } else {
    FN(top_of_tile)(tile->x, task->classes, task->picks, top_x, top_index);
    FN(write_top)(task, tile, t, task->picks, top_x, top_index);
  }
  FN(sum_score_tile)(tile, task->classes, t.inverse, dot, task->brier ? squares : NULL);
  for (int l = 0; l < LANES; l++) {
    const struct FN(closing) f = FN(closing_of)(&tile->f, l);
    logsumexp[l] = FN(log_sum)(tile->max[l], tile->sum[l], f, t);
    entropy[l] = f.log1p + dot[l] * (f.reciprocal * EXP_SCALE);
  }
  FN(put_rows)(task->logsumexp, tile, logsumexp);
  FN(put_rows)(task->entropy, tile, entropy);
  if (!task->labels.data) return -1;
  for (int64_t l = 0; l < LANES; l++) {
    const int64_t label = l < tile->rows ? FN(label)(task, tile->r + l, 0) : 0;
    const bool inside = label >= 0 && label < task->classes;
    picked[l] = inside ? tile->x[label * LANES + l] : NAN;
    if (!inside && bad == -1) bad = FN(flat_label)(task, tile->r + l, 0);
    if (l < tile->rows) task->correct[tile->r + l] = label == task->prediction[tile->r + l];
  }
  for (int l = 0; l < LANES; l++) loss[l] = 0 - FN(log_probability)(picked[l], tile->max[l], FN(closing_of)(&tile->f, l), t);
  FN(put_rows)(task->loss, tile, loss);
  if (!task->brier) return bad;
  FN(term_of_each)(picked, tile->max, t, terms);
  for (int l = 0; l < LANES; l++) brier[l] = FN(brier)(terms[l], tile->sum[l], squares[l], tile->f.reciprocal[l]);
  FN(put_rows)(task->brier, tile, brier);
  return bad;
}

/* ---- the cross entropies: see loss.inc.h ---- */

/* The class weights of LANES rows, or ones, and 0 where masked out. */
static void FN(weigh_classes)(const struct pl_task *task, const struct FN(tile) * tile, REAL *q)
{
  const REAL *weight = task->losses.weight;
  for (int64_t c = 0; c < task->classes; c++)
    EACH_VEC(v) FN(vec_store)(q + c * LANES + v, FN(vec_fill)(weight ? weight[c] : 1)); /* in plain C GCC made a mess of it */
  FN(mask_tile)(task, tile->r, tile->rows, q, 0);
}

static void FN(load_target_tile)(const struct pl_task *task, const struct FN(tile) * tile, REAL *q)
{
  const REAL *weight = task->losses.weight;
  FN(load_tile)(task, &task->losses.probabilities, task->dtype, tile->r, tile->rows, q);
  for (int64_t c = 0; weight && c < task->classes; c++)
    for (int l = 0; l < LANES; l++) q[c * LANES + l] *= weight[c];
  FN(mask_tile)(task, tile->r, tile->rows, q, 0);
}

/* The classes of each row that are not masked out. */
static void FN(count_tile)(const struct pl_task *task, struct FN(tile) * tile)
{
  int64_t count = task->classes;
  for (int64_t l = 0; l < LANES; l++) {
    const char *where = FN(row_at)(task, &task->where, tile->r + (l < tile->rows ? l : 0)); /* missing rows are as the first */
    if (where && (l == 0 || !FN(masked_by_class)(task))) count = FN(count_classes)(where, task->where.classes, task->classes);
    tile->loss.counts[l] = (REAL)count;
  }
}

/* What a loss needs beside the sum of exponentials, from logits and their maxima. */
static void FN(spread_tile)(const struct pl_task *task, struct FN(tile) * tile)
{
  const int64_t classes = task->classes, size = classes * LANES;
  const REAL *x = tile->x;
  REAL *q = tile->q, *products = tile->other;
  struct FN(losses) *loss = &tile->loss;
  REAL origin[LANES], low[LANES], low_lo[LANES];
  for (int l = 0; l < LANES; l++) origin[l] = FN(finite)(tile->max[l]) ? tile->max[l] : 0;
  if (FN(spreads_evenly)(task)) {
    for (int l = 0; l < LANES; l++) {
      loss->weights[l] = (REAL)classes;
      loss->weights_lo[l] = 0;
    }
    for (int64_t c = 0; c < size; c += LANES)
      EACH_VEC(v) FN(vec_store)(products + c + v, FN(vec_load)(origin + v) - FN(vec_load)(x + c + v));
    FN(sum_tile)(products, classes, loss->even, loss->even_lo);
  } else if (task->losses.label_smoothing) {
    FN(weigh_classes)(task, tile, q);
    FN(sum_tile)(q, classes, loss->weights, loss->weights_lo);
    for (int64_t c = 0; c < size; c += LANES) {
      EACH_VEC(v)
      {
        const VEC w = FN(vec_load)(q + c + v), distance = FN(vec_load)(origin + v) - FN(vec_load)(x + c + v);
        FN(vec_store)(products + c + v, FN(vec_unless_equal)(w * distance, w, FN(vec_fill)(0)));
      }
    }
    FN(sum_tile)(products, classes, loss->even, loss->even_lo);
  } else {
    memset(loss->even, 0, sizeof loss->even);
    memset(loss->even_lo, 0, sizeof loss->even_lo);
    memset(loss->weights, 0, sizeof loss->weights);
    memset(loss->weights_lo, 0, sizeof loss->weights_lo);
  }
  if (!task->labels.data) {
    FN(load_target_tile)(task, tile, q);
    FN(sum_tile)(q, classes, loss->mass, loss->mass_lo);
    for (int64_t c = 0; c < size; c += LANES) {
      EACH_VEC(v)
      {
        VEC low;
        const VEC max = FN(vec_load)(tile->max + v), targets = FN(vec_load)(q + c + v);
        FN(vec_store)(products + c + v, FN(vec_weigh)(FN(vec_load)(x + c + v), targets, max, &low));
        FN(vec_store)(q + c + v, low);
      }
    }
    FN(sum_tile)(products, classes, loss->dot, loss->dot_lo);
    FN(sum_tile)(q, classes, low, low_lo);
    for (int l = 0; l < LANES; l++) loss->dot_lo[l] += low[l];
    return;
  }
  for (int64_t l = 0; l < LANES; l++) loss->target[l] = x[loss->label[l] * LANES + l];
  FN(weigh_labels)(task, tile->max, loss);
}

/* From the terms in x to gradients in x. */
static void FN(write_slope_tile)(const struct pl_task *task, struct FN(tile) * tile)
{
  const int64_t classes = task->classes, size = classes * LANES;
  const REAL *weight = task->losses.weight;
  struct FN(losses) *loss = &tile->loss;
  REAL *x = tile->x, *q = tile->q, *slopes = tile->other;
  const bool soft = !task->labels.data;
  if (soft) FN(load_target_tile)(task, tile, q);
  REAL at_label[LANES]; /* the labels' terms, then their gradients */
  for (int64_t l = 0; l < LANES; l++) at_label[l] = x[loss->label[l] * LANES + l];
  for (int l = 0; l < LANES; l++) { /* mass is the label's weight */
    const REAL term = at_label[l], addend = FMA(loss->mass[l], loss->of_target[l], loss->mass[l] * loss->of_class[l]);
    at_label[l] = FMA(term, loss->factor[l], FMA(term, loss->factor_lo[l], addend));
  }
  for (int64_t c = 0; c < classes; c++) {
    const VEC of_class = FN(vec_fill)(weight ? weight[c] : 1), zero = FN(vec_fill)(0), one = FN(vec_fill)(1);
    EACH_VEC(v)
    {
      const VEC term = FN(vec_load)(x + c * LANES + v), even = FN(vec_load)(loss->of_class + v);
      VEC addend = FN(vec_if_equal)(even, zero, even, of_class * even); /* not -0 for a negative weight: as in write_slopes */
      VEC lift = FN(vec_if_equal)(even, zero, FN(vec_fill)(LIFT), one),
          drop = FN(vec_if_equal)(even, zero, FN(vec_fill)(1 / LIFT), one); /* as in `lifted` */
      if (soft) { /* by the compiler's mask, loads of what was never written took ten times as long as all else */
        addend = FN(vec_fma)(FN(vec_load)(q + c * LANES + v), FN(vec_load)(loss->of_target + v), addend);
        lift = drop = one;
      }
      const VEC factor = FN(vec_load)(loss->factor + v) * lift, factor_lo = FN(vec_load)(loss->factor_lo + v) * lift;
      FN(vec_store)(x + c * LANES + v, FN(vec_fma)(term, factor, FN(vec_fma)(term, factor_lo, addend)) * drop);
    }
  }
  for (int64_t l = 0; !soft && l < LANES; l++) x[loss->label[l] * LANES + l] = at_label[l];
  if (task->losses.softcap) {
    FN(load_tile)(task, &task->logits, task->dtype, tile->r, tile->rows, slopes);
    FN(cap)(task, slopes, NULL, slopes, size);
    for (int64_t i = 0; i < size; i++) x[i] *= slopes[i];
  }
  FN(mask_tile)(task, tile->r, tile->rows, x, 0);
  for (int64_t l = 0; l < LANES; l++)
    for (int64_t c = 0; loss->counts[l] == 0 && c < classes; c++) x[c * LANES + l] = 0;
}

/* Asks for memory that is used in the next batch, when this one's is. Left to itself, the processor waited: rows of ten classes
 * took twice as long to load. */
INLINE void FN(ask_for)(const struct pl_task *task, const struct pl_view *view, int64_t r, int64_t rows, bool to_write)
{
  const char *row = FN(row_at)(task, view, r);
  int64_t size = task->classes * view->classes;
  if (size == view->outer) { /* side by side: as one */
    size *= rows;
    rows = 1;
  }
  for (int64_t l = 0; l < rows; l++, row += view->outer) {
    for (int64_t at = 0; at < size; at += 64) {
      if (to_write) {
        __builtin_prefetch(row + at, 1);
      } else {
        __builtin_prefetch(row + at);
      }
    }
  }
}

/* Step by step, so that the operations of a step, each waiting for the one before, overlap with the other tiles'. */
static int64_t FN(run_tiles)(const struct pl_task *task, int64_t r, int64_t rows, struct FN(temperature) t,
                             struct FN(tile) * tiles, int64_t count)
{
  const bool loss = task->operation == PL_CROSS_ENTROPY, scoring = task->operation == PL_SCORE;
  const bool keep = FN(keeps_terms)(task) || scoring;
  const struct pl_view *whole = pl_whole(task);
  const int whole_dtype = loss ? task->dtype : task->out_dtype;
  const bool full = rows == count * LANES && task->dtype == NATIVE_DTYPE && task->out_dtype == NATIVE_DTYPE;
  const bool strips = full && FN(adjacent)(task, &task->logits, r, rows, task->dtype);
  const bool whole_strips = full && whole && FN(adjacent)(task, whole, r, rows, whole_dtype);
  REAL *x[TILES];
  int64_t bad = -1;
  for (int64_t i = 0; i < count; i++) {
    tiles[i].r = r + i * LANES;
    tiles[i].rows = rows - i * LANES < LANES ? rows - i * LANES : LANES;
    x[i] = tiles[i].x;
    if (strips) continue;
    if (task->inner == 1) {
      FN(ask_for)(task, &task->logits, tiles[i].r + rows, tiles[i].rows, false);
      if (whole) FN(ask_for)(task, whole, tiles[i].r, tiles[i].rows, true);
    }
    FN(load_tile)(task, &task->logits, task->dtype, tiles[i].r, tiles[i].rows, x[i]);
  }
  if (strips) FN(load_strips)(task, &task->logits, r, count, x);
  for (int64_t i = 0; i < count; i++) {
    if (task->losses.softcap) FN(cap)(task, x[i], x[i], NULL, task->classes * LANES);
    FN(mask_tile)(task, tiles[i].r, tiles[i].rows, x[i], -INFINITY);
    FN(maximum_of_tile)(x[i], task->classes, tiles[i].max);
    if (loss) {
      FN(count_tile)(task, &tiles[i]);
      const int64_t found = FN(look_at_rows)(task, tiles[i].r, tiles[i].rows, &tiles[i].loss);
      if (bad == -1) bad = found;
      FN(spread_tile)(task, &tiles[i]);
    }
    if (scoring) memcpy(tiles[i].q, x[i], (size_t)(task->classes * LANES) * sizeof(REAL)); /* both are needed to the end */
  }
  for (int64_t i = 0; i < count; i++) {
    REAL *terms = scoring ? tiles[i].q : x[i];
    FN(plant_tile)(terms, task->classes, t, keep, tiles[i].max, &tiles[i].tree, tiles[i].ones);
  }
  for (int64_t i = 0; i < count; i++) FN(finish_tile)(&tiles[i], task->classes);
  for (int64_t i = 0; i < count; i++) FN(close_rows)(task->operation, tiles[i].max, tiles[i].sum, tiles[i].sum_lo, &tiles[i].f);
  for (int64_t i = 0; i < count; i++) {
    if (loss) {
      FN(close_losses)(task, tiles[i].max, &tiles[i].f, t, &tiles[i].loss);
      if (whole) FN(write_slope_tile)(task, &tiles[i]);
      FN(store_line)(task, tiles[i].r, tiles[i].rows, tiles[i].loss.value);
    } else {
      const int64_t found = scoring ? FN(write_score_tile)(task, &tiles[i], t) : FN(write_tile)(task, &tiles[i], t);
      if (bad == -1) bad = found;
    }
    if (whole && !whole_strips) FN(store_tile)(task, whole, whole_dtype, tiles[i].r, tiles[i].rows, x[i]);
  }
  if (whole_strips) FN(store_strips)(task, whole, r, count, x);
  return bad;
}

/* ---- LANES long rows side by side: a tile for each block ---- */

/* The same task on block b alone. */
static struct pl_task FN(block_task)(const struct pl_task *task, int64_t b)
{
  struct pl_task part = *task;
  part.classes = FN(block_length)(task, b);
  part.logits.data = (char *)task->logits.data + b * BLOCK * task->logits.classes;
  if (task->where.data) part.where.data = (char *)task->where.data + b * BLOCK * task->where.classes;
  part.out.data = (char *)task->out.data + b * BLOCK * task->out.classes;
  return part;
}

/* All four steps; `blocks` has the numbers of each row's blocks one after the other. */
static void FN(reduce_tall_tile)(const struct pl_task *task, struct FN(tile) * tile, struct FN(temperature) t,
                                 struct FN(row) * blocks)
{
  const int64_t count = FN(block_count)(task);
  for (int64_t b = 0; b < count; b++) {
    const struct pl_task part = FN(block_task)(task, b);
    FN(load_tile)(&part, &part.logits, part.dtype, tile->r, tile->rows, tile->x);
    FN(mask_tile)(&part, tile->r, tile->rows, tile->x, -INFINITY);
    FN(maximum_of_tile)(tile->x, part.classes, tile->max);
    FN(plant_tile)(tile->x, part.classes, t, false, tile->max, &tile->tree, tile->ones);
    FN(finish_tile)(tile, part.classes);
    for (int64_t l = 0; l < tile->rows; l++)
      blocks[l * count + b] = (struct FN(row)){.max = tile->max[l], .sum = tile->sum[l], .sum_lo = tile->sum_lo[l]};
  }
  for (int64_t l = 0; l < tile->rows; l++) {
    const struct FN(row) row = FN(join_blocks)(blocks + l * count, count, t);
    tile->max[l] = row.max;
    tile->sum[l] = row.sum;
    tile->sum_lo[l] = row.sum_lo;
  }
}

/* From logits to probabilities, block b. */
static void FN(soften_block)(const struct FN(tile) * tile, int64_t b, int64_t count, int64_t classes, struct FN(temperature) t,
                             const struct FN(row) * blocks)
{
  struct FN(tree) tree;
  struct FN(closings) f;
  REAL max[LANES], shrink[LANES], ones[LANES];
  bool shrinks = false;
  for (int64_t l = 0; l < LANES; l++) {
    const int64_t row = l < tile->rows ? l : 0; /* missing rows are as the first */
    const REAL of_row = tile->max[row], of_block = blocks[row * count + b].max;
    const struct FN(line) of_terms = {.factor = tile->f.reciprocal[row], .factor_lo = tile->f.reciprocal_lo[row]};
    const struct FN(line) line = FN(line_of)(&of_terms, of_block, of_row, t, &shrink[l]);
    max[l] = FN(finite)(of_block) ? of_block : of_row;
    f.reciprocal[l] = line.factor;
    f.reciprocal_lo[l] = line.factor_lo;
    shrinks |= shrink[l] != 1;
  }
  FN(plant_tile)(tile->x, classes, t, true, max, &tree, ones);
  for (int64_t c = 0; shrinks && c < classes; c++)
    for (int l = 0; l < LANES; l++) tile->x[c * LANES + l] *= shrink[l];
  FN(scale_tile)(tile->x, classes, &f);
}

/* softmax and log_softmax, a block at a time. */
static void FN(write_tall_tile)(const struct pl_task *task, struct FN(tile) * tile, struct FN(temperature) t,
                                const struct FN(row) * blocks)
{
  const int64_t count = FN(block_count)(task);
  const bool log = task->operation == PL_LOG_SOFTMAX;
  REAL *x = tile->x;
  for (int64_t b = 0; b < count; b++) {
    const struct pl_task part = FN(block_task)(task, b);
    FN(load_tile)(&part, &part.logits, part.dtype, tile->r, tile->rows, x);
    if (log) {
      FN(log_tile)(x, part.classes, tile->max, &tile->f, t);
    } else {
      FN(mask_tile)(&part, tile->r, tile->rows, x, -INFINITY);
      FN(soften_block)(tile, b, count, part.classes, t, blocks);
    }
    FN(mask_tile)(&part, tile->r, tile->rows, x, log ? -INFINITY : 0);
    FN(store_tile)(&part, &part.out, part.out_dtype, tile->r, tile->rows, x);
  }
}
