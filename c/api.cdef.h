/* The C backend's interface: parsed by cffi, included by C. Plain declarations only. */

enum pl_operation {
  PL_SOFTMAX,
  PL_LOG_SOFTMAX,
  PL_LOGSUMEXP,
  PL_SELECTIVE_LOG_SOFTMAX,
  PL_SPARSE_SOFTMAX_CROSS_ENTROPY,
  PL_CROSS_ENTROPY,
  PL_SOFTMAX_BACKWARD,
  PL_LOG_SOFTMAX_BACKWARD,
  PL_SCORE
};

enum pl_dtype { PL_FLOAT16, PL_BFLOAT16, PL_FLOAT32, PL_FLOAT64 };

/* An array of shape (outer, classes, inner) by its strides in bytes; data is NULL where an option is not used. */
struct pl_view {
  void *data;
  int64_t outer, classes, inner;
};

/* PL_CROSS_ENTROPY's own: zeros are the defaults of all but `scale`, which is what gradients are multiplied with (a pair). */
struct pl_loss {
  double softcap, label_smoothing, z_loss, scale, scale_lo;
  int64_t ignore_index;
  int has_ignore_index;
  /* Contiguous, in the type that is computed in: of each class; and of each row, over (outer, inner). NULL for ones. */
  const void *weight, *sample_weight, *loss_grad;
  struct pl_view probabilities, grad; /* the targets, where there are no labels; and the gradient, where it is wanted */
};

/* One call: the same operation on every row (i, j), 0 <= i < outer, 0 <= j < inner. Checked by the caller, but for labels. */
struct pl_task {
  int operation, dtype, out_dtype; /* labels are int64_t; probabilities and gradients have the dtype of logits */
  int64_t outer, classes, inner;
  int64_t picks; /* labels or indices per row; for PL_SCORE the k of top-k */
  double temperature;
  struct pl_view logits, where, labels, out; /* of the backward forms, logits are what softmax or log_softmax gave */
  struct pl_view grad;                       /* and this is the gradient of what follows */
  struct pl_loss losses;
  /* PL_SCORE only: contiguous over (outer, inner), top_k_* over (outer, inner, picks). loss, correct and brier go with labels;
   * brier, sum (p - q)^2 for the one-hot q of the label, is NULL where it is not wanted. */
  int64_t *prediction, *top_k_indices;
  void *confidence, *entropy, *logsumexp, *top_k_probabilities, *loss, *brier;
  unsigned char *correct;
};

/* Runs a task. Returns -1, or the flat index over (outer, picks, inner) of the first label outside [0, classes), and then
 * nothing was written (unless labels changed while it ran: then the rows so hit hold NaN). -2: out of memory. */
int64_t pl_run(const struct pl_task *task, int threads);

/* The same for C-contiguous arrays, `size` logits in all, whose last axis are the classes; NULL for those that the operation
 * lacks. `grad` is the input of the backward forms, and what cross entropy writes. Results have the dtype of the logits, but
 * for losses and logsumexps of half precision, which are floats; and there is one label a row. */
int64_t pl_run_contiguous(int operation, int dtype, const void *logits, const void *labels, const void *probabilities,
                          void *grad, void *out, int64_t size, int64_t classes, double temperature, double scale,
                          double scale_lo, int threads);

/* The first label outside [0, classes), as pl_run would return it; -1 where there is none. */
int64_t pl_find_bad_label(const struct pl_task *task);

/* Rows of several blocks a part at a time, where pl_has_parts: as what needs no other pass over a row, like scores and
 * probabilities. Views are those of whole rows, but only the elements of blocks [first, last) need be there. `numbers` has
 * pl_numbers_size bytes: pl_reduce_part fills in those of its blocks; when all are there, pl_join_parts joins them; then
 * pl_write_part writes the part's results and, where first is 0, those that are one a row. */
int pl_has_parts(const struct pl_task *task);
int64_t pl_block(int dtype); /* elements */
int64_t pl_numbers_size(const struct pl_task *task);
void pl_reduce_part(const struct pl_task *task, int64_t first, int64_t last, void *numbers, int threads);
void pl_join_parts(const struct pl_task *task, void *numbers);
int64_t pl_write_part(const struct pl_task *task, int64_t first, int64_t last, void *numbers, int threads);

/* The instruction sets of this build that this machine and its OS support, best first, and the one in use. */
int pl_isa_count(void);
const char *pl_isa_name(int index);
const char *pl_isa(void);
int pl_use_isa(const char *name); /* 0, or -1 where it is not available */

int pl_max_threads(void); /* what OpenMP would use: OMP_NUM_THREADS, the affinity mask; 1 in a forked child */
