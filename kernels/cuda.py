"""The CUDA kernels: the mathematics of rows that lie on a GPU.

A row belongs to LANES threads of a block, a power of two that depends on its length alone. They copy it into shared memory, a
tile at a time, and go over the tile there: a row that fits into one tile is read once, a longer one once more for an output of
its size. Sums are pairs, added lane by lane and joined in one order: a row's bits do not depend on the rows around it.

Loops are `while` loops over uint32, as `range` with a step divides, and a signed index is checked for being negative: with both
an element took 400 instructions.

What is exact here and why is told in docs/numerics.md; names and constants are those of `kernels/cpu.py`. How kernels are
launched is decided in `pylogits/_cuda.py`.

NVVM contracts a product and a sum into a fused multiply-add. Where a product's rounding error counts, it is written `mul`,
which is not contracted.
"""

import math
from collections import namedtuple
from functools import cache
from types import SimpleNamespace

import numpy as np
from llvmlite import ir
from numba import cuda, types
from numba.cuda import cgutils
from numba.cuda.cudadrv import nvvm
from numba.cuda.extending import intrinsic, overload
from pylogits.kernels.cpu import _F32, _F64

THREADS = 256  # of a block, at most
WARP = 32  # threads that run, and exchange numbers, together
ROOM = 2 * THREADS  # of numbers that warps are joined in: a pair a thread
ROWS = 4096  # whose numbers one block adds
VECTOR_BYTES = 16  # the widest access

# What a kernel is told beside arrays. Plan: elements of a tile, between the tiles of two rows, and of all tiles; the first
# class of the last tile; whether the class axis is strided, and whether the rows of a warp are one piece of memory; and of the
# logits, their companion and the output, by how many elements the first one lies behind a multiple of 16 bytes, or -1 where
# classes are not side by side.
Plan = namedtuple("Plan", "tile pitch room last strided together logits other out")
Cap = namedtuple("Cap", "half inverse inverse_lo lowest")
LossNumbers = namedtuple("LossNumbers", "z_loss scale scale_lo")
LossOptions = namedtuple(
    "LossOptions",
    "where probabilities labels ignore_index weight label_smoothing sample_weight loss_grad inverse cap",
    defaults=[None] * 10,
)

# `alone`: whether all lanes are in one warp, of which `within` are; `part` numbers the warps of the row, the first at `first`.
Row = namedtuple("Row", "outer inner there number lane lanes alone within part parts first start other skew other_skew")
Sums = namedtuple("Sums", "mass mass_lo dot dot_lo")  # of q and q (maximum - x)
Gathered = namedtuple("Gathered", "maximum total total_lo count targets even")


def device(function):
    return cuda.jit(device=True)(function)


# ---- what Python has no word for ----


def _spell(builder, name, *arguments):
    kind = ir.FunctionType(arguments[0].type, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


@intrinsic
def mul(typingctx, a, b):
    """a * b, rounded by itself."""

    def codegen(context, builder, signature, args):
        return _spell(builder, "llvm.nvvm.mul.rn.f" if a == types.float32 else "llvm.nvvm.mul.rn.d", *args)

    return a(a, a), codegen


@intrinsic
def number(typingctx, like, integer):
    """An integer as a number of the type of `like`: times one, it would be float64."""

    def codegen(context, builder, signature, args):
        return context.cast(builder, args[1], integer, like)

    return like(like, integer), codegen


@intrinsic
def scale_of(typingctx, shifted):
    """The number whose exponent field holds the lowest bits of `shifted`."""

    def codegen(context, builder, signature, args):
        integer, mantissa = ir.IntType(shifted.bitwidth), 23 if shifted == types.float32 else 52
        return builder.bitcast(builder.shl(builder.bitcast(args[0], integer), integer(mantissa)), args[0].type)

    return shifted(shifted), codegen


@intrinsic
def power_of(typingctx, x):
    """The n for which x 2^-n is in [sqrt(1/2), sqrt(2)), for finite x >= 1."""
    real = np.dtype(str(x))
    sqrt_half = int(np.sqrt(real.type(0.5)).view(f"u{real.itemsize}"))

    def codegen(context, builder, signature, args):
        integer = ir.IntType(x.bitwidth)
        bits = builder.sub(builder.bitcast(args[0], integer), integer(sqrt_half))
        return builder.sitofp(builder.lshr(bits, integer(np.finfo(real).nmant)), args[0].type)

    return x(x), codegen


def _vector_place(context, builder, kind, array, index_kind, index):
    """A pointer to 16 bytes of an array: of the GPU's memory, or, with one dimension, of shared memory."""
    kinds, indices = ([index_kind], [index]) if kind.ndim == 1 else (list(index_kind), cgutils.unpack_tuple(builder, index))
    indices = [context.cast(builder, one, of, types.intp) for one, of in zip(indices, kinds, strict=True)]
    place = cgutils.get_item_pointer(context, builder, kind, context.make_array(kind)(context, builder, array), indices)
    vector, space = ir.VectorType(ir.IntType(32), 4), nvvm.ADDRSPACE_SHARED if kind.ndim == 1 else nvvm.ADDRSPACE_GLOBAL
    return builder.addrspacecast(builder.bitcast(place, vector.as_pointer()), vector.as_pointer(space))


@intrinsic
def copy_vector(typingctx, target, target_at, source, source_at, v):
    """Copies 16 bytes, the v-th from source[source_at] on, to the v-th from target[target_at] on, both aligned."""

    def codegen(context, builder, signature, args):
        kinds = signature.args
        to, of = (_vector_place(context, builder, kinds[i], args[i], kinds[i + 1], args[i + 1]) for i in (0, 2))
        step = [context.cast(builder, args[4], v, types.intp)]
        builder.store(builder.load(builder.gep(of, step), align=VECTOR_BYTES), builder.gep(to, step), align=VECTOR_BYTES)
        return context.get_dummy_value()

    return types.void(target, target_at, source, source_at, v), codegen


# ---- elementary functions; a pair is hi + lo, unevaluated ----


@device
def two_sum(a, b):
    hi = a + b
    b_seen = hi - a
    return hi, (a - (hi - b_seen)) + (b - b_seen)


@device
def fast_two_sum(a, b):
    hi = a + b
    return hi, b - (hi - a)


@device
def finite(k, value):
    return value - value == k.zero


@device
def plus(a, b):
    hi, lo = two_sum(a[0], b[0])
    return hi, lo + (a[1] + b[1])


@device
def times(a, b):
    hi = mul(a[0], b[0])
    return hi, cuda.fma(a[0], b[0], -hi) + cuda.fma(a[0], b[1], mul(a[1], b[0]))


@device
def cooled(pair, t):
    """A pair over the temperature, t being 1 / temperature as one; None for a temperature of 1."""
    if t is None:
        return pair
    else:
        return times(pair, t)


@device
def rounded(k, pair):
    return pair[0] + pair[1] if finite(k, pair[0]) else pair[0]


@device
def join(k, a, b):
    """The sum of two pairs, as a pair whose parts do not overlap."""
    hi, lo = plus(a, b)
    whole, rest = fast_two_sum(hi, lo)
    if finite(k, hi):
        return whole, rest
    return hi, lo


@device
def exponent(x, maximum, t):
    """(x - maximum) / temperature as a pair."""
    difference, difference_lo = two_sum(x, -maximum)
    if t is None:
        return difference, difference_lo
    else:
        hi = mul(difference, t[0])
        return hi, cuda.fma(difference, t[0], -hi) + cuda.fma(difference, t[1], mul(difference_lo, t[0]))


@device
def exp_tail(k, r, square):
    odd = len(k.exp_tail) % 2
    q = k.exp_tail[0] if odd else cuda.fma(k.exp_tail[0], r, k.exp_tail[1])
    for i in range(2 - odd, len(k.exp_tail), 2):
        q = cuda.fma(q, square, cuda.fma(k.exp_tail[i], r, k.exp_tail[i + 1]))
    return q


@device
def reduce(k, hi, lo):
    """r, its square, and n as `scale_of` wants it, with hi + lo = n ln 2 + r."""
    shifted = cuda.fma(hi - k.exp_center, k.log2_e, k.round_shift)
    n = shifted - k.round_shift
    r = cuda.fma(n, -k.ln2_hi, hi) + cuda.fma(n, -k.ln2_lo, lo)
    return r, mul(r, r), shifted


@device
def exp_scaled(k, hi, lo):
    """exp(hi + lo) * EXP_SCALE as a pair, for hi <= 0."""
    r, square, shifted = reduce(k, hi, lo)
    less_one, scale = cuda.fma(exp_tail(k, r, square), square, r), scale_of(shifted)
    if hi < k.exp_lowest:
        return k.zero, k.zero
    value = cuda.fma(less_one, scale, scale)
    return value, cuda.fma(less_one, scale, scale - value)


@device
def exp_pair(k, hi, lo):
    """exp(hi + lo) * EXP_SCALE with twice the digits, for hi <= 0."""
    shifted = cuda.fma(hi - k.exp_center, k.log2_e, k.round_shift)
    n = shifted - k.round_shift
    r, r_lo = two_sum(cuda.fma(n, -k.ln2_hi, hi), cuda.fma(n, -k.ln2_lo, lo))
    square = mul(r, r)
    s, s_lo = two_sum(r, mul(exp_tail(k, r, square), square))
    total, total_lo = fast_two_sum(k.one, s)
    scale = scale_of(shifted)
    if hi < k.exp_lowest:
        return k.zero, k.zero
    return total * scale, (total_lo + (s_lo + r_lo)) * scale


@device
def term_pair(k, x, maximum, t):
    """exp((x - maximum) / temperature) * EXP_SCALE."""
    hi, lo = exponent(x, maximum, t)
    return exp_scaled(k, hi, lo)


@device
def term(k, x, maximum, t):
    return term_pair(k, x, maximum, t)[0]


@device
def log1p_pair(k, hi, lo):
    one, one_lo = two_sum(k.one, hi)
    n = power_of(one)
    down = scale_of(k.round_shift - n) / k.exp_scale
    f = one * down
    z, z_lo = fast_two_sum(f - k.one, mul(one_lo, down))
    s = z / (k.two + z)
    half = k.half * z
    square = mul(half, z)
    w = mul(s, s)
    tail = k.atanh_tail[0]
    for coefficient in k.atanh_tail[1:]:
        tail = cuda.fma(tail, w, coefficient)
    rest = s * (square + w * tail) - cuda.fma(half, z, -square) + cuda.fma(lo, down, z_lo) / f
    a, a_lo = fast_two_sum(z, -square)
    b, b_lo = two_sum(n * k.ln2_hi, a)
    return fast_two_sum(b, cuda.fma(n, k.ln2_lo, rest + (a_lo + b_lo)))


@device
def tanh(k, v, v_lo, half):
    """factor * tanh(x), and the derivative of tanh(x), from v + v_lo = 2 x in [-40, 0] and half of the factor."""
    shifted = cuda.fma(v - k.exp_center, k.log2_e, k.one_shift)
    n, scale = shifted - k.one_shift, scale_of(shifted)
    twice = scale + scale
    high, low = cuda.fma(n, -k.ln2_hi, v), cuda.fma(n, -k.ln2_lo, v_lo)
    r = high + low
    square = mul(r, r)
    p = high + cuda.fma(exp_tail(k, r, square), square, low)
    less = scale - k.one
    above = cuda.fma(scale, p, less)
    above_lo = cuda.fma(scale, p, less - above)
    below = cuda.fma(scale, p, scale + k.one)
    w = cuda.fma(twice, p, twice) / below
    return cuda.fma(half, above, mul(half, cuda.fma(-above, above / below, above_lo))), mul(w, k.two - w)


@device
def capped(k, x, cap):
    """softcap tanh(x / (temperature softcap)), and its derivative but for 1 / temperature."""
    near = max(cap.lowest, -abs(x)) if x == x else x
    v = mul(near, cap.inverse)
    value, slope = tanh(k, v, cuda.fma(near, cap.inverse_lo, cuda.fma(near, cap.inverse, -v)), cap.half)
    return value if x < 0 else -value, slope


# ---- elements; Numba has no bfloat16, whose bits are taken as uint16 ----


def widen(k, element):
    """An element as the number that is computed with."""
    return widen_bits(k, element) if isinstance(element, np.uint16) else widen_float(k, element)


def widen_bits(k, element):
    return np.uint32(np.uint32(element) << np.uint32(16)).view(np.float32)


def widen_float(k, element):
    return element * k.one


@overload(widen)
def _overload_widen(k, element):
    return widen_bits if element == types.uint16 else widen_float


def put(array, at, value):
    """array[at] = value, rounded to nearest even."""
    put_bits(array, at, value) if array.dtype == np.uint16 else put_float(array, at, value)


def put_bits(array, at, value):
    bits = value.view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    array[at] = nearest if value == value else np.uint32(0x7FC0)


def put_float(array, at, value):
    array[at] = value


@overload(put)
def _overload_put(array, at, value):
    return put_bits if array.dtype == types.uint16 else put_float


# ---- rows ----


@device
def skew(base, together, array, outer, inner):
    """By how many elements a row, or all `together`, begins behind a multiple of 16 bytes; -1 where classes are not side by
    side."""
    offset = 0 if together else outer * (array.strides[0] // array.itemsize) + inner * (array.strides[2] // array.itemsize)
    return np.int32(-1 if base < 0 else (base + offset) & (VECTOR_BYTES // array.itemsize - 1))


@device
def place(plan, x, other):
    """The row and the lane of this thread. Neighbouring threads read what lies side by side: classes, or else rows."""
    if plan.strided:
        lane, lanes, seat, rows = cuda.threadIdx.y, cuda.blockDim.y, cuda.threadIdx.x, cuda.blockDim.x
        within, part, parts = 1, lane, lanes
    else:
        lane, lanes, seat, rows = cuda.threadIdx.x, cuda.blockDim.x, cuda.threadIdx.y, cuda.blockDim.y
        within, part, parts = min(lanes, WARP), lane // WARP, max(1, lanes // WARP)
    number = np.int64(cuda.blockIdx.x) * rows + seat
    there = number < x.shape[0] * x.shape[2]
    outer, inner = number if there else 0, 0
    if x.shape[2] > 1:
        outer = outer // x.shape[2]
        inner = number - outer * x.shape[2] if there else 0
    skewed, other_skewed = skew(plan.logits, plan.together, x, outer, inner), np.int32(0)
    if other is not None:
        other_skewed = skew(plan.other, plan.together, other, outer, inner)
    return Row(
        outer,
        inner,
        there,
        number,
        np.uint32(lane),
        np.uint32(lanes),
        lanes <= WARP and not plan.strided,
        np.uint32(within),
        np.uint32(part),
        np.uint32(parts),
        np.uint32(seat * parts),
        np.uint32(seat * plan.pitch + max(skewed, 0)),
        np.uint32(plan.room + seat * plan.pitch + max(other_skewed, 0)),
        skewed,
        other_skewed,
    )


@device
def wait(row):
    """For the threads of a row."""
    if row.alone:
        cuda.syncwarp()
    else:
        cuda.syncthreads()


@device
def length(plan, row, classes, first):
    """Of the tile that begins at class `first`; none for threads beyond the last row, which only wait with the others."""
    return np.uint32(min(plan.tile, classes - first) if row.there else 0)


@device
def move_element(into_tile, tile, at, x, x_at):
    """Between a tile and an array of rows, as the next two."""
    if into_tile:
        tile[at] = x[x_at]
    else:
        x[x_at] = tile[at]


@device
def move_vector(into_tile, tile, at, x, x_at, v):
    if into_tile:
        copy_vector(tile, at, x, x_at, v)
    else:
        copy_vector(x, x_at, tile, at, v)


@device
def move_elements(into_tile, tile, at, x, outer, first, inner, n, lane, lanes):
    c = lane
    while c < n:
        move_element(into_tile, tile, np.uint32(at + c), x, (outer, first + c, inner))
        c = np.uint32(c + lanes)


@device
def move_row(into_tile, tile, at, skewed, x, outer, first, inner, n, lane, lanes):
    """n elements of a row, from class `first` on: where they are side by side 16 bytes at once, but for the ends."""
    if skewed < 0:
        move_elements(into_tile, tile, at, x, outer, first, inner, n, lane, lanes)
        return
    per = np.uint32(VECTOR_BYTES // tile.itemsize)
    most = np.uint32(per - np.uint32(1))  # of elements at an end
    head = min(n, np.uint32((per - np.uint32(skewed)) & most))
    move_elements(into_tile, tile, at, x, outer, first, inner, head, lane, lanes)
    at, first, n = np.uint32(at + head), first + head, np.uint32(n - head)
    v, vectors = lane, np.uint32(n // per)
    while v < vectors:
        move_vector(into_tile, tile, at, x, (outer, first, inner), v)
        v = np.uint32(v + lanes)
    c = np.uint32(vectors * per)
    move_elements(into_tile, tile, np.uint32(at + c), x, outer, first + c, inner, n & most, lane, lanes)


@device
def move_tile(plan, into_tile, tile, start, skewed, x, row, first, n):
    """A tile of this thread's row, by its lanes; or all rows of this thread's warp, which are one piece of memory."""
    outer, inner, lane, lanes = row.outer, row.inner, row.lane, row.lanes
    if plan.together:
        lane, lanes = np.uint32(cuda.threadIdx.y % WARP), np.uint32(WARP)
        outer, inner = row.number - lane, 0
        n = np.uint32(max(0, min(WARP, x.shape[0] - outer)) * x.shape[1])
        start = np.uint32(start - lane * np.uint32(plan.pitch))
    move_row(into_tile, tile, start, skewed, x, outer, first, inner, n, lane, lanes)


@device
def load_both(plan, tile, row, x, other, first, n):
    """A tile of the logits and, where there is one, of the array beside them."""
    move_tile(plan, True, tile, row.start, row.skew, x, row, first, n)
    if other is not None:
        move_tile(plan, True, tile, row.other, row.other_skew, other, row, first, n)
    wait(row)


@device
def store(plan, tile, row, out, first, n):
    skewed = skew(plan.out, plan.together, out, row.outer, row.inner)
    wait(row)
    move_tile(plan, False, tile, row.start, skewed if skewed == row.skew else np.int32(-1), out, row, first, n)
    wait(row)


@device
def kept(where, row, c):
    """Whether a class is not masked out."""
    if where is None:
        return True
    else:
        return where[row.outer, c, row.inner]


@device
def weight_at(k, weight, c):
    if weight is None:
        return k.one
    else:
        return weight[c]


@device
def of_row(k, array, row):
    """One number of an array over the rows that may be missing."""
    if array is None:
        return k.one
    else:
        return array[row.outer, row.inner]


@device
def logit(k, tile, at, cap):
    value = widen(k, tile[at])
    if cap is None:
        return value
    else:
        return capped(k, value, cap)[0]


# ---- joining the lanes of a row: pairs of them in a warp, then the warps in their order; all lanes get the same ----


@device
def exchange(value, step):
    """The value of the lane whose number differs by the bit `step`."""
    return cuda.shfl_xor_sync(0xFFFFFFFF, value, step)


@device
def join_largest(room, row, value):
    step = row.within // np.uint32(2)
    while step > 0:
        other = exchange(value, step)
        if other > value:
            value = other
        step //= np.uint32(2)
    if row.parts > 1:
        room[row.first + row.part] = value
        cuda.syncthreads()
        i = np.uint32(0)
        while i < row.parts:
            if room[row.first + i] > value:
                value = room[row.first + i]
            i = np.uint32(i + np.uint32(1))
        cuda.syncthreads()
    return value


@device
def join_parts(k, room, row, pair):
    if row.parts > 1:
        room[row.first + row.part], room[THREADS + row.first + row.part] = pair
        cuda.syncthreads()
        pair = room[row.first], room[THREADS + row.first]
        i = np.uint32(1)
        while i < row.parts:
            pair = join(k, pair, (room[row.first + i], room[THREADS + row.first + i]))
            i = np.uint32(i + np.uint32(1))
        cuda.syncthreads()
    return pair


@device
def join_lanes(k, room, row, pair):
    step = row.within // np.uint32(2)
    while step > 0:
        pair = join(k, pair, (exchange(pair[0], step), exchange(pair[1], step)))
        step //= np.uint32(2)
    return join_parts(k, room, row, pair)


@device
def join_counts(k, room, row, count):
    """The sum of integers, as an exact pair."""
    step = row.within // np.uint32(2)
    while step > 0:
        count = np.uint32(count + np.uint32(exchange(np.int32(count), step)))
        step //= np.uint32(2)
    hi = number(k.one, count)
    return join_parts(k, room, row, (hi, number(k.one, np.int32(count - np.uint32(hi)))))


@device
def join_sums(k, room, row, sums):
    mass, mass_lo = join_lanes(k, room, row, (sums.mass, sums.mass_lo))
    dot, dot_lo = join_lanes(k, room, row, (sums.dot, sums.dot_lo))
    return Sums(mass, mass_lo, dot, dot_lo)


# ---- what a row's results are made from ----


@device
def weigh(k, sums, q, x, maximum):
    """With q and q (maximum - x) added; q = 0 counts for nothing, whatever x."""
    difference, difference_lo = two_sum(maximum, -x)
    product = mul(q, difference)
    if q == k.zero:
        return sums
    product_lo = cuda.fma(q, difference, -product) + q * difference_lo if finite(k, product) else k.zero
    mass, mass_lo = plus((sums.mass, sums.mass_lo), (q, k.zero))
    dot, dot_lo = plus((sums.dot, sums.dot_lo), (product, product_lo))
    return Sums(mass, mass_lo, dot, dot_lo)


@device
def moved(sums, difference):
    """For a maximum that is larger by a pair."""
    dot, dot_lo = plus((sums.dot, sums.dot_lo), times((sums.mass, sums.mass_lo), difference))
    return Sums(sums.mass, sums.mass_lo, dot, dot_lo)


@device
def shrunk(k, total, factor, ones):
    """A scaled total and `ones` times exp(-distance), of which the scaled value is given. Without its scale that may be
    subnormal where the product is not (many terms, far below a new maximum): then the total gives up its own instead."""
    down = k.one / k.exp_scale
    far = factor[0] < k.one
    total_down, factor_down = (down, k.one) if far else (k.one, down)
    product = times((total[0] * total_down, total[1] * total_down), (factor[0] * factor_down, factor[1] * factor_down))
    return plus(product, (ones * factor[0], ones * factor[1]))


@device
def gather(k, plan, row, x, other, where, weight, cap, t, smoothing, keep, tile, room):
    """The maximum of a row, the sum of the other exponentials as a pair, and with `other` (probabilities) or `smoothing` (of
    labels) the sums that losses need. Each tile moves what was summed before to the maximum so far. With `keep` the tile has
    the exponentials in the end."""
    maximum, reference = -k.infinity, k.zero  # the latter is finite
    total, total_lo, ones, count = k.zero, k.zero, np.uint32(0), np.uint32(0)
    targets = even = Sums(k.zero, k.zero, k.zero, k.zero)
    classes, first = x.shape[1], 0
    while first < classes:
        n = length(plan, row, classes, first)
        load_both(plan, tile, row, x, other, first, n)
        largest, c = maximum, row.lane
        while c < n:
            value = logit(k, tile, np.uint32(row.start + c), cap)
            if kept(where, row, first + c) and value > largest:
                largest = value
            c = np.uint32(c + row.lanes)
        largest = join_largest(room, row, largest)
        if largest > maximum:
            before, reference = reference, largest if finite(k, largest) else k.zero
            if first > 0:
                hi, lo = exponent(maximum, largest, t)
                total, total_lo = shrunk(k, (total, total_lo), exp_pair(k, hi, lo), number(k.one, ones))
                ones = np.uint32(0)
                difference = two_sum(reference, -before)
                targets, even = moved(targets, difference), moved(even, difference)
            maximum = largest
        c = row.lane
        while c < n:
            if kept(where, row, first + c):
                at = np.uint32(row.start + c)
                value = logit(k, tile, at, cap)
                e, e_lo = term_pair(k, value, maximum, t)
                if keep:
                    tile[at] = e
                is_largest = value == maximum  # exact, and one of them is left out of the sum
                ones = np.uint32(ones + np.uint32(is_largest))
                total, rest = two_sum(total, k.zero if is_largest else e)
                total_lo += rest + (k.zero if is_largest else e_lo)
                if where is not None:
                    count = np.uint32(count + np.uint32(1))
                if other is not None:
                    q = widen(k, tile[np.uint32(row.other + c)]) * weight_at(k, weight, first + c)
                    targets = weigh(k, targets, q, value, reference)
                if smoothing is not None:
                    even = weigh(k, even, weight_at(k, weight, first + c), value, reference)
            c = np.uint32(c + row.lanes)
        first += plan.tile
        if first < classes:
            wait(row)
    total, total_lo = join_lanes(k, room, row, (total, total_lo))
    ones, ones_lo = join_counts(k, room, row, ones)
    hi, lo = two_sum(total / k.exp_scale, ones - k.one)
    lo += total_lo / k.exp_scale + ones_lo
    size = number(k.one, classes) if where is None else join_counts(k, room, row, count)[0]
    if other is not None:
        targets = join_sums(k, room, row, targets)
    if smoothing is not None:
        even = join_sums(k, room, row, even)
    return Gathered(maximum, hi, lo, size, targets, even)


@device
def log_of_sum(k, g):
    """log1p of the sum of the others as a pair; NaN without a finite logit."""
    hi, lo = log1p_pair(k, g.total, g.total_lo)
    return hi + (g.maximum - g.maximum), lo


@device
def inverse_of_sum(k, g):
    """The reciprocal of the whole sum as a pair, scaled as the exponentials are; NaN without a finite logit."""
    whole, whole_lo = two_sum(k.one, g.total)
    whole, whole_lo = whole + (g.maximum - g.maximum), whole_lo + g.total_lo
    reciprocal = k.one / whole
    residual = cuda.fma(-whole, reciprocal, k.one) - whole_lo * reciprocal
    return reciprocal / k.exp_scale, residual * reciprocal / k.exp_scale


@device
def log_sum(k, g, log1p, t):
    if finite(k, g.maximum):
        return rounded(k, plus(cooled((g.maximum, k.zero), t), log1p))
    return g.maximum if g.total == g.total else g.total


@device
def probability(k, e, inverse):
    """Computed `lift` times as large: see c/results.inc.h."""
    return cuda.fma(e, inverse[0] * k.lift, e * (inverse[1] * k.lift)) * (k.one / k.lift)


@device
def log_probability(k, x, maximum, log1p, t):
    return rounded(k, plus(exponent(x, maximum, t), (-log1p[0], -log1p[1])))


# ---- operations; each has a kernel of its name below ----


@device
def softmax(k, plan, x, where, t, log, out, sums, wide, tile, room):
    """softmax or with `log` log_softmax to `out`, logsumexp to `sums`. `wide` where a tile's elements
    are of the type that is computed in, and can be exponentials."""
    row, classes = place(plan, x, None), x.shape[1]
    keep = wide and log is None and out is not None and classes <= plan.tile
    g = gather(k, plan, row, x, None, where, None, None, t, None, keep, tile, room)
    log1p, inverse = log_of_sum(k, g), inverse_of_sum(k, g)
    if sums is not None and row.there and row.lane == 0:
        sums[row.outer, row.inner] = log_sum(k, g, log1p, t)
    if out is not None:
        first = plan.last
        while first >= 0:
            n, c = length(plan, row, classes, first), row.lane
            if first < plan.last:  # the last tile is still there
                load_both(plan, tile, row, x, None, first, n)
            while c < n:
                at = np.uint32(row.start + c)
                if not kept(where, row, first + c):
                    value = k.zero if log is None else -k.infinity
                elif log is not None:
                    value = log_probability(k, widen(k, tile[at]), g.maximum, log1p, t)
                else:
                    value = widen(k, tile[at])
                    value = probability(k, value if keep else term(k, value, g.maximum, t), inverse)
                put(tile, at, value)
                c = np.uint32(c + row.lanes)
            store(plan, tile, row, out, first, n)
            first -= plan.tile


@device
def selective_log_softmax(k, plan, x, indices, t, status, out, tile, room):
    """The log-probabilities of some classes, unless an index is bad."""
    row = place(plan, x, None)
    g = gather(k, plan, row, x, None, None, None, None, t, None, False, tile, room)
    log1p = log_of_sum(k, g)
    if row.there and status[0] == 0:
        j = row.lane
        while j < indices.shape[1]:
            value = widen(k, x[row.outer, indices[row.outer, j, row.inner], row.inner])
            put(out, (row.outer, j, row.inner), log_probability(k, value, g.maximum, log1p, t))
            j = np.uint32(j + row.lanes)


@device
def close_loss(k, numbers, smoothing, g, log1p, inverse, t, targets, sample_weight, loss_grad, share):
    """The loss of a row, and for its gradient the factor of the terms, and those of q and of each class's weight."""
    keep, even = (k.one, k.zero), (k.zero, k.zero)
    dot, mass = (targets.dot, targets.dot_lo), (targets.mass, targets.mass_lo)
    loss, slope = plus(cooled(dot, t), times(mass, log1p)), mass
    if smoothing is not None:
        keep, even = (k.one - smoothing, k.zero), (smoothing / g.count, k.zero)
        # where keep is 0, an infinite loss counts for nothing
        loss, slope = times(keep, loss) if keep[0] != k.zero else (k.zero, k.zero), times(keep, mass)
        dot, mass = (g.even.dot, g.even.dot_lo), (g.even.mass, g.even.mass_lo)
        loss = plus(loss, times(even, plus(cooled(dot, t), times(mass, log1p))))
        slope = plus(slope, times(even, mass))
    if numbers.z_loss != k.zero:
        log_sum = plus(cooled((g.maximum, k.zero), t), log1p)
        product = times((numbers.z_loss, k.zero), log_sum)
        loss, slope = plus(loss, times(product, log_sum)), plus(slope, times((k.two, k.zero), product))
    loss = times((loss[0] + k.zero * log1p[0], loss[1]), (sample_weight, k.zero))  # NaN shows even where nothing counts
    outer = times(times((numbers.scale, numbers.scale_lo), (sample_weight, k.zero)), (loss_grad, k.zero))
    outer = times(outer, share)
    main, rest = times(outer, keep), times(outer, even)
    factor = times(times(outer, slope), inverse)
    return rounded(k, loss), factor, main[0] + main[1], rest[0] + rest[1]


@device
def write_slopes(
    k, plan, row, x, probabilities, where, weight, smoothing, cap, t, keep, maximum, loss, label, nothing, grad, tile
):
    """factor e - (main q + even) of every class, times the derivative of the softcap; 0 where `nothing` counts."""
    _, factor, main, even = loss
    classes = x.shape[1]
    lift = k.lift if smoothing is None and probabilities is None else k.one  # what has nothing subtracted is as a probability
    lifted, lifted_lo, drop = factor[0] * lift, factor[1] * lift, k.one / lift
    first = plan.last
    while first >= 0:
        n, c = length(plan, row, classes, first), row.lane
        if first < plan.last:
            load_both(plan, tile, row, x, probabilities, first, n)
        while c < n:
            at = np.uint32(row.start + c)
            value, slope = widen(k, tile[at]), k.one
            if cap is not None:
                value, slope = capped(k, value, cap)
            e, minus = value if keep else term(k, value, maximum, t), k.zero
            if smoothing is not None:
                minus = weight_at(k, weight, first + c) * even
            if probabilities is not None:
                q = widen(k, tile[np.uint32(row.other + c)])
                minus = cuda.fma(q * weight_at(k, weight, first + c), main, minus)
            value = cuda.fma(e, lifted, cuda.fma(e, lifted_lo, -minus)) * drop
            if first + c == label:
                minus = cuda.fma(weight_at(k, weight, label), main, minus)
                value = cuda.fma(e, factor[0], cuda.fma(e, factor[1], -minus))
            value *= slope
            put(tile, at, k.zero if nothing or not kept(where, row, first + c) else value)
            c = np.uint32(c + row.lanes)
        store(plan, tile, row, grad, first, n)
        first -= plan.tile


@device
def of_label(k, row, x, weight, cap, label, maximum):
    """The sums over the classes, of one label: its weight, and that times the distance of its logit."""
    value = widen(k, x[row.outer, label, row.inner])
    if cap is not None:
        value = capped(k, value, cap)[0]
    return weigh(k, Sums(k.zero, k.zero, k.zero, k.zero), weight_at(k, weight, label), value, maximum)


@device
def is_ignored(label, ignore_index):
    if ignore_index is None:
        return False
    else:
        return label == ignore_index


@device
def label_at(row, labels, ignore_index):
    """The label of a row, and whether it is ignored; -1 where there are none."""
    if labels is None:
        return -1, False
    else:
        label = np.int64(labels[row.outer, row.inner])
        return label, is_ignored(label, ignore_index)


@device
def pair_in(k, array):
    if array is None:
        return k.one, k.zero
    else:
        return array[0], array[1]


@device
def cross_entropy(k, plan, numbers, x, options, t, status, losses, grad, wide, tile, room):
    """The losses of rows, and their gradient where `grad` is given, unless a label is bad."""
    o = options
    row = place(plan, x, o.probabilities)
    keep = wide and grad is not None and o.cap is None and x.shape[1] <= plan.tile
    g = gather(k, plan, row, x, o.probabilities, o.where, o.weight, o.cap, t, o.label_smoothing, keep, tile, room)
    log1p, inverse = log_of_sum(k, g), inverse_of_sum(k, g)
    bad, targets = status[0] != 0, g.targets
    label, ignored = label_at(row, o.labels, o.ignore_index)
    nothing = ignored or g.count == k.zero
    if label >= 0 and row.there and not nothing and not bad:
        targets = of_label(k, row, x, o.weight, o.cap, label, g.maximum if finite(k, g.maximum) else k.zero)
    share, sample_weight, loss_grad = pair_in(k, o.inverse), of_row(k, o.sample_weight, row), of_row(k, o.loss_grad, row)
    loss = close_loss(k, numbers, o.label_smoothing, g, log1p, inverse, t, targets, sample_weight, loss_grad, share)
    if row.there and row.lane == 0 and not bad:
        losses[row.outer, row.inner] = k.zero if nothing else loss[0]
    if grad is not None and not bad:
        q, where, weight, smoothing = o.probabilities, o.where, o.weight, o.label_smoothing
        nothing = nothing or share[0] == k.zero
        write_slopes(k, plan, row, x, q, where, weight, smoothing, o.cap, t, keep, g.maximum, loss, label, nothing, grad, tile)


@device
def backward(k, plan, p, grad, log, out, tile, room):
    """p (g - sum(g p)), or with `log` g - exp(log p) sum(g)."""
    row = place(plan, p, grad)
    sums = k.zero, k.zero
    classes, first = p.shape[1], 0
    while first < classes:
        n, c = length(plan, row, classes, first), row.lane
        load_both(plan, tile, row, p, grad, first, n)
        while c < n:
            g = widen(k, tile[np.uint32(row.other + c)])
            at = widen(k, tile[np.uint32(row.start + c)]) if log is None else k.one
            product = mul(g, at)
            sums = plus(sums, (product, cuda.fma(g, at, -product)))
            c = np.uint32(c + row.lanes)
        first += plan.tile
        if first < classes:
            wait(row)
    hi, lo = join_lanes(k, room, row, sums)
    lo = lo if finite(k, hi) else k.zero
    first = plan.last
    while first >= 0:
        n, c = length(plan, row, classes, first), row.lane
        if first < plan.last:
            load_both(plan, tile, row, p, grad, first, n)
        while c < n:
            at, g = widen(k, tile[np.uint32(row.start + c)]), widen(k, tile[np.uint32(row.other + c)])
            if log is None:
                difference, rest = two_sum(g, -hi)
                value = at * (difference + (rest - lo))
            else:
                e = exp_scaled(k, at, k.zero)[0]
                value = cuda.fma(e, -hi / k.exp_scale, cuda.fma(e, -lo / k.exp_scale, g))
            put(tile, np.uint32(row.start + c), value)
            c = np.uint32(c + row.lanes)
        store(plan, tile, row, out, first, n)
        first -= plan.tile


@device
def is_before(a, i, b, j):
    """Whether class i with logit a is a better prediction than j with b: NaN first, then the larger, then the first."""
    if a == b or (a != a and b != b):
        return i < j
    return a != a or (b == b and a > b)


@device
def score(k, plan, x, labels, t, status, outputs, tile, room, seats):
    """What `pylogits.score` says of a row, unless a label is bad."""
    prediction, confidence, entropy, logsumexp, best, chances, losses, correct = outputs
    row = place(plan, x, None)
    g = gather(k, plan, row, x, None, None, None, None, t, None, False, tile, room)
    log1p, inverse = log_of_sum(k, g), inverse_of_sum(k, g)
    writes = row.there and row.lane == 0 and status[0] == 0
    classes, first = x.shape[1], 0
    sums = k.zero, k.zero
    # The logits of the best classes so far are kept where their probabilities belong.
    for j in range(best.shape[2] if writes else 0):
        best[row.outer, row.inner, j], chances[row.outer, row.inner, j] = classes, -k.infinity
    while first < classes:
        n, c = length(plan, row, classes, first), row.lane
        if classes > plan.tile:
            wait(row)
            load_both(plan, tile, row, x, None, first, n)
        while c < n:
            hi, lo = exponent(widen(k, tile[np.uint32(row.start + c)]), g.maximum, t)
            e = exp_scaled(k, hi, lo)[0]
            sums = plus(sums, (k.zero if e == k.zero else -hi * e, k.zero))
            c = np.uint32(c + row.lanes)
        value, at = k.zero, np.int64(-1)
        for _ in range(best.shape[2]):
            value, at = next_best(k, row, classes, first, n, value, at, tile, room, seats)
            if writes:
                insert(best, chances, row, value, at)
        first += plan.tile
    sums = join_lanes(k, room, row, sums)
    if writes:
        logsumexp[row.outer, row.inner] = log_sum(k, g, log1p, t)
        entropy[row.outer, row.inner] = log1p[0] + (sums[0] + sums[1]) * inverse[0]
        for j in range(best.shape[2]):
            e = term(k, chances[row.outer, row.inner, j], g.maximum, t)
            chances[row.outer, row.inner, j] = probability(k, e, inverse)
        at = best[row.outer, row.inner, 0]
        prediction[row.outer, row.inner], confidence[row.outer, row.inner] = at, chances[row.outer, row.inner, 0]
        if labels is not None:
            label = np.int64(labels[row.outer, row.inner])
            of_class = widen(k, x[row.outer, label, row.inner])
            losses[row.outer, row.inner] = k.zero - log_probability(k, of_class, g.maximum, log1p, t)
            correct[row.outer, row.inner] = at == label


@device
def next_best(k, row, classes, first, n, last_value, last, tile, room, seats):
    """The best class of a tile behind `last`, or of all of it where that is -1; `classes` where there is none."""
    largest, at, c = -k.infinity, np.int64(classes), row.lane
    while c < n:
        value = widen(k, tile[np.uint32(row.start + c)])
        behind = last < 0 or is_before(last_value, last, value, first + c)
        if behind and is_before(value, first + c, largest, at):
            largest, at = value, np.int64(first + c)
        c = np.uint32(c + row.lanes)
    step = row.within // np.uint32(2)
    while step > 0:
        value, other = exchange(largest, step), exchange(at, step)
        if is_before(value, other, largest, at):
            largest, at = value, other
        step //= np.uint32(2)
    if row.parts > 1:
        room[row.first + row.part], seats[row.first + row.part] = largest, at
        cuda.syncthreads()
        i = np.uint32(0)
        while i < row.parts:
            if is_before(room[row.first + i], seats[row.first + i], largest, at):
                largest, at = room[row.first + i], seats[row.first + i]
            i = np.uint32(i + np.uint32(1))
        cuda.syncthreads()
    return largest, at


@device
def insert(best, values, row, value, at):
    """A class among the best ones of a row, where it is one of them."""
    i, j, rank = row.outer, row.inner, best.shape[2] - 1
    if not is_before(value, at, values[i, j, rank], best[i, j, rank]):
        return
    while rank > 0 and is_before(value, at, values[i, j, rank - 1], best[i, j, rank - 1]):
        values[i, j, rank], best[i, j, rank] = values[i, j, rank - 1], best[i, j, rank - 1]
        rank -= 1
    values[i, j, rank], best[i, j, rank] = value, at


# ---- over rows: labels and weights before a loss, sums behind it. In float64, as on the CPU: a number or two a row. ----


@device
def is_masked(where, outer, label, inner):
    """Whether a label is masked out, in a row with other classes."""
    if where is None:
        return False
    else:
        masked = not where[outer, label, inner]
        others = False
        if masked:
            for c in range(where.shape[1]):
                others = others or where[outer, c, inner]
        return masked and others


@cuda.jit
def clear(status):
    status[0], status[1] = 0, 0


@cuda.jit
def check_labels(labels, classes, ignore_index, where, status):
    """status[0] = 1 where a label is bad. All threads that write it write the same."""
    outer, picks, inner = labels.shape
    at = cuda.grid(1)
    if at < outer * picks * inner:
        i, rest = at // (picks * inner), at % (picks * inner)
        j = rest % inner
        label = np.int64(labels[i, rest // inner, j])
        if not is_ignored(label, ignore_index) and (label < 0 or label >= classes or is_masked(where, i, label, j)):
            status[0] = 1


@cuda.jit
def check_finite(numbers, status):
    at, inner = cuda.grid(1), numbers.shape[1]
    if at < numbers.shape[0] * inner:
        number = numbers[at // inner, at % inner]
        if number - number != 0:
            status[0] = 1


@device
def join_threads(room, value):
    """The sum over the threads of a block."""
    at = cuda.threadIdx.x
    room[at] = value
    cuda.syncthreads()
    step = THREADS // 2
    while step > 0:
        if at < step:
            room[at] += room[at + step]
        cuda.syncthreads()
        step //= 2
    return room[0]


@cuda.jit
def sum_losses(losses, partial):
    """The sums of ROWS rows each."""
    room = cuda.shared.array(THREADS, types.float64)
    rows, inner = losses.shape[0] * losses.shape[1], losses.shape[1]
    total = 0.0
    for at in range(cuda.blockIdx.x * ROWS + cuda.threadIdx.x, min(rows, (cuda.blockIdx.x + 1) * ROWS), THREADS):
        total += losses[at // inner, at % inner]
    partial[cuda.blockIdx.x] = join_threads(room, total)


@device
def weight_of_row(labels, ignore_index, sample_weight, weight, weighted, outer, inner):
    """What a row counts for in a mean; unless `weighted` 1 or 0."""
    number = 1.0
    if sample_weight is not None:
        number = float(sample_weight[outer, inner])
        if not weighted:
            number = 1.0 if number != 0 else 0.0
    if labels is not None:
        label = np.int64(labels[outer, inner])
        if is_ignored(label, ignore_index):
            number = 0.0
        elif weight is not None:
            number *= weight[label] if 0 <= label < weight.size else 0.0
    return number


@cuda.jit
def sum_weights(rows, inner, labels, ignore_index, sample_weight, weight, weighted, partial):
    room = cuda.shared.array(THREADS, types.float64)
    total = 0.0
    for at in range(cuda.blockIdx.x * ROWS + cuda.threadIdx.x, min(rows, (cuda.blockIdx.x + 1) * ROWS), THREADS):
        total += weight_of_row(labels, ignore_index, sample_weight, weight, weighted, at // inner, at % inner)
    partial[cuda.blockIdx.x] = join_threads(room, total)


@device
def sum_partial(partial, room):
    total = 0.0
    for at in range(cuda.threadIdx.x, partial.size, THREADS):
        total += partial[at]
    return join_threads(room, total)


@cuda.jit
def invert_total(partial, denominator, inverse, status):
    """A mean's denominator, and its inverse as a pair; 0 and status[1] = 1 where nothing counts."""
    room = cuda.shared.array(THREADS, types.float64)
    total = sum_partial(partial, room)
    if cuda.threadIdx.x == 0:
        denominator[0] = total
        inverse[0], inverse[1] = 0.0, 0.0
        if total - total != 0:
            status[0] = 1
        elif total == 0:
            status[1] = 1
        else:
            inverse[0] = 1.0 / total
            inverse[1] = cuda.fma(-total, float(inverse[0]), 1.0) / total


@cuda.jit
def reduce_total(partial, known, denominator, mean, result, status):
    """The sum of the losses over the denominator, which is `known`, or made by `invert_total`."""
    room = cuda.shared.array(THREADS, types.float64)
    total = sum_partial(partial, room)
    divisor = known
    if denominator is not None:
        divisor = denominator[0]
    if cuda.threadIdx.x == 0 and status[0] == 0:
        if divisor != 0:
            result[0] = total / divisor
        else:
            result[0] = math.nan if mean else 0.0


# ---- the kernels of rows ----


@cache
def kernels_of(name):
    """Those for rows of a dtype: an operation above each, with its shared memory."""
    k, real = (_F64, types.float64) if name == "float64" else (_F32, types.float32)
    element = {"float16": types.float16, "bfloat16": types.uint16}.get(name, real)

    wide = element is real

    @cuda.jit
    def softmax_kernel(plan, x, where, t, log, out, sums):
        tile = cuda.shared.array(0, element, VECTOR_BYTES)
        room = cuda.shared.array(ROOM, real)
        softmax(k, plan, x, where, t, log, out, sums, wide, tile, room)

    @cuda.jit
    def selective_log_softmax_kernel(plan, x, indices, t, status, out):
        tile = cuda.shared.array(0, element, VECTOR_BYTES)
        room = cuda.shared.array(ROOM, real)
        selective_log_softmax(k, plan, x, indices, t, status, out, tile, room)

    @cuda.jit
    def cross_entropy_kernel(plan, numbers, x, options, t, status, losses, grad):
        tile = cuda.shared.array(0, element, VECTOR_BYTES)
        room = cuda.shared.array(ROOM, real)
        cross_entropy(k, plan, numbers, x, options, t, status, losses, grad, wide, tile, room)

    @cuda.jit
    def backward_kernel(plan, p, grad, log, out):
        tile = cuda.shared.array(0, element, VECTOR_BYTES)
        room = cuda.shared.array(ROOM, real)
        backward(k, plan, p, grad, log, out, tile, room)

    @cuda.jit
    def score_kernel(plan, x, labels, t, status, outputs):
        tile = cuda.shared.array(0, element, VECTOR_BYTES)
        room = cuda.shared.array(ROOM, real)
        seats = cuda.shared.array(THREADS, types.int64)
        score(k, plan, x, labels, t, status, outputs, tile, room, seats)

    return SimpleNamespace(
        softmax=softmax_kernel,
        selective_log_softmax=selective_log_softmax_kernel,
        cross_entropy=cross_entropy_kernel,
        backward=backward_kernel,
        score=score_kernel,
    )
