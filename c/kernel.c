/* All kernels, compiled once per instruction set (see meson.build). The vectors' operations are in vec_*.h; everything else is
 * the same C for scalar, AVX2, AVX-512 and NEON, with the same bits (-ffp-contract=off, never -ffast-math). */

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "half.h"
#include "kernel.h"
#include "stream.h"

#define PASTE2(a, b) a##b
#define PASTE(a, b) PASTE2(a, b)
#define INLINE static inline __attribute__((always_inline))

#define VECTORS2(isa) <vec_##isa.h>
#define VECTORS(isa) VECTORS2(isa)
#include VECTORS(PL_ISA)

/* A line is 64 bytes, one AVX-512 register; a group is 4 lines; a block is 16 KiB, so that a row under
 * way (two blocks) stays in the first-level cache. The reduction tree in rows.inc.h is defined in these units. */
#define LINES_PER_GROUP 4
#define BLOCK_BYTES 16384
#define TILE 2048         /* classes in a tile at most, that is 128 KiB; twice that holds a block of LANES rows */
#define TILES 8           /* that go through the steps together */
#define TILE_PICKS 8      /* largest logits of each row at most, in tiles of up to a group of classes: beyond, rows take less */
#define BATCH_BYTES 65536 /* of rows that go through the steps together: a quarter of that took 2 to 9 % more time */
/* Outputs from this size on bypass the caches: more than a core's own cache, less than most shared ones. */
#define STREAM_BYTES (32 << 20)
#define GROUP (LINES_PER_GROUP * LANES)
#define ROOM (TILE * LANES)
#define BLOCK (BLOCK_BYTES / (int64_t)sizeof(REAL))
#define ACROSS ((int64_t)(sizeof(VEC) < 16 ? 1 : 16 / sizeof(REAL))) /* elements of a piece, see vec_load_across */
#define VEC_LANES ((int)(sizeof(VEC) / sizeof(REAL)))
#define LINE_VECS (LANES / VEC_LANES)
#define ROUND_UP(n, unit) (((n) + (unit)-1) / (unit) * (unit))

/* ---- float ---- */

#define REAL float
#define NUMBER_MAX FLT_MAX
#define UINT uint32_t
#define SINT int32_t
#define FN(name) PASTE(name, _f32)
#define VEC vec_f32
#define FMA(a, b, c) __builtin_fmaf(a, b, c)
#define NEXT_AFTER(a, b) nextafterf(a, b)
#define LANES 16
#define NATIVE_DTYPE PL_FLOAT32
#define MANTISSA_BITS 23
#define EXP_SCALE 0x1p+64f
#define EXP_CENTER 0.0588915f        /* (log(3/4) + log(3/2)) / 2 */
#define SMALL 0x1p-55f               /* divided by EXP_SCALE, a factor's low part still has digits enough */
#define BOOST 0x1p+40f               /* see line_of */
#define LIFT 0x1p+32f                /* see probability */
#define EXP_LOWEST (-132.35f)        /* in the middle of what is rounded to 2^-191, and scaled by a 0 */
#define GRID (0x1.8p+23f * 0x1p-13f) /* added and subtracted, it rounds to multiples of 2^-13 */
#define FAR 512                      /* |maximum / temperature| from which x - maximum is exact for all terms that count */
#define ONE_SHIFT (0x1.8p+23f + 127) /* biased exponent of 1 */
#define ROUND_SHIFT (ONE_SHIFT + 64) /* of EXP_SCALE */
#define SQRT_HALF_BITS 0x3f3504f3u
#define LOG2_E 0x1.715476p+0f
#define LN2_HI 0x1.62ep-1f
#define LN2_LO 0x1.0bfbe8p-15f

/* q(r) = (exp(r) - 1 - r) / r^2, so that the error of exp(r) in ulp is the least on [log(3/4), log(3/2)] (Remez): 0.052 before
 * rounding. */
#define EXP_TERMS 5
static const float exp_coefficients_f32[EXP_TERMS] = {0x1.7ba62p-10f, 0x1.11f8cp-7f, 0x1.554b7ep-5f, 0x1.5554cap-3f, 0.5f};

/* 2 atanh(s) / s - 2 as a series in w = s^2 <= 0.0295. */
static inline float atanh_tail_f32(float w)
{
  return w * FMA(FMA(FMA(FMA(2.f / 11, w, 2.f / 9), w, 2.f / 7), w, 2.f / 5), w, 2.f / 3);
}

#include "exp.inc.h"
#include "rows.inc.h"
#include "results.inc.h"
#include "loss.inc.h"
#include "tiles.inc.h"
#include "backward.inc.h"
#include "run.inc.h"

#undef REAL
#undef NUMBER_MAX
#undef UINT
#undef SINT
#undef FN
#undef VEC
#undef FMA
#undef NEXT_AFTER
#undef LANES
#undef NATIVE_DTYPE
#undef MANTISSA_BITS
#undef EXP_SCALE
#undef EXP_CENTER
#undef EXP_LOWEST
#undef SMALL
#undef BOOST
#undef LIFT
#undef GRID
#undef FAR
#undef EXP_TERMS
#undef ROUND_SHIFT
#undef ONE_SHIFT
#undef SQRT_HALF_BITS
#undef LOG2_E
#undef LN2_HI
#undef LN2_LO

/* ---- double ---- */

#define REAL double
#define NUMBER_MAX DBL_MAX
#define UINT uint64_t
#define SINT int64_t
#define FN(name) PASTE(name, _f64)
#define VEC vec_f64
#define FMA(a, b, c) __builtin_fma(a, b, c)
#define NEXT_AFTER(a, b) nextafter(a, b)
#define LANES 8
#define NATIVE_DTYPE PL_FLOAT64
#define MANTISSA_BITS 52
#define EXP_SCALE 0x1p+512
#define EXP_CENTER 0.0588915
#define SMALL 0x1p-500
#define BOOST 0x1p+400
#define LIFT 0x1p+256
#define EXP_LOWEST (-1063.9) /* 2^-1535 */
#define GRID (0x1.8p+52 * 0x1p-33)
#define FAR 4096
#define ONE_SHIFT (0x1.8p+52 + 1023)
#define ROUND_SHIFT (ONE_SHIFT + 512)
#define SQRT_HALF_BITS 0x3fe6a09e667f3bcdu
#define LOG2_E 0x1.71547652b82fep+0
#define LN2_HI 0x1.62e42ffp-1
#define LN2_LO (-0x1.718432a1b0e26p-35)

/* As above: 0.034 ulp before rounding. */
#define EXP_TERMS 10
static const double exp_coefficients_f64[EXP_TERMS] = {
    0x1.c844a30b39d51p-26, 0x1.2836eb1410fa8p-22, 0x1.71d2725265220p-19, 0x1.a019fbaa5e945p-16, 0x1.a01a058ece44ap-13,
    0x1.6c16c1693b9d7p-10, 0x1.11111110826ebp-7,  0x1.555555555609bp-5,  0x1.5555555555715p-3,  0.5};

static inline double atanh_tail_f64(double w)
{
  double q = 2.0 / 23;
  q = FMA(q, w, 2.0 / 21);
  q = FMA(q, w, 2.0 / 19);
  q = FMA(q, w, 2.0 / 17);
  q = FMA(q, w, 2.0 / 15);
  q = FMA(q, w, 2.0 / 13);
  q = FMA(q, w, 2.0 / 11);
  q = FMA(q, w, 2.0 / 9);
  q = FMA(q, w, 2.0 / 7);
  q = FMA(q, w, 2.0 / 5);
  return w * FMA(q, w, 2.0 / 3);
}

#include "exp.inc.h"
#include "rows.inc.h"
#include "results.inc.h"
#include "loss.inc.h"
#include "tiles.inc.h"
#include "backward.inc.h"
#include "run.inc.h"

const struct pl_kernels PASTE(pl_kernels_, PL_ISA) = {
    .run_f32 = run_rows_f32,
    .run_f64 = run_rows_f64,
    .parts_f32 = &parts_f32,
    .parts_f64 = &parts_f64,
};
