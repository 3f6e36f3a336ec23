/* A range of rows, by the row or by the tile; once for float and once for double. */

static bool FN(side_by_side)(const struct pl_task *task)
{
  return task->logits.inner == pl_itemsize(task->dtype) && task->inner >= LANES / 2;
}

/* A tile of cross entropies or scores needs room for the logits and two more of their size. */
static int64_t FN(slabs)(const struct pl_task *task)
{
  return task->operation == PL_CROSS_ENTROPY || task->operation == PL_SCORE ? 3 : 1;
}

/* A tile pays where rows are short or lie side by side; few rows go by the row, and more than a few of their largest. How short
 * was measured, with AVX2 and AVX-512: up to 80 floats or 40 doubles; 96 and 48 for a loss with its gradient; 128 and 64 for
 * losses with options and for scores. */
static bool FN(by_tile)(const struct pl_task *task, int64_t rows)
{
  const int64_t slabs = FN(slabs)(task);
  const int64_t most = pl_is_backward(task) ? TILE / 2 : slabs > 1 ? 2 * TILE / slabs : TILE; /* by the room there is */
  const int64_t few = (slabs == 1 ? 5 : pl_whole(task) ? 6 : 8) * LANES;
  const int64_t picks = task->operation == PL_SCORE ? task->picks : 1;
  if (rows < LANES / 2 || picks > TILE_PICKS || (picks > 1 && task->classes > GROUP)) return false;
  return task->classes <= few || (task->classes <= most && FN(side_by_side)(task));
}

/* A tile for each block of rows too long for one. */
static bool FN(by_tall_tile)(const struct pl_task *task, int64_t rows)
{
  if (task->operation == PL_SCORE || task->operation == PL_CROSS_ENTROPY || rows < LANES / 2) return false;
  return task->classes > TILE && FN(side_by_side)(task);
}

static struct FN(temperature) FN(invert)(const struct pl_task *task)
{
  struct FN(temperature) t;
  const REAL temperature = task->losses.softcap ? 1 : (REAL)task->temperature; /* that of a softcap comes before it */
  t.inverse = 1 / temperature;
  t.inverse_lo = FMA(-temperature, t.inverse, 1) * t.inverse;
  if (!FN(finite)(t.inverse)) t = (struct FN(temperature)){NUMBER_MAX, 0}; /* a subnormal temperature: 0 times it must be 0 */
  return t;
}

static int64_t FN(run_tall_tiles)(const struct pl_task *task, int64_t begin, int64_t end, struct FN(temperature) t,
                                  REAL *scratch)
{
  const bool whole = pl_whole(task);
  const int64_t count = FN(block_count)(task);
  struct FN(tile) tile = {.x = scratch};
  struct FN(slot) slot = {.room = NULL};
  struct FN(row) *blocks = malloc((size_t)(count * LANES) * sizeof *blocks);
  int64_t bad = -1;
  if (!blocks) return -2;
  for (tile.r = begin; tile.r < end; tile.r += LANES) {
    tile.rows = end - tile.r < LANES ? end - tile.r : LANES;
    FN(reduce_tall_tile)(task, &tile, t, blocks);
    FN(close_rows)(task->operation, tile.max, tile.sum, tile.sum_lo, &tile.f);
    if (whole) FN(write_tall_tile)(task, &tile, t, blocks);
    for (int64_t l = 0; !whole && l < tile.rows; l++) {
      slot.row = (struct FN(row)){.max = tile.max[l], .sum = tile.sum[l], .sum_lo = tile.sum_lo[l]};
      const int64_t found = FN(write_row)(task, tile.r + l, 0, count, end, t, &slot, FN(closing_of)(&tile.f, l));
      if (bad == -1) bad = found;
    }
  }
  free(blocks);
  return bad;
}

/* Four quarters of the scratch for the blocks of a slot; rows of one block take their places side by side. */
static void FN(give_room)(struct FN(slot) * slot, REAL *scratch, int64_t offset)
{
  slot->room = scratch + offset;
  slot->first = scratch + ROOM / 2 + offset;
  slot->e = scratch + ROOM + offset;
  slot->other = scratch + ROOM + ROOM / 2 + offset;
}

static struct FN(row) FN(join_row)(const struct pl_task *task, const struct FN(row) * blocks, struct FN(temperature) t)
{
  struct FN(row) row = FN(join_blocks)(blocks, FN(block_count)(task), t);
  if (task->operation == PL_CROSS_ENTROPY) row.spread = FN(join_spreads)(blocks, FN(block_count)(task), row.max);
  return row;
}

/* Where the terms of row r, which has several blocks, are kept until their sum is known: in the result's last row under way, as
 * another that holds them stays in the cache and is written once; in its own, where the result takes the place of the logits.
 * NULL: nowhere, as what lies there is needed, or is not of this type. */
static REAL *FN(place_of_terms)(const struct pl_task *task, int64_t r, int64_t end)
{
  if (!FN(keeps_terms)(task)) return NULL;
  const struct pl_view *whole = pl_whole(task);
  const bool over_logits = whole->data == task->logits.data, over_targets = whole->data == task->losses.probabilities.data;
  if (task->operation == PL_CROSS_ENTROPY && (over_logits || over_targets)) return NULL;
  const struct FN(sink) sink = FN(sink_at)(task, over_logits ? r : end - 1);
  return sink.direct || sink.streamed ? (REAL *)(void *)sink.row : NULL;
}

static int64_t FN(run_rows)(const struct pl_task *task, int64_t begin, int64_t end)
{
  REAL scratch[2 * ROOM]; /* of tiles; or of the blocks of rows: logits, and terms */
  const struct FN(temperature) t = FN(invert)(task);
  int64_t bad = -1;

  if (pl_is_backward(task)) {
    FN(run_backward)(task, begin, end, FN(by_tile)(task, end - begin), scratch);
    return -1;
  }
  if (FN(by_tile)(task, end - begin)) {
    struct FN(tile) tiles[TILES];
    const int64_t each = FN(slabs)(task);
    const int64_t tile_size = task->classes * LANES;
    const int64_t fitting = (int64_t)(sizeof scratch / sizeof(REAL)) / (each * tile_size);
    const int64_t most = fitting < TILES ? fitting : TILES;
    for (int64_t i = 0; i < most; i++) {
      tiles[i].x = scratch + i * each * tile_size;
      tiles[i].q = each > 1 ? tiles[i].x + tile_size : NULL;
      tiles[i].other = each > 1 ? tiles[i].x + 2 * tile_size : NULL;
    }
    for (int64_t r = begin; r < end; r += most * LANES) {
      const int64_t rows = end - r < most * LANES ? end - r : most * LANES;
      const int64_t found = FN(run_tiles)(task, r, rows, t, tiles, (rows + LANES - 1) / LANES);
      if (bad == -1) bad = found;
    }
    return bad;
  }

  if (FN(by_tall_tile)(task, end - begin)) return FN(run_tall_tiles)(task, begin, end, t, scratch);

  const int64_t blocks = FN(block_count)(task);
  const int64_t kept = task->operation == PL_SCORE ? task->picks : 0;
  const int64_t row_size = ROUND_UP(blocks == 1 ? task->classes : BLOCK, GROUP);
  const int64_t fitting = BATCH_BYTES / (row_size * (int64_t)sizeof(REAL));
  const int64_t batch = blocks > 1 || fitting < 1 ? 1 : fitting < LANES ? fitting : LANES;
  struct FN(slot) slots[LANES];
  struct FN(row) *joined = NULL;
  int64_t *top_index = NULL;
  REAL *top_x = NULL;
  if (blocks > 1 && !(joined = malloc((size_t)blocks * sizeof *joined))) bad = -2;
  if (kept && !(top_index = malloc((size_t)(batch * kept) * sizeof *top_index))) bad = -2;
  if (kept && !(top_x = malloc((size_t)(batch * kept) * sizeof *top_x))) bad = -2;
  for (int64_t i = 0; i < batch; i++) {
    slots[i].blocks = joined;
    slots[i].terms = slots[i].to = NULL;
    slots[i].row.dot = slots[i].row.squares = 0;                             /* only PL_SCORE has them */
    slots[i].row.spread = (struct FN(spread)){.count = (REAL)task->classes}; /* without a mask or smoothing, of short rows */
    FN(give_room)(&slots[i], scratch, i * row_size);
    slots[i].top_index = top_index ? top_index + i * kept : NULL;
    slots[i].top_x = top_x ? top_x + i * kept : NULL;
  }
  for (int64_t r = begin; r < end && bad != -2; r += batch) {
    const int64_t rows = end - r < batch ? end - r : batch;
    REAL max[LANES] = {0}, sum[LANES] = {0}, sum_lo[LANES] = {0};
    struct FN(closings) f;
    if (blocks == 1) {
      FN(reduce_short_rows)(task, r, rows, end, t, slots);
    } else {
      slots->terms = FN(place_of_terms)(task, r, end);
      if (pl_whole(task)) {
        const struct FN(sink) sink = FN(sink_at)(task, r);
        slots->to = sink.direct ? (REAL *)(void *)sink.row : NULL;
      }
      FN(reduce_blocks)(task, r, 0, blocks, end, t, slots, joined);
      slots->row = FN(join_row)(task, joined, t);
    }
    for (int64_t i = 0; i < rows; i++) {
      max[i] = slots[i].row.max;
      sum[i] = slots[i].row.sum;
      sum_lo[i] = slots[i].row.sum_lo;
    }
    FN(close_rows)(task->operation, max, sum, sum_lo, &f);
    if (task->operation == PL_CROSS_ENTROPY) {
      const int64_t found = FN(write_losses)(task, r, rows, 0, blocks, end, t, slots, max, &f);
      if (bad == -1) bad = found;
      continue;
    }
    if (blocks == 1 && FN(write_short_rows)(task, r, rows, slots, max, sum, &f, t, &bad)) continue;
    for (int64_t i = 0; i < rows; i++) {
      const int64_t found = FN(write_row)(task, r + i, 0, blocks, end, t, &slots[i], FN(closing_of)(&f, i));
      if (bad == -1) bad = found;
    }
  }
  pl_stream_end();
  free(joined);
  free(top_index);
  free(top_x);
  return bad;
}

/* Part of a long row. */

static void FN(reduce_part)(const struct pl_task *task, int64_t r, int64_t first, int64_t last, bool keep, void *blocks)
{
  REAL scratch[2 * ROOM];
  struct FN(slot) slot = {0};
  FN(give_room)(&slot, scratch, 0);
  slot.terms = keep ? FN(place_of_terms)(task, r, r + 1) : NULL;
  FN(reduce_blocks)(task, r, first, last, r + 1, FN(invert)(task), &slot, blocks);
}

static void FN(join_parts)(const struct pl_task *task, void *blocks)
{
  struct FN(row) *row = blocks;
  row[FN(block_count)(task)] = FN(join_row)(task, row, FN(invert)(task));
}

static int64_t FN(write_part)(const struct pl_task *task, int64_t r, int64_t first, int64_t last, bool kept, const void *blocks)
{
  REAL scratch[2 * ROOM];
  struct FN(closings) f;
  const struct FN(temperature) t = FN(invert)(task);
  struct FN(slot) slot = {0};
  FN(give_room)(&slot, scratch, 0);
  slot.blocks = blocks;
  slot.row = slot.blocks[FN(block_count)(task)];
  slot.terms = kept ? FN(place_of_terms)(task, r, r + 1) : NULL;
  REAL max[LANES] = {slot.row.max}, sum[LANES] = {slot.row.sum}, sum_lo[LANES] = {slot.row.sum_lo};
  FN(close_rows)(task->operation, max, sum, sum_lo, &f);
  const int64_t bad = task->operation == PL_CROSS_ENTROPY
                          ? FN(write_losses)(task, r, 1, first, last, r + 1, t, &slot, max, &f)
                          : FN(write_row)(task, r, first, last, r + 1, t, &slot, FN(closing_of)(&f, 0));
  pl_stream_end();
  return bad;
}

static const struct pl_parts FN(parts) = {
    .block = BLOCK,
    .numbers_size = sizeof(struct FN(row)),
    .reduce = FN(reduce_part),
    .join = FN(join_parts),
    .write = FN(write_part),
};
