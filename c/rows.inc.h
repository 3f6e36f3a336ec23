/* The row kernels, once for float and once for double. See kernel.c for the names in capitals.
 *
 * The canonical reduction tree, a function of the row's length and type alone:
 *   1. The row is cut into blocks of BLOCK elements. Each block has its maximum and the sum of exp(x - maximum) over all
 *      elements but one maximum: elements equal to it are counted, not added, and one is left out of the count.
 *   2. Inside a block, lane l of LANES adds up the terms whose index is l modulo LANES, in their order, with TwoSum. Missing
 *      terms are zeros, which change no bits. Sums of what is no term go by fours, plainly, as (a + b) + (c + d), and only
 *      these with TwoSum.
 *   3. The lanes are joined by halves (l with l + LANES / 2, then / 4, ...), with TwoSum; then the count is added.
 *   4. The blocks are joined in index order, in pair arithmetic.
 * Nothing in it depends on the instruction set, on threads or on the rows around.
 *
 * The maximum is left out because log(sum) = maximum + log1p(the others): in a confident row the others are all that
 * there is to see. */

struct FN(pair) {
  REAL hi, lo;
};

/* PL_CROSS_ENTROPY: the label's logit, and what label smoothing needs of the classes that are not masked out. */
struct FN(spread) {
  REAL target;          /* of rows of several blocks; 0 in those without the label */
  REAL count;           /* of the classes; not 0 is all that is sure of it without smoothing */
  struct FN(pair) mass; /* the sum of their weights */
  struct FN(pair) dot;  /* the sum of weight * (max - x), with 0 for a max that is not finite */
};

/* The numbers that every result of a row is made from. */
struct FN(row) {
  REAL max;
  REAL sum, sum_lo; /* of exp(x - max) over all elements but one maximum, as a pair */
  /* PL_SCORE: */
  REAL dot;     /* of exp(x - max) * (max - x) / temperature */
  REAL squares; /* of exp(x - max)^2 over all elements but one maximum */
  struct FN(spread) spread;
};

struct FN(temperature) {
  REAL inverse, inverse_lo; /* 1 / temperature as a pair */
};

/* Temperature 1: the products with its inverse drop out. */
static inline bool FN(is_plain)(struct FN(temperature) t)
{
  return t.inverse == 1 && t.inverse_lo == 0;
}

static inline bool FN(finite)(REAL value)
{
  return value - value == 0;
}

/* a + b and a * b of pairs, as pairs. Infinities give a NaN in lo: it is left out where they are rounded. */
INLINE struct FN(pair) FN(plus)(struct FN(pair) a, struct FN(pair) b)
{
  REAL lo;
  const REAL hi = FN(two_sum)(a.hi, b.hi, &lo);
  lo += a.lo + b.lo;
  return (struct FN(pair)){hi, lo};
}

INLINE struct FN(pair) FN(times)(struct FN(pair) a, struct FN(pair) b)
{
  const REAL hi = a.hi * b.hi;
  const REAL lo = FMA(a.hi, b.hi, -hi) + FMA(a.hi, b.lo, a.lo * b.hi);
  return (struct FN(pair)){hi, lo};
}

/* The sum of blocks so far and one more. A low part that only grew would be rounded itself: 2^19 blocks took 4 ulp of the
 * logarithm of their sum. */
static inline struct FN(pair) FN(gather)(struct FN(pair) sum, struct FN(pair) more)
{
  struct FN(pair) s = FN(plus)(sum, more);
  if (FN(finite)(s.hi)) s.hi = FN(fast_two_sum)(s.hi, s.lo, &s.lo);
  return s;
}

static inline REAL FN(rounded)(struct FN(pair) a)
{
  return FN(finite)(a.hi) ? a.hi + a.lo : a.hi;
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
  } else if (dtype == PL_FLOAT16 && stride == size && sizeof(REAL) == sizeof(float)) {
    pl_from_float16s((float *)(void *)x, p, n); /* never computed in double */
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
  } else if (dtype == PL_BFLOAT16 && stride == size) {
    for (int64_t c = 0; c < n; c++) FN(store)(p + c * 2, x[c], PL_BFLOAT16);
  } else if (dtype == PL_FLOAT16 && stride == size && sizeof(REAL) == sizeof(float)) {
    pl_to_float16s(p, (const float *)(const void *)x, n);
  } else {
    for (int64_t c = 0; c < n; c++) FN(store)(p + c * stride, x[c], dtype);
  }
}

/* ---- one row, LANES elements at a time ---- */

/* Where the block after this one starts: in this row, or in the next; else anywhere. It is asked for line by line while the
 * block is computed; asked for all at once, it held up the loads behind it. */
static const REAL *FN(next_block)(const struct pl_task *task, const struct pl_view *view, int64_t r, int64_t first, int64_t end,
                                  const REAL *anywhere)
{
  if (first >= task->classes) {
    first = 0;
    r++;
  }
  if (r >= end || view->classes != pl_itemsize(task->dtype)) return anywhere;
  return (const REAL *)(const void *)(FN(row_at)(task, view, r) + first * view->classes);
}

/* Half of a softcap, 2 / (temperature * softcap) as a pair, and the least x that is told apart: tanh(-20) is -1. */
struct FN(cap) {
  VEC half, inverse, inverse_lo, least;
};

static struct FN(cap) FN(cap_of)(const struct pl_task *task)
{
  const REAL softcap = (REAL)task->losses.softcap, temperature = (REAL)task->temperature, most = NUMBER_MAX;
  const REAL divisor = temperature * softcap, divisor_lo = FMA(temperature, softcap, -divisor);
  const bool tiny = !(2 / divisor < most); /* subnormal */
  const REAL inverse = tiny ? most : 2 / divisor;
  const REAL residual = FMA(-divisor, inverse, 2) - divisor_lo * inverse;
  const REAL inverse_lo = tiny || !FN(finite)(residual) ? 0 : residual * inverse / 2;
  const REAL end = 40 / inverse < most ? 40 / inverse : most;
  return (struct FN(cap)){FN(vec_fill)(softcap / 2), FN(vec_fill)(inverse), FN(vec_fill)(inverse_lo), FN(vec_fill)(-end)};
}

/* softcap * tanh(x / (temperature * softcap)) of vectors of logits, and its slopes, but for the factor 1 / temperature: both
 * where they are not NULL. Vectors by fours overlap: three quarters of the time of one after the other. */
INLINE void FN(cap_vectors)(const struct FN(cap) * cap, const VEC *x, REAL *capped, REAL *slopes, int count)
{
  VEC v[4], v_lo[4], value[4], slope[4];
  for (int i = 0; i < count; i++) {
    const VEC near = FN(vec_larger)(cap->least, FN(vec_with_sign)(x[i], cap->least)); /* the second, where it is a NaN */
    v[i] = near * cap->inverse;
    v_lo[i] = FN(vec_fma)(near, cap->inverse_lo, FN(vec_fma)(near, cap->inverse, -v[i]));
  }
  for (int i = 0; i < count; i++) value[i] = FN(tanh)(v[i], v_lo[i], cap->half, &slope[i]);
  for (int i = 0; i < count; i++) {
    if (capped) FN(vec_store)(capped + i * VEC_LANES, FN(vec_with_sign)(value[i], x[i]));
    if (slopes) FN(vec_store)(slopes + i * VEC_LANES, slope[i]);
  }
}

/* Those of n logits. `capped` and `slopes` may be x, and are written up to the end of the last vector. */
INLINE void FN(cap_each)(const struct pl_task *task, const REAL *x, REAL *capped, REAL *slopes, int64_t n)
{
  const struct FN(cap) cap = FN(cap_of)(task);
  int64_t c = 0;
  for (; c + 4 * VEC_LANES <= n; c += 4 * VEC_LANES) {
    VEC logits[4];
    for (int i = 0; i < 4; i++) logits[i] = FN(vec_load)(x + c + i * VEC_LANES);
    FN(cap_vectors)(&cap, logits, capped ? capped + c : NULL, slopes ? slopes + c : NULL, 4);
  }
  for (; c < n; c += VEC_LANES) {
    const VEC logits = c + VEC_LANES <= n ? FN(vec_load)(x + c) : FN(vec_load_part)(x + c, n - c, FN(vec_fill)(0));
    FN(cap_vectors)(&cap, &logits, capped ? capped + c : NULL, slopes ? slopes + c : NULL, 1);
  }
}

static void FN(cap)(const struct pl_task *task, const REAL *x, REAL *capped, REAL *slopes, int64_t n)
{
  if (!slopes) {
    FN(cap_each)(task, x, capped, NULL, n);
  } else if (!capped) {
    FN(cap_each)(task, x, NULL, slopes, n);
  } else {
    FN(cap_each)(task, x, capped, slopes, n);
  }
}

/* x where `where` is not 0, and `fill` elsewhere. */
static void FN(mask)(const REAL *x, REAL *result, const char *where, int64_t stride, int64_t n, REAL fill)
{
  if (stride == 1) { /* apart, for the compiler's vectors */
    for (int64_t c = 0; c < n; c++) result[c] = where[c] ? x[c] : fill;
  } else {
    for (int64_t c = 0; c < n; c++) result[c] = where[c * stride] ? x[c] : fill;
  }
}

static int64_t FN(count_classes)(const char *where, int64_t stride, int64_t n)
{
  int32_t count = 0;
  if (stride == 1) {
    for (int64_t c = 0; c < n; c++) count += where[c] != 0;
  } else {
    for (int64_t c = 0; c < n; c++) count += where[c * stride] != 0;
  }
  return count;
}

/* VEC_LANES rows x ACROSS classes from and to a tile of LANES rows. */

INLINE void FN(load_block)(REAL *x, const char *rows, int64_t stride)
{
  VEC q[ACROSS];
  FN(vec_load_across)(q, rows, stride);
  for (int i = 0; i < ACROSS; i++) FN(vec_store)(x + i * LANES, q[i]);
}

INLINE void FN(store_block)(char *rows, int64_t stride, const REAL *x)
{
  VEC q[ACROSS];
  for (int i = 0; i < ACROSS; i++) q[i] = FN(vec_load)(x + i * LANES);
  FN(vec_store_across)(q, rows, stride);
}

/* n elements of a row from `first` on: where they lie, or converted in `room`. */
static const REAL *FN(elements)(const struct pl_task *task, const struct pl_view *view, int64_t r, int64_t first, int64_t n,
                                REAL *room)
{
  const char *at = FN(row_at)(task, view, r) + first * view->classes;
  if (task->dtype == NATIVE_DTYPE && view->classes == (int64_t)sizeof(REAL)) return (const REAL *)(const void *)at;
  FN(load_many)(room, at, view->classes, n, task->dtype);
  return room;
}

/* Elements [first, first + n) of a row: where they lie, or converted, capped and masked in `room`; and the slopes of the
 * softcap, where they are wanted. */
static const REAL *FN(stage)(const struct pl_task *task, int64_t r, int64_t first, int64_t n, REAL *room, REAL *slopes)
{
  const REAL *x = FN(elements)(task, &task->logits, r, first, n, room);
  if (task->losses.softcap) {
    FN(cap)(task, x, room, slopes, n);
    x = room;
  }
  const char *where = FN(row_at)(task, &task->where, r);
  if (!where) return x;
  FN(mask)(x, room, where + first * task->where.classes, task->where.classes, n, -INFINITY);
  return room;
}

/* Whether the elements of each row lie where they are needed, and as they are needed; and rows are one stride apart. */
static inline bool FN(as_is)(const struct pl_task *task, const struct pl_view *view, int dtype)
{
  return dtype == NATIVE_DTYPE && view->classes == (int64_t)sizeof(REAL) && task->inner == 1 && !task->where.data;
}

#define EACH_VEC(v) _Pragma("GCC unroll 16") for (int v = 0; v < LANES; v += VEC_LANES)

/* How many of n elements fall into the vector that starts at c. */
static inline int64_t FN(part)(int64_t n, int64_t c)
{
  return n <= c ? 0 : n - c < VEC_LANES ? n - c : VEC_LANES;
}

/* The vector that starts at c of n elements, filled up with what counts for nothing. */
INLINE VEC FN(padded)(const REAL *x, int64_t n, int64_t c, VEC nothing)
{
  const int64_t part = FN(part)(n, c);
  return part == VEC_LANES ? FN(vec_load)(x + c) : part ? FN(vec_load_part)(x + c, part, nothing) : nothing;
}

/* The same of the last elements of a block, less than a group. */
static inline void FN(pad)(REAL *tail, const REAL *x, int64_t n, VEC nothing)
{
  for (int c = 0; c < GROUP; c += VEC_LANES) FN(vec_store)(tail + c, FN(padded)(x, n, c, nothing));
}

static inline VEC FN(group_maximum)(const REAL *x)
{
  return FN(vec_larger)(FN(vec_larger)(FN(vec_load)(x), FN(vec_load)(x + LANES)),
                        FN(vec_larger)(FN(vec_load)(x + 2 * LANES), FN(vec_load)(x + 3 * LANES)));
}

/* Each lane's maximum. A NaN may get lost, and hide what it is compared with; it shows in the sum either way. */
INLINE void FN(top_lanes)(const REAL *x, int64_t n, REAL *best)
{
  VEC top[LINE_VECS];
  int64_t c = 0;
  for (int v = 0; v < LINE_VECS; v++) top[v] = FN(vec_fill)(-INFINITY);
  for (; c + GROUP <= n; c += GROUP)
    EACH_VEC(v) top[v / VEC_LANES] = FN(vec_larger)(FN(group_maximum)(x + c + v), top[v / VEC_LANES]);
  for (; c < n; c += LANES)
    EACH_VEC(v) top[v / VEC_LANES] = FN(vec_larger)(FN(padded)(x, n, c + v, FN(vec_fill)(-INFINITY)), top[v / VEC_LANES]);
  EACH_VEC(v) FN(vec_store)(best + v, top[v / VEC_LANES]);
}

static REAL FN(maximum)(const REAL *x, int64_t n)
{
  REAL best[LANES];
  FN(top_lanes)(x, n, best);
#pragma GCC unroll 4
  for (int half = LANES / 2; half; half /= 2)
    for (int l = 0; l < half; l++) best[l] = best[l + half] > best[l] ? best[l + half] : best[l];
  return best[0];
}

/* What the exponents of a row (or of LANES rows) are: (x - max) / temperature.
 *
 * max / temperature is split into hi, a multiple of 2^-13 (double: 2^-33), and lo. Then x / temperature - hi - k ln 2 is exact
 * but for an error far below that of the exponential, as long as |max| / temperature < FAR; from there on x - max itself is
 * exact where the exponential is not 0 (Sterbenz), and the rows are moved so that their maximum is 0. */
struct FN(origin) {
  VEC max, hi, lo;
  VEC lowest;              /* at temperature 1, where exp((x - max) / temperature) is 0 */
  VEC center;              /* max / temperature + EXP_CENTER, rounded */
  VEC inverse, inverse_lo; /* 1 / temperature as a pair */
  bool plain;              /* temperature 1 */
};

INLINE struct FN(origin) FN(origin_at)(VEC max, struct FN(temperature) t)
{
  struct FN(origin) o;
  const VEC grid = FN(vec_fill)(GRID), scaled = max * FN(vec_fill)(t.inverse);
  o.max = max;
  o.lowest = max + FN(vec_fill)(EXP_LOWEST);
  o.center = scaled + FN(vec_fill)(EXP_CENTER);
  o.inverse = FN(vec_fill)(t.inverse);
  o.inverse_lo = FN(vec_fill)(t.inverse_lo);
  o.hi = (scaled + grid) - grid;
  o.lo = (scaled - o.hi) + FN(vec_fma)(max, o.inverse_lo, FN(vec_fma)(max, o.inverse, -scaled));
  o.plain = FN(is_plain)(t);
  return o;
}

/* Neither infinite nor far from 0. */
static inline bool FN(is_near)(REAL max, struct FN(temperature) t)
{
  const REAL scaled = max * t.inverse;
  return scaled > -FAR && scaled < FAR;
}

static inline bool FN(is_far)(REAL max, struct FN(temperature) t)
{
  return FN(finite)(max) && !FN(is_near)(max, t);
}

/* exp((x - max) / temperature) * EXP_SCALE: rounded to one number, and with more digits as scale * (1 + less_one). */
struct FN(parts) {
  VEC value, less_one, scale;
};

INLINE struct FN(parts) FN(parts_of)(VEC x, const struct FN(origin) * o)
{
  struct FN(parts) term;
  if (o->plain) {
    x = FN(vec_larger)(o->lowest, x); /* the second, where it is a NaN */
    term.less_one = FN(exp_less_one)(x - o->center, x, -o->hi, -o->lo, false, &term.scale);
  } else {
    const VEC scaled = x * o->inverse, at = scaled - o->center, lowest = FN(vec_fill)(EXP_LOWEST);
    const VEC lo = FN(vec_fma)(x, o->inverse, -scaled) + FN(vec_fma)(x, o->inverse_lo, -o->lo);
    term.less_one = FN(vec_unless_below)(FN(exp_less_one)(at, scaled, -o->hi, lo, true, &term.scale), at, lowest);
    term.scale = FN(vec_unless_below)(term.scale, at, lowest);
  }
  term.value = FN(vec_fma)(term.less_one, term.scale, term.scale);
  return term;
}

/* None where x is y. */
INLINE void FN(leave_out)(struct FN(parts) * term, VEC x, VEC y)
{
  term->value = FN(vec_unless_equal)(term->value, x, y);
  term->scale = FN(vec_unless_equal)(term->scale, x, y);
}

INLINE VEC FN(terms)(VEC x, const struct FN(origin) * o)
{
  return FN(parts_of)(x, o).value;
}

/* The term of one logit; 0 where there is no finite maximum. */
static REAL FN(term)(REAL x, REAL max, struct FN(temperature) t)
{
  REAL lanes[VEC_LANES];
  if (!FN(finite)(max)) return 0;
  const bool far = FN(is_far)(max, t);
  const struct FN(origin) o = FN(origin_at)(FN(vec_fill)(far ? 0 : max), t);
  FN(vec_store)(lanes, FN(terms)(FN(vec_fill)(far ? x - max : x), &o));
  return lanes[0];
}

/* n elements moved so that their maximum is 0, where that is needed: returns where they are now. */
static const REAL *FN(come_near)(const REAL *x, int64_t n, REAL *max, struct FN(temperature) t, REAL *room)
{
  if (!FN(is_far)(*max, t)) return x;
  for (int64_t c = 0; c < n; c++) room[c] = x[c] - *max;
  *max = 0;
  return room;
}

/* ---- steps 2 and 3 of the tree ---- */

struct FN(lanes) {
  VEC sum[LINE_VECS], lo[LINE_VECS];
};

/* One step of TwoSum in each lane. */
INLINE void FN(add_line)(struct FN(lanes) * lanes, int v, VEC term)
{
  VEC lo;
  lanes->sum[v] = FN(vec_two_sum)(lanes->sum[v], term, &lo);
  lanes->lo[v] = lanes->lo[v] + lo;
}

/* The same of a term: the error of the sum and that of rounding the term are one. (Where rounded terms of a group were summed
 * before they came to a lane, a loss was up to 3.3 ulp off: one big term beside small ones lost half an ulp three times, and
 * an ulp of the sum can be two of its logarithm.) */
INLINE void FN(add_term)(VEC *sum, VEC *lo, struct FN(parts) term)
{
  const VEC total = *sum + term.value, seen = total - *sum;
  *lo = *lo + ((*sum - (total - seen)) + FN(vec_fma)(term.less_one, term.scale, term.scale - seen));
  *sum = total;
}

/* The sum of origin - x over the lines of a group. */
INLINE void FN(add_distance)(struct FN(lanes) * lanes, int v, const VEC *x, VEC origin)
{
  FN(add_line)(lanes, v, ((origin - x[0]) + (origin - x[1])) + ((origin - x[2]) + (origin - x[3])));
}

INLINE void FN(add_group_of)(struct FN(lanes) * lanes, const REAL *x, VEC origin)
{
  EACH_VEC(v)
  {
    VEC line[LINES_PER_GROUP];
    for (int i = 0; i < LINES_PER_GROUP; i++) line[i] = FN(vec_load)(x + i * LANES + v);
    FN(add_distance)(lanes, v / VEC_LANES, line, origin);
  }
}

/* One vector of each line of a group. */
struct FN(column) {
  VEC logits[LINES_PER_GROUP];
  struct FN(parts) terms[LINES_PER_GROUP];
};

/* Column v of a group, and whether it has the maximum. `keep` stores all terms in e; `distances`, unless it is NULL, gets those
 * from the maximum. */
INLINE bool FN(make_column)(struct FN(column) * column, int v, const REAL *x, REAL *e, const struct FN(origin) * o, bool keep,
                            struct FN(lanes) * distances)
{
  VEC *logits = column->logits;
  for (int i = 0; i < LINES_PER_GROUP; i++) {
    logits[i] = FN(vec_load)(x + i * LANES + v * VEC_LANES);
    column->terms[i] = FN(parts_of)(logits[i], o);
  }
  for (int i = 0; keep && i < LINES_PER_GROUP; i++)
    FN(vec_store)(e + i * LANES + v * VEC_LANES, column->terms[i].value); /* e may be x */
  if (distances) FN(add_distance)(distances, v, logits, o->max);
  const VEC top = FN(vec_larger)(FN(vec_larger)(logits[0], logits[1]), FN(vec_larger)(logits[2], logits[3]));
  return __builtin_expect(FN(vec_count_equal)(top, o->max) != 0, 0);
}

/* The terms of the maximum, left out and counted. */
INLINE int FN(leave_out_maxima)(struct FN(column) * column, VEC max)
{
  int ones = 0;
  for (int i = 0; i < LINES_PER_GROUP; i++) {
    ones += FN(vec_count_equal)(column->logits[i], max);
    FN(leave_out)(&column->terms[i], column->logits[i], max);
  }
  return ones;
}

INLINE void FN(add_column)(struct FN(lanes) * lanes, int v, const struct FN(column) * column)
{
  for (int i = 0; i < LINES_PER_GROUP; i++) FN(add_term)(&lanes->sum[v], &lanes->lo[v], column->terms[i]);
}

/* The line at c, one of the last that are no group: its terms are made and added at once, and those of the maximum counted. */
INLINE int FN(add_last_line)(struct FN(lanes) * lanes, const REAL *x, REAL *e, int64_t n, int64_t c,
                             const struct FN(origin) * o, bool keep)
{
  int ones = 0;
  EACH_VEC(v)
  {
    const VEC logits = FN(padded)(x, n, c + v, FN(vec_fill)(-INFINITY));
    const int equal = FN(vec_count_equal)(logits, o->max), line = v / VEC_LANES;
    struct FN(parts) term = FN(parts_of)(logits, o);
    if (keep) FN(vec_store)(e + c + v, term.value); /* e may be x */
    if (__builtin_expect(equal != 0, 0)) FN(leave_out)(&term, logits, o->max);
    FN(add_term)(&lanes->sum[line], &lanes->lo[line], term);
    ones += equal;
  }
  return ones;
}

static REAL FN(join_lanes)(const struct FN(lanes) * lanes, REAL *result_lo)
{
  REAL s[LANES], s_lo[LANES];
  memcpy(s, lanes->sum, sizeof s);
  memcpy(s_lo, lanes->lo, sizeof s_lo);
#pragma GCC unroll 4
  for (int half = LANES / 2; half; half /= 2) {
    for (int l = 0; l < half; l++) {
      REAL lo;
      s[l] = FN(two_sum)(s[l], s[l + half], &lo);
      s_lo[l] = (s_lo[l] + s_lo[l + half]) + lo;
    }
  }
  if (!FN(finite)(s[0])) {
    *result_lo = 0;
    return s[0];
  }
  return FN(fast_two_sum)(s[0], s_lo[0], result_lo);
}

/* ---- the same of LANES rows, side by side ---- */

/* The tree's lanes of LANES rows: [lane][row]. */
struct FN(tree) {
  REAL sum[LANES][LANES], lo[LANES][LANES];
};

/* A step of TwoSum for the rows of one vector, as a pair with `lo`. */
INLINE void FN(add_to_lane)(REAL *lane, REAL *lane_lo, VEC sum, VEC lo)
{
  VEC error;
  FN(vec_store)(lane, FN(vec_two_sum)(FN(vec_load)(lane), sum, &error));
  FN(vec_store)(lane_lo, (FN(vec_load)(lane_lo) + lo) + error);
}

/* Step 3: the sums of the rows as pairs. */
static void FN(join_tree)(struct FN(tree) * tree, int64_t classes, REAL *sum, REAL *sum_lo)
{
  const int64_t used = classes < LANES ? classes : LANES;
  for (int64_t half = LANES / 2; half; half /= 2) {
    for (int64_t j = 0; j < half && j + half < used; j++) {
      EACH_VEC(v)
      FN(add_to_lane)
      (tree->sum[j] + v, tree->lo[j] + v, FN(vec_load)(tree->sum[j + half] + v), FN(vec_load)(tree->lo[j + half] + v));
    }
  }
  for (int l = 0; l < LANES; l++) {
    REAL lo;
    const REAL hi = FN(fast_two_sum)(tree->sum[0][l], tree->lo[0][l], &lo);
    const bool finite = FN(finite)(tree->sum[0][l]);
    sum[l] = finite ? hi : tree->sum[0][l];
    sum_lo[l] = finite ? lo : 0;
  }
}

/* The lanes of LANES rows, `stride` bytes apart, become [lane][row]. */
static void FN(turn_lanes)(const void *lanes, int64_t stride, REAL (*turned)[LANES])
{
  for (int l = 0; l < LANES; l += VEC_LANES)
    for (int c = 0; c < LANES; c += ACROSS)
      FN(load_block)(turned[c] + l, (const char *)lanes + l * stride + c * (int64_t)sizeof(REAL), stride);
}

/* ---- distances, and numbers that are no exponentials ---- */

/* The sums of origin - x over n elements, lane by lane. */
static void FN(add_distances)(struct FN(lanes) * result, const REAL *x, int64_t n, REAL origin)
{
  const VEC from = FN(vec_fill)(origin);
  const int64_t whole = n / GROUP * GROUP;
  struct FN(lanes) lanes;
  for (int v = 0; v < LINE_VECS; v++) lanes.sum[v] = lanes.lo[v] = FN(vec_fill)(0);
  for (int64_t c = 0; c < whole; c += GROUP) FN(add_group_of)(&lanes, x + c, from);
  if (whole < n) {
    REAL tail[GROUP];
    FN(pad)(tail, x + whole, n - whole, from);
    FN(add_group_of)(&lanes, tail, from);
  }
  *result = lanes;
}

/* The sum of n elements (whole groups) as a pair. */
static REAL FN(sum)(const REAL *e, int64_t n, REAL *result_lo)
{
  struct FN(lanes) lanes;
  for (int v = 0; v < LINE_VECS; v++) lanes.sum[v] = lanes.lo[v] = FN(vec_fill)(0);
  for (int64_t c = 0; c < n; c += GROUP) {
    EACH_VEC(v)
    {
      const REAL *at = e + c + v;
      const VEC first = FN(vec_load)(at) + FN(vec_load)(at + LANES);
      const VEC second = FN(vec_load)(at + 2 * LANES) + FN(vec_load)(at + 3 * LANES);
      FN(add_line)(&lanes, v / VEC_LANES, first + second);
    }
  }
  return FN(join_lanes)(&lanes, result_lo);
}

INLINE void FN(ask_for_group)(const REAL *next, const REAL *to, int64_t c, bool keep)
{
  for (int i = 0; i < LINES_PER_GROUP; i++) {
    __builtin_prefetch(next + c + i * LANES);
    if (keep) __builtin_prefetch(to + c + i * LANES, 1);
  }
}

/* The terms of n elements; returns how often the maximum was met. Where a line is one vector, its terms are added while the
 * next group's are made: in their own turn, waiting for them, they held up what was behind, for a tenth of the time of a row in
 * cache. Shorter vectors are more than there are registers to wait in. */
INLINE int FN(add_terms)(struct FN(lanes) * result, const REAL *x, REAL *e, int64_t n, const struct FN(origin) * o, bool keep,
                         const REAL *next, const REAL *to, struct FN(lanes) * distances)
{
  struct FN(lanes) lanes, apart, *others = distances ? &apart : NULL;
  struct FN(column) column;
  const int64_t whole = n / GROUP * GROUP;
  int ones = 0;
  for (int v = 0; v < LINE_VECS; v++) lanes.sum[v] = lanes.lo[v] = apart.sum[v] = apart.lo[v] = FN(vec_fill)(0);
  if (LINE_VECS == 1 && whole) {
    FN(ask_for_group)(next, to, 0, keep);
    if (FN(make_column)(&column, 0, x, e, o, keep, others)) ones += FN(leave_out_maxima)(&column, o->max);
    for (int64_t c = GROUP; c < whole; c += GROUP) {
      FN(ask_for_group)(next, to, c, keep);
      FN(add_column)(&lanes, 0, &column);
      if (FN(make_column)(&column, 0, x + c, e + c, o, keep, others)) ones += FN(leave_out_maxima)(&column, o->max);
    }
    FN(add_column)(&lanes, 0, &column);
  }
  for (int64_t c = 0; LINE_VECS > 1 && c < whole; c += GROUP) {
    FN(ask_for_group)(next, to, c, keep);
#pragma GCC unroll 16
    for (int v = 0; v < LINE_VECS; v++) {
      if (FN(make_column)(&column, v, x + c, e + c, o, keep, others)) {
        ones += FN(leave_out_maxima)(&column, o->max);
        FN(add_column)(&lanes, v, &column);
      } else { /* apart, as moving them to where the other way has them took 3 % of the time */
        FN(add_column)(&lanes, v, &column);
      }
    }
  }
  if (distances && whole < n) {
    REAL tail[GROUP];
    FN(pad)(tail, x + whole, n - whole, o->max);
    FN(add_group_of)(&apart, tail, o->max);
  }
  for (int64_t c = whole; c < n; c += LANES) ones += FN(add_last_line)(&lanes, x, e, n, c, o, keep);
  for (int64_t c = ROUND_UP(n, LANES); keep && c < ROUND_UP(n, GROUP); c += VEC_LANES) FN(vec_store)(e + c, FN(vec_fill)(0));
  *result = lanes;
  if (distances) *distances = apart;
  return ones;
}

/* The end of step 3: unscaled, with the terms of the maximum, but for the one that is left out. */
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

/* A block under way. */
struct FN(block) {
  REAL max;
  int ones; /* how often max was met */
  struct FN(lanes) lanes;
};

/* Steps 1 and 2, the maximum given; `keep` leaves exp(x - max) * EXP_SCALE in e, filled up to whole groups. */
static void FN(start_block)(struct FN(block) * block, const REAL *x, REAL *e, int64_t n, REAL max, struct FN(temperature) t,
                            const REAL *next, const REAL *to, bool keep, struct FN(lanes) * distances)
{
  block->max = max;
  block->ones = 1;
  if (distances && !(FN(is_plain)(t) && FN(is_near)(max, t))) {
    FN(add_distances)(distances, x, n, FN(finite)(max) ? max : 0);
    distances = NULL;
  }
  if (!FN(finite)(max)) {
    block->lanes.sum[0] = FN(vec_fill)(FN(nan_or_zero)(x, n));
    for (int64_t c = 0; keep && c < n; c++) e[c] = 0;
    return;
  }
  x = FN(come_near)(x, n, &max, t, e);
  struct FN(origin) o = FN(origin_at)(FN(vec_fill)(max), t);
  if (!o.plain) {
    block->ones = FN(add_terms)(&block->lanes, x, e, n, &o, keep, next, to, NULL);
    return;
  }
  o.plain = true; /* as the compiler now knows */
  if (distances) {
    block->ones = FN(add_terms)(&block->lanes, x, e, n, &o, keep, next, to, distances);
  } else if (keep) {
    block->ones = FN(add_terms)(&block->lanes, x, e, n, &o, true, next, to, NULL);
  } else {
    block->ones = FN(add_terms)(&block->lanes, x, e, n, &o, false, next, to, NULL);
  }
}

/* The terms alone of a block that went through the steps before. */

INLINE void FN(repeat_each)(const REAL *x, REAL *e, int64_t n, const struct FN(origin) * o, const REAL *next)
{
  int64_t c = 0;
  for (; c + GROUP <= n; c += GROUP) {
    for (int i = 0; i < LINES_PER_GROUP; i++) __builtin_prefetch(next + c + i * LANES);
#pragma GCC unroll 4
    for (int v = 0; v < GROUP; v += VEC_LANES) FN(vec_store)(e + c + v, FN(terms)(FN(vec_load)(x + c + v), o));
  }
  for (; c < n; c += VEC_LANES) FN(vec_store)(e + c, FN(terms)(FN(vec_load_part)(x + c, FN(part)(n, c), FN(vec_fill)(0)), o));
}

static void FN(repeat_terms)(const REAL *x, REAL *e, int64_t n, REAL max, struct FN(temperature) t, const REAL *next)
{
  if (!FN(finite)(max)) {
    memset(e, 0, (size_t)n * sizeof(REAL));
    return;
  }
  x = FN(come_near)(x, n, &max, t, e);
  struct FN(origin) o = FN(origin_at)(FN(vec_fill)(max), t);
  if (o.plain) {
    o.plain = true; /* as the compiler now knows */
    FN(repeat_each)(x, e, n, &o, next);
  } else {
    FN(repeat_each)(x, e, n, &o, next);
  }
}

/* Step 3. */
static inline void FN(finish_block)(const struct FN(block) * block, struct FN(row) * row)
{
  row->max = block->max;
  row->sum_lo = 0;
  if (!FN(finite)(block->max)) {
    memcpy(&row->sum, block->lanes.sum, sizeof row->sum);
    return;
  }
  row->sum = FN(join_lanes)(&block->lanes, &row->sum_lo);
  row->sum = FN(add_ones)(row->sum, row->sum_lo, (REAL)block->ones, &row->sum_lo);
}

/* PL_SCORE: from a term and its logit, exp(x - max) * (x - max) / temperature and exp(x - max)^2, both scaled as the term. */

INLINE VEC FN(entropy_term)(VEC term, VEC x, VEC max, VEC inverse)
{
  return term * FN(vec_larger)(FN(vec_fill)(-NUMBER_MAX), (x - max) * inverse); /* 0 times infinity is 0 */
}

INLINE VEC FN(square)(VEC term)
{
  return term * (term * FN(vec_fill)(1 / EXP_SCALE));
}

/* One vector of each line of a group. */
INLINE void FN(add_scores)(struct FN(lanes) * dots, struct FN(lanes) * squares, int v, const REAL *x, const REAL *e, VEC max,
                           VEC inverse)
{
  VEC logits[LINES_PER_GROUP], dot[LINES_PER_GROUP], term[LINES_PER_GROUP];
  for (int i = 0; i < LINES_PER_GROUP; i++) {
    logits[i] = FN(vec_load)(x + i * LANES);
    term[i] = FN(vec_load)(e + i * LANES);
    dot[i] = FN(entropy_term)(term[i], logits[i], max, inverse);
    term[i] = FN(square)(term[i]);
  }
  const VEC top = FN(vec_larger)(FN(vec_larger)(logits[0], logits[1]), FN(vec_larger)(logits[2], logits[3]));
  if (__builtin_expect(FN(vec_count_equal)(top, max) != 0, 0))
    for (int i = 0; i < LINES_PER_GROUP; i++) term[i] = FN(vec_unless_equal)(term[i], logits[i], max);
  FN(add_line)(dots, v, (dot[0] + dot[1]) + (dot[2] + dot[3]));
  FN(add_line)(squares, v, (term[0] + term[1]) + (term[2] + term[3]));
}

/* PL_SCORE: the two sums of a block, from the terms that start_block kept. */
static void FN(sum_scores)(const struct FN(block) * block, const REAL *x, const REAL *e, int64_t n, REAL inverse,
                           struct FN(row) * row)
{
  const VEC max = FN(vec_fill)(block->max), by = FN(vec_fill)(inverse), zero = FN(vec_fill)(0);
  const int64_t whole = n / GROUP * GROUP;
  struct FN(lanes) dots, squares;
  REAL tail[GROUP], lo;
  row->dot = row->squares = 0;
  if (!FN(finite)(block->max)) return;
  if (whole < n) FN(pad)(tail, x + whole, n - whole, FN(vec_fill)(-INFINITY));
  EACH_VEC(v) /* one after the other: the sums of all together were more than there are registers */
  {
    const int i = v / VEC_LANES;
    dots.sum[i] = dots.lo[i] = squares.sum[i] = squares.lo[i] = zero;
    for (int64_t c = 0; c < whole; c += GROUP) FN(add_scores)(&dots, &squares, i, x + c + v, e + c + v, max, by);
    if (whole < n) FN(add_scores)(&dots, &squares, i, tail + v, e + whole + v, max, by);
  }
  row->dot = -FN(join_lanes)(&dots, &lo) / EXP_SCALE;
  row->squares = FN(join_lanes)(&squares, &lo) / EXP_SCALE + (REAL)(block->ones - 1);
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

/* Whether label smoothing gives every class the same. */
static inline bool FN(spreads_evenly)(const struct pl_task *task)
{
  return task->losses.label_smoothing && !task->losses.weight && !task->where.data;
}

/* The numbers of a block that are no exponentials: see spread. `room` is lost. But where smoothing spreads evenly, the sum of
 * the distances is made with the terms. */
static struct FN(spread) FN(spread_block)(const struct pl_task *task, int64_t r, int64_t b, const REAL *x, REAL max, REAL *room)
{
  struct FN(spread) s = {0};
  const int64_t first = b * BLOCK, n = FN(block_length)(task, b), groups = ROUND_UP(n, GROUP);
  const char *where = FN(row_at)(task, &task->where, r);
  const REAL *weight = task->losses.weight;
  const REAL origin = FN(finite)(max) ? max : 0;
  int64_t count = n;
  if (task->labels.data && task->classes > BLOCK) {
    const int64_t label = FN(label)(task, r, 0); /* an ignored one may be any number */
    if (label >= first && label < first + n) s.target = x[label - first];
  }
  /* with a maximum there are some, and how many matters for the smoothing only */
  if (where && (task->losses.label_smoothing || !FN(finite)(max)))
    count = FN(count_classes)(where + first * task->where.classes, task->where.classes, n);
  s.count = (REAL)count;
  if (!task->losses.label_smoothing) return s;
  s.mass.hi = s.count;
  if (weight) {
    memcpy(room, weight + first, (size_t)n * sizeof(REAL));
    if (where) FN(mask)(room, room, where + first * task->where.classes, task->where.classes, n, 0);
    for (int64_t c = n; c < groups; c++) room[c] = 0;
    s.mass.hi = FN(sum)(room, groups, &s.mass.lo);
    for (int64_t c = 0; c < n; c++) room[c] = room[c] == 0 ? 0 : room[c] * (origin - x[c]);
  } else if (!where) {
    return s;
  } else {
    for (int64_t c = 0; c < n; c++) room[c] = origin - x[c];
    FN(mask)(room, room, where + first * task->where.classes, task->where.classes, n, 0);
    for (int64_t c = n; c < groups; c++) room[c] = 0;
  }
  s.dot.hi = FN(sum)(room, groups, &s.dot.lo);
  return s;
}

/* Step 4. Every factor is taken to the overall maximum, so that errors do not pile up in a row that keeps rising. */
static struct FN(row) FN(join_blocks)(const struct FN(row) * blocks, int64_t count, struct FN(temperature) t)
{
  int64_t top = 0;
  for (int64_t b = 1; b < count; b++)
    if (blocks[b].max > blocks[top].max || blocks[top].max != blocks[top].max) top = b;

  struct FN(row) row = blocks[top];
  struct FN(pair) below = {0, 0}; /* of the other blocks, scaled: unscaled, each might lose half of the smallest number */
  const bool no_sum = row.max - row.max != 0;
  for (int64_t b = 0; b < count; b++) {
    if (b == top) continue;
    if (no_sum) {
      row.sum += blocks[b].sum; /* zeros, or a NaN */
      continue;
    }
    REAL lo, factor_lo, others_lo;
    const REAL distance = FN(exponent)(blocks[b].max, row.max, t.inverse, t.inverse_lo, &lo);
    const REAL factor = FN(exp_pair)(distance, lo, &factor_lo); /* scaled: it may be far smaller than its product */
    const REAL others = FN(two_sum)(blocks[b].sum, 1, &others_lo);
    others_lo += blocks[b].sum_lo;
    const REAL term = others * factor;
    const REAL term_lo = FMA(others, factor, -term) + (others * factor_lo + others_lo * factor);
    below = FN(gather)(below, (struct FN(pair)){term, term_lo});
    row.dot += factor == 0 ? 0 : factor * (blocks[b].dot - distance * others) / EXP_SCALE;
    const REAL unscaled = factor / EXP_SCALE;
    row.squares += (1 + blocks[b].squares) * unscaled * unscaled;
  }
  if (no_sum) return row;
  const struct FN(pair) sum =
      FN(gather)((struct FN(pair)){row.sum, row.sum_lo}, (struct FN(pair)){below.hi / EXP_SCALE, below.lo / EXP_SCALE});
  row.sum = sum.hi;
  row.sum_lo = sum.lo;
  return row;
}

/* The same for the other numbers: each block's distances are moved from its maximum to the row's. */
static struct FN(spread) FN(join_spreads)(const struct FN(row) * blocks, int64_t count, REAL max)
{
  struct FN(spread) s = {0};
  const REAL origin = FN(finite)(max) ? max : 0;
  for (int64_t b = 0; b < count; b++) {
    const struct FN(spread) *block = &blocks[b].spread;
    REAL lo;
    const REAL move = FN(two_sum)(origin, FN(finite)(blocks[b].max) ? -blocks[b].max : 0, &lo);
    const struct FN(pair) moved = FN(times)(block->mass, (struct FN(pair)){move, lo});
    s.dot = FN(gather)(s.dot, FN(plus)(block->dot, moved));
    s.mass = FN(gather)(s.mass, block->mass);
    s.target += block->target;
    s.count += block->count;
  }
  return s;
}

/* Keeps the k largest of a row so far, largest first, the earlier of equals first, NaN above all (as np.argmax does). */
static inline bool FN(above)(REAL a, REAL b)
{
  return a > b || (a != a && b == b);
}

/* The first of n numbers that equals their maximum; none is a NaN. (0 where it is gone: another thread may write to them.) */
static int64_t FN(first_maximum)(const REAL *x, int64_t n, REAL max)
{
  const VEC top = FN(vec_fill)(max);
  int64_t c = 0;
  for (int found = 0; c + GROUP <= n; c += GROUP) {
    EACH_VEC(v) found += FN(vec_count_equal)(FN(group_maximum)(x + c + v), top);
    if (found) break;
  }
  while (c < n && x[c] != max) c++;
  return c < n ? c : 0;
}

/* The k-th of the largest numbers of each lane: k of n or more are not below. -inf where there are not so many lanes. */
static REAL FN(floor_of)(const REAL *x, int64_t n, int64_t k)
{
  SINT count[LANES] = {0};
  REAL lanes[LANES], floor = -INFINITY;
  if (k > LANES) return floor;
  FN(top_lanes)(x, n, lanes);
  for (int l = 0; l < LANES; l++)
    for (int i = 0; i < LANES; i++) count[i] += lanes[l] >= lanes[i];
  for (int i = 0; i < LANES; i++) floor = count[i] >= k && lanes[i] > floor ? lanes[i] : floor;
  return floor;
}

/* With a floor under the first k, most groups have none. Without, each number that was kept for a while was a branch that was
 * not foreseen, and the 5 largest of 1000 took four times as long. */
static void FN(keep_largest)(const REAL *x, int64_t n, int64_t first, REAL *top_x, int64_t *top_index, int64_t k, int64_t *kept)
{
  const REAL floor = *kept < k ? FN(floor_of)(x, n, k) : 0;
  /* of numbers that another thread makes smaller meanwhile, less than k may be found */
  for (int64_t i = 0; first == 0 && i < k; i++) top_x[i] = x[0], top_index[i] = 0;
  /* nothing up to here is kept: until there are k, what is below the floor */
  REAL least = *kept == k ? top_x[k - 1] : floor == -INFINITY ? NAN : NEXT_AFTER(floor, -INFINITY);
  for (int64_t g = 0; g < n; g += GROUP) {
    uint64_t bits = 0;
    for (int64_t c = g; c < g + GROUP && c < n; c += VEC_LANES) {
      const VEC some = c + VEC_LANES <= n ? FN(vec_load)(x + c) : FN(vec_load_part)(x + c, n - c, FN(vec_fill)(0));
      bits |= (uint64_t)FN(vec_bits_above)(some, FN(vec_fill)(least)) << (c - g);
    }
    if (n - g < GROUP) bits &= ((uint64_t)1 << (n - g)) - 1;
    for (; bits; bits &= bits - 1) {
      const int64_t c = g + __builtin_ctzll(bits);
      if (x[c] <= least || (*kept == k && !FN(above)(x[c], top_x[k - 1]))) continue;
      int64_t place = *kept < k ? (*kept)++ : k - 1;
      for (; place > 0 && FN(above)(x[c], top_x[place - 1]); place--) {
        top_x[place] = top_x[place - 1];
        top_index[place] = top_index[place - 1];
      }
      top_x[place] = x[c];
      top_index[place] = first + c;
      if (*kept == k) least = top_x[k - 1];
    }
  }
}

/* A row under way. x and e are its block, if it has one only. */
struct FN(slot) {
  struct FN(block) block;
  struct FN(lanes) distances; /* see spread_block */
  struct FN(row) row;
  const struct FN(row) * blocks; /* of a row that has several */
  REAL *terms;                   /* of all of them, where they are kept; else NULL */
  REAL *to;                      /* where the results go, to be asked for; or NULL */
  const REAL *x;
  REAL *room, *e;      /* of a block each: logits, and terms */
  REAL *first, *other; /* PL_CROSS_ENTROPY: the same, for anything else */
  REAL *top_x;         /* PL_SCORE: its largest logits, and their classes */
  int64_t *top_index;
  int64_t kept;
};

/* Whether the second pass over a row is made from its terms. */
static inline bool FN(keeps_terms)(const struct pl_task *task)
{
  return task->operation == PL_SOFTMAX || (task->operation == PL_CROSS_ENTROPY && task->losses.grad.data);
}

/* PL_SCORE: the rest of a block that is finished. */
static void FN(score_block)(const struct pl_task *task, int64_t b, struct FN(temperature) t, struct FN(slot) * slot)
{
  const int64_t n = FN(block_length)(task, b);
  const REAL max = slot->row.max;
  const bool has_nan = slot->row.sum != slot->row.sum;
  if (b == 0) slot->kept = 0;
  FN(sum_scores)(&slot->block, slot->x, slot->e, n, t.inverse, &slot->row);
  if (task->picks > 1 || has_nan) {
    FN(keep_largest)(slot->x, n, b * BLOCK, slot->top_x, slot->top_index, task->picks, &slot->kept);
  } else if (!slot->kept || FN(above)(max, *slot->top_x)) {
    slot->kept = 1;
    *slot->top_x = max;
    *slot->top_index = b * BLOCK + FN(first_maximum)(slot->x, n, max);
  }
}

/* Whether rows go the common way: their maxima are neither infinite nor large. */
static bool FN(all_near)(const REAL *max, int64_t rows, struct FN(temperature) t)
{
  bool near = true;
  for (int64_t i = 0; i < rows; i++) near &= FN(is_near)(max[i], t);
  return near;
}

/* Steps 1 and 2 of such rows, in one loop for all: the constants stay in registers. */
INLINE void FN(start_near_rows)(struct FN(slot) * slots, int64_t rows, int64_t n, const REAL *max, struct FN(temperature) t,
                                const REAL *const *next, const REAL *const *to, bool plain, bool keep, bool spreading)
{
  for (int64_t i = 0; i < rows; i++) {
    struct FN(block) *block = &slots[i].block;
    const REAL *x = slots[i].x;
    struct FN(origin) o = FN(origin_at)(FN(vec_fill)(max[i]), t);
    o.plain = plain; /* as the compiler now knows */
    block->max = max[i];
    block->ones =
        FN(add_terms)(&block->lanes, x, slots[i].e, n, &o, keep, next[i], to[i], spreading ? &slots[i].distances : NULL);
  }
}

/* From so many rows on it pays to join their lanes side by side. */
#define MANY (LANES / 2)

static void FN(maxima)(const struct FN(slot) * slots, int64_t rows, int64_t n, REAL *max)
{
  REAL best[LANES][LANES], turned[LANES][LANES];
  if (rows < MANY) {
    for (int64_t i = 0; i < rows; i++) max[i] = FN(maximum)(slots[i].x, n);
    return;
  }
  for (int64_t i = 0; i < rows; i++) FN(top_lanes)(slots[i].x, n, best[i]);
  for (int64_t i = rows; i < LANES; i++) memcpy(best[i], best[0], sizeof best[0]);
  FN(turn_lanes)(best, sizeof best[0], turned);
  for (int half = LANES / 2; half; half /= 2) {
    for (int j = 0; j < half; j++) EACH_VEC(v)
    FN(vec_store)(turned[j] + v, FN(vec_larger)(FN(vec_load)(turned[j + half] + v), FN(vec_load)(turned[j] + v)));
  }
  memcpy(max, turned[0], sizeof turned[0]);
}

/* join_lanes of LANES rows, whose lanes are `stride` bytes apart. */
static void FN(join_rows)(const struct FN(lanes) * lanes, int64_t stride, REAL *sum, REAL *sum_lo)
{
  struct FN(tree) tree;
  FN(turn_lanes)(lanes->sum, stride, tree.sum);
  FN(turn_lanes)(lanes->lo, stride, tree.lo);
  FN(join_tree)(&tree, LANES, sum, sum_lo);
}

static void FN(join_distances)(struct FN(slot) * slots, int64_t rows)
{
  REAL sum[LANES], sum_lo[LANES];
  if (rows < MANY) {
    for (int64_t i = 0; i < rows; i++)
      slots[i].row.spread.dot.hi = FN(join_lanes)(&slots[i].distances, &slots[i].row.spread.dot.lo);
    return;
  }
  for (int64_t i = rows; i < LANES; i++) slots[i].distances = slots[0].distances;
  FN(join_rows)(&slots->distances, sizeof *slots, sum, sum_lo);
  for (int64_t i = 0; i < rows; i++) slots[i].row.spread.dot = (struct FN(pair)){sum[i], sum_lo[i]};
}

/* Step 3 of rows that went the common way. */
static void FN(finish_near_rows)(struct FN(slot) * slots, int64_t rows)
{
  REAL ones[LANES], sum[LANES], sum_lo[LANES];
  for (int64_t i = rows; i < LANES; i++) slots[i].block = slots[0].block;
  for (int64_t i = 0; i < LANES; i++) ones[i] = (REAL)slots[i].block.ones;
  FN(join_rows)(&slots->block.lanes, sizeof *slots, sum, sum_lo);
  for (int l = 0; l < LANES; l++) sum[l] = FN(add_ones)(sum[l], sum_lo[l], ones[l], &sum_lo[l]);
  for (int64_t i = 0; i < rows; i++) {
    slots[i].row.max = slots[i].block.max;
    slots[i].row.sum = sum[i];
    slots[i].row.sum_lo = sum_lo[i];
  }
}

/* Rows of one block: step by step, so that the operations of a step, each waiting for the one before, overlap with other
 * rows'. With the steps row by row, a row of 64 took twice as long. */
static void FN(reduce_short_rows)(const struct pl_task *task, int64_t r, int64_t rows, int64_t end, struct FN(temperature) t,
                                  struct FN(slot) * slots)
{
  const int64_t n = task->classes;
  const struct pl_view *whole = pl_whole(task);
  const bool scoring = task->operation == PL_SCORE;
  /* else it is as run_rows has set it */
  const bool spread = task->operation == PL_CROSS_ENTROPY && (task->losses.label_smoothing || task->where.data);
  const bool keep = whole || scoring; /* by log_softmax for the sake of `to` */
  const bool as_is = FN(as_is)(task, &task->logits, task->dtype) && !task->losses.softcap;
  const bool plain = FN(is_plain)(t), spreading = FN(spreads_evenly)(task);
  REAL max[LANES];
  const REAL *next[LANES], *to[LANES];
  for (int64_t i = 0; i < rows; i++) {
    const char *row = (char *)task->logits.data + (r + i) * task->logits.outer;
    slots[i].x =
        as_is ? (const REAL *)(const void *)row : FN(stage)(task, r + i, 0, n, slots[i].room, keep ? slots[i].other : NULL);
  }
  FN(maxima)(slots, rows, n, max);
  for (int64_t i = 0; i < rows; i++) {
    next[i] = FN(next_block)(task, &task->logits, r + i + rows - 1, n, end, slots[i].room);
    to[i] = whole ? (const REAL *)(void *)FN(row_at)(task, whole, r + i) : next[i];
    if (spread) slots[i].row.spread = FN(spread_block)(task, r + i, 0, slots[i].x, max[i], slots[i].first);
  }
  const bool near = FN(all_near)(max, rows, t);
  if (!near || (spreading && !plain)) {
    for (int64_t i = 0; i < rows; i++) {
      struct FN(slot) *slot = &slots[i];
      struct FN(lanes) *distances = spreading ? &slot->distances : NULL;
      FN(start_block)(&slot->block, slot->x, slot->e, n, max[i], t, next[i], to[i], keep, distances);
    }
  } else if (!plain) {
    FN(start_near_rows)(slots, rows, n, max, t, next, to, false, keep, false);
  } else if (spreading) {
    FN(start_near_rows)(slots, rows, n, max, t, next, to, true, keep, true);
  } else if (keep) {
    FN(start_near_rows)(slots, rows, n, max, t, next, to, true, true, false);
  } else {
    FN(start_near_rows)(slots, rows, n, max, t, next, to, true, false, false);
  }
  if (spreading) FN(join_distances)(slots, rows);
  if (near && rows >= MANY) {
    FN(finish_near_rows)(slots, rows);
  } else {
    for (int64_t i = 0; i < rows; i++) FN(finish_block)(&slots[i].block, &slots[i].row);
  }
  for (int64_t i = 0; scoring && i < rows; i++) FN(score_block)(task, 0, t, &slots[i]);
}

/* Blocks [first, last) of a long row. */
static void FN(reduce_blocks)(const struct pl_task *task, int64_t r, int64_t first, int64_t last, int64_t end,
                              struct FN(temperature) t, struct FN(slot) * slot, struct FN(row) * blocks)
{
  const bool spreading = FN(spreads_evenly)(task);
  for (int64_t b = first; b < last; b++) {
    const int64_t n = FN(block_length)(task, b);
    const REAL *next = FN(next_block)(task, &task->logits, r, (b + 1) * BLOCK, end, slot->room);
    REAL *kept = slot->terms ? slot->terms + b * BLOCK : NULL;
    REAL *e = kept && n % GROUP == 0 ? kept : slot->e; /* whole groups are written */
    const REAL *to = slot->to ? slot->to + (slot->to == slot->terms ? b + 1 : b) * BLOCK : next;
    const bool keep = kept || slot->to || task->operation == PL_SCORE; /* by log_softmax for the sake of `to` */
    slot->x = FN(stage)(task, r, b * BLOCK, n, slot->room, NULL);
    const REAL max = FN(maximum)(slot->x, n);
    if (task->operation == PL_CROSS_ENTROPY) slot->row.spread = FN(spread_block)(task, r, b, slot->x, max, slot->first);
    FN(start_block)(&slot->block, slot->x, e, n, max, t, next, to, keep, spreading ? &slot->distances : NULL);
    if (spreading) FN(join_distances)(slot, 1);
    if (kept && e != kept) memcpy(kept, e, (size_t)n * sizeof(REAL));
    FN(finish_block)(&slot->block, &slot->row);
    if (task->operation == PL_SCORE) FN(score_block)(task, b, t, slot);
    blocks[b] = slot->row;
  }
}
