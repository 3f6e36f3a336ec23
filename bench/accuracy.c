/* What accuracy.py judges by: each row in a type with at least twice the digits of its own, and the errors in ulp of it.
 *
 * float is judged in long double (64 bits or more), double in quad (113 bits). The maximum is left out of the sum, so that
 * log1p keeps the digits of a confident row; nothing here cancels. */

#include <math.h>
#include <stdint.h>

typedef long double wide_f32;

static wide_f32 exp_f32(wide_f32 x)
{
  if (x <= -0x1p-8L || x >= 0x1p-8L) return expl(x);
  /* The next term is below 2^-79: a check of all floats spends most of its time here. */
  return 1 + x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))));
}

static wide_f32 log1p_f32(wide_f32 y)
{
  if (y >= 0x1p-10L) return log1pl(y);
  return y - y * y * (1 / 2.L - y * (1 / 3.L - y * (1 / 4.L - y * (1 / 5.L - y * (1 / 6.L)))));
}

static wide_f32 split_f32(wide_f32 x, int *exponent)
{
  return frexpl(x, exponent);
}

#if __LDBL_MANT_DIG__ == 113
typedef long double wide_f64;
#define QUAD(function) function##l
#else
#include <quadmath.h>
typedef __float128 wide_f64;
#define QUAD(function) function##q
#endif

static wide_f64 exp_f64(wide_f64 x)
{
  return QUAD(exp)(x);
}

static wide_f64 log1p_f64(wide_f64 y)
{
  return QUAD(log1p)(y);
}

static wide_f64 split_f64(wide_f64 x, int *exponent)
{
  return QUAD(frexp)(x, exponent);
}

struct worst {
  double ulp; /* -1: no result */
  int64_t place;
  double expected;
};

static void note(struct worst *worst, double ulp, int64_t place, double expected)
{
  if (ulp > worst->ulp) *worst = (struct worst){ulp, place, expected};
}

#define SIZE(a) ((a) < 0 ? -(a) : (a))

/* ulp_T: an error in ulp of `magnitude`, in smallest subnormals where that is below the normal range. Through 2^512, as a
 * fraction of double's smallest number is no double.
 *
 * reference_T: softmax, log_softmax, logsumexp and the magnitude that the last is measured by, max(|max|, log S, |result|).
 *
 * worst_T: of n results, in worst[0] for normal and worst[1] for subnormal magnitudes. */
#define ACCURACY(T, REAL, DIGITS, MIN_EXPONENT, MIN)                                                                           \
  static double ulp_##T(wide_##T got, wide_##T expected, wide_##T magnitude)                                                   \
  {                                                                                                                            \
    int exponent = MIN_EXPONENT;                                                                                               \
    const wide_##T error = SIZE(got - expected);                                                                               \
    if (!(error <= (REAL)INFINITY)) return INFINITY;                                                                           \
    if (magnitude >= MIN) split_##T(magnitude, &exponent);                                                                     \
    return ldexp((double)(error * 0x1p+512), DIGITS - exponent - 512);                                                         \
  }                                                                                                                            \
                                                                                                                               \
  void reference_##T(const REAL *x, int64_t rows, int64_t classes, REAL temperature, wide_##T *p, wide_##T *log_p,             \
                     wide_##T *log_sum, wide_##T *magnitude)                                                                   \
  {                                                                                                                            \
    for (int64_t r = 0; r < rows; r++, x += classes, p += classes, log_p += classes) {                                         \
      int64_t top = 0;                                                                                                         \
      for (int64_t c = 1; c < classes; c++)                                                                                    \
        if (x[c] > x[top]) top = c;                                                                                            \
      wide_##T others = 0;                                                                                                     \
      for (int64_t c = 0; c < classes; c++) {                                                                                  \
        log_p[c] = (wide_##T)x[c] - x[top];                                                                                    \
        if (temperature != 1) log_p[c] /= temperature;                                                                         \
        p[c] = exp_##T(log_p[c]);                                                                                              \
        if (c != top) others += p[c];                                                                                          \
      }                                                                                                                        \
      const wide_##T log_of_sum = log1p_##T(others), scaled = (wide_##T)x[top] / temperature, size = SIZE(scaled);             \
      for (int64_t c = 0; c < classes; c++) {                                                                                  \
        p[c] /= 1 + others;                                                                                                    \
        log_p[c] -= log_of_sum;                                                                                                \
      }                                                                                                                        \
      log_sum[r] = scaled + log_of_sum;                                                                                        \
      magnitude[r] = size > log_of_sum ? size : log_of_sum;                                                                    \
      if (SIZE(log_sum[r]) > magnitude[r]) magnitude[r] = SIZE(log_sum[r]);                                                    \
    }                                                                                                                          \
  }                                                                                                                            \
                                                                                                                               \
  void worst_##T(const REAL *got, const wide_##T *expected, const wide_##T *magnitude, int64_t n, struct worst *worst)         \
  {                                                                                                                            \
    worst[0].ulp = worst[1].ulp = -1;                                                                                          \
    for (int64_t i = 0; i < n; i++) {                                                                                          \
      const wide_##T size = SIZE(magnitude[i]);                                                                                \
      note(&worst[size < MIN], ulp_##T(got[i], expected[i], size), i, (double)expected[i]);                                    \
    }                                                                                                                          \
  }

ACCURACY(f32, float, 24, -125, 0x1p-126f)
ACCURACY(f64, double, 53, -1021, 0x1p-1022)

/* ---- the kernels' two elementary functions ---- */

#ifdef PL_ISA
#include "../c/kernel.c"

/* Of exp as it is summed, rounded to its type; of exp and of log1p as pairs, not rounded. n is a multiple of 8. */
#define ELEMENTARY(T, REAL)                                                                                                    \
  void worst_exp_##T(const REAL *x, int64_t n, struct worst *worst)                                                            \
  {                                                                                                                            \
    enum { lanes = sizeof(vec_##T) / sizeof(REAL) };                                                                           \
    REAL scale[lanes], got[lanes];                                                                                             \
    const struct origin_##T origin = origin_at_##T(vec_fill_##T(0), (struct temperature_##T){1, 0});                           \
    vec_store_##T(scale, terms_##T(vec_fill_##T(0), &origin));                                                                 \
    worst->ulp = -1;                                                                                                           \
    for (int64_t i = 0; i < n; i += lanes) {                                                                                   \
      vec_store_##T(got, terms_##T(vec_load_##T(x + i), &origin));                                                             \
      for (int l = 0; l < lanes; l++) {                                                                                        \
        const wide_##T expected = exp_##T(x[i + l]) * scale[l];                                                                \
        note(worst, ulp_##T(got[l], expected, expected), i + l, (double)expected);                                             \
      }                                                                                                                        \
    }                                                                                                                          \
  }                                                                                                                            \
                                                                                                                               \
  void worst_exp_pair_##T(const REAL *x, int64_t n, struct worst *worst)                                                       \
  {                                                                                                                            \
    REAL lo;                                                                                                                   \
    const REAL scale = exp_pair_##T(0, 0, &lo);                                                                                \
    worst->ulp = -1;                                                                                                           \
    for (int64_t i = 0; i < n; i++) {                                                                                          \
      const wide_##T expected = exp_##T(x[i]) * scale, hi = exp_pair_##T(x[i], 0, &lo);                                        \
      note(worst, ulp_##T(hi + lo, expected, expected), i, (double)expected);                                                  \
    }                                                                                                                          \
  }                                                                                                                            \
                                                                                                                               \
  void worst_log1p_pair_##T(const REAL *y, int64_t n, struct worst *worst)                                                     \
  {                                                                                                                            \
    REAL lo;                                                                                                                   \
    worst->ulp = -1;                                                                                                           \
    for (int64_t i = 0; i < n; i++) {                                                                                          \
      const wide_##T expected = log1p_##T(y[i]), hi = log1p_pair_##T(y[i], 0, &lo);                                            \
      note(worst, ulp_##T(hi + lo, expected, expected), i, (double)expected);                                                  \
    }                                                                                                                          \
  }

ELEMENTARY(f32, float)
ELEMENTARY(f64, double)
#endif
