/* A range of rows, by the row or by the tile; once for float and once for double. */

/* A tile pays where rows are short or lie side by side; a single row, and scoring, go by the row. */
static bool FN(by_tile)(const struct pl_task *task, int64_t rows)
{
  if (task->operation == PL_SCORE || rows < LANES / 2) return false;
  if (task->classes <= 2 * LANES) return true;
  return task->classes <= TILE && task->logits.inner == pl_itemsize(task->dtype) && task->inner >= LANES / 2;
}

static int64_t FN(run_rows)(const struct pl_task *task, int64_t begin, int64_t end)
{
  struct FN(scratch) scratch;
  struct FN(temperature) t;
  const REAL temperature = (REAL)task->temperature;
  t.inverse = 1 / temperature;
  t.inverse_lo = FMA(-temperature, t.inverse, 1) * t.inverse;
  int64_t bad = -1;

  if (FN(by_tile)(task, end - begin)) {
    for (int64_t r = begin; r < end; r += LANES) {
      const int64_t found = FN(run_tile)(task, r, end - r < LANES ? end - r : LANES, t, &scratch);
      if (bad == -1) bad = found;
    }
    return bad;
  }

  /* Two rows are under way, so that the last steps of one, each waiting for the one before, overlap the next one's first:
   * at 128 classes that saved a fifth of the time. */
  const int64_t count = FN(block_count)(task);
  const int64_t kept = task->operation == PL_SCORE ? task->picks : 0;
  struct FN(row) one_block[2];
  struct FN(slot) slots[2];
  char *heap = NULL;
  const size_t blocks_size = (size_t)count * sizeof *one_block, top_size = (size_t)kept * (sizeof(int64_t) + sizeof(REAL));
  if (count > 1 || kept) {
    heap = malloc(2 * (blocks_size + top_size));
    if (!heap) return -2;
  }
  for (int i = 0; i < 2; i++) {
    char *own = heap + (size_t)i * (blocks_size + top_size);
    slots[i].x = scratch.x + i * BLOCK;
    slots[i].e = scratch.e + i * BLOCK;
    slots[i].blocks = heap ? (struct FN(row) *)(void *)own : &one_block[i];
    slots[i].top_index = heap ? (int64_t *)(void *)(own + blocks_size) : NULL;
    slots[i].top_x = heap ? (REAL *)(void *)(own + blocks_size + (size_t)kept * sizeof(int64_t)) : NULL;
  }
  for (int64_t r = begin; r <= end; r++) {
    if (r < end) FN(reduce_row)(task, r, end, t, &slots[r & 1]);
    if (r == begin) continue;
    const int64_t found = FN(write_row)(task, r - 1, t, &slots[(r - 1) & 1]);
    if (bad == -1) bad = found;
  }
  pl_stream_end();
  free(heap);
  return bad;
}
