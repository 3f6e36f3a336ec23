/* AVX-512: one vector a line. See vec_scalar.h for what each operation is. */

#include <immintrin.h>

typedef __m512 vec_f32;
typedef __m512d vec_f64;

#define VEC_OPERATIONS(T, REAL, VEC, ps, epi, bits, MASK)                                                                      \
  static inline VEC vec_load_##T(const REAL *p)                                                                                \
  {                                                                                                                            \
    return _mm512_loadu_##ps(p);                                                                                               \
  }                                                                                                                            \
  static inline void vec_store_##T(REAL *p, VEC a)                                                                             \
  {                                                                                                                            \
    _mm512_storeu_##ps(p, a);                                                                                                  \
  }                                                                                                                            \
  static inline VEC vec_load_part_##T(const REAL *p, int64_t n, VEC rest)                                                      \
  {                                                                                                                            \
    return _mm512_mask_loadu_##ps(rest, (MASK)((1u << n) - 1), p);                                                             \
  }                                                                                                                            \
  static inline void vec_store_part_##T(REAL *p, int64_t n, VEC a)                                                             \
  {                                                                                                                            \
    _mm512_mask_storeu_##ps(p, (MASK)((1u << n) - 1), a);                                                                      \
  }                                                                                                                            \
  static inline VEC vec_fill_##T(REAL a)                                                                                       \
  {                                                                                                                            \
    return _mm512_set1_##ps(a);                                                                                                \
  }                                                                                                                            \
  static inline VEC vec_fma_##T(VEC a, VEC b, VEC c)                                                                           \
  {                                                                                                                            \
    return _mm512_fmadd_##ps(a, b, c);                                                                                         \
  }                                                                                                                            \
  static inline VEC vec_larger_##T(VEC a, VEC b)                                                                               \
  {                                                                                                                            \
    return _mm512_max_##ps(a, b);                                                                                              \
  }                                                                                                                            \
  static inline VEC vec_scale_##T(VEC a)                                                                                       \
  {                                                                                                                            \
    return _mm512_castsi512_##ps(_mm512_slli_##epi(_mm512_cast##ps##_si512(a), bits));                                         \
  }                                                                                                                            \
  static inline VEC vec_unless_below_##T(VEC a, VEC x, VEC y)                                                                  \
  {                                                                                                                            \
    return _mm512_maskz_mov_##ps(_mm512_cmp_##ps##_mask(x, y, _CMP_NLT_UQ), a);                                                \
  }                                                                                                                            \
  static inline VEC vec_unless_equal_##T(VEC a, VEC x, VEC y)                                                                  \
  {                                                                                                                            \
    return _mm512_maskz_mov_##ps(_mm512_cmp_##ps##_mask(x, y, _CMP_NEQ_UQ), a);                                                \
  }                                                                                                                            \
  static inline int vec_count_equal_##T(VEC x, VEC y)                                                                          \
  {                                                                                                                            \
    return __builtin_popcount(_mm512_cmp_##ps##_mask(x, y, _CMP_EQ_OQ));                                                       \
  }

/* clang-format off */
VEC_OPERATIONS(f32, float, vec_f32, ps, epi32, 23, __mmask16)
VEC_OPERATIONS(f64, double, vec_f64, pd, epi64, 52, __mmask8)
