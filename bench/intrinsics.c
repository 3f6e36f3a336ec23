/* What the compiler's vector code costs beside code written in intrinsics: exp_many_f32 of c/rows.inc.h, both ways, on
 * one block in the first-level cache. docs/backends.md has the command and the result. AVX-512 only. */

#include <immintrin.h>
#include <stdio.h>
#include <time.h>

#include "kernel.c"

#define N 4096
#define REPEATS 4000

static float x[N], plain[N], intrinsics[N];

static void exp_many_avx512(const float *restrict from, float *restrict to, int64_t n, float max, const float *next)
{
  const __m512 minus_max = _mm512_set1_ps(-max), shift = _mm512_set1_ps(0x1.8p+23f + 127 + 64), one = _mm512_set1_ps(1);
  for (int64_t c = 0; c < n; c += 16) {
    __builtin_prefetch(next + c);
    const __m512 a = _mm512_loadu_ps(from + c);
    const __m512 hi = _mm512_add_ps(a, minus_max);
    const __m512 b = _mm512_sub_ps(hi, a);
    const __m512 lo = _mm512_add_ps(_mm512_sub_ps(a, _mm512_sub_ps(hi, b)), _mm512_sub_ps(minus_max, b));
    const __m512 shifted = _mm512_fmadd_ps(hi, _mm512_set1_ps(0x1.715476p+0f), shift);
    const __m512 k = _mm512_sub_ps(shifted, shift);
    const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(shifted), 23));
    const __m512 r = _mm512_add_ps(_mm512_fmadd_ps(k, _mm512_set1_ps(-0x1.62ep-1f), hi),
                                   _mm512_fmadd_ps(k, _mm512_set1_ps(-0x1.0bfbe8p-15f), lo));
    __m512 q = _mm512_fmadd_ps(_mm512_set1_ps(0x1.6d1606p-10f), r, _mm512_set1_ps(0x1.12106cp-7f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0x1.555516p-5f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0x1.5554d8p-3f));
    q = _mm512_fmadd_ps(q, r, _mm512_set1_ps(0.5f));
    q = _mm512_fmadd_ps(q, r, one);
    q = _mm512_mul_ps(_mm512_fmadd_ps(q, r, one), scale);
    const __mmask16 tiny = _mm512_cmp_ps_mask(hi, _mm512_set1_ps(-104), _CMP_LT_OQ);
    _mm512_storeu_ps(to + c, _mm512_mask_mov_ps(q, tiny, _mm512_setzero_ps()));
  }
}

static double seconds(void)
{
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

int main(void)
{
  const struct temperature_f32 t = {1, 0};
  double best_plain = 1, best_intrinsics = 1;
  for (int i = 0; i < N; i++) x[i] = (float)(i * 7919 % 10007) / -100;
  for (int i = 0; i < REPEATS; i++) {
    const double start = seconds();
    exp_many_f32(x, plain, N, 0, t, x);
    const double middle = seconds();
    exp_many_avx512(x, intrinsics, N, 0, x);
    const double end = seconds();
    if (middle - start < best_plain) best_plain = middle - start;
    if (end - middle < best_intrinsics) best_intrinsics = end - middle;
  }
  printf("plain C     %.2f G elements/s\n", N / best_plain / 1e9);
  printf("intrinsics  %.2f G elements/s\n", N / best_intrinsics / 1e9);
  printf("%s bits\n", memcmp(plain, intrinsics, sizeof plain) ? "different" : "the same");
  return 0;
}
