/* Calls from many threads at once, for checkers (`make sanitize`, `make tsan`, `make valgrind`): every call must give the bits
 * that it gives alone. `stress [rounds [instruction set]]`; without an instruction set it is changed all the time, which is
 * safe, as all give the same bits. */

#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "jobs.h"

#define CALLERS 8

static const struct job jobs[] = {
    {PL_SOFTMAX, PL_FLOAT32, 40, 10, 1},
    {PL_SOFTMAX, PL_FLOAT16, 3, 9001, 1},
    {PL_LOG_SOFTMAX, PL_FLOAT64, 2, 100, 33},
    {PL_LOGSUMEXP, PL_BFLOAT16, 5, 1000, 1},
    {PL_LOGSUMEXP, PL_FLOAT32, 1, 2500, 10},
    {PL_SELECTIVE_LOG_SOFTMAX, PL_FLOAT32, 7, 300, 1},
    {PL_SPARSE_SOFTMAX_CROSS_ENTROPY, PL_FLOAT32, 1, 20001, 1},
    {PL_SPARSE_SOFTMAX_CROSS_ENTROPY, PL_FLOAT64, 100, 17, 1},
    {PL_CROSS_ENTROPY, PL_FLOAT32, 50, 31, 1},
    {PL_CROSS_ENTROPY, PL_FLOAT64, 2, 5001, 1},
    {PL_SOFTMAX_BACKWARD, PL_FLOAT32, 1, 50, 19},
    {PL_LOG_SOFTMAX_BACKWARD, PL_FLOAT64, 4, 2500, 1},
    {PL_SCORE, PL_FLOAT32, 5, 4097, 1},
};
#define JOBS ((int)(sizeof jobs / sizeof *jobs))

static struct results expected[JOBS];
static int rounds = 20;
static atomic_int running;

static void check(int good, const char *what, int job)
{
  if (good) return;
  fprintf(stderr, "%s, job %d: %s\n", pl_isa(), job, what);
  abort();
}

static void run(int number, int threads, struct results *results)
{
  check(run_job(&jobs[number], threads, results) == -1, "the status is wrong", number);
}

/* Rows that are made a block at a time, as `linear_cross_entropy` does. */
static void run_parts(int threads, double *losses)
{
  const int64_t classes = 5001, rows = 3, block = pl_block(PL_FLOAT64);
  struct pl_task task = {.operation = PL_CROSS_ENTROPY, .dtype = PL_FLOAT64, .out_dtype = PL_FLOAT64, .outer = rows};
  task.classes = classes;
  task.inner = task.picks = 1;
  task.temperature = 1;
  task.logits = (struct pl_view){values[0][PL_FLOAT64], classes * 8, 8, 8};
  task.labels = (struct pl_view){labels, 8, 8, 8};
  task.out = (struct pl_view){losses, 8, 8, 8};
  task.losses.scale = 1;
  void *numbers = malloc((size_t)pl_numbers_size(&task));
  if (!numbers) abort();
  pl_reduce_part(&task, 1, classes / block + 1, numbers, threads);
  pl_reduce_part(&task, 0, 1, numbers, threads);
  pl_join_parts(&task, numbers);
  check(pl_write_part(&task, 0, 1, numbers, threads) == -1, "a part's status is wrong", JOBS);
  free(numbers);
}

static double expected_of_parts[3];

static void *call(void *argument)
{
  const int first = *(const int *)argument;
  struct results *results = malloc(sizeof *results);
  double losses[3];
  if (!results) abort();
  for (int n = 0; n < rounds * JOBS; n++) {
    const int job = (first * 5 + n) % JOBS;
    memset(results, 0, sizeof *results);
    run(job, 1 + (first + n) % 3, results);
    check(memcmp(results, &expected[job], sizeof *results) == 0, "other bits than alone", job);
    run_parts(1 + n % 3, losses);
    check(memcmp(losses, expected_of_parts, sizeof losses) == 0, "other bits than alone", JOBS);
  }
  free(results);
  atomic_fetch_sub(&running, 1);
  return NULL;
}

/* Results that are so large that they bypass the caches, at an odd place: every row has the same inputs. */
static void run_large(void)
{
  const int64_t rows = 2100, classes = 4096, size = 4; /* more than 32 MiB */
  char *out = malloc((size_t)((rows * classes + 1) * size)), *row = malloc((size_t)(classes * size));
  struct pl_task task = {.operation = PL_SOFTMAX_BACKWARD, .dtype = PL_FLOAT32, .out_dtype = PL_FLOAT32, .outer = rows};
  if (!out || !row) abort();
  task.classes = classes;
  task.inner = task.picks = 1;
  task.logits = (struct pl_view){values[0][PL_FLOAT32], 0, size, size};
  task.grad = (struct pl_view){values[1][PL_FLOAT32], 0, size, size};
  task.out = (struct pl_view){out + size, classes * size, size, size};
  check(pl_run(&task, 2) == -1, "the status is wrong", JOBS + 1);
  task.outer = 1;
  task.out.data = row;
  check(pl_run(&task, 1) == -1, "the status is wrong", JOBS + 1);
  for (int64_t r = 0; r < rows; r++)
    check(memcmp(out + size + r * classes * size, row, (size_t)(classes * size)) == 0, "rows differ", JOBS + 1);
  free(out);
  free(row);
}

int main(int count, char **arguments)
{
  pthread_t threads[CALLERS];
  int numbers[CALLERS];
  if (count > 1) rounds = atoi(arguments[1]);
  if (count > 2 && pl_use_isa(arguments[2]) != 0) {
    fprintf(stderr, "this machine has no %s\n", arguments[2]);
    return 1;
  }
  fill();
  for (int job = 0; job < JOBS; job++) run(job, 1, &expected[job]);
  run_parts(1, expected_of_parts);
  run_large();
  atomic_store(&running, CALLERS);
  for (int n = 0; n < CALLERS; n++) {
    numbers[n] = n;
    if (pthread_create(&threads[n], NULL, call, &numbers[n]) != 0) abort();
  }
  for (int n = 0; count < 3 && atomic_load(&running); n++) pl_use_isa(pl_isa_name(n % pl_isa_count()));
  for (int n = 0; n < CALLERS; n++) pthread_join(threads[n], NULL);
  printf("%d threads, %d calls each: the same bits\n", CALLERS, rounds * JOBS);
  return 0;
}
