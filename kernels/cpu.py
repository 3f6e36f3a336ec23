"""The CPU backend compiled by Numba: the C backend's algorithms, step by step, with the same bits.

`c/exp.inc.h` derives the elementary functions, `c/rows.inc.h` defines the canonical reduction tree;
names are the same. There is no fast-math, and without it LLVM does not vectorise floating-point
reductions. So the kernels are written in lines, vectors of LANES numbers (64 bytes, one AVX-512
register); the same mathematics serves a number and a line. It is one file because Numba's cache
looks for changes only in the file of the function that it compiles.
"""

import hashlib
import itertools
import math
import operator
import pickle
import threading
from collections import namedtuple
from contextlib import suppress
from functools import cache

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.compiler_lock import global_compiler_lock as compiling
from numba.core.imputils import impl_ret_borrowed, lower_getattr_generic
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import intrinsic, models, overload, register_model
from numba.np.arrayobj import populate_array

REALS = np.dtype(np.float32), np.dtype(np.float64)  # that are computed in
HALVES = np.dtype(np.float16), np.dtype("bfloat16")  # whose bits are taken as uint16; ml_dtypes has made the second known
DTYPES = frozenset(REALS + HALVES)

# nogil: a serial call holds up nobody. error_model: a division by zero is an infinity.
OPTIONS = {"fastmath": False, "error_model": "numpy", "nogil": True}

LINE_BYTES = 64
LINES = 4  # in a group
BLOCK_BYTES = 16384
TILE = 4096  # classes in a tile at most: a block of floats
TILES = 8  # that are moved together, as far as there is room
SLAB = TILE // 3  # classes in a tile at most, where there are two more of its size
SHORT_LINES = 10  # of rows for which tiles pay wherever they lie
SHORT_LINES_WHOLE = 7  # the same, where the result is as long as the row
TILE_BYTES = TILE * LINE_BYTES
SLAB_BYTES = SLAB * LINE_BYTES
GROUP_BYTES = LINES * LINE_BYTES
BATCH_BYTES = 4 * BLOCK_BYTES  # of rows that go through the steps together
HALVES_BYTES = 4 * BLOCK_BYTES  # of rows of half precision that are float32 together
TREE_BYTES = 16 * LINE_BYTES  # a line for each lane of the reduction tree
PIECE_ROWS = 16  # a whole tile of floats
ROW_NUMBERS_BYTES = 5 * LINE_BYTES  # of LANES losses
ROW_SUMS_BYTES = 8 * LINE_BYTES

# ---- the constants of c/kernel.c ----

Constants = namedtuple(
    "Constants",
    "zero one two half forty infinity nan most lanes block exp_scale exp_center exp_lowest small boost lift grid far "
    "one_shift round_shift log2_e ln2_hi ln2_lo exp_tail atanh_tail",
)


def _constants(real, exp_scale, exp_lowest, small, boost, lift, grid, far, round_shift, ln2, exp_tail, atanh_terms):
    def number(text):
        return real(float.fromhex(text))

    return Constants(
        zero=real(0),
        one=real(1),
        two=real(2),
        half=real(0.5),
        forty=real(40),
        infinity=real(np.inf),
        nan=real(np.nan),
        most=np.finfo(real).max,
        lanes=LINE_BYTES // np.dtype(real).itemsize,
        block=BLOCK_BYTES // np.dtype(real).itemsize,
        exp_scale=real(exp_scale),
        exp_center=real(0.0588915),
        exp_lowest=real(exp_lowest),
        small=real(small),
        boost=real(boost),
        lift=real(lift),
        grid=real(grid),
        far=real(far),
        one_shift=real(round_shift - math.log2(exp_scale)),
        round_shift=real(round_shift),
        log2_e=number(ln2[0]),
        ln2_hi=number(ln2[1]),
        ln2_lo=number(ln2[2]),
        exp_tail=tuple(map(number, exp_tail.split())),
        atanh_tail=tuple(real(2) / real(n) for n in range(2 * atanh_terms + 1, 1, -2)),
    )


_F32 = _constants(
    np.float32,
    exp_scale=2.0**64,
    exp_lowest=-132.35,
    small=2.0**-55,
    boost=2.0**40,
    lift=2.0**32,
    grid=1.5 * 2**23 * 2.0**-13,
    far=512,
    round_shift=1.5 * 2**23 + 127 + 64,
    ln2=("0x1.715476p+0", "0x1.62ep-1", "0x1.0bfbe8p-15"),
    exp_tail="0x1.7ba62p-10 0x1.11f8cp-7 0x1.554b7ep-5 0x1.5554cap-3 0.8p0",
    atanh_terms=5,
)

_F64 = _constants(
    np.float64,
    exp_scale=2.0**512,
    exp_lowest=-1063.9,
    small=2.0**-500,
    boost=2.0**400,
    lift=2.0**256,
    grid=1.5 * 2**52 * 2.0**-33,
    far=4096,
    round_shift=1.5 * 2**52 + 1023 + 512,
    ln2=("0x1.71547652b82fep+0", "0x1.62e42ffp-1", "-0x1.718432a1b0e26p-35"),
    exp_tail="0x1.c844a30b39d51p-26 0x1.2836eb1410fa8p-22 0x1.71d2725265220p-19 0x1.a019fbaa5e945p-16 "
    "0x1.a01a058ece44ap-13 0x1.6c16c1693b9d7p-10 0x1.11111110826ebp-7 0x1.555555555609bp-5 0x1.5555555555715p-3 0.8p0",
    atanh_terms=11,
)

# Of a cross entropy: c/api.cdef.h. A softcap of 0 is none.
LossNumbers = namedtuple("LossNumbers", "label_smoothing z_loss softcap temperature scale scale_lo")
# What a softcap does: see cap_of. What is summed over the classes beside exponentials, with mass and dot as pairs: see
# spread_block. A loss and what its gradient is made from: see close_loss.
Cap = namedtuple("Cap", "softcap inverse inverse_lo lowest")
Spread = namedtuple("Spread", "target count mass dot")
Loss = namedtuple("Loss", "value factor keep even")


# ---- lines ----


class Line(types.Type):
    """LANES numbers in a vector register."""

    def __init__(self, real):
        self.real = real
        self.lanes = LINE_BYTES * 8 // real.bitwidth
        super().__init__(f"Line({real})")


class Mask(types.Type):
    """LANES truth values."""

    def __init__(self, line):
        self.line = line
        super().__init__(f"Mask({line})")


@register_model(Line)
class _LineModel(models.PrimitiveModel):
    def __init__(self, manager, line):
        number = manager.lookup(line.real).get_value_type()
        super().__init__(manager, line, ir.VectorType(number, line.lanes))


@register_model(Mask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager, mask):
        super().__init__(manager, mask, ir.VectorType(ir.IntType(1), mask.line.lanes))


def _real(like):
    return like.real if isinstance(like, Line) else like


def _widest(*operands):
    return next((operand for operand in operands if isinstance(operand, Line)), operands[0])


def _spread(builder, value, to):
    """A number in every lane, where a line is wanted."""
    if value.type == to:
        return value
    single = builder.insert_element(ir.Constant(to, ir.Undefined), value, ir.IntType(32)(0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), to.count), [0] * to.count)
    return builder.shuffle_vector(single, single, lanes)


def _integer(like, value):
    """An integer constant as wide as a number, in every lane of a line."""
    integer = ir.IntType(_real(like).bitwidth)
    if not isinstance(like, Line):
        return integer(value)
    return ir.Constant(ir.VectorType(integer, like.lanes), [value] * like.lanes)


def _spell(builder, function, *arguments):
    """A function of LLVM on numbers, or on lines."""
    kind = arguments[0].type
    number, suffix = (kind.element, f"v{kind.count}") if isinstance(kind, ir.VectorType) else (kind, "")
    of_kind = ir.FunctionType(kind, [kind] * len(arguments))
    name = f"llvm.{function}.{suffix}{number.intrinsic_name}"
    return builder.call(cgutils.get_or_insert_function(builder.module, of_kind, name), arguments)


def _fma(builder, a, b, c):
    return _spell(builder, "fma", a, b, c)


class ConstantsType(types.Type):
    """The constants of a type, known while compiling; a tuple of them would be copied about."""

    def __init__(self, real):
        self.values = _F32 if real == types.float32 else _F64
        super().__init__(f"Constants({real})")


register_model(ConstantsType)(models.OpaqueModel)


@infer_getattr
class _ConstantsAttributes(AttributeTemplate):
    key = ConstantsType

    def generic_resolve(self, constants, name):
        return numba.typeof(getattr(constants.values, name))


@lower_getattr_generic(ConstantsType)
def _lower_constant(context, builder, constants, value, name):
    value = getattr(constants.values, name)
    return context.get_constant_generic(builder, numba.typeof(value), value)


@intrinsic
def constants(typingctx, like):
    """The constants of a number's or a line's type."""

    def codegen(context, builder, signature, args):
        return context.get_dummy_value()

    return ConstantsType(_real(like))(like), codegen


def _overload_operator(function, emit, compares=False):
    @intrinsic
    def apply(typingctx, a, b):
        line = _widest(a, b)

        def codegen(context, builder, signature, args):
            vector = context.get_value_type(line)
            return emit(builder, *(_spread(builder, value, vector) for value in args))

        return (Mask(line) if compares else line)(a, b), codegen

    @overload(function)
    def choose(a, b):
        if isinstance(a, Line) or isinstance(b, Line):
            return lambda a, b: apply(a, b)


for _function, _emit in (
    (operator.add, ir.IRBuilder.fadd),
    (operator.sub, ir.IRBuilder.fsub),
    (operator.mul, ir.IRBuilder.fmul),
    (operator.truediv, ir.IRBuilder.fdiv),
):
    _overload_operator(_function, _emit)
for _function, _comparison in (
    (operator.eq, "=="),
    (operator.lt, "<"),
    (operator.le, "<="),
    (operator.gt, ">"),
):
    _overload_operator(
        _function,
        lambda builder, a, b, comparison=_comparison: builder.fcmp_ordered(comparison, a, b),
        compares=True,
    )


@overload(operator.neg)
def _overload_neg(a):
    if isinstance(a, Line):
        return lambda a: negate(a)


@intrinsic
def negate(typingctx, line):
    return line(line), lambda context, builder, signature, args: builder.fneg(args[0])


@intrinsic
def select(typingctx, condition, a, b):
    """a where the condition holds, else b."""
    kind = condition.line if isinstance(condition, Mask) else _widest(a, b)

    def codegen(context, builder, signature, args):
        vector = context.get_value_type(kind)
        return builder.select(args[0], *(_spread(builder, value, vector) for value in args[1:]))

    return kind(condition, a, b), codegen


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c, rounded once."""
    kind = _widest(a, b, c)

    def codegen(context, builder, signature, args):
        vector = context.get_value_type(kind)
        return _fma(builder, *(_spread(builder, value, vector) for value in args))

    return kind(a, b, c), codegen


@intrinsic
def polynomial(typingctx, x, coefficients):
    """By Horner's rule with fma, the highest coefficient first."""

    def codegen(context, builder, signature, args):
        vector = context.get_value_type(x)
        value, *rest = (_spread(builder, c, vector) for c in cgutils.unpack_tuple(builder, args[1]))
        for coefficient in rest:
            value = _fma(builder, value, args[0], coefficient)
        return value

    return x(x, coefficients), codegen


@intrinsic
def polynomial_by_pairs(typingctx, x, square, coefficients):
    """The same by Estrin's rule, `square` being x * x."""

    def codegen(context, builder, signature, args):
        vector = context.get_value_type(x)
        c = [_spread(builder, c, vector) for c in cgutils.unpack_tuple(builder, args[2])]
        odd = len(c) % 2
        value = c[0] if odd else _fma(builder, c[0], args[0], c[1])
        for i in range(2 - odd, len(c), 2):
            value = _fma(builder, value, args[1], _fma(builder, c[i], args[0], c[i + 1]))
        return value

    return x(x, square, coefficients), codegen


@intrinsic
def with_sign(typingctx, a, b):
    """|a| with the sign of b."""
    kind = _widest(a, b)

    def codegen(context, builder, signature, args):
        vector = context.get_value_type(kind)
        return _spell(builder, "copysign", *(_spread(builder, value, vector) for value in args))

    return kind(a, b), codegen


@intrinsic
def scale_of(typingctx, shifted):
    """The number whose exponent field holds the lowest bits of `shifted`."""
    mantissa = np.finfo(str(_real(shifted))).nmant

    def codegen(context, builder, signature, args):
        zero = _integer(shifted, 0)
        scale = builder.shl(builder.bitcast(args[0], zero.type), _integer(shifted, mantissa))
        return builder.bitcast(scale, args[0].type)

    return shifted(shifted), codegen


@intrinsic
def power_of(typingctx, x):
    """(k, 2^-k) with x 2^-k in [sqrt(1/2), sqrt(2)), for finite x >= 1."""
    real = np.dtype(str(_real(x)))
    one, sqrt_half = (int(real.type(value).view(f"u{real.itemsize}")) for value in (1, np.sqrt(real.type(0.5))))
    mantissa = _integer(x, np.finfo(real).nmant)

    def codegen(context, builder, signature, args):
        bits = builder.sub(builder.bitcast(args[0], mantissa.type), _integer(x, sqrt_half))
        k = builder.lshr(bits, mantissa)
        down = builder.sub(_integer(x, one), builder.shl(k, mantissa))
        pair = builder.sitofp(k, args[0].type), builder.bitcast(down, args[0].type)
        return context.make_tuple(builder, signature.return_type, pair)

    return types.UniTuple(x, 2)(x), codegen


@intrinsic
def line_at(typingctx, x, index):
    """The line at x[index], x contiguous."""
    line = Line(x.dtype)

    def codegen(context, builder, signature, args):
        address = builder.gep(context.make_array(x)(context, builder, args[0]).data, [args[1]])
        vector = context.get_value_type(line)
        return builder.load(builder.bitcast(address, vector.as_pointer()), align=x.dtype.bitwidth // 8, typ=vector)

    return line(x, index), codegen


@intrinsic
def put_line(typingctx, x, index, line):
    """x[index] and on = line, x contiguous; a number goes to every lane."""

    def codegen(context, builder, signature, args):
        address = builder.gep(context.make_array(x)(context, builder, args[0]).data, [args[1]])
        value = _spread(builder, args[2], context.get_value_type(Line(x.dtype)))
        builder.store(value, builder.bitcast(address, value.type.as_pointer()), align=x.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(x, index, line), codegen


def _part(context, builder, x, data, index, size):
    """The address of x[index] as a line, its type, and a mask of the first `size` lanes."""
    address = builder.gep(context.make_array(x)(context, builder, data).data, [index])
    vector = context.get_value_type(Line(x.dtype))
    lanes = ir.VectorType(index.type, vector.count)
    first = builder.icmp_signed("<", ir.Constant(lanes, list(range(vector.count))), _spread(builder, size, lanes))
    return builder.bitcast(address, vector.as_pointer()), vector, first


@intrinsic
def part_at(typingctx, x, index, size, rest):
    """The line at x[index], of which only the first `size` lanes are read; the others are `rest`."""
    line = Line(x.dtype)

    def codegen(context, builder, signature, args):
        address, vector, first = _part(context, builder, x, *args[:3])
        align = ir.IntType(32)
        kind = ir.FunctionType(vector, [address.type, align, first.type, vector])
        name = f"llvm.masked.load.v{vector.count}{vector.element.intrinsic_name}.p0"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(function, [address, align(x.dtype.bitwidth // 8), first, _spread(builder, args[3], vector)])

    return line(x, types.intp, types.intp, rest), codegen


@intrinsic
def put_part(typingctx, x, index, size, line):
    """Writes the first `size` lanes of a line to x[index] and on."""

    def codegen(context, builder, signature, args):
        address, vector, first = _part(context, builder, x, *args[:3])
        align = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [vector, address.type, align, first.type])
        name = f"llvm.masked.store.v{vector.count}{vector.element.intrinsic_name}.p0"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        builder.call(function, [args[3], address, align(x.dtype.bitwidth // 8), first])
        return context.get_dummy_value()

    return types.void(x, types.intp, types.intp, line), codegen


@intrinsic
def everywhere(typingctx, mask):
    """Whether a mask holds in every lane."""

    def codegen(context, builder, signature, args):
        bits = ir.IntType(mask.line.lanes)
        return builder.icmp_unsigned("==", builder.bitcast(args[0], bits), bits(-1))

    return types.boolean(mask), codegen


@intrinsic
def anywhere(typingctx, mask):
    """Whether a mask holds in some lane."""

    def codegen(context, builder, signature, args):
        bits = ir.IntType(mask.line.lanes)
        return builder.icmp_unsigned("!=", builder.bitcast(args[0], bits), bits(0))

    return types.boolean(mask), codegen


@intrinsic
def count(typingctx, mask):
    """The number of lanes in which a mask holds."""

    def codegen(context, builder, signature, args):
        bits = builder.bitcast(args[0], ir.IntType(mask.line.lanes))
        return builder.zext(builder.ctpop(bits), context.get_value_type(types.intp))

    return types.intp(mask), codegen


@intrinsic
def number_like(typingctx, like, count):
    """A count as a number."""
    real = _real(like)

    def codegen(context, builder, signature, args):
        return builder.sitofp(args[1], context.get_value_type(real))

    return real(like, types.intp), codegen


@intrinsic(prefer_literal=True)
def rotate(typingctx, line, part):
    """The lanes moved down by LANES / part."""
    by = line.lanes // part.literal_value

    def codegen(context, builder, signature, args):
        lanes = [(lane + by) % line.lanes for lane in range(line.lanes)]
        return builder.shuffle_vector(args[0], args[0], ir.Constant(ir.VectorType(ir.IntType(32), line.lanes), lanes))

    return line(line, part), codegen


@intrinsic
def first_lane(typingctx, line):
    return line.real(line), lambda context, builder, signature, args: builder.extract_element(args[0], ir.IntType(32)(0))


@intrinsic
def every_lane(typingctx, number):
    line = Line(number)
    return line(number), lambda context, builder, signature, args: _spread(builder, args[0], context.get_value_type(line))


def _shuffled(builder, a, b, numbers):
    """A vector of elements of a and b, numbered through both."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(numbers)), list(numbers)))


def _zipped(builder, a, b, step, piece, first):
    """In each piece, `step` elements of a and of b by turns, from half of a piece, which starts at `first`."""
    lanes, numbers = a.type.count, []
    for start in range(first, lanes, piece):
        for n in range(start, start + piece // 2, step):
            numbers += [*range(n, n + step), *range(lanes + n, lanes + n + step)]
    return _shuffled(builder, a, b, numbers)


def _turned(builder, lines):
    """Lines of pieces of 16 bytes, in which rows become columns, or columns rows; as many as a piece has elements."""
    piece = len(lines)

    def zipped(a, b, step):
        return [_zipped(builder, a, b, step, piece, first) for first in (0, piece // 2)]

    if piece == 2:
        return zipped(*lines, 1)
    a, c = zipped(lines[0], lines[1], 1)
    b, d = zipped(lines[2], lines[3], 1)
    return [*zipped(a, b, 2), *zipped(c, d, 2)]


def _places(context, builder, array, value, i, c):
    """The addresses of pieces of 16 bytes: array[i + lane, c:, 0] for all lanes."""
    source = context.make_array(array)(context, builder, value)
    bits = array.dtype.bitwidth
    kind = ir.VectorType(context.get_data_type(array.dtype), 128 // bits).as_pointer()
    stride = builder.extract_value(source.strides, 0)
    offset = builder.add(builder.mul(i, stride), builder.mul(c, ir.Constant(c.type, bits // 8)))
    places = []
    for _ in range(LINE_BYTES * 8 // bits):
        places.append(builder.bitcast(cgutils.pointer_add(builder, source.data, offset), kind))
        offset = builder.add(offset, stride)
    return places


@intrinsic
def load_across(typingctx, x, c, array, i):
    """Lines of x from class c on: that class of array[i + lane, :, 0] for all lanes, and the others in the same 16 bytes."""

    def codegen(context, builder, signature, args):
        size = array.dtype.bitwidth // 8
        pieces = [builder.load(place, align=size) for place in _places(context, builder, array, args[2], args[3], args[1])]
        across, lanes = 16 // size, LINE_BYTES // size
        lines = []
        for k in range(across):
            joined = pieces[k::across]
            while len(joined) > 1:
                numbers = range(2 * joined[0].type.count)
                joined = [_shuffled(builder, *pair, numbers) for pair in zip(joined[::2], joined[1::2], strict=True)]
            lines += joined
        to = context.make_array(x)(context, builder, args[0]).data
        for k, line in enumerate(_turned(builder, lines)):
            index = builder.mul(builder.add(args[1], ir.Constant(args[1].type, k)), ir.Constant(args[1].type, lanes))
            builder.store(line, builder.bitcast(builder.gep(to, [index]), line.type.as_pointer()), align=size)
        return context.get_dummy_value()

    return types.void(x, types.intp, array, types.intp), codegen


@intrinsic
def store_across(typingctx, array, i, c, x):
    """The other way round."""

    def codegen(context, builder, signature, args):
        size = array.dtype.bitwidth // 8
        across, lanes = 16 // size, LINE_BYTES // size
        start, lines = context.make_array(x)(context, builder, args[3]).data, []
        kind = context.get_value_type(Line(x.dtype))
        for k in range(across):
            index = builder.mul(builder.add(args[2], ir.Constant(args[2].type, k)), ir.Constant(args[2].type, lanes))
            lines.append(builder.load(builder.bitcast(builder.gep(start, [index]), kind.as_pointer()), align=size))
        lines = _turned(builder, lines)
        for lane, place in enumerate(_places(context, builder, array, args[0], args[1], args[2])):
            first = lane // across * across
            line = lines[lane % across]
            builder.store(_shuffled(builder, line, line, range(first, first + across)), place, align=size)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, x), codegen


def _borrow(context, builder, kind, data, size, stride):
    """A one-dimensional view, without a reference: counting takes as long as a short row."""
    result = context.make_array(kind)(context, builder)
    populate_array(
        result,
        data=builder.bitcast(data, result.data.type),
        shape=[size],
        strides=[stride],
        itemsize=context.get_constant(types.intp, kind.dtype.bitwidth // 8),
        meminfo=None,
    )
    return result._getvalue()


@intrinsic(prefer_literal=True)
def scratch(typingctx, like, size):
    """An uninitialised array of `size` bytes on the stack, aligned to lines."""
    array = types.Array(like, 1, "C")
    count = size.literal_value * 8 // like.bitwidth

    def codegen(context, builder, signature, args):
        with builder.goto_entry_block():
            storage = builder.alloca(ir.ArrayType(context.get_data_type(like), count))
        storage.align = LINE_BYTES
        size, stride = (context.get_constant(types.intp, value) for value in (count, like.bitwidth // 8))
        return _borrow(context, builder, array, storage, size, stride)

    return array(like, size), codegen


@intrinsic
def strip(typingctx, array, i, first, j, size):
    """array[i, first : first + size, j]"""
    kind = types.Array(array.dtype, 1, "A", aligned=array.aligned)

    def codegen(context, builder, signature, args):
        source = context.make_array(array)(context, builder, args[0])
        strides = cgutils.unpack_tuple(builder, source.strides)
        data = source.data
        for index, stride in zip(args[1:4], strides, strict=True):
            data = cgutils.pointer_add(builder, data, builder.mul(index, stride))
        return _borrow(context, builder, kind, data, args[4], strides[1])

    return kind(array, types.intp, types.intp, types.intp, types.intp), codegen


@intrinsic
def borrowed(typingctx, array):
    """The same array without its reference; for arguments, which the caller keeps alive."""

    def codegen(context, builder, signature, args):
        result = context.make_array(array)(context, builder, args[0])
        result.meminfo = result.meminfo.type(None)
        return result._getvalue()

    return array(array), codegen


@intrinsic
def packed(typingctx, row):
    """The same row, known to be contiguous; its elements are aligned."""
    kind = types.Array(row.dtype, 1, "C")

    def codegen(context, builder, signature, args):
        source = context.make_array(row)(context, builder, args[0])
        size, stride = (builder.extract_value(value, 0) for value in (source.shape, source.strides))
        return _borrow(context, builder, kind, source.data, size, stride)

    return kind(row), codegen


@intrinsic
def section(typingctx, x, first, size):
    """x[first : first + size], x contiguous, without a reference."""

    def codegen(context, builder, signature, args):
        data = builder.gep(context.make_array(x)(context, builder, args[0]).data, [args[1]])
        stride = context.get_constant(types.intp, x.dtype.bitwidth // 8)
        return _borrow(context, builder, x, data, args[2], stride)

    return x(x, types.intp, types.intp), codegen


@intrinsic
def copy(typingctx, target, source, size):
    """target[:size] = source[:size], both contiguous, by memcpy: a loop took a twentieth longer."""

    def codegen(context, builder, signature, args):
        to, start = (
            context.make_array(kind)(context, builder, value).data for kind, value in ((target, args[0]), (source, args[1]))
        )
        cgutils.raw_memcpy(builder, to, start, args[2], source.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(target, source, types.intp), codegen


@intrinsic(prefer_literal=True)
def prefetch(typingctx, row, index, write):
    """Asks for the cache line of row[index], row contiguous, and where `write` is 1 for the right to write to it."""

    def codegen(context, builder, signature, args):
        address = builder.gep(context.make_array(row)(context, builder, args[0]).data, [args[1]])
        flag = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [builder.bitcast(address, cgutils.voidptr_t), flag(write.literal_value), flag(2), flag(1)])
        return context.get_dummy_value()

    return types.void(row, index, write), codegen


# Not called from Python: less to compile.
allocating = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, **OPTIONS}
# Without reference counts, which took longer than a short row: the callers own all arrays.
helper = njit(_nrt=False, **allocating)
# For what runs on every line: a call would put its vectors on the stack.
inlined = njit(_nrt=False, forceinline=True, **allocating)
# For what runs on every row with many arrays: passing them took 40 ns a call.
spread_out = njit(forceinline=True, **allocating)
allocating = njit(**allocating)


# ---- the elementary functions: c/exp.inc.h. A pair is hi + lo, unevaluated. ----


@inlined
def two_sum(a, b):
    hi = a + b
    b_seen = hi - a
    return hi, (a - (hi - b_seen)) + (b - b_seen)


@inlined
def fast_two_sum(a, b):
    hi = a + b
    return hi, b - (hi - a)


@inlined
def exponent(x, maximum, inverse, inverse_lo):
    difference, difference_lo = two_sum(x, -maximum)
    hi = difference * inverse
    return hi, fma(difference, inverse, -hi) + fma(difference, inverse_lo, difference_lo * inverse)


@inlined
def exp_less_one(at, a, b, lo, careful):
    """What makes scale * (1 + less_one), and scale: exp(a + b + lo) * EXP_SCALE, `at` near a + b + lo - EXP_CENTER and not
    below EXP_LOWEST."""
    k = constants(at)
    shifted = fma(at, k.log2_e, k.round_shift)
    n = shifted - k.round_shift
    high, low = a + fma(n, -k.ln2_hi, b), fma(n, -k.ln2_lo, lo)
    r = high + low
    square = r * r
    q = polynomial_by_pairs(r, square, k.exp_tail)
    return high + fma(q, square, low) if careful else fma(q, square, r), scale_of(shifted)


@inlined
def tanh(v, v_lo, half):
    """factor * tanh(x), and the derivative of tanh(x), from v + v_lo = 2 x in [-40, 0] and half of the factor."""
    k = constants(v)
    shifted = fma(v - k.exp_center, k.log2_e, k.one_shift)
    n, scale = shifted - k.one_shift, scale_of(shifted)
    twice = scale + scale
    high, low = fma(n, -k.ln2_hi, v), fma(n, -k.ln2_lo, v_lo)
    r = high + low
    square = r * r
    p = high + fma(polynomial_by_pairs(r, square, k.exp_tail), square, low)
    less = scale - k.one
    above = fma(scale, p, less)
    above_lo = fma(scale, p, less - above)
    below = fma(scale, p, scale + k.one)
    w = fma(twice, p, twice) / below
    return fma(half, above, half * fma(-above, above / below, above_lo)), w * (k.two - w)


@helper
def exp_pair(hi, lo):
    k = constants(hi)
    if hi < k.exp_lowest:
        return k.zero, k.zero
    shifted = fma(hi - k.exp_center, k.log2_e, k.round_shift)
    n, scale = shifted - k.round_shift, scale_of(shifted)
    r, r_lo = two_sum(fma(n, -k.ln2_hi, hi), fma(n, -k.ln2_lo, lo))
    square = r * r
    s, s_lo = two_sum(r, polynomial_by_pairs(r, square, k.exp_tail) * square)
    total, total_lo = fast_two_sum(k.one, s)
    return total * scale, (total_lo + (s_lo + r_lo)) * scale


@helper
def log1p_pair(hi, lo):
    k = constants(hi)
    one, one_lo = two_sum(k.one, hi)
    n, down = power_of(one)
    f = one * down
    z, z_lo = fast_two_sum(f - k.one, one_lo * down)
    s = z / (k.two + z)
    half = k.half * z
    square = half * z
    w = s * s
    rest = s * (square + w * polynomial(w, k.atanh_tail)) - fma(half, z, -square) + fma(lo, down, z_lo) / f
    a, a_lo = fast_two_sum(z, -square)
    b, b_lo = two_sum(n * k.ln2_hi, a)
    return fast_two_sum(b, fma(n, k.ln2_lo, rest + (a_lo + b_lo)))


# ---- what a row's results are made from: c/rows.inc.h ----


@helper
def finite(value):
    return value - value == constants(value).zero


@inlined
def add_pairs(a_hi, a_lo, b_hi, b_lo):
    hi, lo = two_sum(a_hi, b_hi)
    return select(finite(hi), hi + (lo + (a_lo + b_lo)), hi)


@inlined
def plus(a, b):
    hi, lo = two_sum(a[0], b[0])
    return hi, lo + (a[1] + b[1])


@inlined
def gather(total, more):
    hi, lo = plus(total, more)
    whole, rest = fast_two_sum(hi, lo)
    return select(finite(hi), whole, hi), select(finite(hi), rest, lo)


@inlined
def times(a, b):
    hi = a[0] * b[0]
    return hi, fma(a[0], b[0], -hi) + fma(a[0], b[1], a[1] * b[0])


@helper
def invert(temperature):
    k = constants(temperature)
    inverse = k.one / temperature
    if not finite(inverse):
        return k.most, k.zero
    return inverse, fma(-temperature, inverse, k.one) * inverse


@inlined
def is_plain(t):
    k = constants(t[0])
    return t[0] == k.one and t[1] == k.zero


@helper
def is_far(maximum, t):
    k = constants(maximum)
    scaled = maximum * t[0]
    return finite(maximum) and (scaled >= k.far or scaled <= -k.far)


@inlined
def parts_of(x, maximum, t):
    """exp((x - maximum) / temperature) * EXP_SCALE: rounded to one number, and with more digits as scale * (1 + less_one).
    t is None for temperature 1, so that it gets code of its own."""
    k = constants(x)
    if t is None:
        high = (maximum + k.grid) - k.grid
        x = larger(maximum + k.exp_lowest, x)
        less_one, scale = exp_less_one(x - (maximum + k.exp_center), x, -high, -(maximum - high), False)
        return fma(less_one, scale, scale), less_one, scale
    scaled = maximum * t[0]
    high = (scaled + k.grid) - k.grid
    low = (scaled - high) + fma(maximum, t[1], fma(maximum, t[0], -scaled))
    quotient = x * t[0]
    at = quotient - (scaled + k.exp_center)
    quotient_lo = fma(x, t[0], -quotient) + fma(x, t[1], -low)
    less_one, scale = exp_less_one(at, quotient, -high, quotient_lo, True)
    less_one, scale = select(at < k.exp_lowest, k.zero, less_one), select(at < k.exp_lowest, k.zero, scale)
    return fma(less_one, scale, scale), less_one, scale


@inlined
def terms(x, maximum, t):
    return parts_of(x, maximum, t)[0]


@helper
def term(x, maximum, t):
    """0 where there is no finite maximum."""
    if not finite(maximum):
        return constants(x).zero
    if is_far(maximum, t):
        x, maximum = x - maximum, maximum - maximum
    return terms(x, maximum, None) if is_plain(t) else terms(x, maximum, t)


@helper
def add_ones(total, total_lo, ones):
    k = constants(total)
    hi, lo = two_sum(total / k.exp_scale, ones - k.one)
    return hi, lo + total_lo / k.exp_scale


@helper
def finish_row(maximum, total, total_lo):
    """log1p of the sum as a pair, then the scaled reciprocal of the sum as a pair."""
    k = constants(maximum)
    poison = maximum - maximum
    whole, whole_lo = two_sum(k.one, total)
    whole = whole + poison
    whole_lo = whole_lo + total_lo
    reciprocal = k.one / whole
    residual = fma(-whole, reciprocal, k.one) - whole_lo * reciprocal
    log1p, log1p_lo = log1p_pair(total, total_lo)
    return log1p + poison, log1p_lo, reciprocal / k.exp_scale, residual * reciprocal / k.exp_scale


@inlined
def probability(e, reciprocal, reciprocal_lo):
    """Computed `lift` times as large: see c/results.inc.h."""
    k = constants(e)
    return fma(e, reciprocal * k.lift, e * (reciprocal_lo * k.lift)) * (k.one / k.lift)


@inlined
def along(e, factor, addend):
    return fma(e, factor[0], fma(e, factor[1], addend))


@inlined
def lifted(factor, alone):
    """The factor of what may become as small as a probability, having nothing subtracted, and what the product is to be
    multiplied with."""
    k = constants(factor[0])
    lift = select(alone, k.lift, k.one)
    return (factor[0] * lift, factor[1] * lift), select(alone, k.one / k.lift, k.one)


@inlined
def log_probability(x, maximum, f, t):
    hi, lo = exponent(x, maximum, t[0], t[1])
    return add_pairs(hi, lo, -f[0], -f[1])


@inlined
def fast_log_probability(x, maximum, f, t):
    """As log_softmax has it. t is None for temperature 1, as in `terms`."""
    if t is None:
        hi, lo = plus((maximum, constants(x).zero), f)
        return select(x == maximum, constants(x).zero - f[0], (x - hi) - lo)
    return log_probability(x, maximum, f, t)


@helper
def pick_of(x, maximum, f, t, loss):
    """The log-probability of a picked logit, or the loss that is its negative: subtracted from 0, so that it is not -0."""
    if loss:
        return constants(x).zero - log_probability(x, maximum, f, t)
    return fast_log_probability(x, maximum, f, None) if is_plain(t) else log_probability(x, maximum, f, t)


@helper
def log_sum(maximum, total, f, t):
    scaled = maximum * t[0]
    scaled_lo = fma(maximum, t[0], -scaled) + maximum * t[1]
    value = add_pairs(scaled, scaled_lo, f[0], f[1])
    return select(finite(maximum), value, select(total == total, maximum, total))


@inlined
def dense_loss(dot, mass, f):
    """From the sums of q (maximum - x) and q over the classes, as pairs."""
    hi, lo = plus(dot, times(mass, f[:2]))
    hi = hi + constants(hi).zero * f[0]
    return select(finite(hi), hi + lo, hi)


@inlined
def weigh(x, q, maximum):
    """q (maximum - x) as a pair; nothing where q is 0."""
    k = constants(x)
    hi, lo = two_sum(maximum, -x)
    product = q * hi
    product_lo = fma(q, hi, -product) + q * lo
    absent = q == k.zero
    return select(absent, k.zero, product), select(absent, k.zero, select(finite(product), product_lo, k.zero))


# ---- one row, a block at a time: c/rows.inc.h ----


@helper
def position(r, inner):
    """Row number r as (i, j); a division takes as long as ten elements."""
    return (r, 0) if inner == 1 else (r // inner, r % inner)


@njit(inline="always", **OPTIONS)
def block_of(array, r, first):
    """The block of a row that starts at `first`."""
    i, j = position(r, array.shape[2])
    return strip(array, i, first, j, min(BLOCK_BYTES // array.itemsize, array.shape[1] - first))


@helper
def load(x, row):
    """A row, or a part of one, into scratch."""
    if row.strides[0] == row.itemsize:
        copy(x, row, row.size)
    else:
        for c in range(row.size):
            x[c] = row[c]


@helper
def fill_up(x, n):
    """x[n:] zero up to whole groups; returns their end."""
    k = constants(x[0])
    size = LINES * k.lanes
    end = (n + size - 1) // size * size
    for c in range(n, end):
        x[c] = k.zero
    return end


@helper
def store(row, x):
    if row.strides[0] == row.itemsize:
        copy(row, x, row.size)
    else:
        for c in range(row.size):
            row[c] = x[c]


@helper
def mask(x, n, where, r, first, fill):
    if where.shape[1]:
        i, j = position(r, where.shape[2])
        row = strip(where, i, first, j, n)
        for c in range(n):
            x[c] = x[c] if row[c] else fill


@allocating
def next_block(logits, r, first, end, anywhere):
    """Where the block after the one at `first` starts, to be asked for while this one is computed."""
    first += BLOCK_BYTES // logits.itemsize
    if first >= logits.shape[1]:
        r, first = r + 1, 0
    if r < end and logits.strides[1] == logits.itemsize:
        return packed(block_of(logits, r, first))
    return anywhere


@inlined
def larger(a, b):
    return select(a > b, a, b)


@inlined
def largest(a, b, c, d):
    return larger(larger(a, b), larger(c, d))


@inlined
def line_of(x, c):
    """The line at x[c], or what there is of it."""
    k = constants(x[0])
    return line_at(x, c) if c + k.lanes <= x.size else part_at(x, c, x.size - c, k.zero)


@helper
def maximum_of(x):
    k = constants(x[0])
    group = LINES * k.lanes
    whole = x.size // group * group
    best = every_lane(-k.infinity)
    for i in range(0, whole, group):
        a, b = line_at(x, i), line_at(x, i + k.lanes)
        best = larger(largest(a, b, line_at(x, i + 2 * k.lanes), line_at(x, i + 3 * k.lanes)), best)
    for i in range(whole, x.size, k.lanes):
        best = larger(part_at(x, i, x.size - i, -k.infinity), best)
    best = larger(rotate(best, 2), best)
    best = larger(rotate(best, 4), best)
    best = larger(rotate(best, 8), best)
    if k.lanes == 16:
        best = larger(rotate(best, 16), best)
    return first_lane(best)


@helper
def join_lanes(s, s_lo, other, other_lo):
    s, lo = two_sum(s, other)
    return s, (s_lo + other_lo) + lo


@helper
def sum_of_lanes(s, s_lo):
    """Step 3 of the tree: a pair."""
    k = constants(s)
    s, s_lo = join_lanes(s, s_lo, rotate(s, 2), rotate(s_lo, 2))
    s, s_lo = join_lanes(s, s_lo, rotate(s, 4), rotate(s_lo, 4))
    s, s_lo = join_lanes(s, s_lo, rotate(s, 8), rotate(s_lo, 8))
    if k.lanes == 16:
        s, s_lo = join_lanes(s, s_lo, rotate(s, 16), rotate(s_lo, 16))
    hi, lo = fast_two_sum(first_lane(s), first_lane(s_lo))
    if not finite(first_lane(s)):
        hi, lo = first_lane(s), k.zero
    return hi, lo


@helper
def sum_of(e, n):
    """The sum of n elements in whole groups, as a pair."""
    k = constants(e[0])
    s, s_lo = every_lane(k.zero), every_lane(k.zero)
    for c in range(0, n, LINES * k.lanes):
        first = line_at(e, c) + line_at(e, c + k.lanes)
        s, lo = two_sum(s, first + (line_at(e, c + 2 * k.lanes) + line_at(e, c + 3 * k.lanes)))
        s_lo = s_lo + lo
    return sum_of_lanes(s, s_lo)


@inlined
def add_term(s, s_lo, term):
    """A step of TwoSum in each lane; the errors of the sum and of rounding the term are one."""
    value, less_one, scale = term
    total = s + value
    seen = total - s
    return total, s_lo + ((s - (total - seen)) + fma(less_one, scale, scale - seen))


@inlined
def without_maximum(term, x, maximum):
    """A term, but 0 for the maximum; and which lanes are the maximum."""
    hit, zero = x == maximum, constants(x).zero
    return (select(hit, zero, term[0]), term[1], select(hit, zero, term[2])), hit


@inlined
def add_group(s, s_lo, maximum, t, xa, xb, xc, xd):
    """The terms of a group, added to the lanes without those of the maximum, which are counted; and the terms."""
    a, b, c, d = parts_of(xa, maximum, t), parts_of(xb, maximum, t), parts_of(xc, maximum, t), parts_of(xd, maximum, t)
    kept = a[0], b[0], c[0], d[0]
    ones = 0
    if anywhere(largest(xa, xb, xc, xd) == maximum):
        a, hit_a = without_maximum(a, xa, maximum)
        b, hit_b = without_maximum(b, xb, maximum)
        c, hit_c = without_maximum(c, xc, maximum)
        d, hit_d = without_maximum(d, xd, maximum)
        ones = (count(hit_a) + count(hit_b)) + (count(hit_c) + count(hit_d))
    s, s_lo = add_term(s, s_lo, a)
    s, s_lo = add_term(s, s_lo, b)
    s, s_lo = add_term(s, s_lo, c)
    s, s_lo = add_term(s, s_lo, d)
    return s, s_lo, ones, kept


@inlined
def put_group(x, i, lines):
    lanes = constants(x[0]).lanes
    put_line(x, i, lines[0])
    put_line(x, i + lanes, lines[1])
    put_line(x, i + 2 * lanes, lines[2])
    put_line(x, i + 3 * lanes, lines[3])


@helper
def add_terms(x, e, maximum, t, keep, upcoming, to):
    """Steps 1 and 2: the lanes, and how often the maximum was met; `keep` leaves the terms in e. What comes next is asked for,
    and where the results will go, if `to` is not None."""
    k = constants(x[0])
    s, s_lo, ones = every_lane(k.zero), every_lane(k.zero), 0
    two, three, group = 2 * k.lanes, 3 * k.lanes, LINES * k.lanes
    whole = x.size // group * group
    for i in range(0, whole, group):
        for line in range(i, i + group, k.lanes):
            prefetch(upcoming, line, 0)
            if to is not None:
                prefetch(to, line, 1)
        a, b, c, d = line_at(x, i), line_at(x, i + k.lanes), line_at(x, i + two), line_at(x, i + three)
        s, s_lo, more, kept = add_group(s, s_lo, maximum, t, a, b, c, d)
        ones += more
        if keep:
            put_group(e, i, kept)
    if whole < x.size:
        left, nothing = x.size - whole, -k.infinity
        a = part_at(x, whole, left, nothing)
        b = part_at(x, whole + k.lanes, left - k.lanes, nothing)
        c = part_at(x, whole + two, left - two, nothing)
        d = part_at(x, whole + three, left - three, nothing)
        s, s_lo, more, kept = add_group(s, s_lo, maximum, t, a, b, c, d)
        ones += more
        if keep:
            put_group(e, whole, kept)
    return s, s_lo, number_like(s, ones)


@helper
def come_near(x, maximum, room):
    """x, moved so that its maximum is 0, into room."""
    for c in range(x.size):
        room[c] = x[c] - maximum


@helper
def reduce_block(x, e, maximum, t, keep, upcoming):
    """Steps 1 to 3, the maximum given: the sum as a pair, and how often the maximum was met; `keep` leaves
    exp(x - maximum) * EXP_SCALE in e."""
    k = constants(x[0])
    if not finite(maximum):
        total = k.zero
        for c in range(x.size):
            e[c] = k.zero
            total = total if x[c] == x[c] else x[c]
        return total, k.zero, k.one
    if is_far(maximum, t):
        come_near(x, maximum, e)
        x, maximum = section(e, 0, x.size), k.zero
    if is_plain(t):
        s, s_lo, ones = add_terms(x, e, maximum, None, keep, upcoming, None)
    else:
        s, s_lo, ones = add_terms(x, e, maximum, t, keep, upcoming, None)
    total, total_lo = sum_of_lanes(s, s_lo)
    total, total_lo = add_ones(total, total_lo, ones)
    return total, total_lo, ones


@inlined
def entropy_term(x, e, maximum, t):
    """From a term and its logit, exp(x - maximum) (x - maximum) / temperature, scaled as the term: 0 times infinity is 0."""
    return e * larger(every_lane(-constants(x).most), (x - maximum) * t[0])


@inlined
def square(x, e, maximum):
    """From a term and its logit, exp(x - maximum)^2, scaled as the term, but 0 for the maximum."""
    k = constants(x)
    return select(x == maximum, k.zero, e * (e * (k.one / k.exp_scale)))


@inlined
def add_group_of_score(dots, squares, maximum, t, x, e):
    """The two sums of sum_scores, of one group more."""
    a, b = entropy_term(x[0], e[0], maximum, t), entropy_term(x[1], e[1], maximum, t)
    c, d = entropy_term(x[2], e[2], maximum, t), entropy_term(x[3], e[3], maximum, t)
    dots = add_line(dots, (a + b) + (c + d))
    a, b = square(x[0], e[0], maximum), square(x[1], e[1], maximum)
    c, d = square(x[2], e[2], maximum), square(x[3], e[3], maximum)
    return dots, add_line(squares, (a + b) + (c + d))


@helper
def sum_scores(x, e, maximum, ones, t):
    """The sums of exp(x - maximum) (maximum - x) / temperature and, without one maximum of the `ones`, exp(x - maximum)^2."""
    k = constants(x[0])
    if not finite(maximum):
        return k.zero, k.zero
    dots = every_lane(k.zero), every_lane(k.zero)
    squares = dots
    group = LINES * k.lanes
    whole = x.size // group * group
    for c in range(0, whole, group):
        dots, squares = add_group_of_score(dots, squares, maximum, t, group_at(x, c), group_at(e, c))
    if whole < x.size:
        part = group_part_at(x, whole, -k.infinity)
        dots, squares = add_group_of_score(dots, squares, maximum, t, part, group_at(e, whole))
    dot, square_sum = sum_of_lanes(dots[0], dots[1])[0], sum_of_lanes(squares[0], squares[1])[0]
    return -dot / k.exp_scale, square_sum / k.exp_scale + (ones - k.one)


@helper
def join_blocks(blocks, t):
    """Step 4 on rows of (maximum, sum, low part of the sum, dot, squares)."""
    k = constants(blocks[0, 0])
    top = 0
    for b in range(1, len(blocks)):
        if blocks[b, 0] > blocks[top, 0] or blocks[top, 0] != blocks[top, 0]:
            top = b
    maximum, total, total_lo = blocks[top, 0], blocks[top, 1], blocks[top, 2]
    dot, squares = blocks[top, 3], blocks[top, 4]
    below, below_lo = k.zero, k.zero  # of the other blocks, scaled: unscaled, each might lose half of the smallest number
    for b in range(len(blocks)):
        if b == top:
            continue
        if not finite(maximum):
            total += blocks[b, 1]
            continue
        distance, lo = exponent(blocks[b, 0], maximum, t[0], t[1])
        factor, factor_lo = exp_pair(distance, lo)
        others, others_lo = two_sum(blocks[b, 1], k.one)
        others_lo += blocks[b, 2]
        term = others * factor
        term_lo = fma(others, factor, -term) + (others * factor_lo + others_lo * factor)
        below, below_lo = gather((below, below_lo), (term, term_lo))
        dot += k.zero if factor == k.zero else factor * (blocks[b, 3] - distance * others) / k.exp_scale
        unscaled = factor / k.exp_scale
        squares += (k.one + blocks[b, 4]) * unscaled * unscaled
    if len(blocks) > 1 and finite(maximum):
        total, total_lo = gather((total, total_lo), (below / k.exp_scale, below_lo / k.exp_scale))
    return maximum, total, total_lo, dot, squares


@allocating
def stage(logits, where, r, first, room, cap=None):
    """A block of a row: where it lies, or gathered, capped and masked in `room`."""
    row = block_of(logits, r, first)
    as_it_is = row.strides[0] == row.itemsize and where.shape[1] == 0
    if cap is not None:
        as_it_is = as_it_is and cap.softcap == constants(room[0]).zero
    if as_it_is:
        return packed(row)
    load(room, row)
    if cap is not None and cap.softcap != constants(room[0]).zero:
        cap_row(room, row.size, cap, False)
    mask(room, row.size, where, r, first, -constants(room[0]).infinity)
    return section(room, 0, row.size)


@helper
def keep_block(x, e, result, maximum, t, upcoming):
    """As reduce_block, with the terms where the results go, which are as many as the logits; e is lost."""
    whole = result.size % (LINES * constants(x[0]).lanes) == 0  # as whole groups are written
    total, total_lo, _ = reduce_block(x, result if whole else e, maximum, t, True, upcoming)
    if not whole:
        copy(result, e, result.size)
    return total, total_lo


@helper
def scale_kept(e, scaling, addends, addend, result):
    """Results from the terms of a block that were kept, be it in their place, and from what scaling_of said."""
    for c in range(0 if scaling[2] == constants(e[0]).one else result.size):
        e[c] *= scaling[2]
    scale_terms(e, scaling[:2], addends, addend, result)


@allocating
def reduce_row(logits, where, r, end, room, e, blocks, t, keep, out):
    """All four steps. The terms are kept in the row of `out`, which is contiguous, if it is not None."""
    k = constants(room[0])
    for b in range(len(blocks)):
        x = stage(logits, where, r, b * k.block, room)
        maximum = maximum_of(x)
        upcoming = next_block(logits, r, b * k.block, end, x)
        blocks[b, 0] = maximum
        if out is None:
            blocks[b, 1], blocks[b, 2], _ = reduce_block(x, e, maximum, t, keep, upcoming)
        else:
            blocks[b, 1], blocks[b, 2] = keep_block(x, e, packed(block_of(out, r, b * k.block)), maximum, t, upcoming)
        blocks[b, 3] = blocks[b, 4] = k.zero
    return join_blocks(blocks, t)[:3]


# ---- rows of one block, step by step, so that the operations of a step overlap with other rows': c/rows.inc.h ----


@helper
def is_short(logits, where, t):
    """Whether rows have one block, which lies as it is needed, and temperature 1."""
    as_it_is = logits.strides[1] == logits.itemsize and where.shape[1] == 0
    return as_it_is and logits.shape[1] * logits.itemsize <= BLOCK_BYTES and is_plain(t)


@helper
def room_of(x, classes):
    """The room that the terms of a row take, in whole groups; and how many rows are taken at once."""
    k = constants(x[0])
    group = LINES * k.lanes
    size = (classes + group - 1) // group * group
    return size, min(k.lanes, BATCH_BYTES // BLOCK_BYTES * k.block // size)


@allocating
def reduce_short_rows(logits, r, rows, end, e, keep, numbers, out):
    """Steps 1 to 3: the maxima and the sums of rows, as reduce_tile has them, and in the first lines of `numbers`; `keep`
    leaves the terms in e, row by row. Results will go to the rows of `out`, if it is not None: they are asked for, as if they
    were contiguous."""
    k = constants(e[0])
    t = k.one, k.zero
    s, s_lo = scratch(e[0], TREE_BYTES), scratch(e[0], TREE_BYTES)
    size, most = room_of(e, logits.shape[1])
    for i in range(4):
        put_line(numbers, i * k.lanes, k.zero)
    near = True
    for lane in range(rows):
        maximum = maximum_of(packed(block_of(logits, r + lane, 0)))
        numbers[lane] = maximum
        near = near and -k.far < maximum < k.far
    for lane in range(rows):
        x = packed(block_of(logits, r + lane, 0))
        upcoming = packed(block_of(logits, r + lane + most, 0)) if r + lane + most < end else x
        terms_ = section(e, lane * size, size)
        if near:
            if out is None:
                lanes, lanes_lo, ones = add_terms(x, terms_, numbers[lane], None, keep, upcoming, None)
            else:
                to = packed(block_of(out, r + lane, 0))
                lanes, lanes_lo, ones = add_terms(x, terms_, numbers[lane], None, keep, upcoming, to)
            numbers[3 * k.lanes + lane] = ones
            put_line(s, lane * k.lanes, lanes)
            put_line(s_lo, lane * k.lanes, lanes_lo)
        else:
            total, total_lo, _ = reduce_block(x, terms_, numbers[lane], t, keep, upcoming)
            numbers[k.lanes + lane], numbers[2 * k.lanes + lane] = total, total_lo
    if near:
        for lane in range(rows):
            total, total_lo = sum_of_lanes(line_at(s, lane * k.lanes), line_at(s_lo, lane * k.lanes))
            numbers[k.lanes + lane], numbers[2 * k.lanes + lane] = total, total_lo
        total, total_lo = add_ones(line_at(numbers, k.lanes), line_at(numbers, 2 * k.lanes), line_at(numbers, 3 * k.lanes))
        put_line(numbers, k.lanes, total)
        put_line(numbers, 2 * k.lanes, total_lo)
    return line_at(numbers, 0), line_at(numbers, k.lanes), line_at(numbers, 2 * k.lanes)


# ---- the rest of what a cross entropy is made from: c/rows.inc.h, c/loss.inc.h ----


@helper
def cap_of(numbers):
    """2 / (temperature softcap) as a pair, and the least x that is told apart: tanh(-20) is -1."""
    k = constants(numbers.softcap)
    divisor = numbers.temperature * numbers.softcap
    divisor_lo = fma(numbers.temperature, numbers.softcap, -divisor)
    inverse, inverse_lo = k.most, k.zero
    if k.two / divisor < k.most:
        inverse = k.two / divisor
        residual = fma(-divisor, inverse, k.two) - divisor_lo * inverse
        if finite(residual):
            inverse_lo = residual * inverse / k.two
    return Cap(numbers.softcap, inverse, inverse_lo, -min(k.forty / inverse, k.most))


@helper
def cap_row(x, n, cap, slopes):
    """softcap tanh(x / (temperature softcap)) in place of x, or its derivative but for 1 / temperature."""
    k = constants(x[0])
    for c in range(0, n, k.lanes):
        logits = line_at(x, c)
        near = larger(cap.lowest, with_sign(logits, cap.lowest))
        v = near * cap.inverse
        value, slope = tanh(v, fma(near, cap.inverse_lo, fma(near, cap.inverse, -v)), cap.softcap / k.two)
        put_line(x, c, slope if slopes else with_sign(value, logits))


@helper
def weigh_classes(x, n, weight, first):
    """n numbers times their class weights, if there are any."""
    if weight.size:
        lanes = constants(x[0]).lanes
        for c in range(0, n, lanes):
            put_line(x, c, line_at(x, c) * line_of(weight, first + c))


@helper
def spread_block(x, where, weight, smoothing, label, r, first, maximum, room):
    """The label's logit; of the classes that are not masked out, how many there are, the sum of their weights, and that of
    weight (maximum - x). Without smoothing, it is only whether there are any. `room` is lost."""
    k = constants(maximum)
    nothing = k.zero, k.zero
    target = x[label - first] if first <= label < first + x.size else k.zero
    if smoothing == k.zero and finite(maximum):
        return Spread(target, k.one, nothing, nothing)
    for c in range(x.size):
        room[c] = k.one
    mask(room, x.size, where, r, first, k.zero)
    n = fill_up(room, x.size)
    count, _ = sum_of(room, n)
    if smoothing == k.zero:
        return Spread(target, count, nothing, nothing)
    weigh_classes(room, x.size, weight, first)
    mass = sum_of(room, n)
    origin = maximum if finite(maximum) else k.zero
    for c in range(0, x.size, k.lanes):
        w = line_at(room, c)
        put_line(room, c, select(w == k.zero, k.zero, w * (origin - line_of(x, c))))
    return Spread(target, count, mass, sum_of(room, n))


@helper
def keep_spread(spreads, b, spread):
    spreads[b, 0], spreads[b, 1] = spread.target, spread.count
    spreads[b, 2], spreads[b, 3] = spread.mass
    spreads[b, 4], spreads[b, 5] = spread.dot


@helper
def spread_at(spreads, b):
    mass, dot = (spreads[b, 2], spreads[b, 3]), (spreads[b, 4], spreads[b, 5])
    return Spread(spreads[b, 0], spreads[b, 1], mass, dot)


@helper
def join_spreads(blocks, spreads, maximum):
    """Step 4 for these: each block's distances are moved from its maximum to the row's."""
    k = constants(maximum)
    if len(blocks) == 1:
        return spread_at(spreads, 0)
    origin = maximum if finite(maximum) else k.zero
    target, count, mass, dot = k.zero, k.zero, (k.zero, k.zero), (k.zero, k.zero)
    for b in range(len(blocks)):
        block = spread_at(spreads, b)
        move = two_sum(origin, -blocks[b, 0] if finite(blocks[b, 0]) else k.zero)
        dot = gather(dot, plus(block.dot, times(block.mass, move)))
        mass = gather(mass, block.mass)
        target += block.target
        count += block.count
    return Spread(target, count, mass, dot)


@allocating
def targets_at(probabilities, where, weight, r, first, room):
    """A block of targets times class weights, 0 where masked out: where it lies, or made in `room`."""
    row = block_of(probabilities, r, first)
    if row.strides[0] == row.itemsize and where.shape[1] == 0 and weight.size == 0:
        return packed(row)
    load(room, row)
    weigh_classes(room, row.size, weight, first)
    mask(room, row.size, where, r, first, constants(room[0]).zero)
    return section(room, 0, row.size)


@inlined
def add_line(lanes, line):
    s, lo = two_sum(lanes[0], line)
    return s, lanes[1] + lo


@inlined
def add_targets(mass, dot, low, maximum, x, q):
    """A group's q, q (maximum - x), and what those products' rounding left, added to the lanes."""
    a, a_lo = weigh(x[0], q[0], maximum)
    b, b_lo = weigh(x[1], q[1], maximum)
    c, c_lo = weigh(x[2], q[2], maximum)
    d, d_lo = weigh(x[3], q[3], maximum)
    mass = add_line(mass, (q[0] + q[1]) + (q[2] + q[3]))
    return mass, add_line(dot, (a + b) + (c + d)), add_line(low, (a_lo + b_lo) + (c_lo + d_lo))


@inlined
def group_at(x, i):
    lanes = constants(x[0]).lanes
    return line_at(x, i), line_at(x, i + lanes), line_at(x, i + 2 * lanes), line_at(x, i + 3 * lanes)


@inlined
def group_part_at(x, i, rest):
    lanes, left = constants(x[0]).lanes, x.size - i
    a, b = part_at(x, i, left, rest), part_at(x, i + lanes, left - lanes, rest)
    return a, b, part_at(x, i + 2 * lanes, left - 2 * lanes, rest), part_at(x, i + 3 * lanes, left - 3 * lanes, rest)


@helper
def weigh_block(x, q, maximum):
    """The sums over a block of q (maximum - x) and q, as pairs."""
    k = constants(maximum)
    mass = every_lane(k.zero), every_lane(k.zero)
    dot, low = mass, mass
    group = LINES * k.lanes
    whole = x.size // group * group
    for c in range(0, whole, group):
        mass, dot, low = add_targets(mass, dot, low, maximum, group_at(x, c), group_at(q, c))
    if whole < x.size:
        parts = group_part_at(x, whole, k.zero), group_part_at(q, whole, k.zero)
        mass, dot, low = add_targets(mass, dot, low, maximum, parts[0], parts[1])
    hi, lo = sum_of_lanes(dot[0], dot[1])
    return (hi, lo + sum_of_lanes(low[0], low[1])[0]), sum_of_lanes(mass[0], mass[1])


@allocating
def dot_targets(logits, where, probabilities, weight, cap, r, maximum, staged, x, q):
    """The same over a row; `staged` is its block, if it has one only."""
    k = constants(maximum)
    dot = mass = k.zero, k.zero
    for first in range(0, logits.shape[1], k.block):
        if logits.shape[1] > k.block:
            staged = stage(logits, where, r, first, x, cap)
        part_dot, part_mass = weigh_block(staged, targets_at(probabilities, where, weight, r, first, q), maximum)
        dot, mass = (gather(dot, part_dot), gather(mass, part_mass)) if first else (part_dot, part_mass)
    return dot, mass


@helper
def close_loss(numbers, maximum, f, t, dot, mass, spread, sample_weight, loss_grad):
    """The loss, and for its gradient the factor of the terms, and those of q and of each class's weight in what is
    added to them."""
    k = constants(maximum)
    log1p = f[:2]
    keep, even = (k.one - numbers.label_smoothing, k.zero), (numbers.label_smoothing / spread.count, k.zero)
    loss, slope = times(keep, plus(times(dot, t), times(mass, log1p))), times(keep, mass)
    # where keep is 0, an infinite loss counts for nothing
    loss = select(keep[0] == k.zero, k.zero, loss[0]), select(keep[0] == k.zero, k.zero, loss[1])
    if numbers.label_smoothing != k.zero:
        loss = plus(loss, times(even, plus(times(spread.dot, t), times(spread.mass, log1p))))
        slope = plus(slope, times(even, spread.mass))
    if numbers.z_loss != k.zero:
        log_sum = plus(times((maximum, k.zero), t), log1p)
        product = times((numbers.z_loss, k.zero), log_sum)
        loss, slope = plus(loss, times(product, log_sum)), plus(slope, times((k.two, k.zero), product))
    hi, lo = times((loss[0] + k.zero * f[0], loss[1]), (sample_weight, k.zero))  # a NaN shows even where nothing counts
    outer = times(times((numbers.scale, numbers.scale_lo), (sample_weight, k.zero)), (loss_grad, k.zero))
    main, rest = times(outer, keep), times(outer, even)
    factor = times(times(outer, slope), f[2:])
    return Loss(select(finite(hi), hi + lo, hi), factor, -(main[0] + main[1]), -(rest[0] + rest[1]))


@allocating
def block_room(logits):
    block = BLOCK_BYTES // logits.itemsize
    return np.empty(((logits.shape[1] + block - 1) // block, 5), logits.dtype)


# ---- LANES short rows at once, the rows in the lanes: c/tiles.inc.h ----


@helper
def by_tile(logits, rows, most=TILE, short=SHORT_LINES):
    """Whether tiles pay: for short rows, and for rows that lie side by side, up to the room that there is."""
    lanes = LINE_BYTES // logits.itemsize
    if rows < lanes // 2:
        return False
    adjacent = logits.strides[2] == logits.itemsize and logits.shape[2] >= lanes // 2
    return logits.shape[1] <= (min(most, BLOCK_BYTES // logits.itemsize) if adjacent else short * lanes)


@helper
def is_across(array, rows):
    """Whether a tile is moved by pieces of 16 bytes."""
    whole = rows * array.itemsize == LINE_BYTES and array.shape[1] * array.itemsize >= 16
    return whole and array.shape[2] == 1 and array.strides[1] == array.itemsize


@helper
def rows_of_tiles(x, classes):
    """How many rows are moved together, by the room that there is."""
    lanes = constants(x[0]).lanes
    return lanes * min(TILES, x.size // (classes * lanes))


@njit(inline="always", **OPTIONS)
def tile_of(x, classes, first):
    """The tile of the rows from `first` on."""
    return section(x, first * classes, constants(x[0]).lanes * classes)


@helper
def is_strips(array, r, rows):
    """Whether the same class of all these rows is one strip of memory, in whole tiles."""
    whole = rows * array.itemsize % LINE_BYTES == 0
    return whole and array.strides[2] == array.itemsize and position(r, array.shape[2])[1] + rows <= array.shape[2]


@helper
def load_strips(x, array, r, rows):
    """x[tile][class][row], class by class: tile by tile, each line of a tall array would come from another page, and where
    its strides are powers of two, from the same few places of a cache."""
    lanes, classes = constants(x[0]).lanes, array.shape[1]
    i, j = position(r, array.shape[2])
    for c in range(classes):
        line = packed(strip(array, i, c, j, rows))
        for first in range(0, rows, lanes):
            put_line(x, first * classes + c * lanes, line_at(line, first))


@helper
def store_strips(array, x, r, rows):
    lanes, classes = constants(x[0]).lanes, array.shape[1]
    i, j = position(r, array.shape[2])
    for c in range(classes):
        line = packed(strip(array, i, c, j, rows))
        for first in range(0, rows, lanes):
            put_line(line, first, line_at(x, first * classes + c * lanes))


@helper
def load_tiles(x, array, r, rows):
    """x[tile][class][row]."""
    if is_strips(array, r, rows):
        load_strips(x, array, r, rows)
        return
    lanes, classes = constants(x[0]).lanes, array.shape[1]
    for first in range(0, rows, lanes):
        load_tile(tile_of(x, classes, first), array, r + first, min(lanes, rows - first))


@helper
def store_tiles(array, x, r, rows):
    if is_strips(array, r, rows):
        store_strips(array, x, r, rows)
        return
    lanes, classes = constants(x[0]).lanes, array.shape[1]
    for first in range(0, rows, lanes):
        store_tile(array, tile_of(x, classes, first), r + first, min(lanes, rows - first))


@helper
def load_tile(x, array, r, rows):
    """x[class][row]; missing rows are zeros."""
    k = constants(x[0])
    classes = array.shape[1]
    if is_strips(array, r, rows):
        load_strips(x, array, r, rows)
        return
    across = 16 // array.itemsize
    if is_across(array, rows):
        for c in range(0, classes - across, across):
            load_across(x, c, array, r)
        load_across(x, classes - across, array, r)
        return
    if rows < k.lanes:
        for c in range(classes):
            put_line(x, c * k.lanes, k.zero)
    for lane in range(rows):
        row = block_of(array, r + lane, 0)
        for c in range(classes):
            x[c * k.lanes + lane] = row[c]


@helper
def store_tile(array, x, r, rows):
    k = constants(x[0])
    classes = array.shape[1]
    if is_strips(array, r, rows):
        store_strips(array, x, r, rows)
        return
    across = 16 // array.itemsize
    if is_across(array, rows):
        for c in range(0, classes - across, across):
            store_across(array, r, c, x)
        store_across(array, r, classes - across, x)
        return
    for lane in range(rows):
        row = block_of(array, r + lane, 0)
        for c in range(classes):
            row[c] = x[c * k.lanes + lane]


@helper
def mask_tile(x, where, r, rows, fill):
    lanes = constants(x[0]).lanes
    if where.shape[1] == 0:
        return
    for lane in range(rows):
        row = block_of(where, r + lane, 0)
        for c in range(row.size):
            if not row[c]:
                x[c * lanes + lane] = fill


@inlined
def take_class(x, c, maximum, shift, t, ones, keep):
    """The terms of a class but for those of the maximum, which are counted; `keep` leaves all in place of the logits."""
    k = constants(x[0])
    logits = line_at(x, c * k.lanes) - shift
    term = parts_of(logits, maximum, t)
    if keep:
        put_line(x, c * k.lanes, term[0])
    term, hit = without_maximum(term, logits, maximum)
    return term, ones + select(hit, every_lane(k.one), k.zero)


@helper
def plant_tile(x, classes, maximum, shift, t, keep, s, s_lo):
    """Steps 1 and 2 for every row: the lanes, and how often the maximum was met. The first term of a lane is what adding it
    to 0 would give."""
    k = constants(x[0])
    ones = every_lane(k.zero)
    for j in range(min(classes, k.lanes)):
        term, ones = take_class(x, j, maximum, shift, t, ones, keep)
        total, total_lo = term[0], fma(term[1], term[2], term[2] - term[0])
        for c in range(j + k.lanes, classes, k.lanes):
            term, ones = take_class(x, c, maximum, shift, t, ones, keep)
            total, total_lo = add_term(total, total_lo, term)
        put_line(s, j * k.lanes, total)
        put_line(s_lo, j * k.lanes, total_lo)
    return ones


@inlined
def tile_line(x, c, classes):
    k = constants(x[0])
    return line_at(x, c * k.lanes) if c < classes else every_lane(k.zero)


@helper
def join_tree(s, s_lo, classes):
    """Step 3 for every row: a pair of lines."""
    k = constants(s[0])
    used, half = min(classes, k.lanes), k.lanes // 2
    while half:
        for j in range(min(half, used - half)):
            total, lo = two_sum(line_at(s, j * k.lanes), line_at(s, (j + half) * k.lanes))
            put_line(s, j * k.lanes, total)
            low = (line_at(s_lo, j * k.lanes) + line_at(s_lo, (j + half) * k.lanes)) + lo
            put_line(s_lo, j * k.lanes, low)
        half //= 2
    total, total_lo = fast_two_sum(line_at(s, 0), line_at(s_lo, 0))
    whole = finite(line_at(s, 0))
    return select(whole, total, line_at(s, 0)), select(whole, total_lo, k.zero)


@helper
def sum_tile(x, classes):
    """Steps 2 and 3 for numbers that are no exponentials."""
    k = constants(x[0])
    s, s_lo = scratch(x[0], TREE_BYTES), scratch(x[0], TREE_BYTES)
    for first in range(0, classes, LINES * k.lanes):
        for j in range(min(k.lanes, classes - first)):
            c = first + j
            head = tile_line(x, c, classes) + tile_line(x, c + k.lanes, classes)
            tail = tile_line(x, c + 2 * k.lanes, classes) + tile_line(x, c + 3 * k.lanes, classes)
            total, total_lo = head + tail, every_lane(k.zero)
            if first:
                total, lo = two_sum(line_at(s, j * k.lanes), total)
                total_lo = line_at(s_lo, j * k.lanes) + lo
            put_line(s, j * k.lanes, total)
            put_line(s_lo, j * k.lanes, total_lo)
    return join_tree(s, s_lo, classes)


@helper
def maximum_of_tile(x, classes):
    lanes = constants(x[0]).lanes
    maximum = line_at(x, 0)
    for c in range(1, classes):
        maximum = larger(line_at(x, c * lanes), maximum)
    return maximum


@helper
def reduce_tile(x, where, r, rows, classes, t, keep):
    """The maxima and the sums of the rows of a tile that is loaded; leaves the logits in x, or, with `keep`, the terms."""
    mask_tile(x, where, r, rows, -constants(x[0]).infinity)
    maximum = maximum_of_tile(x, classes)
    total, total_lo, _ = reduce_loaded(x, classes, maximum, t, keep)
    return maximum, total, total_lo


@inlined
def near_maximum(maximum, t):
    """The maximum, or 0 where the rows are moved so that it is 0: see is_far."""
    k = constants(maximum)
    scaled = maximum * t[0]
    is_near = select(scaled < k.zero, -scaled, scaled) < k.far
    return select(is_near, maximum, select(finite(maximum), k.zero, maximum))


@helper
def line_term(x, maximum, t):
    """As term, of a logit of each row of a tile."""
    near = near_maximum(maximum, t)
    x = x - (maximum - near)
    return terms(x, near, None) if is_plain(t) else terms(x, near, t)


@helper
def reduce_loaded(x, classes, maximum, t, keep):
    """The sums of logits in x as pairs, and how often the maxima were met."""
    s, s_lo = scratch(x[0], TREE_BYTES), scratch(x[0], TREE_BYTES)
    near = near_maximum(maximum, t)
    shift = maximum - near
    if is_plain(t):
        ones = plant_tile(x, classes, near, shift, None, keep, s, s_lo)
    else:
        ones = plant_tile(x, classes, near, shift, t, keep, s, s_lo)
    total, total_lo = join_tree(s, s_lo, classes)
    total, total_lo = add_ones(total, total_lo, ones)
    total, total_lo = spoil_tile(x, classes, maximum, total, total_lo)
    return total, total_lo, ones


@helper
def spoil_tile(x, classes, maximum, total, total_lo):
    """The sum of a row whose maximum is not finite is a NaN of its numbers, or 0."""
    k = constants(x[0])
    if everywhere(finite(maximum)):
        return total, total_lo
    found = every_lane(k.zero)
    for c in range(classes):
        value = line_at(x, c * k.lanes)
        found = select(value == value, found, value)
    return select(finite(maximum), total, found), select(finite(maximum), total_lo, k.zero)


@helper
def pick_from_tile(x, labels, r, rows, classes, picked):
    """The logits of the labels (outer, inner), NaN for those outside."""
    k = constants(x[0])
    put_line(picked, 0, k.nan)
    for lane in range(rows):
        i, j = position(r + lane, labels.shape[1])
        label = labels[i, j]
        if 0 <= label < classes:
            picked[lane] = x[label * k.lanes + lane]
    return line_at(picked, 0)


@helper
def store_line(out, line, r, rows):
    """One number per row."""
    numbers = scratch(out[0, 0], LINE_BYTES)
    put_line(numbers, 0, line)
    for lane in range(rows):
        i, j = position(r + lane, out.shape[1])
        out[i, j] = numbers[lane]


# ---- the operations, on rows begin to end ----


@inlined
def addend_at(addends, c, addend):
    if addends is None:
        return every_lane(addend)
    return line_at(addends, c)


@inlined
def closing_of(closings, lane):
    """What finish_row said of one row."""
    lanes = constants(closings[0]).lanes
    return closings[lane], closings[lanes + lane], closings[2 * lanes + lane], closings[3 * lanes + lane]


@helper
def scale_terms(e, factor, addends, addend, result):
    """Results factor * e + addend from the terms that reduce_block kept; `addends` has one for each, if it is not None."""
    k = constants(e[0])
    factor, drop = lifted(factor, addends is None and addend == k.zero)
    whole = result.size // k.lanes * k.lanes
    for c in range(0, whole, k.lanes):
        put_line(result, c, along(line_at(e, c), factor, addend_at(addends, c, addend)) * drop)
    if whole < result.size:
        left = result.size - whole
        line = along(part_at(e, whole, left, k.zero), factor, addend_at(addends, whole, addend)) * drop
        put_part(result, whole, result.size - whole, line)


@helper
def write_near_terms(x, maximum, t, factor, shrink, addends, addend, result):
    k = constants(maximum)
    factor, drop = lifted(factor, addends is None and addend == k.zero)
    whole = x.size // k.lanes * k.lanes
    for c in range(0, whole, k.lanes):
        put_line(result, c, along(terms(line_at(x, c), maximum, t) * shrink, factor, addend_at(addends, c, addend)) * drop)
    if whole < x.size:
        part = part_at(x, whole, x.size - whole, k.zero)
        line = along(terms(part, maximum, t) * shrink, factor, addend_at(addends, whole, addend)) * drop
        put_part(result, whole, x.size - whole, line)


@helper
def write_terms(x, room, maximum, t, scaling, addends, addend, result):
    """The same from the logits of a block, whose maximum and what scaling_of said are given."""
    factor, shrink = scaling[:2], scaling[2]
    if is_far(maximum, t):
        come_near(x, maximum, room)
        x, maximum = section(room, 0, x.size), maximum - maximum
    if is_plain(t):
        write_near_terms(x, maximum, None, factor, shrink, addends, addend, result)
    else:
        write_near_terms(x, maximum, t, factor, shrink, addends, addend, result)


@helper
def scaling_of(factor, maximum, of_row, t):
    """What the terms of a block, relative to its own maximum, are multiplied with to be those of the row: a factor as a pair,
    and before it a number (line_of in c/results.inc.h)."""
    k = constants(maximum)
    if not finite(maximum):
        return factor[0], factor[1], k.one
    distance, lo = exponent(maximum, of_row, t[0], t[1])
    below, below_lo = exp_pair(distance, lo)
    hi, lo = times(factor, (below, below_lo))
    if -k.small < hi < k.small:
        hi, lo = times(factor, (below * k.boost, below_lo * k.boost))
        return hi, lo, k.one / (k.boost * k.exp_scale)
    return hi / k.exp_scale, lo / k.exp_scale, k.one


@inlined
def write_logs(x, maximum, f, t, result):
    k = constants(maximum)
    whole = x.size // k.lanes * k.lanes
    for c in range(0, whole, k.lanes):
        put_line(result, c, fast_log_probability(line_at(x, c), maximum, f, t))
    if whole < x.size:
        part = part_at(x, whole, x.size - whole, k.zero)
        put_part(result, whole, x.size - whole, fast_log_probability(part, maximum, f, t))


@helper
def write_log_probabilities(x, maximum, f, t, result):
    if is_plain(t):
        write_logs(x, maximum, f, None, result)
    else:
        write_logs(x, maximum, f, t, result)


@allocating
def softmax_rows(logits, where, temperature, log, out, begin, end):
    logits, where, out = borrowed(logits), borrowed(where), borrowed(out)
    k = constants(temperature)
    t = invert(temperature)
    x, e = scratch(temperature, TILE_BYTES), scratch(temperature, BATCH_BYTES)
    classes = logits.shape[1]
    masked = -k.infinity if log else k.zero
    if by_tile(logits, end - begin, TILE, SHORT_LINES_WHOLE):
        together = rows_of_tiles(x, classes)
        for start in range(begin, end, together):
            stop = min(start + together, end)
            load_tiles(x, logits, start, stop - start)
            for r in range(start, stop, k.lanes):
                tile, rows = tile_of(x, classes, r - start), min(k.lanes, stop - r)
                maximum, total, total_lo = reduce_tile(tile, where, r, rows, classes, t, not log)
                f = finish_row(maximum, total, total_lo)
                if log:
                    write_log_probabilities(tile, maximum, f, t, tile)
                else:
                    for c in range(0, tile.size, k.lanes):
                        put_line(tile, c, probability(line_at(tile, c), f[2], f[3]))
                mask_tile(tile, where, r, rows, masked)
            store_tiles(out, x, start, stop - start)
        return
    if is_short(logits, where, t) and out.strides[1] == out.itemsize:
        size, most = room_of(e, classes)
        numbers, closings = scratch(temperature, GROUP_BYTES), scratch(temperature, GROUP_BYTES)
        for r in range(begin, end, most):
            rows = min(most, end - r)
            maximum, total, total_lo = reduce_short_rows(logits, r, rows, end, e, not log, numbers, out)
            put_group(closings, 0, finish_row(maximum, total, total_lo))
            for lane in range(rows):
                f, result = closing_of(closings, lane), packed(block_of(out, r + lane, 0))
                if log:
                    logits_of_row = packed(block_of(logits, r + lane, 0))
                    write_log_probabilities(logits_of_row, numbers[lane], f, t, result)
                else:
                    scale_terms(section(e, lane * size, size), f[2:], None, k.zero, result)
        return
    blocks = block_room(logits)
    keep = not log and len(blocks) == 1
    in_place = not log and len(blocks) > 1 and out.strides[1] == out.itemsize
    for r in range(begin, end):
        if in_place:
            maximum, total, total_lo = reduce_row(logits, where, r, end, x, e, blocks, t, True, out)
        else:
            maximum, total, total_lo = reduce_row(logits, where, r, end, x, e, blocks, t, keep, None)
        f = finish_row(maximum, total, total_lo)
        for first in range(0, classes, k.block):
            target = block_of(out, r, first)
            direct = target.strides[0] == target.itemsize
            result = packed(target) if direct else section(x, 0, target.size)
            if keep:
                scale_terms(e, f[2:], None, k.zero, result)
            elif log:
                write_log_probabilities(stage(logits, where, r, first, x), maximum, f, t, result)
            else:
                of_block = blocks[first // k.block, 0]
                scaling = scaling_of(f[2:], of_block, maximum, t)
                if in_place:
                    scale_kept(result, scaling, None, k.zero, result)
                else:
                    of_block = of_block if finite(of_block) else maximum
                    write_terms(stage(logits, where, r, first, x), e, of_block, t, scaling, None, k.zero, result)
            mask(result, target.size, where, r, first, masked)
            if not direct:
                store(target, x)


@allocating
def logsumexp_rows(logits, where, temperature, out, begin, end):
    logits, where, out = borrowed(logits), borrowed(where), borrowed(out)
    k = constants(temperature)
    t = invert(temperature)
    x, e = scratch(temperature, TILE_BYTES), scratch(temperature, BATCH_BYTES)
    classes, inner = logits.shape[1], logits.shape[2]
    if by_tile(logits, end - begin):
        together = rows_of_tiles(x, classes)
        for start in range(begin, end, together):
            stop = min(start + together, end)
            load_tiles(x, logits, start, stop - start)
            for r in range(start, stop, k.lanes):
                tile, rows = tile_of(x, classes, r - start), min(k.lanes, stop - r)
                maximum, total, total_lo = reduce_tile(tile, where, r, rows, classes, t, False)
                f = finish_row(maximum, total, total_lo)
                store_line(out, log_sum(maximum, total, f, t), r, rows)
        return
    if is_short(logits, where, t):
        _, most = room_of(e, classes)
        numbers = scratch(temperature, GROUP_BYTES)
        for r in range(begin, end, most):
            rows = min(most, end - r)
            maximum, total, total_lo = reduce_short_rows(logits, r, rows, end, e, False, numbers, None)
            store_line(out, log_sum(maximum, total, finish_row(maximum, total, total_lo), t), r, rows)
        return
    blocks = block_room(logits)
    for r in range(begin, end):
        i, j = position(r, inner)
        maximum, total, total_lo = reduce_row(logits, where, r, end, x, e, blocks, t, False, None)
        out[i, j] = log_sum(maximum, total, finish_row(maximum, total, total_lo), t)


@allocating
def pick_rows(logits, where, indices, temperature, loss, out, begin, end):
    """Log-probabilities at indices (outer, K, inner), or the losses that are their negatives."""
    logits, where, indices, out = (
        borrowed(logits),
        borrowed(where),
        borrowed(indices),
        borrowed(out),
    )
    k = constants(temperature)
    t = invert(temperature)
    x, e = scratch(temperature, TILE_BYTES), scratch(temperature, BATCH_BYTES)
    classes, inner = logits.shape[1], logits.shape[2]
    if by_tile(logits, end - begin):
        picked = scratch(temperature, LINE_BYTES)
        together = rows_of_tiles(x, classes)
        for start in range(begin, end, together):
            stop = min(start + together, end)
            load_tiles(x, logits, start, stop - start)
            for r in range(start, stop, k.lanes):
                tile, rows = tile_of(x, classes, r - start), min(k.lanes, stop - r)
                maximum, total, total_lo = reduce_tile(tile, where, r, rows, classes, t, False)
                f = finish_row(maximum, total, total_lo)
                for pick in range(indices.shape[1]):
                    value = pick_from_tile(tile, indices[:, pick, :], r, rows, classes, picked)
                    store_line(out[:, pick, :], pick_of(value, maximum, f, t, loss), r, rows)
        return
    if is_short(logits, where, t):
        _, most = room_of(e, classes)
        numbers, picked = scratch(temperature, GROUP_BYTES), scratch(temperature, LINE_BYTES)
        put_line(picked, 0, k.nan)
        for r in range(begin, end, most):
            rows = min(most, end - r)
            maximum, total, total_lo = reduce_short_rows(logits, r, rows, end, e, False, numbers, None)
            f = finish_row(maximum, total, total_lo)
            for pick in range(indices.shape[1]):
                for lane in range(rows):
                    i, j = position(r + lane, inner)
                    label = indices[i, pick, j]
                    picked[lane] = logits[i, label, j] if 0 <= label < classes else k.nan
                store_line(out[:, pick, :], pick_of(line_at(picked, 0), maximum, f, t, loss), r, rows)
        return
    blocks = block_room(logits)
    for r in range(begin, end):
        i, j = position(r, inner)
        maximum, total, total_lo = reduce_row(logits, where, r, end, x, e, blocks, t, False, None)
        f = finish_row(maximum, total, total_lo)
        for pick in range(indices.shape[1]):
            label = indices[i, pick, j]
            value = logits[i, label, j] if 0 <= label < classes else k.nan
            out[i, pick, j] = pick_of(value, maximum, f, t, loss)


@helper
def put_pair(sums, which, lane, pair):
    """One row's, in the lines of pair number `which`."""
    lanes = constants(sums[0]).lanes
    sums[2 * which * lanes + lane], sums[(2 * which + 1) * lanes + lane] = pair


@inlined
def pair_at(sums, which):
    lanes = constants(sums[0]).lanes
    return line_at(sums, 2 * which * lanes), line_at(sums, (2 * which + 1) * lanes)


@allocating
def dense_rows(logits, where, labels, out, begin, end):
    logits, where, labels, out = borrowed(logits), borrowed(where), borrowed(labels), borrowed(out)
    k = constants(out[0, 0])
    t = (k.one, k.zero)
    x, e = scratch(out[0, 0], SLAB_BYTES), scratch(out[0, 0], SLAB_BYTES)
    classes, inner = logits.shape[1], logits.shape[2]
    if by_tile(logits, end - begin, SLAB):
        together = rows_of_tiles(x, classes)
        for start in range(begin, end, together):
            stop = min(start + together, end)
            load_tiles(x, logits, start, stop - start)
            load_tiles(e, labels, start, stop - start)
            for r in range(start, stop, k.lanes):
                tile, rows = tile_of(x, classes, r - start), min(k.lanes, stop - r)
                q = tile_of(e, classes, r - start)
                maximum, total, total_lo = reduce_tile(tile, where, r, rows, classes, t, False)
                f = finish_row(maximum, total, total_lo)
                mass, mass_lo = sum_tile(q, classes)
                for c in range(0, tile.size, k.lanes):
                    product, product_lo = weigh(line_at(tile, c), line_at(q, c), maximum)
                    put_line(tile, c, product)
                    put_line(q, c, product_lo)
                dot, dot_lo = sum_tile(tile, classes)
                low = sum_tile(q, classes)[0]
                store_line(out, dense_loss((dot, dot_lo + low), (mass, mass_lo), f), r, rows)
        return
    weight = section(x, 0, 0)
    if is_short(logits, where, t):
        _, most = room_of(e, classes)
        numbers, sums = scratch(out[0, 0], GROUP_BYTES), scratch(out[0, 0], GROUP_BYTES)
        for start in range(begin, end, most):
            rows = min(most, end - start)
            maximum, total, total_lo = reduce_short_rows(logits, start, rows, end, e, False, numbers, None)
            for lane in range(rows):
                row, q = packed(block_of(logits, start + lane, 0)), targets_at(labels, where, weight, start + lane, 0, x)
                dot, mass = weigh_block(row, q, numbers[lane])
                put_pair(sums, 0, lane, dot)
                put_pair(sums, 1, lane, mass)
            f = finish_row(maximum, total, total_lo)
            store_line(out, dense_loss(pair_at(sums, 0), pair_at(sums, 1), f), start, rows)
        return
    blocks = block_room(logits)
    for r in range(begin, end):
        i, j = position(r, inner)
        maximum, total, total_lo = reduce_row(logits, where, r, end, x, e, blocks, t, False, None)
        staged = stage(logits, where, r, 0, x)
        dot, mass = dot_targets(logits, where, labels, weight, None, r, maximum, staged, x, e)
        out[i, j] = dense_loss(dot, mass, finish_row(maximum, total, total_lo))


@spread_out
def write_slopes(
    logits,
    where,
    probabilities,
    weight,
    cap,
    label,
    target,
    r,
    maximum,
    blocks,
    t,
    loss,
    x,
    e,
    q,
    slopes,
    short,
    in_place,
    grad,
):
    """The gradient of a row, with the logit of its label. Its terms are in e, if it is `short`, or `in_place`."""
    k = constants(maximum)
    soft = probabilities.shape[1] != 0
    weighted = weight.size != 0 and loss.even != k.zero  # 0 times a negative weight is -0
    for first in range(0, logits.shape[1], k.block):
        place = block_of(grad, r, first)
        n = place.size
        direct = place.strides[0] == place.itemsize
        result = packed(place) if direct else section(x, 0, n)
        targets = targets_at(probabilities, where, weight, r, first, q) if soft else section(q, 0, n)
        for c in range(0, n if soft or weighted else 0, k.lanes):
            addend = line_of(weight, first + c) * loss.even if weighted else every_lane(loss.even)
            put_line(q, c, fma(line_of(targets, c), loss.keep, addend) if soft else addend)
        if cap.softcap != k.zero:  # before the logits may be overwritten
            load(slopes, block_of(logits, r, first))
            cap_row(slopes, n, cap, True)
        of_block = blocks[first // k.block, 0]
        scaling = loss.factor[0], loss.factor[1], k.one
        if not short:
            scaling = scaling_of(loss.factor, of_block, maximum, t)
        if short or in_place:
            kept = e if short else result
            if soft or weighted:
                scale_kept(kept, scaling, q, k.zero, result)
            else:
                scale_kept(kept, scaling, None, loss.even, result)
        else:
            staged, near = stage(logits, where, r, first, x, cap), of_block if finite(of_block) else maximum
            if soft or weighted:
                write_terms(staged, e, near, t, scaling, q, k.zero, result)
            else:
                write_terms(staged, e, near, t, scaling, None, loss.even, result)
        if first <= label < first + n:
            of_label = weight[label] if weight.size else k.one
            addend = fma(of_label, loss.keep, of_label * loss.even)
            term_ = e[label] if short else term(target, of_block, t)
            result[label - first] = along(term_ * scaling[2], scaling[:2], addend)
        if cap.softcap != k.zero:
            for c in range(n):
                result[c] *= slopes[c]
        mask(result, n, where, r, first, k.zero)
        if not direct:
            store(place, x)


@helper
def is_ignored(label, ignored):
    return ignored.size != 0 and label == ignored[0]


@helper
def weights_tile(q, classes, weight, where, r, rows):
    """The classes' weights, or ones, and 0 where masked out."""
    k = constants(q[0])
    for c in range(classes):
        put_line(q, c * k.lanes, weight[c] if weight.size else k.one)
    mask_tile(q, where, r, rows, k.zero)


@helper
def targets_tile(q, probabilities, where, weight, r, rows):
    k = constants(q[0])
    load_tile(q, probabilities, r, rows)
    for c in range(weight.size):
        put_line(q, c * k.lanes, line_at(q, c * k.lanes) * weight[c])
    mask_tile(q, where, r, rows, k.zero)


@helper
def look_at_rows(logits, where, labels, ignored, weight, sample_weight, loss_grad, r, rows, picked, per_row):
    """Labels, 0 where there is none; and lines of how many classes count, of (room for) the labels' logits, of their classes'
    weights, and of what each loss and each gradient is multiplied with. Missing rows are as the first."""
    k = constants(per_row[0])
    classes, lanes = logits.shape[1], k.lanes
    hard = labels.size != 0
    for lane in range(lanes):
        i, j = position(r + (lane if lane < rows else 0), logits.shape[2])
        counted = classes
        if where.shape[1]:
            counted = 0
            for c in range(classes):
                counted += where[i, c, j] != 0
        weight_of_row = sample_weight[i, j] if sample_weight.size else k.one
        label = labels[i, j] if hard else 0
        if hard and is_ignored(label, ignored):
            label, counted = 0, 0
        elif not 0 <= label < classes:  # it has changed since it was checked
            label, weight_of_row = 0, k.nan
        picked[lane] = label
        per_row[lane] = counted
        per_row[2 * lanes + lane] = weight[label] if hard and weight.size else k.one
        per_row[3 * lanes + lane] = weight_of_row
        per_row[4 * lanes + lane] = loss_grad[i, j] if loss_grad.size else k.one


@allocating
def loss_tiles(
    logits,
    where,
    probabilities,
    labels,
    ignored,
    weight,
    sample_weight,
    loss_grad,
    numbers,
    grad,
    out,
    begin,
    end,
    t,
    tiles,
    q,
    other,
):
    """loss_rows, LANES rows at once."""
    k = constants(numbers.softcap)
    cap = cap_of(numbers)
    per_row = scratch(numbers.softcap, ROW_NUMBERS_BYTES)
    classes, lanes = logits.shape[1], k.lanes
    size = classes * lanes
    hard = labels.size != 0
    nothing = every_lane(k.zero), every_lane(k.zero)
    picked = np.empty(lanes, np.int64)
    together = rows_of_tiles(tiles, classes)
    for r in range(begin, end, lanes):
        if (r - begin) % together == 0:
            load_tiles(tiles, logits, r, min(together, end - r))
        rows, x = min(lanes, end - r), tile_of(tiles, classes, (r - begin) % together)
        if numbers.softcap != k.zero:
            cap_row(x, size, cap, False)
        mask_tile(x, where, r, rows, -k.infinity)
        maximum = maximum_of_tile(x, classes)
        look_at_rows(logits, where, labels, ignored, weight, sample_weight, loss_grad, r, rows, picked, per_row)
        for lane in range(lanes):
            per_row[lanes + lane] = x[picked[lane] * lanes + lane]
        count, target, of_label = line_at(per_row, 0), line_at(per_row, lanes), line_at(per_row, 2 * lanes)
        weights, distances = nothing, nothing
        if numbers.label_smoothing != k.zero:
            weights_tile(q, classes, weight, where, r, rows)
            weights = sum_tile(q, classes)
            origin = select(finite(maximum), maximum, k.zero)
            for c in range(0, size, lanes):
                w = line_at(q, c)
                put_line(q, c, select(w == k.zero, k.zero, w * (origin - line_at(x, c))))
            distances = sum_tile(q, classes)
        if hard:
            dot, mass = weigh(target, of_label, maximum), (of_label, every_lane(k.zero))
        else:
            targets_tile(q, probabilities, where, weight, r, rows)
            mass = sum_tile(q, classes)
            for c in range(0, size, lanes):
                put_line(other, c, weigh(line_at(x, c), line_at(q, c), maximum)[0])
            dot = sum_tile(other, classes)
            for c in range(0, size, lanes):
                put_line(other, c, weigh(line_at(x, c), line_at(q, c), maximum)[1])
            dot = dot[0], dot[1] + sum_tile(other, classes)[0]
        total, total_lo, _ = reduce_loaded(x, classes, maximum, t, grad.size != 0)
        f = finish_row(maximum, total, total_lo)
        spread = Spread(target, count, weights, distances)
        loss = close_loss(numbers, maximum, f, t, dot, mass, spread, line_at(per_row, 3 * lanes), line_at(per_row, 4 * lanes))
        store_line(out, select(count == k.zero, k.zero, loss.value), r, rows)
        if grad.size == 0:
            continue
        for lane in range(lanes):
            per_row[lanes + lane] = x[picked[lane] * lanes + lane]
        slope = along(line_at(per_row, lanes), loss.factor, fma(of_label, loss.keep, of_label * loss.even))
        put_line(per_row, lanes, slope)
        for c in range(classes):
            even = loss.even
            if weight.size:  # not -0 for a negative weight, as in write_slopes
                even = select(even == k.zero, even, weight[c] * even)
            addend = even if hard else fma(line_at(q, c * lanes), loss.keep, even)
            factor, drop = loss.factor, every_lane(k.one)
            if hard:
                factor, drop = lifted(loss.factor, loss.even == k.zero)
            put_line(x, c * lanes, along(line_at(x, c * lanes), factor, addend) * drop)
        if hard:
            for lane in range(lanes):
                x[picked[lane] * lanes + lane] = per_row[lanes + lane]
        if numbers.softcap != k.zero:  # before the logits may be overwritten
            load_tile(other, logits, r, rows)
            cap_row(other, size, cap, True)
            for c in range(0, size, lanes):
                put_line(x, c, line_at(x, c) * line_at(other, c))
        mask_tile(x, where, r, rows, k.zero)
        for lane in range(lanes):
            if per_row[lane] == k.zero:
                for c in range(classes):
                    x[c * lanes + lane] = k.zero
        first = r - (r - begin) % together
        if r + rows == min(first + together, end):
            store_tiles(grad, tiles, first, r + rows - first)


@helper
def fill_row(grad, r, value):
    i, j = position(r, grad.shape[2])
    for c in range(grad.shape[1]):
        grad[i, c, j] = value


@allocating
def loss_short_rows(
    logits,
    where,
    probabilities,
    labels,
    ignored,
    weight,
    sample_weight,
    loss_grad,
    numbers,
    grad,
    out,
    begin,
    end,
    x,
    e,
    q,
    slopes,
):
    """loss_rows, step by step: what is one number of a row is made for LANES rows at once."""
    k = constants(numbers.softcap)
    lanes, t, cap = k.lanes, (k.one, k.zero), cap_of(numbers)
    size, most = room_of(e, logits.shape[1])
    of_rows, closings = scratch(numbers.softcap, GROUP_BYTES), scratch(numbers.softcap, GROUP_BYTES)
    per_row, sums = scratch(numbers.softcap, ROW_NUMBERS_BYTES), scratch(numbers.softcap, ROW_SUMS_BYTES)
    hard, smooth = labels.size != 0, numbers.label_smoothing != k.zero
    blocks, picked = block_room(logits), np.empty(lanes, np.int64)
    for c in range(sums.size):
        sums[c] = k.zero
    for start in range(begin, end, most):
        rows = min(most, end - start)
        if grad.size:
            maximum, total, total_lo = reduce_short_rows(logits, start, rows, end, e, True, of_rows, grad)
        else:
            maximum, total, total_lo = reduce_short_rows(logits, start, rows, end, e, False, of_rows, None)
        f = finish_row(maximum, total, total_lo)
        look_at_rows(logits, where, labels, ignored, weight, sample_weight, loss_grad, start, rows, picked, per_row)
        for lane in range(rows):
            r, top = start + lane, of_rows[lane]
            row = packed(block_of(logits, r, 0))
            per_row[lanes + lane] = row[picked[lane]]
            if smooth:
                spread = spread_block(row, where, weight, numbers.label_smoothing, -1, r, 0, top, q)
                put_pair(sums, 0, lane, spread.mass)
                put_pair(sums, 1, lane, spread.dot)
            if not hard:
                dot, mass = weigh_block(row, targets_at(probabilities, where, weight, r, 0, q), top)
                put_pair(sums, 2, lane, dot)
                put_pair(sums, 3, lane, mass)
        count, target, of_label = line_at(per_row, 0), line_at(per_row, lanes), line_at(per_row, 2 * lanes)
        if hard:
            dot, mass = weigh(target, of_label, maximum), (of_label, every_lane(k.zero))
        else:
            dot, mass = pair_at(sums, 2), pair_at(sums, 3)
        spread = Spread(target, count, pair_at(sums, 0), pair_at(sums, 1))
        loss = close_loss(numbers, maximum, f, t, dot, mass, spread, line_at(per_row, 3 * lanes), line_at(per_row, 4 * lanes))
        store_line(out, select(count == k.zero, k.zero, loss.value), start, rows)
        if grad.size == 0:
            continue
        put_group(closings, 0, (loss.factor[0], loss.factor[1], loss.keep, loss.even))
        for lane in range(rows):
            r = start + lane
            if per_row[lane] == k.zero:
                fill_row(grad, r, k.zero)
                continue
            factor, factor_lo, main, even = closing_of(closings, lane)
            write_slopes(
                logits,
                where,
                probabilities,
                weight,
                cap,
                picked[lane] if hard else -1,
                k.zero,
                r,
                of_rows[lane],
                blocks,
                t,
                Loss(k.zero, (factor, factor_lo), main, even),
                x,
                section(e, lane * size, size),
                q,
                slopes,
                True,
                False,
                grad,
            )


@allocating
def loss_rows(logits, where, probabilities, labels, ignored, weight, sample_weight, loss_grad, numbers, grad, out, begin, end):
    """A cross entropy with all options, and, where `grad` has classes, its gradient; arrays without elements stand for none."""
    logits, where, probabilities, labels = borrowed(logits), borrowed(where), borrowed(probabilities), borrowed(labels)
    weight, grad, out = borrowed(weight), borrowed(grad), borrowed(out)
    k = constants(numbers.softcap)
    cap = cap_of(numbers)
    t = invert(numbers.temperature if numbers.softcap == k.zero else k.one)
    x, e = scratch(numbers.softcap, SLAB_BYTES), scratch(numbers.softcap, BATCH_BYTES)
    q, slopes = scratch(numbers.softcap, SLAB_BYTES), scratch(numbers.softcap, SLAB_BYTES)
    classes, inner = logits.shape[1], logits.shape[2]
    if by_tile(logits, end - begin, SLAB):
        loss_tiles(
            logits,
            where,
            probabilities,
            labels,
            ignored,
            weight,
            sample_weight,
            loss_grad,
            numbers,
            grad,
            out,
            begin,
            end,
            t,
            x,
            q,
            slopes,
        )
        return
    if is_short(logits, where, t) and numbers.softcap == k.zero:
        loss_short_rows(
            logits,
            where,
            probabilities,
            labels,
            ignored,
            weight,
            sample_weight,
            loss_grad,
            numbers,
            grad,
            out,
            begin,
            end,
            x,
            e,
            q,
            slopes,
        )
        return
    blocks = block_room(logits)
    spreads = np.empty((len(blocks), 6), logits.dtype)
    keep = grad.size != 0 and len(blocks) == 1
    # The terms of several blocks wait in the gradient's row, unless it is that of what is read once more.
    apart = grad.ctypes.data != logits.ctypes.data and grad.ctypes.data != probabilities.ctypes.data
    in_place = grad.size != 0 and len(blocks) > 1 and grad.strides[1] == grad.itemsize and apart
    for r in range(begin, end):
        i, j = position(r, inner)
        label = labels[i, j] if labels.size else -1
        staged = x
        for b in range(len(blocks)):
            staged = stage(logits, where, r, b * k.block, x, cap)
            maximum = maximum_of(staged)
            spread = spread_block(staged, where, weight, numbers.label_smoothing, label, r, b * k.block, maximum, q)
            keep_spread(spreads, b, spread)
            upcoming = next_block(logits, r, b * k.block, end, staged)
            blocks[b, 0] = maximum
            if in_place:
                target = packed(block_of(grad, r, b * k.block))
                blocks[b, 1], blocks[b, 2] = keep_block(staged, e, target, maximum, t, upcoming)
            else:
                blocks[b, 1], blocks[b, 2], _ = reduce_block(staged, e, maximum, t, keep, upcoming)
            blocks[b, 3] = blocks[b, 4] = k.zero
        maximum, total, total_lo = join_blocks(blocks, t)[:3]
        spread = join_spreads(blocks, spreads, maximum)
        f = finish_row(maximum, total, total_lo)
        nothing = spread.count == k.zero or (labels.size and is_ignored(label, ignored))
        if nothing or (labels.size and not 0 <= label < classes):
            answer = k.zero if nothing else k.nan
            out[i, j] = answer
            fill_row(grad, r, answer)
            continue
        if labels.size:
            mass = (weight[label] if weight.size else k.one), k.zero
            dot = weigh(spread.target, mass[0], maximum)
        else:
            dot, mass = dot_targets(logits, where, probabilities, weight, cap, r, maximum, staged, x, q)
        of_row = (sample_weight[i, j] if sample_weight.size else k.one), (loss_grad[i, j] if loss_grad.size else k.one)
        loss = close_loss(numbers, maximum, f, t, dot, mass, spread, of_row[0], of_row[1])
        out[i, j] = loss.value
        if grad.size:
            write_slopes(
                logits,
                where,
                probabilities,
                weight,
                cap,
                label,
                spread.target,
                r,
                maximum,
                blocks,
                t,
                loss,
                x,
                e,
                q,
                slopes,
                len(blocks) == 1,
                in_place,
                grad,
            )


# ---- rows that are made a block at a time, and are never there as a whole ----


@allocating
def reduce_parts(logits, where, labels, weight, numbers, blocks, spreads, b, begin, end):
    """Steps 1 to 3 of block number b of rows, and what a loss needs beside; `where` and `weight` are the block's."""
    logits, where, weight = borrowed(logits), borrowed(where), borrowed(weight)
    k = constants(numbers.softcap)
    cap = cap_of(numbers)
    t = invert(numbers.temperature if numbers.softcap == k.zero else k.one)
    x, e, q = (
        scratch(numbers.softcap, BLOCK_BYTES),
        scratch(numbers.softcap, BLOCK_BYTES),
        scratch(numbers.softcap, BLOCK_BYTES),
    )
    for r in range(begin, end):
        staged = stage(logits, where, r, 0, x, cap)
        maximum = maximum_of(staged)
        label = labels[r, 0] - b * k.block
        keep_spread(spreads[r], b, spread_block(staged, where, weight, numbers.label_smoothing, label, r, 0, maximum, q))
        blocks[r, b, 0] = maximum
        blocks[r, b, 1], blocks[r, b, 2], _ = reduce_block(staged, e, maximum, t, False, staged)
        blocks[r, b, 3] = blocks[r, b, 4] = k.zero


@allocating
def write_parts(
    logits,
    where,
    labels,
    weight,
    of_classes,
    sample_weight,
    loss_grad,
    numbers,
    blocks,
    spreads,
    b,
    classes,
    grad,
    out,
    begin,
    end,
):
    """The losses, and of block number b the gradients, if `grad` has classes; `where` and `of_classes` are the block's,
    `weight` the row's."""
    logits, where, grad, out = borrowed(logits), borrowed(where), borrowed(grad), borrowed(out)
    k = constants(numbers.softcap)
    cap = cap_of(numbers)
    t = invert(numbers.temperature if numbers.softcap == k.zero else k.one)
    x, e = scratch(numbers.softcap, BLOCK_BYTES), scratch(numbers.softcap, BLOCK_BYTES)
    q, slopes = scratch(numbers.softcap, BLOCK_BYTES), scratch(numbers.softcap, BLOCK_BYTES)
    no_probabilities = logits[:, :0, :]
    for r in range(begin, end):
        maximum, total, total_lo = join_blocks(blocks[r], t)[:3]
        spread = join_spreads(blocks[r], spreads[r], maximum)
        if spread.count == k.zero:
            out[r, 0] = k.zero
            fill_row(grad, r, k.zero)
            continue
        label = labels[r, 0]
        if not 0 <= label < classes:  # it has changed since it was checked
            out[r, 0] = k.nan
            fill_row(grad, r, k.nan)
            continue
        mass = (weight[label] if weight.size else k.one), k.zero
        dot = weigh(spread.target, mass[0], maximum)
        of_row = (sample_weight[r, 0] if sample_weight.size else k.one), (loss_grad[r, 0] if loss_grad.size else k.one)
        f = finish_row(maximum, total, total_lo)
        loss = close_loss(numbers, maximum, f, t, dot, mass, spread, of_row[0], of_row[1])
        out[r, 0] = loss.value
        if grad.size:
            write_slopes(
                logits,
                where,
                no_probabilities,
                of_classes,
                cap,
                label - b * k.block,
                spread.target,
                r,
                maximum,
                blocks[r, b : b + 1],
                t,
                loss,
                x,
                e,
                q,
                slopes,
                False,
                False,
                grad,
            )


@inlined
def add_products(dot, low, p, g, log):
    """A group's g p, or g, and what those products' rounding left, added to the lanes."""
    if log:
        return add_line(dot, (g[0] + g[1]) + (g[2] + g[3])), low
    a, b, c, d = g[0] * p[0], g[1] * p[1], g[2] * p[2], g[3] * p[3]
    left = (fma(g[0], p[0], -a) + fma(g[1], p[1], -b)) + (fma(g[2], p[2], -c) + fma(g[3], p[3], -d))
    return add_line(dot, (a + b) + (c + d)), add_line(low, left)


@helper
def sum_products(p, g, log):
    """The sum over a block, as a pair."""
    k = constants(p[0])
    dot = every_lane(k.zero), every_lane(k.zero)
    low = dot
    group = LINES * k.lanes
    whole = p.size // group * group
    for c in range(0, whole, group):
        dot, low = add_products(dot, low, group_at(p, c), group_at(g, c), log)
    if whole < p.size:
        dot, low = add_products(dot, low, group_part_at(p, whole, k.zero), group_part_at(g, whole, k.zero), log)
    hi, lo = sum_of_lanes(dot[0], dot[1])
    return hi, lo + sum_of_lanes(low[0], low[1])[0]


@helper
def write_backward(p, g, total, log, result):
    k = constants(p[0])
    whole = p.size // k.lanes * k.lanes
    for c in range(0, whole, k.lanes):
        put_line(result, c, slope_of(log, line_at(p, c), line_at(g, c), total))
    if whole < p.size:
        left = p.size - whole
        line = slope_of(log, part_at(p, whole, left, k.zero), part_at(g, whole, left, k.zero), total)
        put_part(result, whole, left, line)


@allocating
def elements(array, r, first, room):
    """A block of a row: where it lies, or gathered in `room`."""
    row = block_of(array, r, first)
    if row.strides[0] == row.itemsize:
        return packed(row)
    load(room, row)
    return section(room, 0, row.size)


@allocating
def backward_rows(results, grad, log, out, begin, end):
    """From what softmax or log_softmax gave, p (g - sum(g p)) or g - exp(log p) sum(g)."""
    results, grad, out = borrowed(results), borrowed(grad), borrowed(out)
    k = constants(out[0, 0, 0])
    p, g, products = scratch(out[0, 0, 0], SLAB_BYTES), scratch(out[0, 0, 0], SLAB_BYTES), scratch(out[0, 0, 0], SLAB_BYTES)
    classes = results.shape[1]
    if by_tile(results, end - begin, SLAB):
        together, size = rows_of_tiles(p, classes), classes * k.lanes
        for start in range(begin, end, together):
            stop = min(start + together, end)
            load_tiles(p, results, start, stop - start)
            load_tiles(g, grad, start, stop - start)
            for first in range(0, (stop - start) * classes, size):
                tile, of_tile = section(p, first, size), section(g, first, size)
                if log:
                    total = sum_tile(of_tile, classes)
                else:
                    for c in range(0, size, k.lanes):
                        put_line(products, c, line_at(of_tile, c) * line_at(tile, c))
                    total = sum_tile(products, classes)
                    for c in range(0, size, k.lanes):
                        line, other = line_at(of_tile, c), line_at(tile, c)
                        put_line(products, c, fma(line, other, -(line * other)))
                    total = total[0], total[1] + sum_tile(products, classes)[0]
                total = total[0], select(finite(total[0]), total[1], k.zero)
                for c in range(0, size, k.lanes):
                    put_line(tile, c, slope_of(log, line_at(tile, c), line_at(of_tile, c), total))
            store_tiles(out, p, start, stop - start)
        return
    for r in range(begin, end):
        total = k.zero, k.zero
        for first in range(0, classes, k.block):
            part = sum_products(elements(results, r, first, p), elements(grad, r, first, g), log)
            total = gather(total, part) if first else part
        total = total[0], total[1] if finite(total[0]) else k.zero
        for first in range(0, classes, k.block):
            target = block_of(out, r, first)
            direct = target.strides[0] == target.itemsize
            result = packed(target) if direct else section(products, 0, target.size)
            write_backward(elements(results, r, first, p), elements(grad, r, first, g), total, log, result)
            if not direct:
                store(target, products)


@inlined
def slope_of(log, p, g, total):
    k = constants(p)
    if log:
        at = p - k.exp_center
        less_one, scale = exp_less_one(at, p, k.zero, k.zero, False)
        p = select(at < k.exp_lowest, k.zero, fma(less_one, scale, scale))
        unscale = -k.one / k.exp_scale
        return fma(p, total[0] * unscale, fma(p, total[1] * unscale, g))
    hi, lo = two_sum(g, -total[0])
    return p * (hi + (lo - total[1]))


@helper
def above(a, b):
    """Whether a comes before b among the largest: NaN above all, as np.argmax has it."""
    return a > b or (a != a and b == b)


@helper
def keep_largest(x, first, top_x, top_index, kept):
    """The k largest so far, largest first, the earlier of equals first; returns how many."""
    lanes = constants(x[0]).lanes
    last = top_x.size - 1
    for start in range(0, x.size, lanes):
        stop = min(start + lanes, x.size)
        if kept > last and stop == start + lanes and everywhere(line_at(x, start) <= top_x[last]):
            continue
        for c in range(start, stop):
            if kept > last and not above(x[c], top_x[last]):
                continue
            place = min(kept, last)
            kept = min(kept + 1, last + 1)
            while place > 0 and above(x[c], top_x[place - 1]):
                top_x[place] = top_x[place - 1]
                top_index[place] = top_index[place - 1]
                place -= 1
            top_x[place] = x[c]
            top_index[place] = first + c
    return kept


@helper
def largest_of_tile(x, classes):
    """Each row's largest logit, as keep_largest has it of one, and its class as a number."""
    k = constants(x[0])
    top, best, number = line_at(x, 0), every_lane(k.zero), every_lane(k.zero)
    for c in range(1, classes):
        line = line_at(x, c * k.lanes)
        number = number + k.one
        after = select(line > top, every_lane(k.one), k.zero)
        is_above = select(line == line, after, select(top == top, every_lane(k.one), k.zero)) > k.zero
        top, best = select(is_above, line, top), select(is_above, number, best)
    return top, best


@helper
def sum_score_tile(x, e, other, classes, maximum, ones, t):
    """As sum_scores for each row of a tile; the terms in e are lost."""
    k = constants(x[0])
    for c in range(0, classes * k.lanes, k.lanes):
        line, line_terms = line_at(x, c), line_at(e, c)
        put_line(e, c, entropy_term(line, line_terms, maximum, t))
        put_line(other, c, square(line, line_terms, maximum))
    dots, squares = sum_tile(e, classes)[0], sum_tile(other, classes)[0]
    is_sum = finite(maximum)
    dots = select(is_sum, -dots / k.exp_scale, k.zero)
    return dots, select(is_sum, squares / k.exp_scale + (ones - k.one), k.zero)


@inlined
def brier_of(label_term, total, squares, f):
    """sum (p - q)^2 for the one-hot q of a label, from its exp(x - maximum) * EXP_SCALE: see results.inc.h."""
    k = constants(total)
    reciprocal = f[2] * k.exp_scale
    below = k.one - label_term / k.exp_scale
    return fma(total, total, squares) * reciprocal * reciprocal + k.two * below * reciprocal


@allocating
def score_rows(
    logits,
    where,
    labels,
    temperature,
    prediction,
    confidence,
    entropy,
    logsumexp,
    top_indices,
    top_probabilities,
    loss,
    correct,
    brier,
    begin,
    end,
):
    logits, where, labels = borrowed(logits), borrowed(where), borrowed(labels)
    k = constants(temperature)
    t = invert(temperature)
    x, e = scratch(temperature, SLAB_BYTES), scratch(temperature, SLAB_BYTES)
    classes, inner = logits.shape[1], logits.shape[2]
    if top_indices.shape[2] == 1 and by_tile(logits, end - begin, SLAB):
        numbers, other = scratch(temperature, LINE_BYTES), scratch(temperature, SLAB_BYTES)
        for r in range(begin, end, k.lanes):
            rows = min(k.lanes, end - r)
            load_tile(x, logits, r, rows)
            mask_tile(x, where, r, rows, -k.infinity)
            maximum = maximum_of_tile(x, classes)
            copy(e, x, classes * k.lanes)
            total, total_lo, ones = reduce_loaded(e, classes, maximum, t, True)
            # By the logits: in e are terms, which beside an infinity are NaN.
            total, total_lo = spoil_tile(x, classes, maximum, total, total_lo)
            f = finish_row(maximum, total, total_lo)
            top, best = largest_of_tile(x, classes)
            certain = probability(k.exp_scale + (top - top), f[2], f[3])
            store_line(logsumexp, log_sum(maximum, total, f, t), r, rows)
            dots, squares = sum_score_tile(x, e, other, classes, maximum, ones, t)
            store_line(entropy, f[0] + dots * (f[2] * k.exp_scale), r, rows)
            store_line(confidence, certain, r, rows)
            store_line(top_probabilities[:, :, 0], certain, r, rows)
            if labels.size:
                value = pick_from_tile(x, labels, r, rows, classes, numbers)
                store_line(loss, k.zero - log_probability(value, maximum, f, t), r, rows)
                if brier.size:
                    store_line(brier, brier_of(line_term(value, maximum, t), total, squares, f), r, rows)
            put_line(numbers, 0, best)
            for lane in range(rows):
                i, j = position(r + lane, inner)
                prediction[i, j] = top_indices[i, j, 0] = int(numbers[lane])
                if labels.size:
                    correct[i, j] = labels[i, j] == prediction[i, j]
        return
    top_x = np.empty(top_indices.shape[2], logits.dtype)
    top_index = np.empty(top_indices.shape[2], np.int64)
    blocks = block_room(logits)
    for r in range(begin, end):
        i, j = position(r, inner)
        kept = 0
        for b in range(len(blocks)):
            first = b * k.block
            staged = stage(logits, where, r, first, x)
            maximum = maximum_of(staged)
            upcoming = next_block(logits, r, first, end, staged)
            blocks[b, 0] = maximum
            blocks[b, 1], blocks[b, 2], ones = reduce_block(staged, e, maximum, t, True, upcoming)
            blocks[b, 3], blocks[b, 4] = sum_scores(staged, e, maximum, ones, t)
            kept = keep_largest(staged, first, top_x, top_index, kept)
        maximum, total, total_lo, dot, squares = join_blocks(blocks, t)
        f = finish_row(maximum, total, total_lo)
        logsumexp[i, j] = log_sum(maximum, total, f, t)
        entropy[i, j] = f[0] + dot * (f[2] * k.exp_scale)
        for place in range(top_x.size):
            of_block = blocks[top_index[place] // k.block, 0]
            scaling = scaling_of(f[2:], of_block, maximum, t)
            top_probabilities[i, j, place] = probability(term(top_x[place], of_block, t) * scaling[2], scaling[0], scaling[1])
            top_indices[i, j, place] = top_index[place]
        confidence[i, j] = top_probabilities[i, j, 0]
        prediction[i, j] = top_index[0]
        if labels.size:
            label = labels[i, j]
            value = logits[i, label, j] if 0 <= label < classes else k.nan
            loss[i, j] = k.zero - log_probability(value, maximum, f, t)
            correct[i, j] = label == prediction[i, j]
            if brier.size:
                brier[i, j] = brier_of(term(value, maximum, t), total, squares, f)


# ---- half precision: some rows at a time are float32, in the bits that NumPy makes ----


@inlined
def from_bfloat16(half):
    return np.uint32(half) << np.uint32(16)


@inlined
def to_bfloat16(number):
    odd = (number >> np.uint32(16)) & np.uint32(1)
    nearest = np.uint32(number + np.uint32(0x7FFF) + odd)
    is_nan = np.uint32(number & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    nan = np.uint32((number & np.uint32(0x80000000)) | np.uint32(0x7FC00000))
    return np.uint32(nan if is_nan else nearest) >> np.uint32(16)


@inlined
def from_float16(half):
    half = np.uint32(half)
    size = np.uint32((half & np.uint32(0x7FFF)) << np.uint32(13))
    finite = np.float32(np.uint32(size).view(np.float32) * np.float32(2.0**112))  # exact, of subnormal numbers too
    beyond = np.uint32(size | np.uint32(0x7F800000))
    size = beyond if size >= np.uint32(0x0F800000) else np.float32(finite).view(np.uint32)
    return size | ((half & np.uint32(0x8000)) << np.uint32(16))


@inlined
def to_float16(number):
    size = np.uint32(number & np.uint32(0x7FFFFFFF))
    odd = (size >> np.uint32(13)) & np.uint32(1)
    nearest = np.uint32(size - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13)
    # beside 1/2 the last bit of a number counts for as much as that of a subnormal float16
    moved = np.float32(np.uint32(size).view(np.float32) + np.float32(0.5))
    subnormal = np.uint32(np.float32(moved).view(np.uint32) - np.uint32(0x3F000000))
    payload = np.uint32((size >> np.uint32(13)) & np.uint32(0x3FF))
    half = np.uint32(subnormal if size < np.uint32(0x38800000) else nearest)
    half = np.uint32(np.uint32(0x7C00) if size >= np.uint32(0x47800000) else half)
    nan = np.uint32(0x7C00) | np.uint32(max(payload, np.uint32(1)))
    half = np.uint32(nan if size > np.uint32(0x7F800000) else half)
    return half | ((number >> np.uint32(16)) & np.uint32(0x8000))


@helper
def convert(halves, numbers, widen, bfloat16):
    """From halves to numbers or back, all bits."""
    if widen and bfloat16:
        for i in range(halves.size):
            numbers[i] = from_bfloat16(halves[i])
    elif widen:
        for i in range(halves.size):
            numbers[i] = from_float16(halves[i])
    elif bfloat16:
        for i in range(halves.size):
            halves[i] = to_bfloat16(numbers[i])
    else:
        for i in range(halves.size):
            halves[i] = to_float16(numbers[i])


@allocating
def convert_rows(array, room, begin, end, widen, bfloat16):
    """Rows begin to end of an array of halves into room, one after the other, or back from there. Of another array, nothing."""
    classes, inner = array.shape[1], array.shape[2]
    if array.itemsize > 2:
        return
    if inner == 1 or array.strides[1] == array.itemsize:
        for r in range(begin, end):
            i, j = position(r, inner)
            row, numbers = strip(array, i, 0, j, classes), section(room, (r - begin) * classes, classes)
            if array.strides[1] == array.itemsize:
                convert(packed(row), numbers, widen, bfloat16)
            else:
                convert(row, numbers, widen, bfloat16)
        return
    r = begin
    while r < end:  # rows that lie side by side, class by class
        i, j = position(r, inner)
        count = min(end - r, inner - j)
        first = (r - begin) * classes
        numbers = section(room, first, count * classes)
        for c in range(classes):
            convert(array[i, c, j : j + count], numbers[c::classes], widen, bfloat16)
        r += count


@helper
def rows_at_once(array, piece):
    """How many rows of a piece are computed together: all but of halves."""
    if array.itemsize > 2:
        return max(1, piece)
    most = HALVES_BYTES // 4 // array.shape[1]
    whole = most // PIECE_ROWS * PIECE_ROWS
    return max(1, min(piece, whole if whole else most))


@allocating
def room_for(array, rows):
    """Room for so many rows of halves."""
    return np.empty(0 if array.itemsize > 2 else rows * array.shape[1], np.uint32)


@intrinsic
def rows_in(typingctx, array, room, begin):
    """The array; or one of float32 like an array of halves, whose rows from `begin` on lie in room, one after the other."""
    if isinstance(array.dtype, types.Float):

        def whole(context, builder, signature, args):
            return impl_ret_borrowed(context, builder, array, args[0])

        return array(array, room, types.intp), whole

    kind = types.Array(types.float32, 3, "A", aligned=False)

    def codegen(context, builder, signature, args):
        source = context.make_array(array)(context, builder, args[0])
        shape = cgutils.unpack_tuple(builder, source.shape)
        size = context.get_constant(types.intp, 4)
        row = builder.mul(shape[1], size)
        data = context.make_array(room)(context, builder, args[1]).data
        result = context.make_array(kind)(context, builder)
        populate_array(
            result,
            data=builder.bitcast(cgutils.pointer_add(builder, data, builder.neg(builder.mul(args[2], row))), result.data.type),
            shape=shape,
            strides=[builder.mul(shape[2], row), size, row],
            itemsize=size,
            meminfo=None,
        )
        return result._getvalue()

    return kind(array, room, types.intp), codegen


# ---- the operations on pieces of rows, serial or parallel ----


@helper
def first_outside(labels, classes, ignored):
    """The flat index of the first label outside [0, classes), and not ignored, or -1."""
    n = 0
    for i in range(labels.shape[0]):
        for pick in range(labels.shape[1]):
            for j in range(labels.shape[2]):
                label = labels[i, pick, j]
                if not (0 <= label < classes or is_ignored(label, ignored)):
                    return n
                n += 1
    return -1


@helper
def piece_end(logits, begin, piece):
    return min(begin + piece, logits.shape[0] * logits.shape[2])


# Room that rows lie in is used by each pass of the inner loop, so that it lasts until the end of that. Results take the place
# of the logits there.


def softmax_pieces(logits, where, temperature, log, out, bfloat16, pieces, piece):
    step = rows_at_once(logits, piece)
    for p in prange(pieces):
        room = room_for(logits, step)
        stop = piece_end(logits, p * piece, piece)
        for begin in range(p * piece, stop, step):
            end = min(begin + step, stop)
            convert_rows(logits, room, begin, end, True, bfloat16)
            softmax_rows(rows_in(logits, room, begin), where, temperature, log, rows_in(out, room, begin), begin, end)
            convert_rows(out, room, begin, end, False, bfloat16)


def logsumexp_pieces(logits, where, temperature, out, bfloat16, pieces, piece):
    step = rows_at_once(logits, piece)
    for p in prange(pieces):
        room = room_for(logits, step)
        stop = piece_end(logits, p * piece, piece)
        for begin in range(p * piece, stop, step):
            end = min(begin + step, stop)
            convert_rows(logits, room, begin, end, True, bfloat16)
            logsumexp_rows(rows_in(logits, room, begin), where, temperature, out, begin, end)


def pick_pieces(logits, where, indices, temperature, loss, out, bfloat16, pieces, piece):
    bad = first_outside(indices, logits.shape[1], np.empty(0, np.int64))
    if bad == -1:
        step = rows_at_once(logits, piece)
        for p in prange(pieces):
            room = room_for(logits, step)
            stop = piece_end(logits, p * piece, piece)
            for begin in range(p * piece, stop, step):
                end = min(begin + step, stop)
                convert_rows(logits, room, begin, end, True, bfloat16)
                pick_rows(rows_in(logits, room, begin), where, indices, temperature, loss, out, begin, end)
    return bad


def dense_pieces(logits, where, labels, out, bfloat16, pieces, piece):
    step = rows_at_once(logits, piece)
    for p in prange(pieces):
        room, others = room_for(logits, step), room_for(labels, step)
        stop = piece_end(logits, p * piece, piece)
        for begin in range(p * piece, stop, step):
            end = min(begin + step, stop)
            convert_rows(logits, room, begin, end, True, bfloat16)
            convert_rows(labels, others, begin, end, True, bfloat16)
            dense_rows(rows_in(logits, room, begin), where, rows_in(labels, others, begin), out, begin, end)


def loss_pieces(
    logits,
    where,
    probabilities,
    labels,
    ignored,
    weight,
    sample_weight,
    loss_grad,
    numbers,
    grad,
    out,
    bfloat16,
    pieces,
    piece,
):
    bad = first_outside(np.expand_dims(labels, 1), logits.shape[1], ignored)
    if bad == -1:
        step = rows_at_once(logits, piece)
        for p in prange(pieces):
            room, others = room_for(logits, step), room_for(probabilities, step)
            stop = piece_end(logits, p * piece, piece)
            for begin in range(p * piece, stop, step):
                end = min(begin + step, stop)
                convert_rows(logits, room, begin, end, True, bfloat16)
                convert_rows(probabilities, others, begin, end, True, bfloat16)
                loss_rows(
                    rows_in(logits, room, begin),
                    where,
                    rows_in(probabilities, others, begin),
                    labels,
                    ignored,
                    weight,
                    sample_weight,
                    loss_grad,
                    numbers,
                    rows_in(grad, room, begin),
                    out,
                    begin,
                    end,
                )
                convert_rows(grad, room, begin, end, False, bfloat16)
    return bad


def reduce_parts_pieces(logits, where, labels, weight, numbers, blocks, spreads, b, bfloat16, pieces, piece):
    for p in prange(pieces):
        stop = piece_end(logits, p * piece, piece)
        reduce_parts(logits, where, labels, weight, numbers, blocks, spreads, b, p * piece, stop)


def write_parts_pieces(
    logits,
    where,
    labels,
    weight,
    of_classes,
    sample_weight,
    loss_grad,
    numbers,
    blocks,
    spreads,
    b,
    classes,
    grad,
    out,
    bfloat16,
    pieces,
    piece,
):
    for p in prange(pieces):
        stop = piece_end(logits, p * piece, piece)
        write_parts(
            logits,
            where,
            labels,
            weight,
            of_classes,
            sample_weight,
            loss_grad,
            numbers,
            blocks,
            spreads,
            b,
            classes,
            grad,
            out,
            p * piece,
            stop,
        )


def backward_pieces(results, grad, log, out, bfloat16, pieces, piece):
    step = rows_at_once(results, piece)
    for p in prange(pieces):
        room, others = room_for(results, step), room_for(grad, step)
        stop = piece_end(results, p * piece, piece)
        for begin in range(p * piece, stop, step):
            end = min(begin + step, stop)
            convert_rows(results, room, begin, end, True, bfloat16)
            convert_rows(grad, others, begin, end, True, bfloat16)
            backward_rows(
                rows_in(results, room, begin), rows_in(grad, others, begin), log, rows_in(out, room, begin), begin, end
            )
            convert_rows(out, room, begin, end, False, bfloat16)


def score_pieces(
    logits,
    where,
    labels,
    temperature,
    prediction,
    confidence,
    entropy,
    logsumexp,
    top_indices,
    top_probabilities,
    loss,
    correct,
    brier,
    bfloat16,
    pieces,
    piece,
):
    bad = first_outside(np.expand_dims(labels, 1), logits.shape[1], np.empty(0, np.int64))
    if bad == -1:
        step = rows_at_once(logits, piece)
        for p in prange(pieces):
            room = room_for(logits, step)
            stop = piece_end(logits, p * piece, piece)
            for begin in range(p * piece, stop, step):
                end = min(begin + step, stop)
                convert_rows(logits, room, begin, end, True, bfloat16)
                score_rows(
                    rows_in(logits, room, begin),
                    where,
                    labels,
                    temperature,
                    prediction,
                    confidence,
                    entropy,
                    logsumexp,
                    top_indices,
                    top_probabilities,
                    loss,
                    correct,
                    brier,
                    begin,
                    end,
                )
    return bad


# ---- compiling, with a cache that cannot hurt ----

_BITS = np.dtype(np.uint16)


class _CacheFile(IndexDataCacheFile):
    """One file for each compiled signature, named by all that it depends on, with a checksum.

    Numba's own index file is read, changed and written back, so that two processes which compile
    different signatures can end up with one's machine code under the other's name.
    """

    def _name(self, key):
        return hashlib.sha256(repr((self._version, self._source_stamp, key)).encode()).hexdigest() + ".nbc"

    def save(self, key, data):
        payload = self._dump(data)
        self._save_data(self._name(key), (hashlib.sha256(payload).digest(), payload))

    def load(self, key):
        digest, payload = self._load_data(self._name(key))
        return pickle.loads(payload) if hashlib.sha256(payload).digest() == digest else None


class _Cache(FunctionCache):
    """Numba's cache, but whatever keeps a file from being read or written, the call goes on."""

    def __init__(self, function, parallel):
        super().__init__(function)
        self._parallel = parallel  # Numba's key has no options: the twins would share an entry
        self._cache_file = _CacheFile(self.cache_path, self._impl.filename_base, self._impl.locator.get_source_stamp())

    def _index_key(self, signature, codegen):
        return self._parallel, *super()._index_key(signature, codegen)

    def load_overload(self, signature, target_context):
        with suppress(Exception):
            return super().load_overload(signature, target_context)

    def save_overload(self, signature, data):
        with suppress(Exception):
            super().save_overload(signature, data)


def _array(dtype, ndim):
    # Any layout, aligned or not, so that one compiled version serves every array.
    return types.Array(dtype, ndim, "A", aligned=False)


def _signature(function, element):
    """Of logits whose elements are float32, float64, or uint16 for halves."""
    real = types.float32 if element == types.uint16 else element
    full, per_row, per_top = _array(element, 3), _array(real, 2), _array(real, 3)
    where, labels, label = _array(types.uint8, 3), _array(types.int64, 3), _array(types.int64, 2)
    flag, count = types.boolean, types.intp
    weight, numbers = types.Array(real, 1, "C"), types.NamedUniTuple(real, len(LossNumbers._fields), LossNumbers)
    operands = {
        softmax_pieces: (full, where, real, flag, full),
        logsumexp_pieces: (full, where, real, per_row),
        pick_pieces: (full, where, labels, real, flag, per_top),
        dense_pieces: (full, where, full, per_row),
        loss_pieces: (
            full,
            where,
            full,
            label,
            types.Array(types.int64, 1, "C"),
            weight,
            per_row,
            per_row,
            numbers,
            full,
            per_row,
        ),
        reduce_parts_pieces: (full, where, label, weight, numbers, per_top, per_top, count),
        write_parts_pieces: (
            full,
            where,
            label,
            weight,
            weight,
            per_row,
            per_row,
            numbers,
            per_top,
            per_top,
            count,
            count,
            full,
            per_row,
        ),
        backward_pieces: (full, full, flag, full),
        score_pieces: (
            full,
            where,
            label,
            real,
            label,
            per_row,
            per_row,
            per_row,
            labels,
            per_top,
            per_row,
            _array(flag, 2),
            per_row,
        ),
    }[function]
    return *operands, flag, count, count


@cache
def compiled(function, dtype, parallel):
    """The machine code of an operation: its entry point, which takes arrays of any strides."""
    (result,) = callable_from_jit(function, dtype, parallel).overloads.values()
    return result.entry_point


def callable_from_jit(function, dtype, parallel=False):
    """The same as compiled code can call it, which links the machine code that is there."""
    with compiling:  # threads that come at once wait for one to compile
        return _compiled_once(function, dtype, parallel)


def compile_all():
    """Everything that a call may want, into Numba's cache: yields what is done."""
    functions = softmax_pieces, logsumexp_pieces, pick_pieces, dense_pieces, loss_pieces, backward_pieces, score_pieces
    of_parts = reduce_parts_pieces, write_parts_pieces
    twins = (False, True) if _may_enter_threads() else (False,)
    for function, dtype, parallel in (
        *itertools.product(functions, (*REALS, _BITS), twins),
        *itertools.product(of_parts, REALS, twins),
    ):
        compiled(function, dtype, parallel)
        name = "half precision" if dtype == _BITS else dtype
        yield f"{function.__name__.removesuffix('_pieces')} {name}, {'threads' if parallel else 'serial'}"


@cache
def _compiled_once(function, dtype, parallel):
    dispatcher = njit(parallel=parallel, **OPTIONS)(function)
    with suppress(RuntimeError, OSError):  # no directory to write to: no cache
        dispatcher._cache = _Cache(function, parallel)
    dispatcher.compile(_signature(function, numba.from_dtype(dtype)))
    dispatcher.disable_compile()  # for other types: these are for all
    return dispatcher


# ---- threads ----

# One team of threads works at a time: a call beside a parallel one is serial. The bits are the same.
_parallel = threading.Lock()

PIECES_PER_THREAD = 8  # so that a thread that is held up does not hold up the others


def _run(function, threads, logits, *arguments):
    dtype = logits.dtype
    if dtype in HALVES:
        dtype, arguments = _BITS, (*map(_bits, arguments), dtype == HALVES[1])
        logits = _bits(logits)
    else:
        arguments += (False,)
    rows = logits.shape[0] * logits.shape[2]
    if threads > 1:
        threads = min(threads, rows, numba.config.NUMBA_NUM_THREADS)
    if threads > 1 and _may_enter_threads() and _parallel.acquire(blocking=False):
        try:
            return _run_parallel(compiled(function, dtype, True), threads, rows, logits, *arguments)
        finally:
            _parallel.release()
    return compiled(function, dtype, False)(logits, *arguments, 1, rows)


def _bits(value):
    """Halves as their bits."""
    return value.view(_BITS) if isinstance(value, np.ndarray) and value.dtype in HALVES else value


@cache
def _may_enter_threads():
    """Whether Numba's threads may be entered: its workqueue layer aborts the process where a second thread enters it, and
    the first may be in a function of the user's."""
    try:
        numba.get_num_threads()  # starts them
    except ValueError:  # NUMBA_THREADING_LAYER asks for one that is not installed
        return False
    return numba.threading_layer() != "workqueue"


def _run_parallel(kernel, threads, rows, *arguments):
    fair = -(-rows // threads)
    piece = min(fair, -(-rows // (threads * PIECES_PER_THREAD * PIECE_ROWS)) * PIECE_ROWS)
    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        return kernel(*arguments, -(-rows // piece), piece)
    finally:
        numba.set_num_threads(before)


# ---- the backend's functions ----


def _number_dtype(logits):
    """The dtype that is computed in, and that numbers of a row have."""
    return REALS[0] if logits.dtype in HALVES else logits.dtype


_NO_MASK = np.empty((0, 0, 0), np.uint8)  # no classes at all stand for no mask


def _where(where):
    return _NO_MASK if where is None else where.view(np.uint8)


def softmax(logits, where, temperature, out, threads):
    _run(softmax_pieces, threads, logits, _where(where), temperature, False, out)


def log_softmax(logits, where, temperature, out, threads):
    _run(softmax_pieces, threads, logits, _where(where), temperature, True, out)


def logsumexp(logits, where, temperature, out, threads):
    _run(logsumexp_pieces, threads, logits, _where(where), temperature, out)


def selective_log_softmax(logits, indices, temperature, out, threads):
    picked = np.empty(out.shape, _number_dtype(logits)) if out.dtype in HALVES else out
    status = _run(pick_pieces, threads, logits, _where(None), indices, temperature, False, picked)
    if picked is not out:
        out[...] = picked
    return status


def softmax_cross_entropy_with_logits(logits, labels, out, threads):
    _run(dense_pieces, threads, logits, _where(None), labels, out)


def sparse_softmax_cross_entropy_with_logits(logits, labels, out, threads):
    return _run(pick_pieces, threads, logits, _where(None), labels[:, None], 1.0, True, out[:, None])


def _weight(options, real):
    """No classes at all stand for no weights."""
    return np.ascontiguousarray([] if options.weight is None else options.weight, real)


def _loss_numbers(options):
    return LossNumbers(options.label_smoothing, options.z_loss, options.softcap or 0.0, options.temperature, *options.scale)


def cross_entropy(logits, where, probabilities, labels, sample_weight, loss_grad, grad, out, options, threads):
    if labels is not None and options.are_default and all(array is None for array in (where, sample_weight, grad)):
        # without options, the kernel that is made for it, with the same bits
        where, labels, out = _where(None), labels[:, None], out[:, None]
        return _run(pick_pieces, threads, logits, where, labels, options.temperature, True, out)
    real = _number_dtype(logits)
    no_classes, no_rows = np.empty((logits.shape[0], 0, logits.shape[2]), logits.dtype), np.empty((0, 0), real)
    ignored = [] if options.ignore_index is None else [options.ignore_index]
    return _run(
        loss_pieces,
        threads,
        logits,
        _where(where),
        no_classes if probabilities is None else probabilities,
        np.empty((0, 0), np.int64) if labels is None else labels,
        np.array(ignored, np.int64),
        _weight(options, real),
        no_rows if sample_weight is None else sample_weight,
        no_rows if loss_grad is None else loss_grad,
        _loss_numbers(options),
        no_classes if grad is None else grad,
        out,
    )


def tile_classes(dtype):
    return BLOCK_BYTES // dtype.itemsize


class TiledCrossEntropy:
    """As that of the C backend, of rows that are joined as they are written."""

    def __init__(self, shape, where, labels, sample_weight, loss_grad, out, options, threads):
        rows, self._classes = shape
        dtype = out.dtype
        no_rows = np.empty((0, 0), dtype)
        self.block = tile_classes(dtype)
        self._threads = threads
        self._where = _NO_MASK if where is None else where[:, :, None].view(np.uint8)
        self._labels, self._out = labels[:, None], out[:, None]
        self._of_rows = tuple(no_rows if of_row is None else of_row[:, None] for of_row in (sample_weight, loss_grad))
        self._weight, self._numbers = _weight(options, dtype), _loss_numbers(options)
        count = -(-self._classes // self.block)
        self._reduced = np.empty((rows, count, 5), dtype), np.empty((rows, count, 6), dtype)

    def _of_tile(self, first):
        """Which block it is, and its part of the mask and of the weights."""
        stop = first + self.block
        return first // self.block, self._where[:, first:stop], self._weight[first:stop]

    def reduce(self, tile, first):
        b, where, weight = self._of_tile(first)
        logits = tile[:, :, None]
        _run(reduce_parts_pieces, self._threads, logits, where, self._labels, weight, self._numbers, *self._reduced, b)

    def join(self):
        """Nothing: see above."""

    def write(self, tile=None, first=0):
        grad = self._out[:, :0, None] if tile is None else tile[:, :, None]
        b, where, weight = self._of_tile(first)
        _run(
            write_parts_pieces,
            self._threads,
            grad,
            where,
            self._labels,
            self._weight,
            weight,
            *self._of_rows,
            self._numbers,
            *self._reduced,
            b,
            self._classes,
            grad,
            self._out,
        )
        return -1


def softmax_backward(probs, grad, out, threads):
    _run(backward_pieces, threads, probs, grad, False, out)


def log_softmax_backward(log_probs, grad, out, threads):
    _run(backward_pieces, threads, log_probs, grad, True, out)


def score(logits, targets, temperature, scores, threads, brier=None):
    per_row = scores.prediction, scores.confidence, scores.entropy, scores.logsumexp
    if targets is None:
        targets, loss, correct = (
            np.empty((0, 0), np.int64),
            scores.entropy,
            np.empty((0, 0), np.bool_),
        )
    else:
        loss, correct = scores.loss, scores.correct
    top = scores.top_k_indices, scores.top_k_probabilities
    return _run(
        score_pieces,
        threads,
        logits,
        _where(None),
        targets,
        temperature,
        *per_row,
        *top,
        loss,
        correct,
        np.empty((0, 0), _number_dtype(logits)) if brier is None else brier,
    )
