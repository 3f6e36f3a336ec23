/* Calls that programs make: of any operation, dtype and shape, on the same values. */

#include <stdint.h>

#include "half.h"

#define TOP_K 3
#define MOST 32768 /* elements of a job's largest array */

struct job {
  int operation, dtype;
  int64_t outer, classes, inner;
};

/* What all threads read: two arrays of each dtype, and labels. */
static double values[2][PL_FLOAT64 + 1][MOST];
static int64_t labels[MOST];

/* Everything that a job writes, apart from the others': its results are compared as a whole. */
struct results {
  double whole[MOST], of_rows[4][MOST / 8];
  int64_t indices[2][MOST / 8];
  unsigned char flags[MOST / 8];
};

static void fill(void)
{
  for (int n = 0; n < 2; n++) {
    for (int i = 0; i < MOST; i++) {
      const float value = (float)((i * 37 + n) % 1009) / 100;
      ((uint16_t *)values[n][PL_FLOAT16])[i] = pl_to_float16(value);
      ((uint16_t *)values[n][PL_BFLOAT16])[i] = pl_to_bfloat16(value);
      ((float *)values[n][PL_FLOAT32])[i] = value;
      values[n][PL_FLOAT64][i] = value;
    }
  }
  for (int i = 0; i < MOST; i++) labels[i] = i % 10;
}

static struct pl_view view_of(const struct job *job, void *data, int64_t classes, int64_t size)
{
  return (struct pl_view){data, classes * job->inner * size, job->inner * size, size};
}

/* Returns pl_run's status. */
static int64_t run_job(const struct job *job, int threads, struct results *results)
{
  const int64_t size = pl_itemsize(job->dtype);
  const struct pl_view whole = view_of(job, results->whole, job->classes, size);
  struct pl_task task = {.operation = job->operation, .dtype = job->dtype, .out_dtype = job->dtype, .outer = job->outer};
  task.classes = job->classes;
  task.inner = job->inner;
  task.picks = 1;
  task.temperature = 1;
  task.logits = view_of(job, values[0][job->dtype], job->classes, size);
  task.grad = view_of(job, values[1][job->dtype], job->classes, size);
  task.out = pl_whole(&task) ? whole : view_of(job, results->of_rows[0], 1, size);
  switch (job->operation) {
    case PL_SCORE:
      task.picks = TOP_K;
      task.prediction = results->indices[0];
      task.top_k_indices = results->indices[1];
      task.confidence = results->of_rows[0];
      task.entropy = results->of_rows[1];
      task.logsumexp = results->of_rows[2];
      task.top_k_probabilities = results->whole;
      task.loss = results->of_rows[3];
      task.correct = results->flags;
      break;
    case PL_CROSS_ENTROPY:
      task.losses.scale = 1;
      task.losses.label_smoothing = 0.125;
      task.losses.softcap = 30;
      task.losses.has_ignore_index = 1;
      task.losses.ignore_index = 3;
      task.losses.grad = whole;
      break;
    default:
      break;
  }
  if (job->operation >= PL_SELECTIVE_LOG_SOFTMAX && !pl_is_backward(&task)) task.labels = view_of(job, labels, 1, 8);
  return pl_run(&task, threads);
}
