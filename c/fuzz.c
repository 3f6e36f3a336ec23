/* What libFuzzer runs (`make fuzz-c`): a task decoded from the fuzzer's bytes, on every instruction set at hand and as for one
 * and for two threads.
 *
 * Arrays are exactly as large as their elements need, so that AddressSanitizer sees what lies outside. What lies between the
 * elements, and all that is only read, must stay as it was; and all runs must give the same bits, but for those of a NaN.
 *
 * It is built without OpenMP, which Clang need not have: one thread then computes the pieces of a team one after the other. */

#include <inttypes.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

#include "half.h"

#define ARRAY_BYTES 65536 /* of elements at most: four blocks of floats or doubles */
#define ROWS 40           /* along an axis at most: more than two tiles */
#define TOP_K 20

/* ---- the fuzzer's bytes ---- */

struct input {
  const uint8_t *bytes;
  size_t left;
};

/* A number in [0, count); 0 when the bytes have run out. */
static int64_t take(struct input *in, int64_t count)
{
  int64_t value = 0;
  for (int64_t covered = 1; covered < count && in->left; covered *= 256, in->left--) value = value * 256 + *in->bytes++;
  return value % count;
}

#define TAKE_OF(in, table) (table)[take(in, (int64_t)(sizeof(table) / sizeof *(table)))]

static uint64_t state; /* of the pseudo-random numbers that fill the arrays */

static uint64_t draw(uint64_t count)
{
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (state >> 33) % count;
}

/* ---- arrays ---- */

enum { INT64 = PL_FLOAT64 + 1, BYTE }; /* kinds of elements beside those of enum pl_dtype */

struct array {
  int kind;
  bool written;                       /* an output, or an input that is overwritten */
  int64_t shape[3], stride[3], first; /* in bytes; `first` is where element [0, 0, 0] lies */
  size_t size;
  char *memory, *given, *result; /* given: before a run; result: after the first run */
};

static struct array arrays[16];
static int array_count;

static int64_t item_size(int kind)
{
  return kind == INT64 ? 8 : kind == BYTE ? 1 : pl_itemsize(kind);
}

static char *at(const struct array *a, int64_t i, int64_t c, int64_t j)
{
  return a->memory + a->first + i * a->stride[0] + c * a->stride[1] + j * a->stride[2];
}

#define EACH(a, i, c, j)                                                                                                       \
  for (int64_t i = 0; i < (a)->shape[0]; i++)                                                                                  \
    for (int64_t c = 0; c < (a)->shape[1]; c++)                                                                                \
      for (int64_t j = 0; j < (a)->shape[2]; j++)

static struct array *allocate(struct array a)
{
  a.memory = malloc(a.size);
  a.given = malloc(a.size);
  a.result = malloc(a.size);
  if (!a.memory || !a.given || !a.result) abort();
  memset(a.memory, 0xa5, a.size);
  arrays[array_count] = a;
  return &arrays[array_count++];
}

static struct array *contiguous(int kind, int64_t outer, int64_t classes, int64_t inner, bool written)
{
  const int64_t size = item_size(kind);
  return allocate((struct array){.kind = kind,
                                 .written = written,
                                 .shape = {outer, classes, inner},
                                 .stride = {classes * inner * size, inner * size, size},
                                 .size = (size_t)(outer * classes * inner * size)});
}

/* Axes in any order, with gaps, backwards and, where it is only read, repeated. Floats lie at multiples of their size, as the
 * library asks for; labels anywhere. */
static struct array *strided(struct input *in, int kind, int64_t outer, int64_t classes, int64_t inner, bool written)
{
  static const int orders[][3] = {{2, 1, 0}, {1, 2, 0}, {0, 1, 2}, {1, 0, 2}, {0, 2, 1}, {2, 0, 1}};
  struct array a = {.kind = kind, .written = written, .shape = {outer, classes, inner}};
  const int *order = TAKE_OF(in, orders);
  const int64_t backwards = take(in, 8), repeated = written ? 0 : take(in, 8);
  const int64_t size = item_size(kind), unit = kind == INT64 ? 1 : size;
  int64_t last = 0, step = size + take(in, 3) * unit;
  for (int k = 0; k < 3; k++) {
    const int axis = order[k];
    if (repeated >> axis & 1) continue;
    const int64_t span = (a.shape[axis] - 1) * step;
    const bool back = backwards >> axis & 1;
    a.stride[axis] = back ? -step : step;
    if (back) a.first += span;
    last += span;
    step = step * a.shape[axis] + take(in, 3) * unit;
  }
  const bool empty = outer == 0 || classes == 0;
  a.size = empty ? 0 : (size_t)(last + size);
  return allocate(a);
}

static struct pl_view view_of(const struct array *a)
{
  return (struct pl_view){a->memory + a->first, a->stride[0], a->stride[1], a->stride[2]};
}

/* ---- their contents ---- */

static double get_float(const char *p, int kind)
{
  double value;
  float narrow;
  uint16_t half;
  if (kind == PL_FLOAT64) {
    memcpy(&value, p, sizeof value);
    return value;
  }
  if (kind == PL_FLOAT32) {
    memcpy(&narrow, p, sizeof narrow);
    return narrow;
  }
  memcpy(&half, p, sizeof half);
  return kind == PL_FLOAT16 ? pl_from_float16(half) : pl_from_bfloat16(half);
}

static double moderate(void)
{
  return (double)draw(1 << 16) * 0x1p-11 - 16;
}

/* Numbers of a normal size, with equals and special values among them, far from 0, or any bits. */
static void fill(struct input *in, struct array *a, bool finite)
{
  static const double special[] = {0, -0.0, 1, INFINITY, -INFINITY, NAN, 88, -104, 3e38, -3e38, 1e-40};
  static const double offsets[] = {300, -5000, 1e6, 1e30};
  const int64_t way = take(in, finite ? 1 : 4);
  const double offset = TAKE_OF(in, offsets);
  EACH(a, i, c, j)
  {
    char *p = at(a, i, c, j);
    if (way == 0) {
      pl_set_float(p, a->kind, moderate());
    } else if (way == 1) {
      pl_set_float(p, a->kind, draw(8) ? floor(moderate()) : special[draw(sizeof special / sizeof *special)]);
    } else if (way == 2) {
      pl_set_float(p, a->kind, offset + moderate());
    } else {
      for (int64_t b = 0; b < item_size(a->kind); b++) p[b] = (char)draw(256);
    }
  }
}

static struct array *floats(struct input *in, int kind, const struct pl_task *task, bool written)
{
  struct array *a = strided(in, kind, task->outer, task->classes, task->inner, written);
  fill(in, a, false);
  return a;
}

static struct array *filled(struct input *in, const struct pl_task *task)
{
  struct array *a = contiguous(task->dtype, task->outer, task->classes, 1, false);
  fill(in, a, false);
  return a;
}

/* One number a row or a class, where the fuzzer wants it. */
static const void *factors(struct input *in, int dtype, int64_t count, bool finite)
{
  if (!take(in, 2)) return NULL;
  struct array *a = contiguous(dtype == PL_FLOAT64 ? PL_FLOAT64 : PL_FLOAT32, 1, 1, count, false);
  fill(in, a, finite);
  return a->memory;
}

/* Labels in [0, classes), with ignored ones and bad ones among them where the fuzzer wants it. */
static struct array *fill_labels(struct input *in, struct pl_task *task, struct array *a)
{
  const int64_t odd[] = {-100, -1, task->classes, INT64_MIN, INT64_MAX};
  const int64_t rare = take(in, 3); /* 0: none; 1: those that are ignored; 2: any */
  if (task->operation == PL_CROSS_ENTROPY && take(in, 2)) {
    task->losses.has_ignore_index = 1;
    task->losses.ignore_index = take(in, 2) ? TAKE_OF(in, odd) : 0;
  }
  EACH(a, i, k, j)
  {
    int64_t label = (int64_t)draw((uint64_t)task->classes);
    if (draw(8) == 0) {
      if (rare == 1 && task->losses.has_ignore_index) label = task->losses.ignore_index;
      if (rare == 2) label = odd[draw(sizeof odd / sizeof *odd)];
    }
    memcpy(at(a, i, k, j), &label, sizeof label);
  }
  task->labels = view_of(a);
  return a;
}

static struct array *labels_of(struct input *in, struct pl_task *task, int64_t picks)
{
  return fill_labels(in, task, strided(in, INT64, task->outer, picks, task->inner, false));
}

static int64_t first_bad_label(const struct pl_task *task, const struct array *labels)
{
  int64_t place = 0;
  EACH(labels, i, k, j)
  {
    int64_t label;
    memcpy(&label, at(labels, i, k, j), sizeof label);
    const bool ignored = task->losses.has_ignore_index && label == task->losses.ignore_index;
    if (!ignored && (label < 0 || label >= task->classes)) return place;
    place++;
  }
  return -1;
}

/* ---- a task ---- */

/* What is decoded beside the task. */
struct plan {
  struct pl_task task;
  bool contiguous; /* by pl_run_contiguous */
  const struct array *logits, *labels, *grad;
  int64_t part; /* blocks at a time, of pl_reduce_part and pl_write_part; 0 for pl_run alone */
};

static void *scores(int kind, const struct pl_task *task, int64_t picks)
{
  return contiguous(kind, task->outer, task->inner, picks, true)->memory;
}

static void decode_losses(struct input *in, struct plan *plan, bool grad, bool over_probabilities)
{
  static const double softcaps[] = {0, 30, 1e-3, 3e38, 0x1p-126}, smoothings[] = {0, 0.125, 1};
  static const double z_losses[] = {0, 0.25, -3, 1e30};
  static const double scales[][2] = {{1, 0}, {0x1.99999ap-4, -0x1.99999ap-30}, {3e38, 0}};
  struct pl_task *task = &plan->task;
  struct pl_loss *losses = &task->losses;
  const double *scale = TAKE_OF(in, scales);
  losses->softcap = TAKE_OF(in, softcaps);
  losses->label_smoothing = TAKE_OF(in, smoothings);
  losses->z_loss = TAKE_OF(in, z_losses);
  losses->scale = scale[0];
  losses->scale_lo = scale[1];
  losses->weight = factors(in, task->dtype, task->classes, true);
  losses->sample_weight = factors(in, task->dtype, task->outer * task->inner, true);
  losses->loss_grad = factors(in, task->dtype, task->outer * task->inner, false);
  if (over_probabilities || take(in, 2)) {
    losses->probabilities = view_of(floats(in, task->dtype, task, over_probabilities));
  } else {
    plan->labels = labels_of(in, task, 1);
    plan->part = take(in, 4);
  }
  if (!grad) return;
  if (over_probabilities) {
    losses->grad = losses->probabilities;
  } else if (plan->logits->written) {
    losses->grad = task->logits;
    plan->grad = plan->logits;
  } else {
    plan->grad = strided(in, task->dtype, task->outer, task->classes, task->inner, true);
    losses->grad = view_of(plan->grad);
  }
}

static void decode_scores(struct input *in, struct plan *plan)
{
  struct pl_task *task = &plan->task;
  const int real = task->dtype == PL_FLOAT64 ? PL_FLOAT64 : PL_FLOAT32;
  task->picks = 1 + take(in, task->classes < TOP_K ? task->classes : TOP_K);
  task->prediction = scores(INT64, task, 1);
  task->confidence = scores(real, task, 1);
  task->entropy = scores(real, task, 1);
  task->logsumexp = scores(real, task, 1);
  task->top_k_indices = scores(INT64, task, task->picks);
  task->top_k_probabilities = scores(real, task, task->picks);
  if (!take(in, 2)) return;
  plan->labels = labels_of(in, task, 1);
  task->loss = scores(real, task, 1);
  task->correct = scores(BYTE, task, 1);
  if (take(in, 2)) task->brier = scores(real, task, 1);
}

/* Where an output that is as large as the logits is wanted: which input it takes the place of. */
enum place { APART, OVER_LOGITS, OVER_OTHER };

static struct plan decode(struct input *in)
{
  static const double temperatures[] = {1, 0.75, 3, 1e-3, 1e30, 0x1p-126, 0x1p-149};
  static const int64_t lengths[] = {16, 200, 2200, ARRAY_BYTES}, sizes[] = {1024, 4096, 4096, ARRAY_BYTES};
  struct plan plan = {.part = 0};
  struct pl_task *task = &plan.task;
  state = (uint64_t)take(in, 1 << 16);
  task->operation = (int)take(in, PL_SCORE + 1);
  task->dtype = (int)take(in, PL_FLOAT64 + 1);
  task->out_dtype = (int)take(in, PL_FLOAT64 + 1);

  const int operation = task->operation;
  const bool sparse = operation == PL_SPARSE_SOFTMAX_CROSS_ENTROPY, loss = operation == PL_CROSS_ENTROPY;
  const bool plain = operation <= PL_LOGSUMEXP, backward = pl_is_backward(task);
  plan.contiguous = operation != PL_SCORE && !take(in, 4);

  const int64_t most = TAKE_OF(in, sizes) / pl_itemsize(task->dtype), length = TAKE_OF(in, lengths);
  task->classes = 1 + take(in, length < most ? length : most);
  task->inner = plan.contiguous ? 1 : 1 + take(in, most / task->classes < ROWS ? most / task->classes : ROWS);
  const int64_t left = most / (task->classes * task->inner);
  task->outer = take(in, (left < ROWS ? left : ROWS) + 1);
  task->picks = operation == PL_SELECTIVE_LOG_SOFTMAX && !plan.contiguous ? take(in, 4) : 1;
  task->temperature = backward || sparse ? 1 : TAKE_OF(in, temperatures);

  const bool grad = loss && take(in, 2);
  if (plan.contiguous) {
    task->logits = view_of(filled(in, task));
    if (backward) task->grad = view_of(filled(in, task));
    if (grad) task->losses.grad = view_of(contiguous(task->dtype, task->outer, task->classes, 1, true));
    task->losses.scale = 1;
    if (loss && take(in, 2)) {
      task->losses.probabilities = view_of(filled(in, task));
    } else if (!plain && !backward) {
      plan.labels = fill_labels(in, task, contiguous(INT64, task->outer, 1, 1, false));
      task->losses.has_ignore_index = 0;
    }
    const bool whole = pl_whole(task) == &task->out, wide = pl_itemsize(task->dtype) > 2;
    task->out_dtype = whole || wide || operation == PL_SELECTIVE_LOG_SOFTMAX ? task->dtype : PL_FLOAT32;
    task->out = view_of(contiguous(task->out_dtype, task->outer, whole ? task->classes : 1, 1, true));
    return plan;
  }

  enum place place = pl_whole(task) || grad ? (enum place)take(in, backward || grad ? 3 : 2) : APART;
  if (place != APART && !loss) task->out_dtype = task->dtype;
  plan.logits = floats(in, task->dtype, task, place == OVER_LOGITS);
  task->logits = view_of(plan.logits);
  if ((plain || loss) && take(in, 2)) {
    struct array *where = strided(in, BYTE, task->outer, task->classes, task->inner, false);
    const uint64_t kept = draw(5);
    EACH(where, i, c, j) at(where, i, c, j)[0] = draw(4) < kept;
    task->where = view_of(where);
  }
  if (loss) {
    decode_losses(in, &plan, grad, place == OVER_OTHER);
  } else if (operation == PL_SCORE) {
    decode_scores(in, &plan);
    return plan;
  } else if (backward) {
    task->grad = view_of(floats(in, task->dtype, task, place == OVER_OTHER));
  } else if (!plain) {
    plan.labels = labels_of(in, task, task->picks);
  }
  if (place == APART || loss) {
    const int64_t results = pl_whole(task) && !loss ? task->classes : task->picks;
    task->out = view_of(strided(in, task->out_dtype, task->outer, results, task->inner, true));
  } else {
    task->out = place == OVER_LOGITS ? task->logits : task->grad;
  }
  return plan;
}

/* ---- runs ---- */

static void fail(const struct plan *plan, int threads, const char *what)
{
  const struct pl_task *t = &plan->task;
  fprintf(stderr, "%s, %d threads, operation %d, dtypes %d %d, %" PRId64 " x %" PRId64 " x %" PRId64 ": %s\n", pl_isa(),
          threads, t->operation, t->dtype, t->out_dtype, t->outer, t->classes, t->inner, what);
  abort();
}

static void restore_arrays(void)
{
  for (int n = 0; n < array_count; n++) memcpy(arrays[n].memory, arrays[n].given, arrays[n].size);
}

/* Gives every NaN of an output the same bits, and the places between its elements those that they should have. */
static bool tidy(struct array *a)
{
  char *elements = malloc(a->size);
  bool clean = true;
  if (!elements) abort();
  memcpy(elements, a->given, a->size);
  EACH(a, i, c, j)
  {
    char *p = at(a, i, c, j);
    if (a->kind <= PL_FLOAT64 && isnan(get_float(p, a->kind))) pl_set_float(p, a->kind, NAN);
    memcpy(elements + (p - a->memory), p, (size_t)item_size(a->kind));
  }
  clean = memcmp(elements, a->memory, a->size) == 0;
  free(elements);
  return clean;
}

static void check_arrays(const struct plan *plan, int threads, bool first)
{
  for (int n = 0; n < array_count; n++) {
    struct array *a = &arrays[n];
    if (!a->written) {
      if (memcmp(a->memory, a->given, a->size) != 0) fail(plan, threads, "an input was written to");
      continue;
    }
    if (!tidy(a)) fail(plan, threads, "something between the elements was written to");
    if (first) memcpy(a->result, a->memory, a->size);
    if (memcmp(a->memory, a->result, a->size) != 0) fail(plan, threads, "the bits are not those of the first run");
  }
}

static int64_t run(const struct plan *plan, int threads)
{
  const struct pl_task *task = &plan->task;
  if (!plan->contiguous) return pl_run(task, threads);
  void *grad = pl_is_backward(task) ? task->grad.data : task->losses.grad.data;
  return pl_run_contiguous(task->operation, task->dtype, task->logits.data, task->labels.data, task->losses.probabilities.data,
                           grad, task->out.data, task->outer * task->classes, task->classes, task->temperature,
                           task->losses.scale, task->losses.scale_lo, threads);
}

/* A copy of classes [first, first + n) of the logits, as `linear_cross_entropy` has them: without the others. The view is that
 * of the whole rows. */
static char *copy_tile(const struct plan *plan, int64_t first, int64_t n, struct pl_view *view)
{
  const struct pl_task *task = &plan->task;
  const int64_t size = pl_itemsize(task->dtype);
  char *tile = malloc((size_t)(task->outer * task->inner * n * size)), *to = tile;
  if (!tile) abort();
  for (int64_t i = 0; i < task->outer; i++)
    for (int64_t j = 0; j < task->inner; j++)
      for (int64_t c = first; c < first + n; c++, to += size) memcpy(to, at(plan->logits, i, c, j), (size_t)size);
  *view = (struct pl_view){tile - first * size, task->inner * n * size, size, n * size};
  return tile;
}

/* The same by pl_reduce_part and pl_write_part, the gradient in place of each tile and then where pl_run leaves it. They check
 * no labels before: a bad one may go unseen, in a row that is masked out. */
static void run_parts(const struct plan *plan, int threads, int64_t bad)
{
  struct pl_task task = plan->task;
  const int64_t block = pl_block(task.dtype), blocks = (task.classes + block - 1) / block, size = pl_itemsize(task.dtype);
  void *numbers = malloc((size_t)pl_numbers_size(&task));
  if (!numbers) abort();
  for (int write = 0; write < 2; write++) {
    if (write) pl_join_parts(&task, numbers);
    for (int64_t b = 0; b < blocks; b += plan->part) {
      const int64_t last = b + plan->part < blocks ? b + plan->part : blocks, first = b * block;
      const int64_t n = (last * block < task.classes ? last * block : task.classes) - first;
      char *tile = copy_tile(plan, first, n, &task.logits), *from = tile;
      if (!write) {
        pl_reduce_part(&task, b, last, numbers, threads);
      } else {
        if (plan->grad) task.losses.grad = task.logits;
        const int64_t status = pl_write_part(&task, b, last, numbers, threads);
        if (bad == -1 && status != -1) fail(plan, threads, "a part's status is wrong");
        for (int64_t i = 0; plan->grad && i < task.outer; i++)
          for (int64_t j = 0; j < task.inner; j++)
            for (int64_t c = first; c < first + n; c++, from += size) memcpy(at(plan->grad, i, c, j), from, (size_t)size);
      }
      free(tile);
    }
  }
  free(numbers);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
  struct input in = {bytes, size};
  array_count = 0;
  const struct plan plan = decode(&in);
  const struct pl_task *task = &plan.task;
  const int64_t bad = plan.labels ? first_bad_label(task, plan.labels) : -1;
  for (int n = 0; n < array_count; n++) memcpy(arrays[n].given, arrays[n].memory, arrays[n].size);
  bool first = true;
  for (int index = 0; index < pl_isa_count(); index++) {
    pl_use_isa(pl_isa_name(index));
    for (int threads = 1; threads <= 2; threads++) {
      restore_arrays();
      if (run(&plan, threads) != bad) fail(&plan, threads, "the status is wrong");
      if (bad != -1) {
        for (int n = 0; n < array_count; n++)
          if (memcmp(arrays[n].memory, arrays[n].given, arrays[n].size) != 0) fail(&plan, threads, "bad labels, and results");
      } else {
        check_arrays(&plan, threads, first);
      }
      first = false;
      if (!plan.part || task->outer == 0 || task->classes <= pl_block(task->dtype)) continue;
      restore_arrays();
      run_parts(&plan, threads, bad);
      if (bad == -1) check_arrays(&plan, threads, false);
    }
  }
  for (int n = 0; n < array_count; n++) {
    free(arrays[n].memory);
    free(arrays[n].given);
    free(arrays[n].result);
  }
  return 0;
}
