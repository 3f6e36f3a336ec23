"""pylogits.dask: the bits of NumPy's calls, laziness, dtypes, errors; on threads, and once on two processes."""

import doctest
import warnings

import numpy as np
import pytest
from cases import dtype_of

import pylogits

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
lazy = pytest.importorskip("pylogits.dask")

REDUCTIONS = ("none", "sum", "mean", "sum_over_batch_size", "sum_by_nonzero_weights")

# Shape, axis, and the rows of the chunks.
LAYOUTS = {
    "last": ((90, 7), -1, (40, -1)),
    "first": ((7, 30, 5), 0, (-1, 11, 2)),
    "middle": ((4, 50, 3), 1, (3, -1, 1)),
    "one row": ((9,), 0, (-1,)),
    "one chunk": ((20, 4), 1, (-1, -1)),
    "no rows": ((0, 4), -1, (1, -1)),
}


class Arrays:
    """What functions are called with, in one layout; logits as NumPy's and as Dask's."""

    def __init__(self, layout, dtype=np.float32):
        shape, self.axis, chunks = LAYOUTS[layout]
        rng = np.random.default_rng(0)
        rows = np.delete(shape, self.axis)
        self.logits = (4 * rng.standard_normal(shape)).astype(dtype)
        self.chunked = da.from_array(self.logits, chunks=chunks)
        self.labels = rng.integers(shape[self.axis], size=rows)
        self.probabilities = pylogits.softmax(rng.standard_normal(shape), self.axis)
        self.picks = np.expand_dims(self.labels, self.axis)
        self.where = rng.random(shape) < 0.7
        np.put_along_axis(self.where, self.picks, True, self.axis)
        self.sample_weight = rng.random(rows)
        self.weight = rng.random(shape[self.axis])

    def call(self, module, name, *arguments, **options):
        """The results of a function of pylogits, or of pylogits.dask."""
        logits = self.logits if module is pylogits else self.chunked
        results = getattr(module, name)(*arguments, logits=logits, axis=self.axis, **options)
        return list(results) if isinstance(results, tuple) else [results]

    def check(self, name, **options):
        """The Dask arrays have the dtype, shape and bits of NumPy's results, which they know without computing."""
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # the mean of no rows
            expected = self.call(pylogits, name, **options)
            promised = self.call(lazy, name, **options)
            computed = dask.compute(*promised)
        for e, p, c in zip(expected, promised, computed, strict=True):
            if e is None:
                assert p is None
                continue
            assert p.dtype == p._meta.dtype == c.dtype == e.dtype
            assert p.shape == c.shape == e.shape
            assert c.tobytes() == e.tobytes()


@pytest.fixture(params=LAYOUTS)
def arrays(request):
    return Arrays(request.param)


def test_row_wise_functions_have_numpys_bits(arrays):
    for name in ("softmax", "log_softmax", "logsumexp"):
        arrays.check(name)
        arrays.check(name, where=arrays.where, temperature=0.7)
    arrays.check("logsumexp", keepdims=True)
    arrays.check("selective_log_softmax", indices=arrays.labels)
    arrays.check("selective_log_softmax", indices=arrays.picks, temperature=2.0)
    arrays.check("sparse_softmax_cross_entropy_with_logits", labels=arrays.labels)
    arrays.check("softmax_cross_entropy_with_logits", labels=arrays.probabilities)
    arrays.check("score")
    arrays.check("score", targets=arrays.labels, top_k=3, temperature=0.7)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_losses_have_numpys_bits(arrays, reduction):
    for options in (
        {"targets": arrays.labels},
        {"targets": arrays.probabilities, "weight": arrays.weight, "label_smoothing": 0.1, "where": arrays.where},
        {
            "targets": arrays.labels,
            "weight": arrays.weight,
            "sample_weight": arrays.sample_weight,
            "ignore_index": 1,
            "z_loss": 0.1,
            "softcap": 20.0,
            "where": arrays.where,
        },
    ):
        arrays.check("cross_entropy", reduction=reduction, **options)
        arrays.check("cross_entropy_value_and_grad", reduction=reduction, loss_grad=0.3, **options)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "int32"])
def test_dtypes(dtype):
    arrays = Arrays("last", dtype_of(dtype))
    arrays.check("softmax")
    arrays.check("score", targets=arrays.labels, top_k=2)
    arrays.check("cross_entropy_value_and_grad", targets=arrays.labels, label_smoothing=0.1)


@pytest.mark.parametrize("axis", [(0, 2), (2, 0), None])
def test_several_class_axes(axis):
    logits = np.random.default_rng(0).standard_normal((3, 20, 3))
    chunked = da.from_array(logits, chunks=(-1, -1 if axis is None else 7, -1))
    for name in ("softmax", "log_softmax", "logsumexp"):
        expected, got = (getattr(module, name)(x, axis) for module, x in ((pylogits, logits), (lazy, chunked)))
        assert np.asarray(got).tobytes() == expected.tobytes()
        assert got.shape == expected.shape


def test_what_broadcasts():
    arrays = Arrays("last")
    some = np.arange(7) < 5
    arrays.check("softmax", where=some)
    arrays.check("logsumexp", where=arrays.where[:, :1])
    arrays.check("softmax_cross_entropy_with_logits", labels=arrays.probabilities[0])
    arrays.check("cross_entropy", targets=arrays.probabilities, where=some, sample_weight=0.3)
    arrays.check("cross_entropy_value_and_grad", targets=arrays.labels, sample_weight=[0.3], reduction="sum")


def test_a_sum_of_many_rows_has_numpys_bits():
    """More rows than are summed at a time, in chunks that end elsewhere."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((150_000, 2), np.float32)
    targets = rng.integers(2, size=150_000)
    sample_weight = rng.random(150_000)
    expected = pylogits.cross_entropy_value_and_grad(logits, targets, sample_weight=sample_weight)
    got = lazy.cross_entropy_value_and_grad(da.from_array(logits, chunks=(40_000, 2)), targets, sample_weight=sample_weight)
    loss, grad = dask.compute(*got)
    assert loss == expected[0]
    np.testing.assert_array_equal(grad, expected[1])


def test_classes_in_chunks_are_brought_together_with_a_warning():
    logits = np.random.default_rng(0).standard_normal((40, 30), np.float32)
    chunked = da.from_array(logits, chunks=(10, 7))
    with pytest.warns(da.PerformanceWarning, match="class axis, -1") as caught:
        got = lazy.softmax(chunked)
    assert caught[0].filename == __file__
    np.testing.assert_array_equal(got, pylogits.softmax(logits))
    with pytest.warns(da.PerformanceWarning) as caught:
        got = lazy.cross_entropy(chunked, np.zeros(40, int))
    assert caught[0].filename == __file__
    assert got.compute() == pylogits.cross_entropy(logits, np.zeros(40, int))


def test_nothing_is_computed_before_it_is_asked_for():
    def fail(block):
        raise RuntimeError("computed")

    logits = da.zeros((20, 4), chunks=(5, 4)).map_blocks(fail, dtype=float, meta=np.empty((0, 0)))
    labels = da.zeros(20, chunks=7, dtype=int)
    arrays = [
        lazy.softmax(logits),
        lazy.cross_entropy(logits, labels, weight=[1.0, 2.0, 3.0, 4.0]),
        *lazy.cross_entropy_value_and_grad(logits, labels, ignore_index=1),
        *lazy.score(logits, labels),
    ]
    for array in arrays:
        with pytest.raises(RuntimeError, match="computed"):
            array.compute()


def test_a_bad_label_is_numpys_error_when_its_chunk_is_computed():
    logits, chunked = np.zeros((20, 4)), da.zeros((20, 4), chunks=(5, 4))
    labels = np.zeros(20, int)
    labels[12] = 4
    ignoring = np.where(np.arange(20) == 2, 5, labels)
    for call in (
        lambda module, logits: module.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits),
        lambda module, logits: module.selective_log_softmax(logits, labels),
        lambda module, logits: module.selective_log_softmax(logits, np.stack([labels, labels], axis=1)),
        lambda module, logits: module.score(logits, labels).loss,
        lambda module, logits: module.cross_entropy(logits, ignoring, ignore_index=5),
        lambda module, logits: module.cross_entropy_value_and_grad(logits, ignoring, ignore_index=5)[1],
    ):
        with pytest.raises(ValueError, match=r"4 at index \(12.*\) is outside \[0, 4\)") as numpys:
            call(pylogits, logits)
        promised = call(lazy, chunked)
        with pytest.raises(ValueError) as dasks:
            promised.compute()
        assert str(dasks.value) == str(numpys.value)


def test_other_errors_come_at_once():
    logits, labels = da.zeros((20, 4), chunks=(5, 4)), np.zeros(20, int)
    bad_calls = {
        "temperature must be positive": lambda: lazy.softmax(logits, temperature=0),
        "axis 2 is out of bounds": lambda: lazy.logsumexp(logits, 2),
        r"where of shape \(3,\) does not broadcast to \(20, 4\)": lambda: lazy.softmax(logits, where=np.ones(3, bool)),
        r"labels must have shape \(20,\), not \(4,\)": lambda: lazy.sparse_softmax_cross_entropy_with_logits(
            labels=labels[:4], logits=logits
        ),
        r"targets must have shape \(20, 4\), not \(20, 1\)": lambda: lazy.cross_entropy(logits, np.ones((20, 1))),
        "reduction must be one of": lambda: lazy.cross_entropy(logits, labels, reduction="median"),
        "weight must have one entry a class": lambda: lazy.cross_entropy(logits, labels, weight=[1.0]),
        "top_k must be between 1 and": lambda: lazy.score(logits, top_k=5),
        r"loss_grad of shape \(1,\) does not broadcast to \(\)": lambda: lazy.cross_entropy_value_and_grad(
            logits, labels, loss_grad=[1.0]
        ),
        "chunks of known sizes": lambda: lazy.cross_entropy(logits[logits[:, 0] == 0], labels),
    }
    for message, call in bad_calls.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="axis must be an int"):
        lazy.cross_entropy(logits, labels, axis="last")
    with pytest.raises(TypeError, match="logits must hold real numbers"):
        lazy.softmax(logits.astype(complex))


def test_a_mean_of_nothing_warns_when_it_is_computed():
    loss = lazy.cross_entropy(da.zeros((6, 2), chunks=(3, 2)), np.zeros(6, int), ignore_index=0)
    with pytest.warns(RuntimeWarning, match="the mean of no losses is NaN"):
        assert np.isnan(loss.compute())


def test_rows_of_unknown_number():
    """As they come from a Dask data frame or a mask."""
    logits = np.random.default_rng(0).standard_normal((20, 4))
    chunked = da.from_array(logits, chunks=(5, 4))
    np.testing.assert_array_equal(lazy.softmax(chunked[chunked[:, 0] > 0]), pylogits.softmax(logits[logits[:, 0] > 0]))


def test_two_processes_have_numpys_bits():
    distributed = pytest.importorskip("distributed")
    arrays = Arrays("last")
    options = {"targets": arrays.labels, "sample_weight": arrays.sample_weight}
    port = {"dashboard_address": "localhost:0"}  # not 8787, which two tests would have at a time
    with (
        distributed.LocalCluster(n_workers=2, dashboard_address=None, scheduler_kwargs=port) as cluster,
        distributed.Client(cluster),
    ):
        arrays.check("score", targets=arrays.labels, top_k=3)
        arrays.check("cross_entropy_value_and_grad", **options)
        arrays.labels[50] = 7
        bad = lazy.sparse_softmax_cross_entropy_with_logits(labels=arrays.labels, logits=arrays.chunked)
        with pytest.raises(ValueError, match=r"label 7 at index \(50,\) is outside \[0, 7\)"):
            bad.compute()


@pytest.mark.parametrize("name", lazy.__all__)
def test_docstring(name):
    report = []
    for test in doctest.DocTestFinder().find(getattr(lazy, name), name, globs={}):
        assert test.examples
        doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert report == []
