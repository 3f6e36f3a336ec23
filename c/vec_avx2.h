/* AVX2 with FMA: two vectors a line. See vec_scalar.h for what each operation is. */

#include <immintrin.h>

typedef __m256 vec_f32;
typedef __m256d vec_f64;

#define VEC_OPERATIONS(T, REAL, VEC, ps, epi, set, bits, SINT, COUNT)                                                          \
  static inline VEC vec_load_##T(const REAL *p)                                                                                \
  {                                                                                                                            \
    return _mm256_loadu_##ps(p);                                                                                               \
  }                                                                                                                            \
  static inline void vec_store_##T(REAL *p, VEC a)                                                                             \
  {                                                                                                                            \
    _mm256_storeu_##ps(p, a);                                                                                                  \
  }                                                                                                                            \
  static inline VEC vec_load_part_##T(const REAL *p, int64_t n, VEC rest)                                                      \
  {                                                                                                                            \
    const __m256i mask = _mm256_cmpgt_##epi(_mm256_set1_##set((SINT)n), COUNT);                                                \
    return _mm256_blendv_##ps(rest, _mm256_maskload_##ps(p, mask), _mm256_castsi256_##ps(mask));                               \
  }                                                                                                                            \
  static inline void vec_store_part_##T(REAL *p, int64_t n, VEC a)                                                             \
  {                                                                                                                            \
    _mm256_maskstore_##ps(p, _mm256_cmpgt_##epi(_mm256_set1_##set((SINT)n), COUNT), a);                                        \
  }                                                                                                                            \
  static inline VEC vec_fill_##T(REAL a)                                                                                       \
  {                                                                                                                            \
    return _mm256_set1_##ps(a);                                                                                                \
  }                                                                                                                            \
  static inline VEC vec_fma_##T(VEC a, VEC b, VEC c)                                                                           \
  {                                                                                                                            \
    return _mm256_fmadd_##ps(a, b, c);                                                                                         \
  }                                                                                                                            \
  static inline VEC vec_larger_##T(VEC a, VEC b)                                                                               \
  {                                                                                                                            \
    return _mm256_max_##ps(a, b);                                                                                              \
  }                                                                                                                            \
  static inline VEC vec_scale_##T(VEC a)                                                                                       \
  {                                                                                                                            \
    return _mm256_castsi256_##ps(_mm256_slli_##epi(_mm256_cast##ps##_si256(a), bits));                                         \
  }                                                                                                                            \
  static inline VEC vec_unless_below_##T(VEC a, VEC x, VEC y)                                                                  \
  {                                                                                                                            \
    return _mm256_andnot_##ps(_mm256_cmp_##ps(x, y, _CMP_LT_OQ), a);                                                           \
  }                                                                                                                            \
  static inline VEC vec_unless_equal_##T(VEC a, VEC x, VEC y)                                                                  \
  {                                                                                                                            \
    return _mm256_andnot_##ps(_mm256_cmp_##ps(x, y, _CMP_EQ_OQ), a);                                                           \
  }                                                                                                                            \
  static inline int vec_count_equal_##T(VEC x, VEC y)                                                                          \
  {                                                                                                                            \
    return __builtin_popcount((unsigned)_mm256_movemask_##ps(_mm256_cmp_##ps(x, y, _CMP_EQ_OQ)));                              \
  }

/* clang-format off */
VEC_OPERATIONS(f32, float, vec_f32, ps, epi32, epi32, 23, int, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))
VEC_OPERATIONS(f64, double, vec_f64, pd, epi64, epi64x, 52, int64_t, _mm256_setr_epi64x(0, 1, 2, 3))
