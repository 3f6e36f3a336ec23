/* The row kernels, once for float and once for double. See kernel.c for the names in capitals.
 *
 * The canonical reduction tree, a function of the row's length and type alone:
 *   1. The row is cut into blocks of BLOCK elements. Each block has its maximum and the sum of exp(x - maximum) over all
 *      elements but one maximum: terms that are exactly 1 are counted, not added, and one is left out of the count.
 *   2. Inside a block, lane l of LANES adds up the terms whose index is l modulo LANES: four at a time, plainly, as
 *      (a + b) + (c + d), and these with TwoSum. Missing terms are zeros, which change no bits.
 *   3. The lanes are joined by halves (l with l + LANES / 2, then / 4, ...), with TwoSum; then the count is added.
 *   4. The blocks are joined in index order, in pair arithmetic.
 * Nothing in it depends on the instruction set, on threads or on the rows around.
 *
 * The maximum is left out because log(sum) = maximum + log1p(the others): in a confident row the others are all that
 * there is to see. */

/* The numbers that every result of a row is made from. */
struct FN(row) {
  REAL max;
  REAL sum, sum_lo; /* of exp(x - max) over all elements but one maximum, as a pair */
  REAL dot;         /* PL_SCORE: of exp(x - max) * (max - x) / temperature */
};

struct FN(scratch) {
  REAL x[TILE * LANES], e[TILE * LANES]; /* a block of a long row, or a tile of short rows: [class][row] */
};

struct FN(temperature) {
  REAL inverse, inverse_lo; /* 1 / temperature as a pair */
};

static inline bool FN(finite)(REAL value)
{
  return value - value == 0;
}

/* (a_hi + a_lo) + (b_hi + b_lo), rounded once; an infinity stays one, though its low part is NaN. */
static inline REAL FN(add_pairs)(REAL a_hi, REAL a_lo, REAL b_hi, REAL b_lo)
{
  REAL lo;
  const REAL hi = FN(two_sum)(a_hi, b_hi, &lo);
  const REAL sum = hi + (lo + (a_lo + b_lo));
  return FN(finite)(hi) ? sum : hi;
}

/* The offset in bytes of row number r. */
static inline int64_t FN(offset)(const struct pl_task *task, const struct pl_view *view, int64_t r)
{
  if (task->inner == 1) return r * view->outer; /* a division costs as much as ten elements */
  return (r / task->inner) * view->outer + (r % task->inner) * view->inner;
}

/* Row number r of an array that may be missing. */
static inline char *FN(row_at)(const struct pl_task *task, const struct pl_view *view, int64_t r)
{
  return view->data ? (char *)view->data + FN(offset)(task, view, r) : NULL;
}

static inline int64_t FN(block_count)(const struct pl_task *task)
{
  return (task->classes + BLOCK - 1) / BLOCK;
}

/* The elements of block b: BLOCK, or what is left. */
static inline int64_t FN(block_length)(const struct pl_task *task, int64_t b)
{
  const int64_t left = task->classes - b * BLOCK;
  return left < BLOCK ? left : BLOCK;
}

/* ---- loading and storing one element of any type ---- */

static inline REAL FN(load)(const void *p, int dtype)
{
  if (dtype == PL_FLOAT32) {
    float value;
    memcpy(&value, p, sizeof value);
    return (REAL)value;
  }
  if (dtype == PL_FLOAT64) {
    double value;
    memcpy(&value, p, sizeof value);
    return (REAL)value;
  }
  uint16_t bits;
  memcpy(&bits, p, sizeof bits);
  return (REAL)(dtype == PL_BFLOAT16 ? pl_from_bfloat16(bits) : pl_from_float16(bits));
}

static inline void FN(store)(void *p, REAL value, int dtype)
{
  if (dtype == PL_FLOAT16 || dtype == PL_BFLOAT16) {
    const uint16_t bits = dtype == PL_BFLOAT16 ? pl_to_bfloat16((float)value) : pl_to_float16((float)value);
    memcpy(p, &bits, sizeof bits);
  } else if (dtype == PL_FLOAT32) {
    const float narrow = (float)value;
    memcpy(p, &narrow, sizeof narrow);
  } else {
    const double wide = (double)value;
    memcpy(p, &wide, sizeof wide);
  }
}

/* n elements at p, stride bytes apart. The type is looked at once, outside the loops. */
static void FN(load_many)(REAL *x, const char *p, int64_t stride, int64_t n, int dtype)
{
  const int64_t size = pl_itemsize(dtype);
  if (stride == size && dtype == NATIVE_DTYPE) {
    memcpy(x, p, (size_t)n * sizeof(REAL));
  } else if (dtype == PL_FLOAT32) {
    for (int64_t c = 0; c < n; c++) x[c] = FN(load)(p + c * stride, PL_FLOAT32);
  } else if (dtype == PL_FLOAT64) {
    for (int64_t c = 0; c < n; c++) x[c] = FN(load)(p + c * stride, PL_FLOAT64);
  } else if (dtype == PL_BFLOAT16 && stride == size) {
    for (int64_t c = 0; c < n; c++) x[c] = FN(load)(p + c * 2, PL_BFLOAT16);
  } else if (dtype == PL_FLOAT16 && stride == size) {
    for (int64_t c = 0; c < n; c++) x[c] = FN(load)(p + c * 2, PL_FLOAT16);
  } else {
    for (int64_t c = 0; c < n; c++) x[c] = FN(load)(p + c * stride, dtype);
  }
}

static void FN(store_many)(char *p, const REAL *x, int64_t stride, int64_t n, int dtype)
{
  const int64_t size = pl_itemsize(dtype);
  if (stride == size && dtype == NATIVE_DTYPE) {
    memcpy(p, x, (size_t)n * sizeof(REAL));
  } else if (dtype == NATIVE_DTYPE) {
    for (int64_t c = 0; c < n; c++) FN(store)(p + c * stride, x[c], NATIVE_DTYPE);
  } else if (dtype == PL_BFLOAT16) {
    for (int64_t c = 0; c < n; c++) FN(store)(p + c * stride, x[c], PL_BFLOAT16);
  } else {
    for (int64_t c = 0; c < n; c++) FN(store)(p + c * stride, x[c], dtype);
  }
}

/* ---- one row, LANES elements at a time ---- */

/* Where the block after this one starts: in this row, or in the next; else anywhere. exp_many asks for it line by line
 * while it computes; asked for all at once, it held up the loads behind it. */
static const REAL *FN(next_block)(const struct pl_task *task, int64_t r, int64_t first, int64_t end, const REAL *anywhere)
{
  const struct pl_view *logits = &task->logits;
  if (first >= task->classes) {
    first = 0;
    r++;
  }
  if (r >= end || logits->classes != pl_itemsize(task->dtype)) return anywhere;
  return (const REAL *)(const void *)(FN(row_at)(task, logits, r) + first * logits->classes);
}

/* Elements [first, first + n) of a row into x, padded to whole groups with -inf, which counts for nothing. */
static void FN(stage)(const struct pl_task *task, const char *row, const char *where, int64_t first, int64_t n, REAL *x)
{
  FN(load_many)(x, row + first * task->logits.classes, task->logits.classes, n, task->dtype);
  if (where) {
    for (int64_t c = 0; c < n; c++)
      if (!where[(first + c) * task->where.classes]) x[c] = -INFINITY;
  }
  for (int64_t c = n; c < ROUND_UP(n, GROUP); c++) x[c] = -INFINITY;
}

static REAL FN(maximum)(const REAL *x, int64_t n)
{
  REAL best[GROUP];
  for (int l = 0; l < GROUP; l++) best[l] = x[l];
  for (int64_t c = GROUP; c < n; c += GROUP)
    for (int l = 0; l < GROUP; l++) best[l] = x[c + l] > best[l] ? x[c + l] : best[l];
#pragma GCC unroll 6
  for (int half = GROUP / 2; half; half /= 2)
    for (int l = 0; l < half; l++) best[l] = best[l + half] > best[l] ? best[l + half] : best[l];
  /* A NaN that came first stays in its lane; elsewhere it loses every comparison. It shows in the sum either way. */
  return best[0];
}

static inline REAL FN(term)(REAL x, REAL max, struct FN(temperature) t, bool plain)
{
  REAL lo;
  const REAL hi = plain ? FN(two_sum)(x, -max, &lo) : FN(exponent)(x, max, t.inverse, t.inverse_lo, &lo);
  return FN(exp_scaled)(hi, lo);
}

/* e = exp((x - max) / temperature) * EXP_SCALE, n in whole lines; `next` is memory that will be read soon. */
static void FN(exp_many)(const REAL *restrict x, REAL *restrict e, int64_t n, REAL max, struct FN(temperature) t,
                         const REAL *next)
{
  if (t.inverse == 1 && t.inverse_lo == 0) { /* at temperature 1 the products drop out */
    for (int64_t c = 0; c < n; c += LANES) {
      __builtin_prefetch(next + c);
      for (int l = 0; l < LANES; l++) e[c + l] = FN(term)(x[c + l], max, t, true);
    }
  } else {
    for (int64_t c = 0; c < n; c += LANES) {
      __builtin_prefetch(next + c);
      for (int l = 0; l < LANES; l++) e[c + l] = FN(term)(x[c + l], max, t, false);
    }
  }
}

/* Steps 2 and 3 of the tree: the sum of n elements (whole groups) as a pair. With `ones`, elements equal to EXP_SCALE are
 * left out and counted there. */
static inline REAL FN(sum_lanes)(const REAL *restrict e, int64_t n, REAL *result_lo, REAL *ones)
{
  REAL s[LANES] = {0}, s_lo[LANES] = {0};
  UINT count[LANES] = {0};
  for (int64_t c = 0; c < n; c += GROUP) {
    for (int l = 0; l < LANES; l++) {
      REAL term[LINES_PER_GROUP], lo;
      for (int line = 0; line < LINES_PER_GROUP; line++) {
        term[line] = e[c + line * LANES + l];
        if (ones) {
          const bool one = term[line] == EXP_SCALE;
          count[l] += one;
          term[line] = one ? 0 : term[line];
        }
      }
      s[l] = FN(two_sum)(s[l], (term[0] + term[1]) + (term[2] + term[3]), &lo);
      s_lo[l] += lo;
    }
  }
#pragma GCC unroll 4
  for (int half = LANES / 2; half; half /= 2) {
    for (int l = 0; l < half; l++) {
      REAL lo;
      s[l] = FN(two_sum)(s[l], s[l + half], &lo);
      s_lo[l] = (s_lo[l] + s_lo[l + half]) + lo;
      count[l] += count[l + half];
    }
  }
  if (ones) *ones = (REAL)count[0];
  if (!FN(finite)(s[0])) {
    *result_lo = 0;
    return s[0];
  }
  return FN(fast_two_sum)(s[0], s_lo[0], result_lo);
}

static REAL FN(sum)(const REAL *e, int64_t n, REAL *result_lo)
{
  return FN(sum_lanes)(e, n, result_lo, NULL);
}

/* The end of step 3: unscaled, with the terms that are exactly 1, but for the one that is left out. */
static inline REAL FN(add_ones)(REAL sum, REAL sum_lo, REAL ones, REAL *result_lo)
{
  REAL lo;
  const REAL hi = FN(two_sum)(sum / EXP_SCALE, ones - 1, &lo);
  *result_lo = lo + sum_lo / EXP_SCALE;
  return hi;
}

/* Infinite maxima have no sum; but a NaN beside them must show. */
static REAL FN(nan_or_zero)(const REAL *x, int64_t n)
{
  REAL found = 0;
  for (int64_t c = 0; c < n; c++) found = x[c] == x[c] ? found : x[c];
  return found;
}

/* Step 1: a block's numbers from x; leaves exp(x - max) * EXP_SCALE in e. */
static struct FN(row) FN(reduce_block)(const REAL *restrict x, REAL *restrict e, int64_t n, struct FN(temperature) t,
                                       const REAL *next, bool entropy)
{
  struct FN(row) block = {0};
  REAL ones;
  const int64_t lines = ROUND_UP(n, LANES), groups = ROUND_UP(n, GROUP);
  block.max = FN(maximum)(x, groups);
  FN(exp_many)(x, e, lines, block.max, t, next);
  for (int64_t c = lines; c < groups; c += LANES)
    for (int l = 0; l < LANES; l++) e[c + l] = 0;
  if (block.max - block.max != 0) {
    block.sum = FN(nan_or_zero)(x, n);
    return block;
  }
  block.sum = FN(sum_lanes)(e, groups, &block.sum_lo, &ones);
  block.sum = FN(add_ones)(block.sum, block.sum_lo, ones, &block.sum_lo);
  if (entropy) {
    REAL product[BLOCK_BYTES / sizeof(REAL)], lo;
    for (int64_t c = 0; c < groups; c++) {
      const REAL hi = FN(exponent)(x[c], block.max, t.inverse, t.inverse_lo, &lo);
      product[c] = e[c] == 0 ? 0 : e[c] * -hi;
    }
    block.dot = FN(sum)(product, groups, &lo) / EXP_SCALE;
  }
  return block;
}

/* Step 4. Every factor is taken to the overall maximum, so that errors do not pile up in a row that keeps rising. */
static struct FN(row) FN(join_blocks)(const struct FN(row) * blocks, int64_t count, struct FN(temperature) t)
{
  int64_t top = 0;
  for (int64_t b = 1; b < count; b++)
    if (blocks[b].max > blocks[top].max || blocks[top].max != blocks[top].max) top = b;

  struct FN(row) row = blocks[top];
  const bool no_sum = row.max - row.max != 0;
  for (int64_t b = 0; b < count; b++) {
    if (b == top) continue;
    if (no_sum) {
      row.sum += blocks[b].sum; /* zeros, or a NaN */
      continue;
    }
    REAL lo, factor_lo, others_lo;
    const REAL distance = FN(exponent)(blocks[b].max, row.max, t.inverse, t.inverse_lo, &lo);
    const REAL factor = FN(exp_pair)(distance, lo, &factor_lo) / EXP_SCALE;
    factor_lo /= EXP_SCALE;
    const REAL others = FN(two_sum)(blocks[b].sum, 1, &others_lo);
    others_lo += blocks[b].sum_lo;
    const REAL term = others * factor;
    const REAL term_lo = FMA(others, factor, -term) + (others * factor_lo + others_lo * factor);
    row.sum = FN(two_sum)(row.sum, term, &lo);
    row.sum_lo += lo + term_lo;
    row.dot += factor == 0 ? 0 : factor * (blocks[b].dot - distance * others);
  }
  return row;
}

/* What the results need beside the row's numbers. */
struct FN(finish) {
  REAL log1p, log1p_lo;           /* log(sum of exp(x - max)) */
  REAL reciprocal, reciprocal_lo; /* 1 / (sum of exp(x - max) * EXP_SCALE) */
};

/* A maximum of +inf (or -inf: no finite logit at all) makes every probability NaN, as in every peer. */
static inline struct FN(finish) FN(finish_row)(REAL max, REAL sum, REAL sum_lo)
{
  struct FN(finish) f;
  const REAL poison = max - max;
  REAL total_lo;
  const REAL total = FN(two_sum)(1, sum, &total_lo) + poison;
  total_lo += sum_lo;
  const REAL reciprocal = 1 / total;
  const REAL residual = FMA(-total, reciprocal, 1) - total_lo * reciprocal;
  f.reciprocal = reciprocal / EXP_SCALE;
  f.reciprocal_lo = residual * reciprocal / EXP_SCALE;
  f.log1p = FN(log1p_pair)(sum, sum_lo, &f.log1p_lo) + poison;
  return f;
}

static inline REAL FN(probability)(REAL e, struct FN(finish) f)
{
  return FMA(e, f.reciprocal, e * f.reciprocal_lo);
}

static inline REAL FN(log_probability)(REAL x, REAL max, struct FN(finish) f, struct FN(temperature) t)
{
  REAL lo;
  const REAL hi = FN(exponent)(x, max, t.inverse, t.inverse_lo, &lo);
  return FN(add_pairs)(hi, lo, -f.log1p, -f.log1p_lo);
}

/* max / temperature + log(sum); the infinities of max pass, where log1p holds a NaN from no other cause. */
static inline REAL FN(log_sum)(REAL max, REAL sum, struct FN(finish) f, struct FN(temperature) t)
{
  if (!FN(finite)(max)) return sum == sum ? max : sum;
  const REAL scaled = max * t.inverse;
  const REAL scaled_lo = FMA(max, t.inverse, -scaled) + max * t.inverse_lo;
  return FN(add_pairs)(scaled, scaled_lo, f.log1p, f.log1p_lo);
}

/* sum of q (D + L) = sum of q D + L sum of q, D = (max - x) / temperature, L = log1p; q = 0 counts for nothing, whatever D.
 * dot and labels are pairs. A one-hot q gives the bits of -log_probability. */
static inline REAL FN(dense_loss)(REAL dot, REAL dot_lo, REAL labels, REAL labels_lo, struct FN(finish) f)
{
  const REAL mass = labels * f.log1p;
  const REAL mass_lo = FMA(labels, f.log1p, -mass) + (labels * f.log1p_lo + labels_lo * f.log1p);
  return FN(add_pairs)(dot, dot_lo, mass, mass_lo);
}

/* x becomes q (max - x) and q its low part. The product's own rounding error is kept, so that the sum is good to a pair. */
static inline void FN(weigh)(REAL *x, REAL *q, REAL max)
{
  REAL lo;
  const REAL hi = FN(two_sum)(max, -*x, &lo);
  const REAL product = *q * hi;
  const REAL product_lo = FMA(*q, hi, -product) + *q * lo;
  const bool counts = *q != 0;
  *q = counts && FN(finite)(product) ? product_lo : 0;
  *x = counts ? product : 0;
}

static inline int64_t FN(label)(const struct pl_task *task, int64_t r, int64_t k)
{
  int64_t label;
  memcpy(&label, FN(row_at)(task, &task->labels, r) + k * task->labels.classes, sizeof label);
  return label;
}

static int64_t FN(flat_label)(const struct pl_task *task, int64_t r, int64_t k)
{
  return ((r / task->inner) * task->picks + k) * task->inner + r % task->inner;
}

/* One picked log-probability, or the loss that is its negative: subtracted from 0, so that a certain row's is not -0. */
static void FN(store_pick)(const struct pl_task *task, char *out, int64_t k, REAL log_probability)
{
  const bool loss = task->operation == PL_SPARSE_SOFTMAX_CROSS_ENTROPY;
  FN(store)(out + k * task->out.classes, loss ? 0 - log_probability : log_probability, task->out_dtype);
}

/* The outputs of PL_SCORE for row r. */
static void FN(score_row)(const struct pl_task *task, int64_t r, const struct FN(row) * row, struct FN(finish) f,
                          struct FN(temperature) t, const REAL *top_x, const int64_t *top_index)
{
  const int64_t k = task->picks;
  ((REAL *)task->logsumexp)[r] = FN(log_sum)(row->max, row->sum, f, t);
  ((REAL *)task->entropy)[r] = f.log1p + row->dot * (f.reciprocal * EXP_SCALE);
  for (int64_t i = 0; i < k; i++) {
    REAL lo;
    const REAL hi = FN(exponent)(top_x[i], row->max, t.inverse, t.inverse_lo, &lo);
    ((REAL *)task->top_k_probabilities)[r * k + i] = FN(probability)(FN(exp_scaled)(hi, lo), f);
    task->top_k_indices[r * k + i] = top_index[i];
  }
  ((REAL *)task->confidence)[r] = ((REAL *)task->top_k_probabilities)[r * k];
  task->prediction[r] = top_index[0];
}

/* Keeps the k largest of a row so far, largest first, the earlier of equals first, NaN above all (as np.argmax does). */
static inline bool FN(above)(REAL a, REAL b)
{
  return a > b || (a != a && b == b);
}

static void FN(keep_largest)(const REAL *x, int64_t n, int64_t first, REAL *top_x, int64_t *top_index, int64_t k, int64_t *kept)
{
  for (int64_t g = 0; g < n; g += GROUP) {
    if (*kept == k) {
      const REAL least = top_x[k - 1];
      int any = 0;
      for (int l = 0; l < GROUP; l++) any |= !(x[g + l] <= least);
      if (!any) continue;
    }
    const int64_t end = g + GROUP < n ? g + GROUP : n;
    for (int64_t c = g; c < end; c++) {
      if (*kept == k && !FN(above)(x[c], top_x[k - 1])) continue;
      int64_t place = *kept < k ? (*kept)++ : k - 1;
      for (; place > 0 && FN(above)(x[c], top_x[place - 1]); place--) {
        top_x[place] = top_x[place - 1];
        top_index[place] = top_index[place - 1];
      }
      top_x[place] = x[c];
      top_index[place] = first + c;
    }
  }
}

/* A row under way: reduced, and not yet written. x and e hold its block, if it has one only. */
struct FN(slot) {
  struct FN(row) row;
  REAL *x, *e;
  struct FN(row) * blocks; /* one for each block */
  REAL *top_x;             /* PL_SCORE: its largest logits, and their classes */
  int64_t *top_index;
};

static void FN(reduce_row)(const struct pl_task *task, int64_t r, int64_t end, struct FN(temperature) t, struct FN(slot) * slot)
{
  const int64_t count = FN(block_count)(task);
  const char *logits = FN(row_at)(task, &task->logits, r);
  const char *where = FN(row_at)(task, &task->where, r);
  const bool scoring = task->operation == PL_SCORE;
  int64_t kept = 0;
  for (int64_t b = 0; b < count; b++) {
    const int64_t n = FN(block_length)(task, b);
    const REAL *next = FN(next_block)(task, r, (b + 1) * BLOCK, end, slot->x);
    FN(stage)(task, logits, where, b * BLOCK, n, slot->x);
    slot->blocks[b] = FN(reduce_block)(slot->x, slot->e, n, t, next, scoring);
    if (scoring) FN(keep_largest)(slot->x, n, b * BLOCK, slot->top_x, slot->top_index, task->picks, &kept);
  }
  slot->row = count == 1 ? slot->blocks[0] : FN(join_blocks)(slot->blocks, count, t);
}

static int64_t FN(write_row)(const struct pl_task *task, int64_t r, struct FN(temperature) t, const struct FN(slot) * slot)
{
  const int64_t classes = task->classes;
  const int64_t count = FN(block_count)(task);
  const char *logits = FN(row_at)(task, &task->logits, r);
  const char *where = FN(row_at)(task, &task->where, r);
  char *out = FN(row_at)(task, &task->out, r);
  REAL *x = slot->x, *e = slot->e;
  const struct FN(row) row = slot->row;
  const struct FN(finish) f = FN(finish_row)(row.max, row.sum, row.sum_lo);
  const bool scoring = task->operation == PL_SCORE;
  int64_t bad = -1;

  if (task->operation == PL_LOGSUMEXP) {
    FN(store)(out, FN(log_sum)(row.max, row.sum, f, t), task->out_dtype);
    return -1;
  }
  if (scoring) FN(score_row)(task, r, &row, f, t, slot->top_x, slot->top_index);

  if (task->labels.data && task->operation != PL_SOFTMAX_CROSS_ENTROPY) {
    for (int64_t k = 0; k < (scoring ? 1 : task->picks); k++) {
      const int64_t label = FN(label)(task, r, k);
      const bool inside = label >= 0 && label < classes;
      const REAL picked = inside ? FN(load)(logits + label * task->logits.classes, task->dtype) : NAN;
      const REAL result = FN(log_probability)(picked, row.max, f, t);
      if (!inside) bad = FN(flat_label)(task, r, k);
      if (scoring) {
        ((REAL *)task->loss)[r] = 0 - result;
        task->correct[r] = label == task->prediction[r];
      } else {
        FN(store_pick)(task, out, k, result);
      }
    }
    return bad;
  }
  if (scoring) return -1;

  /* The second pass. A row of one block is still in x and e; of a longer one each block is staged again, from cache. */
  const bool native = task->out_dtype == NATIVE_DTYPE && task->out.classes == (int64_t)sizeof(REAL);
  const bool streamed = native && task->outer * task->inner * classes * (int64_t)sizeof(REAL) >= STREAM_BYTES;
  const bool direct = native && !streamed;
  REAL dot = 0, dot_lo = 0, mass = 0, mass_lo = 0;
  for (int64_t b = 0; b < count; b++) {
    const int64_t n = FN(block_length)(task, b);
    if (count > 1) FN(stage)(task, logits, where, b * BLOCK, n, x);
    if (task->operation == PL_SOFTMAX_CROSS_ENTROPY) {
      REAL lo, part_lo;
      const char *labels = FN(row_at)(task, &task->labels, r);
      const int64_t groups = ROUND_UP(n, GROUP);
      FN(load_many)(e, labels + b * BLOCK * task->labels.classes, task->labels.classes, n, task->dtype);
      for (int64_t c = n; c < groups; c++) e[c] = 0;
      REAL part = FN(sum)(e, groups, &part_lo);
      mass = FN(two_sum)(mass, part, &lo);
      mass_lo += lo + part_lo;
      for (int64_t c = 0; c < groups; c++) FN(weigh)(&x[c], &e[c], row.max);
      part = FN(sum)(x, groups, &part_lo);
      part_lo += FN(sum)(e, groups, &lo);
      dot = FN(two_sum)(dot, part, &lo);
      dot_lo += (FN(finite)(dot) ? lo : 0) + part_lo;
      continue;
    }
    const bool log = task->operation == PL_LOG_SOFTMAX;
    char *to = out + b * BLOCK * task->out.classes;
    REAL *result = direct ? (REAL *)(void *)to : x;
    if (log) {
      for (int64_t c = 0; c < n; c++) result[c] = FN(log_probability)(x[c], row.max, f, t);
    } else {
      if (count > 1) FN(exp_many)(x, e, ROUND_UP(n, LANES), row.max, t, x);
      for (int64_t c = 0; c < n; c++) result[c] = FN(probability)(e[c], f);
    }
    if (where) {
      for (int64_t c = 0; c < n; c++)
        if (!where[(b * BLOCK + c) * task->where.classes]) result[c] = log ? -INFINITY : 0;
    }
    if (streamed) {
      pl_stream(to, (const char *)x, (size_t)n * sizeof(REAL));
    } else if (!direct) {
      FN(store_many)(to, x, task->out.classes, n, task->out_dtype);
    }
  }
  if (task->operation == PL_SOFTMAX_CROSS_ENTROPY)
    FN(store)(out, FN(dense_loss)(dot, dot_lo, mass, mass_lo, f), task->out_dtype);
  return -1;
}
