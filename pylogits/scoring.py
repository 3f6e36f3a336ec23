"""Scores of rows of logits for batch jobs, and the check for the field's commonest mistake."""

import warnings
from typing import Any, SupportsIndex

import ml_dtypes
import numpy as np

from pylogits import _device, _rows
from pylogits._float_state import standard_arithmetic
from pylogits._reference import Scores


class DoubleSoftmaxWarning(UserWarning):
    """Logits that look like probabilities: softmax has probably been applied before.

    See Also
    --------
    check_logits : gives it.

    Examples
    --------
    Made an error, it ends a program:

    >>> import warnings
    >>> import pylogits
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("error", pylogits.DoubleSoftmaxWarning)
    ...     pylogits.check_logits([[0.25, 0.75], [0.5, 0.5]])  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    DoubleSoftmaxWarning: ...
    """


def score(
    logits: Any,
    targets: Any = None,
    *,
    axis: SupportsIndex = -1,
    top_k: SupportsIndex = 1,
    temperature: float = 1.0,
) -> Scores:
    """Prediction, confidence, entropy and loss of every row, in one pass over the logits.

    Parameters
    ----------
    logits : array_like of float, shape (..., C, ...)
        Raw scores, as for `softmax`.
    targets : array_like of int, shape of `logits` without `axis`, optional
        The true classes, in [0, C).
    axis : int, optional
        The class axis, the last by default.
    top_k : int, optional
        How many of the best classes to give, 1 to C.
    temperature : float, optional
        Positive and finite.

    Returns
    -------
    Scores
        A named tuple: prediction, confidence, entropy, logsumexp, top_k_indices, top_k_probabilities, and with targets
        loss and correct (else None). Floats have the dtype of `logits` (float32 for float16 and bfloat16). A NaN counts as
        the largest logit, as in ``np.argmax``.

    Raises
    ------
    TypeError, ValueError
        For arguments of a wrong type, shape or value, for a target outside [0, C) and for rows without classes.

    Examples
    --------
    >>> import pylogits
    >>> scores = pylogits.score([[0.5, 1.5, 0.1], [2.2, 1.3, 1.7]], [1, 2])
    >>> scores.prediction, scores.correct
    (array([1, 0]), array([ True, False]))
    >>> scores.loss
    array([0.4790107 , 1.19967598])
    """
    scores, _ = score_with_brier(logits, targets, axis, top_k, temperature, brier=False)
    return scores


@standard_arithmetic
def score_with_brier(
    logits: Any,
    targets: Any,
    axis: SupportsIndex,
    top_k: SupportsIndex,
    temperature: float,
    *,
    brier: bool = True,
    threads: int | None = None,
) -> tuple[Scores, Any]:
    """`score`, and the Brier score of each row, of arrays of the CPU with targets: sum (p - q)^2 for the one-hot q of a target.

    `threads` is how many to take, where that is not for the dispatcher to say.
    """
    array = _rows.to_array(logits, "logits")
    dtype = _rows.check_floats(array, "logits")
    number = _rows.check_single_axis(axis, array.ndim)
    temperature = _rows.check_temperature(temperature, dtype)
    classes = array.shape[number]
    rows = array.shape[:number] + array.shape[number + 1 :]
    try:
        k = int(np.asarray(top_k).__index__())
    except TypeError:
        raise TypeError(f"top_k must be an int, not {top_k!r}") from None
    if not 1 <= k <= classes:
        raise ValueError(f"top_k must be between 1 and the number of classes, {classes}, not {k}")
    labels, on_gpu = None, _device.is_on_gpu(array)
    if targets is not None:
        labels = _rows.check_integers(targets, "targets", on_gpu)
        if labels.shape != rows:
            raise ValueError(f"targets must have the shape of logits without axis {number}, {rows}, not {labels.shape}")
    floats, integers = _rows.row_dtype(dtype), np.dtype(np.int64)
    # Kernels of the CPU write the top k of a row side by side.
    best = (*rows[:number], k, *rows[number:]) if on_gpu else (*rows, k)
    kinds = [(rows, integers), (rows, floats), (rows, floats), (rows, floats), (best, integers), (best, floats)]
    if labels is not None:
        kinds += [(rows, floats), (rows, np.dtype(np.bool_))]
        if brier:
            kinds.append((rows, floats))
    results = [_rows.empty(logits, shape, kind) for shape, kind in kinds]
    row_outputs = list(results)
    if on_gpu:
        row_outputs[4:6] = [np.moveaxis(result, number, -1) for result in results[4:6]]
    if array.size:
        module, usual = _rows.backend("score", array, dtype, (number,))

        def kernel(logits: Any, *arrays: Any) -> Any:
            labels, arrays = (arrays[0], arrays[1:]) if targets is not None else (None, (*arrays, None, None))
            return module.score(logits, labels, temperature, Scores(*arrays[:8]), threads or usual, *arrays[8:])

        _rows.run(
            kernel,
            module,
            (number,),
            _rows.Operands(
                [array],
                row_inputs=[] if labels is None else [_rows.as_labels(labels)],
                row_outputs=row_outputs,
            ),
            None if labels is None else lambda: _rows.raise_bad_label(labels, "target", classes),
        )
    if not on_gpu:
        results[4:6] = [np.moveaxis(results[4], -1, number), np.moveaxis(results[5], -1, number)]
    delivered = [_rows.deliver(logits, result, None) for result in results]
    delivered += [None] * (9 - len(delivered))
    return Scores(*delivered[:8]), delivered[8]


@standard_arithmetic
def check_logits(logits: Any, axis: SupportsIndex = -1) -> None:
    """Warn when the rows already look like probabilities.

    Softmax applied twice is the commonest mistake with logits: it still gives probabilities, and training still goes
    somewhere, only flatter and slower. Rows that are all in [0, 1] and all sum to 1 are taken for its output.

    Parameters
    ----------
    logits : array_like of float, shape (..., C, ...)
        What is about to be used as logits.
    axis : int, optional
        The class axis, the last by default.

    Warns
    -----
    DoubleSoftmaxWarning
        When all rows are non-negative and sum to 1, to the precision of their dtype, and C is at least 2.

    Examples
    --------
    >>> import pylogits, warnings
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     pylogits.check_logits(pylogits.softmax([0.5, 1.5, 0.1]))
    >>> caught[0].category.__name__
    'DoubleSoftmaxWarning'
    """
    array = _rows.to_numpy(logits, "logits")
    dtype = _rows.check_floats(array, "logits")
    number = _rows.check_single_axis(axis, array.ndim)
    if not array.size or array.shape[number] < 2 or array.dtype.kind in "iub":
        return
    if not (array.min() >= 0 and array.max() <= 1):  # a NaN is in no range
        return
    sums = array.sum(axis=number, dtype=np.promote_types(_rows.row_dtype(dtype), np.float64))
    # softmax in float32 by any peer sums to 1 within 1e-5; in half precision the roundings of the terms dominate
    tolerance = max(1e-4, 8 * float(ml_dtypes.finfo(dtype).eps))  # type: ignore[no-untyped-call]
    if bool((abs(sums - 1) <= tolerance).all()):
        warnings.warn(
            "the logits look like probabilities: every row is in [0, 1] and sums to 1. "
            "Softmax has probably been applied already; pass the raw scores",
            DoubleSoftmaxWarning,
            stacklevel=3,
        )
