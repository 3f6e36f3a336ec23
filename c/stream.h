/* Stores that bypass the caches, for outputs that are too large to be read from them soon. An ordinary store first reads the
 * line that it overwrites: half as much traffic again. */

#ifndef PL_STREAM_H
#define PL_STREAM_H

#include <stdint.h>
#include <string.h>

#ifdef __SSE2__
#include <emmintrin.h>

static inline void pl_stream(char *to, const char *from, size_t bytes)
{
  const size_t head = -(uintptr_t)to & 15 & (bytes > 16 ? 15 : 0);
  memcpy(to, from, head);
  size_t done = head;
  for (; done + 16 <= bytes; done += 16)
    _mm_stream_si128((__m128i *)(to + done), _mm_loadu_si128((const __m128i *)(from + done)));
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
