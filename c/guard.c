/* Every operation and dtype, and every number of classes from 1 to 600, with unreadable pages right before and right after the
 * arrays: a stray access ends the program (`make guard`; `make guard-neon` under qemu). `guard [step]` takes every step-th
 * number of classes. */

#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "half.h"

#define ROWS 19 /* a whole tile of floats, and more */
#define CLASSES 600
#define TOP_K 3

enum array {
  LOGITS,
  OTHER,
  GRAD,
  OUT,
  LABELS,
  WHERE,
  WEIGHT,
  SAMPLE_WEIGHT,
  NUMBERS,
  INDICES,
  TOP_NUMBERS,
  TOP_INDICES,
  ARRAYS
};

static char *memory[ARRAYS];
static size_t room; /* of an array, in whole pages */
static bool at_end; /* where arrays lie in their room */

static void reserve(void)
{
  const size_t page = (size_t)sysconf(_SC_PAGESIZE);
  room = ((size_t)ROWS * CLASSES * 8 + page - 1) / page * page;
  for (int a = 0; a < ARRAYS; a++) {
    char *pages = mmap(NULL, room + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED || mprotect(pages + page, room, PROT_READ | PROT_WRITE) != 0) abort();
    memory[a] = pages + page;
  }
}

static void *place(enum array a, int64_t size)
{
  return at_end ? memory[a] + room - size : memory[a];
}

static void *numbers(enum array a, int dtype, int64_t count)
{
  char *p = place(a, count * pl_itemsize(dtype));
  for (int64_t n = 0; n < count; n++) pl_set_float(p + n * pl_itemsize(dtype), dtype, (double)((n * 37 + a) % 1009) / 100);
  return p;
}

/* Rows one after the other, or side by side. */
static struct pl_view view(void *data, int64_t classes, int64_t size, bool turned)
{
  const int64_t inner = turned ? ROWS : 1;
  return (struct pl_view){data, classes * inner * size, inner * size, size};
}

static void run(int operation, int dtype, int64_t classes, bool turned, int options)
{
  const int real = dtype == PL_FLOAT64 ? PL_FLOAT64 : PL_FLOAT32;
  const int64_t size = pl_itemsize(dtype), whole = ROWS * classes * size, real_size = pl_itemsize(real);
  struct pl_task task = {.operation = operation, .dtype = dtype, .out_dtype = dtype, .classes = classes, .temperature = 1};
  task.outer = turned ? 1 : ROWS;
  task.inner = turned ? ROWS : 1;
  task.picks = operation == PL_SCORE && classes >= TOP_K ? TOP_K : 1;
  task.logits = view(numbers(LOGITS, dtype, ROWS * classes), classes, size, turned);
  task.grad = view(numbers(OTHER, dtype, ROWS * classes), classes, size, turned);

  int64_t *labels = place(LABELS, ROWS * 8);
  unsigned char *where = place(WHERE, ROWS * classes);
  for (int64_t r = 0; r < ROWS; r++) labels[r] = r * 7 % classes;
  for (int64_t n = 0; n < ROWS * classes; n++) where[n] = n % 5 != 0;
  if (operation >= PL_SELECTIVE_LOG_SOFTMAX && !pl_is_backward(&task)) task.labels = view(labels, 1, 8, turned);

  task.losses.scale = 1;
  if (options & 1) {
    task.temperature = 2;
    task.where = view(where, classes, 1, turned);
  }
  if (operation == PL_CROSS_ENTROPY) {
    task.losses.grad = view(place(GRAD, whole), classes, size, turned);
    task.losses.label_smoothing = 0.1;
    task.losses.z_loss = 0.1;
    task.losses.softcap = options & 2 ? 30 : 0;
    task.losses.weight = numbers(WEIGHT, real, classes);
    task.losses.sample_weight = numbers(SAMPLE_WEIGHT, real, ROWS);
    if (options & 4) {
      task.labels.data = NULL;
      task.losses.probabilities = task.grad;
    }
  }
  if (operation == PL_SCORE) {
    task.prediction = place(INDICES, ROWS * 8);
    task.top_k_indices = place(TOP_INDICES, ROWS * task.picks * 8);
    task.top_k_probabilities = place(TOP_NUMBERS, ROWS * task.picks * real_size);
    task.confidence = task.entropy = task.logsumexp = task.loss = task.brier = place(NUMBERS, ROWS * real_size);
    task.correct = place(OUT, ROWS);
  } else {
    const bool is_whole = pl_whole(&task) && operation != PL_CROSS_ENTROPY;
    task.out = view(place(OUT, is_whole ? whole : ROWS * size), is_whole ? classes : 1, size, turned);
  }
  if (pl_run(&task, 1) != -1) abort();
}

int main(int argc, char **argv)
{
  const int64_t step = argc > 1 ? atoi(argv[1]) : 1;
  int64_t calls = 0;
  reserve();
  for (int isa = 0; isa < pl_isa_count(); isa++) {
    pl_use_isa(pl_isa_name(isa));
    for (int64_t classes = 1; classes <= CLASSES; classes += step)
      for (int place_of = 0; place_of < 2; place_of++) {
        at_end = place_of;
        for (int dtype = PL_FLOAT16; dtype <= PL_FLOAT64; dtype++)
          for (int operation = PL_SOFTMAX; operation <= PL_SCORE; operation++) {
            const bool masks = operation <= PL_LOGSUMEXP || operation == PL_CROSS_ENTROPY;
            for (int options = 0; options < (operation == PL_CROSS_ENTROPY ? 8 : masks ? 2 : 1); options++)
              for (int turned = 0; turned < 2; turned++, calls++) run(operation, dtype, classes, turned, options);
          }
      }
    printf("%s: %" PRId64 " calls, no access beside an array\n", pl_isa(), calls);
    calls = 0;
  }
  return 0;
}
