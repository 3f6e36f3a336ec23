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

  const int64_t count = (task->classes + BLOCK - 1) / BLOCK;
  struct FN(row) one_block;
  REAL one_top;
  int64_t one_index;
  struct FN(room) room = {&one_block, &one_top, &one_index};
  const bool heap = count > 1 || (task->operation == PL_SCORE && task->picks > 1);
  if (heap) {
    room.blocks = malloc((size_t)count * sizeof *room.blocks);
    room.top_x = malloc((size_t)task->picks * sizeof *room.top_x + 1);
    room.top_index = malloc((size_t)task->picks * sizeof *room.top_index + 1);
    if (!room.blocks || !room.top_x || !room.top_index) bad = -2;
  }
  for (int64_t r = begin; r < end && bad != -2; r++) {
    const int64_t found = FN(run_row)(task, r, end, t, &scratch, &room);
    if (bad == -1) bad = found;
  }
  pl_stream_end();
  if (heap) {
    free(room.blocks);
    free(room.top_x);
    free(room.top_index);
  }
  return bad;
}
