"""The CUDA kernels: the mathematics of rows that lie on a GPU.

A row belongs to LANES threads of a block, a power of two that depends on its length alone. They copy it into shared memory, a
tile at a time, and go over the tile there: a row that fits into one tile is read once, a longer one once more for an output of
its size. Sums are pairs, added lane by lane and joined as a tree: a row's bits do not depend on the rows around it.

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

THREADS = 256  # of a block, at most: the size of the room that lanes are joined in
ROOM = 2 * THREADS  # of numbers: a pair a thread
ROWS = 4096  # whose numbers one block adds
VECTOR_BYTES = 16  # the widest access

# What a kernel is told beside arrays. Plan: elements of a tile, and between the tiles of two rows; whether the class axis is
# strided; and which of the logits, their companion and the output lie so that 16 bytes are moved at once.
Plan = namedtuple("Plan", "tile pitch strided logits_whole other_whole out_whole")
Cap = namedtuple("Cap", "softcap inverse inverse_lo lowest")
LossNumbers = namedtuple("LossNumbers", "inverse inverse_lo label_smoothing z_loss scale scale_lo")
LossOptions = namedtuple(
    "LossOptions", "where probabilities labels ignore_index weight sample_weight loss_grad inverse cap", defaults=[None] * 9
)

Row = namedtuple("Row", "outer inner there lane lanes seat start other")
Sums = namedtuple("Sums", "mass mass_lo dot dot_lo")  # of q and q (maximum - x)
Gathered = namedtuple("Gathered", "maximum total total_lo count targets even")


class _Nothing:
    """How an option that is not used is passed to a kernel: Numba compiles for None, and knows no way to pass it."""

    @staticmethod
    def prepare_args(kind, value, stream, retr):
        return (types.CPointer(types.void), 0) if kind == types.none else (kind, value)


def device(function):
    return cuda.jit(device=True)(function)


def kernel(function):
    compiled = cuda.jit(function)
    compiled.extensions.append(_Nothing)
    return compiled


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


@intrinsic
def copy_vector(typingctx, target, target_at, source, source_at):
    """Copies 16 bytes from source[source_at] on to target[target_at] on, both aligned."""

    def codegen(context, builder, signature, args):
        vector = ir.VectorType(ir.IntType(32), 4)
        places = []
        for kind, array, index in ((target, *args[:2]), (source, *args[2:])):
            indices = cgutils.unpack_tuple(builder, index) if kind.ndim > 1 else [index]
            array = context.make_array(kind)(context, builder, array)
            place = cgutils.get_item_pointer(context, builder, kind, array, indices)
            place = builder.bitcast(place, vector.as_pointer())
            places.append(builder.addrspacecast(place, vector.as_pointer(nvvm.ADDRSPACE_GLOBAL)) if kind.ndim > 1 else place)
        builder.store(builder.load(places[1], align=VECTOR_BYTES), places[0], align=VECTOR_BYTES)
        return context.get_dummy_value()

    return types.void(target, target_at, source, source_at), codegen


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
    """(x - maximum) / temperature as a pair, t being 1 / temperature as one."""
    difference, difference_lo = two_sum(x, -maximum)
    hi = mul(difference, t[0])
    return hi, cuda.fma(difference, t[0], -hi) + cuda.fma(difference, t[1], mul(difference_lo, t[0]))


@device
def exp_tail(k, r):
    q = k.exp_tail[0]
    for coefficient in k.exp_tail[1:]:
        q = cuda.fma(q, r, coefficient)
    return q


@device
def reduce(k, hi, lo):
    """r, n and n as `scale_of` wants it, with hi + lo = n ln 2 + r."""
    shifted = cuda.fma(hi, k.log2_e, k.round_shift)
    n = shifted - k.round_shift
    return cuda.fma(n, -k.ln2_hi, hi) + cuda.fma(n, -k.ln2_lo, lo), n, shifted


@device
def exp_scaled(k, hi, lo):
    """exp(hi + lo) * EXP_SCALE, for hi <= 0."""
    r, _, shifted = reduce(k, hi, lo)
    value = cuda.fma(cuda.fma(exp_tail(k, r), r, k.one), r, k.one) * scale_of(shifted)
    return k.zero if hi < k.exp_lowest else value


@device
def exp_pair(k, hi, lo):
    """exp(hi + lo) as a pair."""
    r, _, shifted = reduce(k, hi, lo)
    s, r_lo = two_sum(r, mul(exp_tail(k, r), mul(r, r)))
    total, total_lo = fast_two_sum(k.one, s)
    scale = scale_of(shifted) / k.exp_scale
    if hi < k.exp_lowest:
        return k.zero, k.zero
    return total * scale, (total_lo + r_lo) * scale


@device
def term(k, x, maximum, t):
    """exp((x - maximum) / temperature) * EXP_SCALE."""
    hi, lo = exponent(x, maximum, t)
    return exp_scaled(k, hi, lo)


@device
def log1p_pair(k, hi, lo):
    one, one_lo = two_sum(k.one, hi)
    n = power_of(one)
    down = scale_of(k.round_shift - n) / k.exp_scale
    f = one * down
    z, z_lo = fast_two_sum(f - k.one, (one_lo + lo) * down)
    s = z / (k.two + z)
    half = k.half * z
    square = mul(half, z)
    w = mul(s, s)
    tail = k.atanh_tail[0]
    for coefficient in k.atanh_tail[1:]:
        tail = cuda.fma(tail, w, coefficient)
    rest = s * (square + w * tail) - cuda.fma(half, z, -square) + z_lo / f
    a, a_lo = fast_two_sum(z, -square)
    b, b_lo = two_sum(n * k.ln2_hi, a)
    return fast_two_sum(b, cuda.fma(n, k.ln2_lo, rest + (a_lo + b_lo)))


@device
def tanh(k, v):
    """tanh(|x|) and its derivative, from v = -2 |x| in [-40, 0]."""
    r, _, shifted = reduce(k, v, k.zero)
    scale = scale_of(shifted) / k.exp_scale
    p = cuda.fma(exp_tail(k, r), mul(r, r), r)
    m, z = cuda.fma(scale, p, scale - k.one), cuda.fma(scale, p, scale)
    return -m / (k.two + m), (k.two * k.two * z) / ((k.one + z) * (k.one + z))


@device
def capped(k, x, cap):
    """softcap tanh(x / (temperature softcap)), and its derivative but for 1 / temperature."""
    size = max(cap.lowest, -abs(x))
    value, slope = tanh(k, cuda.fma(size, cap.inverse, size * cap.inverse_lo))
    value = mul(cap.softcap, value)
    return -value if x < k.zero else value, slope


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
def place(plan, x):
    """The row and the lane of this thread. Neighbouring threads read what lies side by side: classes, or else rows."""
    if plan.strided:
        lane, lanes, row, rows = cuda.threadIdx.y, cuda.blockDim.y, cuda.threadIdx.x, cuda.blockDim.x
    else:
        lane, lanes, row, rows = cuda.threadIdx.x, cuda.blockDim.x, cuda.threadIdx.y, cuda.blockDim.y
    number = cuda.blockIdx.x * rows + row
    there = number < x.shape[0] * x.shape[2]
    outer = number // x.shape[2] if there else 0
    inner = number - outer * x.shape[2] if there else 0
    return Row(outer, inner, there, lane, lanes, row * lanes + lane, row * plan.pitch, (rows + row) * plan.pitch)


@device
def length(plan, row, classes, first):
    """Of the tile that begins at class `first`; none for threads beyond the last row, which only wait with the others."""
    return min(plan.tile, classes - first) if row.there else 0


@device
def load(tile, at, whole, x, row, first, n):
    """The tile that begins at class `first` into shared memory."""
    per = VECTOR_BYTES // tile.itemsize
    done = n // per * per if whole else 0
    for c in range(row.lane * per, done, row.lanes * per):
        copy_vector(tile, at + c, x, (row.outer, first + c, row.inner))
    for c in range(done + row.lane, n, row.lanes):
        tile[at + c] = x[row.outer, first + c, row.inner]


@device
def store(tile, at, whole, x, row, first, n):
    per = VECTOR_BYTES // tile.itemsize
    done = n // per * per if whole else 0
    for c in range(row.lane * per, done, row.lanes * per):
        copy_vector(x, (row.outer, first + c, row.inner), tile, at + c)
    for c in range(done + row.lane, n, row.lanes):
        x[row.outer, first + c, row.inner] = tile[at + c]


@device
def load_both(plan, tile, row, x, other, first, n):
    """A tile of the logits and, where there is one, of the array beside them."""
    load(tile, row.start, plan.logits_whole, x, row, first, n)
    if other is not None:
        load(tile, row.other, plan.other_whole, other, row, first, n)
    cuda.syncthreads()


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


# ---- joining the lanes of a row: a tree in shared memory, the same for every row of a length ----


@device
def join_largest(room, row, value):
    room[row.seat] = value
    cuda.syncthreads()
    step = row.lanes // 2
    while step > 0:
        if row.lane < step and room[row.seat + step] > room[row.seat]:
            room[row.seat] = room[row.seat + step]
        cuda.syncthreads()
        step //= 2
    value = room[row.seat - row.lane]
    cuda.syncthreads()
    return value


@device
def join_lanes(k, room, row, pair):
    room[row.seat], room[THREADS + row.seat] = pair
    cuda.syncthreads()
    step = row.lanes // 2
    while step > 0:
        if row.lane < step:
            at = row.seat + step
            mine, other = (room[row.seat], room[THREADS + row.seat]), (room[at], room[THREADS + at])
            room[row.seat], room[THREADS + row.seat] = join(k, mine, other)
        cuda.syncthreads()
        step //= 2
    first = row.seat - row.lane
    hi, lo = room[first], room[THREADS + first]
    cuda.syncthreads()
    return hi, lo


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
def move(sums, difference):
    """For a maximum that is larger by a pair."""
    dot, dot_lo = plus((sums.dot, sums.dot_lo), times((sums.mass, sums.mass_lo), difference))
    return Sums(sums.mass, sums.mass_lo, dot, dot_lo)


@device
def gather(k, plan, row, x, other, where, weight, cap, t, spread, tile, room):
    """The maximum of a row, the sum of the other exponentials as a pair, and with `other` (probabilities) or `spread` (label
    smoothing) the sums that losses need. Each tile moves what was summed before to the maximum so far."""
    maximum, reference = -k.infinity, k.zero  # the latter is finite
    total, total_lo, ones, count = k.zero, k.zero, k.zero, k.zero
    targets = even = Sums(k.zero, k.zero, k.zero, k.zero)
    classes = x.shape[1]
    for first in range(0, classes, plan.tile):
        n = length(plan, row, classes, first)
        load_both(plan, tile, row, x, other, first, n)
        largest = maximum
        for c in range(row.lane, n, row.lanes):
            value = logit(k, tile, row.start + c, cap)
            if kept(where, row, first + c) and value > largest:
                largest = value
        largest = join_largest(room, row, largest)
        if largest > maximum:
            hi, lo = exponent(maximum, largest, t)
            factor = exp_pair(k, hi, lo)
            before = times((total, total_lo), factor)
            total, total_lo = plus(before, (ones * factor[0] * k.exp_scale, ones * factor[1] * k.exp_scale))
            ones = k.zero
            difference = two_sum(largest if finite(k, largest) else k.zero, -reference)
            targets, even = move(targets, difference), move(even, difference)
            maximum, reference = largest, reference + difference[0]
        for c in range(row.lane, n, row.lanes):
            if kept(where, row, first + c):
                value = logit(k, tile, row.start + c, cap)
                count += k.one
                if value == maximum:  # exact, and one of them is left out of the sum
                    ones += k.one
                else:
                    total, rest = two_sum(total, term(k, value, maximum, t))
                    total_lo += rest
                if other is not None:
                    q = widen(k, tile[row.other + c]) * weight_at(k, weight, first + c)
                    targets = weigh(k, targets, q, value, reference)
                if spread:
                    even = weigh(k, even, weight_at(k, weight, first + c), value, reference)
        cuda.syncthreads()
    total, total_lo = join_lanes(k, room, row, (total, total_lo))
    ones, ones_lo = join_lanes(k, room, row, (ones, k.zero))
    hi, lo = two_sum(total / k.exp_scale, ones - k.one)
    lo += total_lo / k.exp_scale + ones_lo
    count = join_lanes(k, room, row, (count, k.zero))[0]
    if other is not None:
        targets = join_sums(k, room, row, targets)
    if spread:
        even = join_sums(k, room, row, even)
    return Gathered(maximum, hi, lo, count, targets, even)


@device
def finish(k, g):
    """log1p of the sum as a pair, then the scaled reciprocal of the whole sum as one. Without a finite logit they are NaN."""
    poison = g.maximum - g.maximum
    whole, whole_lo = two_sum(k.one, g.total)
    whole, whole_lo = whole + poison, whole_lo + g.total_lo
    reciprocal = k.one / whole
    residual = cuda.fma(-whole, reciprocal, k.one) - whole_lo * reciprocal
    log1p, log1p_lo = log1p_pair(k, g.total, g.total_lo)
    return log1p + poison, log1p_lo, reciprocal / k.exp_scale, residual * reciprocal / k.exp_scale


@device
def log_sum(k, g, f, t):
    if finite(k, g.maximum):
        return rounded(k, plus(times((g.maximum, k.zero), t), (f[0], f[1])))
    return g.maximum if g.total == g.total else g.total


@device
def probability(k, x, g, f, t):
    e = term(k, x, g.maximum, t)
    return cuda.fma(e, f[2], e * f[3])


@device
def log_probability(k, x, g, f, t):
    hi, lo = exponent(x, g.maximum, t)
    return rounded(k, plus((hi, lo), (-f[0], -f[1])))


# ---- operations; each has a kernel of its name below ----


@device
def softmax(k, plan, x, where, t, log, out, sums, tile, room):
    """softmax or log_softmax to `out`, logsumexp to `sums`."""
    row = place(plan, x)
    g = gather(k, plan, row, x, None, where, None, None, t, False, tile, room)
    f = finish(k, g)
    if sums is not None and row.there and row.lane == 0:
        sums[row.outer, row.inner] = log_sum(k, g, f, t)
    if out is not None:
        last = (x.shape[1] - 1) // plan.tile * plan.tile
        for first in range(last, -1, -plan.tile):
            n = length(plan, row, x.shape[1], first)
            if first < last:  # the last tile is still there
                load_both(plan, tile, row, x, None, first, n)
            for c in range(row.lane, n, row.lanes):
                value = widen(k, tile[row.start + c])
                if kept(where, row, first + c):
                    value = log_probability(k, value, g, f, t) if log else probability(k, value, g, f, t)
                else:
                    value = -k.infinity if log else k.zero
                put(tile, row.start + c, value)
            cuda.syncthreads()
            store(tile, row.start, plan.out_whole, out, row, first, n)
            cuda.syncthreads()


@device
def selective_log_softmax(k, plan, x, indices, t, status, out, tile, room):
    """The log-probabilities of some classes, unless an index is bad."""
    row = place(plan, x)
    g = gather(k, plan, row, x, None, None, None, None, t, False, tile, room)
    f = finish(k, g)
    if row.there and status[0] == 0:
        for j in range(row.lane, indices.shape[1], row.lanes):
            value = widen(k, x[row.outer, indices[row.outer, j, row.inner], row.inner])
            put(out, (row.outer, j, row.inner), log_probability(k, value, g, f, t))


@device
def close_loss(k, numbers, g, f, t, targets, sample_weight, loss_grad, inverse):
    """The loss of a row, and for its gradient the factor of the terms, and those of q and of each class's weight."""
    log1p, smoothing = (f[0], f[1]), numbers.label_smoothing
    keep, even = (k.one - smoothing, k.zero), (smoothing / g.count, k.zero)
    dot, mass = (targets.dot, targets.dot_lo), (targets.mass, targets.mass_lo)
    loss, slope = plus(times(dot, t), times(mass, log1p)), times(keep, mass)
    # where keep is 0, an infinite loss counts for nothing
    loss = times(keep, loss) if keep[0] != k.zero else (k.zero, k.zero)
    if smoothing != k.zero:
        dot, mass = (g.even.dot, g.even.dot_lo), (g.even.mass, g.even.mass_lo)
        loss = plus(loss, times(even, plus(times(dot, t), times(mass, log1p))))
        slope = plus(slope, times(even, mass))
    if numbers.z_loss != k.zero:
        log_sum = plus(times((g.maximum, k.zero), t), log1p)
        product = times((numbers.z_loss, k.zero), log_sum)
        loss, slope = plus(loss, times(product, log_sum)), plus(slope, times((k.two, k.zero), product))
    loss = times((loss[0] + k.zero * f[0], loss[1]), (sample_weight, k.zero))  # a NaN shows even where nothing counts
    outer = times(times((numbers.scale, numbers.scale_lo), (sample_weight, k.zero)), (loss_grad, k.zero))
    outer = times(outer, inverse)
    main, rest = times(outer, keep), times(outer, even)
    factor = times(times(outer, slope), (f[2], f[3]))
    return rounded(k, loss), factor, main[0] + main[1], rest[0] + rest[1]


@device
def write_slopes(k, plan, row, x, probabilities, where, weight, cap, t, g, loss, label, nothing, grad, tile):
    """factor e - (keep q + even) of every class, times the derivative of the softcap; 0 where `nothing` counts."""
    _, factor, keep, even = loss
    last = (x.shape[1] - 1) // plan.tile * plan.tile
    for first in range(last, -1, -plan.tile):
        n = length(plan, row, x.shape[1], first)
        if first < last:
            load_both(plan, tile, row, x, probabilities, first, n)
        for c in range(row.lane, n, row.lanes):
            value, slope = widen(k, tile[row.start + c]), k.one
            if cap is not None:
                value, slope = capped(k, value, cap)
            e, of_class = term(k, value, g.maximum, t), weight_at(k, weight, first + c)
            minus = of_class * even
            if probabilities is not None:
                minus = cuda.fma(widen(k, tile[row.other + c]) * of_class, keep, minus)
            elif first + c == label:
                minus = cuda.fma(of_class, keep, minus)
            value = cuda.fma(e, factor[0], cuda.fma(e, factor[1], -minus)) * slope
            put(tile, row.start + c, k.zero if nothing or not kept(where, row, first + c) else value)
        cuda.syncthreads()
        store(tile, row.start, plan.out_whole, grad, row, first, n)
        cuda.syncthreads()


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
def cross_entropy(k, plan, numbers, x, options, status, losses, grad, tile, room):
    """The losses of rows, and their gradient where `grad` is given, unless a label is bad."""
    row, o = place(plan, x), options
    t, spread = (numbers.inverse, numbers.inverse_lo), numbers.label_smoothing != k.zero
    g = gather(k, plan, row, x, o.probabilities, o.where, o.weight, o.cap, t, spread, tile, room)
    f = finish(k, g)
    bad, targets = status[0] != 0, g.targets
    label, ignored = label_at(row, o.labels, o.ignore_index)
    nothing = ignored or g.count == k.zero
    if label >= 0 and row.there and not nothing and not bad:
        targets = of_label(k, row, x, o.weight, o.cap, label, g.maximum if finite(k, g.maximum) else k.zero)
    inverse = pair_in(k, o.inverse)
    loss = close_loss(k, numbers, g, f, t, targets, of_row(k, o.sample_weight, row), of_row(k, o.loss_grad, row), inverse)
    if row.there and row.lane == 0 and not bad:
        losses[row.outer, row.inner] = k.zero if nothing else loss[0]
    if grad is not None and not bad:
        nothing = nothing or inverse[0] == k.zero
        write_slopes(k, plan, row, x, o.probabilities, o.where, o.weight, o.cap, t, g, loss, label, nothing, grad, tile)


@device
def backward(k, plan, p, grad, log, out, tile, room):
    """p (g - sum(g p)), or with `log` g - exp(log p) sum(g)."""
    row = place(plan, p)
    sums = k.zero, k.zero
    for first in range(0, p.shape[1], plan.tile):
        n = length(plan, row, p.shape[1], first)
        load_both(plan, tile, row, p, grad, first, n)
        for c in range(row.lane, n, row.lanes):
            g, at = widen(k, tile[row.other + c]), k.one if log else widen(k, tile[row.start + c])
            product = mul(g, at)
            sums = plus(sums, (product, cuda.fma(g, at, -product)))
        cuda.syncthreads()
    hi, lo = join_lanes(k, room, row, sums)
    lo = lo if finite(k, hi) else k.zero
    last = (p.shape[1] - 1) // plan.tile * plan.tile
    for first in range(last, -1, -plan.tile):
        n = length(plan, row, p.shape[1], first)
        if first < last:
            load_both(plan, tile, row, p, grad, first, n)
        for c in range(row.lane, n, row.lanes):
            at, g = widen(k, tile[row.start + c]), widen(k, tile[row.other + c])
            if log:
                e = exp_scaled(k, at, k.zero)
                value = cuda.fma(e, -hi / k.exp_scale, cuda.fma(e, -lo / k.exp_scale, g))
            else:
                difference, rest = two_sum(g, -hi)
                value = at * (difference + (rest - lo))
            put(tile, row.start + c, value)
        cuda.syncthreads()
        store(tile, row.start, plan.out_whole, out, row, first, n)
        cuda.syncthreads()


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
    row = place(plan, x)
    g = gather(k, plan, row, x, None, None, None, None, t, False, tile, room)
    f = finish(k, g)
    writes = row.there and row.lane == 0 and status[0] == 0
    classes = x.shape[1]
    sums = k.zero, k.zero
    # The logits of the best classes so far are kept where their probabilities belong.
    for j in range(best.shape[2] if writes else 0):
        best[row.outer, row.inner, j], chances[row.outer, row.inner, j] = classes, -k.infinity
    for first in range(0, classes, plan.tile):
        n = length(plan, row, classes, first)
        if classes > plan.tile:
            load_both(plan, tile, row, x, None, first, n)
        for c in range(row.lane, n, row.lanes):
            value = widen(k, tile[row.start + c])
            hi, lo = exponent(value, g.maximum, t)
            e = exp_scaled(k, hi, lo)
            sums = plus(sums, (k.zero if e == k.zero else -hi * e, k.zero))
        value, at = k.zero, -1
        for _ in range(best.shape[2]):
            value, at = next_best(k, row, classes, first, n, value, at, tile, room, seats)
            if writes:
                insert(best, chances, row, value, at)
    sums = join_lanes(k, room, row, sums)
    if writes:
        logsumexp[row.outer, row.inner] = log_sum(k, g, f, t)
        entropy[row.outer, row.inner] = f[0] + (sums[0] + sums[1]) * f[2]
        for j in range(best.shape[2]):
            chances[row.outer, row.inner, j] = probability(k, chances[row.outer, row.inner, j], g, f, t)
        at = best[row.outer, row.inner, 0]
        prediction[row.outer, row.inner], confidence[row.outer, row.inner] = at, chances[row.outer, row.inner, 0]
        if labels is not None:
            label = np.int64(labels[row.outer, row.inner])
            of_class = widen(k, x[row.outer, label, row.inner])
            losses[row.outer, row.inner] = k.zero - log_probability(k, of_class, g, f, t)
            correct[row.outer, row.inner] = at == label


@device
def next_best(k, row, classes, first, n, last_value, last, tile, room, seats):
    """The best class of a tile behind `last`, or of all of it where that is -1; `classes` where there is none."""
    largest, at = -k.infinity, classes
    for c in range(row.lane, n, row.lanes):
        value = widen(k, tile[row.start + c])
        behind = last < 0 or is_before(last_value, last, value, first + c)
        if behind and is_before(value, first + c, largest, at):
            largest, at = value, first + c
    room[row.seat], seats[row.seat] = largest, at
    cuda.syncthreads()
    step = row.lanes // 2
    while step > 0:
        other = row.seat + step
        if row.lane < step and is_before(room[other], seats[other], room[row.seat], seats[row.seat]):
            room[row.seat], seats[row.seat] = room[other], seats[other]
        cuda.syncthreads()
        step //= 2
    largest, at = room[row.seat - row.lane], seats[row.seat - row.lane]
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


@kernel
def clear(status):
    status[0], status[1] = 0, 0


@kernel
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


@kernel
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


@kernel
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


@kernel
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


@kernel
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


@kernel
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

    @kernel
    def softmax_kernel(plan, x, where, t, log, out, sums):
        tile = cuda.shared.array(0, element, VECTOR_BYTES)
        room = cuda.shared.array(ROOM, real)
        softmax(k, plan, x, where, t, log, out, sums, tile, room)

    @kernel
    def selective_log_softmax_kernel(plan, x, indices, t, status, out):
        tile = cuda.shared.array(0, element, VECTOR_BYTES)
        room = cuda.shared.array(ROOM, real)
        selective_log_softmax(k, plan, x, indices, t, status, out, tile, room)

    @kernel
    def cross_entropy_kernel(plan, numbers, x, options, status, losses, grad):
        tile = cuda.shared.array(0, element, VECTOR_BYTES)
        room = cuda.shared.array(ROOM, real)
        cross_entropy(k, plan, numbers, x, options, status, losses, grad, tile, room)

    @kernel
    def backward_kernel(plan, p, grad, log, out):
        tile = cuda.shared.array(0, element, VECTOR_BYTES)
        room = cuda.shared.array(ROOM, real)
        backward(k, plan, p, grad, log, out, tile, room)

    @kernel
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
