/* Stores that bypass the caches, for outputs that are too large to be read from them soon. An ordinary store first reads the
 * line that it overwrites: half as much traffic again. */

#ifndef PL_STREAM_H
#define PL_STREAM_H

#include <stdint.h>
#include <string.h>

#ifdef __SSE2__
#include <immintrin.h>

#if defined(__AVX512F__)
#define PL_STREAM_WIDTH 64
#define PL_STREAM_STORE(to, from) _mm512_stream_si512((void *)(to), _mm512_loadu_si512((const void *)(from)))
#elif defined(__AVX2__)
#define PL_STREAM_WIDTH 32
#define PL_STREAM_STORE(to, from) _mm256_stream_si256((void *)(to), _mm256_loadu_si256((const void *)(from)))
#else
#define PL_STREAM_WIDTH 16
#define PL_STREAM_STORE(to, from) _mm_stream_si128((void *)(to), _mm_loadu_si128((const void *)(from)))
#endif

static inline void pl_stream(char *to, const char *from, size_t bytes)
{
  const size_t misaligned = -(uintptr_t)to & (PL_STREAM_WIDTH - 1);
  size_t done = misaligned < bytes ? misaligned : bytes;
  memcpy(to, from, done);
  for (; done + PL_STREAM_WIDTH <= bytes; done += PL_STREAM_WIDTH) PL_STREAM_STORE(to + done, from + done);
  memcpy(to + done, from + done, bytes - done);
}

/* Streamed lines become visible to other threads in order only after this. */
static inline void pl_stream_end(void)
{
  _mm_sfence();
}

#else

static inline void pl_stream(char *to, const char *from, size_t bytes)
{
  memcpy(to, from, bytes);
}

static inline void pl_stream_end(void)
{
}

#endif

#endif
