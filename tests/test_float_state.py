"""With another rounding mode, or subnormals flushed to zero, results have the same bits, and the caller keeps the state."""

import ctypes
import platform
import sys

import numpy as np
import pytest

import pylogits

linux = pytest.mark.skipif(sys.platform != "linux", reason="the state is set through glibc here")
pytestmark = linux

# In glibc's fenv_t of x86-64; of AArch64 the control register is the first word.
MXCSR = 28
FLUSH = {"x86_64": (MXCSR, 0x8040), "aarch64": (0, 1 << 24)}
ROUNDING = {"x86_64": (0x400, 0x800, 0xC00), "aarch64": (0x400000, 0x800000, 0xC00000)}


def rounding_of(mode):
    return lambda libm: libm.fesetround(mode)


def flush(libm):
    """FTZ and DAZ, as a library built with -ffast-math sets them."""
    at, bits = FLUSH[platform.machine()]
    environment = (ctypes.c_char * 64)()
    libm.fegetenv(environment)
    word = ctypes.c_uint32.from_buffer(environment, at)
    word.value |= bits
    libm.fesetenv(environment)


MACHINE = platform.machine() if platform.machine() in FLUSH else "x86_64"
STATES = [pytest.param(flush, id="flush")] + [
    pytest.param(rounding_of(mode), id=name) for mode, name in zip(ROUNDING[MACHINE], ("down", "up", "to zero"), strict=True)
]


@pytest.fixture
def libm():
    """The C library's functions; the standard state comes back afterwards."""
    if platform.machine() not in FLUSH:
        pytest.skip(f"the control register of {platform.machine()} is not known here")
    library = ctypes.CDLL("libm.so.6")
    library.fegetenv.argtypes = library.fesetenv.argtypes = (ctypes.c_void_p,)
    yield library
    library.fesetenv(-1)


def control(libm):
    """The rounding mode and the bits that flush."""
    environment = (ctypes.c_char * 64)()
    libm.fegetenv(environment)
    at, bits = FLUSH[platform.machine()]
    return libm.fegetround(), ctypes.c_uint32.from_buffer(environment, at).value & bits


def inputs(dtype):
    """Logits, also in float16, labels, upstream gradients, class and sample weights, probabilities."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((700, 100)) * 3).astype(dtype)
    x[:100] *= np.finfo(dtype).tiny  # subnormal logits
    x[100:200, 0] = -np.log(np.finfo(dtype).tiny) - 1  # subnormal probabilities of the others
    x[200:300, 0] = 20 if dtype == np.float32 else 45
    grad = rng.standard_normal(x.shape).astype(dtype)
    weights = rng.random(100).astype(dtype), rng.random(700).astype(dtype)
    return x, np.clip(x, -100, 100).astype(np.float16), x.argmax(-1), grad, *weights, pylogits.softmax(x)


def results(x, half, labels, grad, weight, sample_weight, probabilities):
    """Of everything, with subnormal results, and sums whose bits depend on the rounding."""
    options = {"weight": weight, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 20.0, "temperature": 0.7}
    return [
        pylogits.softmax(x),
        pylogits.softmax(x, temperature=0.7),
        pylogits.log_softmax(x, axis=0),
        pylogits.logsumexp(x, axis=None),
        pylogits.logsumexp(x),
        pylogits.softmax(half),
        pylogits.softmax(labels.reshape(70, 10)),
        pylogits.selective_log_softmax(x, labels),
        pylogits.softmax_backward(grad, probabilities),
        pylogits.log_softmax_backward(grad, x),
        pylogits.softmax_cross_entropy_with_logits(labels=probabilities, logits=x),
        pylogits.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=x),
        pylogits.cross_entropy(x, labels),
        *pylogits.cross_entropy_value_and_grad(x[:600], labels[:600]),
        pylogits.cross_entropy(x, labels, **options),
        *pylogits.cross_entropy_value_and_grad(x, labels, sample_weight=sample_weight, ignore_index=3, **options),
        *pylogits.cross_entropy_value_and_grad(x, probabilities, reduction="none"),
        *pylogits.score(x, labels),
    ]


@pytest.mark.parametrize("state", STATES)
def test_bits_and_state(backend, dtype, state, libm):
    given = inputs(dtype.type)
    expected = results(*given)
    state(libm)
    before = control(libm)
    got = results(*given)
    after = control(libm)
    libm.fesetenv(-1)
    assert before == after != control(libm)
    for a, b in zip(got, expected, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_what_numpy_is_told_to_do_about_errors(backend, dtype):
    """Overflow, underflow, infinities and NaN are results here."""
    given = inputs(dtype.type)
    expected = results(*given)
    with np.errstate(all="raise"):
        got = results(*given)
        assert np.geterr()["over"] == "raise"
    for a, b in zip(got, expected, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("state", STATES)
def test_state_is_kept_by_errors(state, libm):
    state(libm)
    before = control(libm)
    with pytest.raises(ValueError, match="label 2"):
        pylogits.sparse_softmax_cross_entropy_with_logits(labels=[2], logits=[[0.0, 1.0]])
    with pytest.raises(ValueError, match="temperature"):
        pylogits.softmax([0.0], temperature=-1.0)
    assert control(libm) == before
