/* From the numbers of rows to results, once for float and once for double. */

/* What the results need beside the row's numbers. */
struct FN(closing) {
  REAL log1p, log1p_lo;           /* log(sum of exp(x - max)) */
  REAL reciprocal, reciprocal_lo; /* 1 / (sum of exp(x - max) * EXP_SCALE) */
};

/* Those of LANES rows. */
struct FN(closings) {
  REAL log1p[LANES], log1p_lo[LANES], reciprocal[LANES], reciprocal_lo[LANES];
};

static inline struct FN(closing) FN(closing_of)(const struct FN(closings) * f, int64_t l)
{
  return (struct FN(closing)){f->log1p[l], f->log1p_lo[l], f->reciprocal[l], f->reciprocal_lo[l]};
}

/* LANES rows at once, as each step waits for the one before. A maximum of +inf (or -inf: no finite logit at all) makes every
 * probability NaN, as in every peer. */
static void FN(close_rows)(int operation, const REAL *max, const REAL *sum, const REAL *sum_lo, struct FN(closings) * f)
{
  if (operation == PL_SOFTMAX || operation == PL_SCORE || operation == PL_CROSS_ENTROPY) {
    for (int l = 0; l < LANES; l++) {
      REAL total_lo;
      const REAL total = FN(two_sum)(1, sum[l], &total_lo) + (max[l] - max[l]);
      total_lo += sum_lo[l];
      const REAL reciprocal = 1 / total;
      const REAL residual = FMA(-total, reciprocal, 1) - total_lo * reciprocal;
      f->reciprocal[l] = reciprocal / EXP_SCALE;
      f->reciprocal_lo[l] = residual * reciprocal / EXP_SCALE;
    }
  }
  if (operation != PL_SOFTMAX) {
    for (int l = 0; l < LANES; l++) {
      f->log1p[l] = FN(log1p_pair)(sum[l], sum_lo[l], &f->log1p_lo[l]) + (max[l] - max[l]);
    }
  }
}

/* It is computed LIFT times as large: near the smallest normal number the product with the low part would be subnormal, and
 * rounding that cost half an ulp (2.06 in all). */
static inline REAL FN(probability)(REAL e, REAL reciprocal, REAL reciprocal_lo)
{
  return FMA(e, reciprocal * LIFT, e * (reciprocal_lo * LIFT)) * (1 / LIFT);
}

static inline REAL FN(log_probability)(REAL x, REAL max, struct FN(closing) f, struct FN(temperature) t)
{
  REAL lo;
  const REAL hi = FN(exponent)(x, max, t.inverse, t.inverse_lo, &lo);
  return FN(rounded)(FN(plus)((struct FN(pair)){hi, lo}, (struct FN(pair)){-f.log1p, -f.log1p_lo}));
}

/* max / temperature + log(sum) */
INLINE struct FN(pair) FN(log_sum_pair)(REAL max, struct FN(closing) f, struct FN(temperature) t)
{
  const struct FN(pair) top = {max, 0}, inverse = {t.inverse, t.inverse_lo}, log1p = {f.log1p, f.log1p_lo};
  return FN(plus)(FN(times)(top, inverse), log1p);
}

/* The log-probability of a logit at temperature 1, from the logarithm of the sum as a pair: two roundings, below 1.5 ulp
 * together. All but a maximum's are below -log 2, which is much beside what the pair has lost; and a maximum's is -log1p. */
INLINE VEC FN(plain_log_probability)(VEC x, VEC max, VEC log1p, VEC log_sum, VEC log_sum_lo)
{
  return FN(vec_if_equal)(x, max, FN(vec_fill)(0) - log1p, (x - log_sum) - log_sum_lo);
}

/* As log_softmax has it, with the error of its fast way. */
static inline REAL FN(fast_log_probability)(REAL x, REAL max, struct FN(closing) f, struct FN(temperature) t)
{
  if (!FN(is_plain)(t)) return FN(log_probability)(x, max, f, t);
  const struct FN(pair) log_sum = FN(log_sum_pair)(max, f, t);
  return x == max ? 0 - f.log1p : (x - log_sum.hi) - log_sum.lo;
}

/* The log-probabilities of a row; x may be `result`. */
static void FN(write_logs)(const REAL *x, REAL *result, int64_t n, REAL max, struct FN(closing) f, struct FN(temperature) t)
{
  const struct FN(pair) log_sum = FN(log_sum_pair)(max, f, t);
  const VEC top = FN(vec_fill)(max), log1p = FN(vec_fill)(f.log1p);
  const VEC sum = FN(vec_fill)(log_sum.hi), sum_lo = FN(vec_fill)(log_sum.lo);
  if (!FN(is_plain)(t)) {
    for (int64_t c = 0; c < n; c++) result[c] = FN(log_probability)(x[c], max, f, t);
    return;
  }
  int64_t c = 0;
  for (; c + VEC_LANES <= n; c += VEC_LANES)
    FN(vec_store)(result + c, FN(plain_log_probability)(FN(vec_load)(x + c), top, log1p, sum, sum_lo));
  if (c < n) {
    const VEC rest = FN(vec_load_part)(x + c, n - c, top);
    FN(vec_store_part)(result + c, n - c, FN(plain_log_probability)(rest, top, log1p, sum, sum_lo));
  }
}

/* The same, rounded; the infinities of max pass, where log1p holds a NaN from no other cause. */
static inline REAL FN(log_sum)(REAL max, REAL sum, struct FN(closing) f, struct FN(temperature) t)
{
  if (!FN(finite)(max)) return sum == sum ? max : sum;
  return FN(rounded)(FN(log_sum_pair)(max, f, t));
}

/* How far rows are apart, but where `inner` of them end. */
static inline int64_t FN(step)(const struct pl_task *task, const struct pl_view *view)
{
  return task->inner == 1 ? view->outer : view->inner;
}

static inline bool FN(in_step)(const struct pl_task *task, int64_t r, int64_t rows)
{
  return task->inner == 1 || r % task->inner + rows <= task->inner;
}

/* Whether rows lie side by side, as they do with a class axis that is not the last, and as one number a row does. */
static inline bool FN(adjacent)(const struct pl_task *task, const struct pl_view *view, int64_t r, int64_t rows, int dtype)
{
  return FN(step)(task, view) == pl_itemsize(dtype) && FN(in_step)(task, r, rows);
}

/* One result a row. */
static void FN(store_line)(const struct pl_task *task, int64_t r, int64_t rows, const REAL *result)
{
  const int dtype = task->out_dtype;
  if (FN(adjacent)(task, &task->out, r, rows, dtype)) {
    FN(store_many)(FN(row_at)(task, &task->out, r), result, pl_itemsize(dtype), rows, dtype);
  } else {
    for (int64_t l = 0; l < rows; l++) FN(store)(FN(row_at)(task, &task->out, r + l), result[l], dtype);
  }
}

/* One picked log-probability, or the loss that is its negative: subtracted from 0, so that a certain row's is not -0. */
static void FN(store_pick)(const struct pl_task *task, char *out, int64_t k, REAL log_probability)
{
  const bool loss = task->operation == PL_SPARSE_SOFTMAX_CROSS_ENTROPY;
  FN(store)(out + k * task->out.classes, loss ? 0 - log_probability : log_probability, task->out_dtype);
}

/* PL_SCORE: sum (p - q)^2 for the one-hot q of the label (Brier 1950). With e = exp(x - max), the others being all elements but
 * one maximum and S = 1 + sum e of the others, it is (sum e^2 + (sum e)^2, both of the others, + 2 S (1 - e of the label)) /
 * S^2. No difference loses digits: of a confident row the others are all that there is to see. */
static inline REAL FN(brier)(REAL term, REAL sum, REAL squares, REAL scaled_reciprocal)
{
  const REAL reciprocal = scaled_reciprocal * EXP_SCALE, below = 1 - term / EXP_SCALE;
  return FMA(sum, sum, squares) * reciprocal * reciprocal + 2 * below * reciprocal;
}

/* The second pass over a row: from its terms e, (factor * e + addend) * drop. */
struct FN(line) {
  REAL factor, factor_lo;
  REAL addend;         /* of all elements, or */
  const REAL *addends; /* of each */
  REAL drop;           /* see lifted */
};

INLINE VEC FN(along)(VEC term, const struct FN(line) * line, VEC addend)
{
  const VEC product = FN(vec_fma)(term, FN(vec_fill)(line->factor_lo), addend);
  return FN(vec_fma)(term, FN(vec_fill)(line->factor), product) * FN(vec_fill)(line->drop);
}

/* What has nothing added may become as small as a probability, and is computed as one. */
static struct FN(line) FN(lifted)(struct FN(line) line)
{
  const bool alone = !line.addends && line.addend == 0;
  line.factor *= alone ? LIFT : 1;
  line.factor_lo *= alone ? LIFT : 1;
  line.drop = alone ? 1 / LIFT : 1;
  return line;
}

INLINE VEC FN(addend_at)(const struct FN(line) * line, int64_t c, int64_t n)
{
  return line->addends ? FN(vec_load_part)(line->addends + c, n, FN(vec_fill)(0)) : FN(vec_fill)(line->addend);
}

/* From the terms that start_block kept. */
static void FN(scale_terms)(const REAL *e, REAL *result, int64_t n, const struct FN(line) * given)
{
  const struct FN(line) lifted = FN(lifted)(*given), *line = &lifted;
  int64_t c = 0;
  if (!line->addends) {
    const VEC addend = FN(vec_fill)(line->addend);
#pragma GCC unroll 4
    for (; c + VEC_LANES <= n; c += VEC_LANES) FN(vec_store)(result + c, FN(along)(FN(vec_load)(e + c), line, addend));
  }
  for (; c < n; c += VEC_LANES) {
    const int64_t part = FN(part)(n, c);
    const VEC term = FN(vec_load_part)(e + c, part, FN(vec_fill)(0));
    FN(vec_store_part)(result + c, part, FN(along)(term, line, FN(addend_at)(line, c, part)));
  }
}

/* ---- rows of several blocks ---- */

/* The terms of a block are relative to its own maximum, and to be multiplied by exp(that - the row's). Where the factor would
 * be too small to be a pair it is taken BOOST * EXP_SCALE times, and the terms by that much smaller: what they lose is nothing
 * to the result. */
static struct FN(line)
    FN(line_of)(const struct FN(line) * of_row, REAL max, REAL row_max, struct FN(temperature) t, REAL *shrink)
{
  struct FN(line) line = *of_row;
  *shrink = 1;
  if (!FN(finite)(max)) return line; /* all terms are 0 */
  REAL lo;
  const struct FN(pair) factor = {line.factor, line.factor_lo};
  struct FN(pair) below, product;
  const REAL distance = FN(exponent)(max, row_max, t.inverse, t.inverse_lo, &lo);
  below.hi = FN(exp_pair)(distance, lo, &below.lo);
  product = FN(times)(factor, below);
  if (product.hi < SMALL && product.hi > -SMALL) {
    product = FN(times)(factor, (struct FN(pair)){below.hi * BOOST, below.lo * BOOST});
    *shrink = 1 / (BOOST * EXP_SCALE);
  } else {
    product = (struct FN(pair)){product.hi / EXP_SCALE, product.lo / EXP_SCALE};
  }
  line.factor = product.hi;
  line.factor_lo = product.lo;
  return line;
}

/* The results of a block from its terms, which are lost. */
static void FN(scale_block)(REAL *e, REAL *result, int64_t n, const struct FN(line) * line, REAL shrink)
{
  for (int64_t c = 0; shrink != 1 && c < n; c++) e[c] *= shrink;
  FN(scale_terms)(e, result, n, line);
}

/* The terms of block b, where they are kept; else computed again. `slopes`: of the softcap, where there is one. */
static REAL *FN(terms_of)(const struct pl_task *task, int64_t r, int64_t b, int64_t end, struct FN(temperature) t,
                          const struct FN(slot) * slot, REAL *slopes)
{
  const int64_t n = FN(block_length)(task, b);
  REAL *kept = slot->terms ? slot->terms + b * BLOCK : NULL;
  if (kept && !task->losses.softcap) return kept;
  const REAL *x = FN(stage)(task, r, b * BLOCK, n, slot->room, slopes);
  if (kept) return kept;
  FN(repeat_terms)
  (x, slot->e, n, slot->blocks[b].max, t, FN(next_block)(task, &task->logits, r, (b + 1) * BLOCK, end, slot->room));
  return slot->e;
}

/* The probability of class c, whose logit is x: as softmax has it. */
static REAL FN(probability_at)(const struct FN(slot) * slot, int64_t c, REAL x, struct FN(closing) f, struct FN(temperature) t)
{
  struct FN(line) line = {.factor = f.reciprocal, .factor_lo = f.reciprocal_lo};
  REAL max = slot->row.max, shrink = 1;
  if (slot->blocks) {
    max = slot->blocks[c / BLOCK].max;
    line = FN(line_of)(&line, max, slot->row.max, t, &shrink);
  }
  return FN(probability)(FN(term)(x, max, t) * shrink, line.factor, line.factor_lo);
}

/* The outputs of PL_SCORE for row r. */
static void FN(score_row)(const struct pl_task *task, int64_t r, const struct FN(slot) * slot, struct FN(closing) f,
                          struct FN(temperature) t)
{
  const struct FN(row) *row = &slot->row;
  const int64_t k = task->picks, *top_index = slot->top_index;
  ((REAL *)task->logsumexp)[r] = FN(log_sum)(row->max, row->sum, f, t);
  ((REAL *)task->entropy)[r] = f.log1p + row->dot * (f.reciprocal * EXP_SCALE);
  for (int64_t i = 0; i < k; i++) {
    ((REAL *)task->top_k_probabilities)[r * k + i] = FN(probability_at)(slot, top_index[i], slot->top_x[i], f, t);
    task->top_k_indices[r * k + i] = top_index[i];
  }
  ((REAL *)task->confidence)[r] = ((REAL *)task->top_k_probabilities)[r * k];
  task->prediction[r] = top_index[0];
}

/* A result that is as long as the row. A block of it is made at its place, or in `room` and then put there. */
struct FN(sink) {
  char *row;
  int64_t stride;
  int dtype;
  bool direct, streamed;
};

static struct FN(sink) FN(sink_at)(const struct pl_task *task, int64_t r)
{
  const struct pl_view *view = pl_whole(task);
  const int dtype = task->operation == PL_CROSS_ENTROPY ? task->dtype : task->out_dtype;
  const bool native = dtype == NATIVE_DTYPE && view->classes == (int64_t)sizeof(REAL);
  const bool streamed = native && task->outer * task->inner * task->classes * (int64_t)sizeof(REAL) >= STREAM_BYTES;
  return (struct FN(sink)){FN(row_at)(task, view, r), view->classes, dtype, native && !streamed, streamed};
}

static inline REAL *FN(place)(const struct FN(sink) * sink, int64_t b, REAL *room)
{
  return sink->direct ? (REAL *)(void *)(sink->row + b * BLOCK * sink->stride) : room;
}

static void FN(put)(const struct FN(sink) * sink, int64_t b, const REAL *room, int64_t n)
{
  char *to = sink->row + b * BLOCK * sink->stride;
  if (sink->streamed) {
    pl_stream(to, (const char *)room, (size_t)n * sizeof(REAL));
  } else if (!sink->direct) {
    FN(store_many)(to, room, sink->stride, n, sink->dtype);
  }
}

/* The masked elements of block b. */
static void FN(mask_block)(const struct pl_task *task, const char *where, int64_t b, REAL *result, int64_t n, REAL fill)
{
  if (where) FN(mask)(result, result, where + b * BLOCK * task->where.classes, task->where.classes, n, fill);
}

/* The results of a row; of those that are as long as the row, its blocks [first, last). */
static int64_t FN(write_row)(const struct pl_task *task, int64_t r, int64_t first, int64_t last, int64_t end,
                             struct FN(temperature) t, const struct FN(slot) * slot, struct FN(closing) f)
{
  const int64_t classes = task->classes;
  const int64_t count = FN(block_count)(task);
  const char *logits = FN(row_at)(task, &task->logits, r);
  const char *where = FN(row_at)(task, &task->where, r);
  char *out = FN(row_at)(task, &task->out, r);
  const REAL *x = slot->x;
  REAL *room = slot->room;
  const struct FN(row) row = slot->row;
  const bool scoring = task->operation == PL_SCORE, log = task->operation == PL_LOG_SOFTMAX;
  int64_t bad = -1;

  if (task->operation == PL_LOGSUMEXP) {
    FN(store)(out, FN(log_sum)(row.max, row.sum, f, t), task->out_dtype);
    return -1;
  }
  if (scoring) FN(score_row)(task, r, slot, f, t);

  if (task->labels.data) {
    for (int64_t k = 0; k < (scoring ? 1 : task->picks); k++) {
      const int64_t label = FN(label)(task, r, k);
      const bool inside = label >= 0 && label < classes;
      const REAL picked = inside ? FN(load)(logits + label * task->logits.classes, task->dtype) : NAN;
      const bool loss = task->operation != PL_SELECTIVE_LOG_SOFTMAX;
      const REAL result = loss ? FN(log_probability)(picked, row.max, f, t) : FN(fast_log_probability)(picked, row.max, f, t);
      if (!inside) bad = FN(flat_label)(task, r, k);
      if (scoring) {
        ((REAL *)task->loss)[r] = 0 - result;
        if (task->brier) ((REAL *)task->brier)[r] = FN(brier)(FN(term)(picked, row.max, t), row.sum, row.squares, f.reciprocal);
        task->correct[r] = label == task->prediction[r];
      } else {
        FN(store_pick)(task, out, k, result);
      }
    }
    return bad;
  }
  if (scoring) return -1;

  /* A row of one block is still in x and e; of a longer one logits are staged again, from cache, and see terms_of. */
  const struct FN(sink) sink = FN(sink_at)(task, r);
  const struct FN(line) line = {.factor = f.reciprocal, .factor_lo = f.reciprocal_lo};
  for (int64_t b = first; b < last; b++) {
    const int64_t n = FN(block_length)(task, b);
    REAL *result = FN(place)(&sink, b, room);
    if (log) {
      if (count > 1) x = FN(stage)(task, r, b * BLOCK, n, room, NULL);
      FN(write_logs)(x, result, n, row.max, f, t);
    } else if (count == 1) {
      FN(scale_terms)(slot->e, result, n, &line);
    } else {
      REAL shrink;
      const struct FN(line) of_block = FN(line_of)(&line, slot->blocks[b].max, row.max, t, &shrink);
      FN(scale_block)(FN(terms_of)(task, r, b, end, t, slot, NULL), result, n, &of_block, shrink);
    }
    FN(mask_block)(task, where, b, result, n, log ? -INFINITY : 0);
    FN(put)(&sink, b, room, n);
  }
  return -1;
}

/* ---- LANES rows at once ---- */

static void FN(write_log_sums)(const struct pl_task *task, int64_t r, int64_t rows, const REAL *max, const REAL *sum,
                               const struct FN(closings) * f, struct FN(temperature) t)
{
  REAL result[LANES];
  for (int l = 0; l < LANES; l++) result[l] = FN(log_sum)(max[l], sum[l], FN(closing_of)(f, l), t);
  FN(store_line)(task, r, rows, result);
}

/* Pick k of each row: from its logit to its log-probability or loss. */
static void FN(write_picks)(const struct pl_task *task, int64_t r, int64_t rows, int64_t k, REAL *picked, const REAL *max,
                            const struct FN(closings) * f, struct FN(temperature) t)
{
  if (task->operation == PL_SPARSE_SOFTMAX_CROSS_ENTROPY) {
    for (int l = 0; l < LANES; l++) picked[l] = FN(log_probability)(picked[l], max[l], FN(closing_of)(f, l), t);
    for (int l = 0; l < LANES; l++) picked[l] = 0 - picked[l]; /* so that a certain row's loss is not -0 */
    FN(store_line)(task, r, rows, picked);
  } else {
    for (int l = 0; l < LANES; l++) picked[l] = FN(fast_log_probability)(picked[l], max[l], FN(closing_of)(f, l), t);
    for (int64_t l = 0; l < rows; l++) FN(store_pick)(task, FN(row_at)(task, &task->out, r + l), k, picked[l]);
  }
}

/* write_row of rows of one block, where what is to be found out of each, as long as a row of 64, is the same for all. */
static bool FN(write_short_rows)(const struct pl_task *task, int64_t r, int64_t rows, const struct FN(slot) * slots,
                                 const REAL *max, const REAL *sum, const struct FN(closings) * f, struct FN(temperature) t,
                                 int64_t *bad)
{
  const int64_t n = task->classes;
  const bool log = task->operation == PL_LOG_SOFTMAX;
  REAL picked[LANES];
  switch (task->operation) {
    case PL_SOFTMAX:
    case PL_LOG_SOFTMAX:
      if (!FN(as_is)(task, &task->out, task->out_dtype) || FN(sink_at)(task, r).streamed) return false;
      for (int64_t i = 0; i < rows; i++) {
        const struct FN(closing) closing = FN(closing_of)(f, i);
        const struct FN(line) line = {.factor = closing.reciprocal, .factor_lo = closing.reciprocal_lo};
        REAL *out = (REAL *)(void *)((char *)task->out.data + (r + i) * task->out.outer);
        if (log) {
          FN(write_logs)(slots[i].x, out, n, max[i], closing, t);
        } else {
          FN(scale_terms)(slots[i].e, out, n, &line);
        }
      }
      return true;
    case PL_LOGSUMEXP:
      FN(write_log_sums)(task, r, rows, max, sum, f, t);
      return true;
    case PL_SELECTIVE_LOG_SOFTMAX:
    case PL_SPARSE_SOFTMAX_CROSS_ENTROPY:
      for (int64_t k = 0; k < task->picks; k++) {
        for (int64_t l = 0; l < LANES; l++) {
          const int64_t label = l < rows ? FN(label)(task, r + l, k) : 0;
          const bool inside = l < rows && label >= 0 && label < n;
          picked[l] = inside ? slots[l].x[label] : NAN;
          if (l < rows && !inside && *bad == -1) *bad = FN(flat_label)(task, r + l, k);
        }
        FN(write_picks)(task, r, rows, k, picked, max, f, t);
      }
      return true;
    default:
      return false;
  }
}
