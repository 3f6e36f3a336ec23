/* float16 and bfloat16 as float, in integer arithmetic that vectorises; where there are instructions for many elements of
 * float16, they give the same bits. */

#ifndef PL_HALF_H
#define PL_HALF_H

#include <string.h>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "kernel.h"

static inline float pl_float_from_bits(uint32_t bits)
{
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t pl_bits_from_float(float value)
{
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float pl_from_bfloat16(uint16_t half)
{
  return pl_float_from_bits((uint32_t)half << 16);
}

/* Round to nearest even by adding just under half a unit, or half where the last kept bit is odd. A NaN stays a quiet NaN. */
static inline uint16_t pl_to_bfloat16(float value)
{
  const uint32_t bits = pl_bits_from_float(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (uint16_t)(value == value ? rounded : (bits >> 16) | 0x40);
}

/* The exponent is moved by a multiplication with 2^112, which normalises subnormals on the way; it is exact. */
static inline float pl_from_float16(uint16_t half)
{
  const uint32_t magnitude = (uint32_t)(half & 0x7fff) << 13;
  const uint32_t finite = pl_bits_from_float(pl_float_from_bits(magnitude) * 0x1p+112f);
  const uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite;
  return pl_float_from_bits(bits | (uint32_t)(half & 0x8000) << 16);
}

/* Three ranges: normal results round as bfloat16 does; subnormal ones by adding 0.5, whose unit is theirs (2^-24); 65520 and
 * more become infinity. A NaN keeps what has room of it, and is quiet. */
static inline uint16_t pl_to_float16(float value)
{
  const uint32_t bits = pl_bits_from_float(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0x0fff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t subnormal = pl_bits_from_float(pl_float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u | (magnitude >> 13 & 0x1ffu) : half;
  return (uint16_t)(half | (bits >> 16 & 0x8000u));
}

/* n elements that lie side by side. */

static inline void pl_from_float16s(float *x, const char *p, int64_t n)
{
  int64_t c = 0;
#if defined(__AVX512F__)
  for (; c + 16 <= n; c += 16) _mm512_storeu_ps(x + c, _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(p + c * 2))));
#elif defined(__F16C__)
  for (; c + 8 <= n; c += 8) _mm256_storeu_ps(x + c, _mm256_cvtph_ps(_mm_loadu_si128((const void *)(p + c * 2))));
#endif
  for (; c < n; c++) {
    uint16_t half;
    memcpy(&half, p + c * 2, sizeof half);
    x[c] = pl_from_float16(half);
  }
}

static inline void pl_to_float16s(char *p, const float *x, int64_t n)
{
  int64_t c = 0;
#if defined(__AVX512F__)
  for (; c + 16 <= n; c += 16)
    _mm256_storeu_si256((void *)(p + c * 2), _mm512_cvtps_ph(_mm512_loadu_ps(x + c), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  for (; c + 8 <= n; c += 8)
    _mm_storeu_si128((void *)(p + c * 2), _mm256_cvtps_ph(_mm256_loadu_ps(x + c), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; c < n; c++) {
    const uint16_t half = pl_to_float16(x[c]);
    memcpy(p + c * 2, &half, sizeof half);
  }
}

static inline int64_t pl_itemsize(int dtype)
{
  return dtype == PL_FLOAT64 ? 8 : dtype == PL_FLOAT32 ? 4 : 2;
}

/* For programs: a number as an element of a dtype. */
static inline void pl_set_float(char *p, int dtype, double value)
{
  const float narrow = (float)value;
  const uint16_t half = dtype == PL_FLOAT16 ? pl_to_float16(narrow) : pl_to_bfloat16(narrow);
  if (dtype == PL_FLOAT64) {
    memcpy(p, &value, sizeof value);
  } else if (dtype == PL_FLOAT32) {
    memcpy(p, &narrow, sizeof narrow);
  } else {
    memcpy(p, &half, sizeof half);
  }
}

#endif
