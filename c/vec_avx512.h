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
  static inline VEC vec_with_sign_##T(VEC a, VEC b)                                                                            \
  {                                                                                                                            \
    const __m512i sign = (__m512i)_mm512_set1_##ps(-0.0);                                                                      \
    return (VEC)_mm512_ternarylogic_##epi(sign, (__m512i)b, (__m512i)a, 0xca);                                                 \
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
  static inline VEC vec_if_equal_##T(VEC x, VEC y, VEC a, VEC b)                                                               \
  {                                                                                                                            \
    return _mm512_mask_blend_##ps(_mm512_cmp_##ps##_mask(x, y, _CMP_EQ_OQ), b, a);                                             \
  }                                                                                                                            \
  static inline unsigned vec_bits_above_##T(VEC a, VEC b)                                                                      \
  {                                                                                                                            \
    return _mm512_cmp_##ps##_mask(a, b, _CMP_NLE_UQ);                                                                          \
  }                                                                                                                            \
  static inline int vec_count_equal_##T(VEC x, VEC y)                                                                          \
  {                                                                                                                            \
    return __builtin_popcount(_mm512_cmp_##ps##_mask(x, y, _CMP_EQ_OQ));                                                       \
  }

/* clang-format off */
VEC_OPERATIONS(f32, float, vec_f32, ps, epi32, 23, __mmask16)
VEC_OPERATIONS(f64, double, vec_f64, pd, epi64, 52, __mmask8)
/* clang-format on */

/* Within 16 bytes rows become columns, and columns rows. */
static inline void vec_turn_f32(vec_f32 *q)
{
  const vec_f64 a = (vec_f64)_mm512_unpacklo_ps(q[0], q[1]), b = (vec_f64)_mm512_unpacklo_ps(q[2], q[3]);
  const vec_f64 c = (vec_f64)_mm512_unpackhi_ps(q[0], q[1]), d = (vec_f64)_mm512_unpackhi_ps(q[2], q[3]);
  q[0] = (vec_f32)_mm512_unpacklo_pd(a, b);
  q[1] = (vec_f32)_mm512_unpackhi_pd(a, b);
  q[2] = (vec_f32)_mm512_unpacklo_pd(c, d);
  q[3] = (vec_f32)_mm512_unpackhi_pd(c, d);
}

static inline void vec_turn_f64(vec_f64 *q)
{
  const vec_f64 a = _mm512_unpacklo_pd(q[0], q[1]);
  q[1] = _mm512_unpackhi_pd(q[0], q[1]);
  q[0] = a;
}

#define VEC_ACROSS(T, VEC, N)                                                                                                  \
  static inline void vec_load_across_##T(VEC *q, const char *rows, int64_t stride)                                             \
  {                                                                                                                            \
    for (int i = 0; i < N; i++) {                                                                                              \
      __m512i pieces = _mm512_castsi128_si512(_mm_loadu_si128((const void *)(rows + i * stride)));                             \
      pieces = _mm512_inserti32x4(pieces, _mm_loadu_si128((const void *)(rows + (i + N) * stride)), 1);                        \
      pieces = _mm512_inserti32x4(pieces, _mm_loadu_si128((const void *)(rows + (i + 2 * N) * stride)), 2);                    \
      q[i] = (VEC)_mm512_inserti32x4(pieces, _mm_loadu_si128((const void *)(rows + (i + 3 * N) * stride)), 3);                 \
    }                                                                                                                          \
    vec_turn_##T(q);                                                                                                           \
  }                                                                                                                            \
  static inline void vec_store_across_##T(VEC *q, char *rows, int64_t stride)                                                  \
  {                                                                                                                            \
    vec_turn_##T(q);                                                                                                           \
    for (int i = 0; i < N; i++) {                                                                                              \
      const __m512i pieces = (__m512i)q[i];                                                                                    \
      _mm_storeu_si128((void *)(rows + i * stride), _mm512_castsi512_si128(pieces));                                           \
      _mm_storeu_si128((void *)(rows + (i + N) * stride), _mm512_extracti32x4_epi32(pieces, 1));                               \
      _mm_storeu_si128((void *)(rows + (i + 2 * N) * stride), _mm512_extracti32x4_epi32(pieces, 2));                           \
      _mm_storeu_si128((void *)(rows + (i + 3 * N) * stride), _mm512_extracti32x4_epi32(pieces, 3));                           \
    }                                                                                                                          \
  }

/* clang-format off */
VEC_ACROSS(f32, vec_f32, 4)
VEC_ACROSS(f64, vec_f64, 2)
