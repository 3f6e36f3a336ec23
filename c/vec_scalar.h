/* The vector operations, on vectors of one: what the other vec_*.h do with several lanes at once. + - * / and unary - are
 * the C operators everywhere. */

typedef float vec_f32;
typedef double vec_f64;

#define VEC_OPERATIONS(T, REAL, UINT, fma_function, bits)                                                                      \
  static inline REAL vec_load_##T(const REAL *p)                                                                               \
  {                                                                                                                            \
    return *p;                                                                                                                 \
  }                                                                                                                            \
  static inline void vec_store_##T(REAL *p, REAL a)                                                                            \
  {                                                                                                                            \
    *p = a;                                                                                                                    \
  }                                                                                                                            \
  /* The first n lanes, n > 0; the others of a loaded vector are those of `rest`. */                                           \
  static inline REAL vec_load_part_##T(const REAL *p, int64_t n, REAL rest)                                                    \
  {                                                                                                                            \
    return n ? *p : rest;                                                                                                      \
  }                                                                                                                            \
  static inline void vec_store_part_##T(REAL *p, int64_t n, REAL a)                                                            \
  {                                                                                                                            \
    if (n) *p = a;                                                                                                             \
  }                                                                                                                            \
  static inline REAL vec_fill_##T(REAL a)                                                                                      \
  {                                                                                                                            \
    return a;                                                                                                                  \
  } /* a in every lane */                                                                                                      \
  static inline REAL vec_fma_##T(REAL a, REAL b, REAL c)                                                                       \
  {                                                                                                                            \
    return fma_function(a, b, c);                                                                                              \
  }                                                                                                                            \
  static inline REAL vec_larger_##T(REAL a, REAL b)                                                                            \
  {                                                                                                                            \
    return a > b ? a : b;                                                                                                      \
  } /* b where one is a NaN */                                                                                                 \
  /* |a| with the sign of b. */                                                                                                \
  static inline REAL vec_with_sign_##T(REAL a, REAL b)                                                                         \
  {                                                                                                                            \
    return signbit(a) == signbit(b) ? a : -a;                                                                                  \
  }                                                                                                                            \
  /* The number whose exponent field holds the lowest bits of a. */                                                            \
  static inline REAL vec_scale_##T(REAL a)                                                                                     \
  {                                                                                                                            \
    UINT pattern;                                                                                                              \
    memcpy(&pattern, &a, sizeof a);                                                                                            \
    pattern <<= bits;                                                                                                          \
    memcpy(&a, &pattern, sizeof a);                                                                                            \
    return a;                                                                                                                  \
  }                                                                                                                            \
  /* a, but 0 where x < y; a NaN is not below. */                                                                              \
  static inline REAL vec_unless_below_##T(REAL a, REAL x, REAL y)                                                              \
  {                                                                                                                            \
    return x < y ? 0 : a;                                                                                                      \
  }                                                                                                                            \
  static inline REAL vec_unless_equal_##T(REAL a, REAL x, REAL y)                                                              \
  {                                                                                                                            \
    return x == y ? 0 : a;                                                                                                     \
  }                                                                                                                            \
  static inline REAL vec_if_equal_##T(REAL x, REAL y, REAL a, REAL b)                                                          \
  {                                                                                                                            \
    return x == y ? a : b;                                                                                                     \
  }                                                                                                                            \
  /* VEC_LANES rows become columns: the first 16 bytes of each are a lane of the vectors q. */                                 \
  static inline void vec_load_across_##T(REAL *q, const char *rows, int64_t stride)                                            \
  {                                                                                                                            \
    (void)stride;                                                                                                              \
    memcpy(q, rows, sizeof *q);                                                                                                \
  } /* here one element */                                                                                                     \
  static inline void vec_store_across_##T(const REAL *q, char *rows, int64_t stride)                                           \
  {                                                                                                                            \
    (void)stride;                                                                                                              \
    memcpy(rows, q, sizeof *q);                                                                                                \
  }                                                                                                                            \
  /* A bit for each lane that is not <= b: larger, or one of the two a NaN. */                                                 \
  static inline unsigned vec_bits_above_##T(REAL a, REAL b)                                                                    \
  {                                                                                                                            \
    return !(a <= b);                                                                                                          \
  }                                                                                                                            \
  static inline int vec_count_equal_##T(REAL x, REAL y)                                                                        \
  {                                                                                                                            \
    return x == y;                                                                                                             \
  } /* lanes */

/* clang-format off */
VEC_OPERATIONS(f32, float, uint32_t, __builtin_fmaf, 23)
VEC_OPERATIONS(f64, double, uint64_t, __builtin_fma, 52)
