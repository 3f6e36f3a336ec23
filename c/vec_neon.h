/* NEON: four vectors a line. See vec_scalar.h for what each operation is. */

#include <arm_neon.h>

typedef float32x4_t vec_f32;
typedef float64x2_t vec_f64;

#define VEC_OPERATIONS(T, REAL, VEC, U, bits)                                                                                  \
  static inline VEC vec_load_##T(const REAL *p)                                                                                \
  {                                                                                                                            \
    return vld1q_##T(p);                                                                                                       \
  }                                                                                                                            \
  static inline void vec_store_##T(REAL *p, VEC a)                                                                             \
  {                                                                                                                            \
    vst1q_##T(p, a);                                                                                                           \
  }                                                                                                                            \
  static inline VEC vec_fill_##T(REAL a)                                                                                       \
  {                                                                                                                            \
    return vdupq_n_##T(a);                                                                                                     \
  }                                                                                                                            \
  static inline VEC vec_fma_##T(VEC a, VEC b, VEC c)                                                                           \
  {                                                                                                                            \
    return vfmaq_##T(c, a, b);                                                                                                 \
  }                                                                                                                            \
  static inline VEC vec_larger_##T(VEC a, VEC b)                                                                               \
  {                                                                                                                            \
    return vbslq_##T(vcgtq_##T(a, b), a, b);                                                                                   \
  }                                                                                                                            \
  static inline VEC vec_with_sign_##T(VEC a, VEC b)                                                                            \
  {                                                                                                                            \
    return vbslq_##T(vreinterpretq_##U##_##T(vdupq_n_##T(-0.0)), b, a);                                                        \
  }                                                                                                                            \
  static inline VEC vec_scale_##T(VEC a)                                                                                       \
  {                                                                                                                            \
    return vreinterpretq_##T##_##U(vshlq_n_##U(vreinterpretq_##U##_##T(a), bits));                                             \
  }                                                                                                                            \
  static inline VEC vec_unless_below_##T(VEC a, VEC x, VEC y)                                                                  \
  {                                                                                                                            \
    return vreinterpretq_##T##_##U(vbicq_##U(vreinterpretq_##U##_##T(a), vcltq_##T(x, y)));                                    \
  }                                                                                                                            \
  static inline VEC vec_unless_equal_##T(VEC a, VEC x, VEC y)                                                                  \
  {                                                                                                                            \
    return vreinterpretq_##T##_##U(vbicq_##U(vreinterpretq_##U##_##T(a), vceqq_##T(x, y)));                                    \
  }                                                                                                                            \
  static inline VEC vec_if_equal_##T(VEC x, VEC y, VEC a, VEC b)                                                               \
  {                                                                                                                            \
    return vbslq_##T(vceqq_##T(x, y), a, b);                                                                                   \
  }                                                                                                                            \
  static inline int vec_count_equal_##T(VEC x, VEC y)                                                                          \
  {                                                                                                                            \
    return -(int)vaddvq_##U(vceqq_##T(x, y));                                                                                  \
  }

#define VEC_PARTS(T, REAL, VEC, VEC_LANES)                                                                                     \
  static inline unsigned vec_bits_above_##T(VEC a, VEC b)                                                                      \
  {                                                                                                                            \
    REAL x[VEC_LANES], y[VEC_LANES];                                                                                           \
    unsigned bits = 0;                                                                                                         \
    vec_store_##T(x, a);                                                                                                       \
    vec_store_##T(y, b);                                                                                                       \
    for (int i = 0; i < VEC_LANES; i++) bits |= (unsigned)!(x[i] <= y[i]) << i;                                                \
    return bits;                                                                                                               \
  }                                                                                                                            \
  static inline VEC vec_load_part_##T(const REAL *p, int64_t n, VEC rest)                                                      \
  {                                                                                                                            \
    REAL lanes[VEC_LANES];                                                                                                     \
    vec_store_##T(lanes, rest);                                                                                                \
    for (int64_t i = 0; i < n; i++) lanes[i] = p[i];                                                                           \
    return vec_load_##T(lanes);                                                                                                \
  }                                                                                                                            \
  static inline void vec_store_part_##T(REAL *p, int64_t n, VEC a)                                                             \
  {                                                                                                                            \
    REAL lanes[VEC_LANES];                                                                                                     \
    vec_store_##T(lanes, a);                                                                                                   \
    for (int64_t i = 0; i < n; i++) p[i] = lanes[i];                                                                           \
  }

/* clang-format off */
VEC_OPERATIONS(f32, float, vec_f32, u32, 23)
VEC_OPERATIONS(f64, double, vec_f64, u64, 52)
VEC_PARTS(f32, float, vec_f32, 4)
VEC_PARTS(f64, double, vec_f64, 2)
/* clang-format on */

/* Rows become columns, and columns rows. */
static inline void vec_turn_f32(vec_f32 *q)
{
  const vec_f64 a = (vec_f64)vzip1q_f32(q[0], q[1]), b = (vec_f64)vzip1q_f32(q[2], q[3]);
  const vec_f64 c = (vec_f64)vzip2q_f32(q[0], q[1]), d = (vec_f64)vzip2q_f32(q[2], q[3]);
  q[0] = (vec_f32)vzip1q_f64(a, b);
  q[1] = (vec_f32)vzip2q_f64(a, b);
  q[2] = (vec_f32)vzip1q_f64(c, d);
  q[3] = (vec_f32)vzip2q_f64(c, d);
}

static inline void vec_turn_f64(vec_f64 *q)
{
  const vec_f64 a = vzip1q_f64(q[0], q[1]);
  q[1] = vzip2q_f64(q[0], q[1]);
  q[0] = a;
}

#define VEC_ACROSS(T, VEC, N)                                                                                                  \
  static inline void vec_load_across_##T(VEC *q, const char *rows, int64_t stride)                                             \
  {                                                                                                                            \
    for (int i = 0; i < N; i++) q[i] = vld1q_##T((const void *)(rows + i * stride));                                           \
    vec_turn_##T(q);                                                                                                           \
  }                                                                                                                            \
  static inline void vec_store_across_##T(VEC *q, char *rows, int64_t stride)                                                  \
  {                                                                                                                            \
    vec_turn_##T(q);                                                                                                           \
    for (int i = 0; i < N; i++) vst1q_##T((void *)(rows + i * stride), q[i]);                                                  \
  }

/* clang-format off */
VEC_ACROSS(f32, vec_f32, 4)
VEC_ACROSS(f64, vec_f64, 2)
