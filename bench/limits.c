/* What memory allows: the least that an operation must do with its arrays. */

#include <stddef.h>
#include <stdint.h>

#include "stream.h"

/* Each thread has one part, in whole cache lines. */
static size_t part_start(size_t bytes, int part, int parts)
{
  return part == parts ? bytes : bytes / (size_t)parts * (size_t)part & ~(size_t)63;
}

/* Read all of it. The result depends on every word, so that no load is left out. */
uint64_t read_all(const char *data, size_t bytes, int threads)
{
  uint64_t all = 0;
#pragma omp parallel for num_threads(threads) reduction(^ : all)
  for (int part = 0; part < threads; part++) {
    const uint64_t *words = (const uint64_t *)(const void *)(data + part_start(bytes, part, threads));
    const size_t count = (part_start(bytes, part + 1, threads) - part_start(bytes, part, threads)) / sizeof *words;
    uint64_t some = 0;
#pragma omp simd reduction(^ : some)
    for (size_t i = 0; i < count; i++) some ^= words[i];
    all ^= some;
  }
  return all;
}

/* Copy it with stores that bypass the caches. */
void copy_all(char *to, const char *from, size_t bytes, int threads)
{
#pragma omp parallel for num_threads(threads)
  for (int part = 0; part < threads; part++) {
    const size_t start = part_start(bytes, part, threads);
    pl_stream(to + start, from + start, part_start(bytes, part + 1, threads) - start);
    pl_stream_end();
  }
}
