/* The two elementary functions, once for float and once for double.
 *
 * Included by kernel.c with REAL, UINT, FN and the constants below defined. Everything here is straight-line
 * arithmetic on one element: the compiler turns the loops that call it into vector code for the instruction set at
 * hand, and as every operation is an IEEE one (fma only where FMA is written), all instruction sets give the same bits.
 *
 * A "pair" is an unevaluated sum hi + lo with |lo| <= ulp(hi) / 2: twice the precision, from the same type.
 */

static inline REAL FN(bits_to_real)(UINT bits)
{
  REAL value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline UINT FN(real_to_bits)(REAL value)
{
  UINT bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

/* hi + lo = a + b exactly (Knuth's TwoSum; Moller 1965). Infinities give a NaN in lo. */
static inline REAL FN(two_sum)(REAL a, REAL b, REAL *lo)
{
  const REAL hi = a + b;
  const REAL b_seen = hi - a;
  *lo = (a - (hi - b_seen)) + (b - b_seen);
  return hi;
}

/* The same in every lane. */
INLINE VEC FN(vec_two_sum)(VEC a, VEC b, VEC *lo)
{
  const VEC hi = a + b;
  const VEC b_seen = hi - a;
  *lo = (a - (hi - b_seen)) + (b - b_seen);
  return hi;
}

/* hi + lo = a + b for |a| >= |b| or a = 0 (Dekker's Fast2Sum). */
static inline REAL FN(fast_two_sum)(REAL a, REAL b, REAL *lo)
{
  const REAL hi = a + b;
  *lo = b - (hi - a);
  return hi;
}

/* The exponent (x - m) / temperature as a pair. inverse_hi + inverse_lo is 1 / temperature; at temperature 1 the products
 * are exact and vanish. Scaling the compensated difference, not x, keeps rows with a large common offset exact. */
static inline REAL FN(exponent)(REAL x, REAL m, REAL inverse_hi, REAL inverse_lo, REAL *lo)
{
  REAL difference_lo;
  const REAL difference = FN(two_sum)(x, -m, &difference_lo);
  const REAL hi = difference * inverse_hi;
  *lo = FMA(difference, inverse_hi, -hi) + FMA(difference, inverse_lo, difference_lo * inverse_hi);
  return hi;
}

/* exp(r) = 1 + r + r^2 q(r): the q of kernel.c, by pairs of coefficients (Estrin), as one after the other took longer. */
INLINE VEC FN(exp_tail)(VEC r, VEC square)
{
  const REAL *c = FN(exp_coefficients);
  const int odd = EXP_TERMS % 2;
  VEC q = odd ? FN(vec_fill)(c[0]) : FN(vec_fma)(FN(vec_fill)(c[0]), r, FN(vec_fill)(c[1]));
  for (int i = 2 - odd; i < EXP_TERMS; i += 2)
    q = FN(vec_fma)(q, square, FN(vec_fma)(FN(vec_fill)(c[i]), r, FN(vec_fill)(c[i + 1])));
  return q;
}

/* exp(a + b + lo) * EXP_SCALE = scale * (1 + less_one), less_one being returned. `at` is near a + b + lo - EXP_CENTER, and not
 * below EXP_LOWEST, where scale is exactly 0: far below the smallest number of this type, as terms that vanish one by one may
 * count together.
 *
 * k = at / ln 2 is rounded by adding a number so big that the integer part ends up in the lowest bits, where a shift moves it
 * to the exponent. It leaves r = a + b + lo - k ln 2 in [log(3/4), log(3/2)], where exp(r) - 1 is below 1/4 or below 1/2 (of a
 * result above 1): rounding it is an eighth of an ulp. a and b are apart as a + (b - k ln 2) is exact but for an |a| below 1/4;
 * then its error, up to 0.19 ulp, is left. About as much is lost where r is rounded, unless it is to be `careful`: with a
 * temperature, of whose quotients none is exact, a softmax was 2.003 ulp off without.
 *
 * EXP_SCALE keeps every result normal, so that sums of tiny terms stay exact and a probability is rounded once, when it
 * is multiplied by the scaled reciprocal of the sum, subnormal or not. A NaN stays a NaN. */
INLINE VEC FN(exp_less_one)(VEC at, VEC a, VEC b, VEC lo, bool careful, VEC *scale)
{
  const VEC shift = FN(vec_fill)(ROUND_SHIFT);
  const VEC shifted = FN(vec_fma)(at, FN(vec_fill)(LOG2_E), shift), k = shifted - shift;
  const VEC high = a + FN(vec_fma)(k, FN(vec_fill)(-LN2_HI), b), low = FN(vec_fma)(k, FN(vec_fill)(-LN2_LO), lo);
  const VEC r = high + low, square = r * r, q = FN(exp_tail)(r, square);
  *scale = FN(vec_scale)(shifted);
  if (careful) return high + FN(vec_fma)(q, square, low);
  return FN(vec_fma)(q, square, r);
}

/* exp(hi + lo) * EXP_SCALE as a pair, for the few factors that join the blocks of a long row. What rounding r loses is kept:
 * without, a softmax of many blocks was up to 2.1 ulp off. */
static inline REAL FN(exp_pair)(REAL hi, REAL lo, REAL *result_lo)
{
  REAL r_lo, s_lo, sum_lo;
  if (hi < EXP_LOWEST) {
    *result_lo = 0;
    return 0;
  }
  const REAL shifted = FMA(hi - EXP_CENTER, LOG2_E, ROUND_SHIFT);
  const REAL k = shifted - ROUND_SHIFT;
  const REAL scale = FN(bits_to_real)(FN(real_to_bits)(shifted) << MANTISSA_BITS);
  const REAL r = FN(two_sum)(FMA(k, -LN2_HI, hi), FMA(k, -LN2_LO, lo), &r_lo), square = r * r;
  const REAL *c = FN(exp_coefficients);
  const int odd = EXP_TERMS % 2;
  REAL q = odd ? c[0] : FMA(c[0], r, c[1]);
  for (int i = 2 - odd; i < EXP_TERMS; i += 2) q = FMA(q, square, FMA(c[i], r, c[i + 1]));
  const REAL s = FN(two_sum)(r, q * square, &s_lo);
  const REAL sum = FN(fast_two_sum)(1, s, &sum_lo);
  *result_lo = (sum_lo + (s_lo + r_lo)) * scale;
  return sum * scale;
}

/* factor * tanh(x), and the derivative of tanh(x), from v + v_lo = 2 x in [-40, 0] and half of the factor. z = exp(v) =
 * 2^k (1 + p), h = (z - 1) / 2, and tanh(x) = h - h tanh(x), where the tanh on the right, (z - 1) / (z + 1), may be an ulp or
 * two off, as |h| is at most 1/2. What rounding z - 1 loses is kept, so that a product with the factor is at most 2 ulp off: a
 * rounded tanh would take up to two by itself. The derivative is w (2 - w), w = 2 z / (z + 1). */
INLINE VEC FN(tanh)(VEC v, VEC v_lo, VEC half, VEC *slope)
{
  const VEC one = FN(vec_fill)(1), shift = FN(vec_fill)(ONE_SHIFT);
  const VEC shifted = FN(vec_fma)(v - FN(vec_fill)(EXP_CENTER), FN(vec_fill)(LOG2_E), shift);
  const VEC k = shifted - shift, scale = FN(vec_scale)(shifted), twice = scale + scale;
  const VEC high = FN(vec_fma)(k, FN(vec_fill)(-LN2_HI), v), low = FN(vec_fma)(k, FN(vec_fill)(-LN2_LO), v_lo);
  const VEC r = high + low, square = r * r, p = high + FN(vec_fma)(FN(exp_tail)(r, square), square, low);
  const VEC less = scale - one, above = FN(vec_fma)(scale, p, less), above_lo = FN(vec_fma)(scale, p, less - above);
  const VEC below = FN(vec_fma)(scale, p, scale + one), w = FN(vec_fma)(twice, p, twice) / below;
  *slope = w * (FN(vec_fill)(2) - w);
  return FN(vec_fma)(half, above, half * FN(vec_fma)(-above, above / below, above_lo));
}

/* log1p(hi + lo) for a pair >= 0, as a pair with a relative error below 2^-26 (float) and 2^-55 (double).
 *
 * 1 + y = 2^k f with f in [sqrt(1/2), sqrt(2)); log f = 2 atanh(s), s = z / (2 + z), z = f - 1, by its Taylor series, where
 * z and z^2 / 2 are split off exactly (the arrangement of FreeBSD's e_log.c). A tiny y has k = 0 and z = y: nothing lost.
 * y = 0 gives exactly 0; an infinity or a NaN gives a NaN. */
static inline REAL FN(log1p_pair)(REAL hi, REAL lo, REAL *result_lo)
{
  REAL one_lo, z_lo, a_lo, b_lo;
  const REAL one = FN(two_sum)(1, hi, &one_lo);
  const UINT bits = FN(real_to_bits)(one) - SQRT_HALF_BITS;
  const REAL k = (REAL)(SINT)(bits >> MANTISSA_BITS);
  const UINT shift = (bits >> MANTISSA_BITS) << MANTISSA_BITS;
  const REAL down = FN(bits_to_real)(FN(real_to_bits)((REAL)1) - shift); /* 2^-k */
  const REAL f = one * down;
  const REAL z = FN(fast_two_sum)(f - 1, one_lo * down, &z_lo);
  const REAL s = z / (2 + z);
  const REAL half = (REAL)0.5 * z;
  const REAL square = half * z;
  const REAL rest = s * (square + FN(atanh_tail)(s * s)) - FMA(half, z, -square) + FMA(lo, down, z_lo) / f;
  const REAL a = FN(fast_two_sum)(z, -square, &a_lo);
  const REAL b = FN(two_sum)(k * LN2_HI, a, &b_lo);
  return FN(fast_two_sum)(b, FMA(k, LN2_LO, rest + (a_lo + b_lo)), result_lo);
}
