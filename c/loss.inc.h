/* The cross entropies with every option, and their gradients; once for float and once for double.
 *
 * With the coefficients a = keep * q + even of the classes (q: the targets times the class weights; even: what label smoothing
 * gives to each class, times its weight), A their sum, and L the log of the sum of exponentials, a row's loss is
 * sum(a (L - x)) + z_loss L^2, and its derivative for x is (A + 2 z_loss L) p - a. All sums over the classes are pairs, taken
 * relative to the maximum; an option that is not used adds zeros to them, which change no bits. */

struct FN(options) {
  REAL keep, smoothing, z_loss; /* keep = 1 - smoothing */
  struct FN(pair) scale;
};

static struct FN(options) FN(options_of)(const struct pl_task *task)
{
  const struct pl_loss *losses = &task->losses;
  const REAL smoothing = (REAL)losses->label_smoothing;
  return (struct FN(options)){1 - smoothing, smoothing, (REAL)losses->z_loss, {(REAL)losses->scale, (REAL)losses->scale_lo}};
}

/* The loss of a row and what its gradient is made from. */
struct FN(loss) {
  REAL value;
  struct FN(pair) factor; /* of the terms */
  REAL keep, even;        /* of q; of each class's weight: what is added to the terms */
};

/* dot and mass: the sums of q (max - x) and q; the same of the class weights alone are in `spread`. A one-hot q has the bits of
 * a label, and both those of -log_probability. */
INLINE struct FN(loss)
    FN(close_loss)(const struct FN(options) * o, REAL max, struct FN(closing) f, struct FN(temperature) t, struct FN(pair) dot,
                   struct FN(pair) mass, const struct FN(spread) * spread, REAL sample_weight, REAL loss_grad)
{
  const struct FN(pair) log1p = {f.log1p, f.log1p_lo}, inverse = {t.inverse, t.inverse_lo};
  const struct FN(pair) zero = {0, 0}, keep = {o->keep, 0}, even = {spread->count ? o->smoothing / spread->count : 0, 0};
  struct FN(pair) loss = FN(plus)(FN(times)(dot, inverse), FN(times)(mass, log1p));
  struct FN(pair) slope = FN(times)(keep, mass);
  /* where keep is 0, an infinite loss counts for nothing */
  loss = keep.hi != 0 ? FN(times)(keep, loss) : zero;
  if (o->smoothing != 0) {
    const struct FN(pair) spread_loss = FN(plus)(FN(times)(spread->dot, inverse), FN(times)(spread->mass, log1p));
    loss = FN(plus)(loss, FN(times)(even, spread_loss));
    slope = FN(plus)(slope, FN(times)(even, spread->mass));
  }
  if (o->z_loss != 0) {
    const struct FN(pair) z_loss = {o->z_loss, 0}, two = {2, 0};
    const struct FN(pair) log_sum = FN(log_sum_pair)(max, f, t);
    const struct FN(pair) product = FN(times)(z_loss, log_sum);
    loss = FN(plus)(loss, FN(times)(product, log_sum));
    slope = FN(plus)(slope, FN(times)(two, product));
  }
  loss.hi += 0 * f.log1p; /* a NaN shows even where nothing counts */
  loss = FN(times)(loss, (struct FN(pair)){sample_weight, 0});
  const struct FN(pair) outer =
      FN(times)(FN(times)(o->scale, (struct FN(pair)){sample_weight, 0}), (struct FN(pair)){loss_grad, 0});
  const struct FN(pair) main = FN(times)(outer, keep), rest = FN(times)(outer, even);
  return (struct FN(loss)){
      .value = FN(rounded)(loss),
      .factor = FN(times)(FN(times)(outer, slope), (struct FN(pair)){f.reciprocal, f.reciprocal_lo}),
      /* negative from here on: GCC makes one operation of a negated FMA, and its zero may have the other sign */
      .keep = -(main.hi + main.lo),
      .even = -(rest.hi + rest.lo),
  };
}

/* Of row r: one element of an array over the rows that may be missing. */
static inline REAL FN(of_row)(const void *array, int64_t r)
{
  return array ? ((const REAL *)array)[r] : 1;
}

/* q (max - x), and in q its low part: the product's own rounding error is kept, so that the sum is good to a pair. q = 0
 * counts for nothing, whatever x. */
static inline REAL FN(weigh)(REAL x, REAL *q, REAL max)
{
  REAL lo;
  const REAL hi = FN(two_sum)(max, -x, &lo);
  const REAL product = *q * hi;
  const REAL product_lo = FMA(*q, hi, -product) + *q * lo;
  const bool counts = *q != 0;
  *q = counts && FN(finite)(product) ? product_lo : 0;
  return counts ? product : 0;
}

/* The same in every lane, but for the low part of what is not finite: nothing looks at it. */
INLINE VEC FN(vec_weigh)(VEC x, VEC q, VEC max, VEC *low)
{
  VEC lo;
  const VEC zero = FN(vec_fill)(0), hi = FN(vec_two_sum)(max, -x, &lo), product = q * hi;
  *low = FN(vec_unless_equal)(FN(vec_fma)(q, hi, -product) + q * lo, q, zero);
  return FN(vec_unless_equal)(product, q, zero);
}

/* The q of block b: probabilities times class weights, 0 where masked out. Where they lie, or made in `room`. */
static const REAL *FN(targets_at)(const struct pl_task *task, int64_t r, int64_t b, int64_t n, REAL *room)
{
  const REAL *weight = task->losses.weight;
  const char *where = FN(row_at)(task, &task->where, r);
  const REAL *q = FN(elements)(task, &task->losses.probabilities, r, b * BLOCK, n, room);
  if (!weight && !where) return q;
  for (int64_t c = 0; c < n; c++) room[c] = weight ? q[c] * weight[b * BLOCK + c] : q[c];
  FN(mask_block)(task, where, b, room, n, 0);
  return room;
}

/* The sums of q, of q (max - x), and of the rounding errors of those products, lane by lane. */
INLINE void FN(add_targets)(struct FN(lanes) * mass, struct FN(lanes) * dot, struct FN(lanes) * low, const REAL *x,
                            const REAL *q, VEC max)
{
  EACH_VEC(v)
  {
    VEC targets[LINES_PER_GROUP], product[LINES_PER_GROUP], error[LINES_PER_GROUP];
    for (int i = 0; i < LINES_PER_GROUP; i++) {
      targets[i] = FN(vec_load)(q + i * LANES + v);
      product[i] = FN(vec_weigh)(FN(vec_load)(x + i * LANES + v), targets[i], max, &error[i]);
    }
    FN(add_line)(mass, v / VEC_LANES, (targets[0] + targets[1]) + (targets[2] + targets[3]));
    FN(add_line)(dot, v / VEC_LANES, (product[0] + product[1]) + (product[2] + product[3]));
    FN(add_line)(low, v / VEC_LANES, (error[0] + error[1]) + (error[2] + error[3]));
  }
}

/* The sums of q (max - x) and q over a row. x is its block, if it has one only. */
static void FN(dot_targets)(const struct pl_task *task, int64_t r, const REAL *x, REAL max, const struct FN(slot) * slot,
                            struct FN(pair) * dot, struct FN(pair) * mass)
{
  const VEC top = FN(vec_fill)(max), zero = FN(vec_fill)(0);
  const int64_t count = FN(block_count)(task);
  for (int64_t b = 0; b < count; b++) {
    const int64_t n = FN(block_length)(task, b), whole = n / GROUP * GROUP;
    const REAL *q = FN(targets_at)(task, r, b, n, slot->first);
    struct FN(lanes) sums[3];
    struct FN(pair) part;
    REAL low_lo;
    if (count > 1) x = FN(stage)(task, r, b * BLOCK, n, slot->room, NULL);
    for (int i = 0; i < 3; i++)
      for (int v = 0; v < LINE_VECS; v++) sums[i].sum[v] = sums[i].lo[v] = zero;
    for (int64_t c = 0; c < whole; c += GROUP) FN(add_targets)(&sums[0], &sums[1], &sums[2], x + c, q + c, top);
    if (whole < n) {
      REAL tail[GROUP], targets[GROUP];
      FN(pad)(tail, x + whole, n - whole, zero);
      FN(pad)(targets, q + whole, n - whole, zero);
      FN(add_targets)(&sums[0], &sums[1], &sums[2], tail, targets, top);
    }
    part.hi = FN(join_lanes)(&sums[0], &part.lo);
    *mass = b ? FN(gather)(*mass, part) : part;
    part.hi = FN(join_lanes)(&sums[1], &part.lo);
    part.lo += FN(join_lanes)(&sums[2], &low_lo);
    *dot = b ? FN(gather)(*dot, part) : part;
  }
}

/* The gradient of blocks [first, last) of row r. */
static void FN(write_slopes)(const struct pl_task *task, int64_t r, int64_t first, int64_t last, int64_t end,
                             struct FN(temperature) t, const struct FN(slot) * slot, const struct FN(loss) * loss,
                             int64_t label, REAL label_term)
{
  const int64_t count = FN(block_count)(task);
  const char *where = FN(row_at)(task, &task->where, r);
  const struct FN(sink) sink = FN(sink_at)(task, r);
  const REAL *weight = task->losses.weight;
  REAL *room = slot->room, *addends = slot->first, *slopes = slot->other; /* slopes of the softcap: from stage */
  const bool soft = task->losses.probabilities.data, softcap = task->losses.softcap != 0;
  struct FN(line) line = {.factor = loss->factor.hi, .factor_lo = loss->factor.lo, .addend = loss->even};
  const bool weighted = weight && loss->even != 0; /* 0 times a negative weight is -0 */
  if (soft || weighted) line.addends = addends;
  for (int64_t b = first; b < last; b++) {
    const int64_t n = FN(block_length)(task, b), at = label - b * BLOCK;
    const REAL *of_class = weight ? weight + b * BLOCK : NULL;
    REAL *result = FN(place)(&sink, b, room);
    if (soft) {
      const REAL *q = FN(targets_at)(task, r, b, n, addends);
      for (int64_t c = 0; c < n; c++) addends[c] = FMA(q[c], loss->keep, weighted ? of_class[c] * loss->even : loss->even);
    } else if (line.addends) {
      for (int64_t c = 0; c < n; c++) addends[c] = of_class[c] * loss->even;
    }
    struct FN(line) of_block = line;
    REAL shrink = 1;
    if (count == 1) {
      FN(scale_terms)(slot->e, result, n, &line);
    } else {
      of_block = FN(line_of)(&line, slot->blocks[b].max, slot->row.max, t, &shrink);
      FN(scale_block)(FN(terms_of)(task, r, b, end, t, slot, slopes), result, n, &of_block, shrink);
    }
    if (at >= 0 && at < n) {
      const REAL of_label = of_class ? of_class[at] : 1, term = label_term * shrink;
      const REAL addend = FMA(of_label, loss->keep, of_label * loss->even);
      result[at] = FMA(term, of_block.factor, FMA(term, of_block.factor_lo, addend));
    }
    for (int64_t c = 0; softcap && c < n; c++) result[c] *= slopes[c];
    FN(mask_block)(task, where, b, result, n, 0);
    FN(put)(&sink, b, room, n);
  }
}

/* Rows that are ignored, or have no classes. */
static void FN(write_nothing)(const struct pl_task *task, int64_t r, int64_t first, int64_t last, REAL *room)
{
  const struct FN(sink) sink = FN(sink_at)(task, r);
  for (int64_t b = first; b < last; b++) {
    const int64_t n = FN(block_length)(task, b);
    memset(FN(place)(&sink, b, room), 0, (size_t)n * sizeof(REAL));
    FN(put)(&sink, b, room, n);
  }
}

/* One number a row of LANES rows, side by side, so that what is made of them is made for all rows at once. */
struct FN(losses) {
  REAL counts[LANES]; /* of the classes; 0 for ignored rows */
  REAL sample_weight[LANES], loss_grad[LANES];

  /* The labels, 0 where there are none or not one of the classes; and where there are labels, their logits. */
  int64_t label[LANES];
  REAL target[LANES];

  REAL dot[LANES], dot_lo[LANES], mass[LANES], mass_lo[LANES];                           /* of the targets */
  REAL even[LANES], even_lo[LANES], weights[LANES], weights_lo[LANES];                   /* the same of the class weights */
  REAL value[LANES], factor[LANES], factor_lo[LANES], of_target[LANES], of_class[LANES]; /* struct loss */
};

static void FN(close_losses)(const struct pl_task *task, const REAL *max, const struct FN(closings) * f,
                             struct FN(temperature) t, struct FN(losses) * losses)
{
  const struct FN(options) options = FN(options_of)(task);
  for (int l = 0; l < LANES; l++) {
    const struct FN(spread) spread = {.count = losses->counts[l],
                                      .mass = {losses->weights[l], losses->weights_lo[l]},
                                      .dot = {losses->even[l], losses->even_lo[l]}};
    const struct FN(pair) dot = {losses->dot[l], losses->dot_lo[l]}, mass = {losses->mass[l], losses->mass_lo[l]};
    const struct FN(loss) row = FN(close_loss)(&options, max[l], FN(closing_of)(f, l), t, dot, mass, &spread,
                                               losses->sample_weight[l], losses->loss_grad[l]);
    losses->value[l] = losses->counts[l] == 0 ? 0 : row.value;
    losses->factor[l] = row.factor.hi;
    losses->factor_lo[l] = row.factor.lo;
    losses->of_target[l] = row.keep;
    losses->of_class[l] = row.even;
  }
}

/* What is given with the rows. `counts` has the classes that are not masked out, and becomes 0 where the label is ignored.
 * Returns the flat index of the first label outside [0, classes) that is not, or -1. */
static int64_t FN(look_at_rows)(const struct pl_task *task, int64_t r, int64_t rows, struct FN(losses) * losses)
{
  int64_t bad = -1;
  for (int64_t l = 0; l < LANES; l++) {
    const int64_t row = r + (l < rows ? l : 0); /* missing rows are as the first */
    losses->sample_weight[l] = FN(of_row)(task->losses.sample_weight, row);
    losses->loss_grad[l] = FN(of_row)(task->losses.loss_grad, row);
    losses->label[l] = 0;
    if (!task->labels.data) continue;
    const int64_t label = FN(label)(task, row, 0);
    if (task->losses.has_ignore_index && label == task->losses.ignore_index) {
      losses->counts[l] = 0;
    } else if (label < 0 || label >= task->classes) {
      if (bad == -1) bad = FN(flat_label)(task, row, 0);
    } else {
      losses->label[l] = label;
    }
  }
  return bad;
}

/* The sums over q where there are labels: the label's weight there, and 0 elsewhere. */
static void FN(weigh_labels)(const struct pl_task *task, const REAL *max, struct FN(losses) * losses)
{
  const REAL *weight = task->losses.weight;
  for (int64_t l = 0; l < LANES; l++) losses->mass[l] = weight ? weight[losses->label[l]] : 1;
  for (int l = 0; l < LANES; l++) {
    losses->mass_lo[l] = 0;
    losses->dot_lo[l] = losses->mass[l];
    losses->dot[l] = FN(weigh)(losses->target[l], &losses->dot_lo[l], max[l]);
  }
}

/* The losses of rows, with the part that begins them, and their gradients in blocks [first, last). */
static int64_t FN(write_losses)(const struct pl_task *task, int64_t r, int64_t rows, int64_t first, int64_t last, int64_t end,
                                struct FN(temperature) t, const struct FN(slot) * slots, const REAL *max,
                                const struct FN(closings) * f)
{
  const bool soft = !task->labels.data, short_rows = task->classes <= BLOCK;
  struct FN(losses) losses;
  for (int64_t l = 0; l < LANES; l++) {
    const struct FN(spread) *spread = &slots[l < rows ? l : 0].row.spread;
    losses.counts[l] = spread->count;
    losses.even[l] = spread->dot.hi;
    losses.even_lo[l] = spread->dot.lo;
    losses.weights[l] = spread->mass.hi;
    losses.weights_lo[l] = spread->mass.lo;
  }
  const int64_t bad = FN(look_at_rows)(task, r, rows, &losses);
  for (int64_t l = 0; l < LANES; l++) {
    const struct FN(slot) *slot = &slots[l < rows ? l : 0];
    if (!soft) {
      losses.target[l] = short_rows ? slot->x[losses.label[l]] : slot->row.spread.target;
      continue;
    }
    struct FN(pair) dot = {0}, mass = {0};
    if (l < rows && losses.counts[l] != 0) FN(dot_targets)(task, r + l, slot->x, max[l], slot, &dot, &mass);
    losses.dot[l] = dot.hi;
    losses.dot_lo[l] = dot.lo;
    losses.mass[l] = mass.hi;
    losses.mass_lo[l] = mass.lo;
  }
  if (!soft) FN(weigh_labels)(task, max, &losses);
  FN(close_losses)(task, max, f, t, &losses);
  if (first == 0) FN(store_line)(task, r, rows, losses.value);
  for (int64_t i = 0; task->losses.grad.data && i < rows; i++) {
    const struct FN(slot) *slot = &slots[i];
    const int64_t label = soft ? -1 : losses.label[i];
    const struct FN(loss)
        loss = {losses.value[i], {losses.factor[i], losses.factor_lo[i]}, losses.of_target[i], losses.of_class[i]};
    REAL term = 0;
    if (losses.counts[i] == 0) {
      FN(write_nothing)(task, r + i, first, last, slot->room);
      continue;
    }
    if (!soft) term = short_rows ? slot->e[label] : FN(term)(losses.target[i], slot->blocks[label / BLOCK].max, t);
    FN(write_slopes)(task, r + i, first, last, end, t, slot, &loss, label, term);
  }
  return bad;
}
