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
  static inline VEC vec_with_sign_##T(VEC a, VEC b)                                                                            \
  {                                                                                                                            \
    const VEC sign = _mm256_set1_##ps(-0.0);                                                                                   \
    return _mm256_or_##ps(_mm256_andnot_##ps(sign, a), _mm256_and_##ps(sign, b));                                              \
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
  static inline VEC vec_if_equal_##T(VEC x, VEC y, VEC a, VEC b)                                                               \
  {                                                                                                                            \
    return _mm256_blendv_##ps(b, a, _mm256_cmp_##ps(x, y, _CMP_EQ_OQ));                                                        \
  }                                                                                                                            \
  static inline unsigned vec_bits_above_##T(VEC a, VEC b)                                                                      \
  {                                                                                                                            \
    return (unsigned)_mm256_movemask_##ps(_mm256_cmp_##ps(a, b, _CMP_NLE_UQ));                                                 \
  }                                                                                                                            \
  static inline int vec_count_equal_##T(VEC x, VEC y)                                                                          \
  {                                                                                                                            \
    return __builtin_popcount((unsigned)_mm256_movemask_##ps(_mm256_cmp_##ps(x, y, _CMP_EQ_OQ)));                              \
  }

/* clang-format off */
VEC_OPERATIONS(f32, float, vec_f32, ps, epi32, epi32, 23, int, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))
VEC_OPERATIONS(f64, double, vec_f64, pd, epi64, epi64x, 52, int64_t, _mm256_setr_epi64x(0, 1, 2, 3))
/* clang-format on */

/* Within 16 bytes rows become columns, and columns rows. */
static inline void vec_turn_f32(vec_f32 *q)
{
  const vec_f64 a = (vec_f64)_mm256_unpacklo_ps(q[0], q[1]), b = (vec_f64)_mm256_unpacklo_ps(q[2], q[3]);
  const vec_f64 c = (vec_f64)_mm256_unpackhi_ps(q[0], q[1]), d = (vec_f64)_mm256_unpackhi_ps(q[2], q[3]);
  q[0] = (vec_f32)_mm256_unpacklo_pd(a, b);
  q[1] = (vec_f32)_mm256_unpackhi_pd(a, b);
  q[2] = (vec_f32)_mm256_unpacklo_pd(c, d);
  q[3] = (vec_f32)_mm256_unpackhi_pd(c, d);
}

static inline void vec_turn_f64(vec_f64 *q)
{
  const vec_f64 a = _mm256_unpacklo_pd(q[0], q[1]);
  q[1] = _mm256_unpackhi_pd(q[0], q[1]);
  q[0] = a;
}

#define VEC_ACROSS(T, VEC, N)                                                                                                  \
  static inline void vec_load_across_##T(VEC *q, const char *rows, int64_t stride)                                             \
  {                                                                                                                            \
    for (int i = 0; i < N; i++) {                                                                                              \
      const __m128i low = _mm_loadu_si128((const void *)(rows + i * stride)),                                                  \
                    high = _mm_loadu_si128((const void *)(rows + (i + N) * stride));                                           \
      q[i] = (VEC)_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);                                               \
    }                                                                                                                          \
    vec_turn_##T(q);                                                                                                           \
  }                                                                                                                            \
  static inline void vec_store_across_##T(VEC *q, char *rows, int64_t stride)                                                  \
  {                                                                                                                            \
    vec_turn_##T(q);                                                                                                           \
    for (int i = 0; i < N; i++) {                                                                                              \
      _mm_storeu_si128((void *)(rows + i * stride), _mm256_castsi256_si128((__m256i)q[i]));                                    \
      _mm_storeu_si128((void *)(rows + (i + N) * stride), _mm256_extracti128_si256((__m256i)q[i], 1));                         \
    }                                                                                                                          \
  }

/* clang-format off */
VEC_ACROSS(f32, vec_f32, 4)
VEC_ACROSS(f64, vec_f64, 2)
