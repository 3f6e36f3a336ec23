"""Who is timed: each backend of pylogits, and the same operation in other libraries.

All get the same NumPy memory, JAX a copy of it that is made before. A case with `out` has its result written to memory that
is there before the call, by all who can; any other call goes the whole way, from NumPy array to NumPy array.
"""

from contextlib import nullcontext

import ml_dtypes
import numpy as np
from timed import FULL_OPS, arguments

import pylogits

BACKENDS = ("c", "numba")
PEERS = ("torch", "jax", "scipy", "onnxruntime", "numpy")
SPARSE = "sparse_softmax_cross_entropy_with_logits"


def prepare(name, case):
    """Return a function that runs a case and returns its result; ImportError where it can't."""
    given = arguments(case)
    logits, labels = given["logits"], given.get("labels")
    out = np.empty_like(logits) if case.out else None
    if name in BACKENDS:
        return _ours(name, case, logits, labels, out)
    maker = {"torch": _torch, "jax": _jax, "scipy": _scipy, "onnxruntime": _onnxruntime, "numpy": _numpy}[name]
    return maker(case, logits, labels, out)


def active(name):
    """Return a context in which the calls of `name` run: choosing a backend is not timed."""
    return pylogits.use_backend(name) if name in BACKENDS else nullcontext()


def _ours(name, case, logits, labels, out):
    try:
        with active(name):
            pass
    except ValueError as error:
        raise ImportError(error) from None
    function, axis = getattr(pylogits, case.op), case.axis
    if labels is not None:
        return lambda: function(labels=labels, logits=logits, axis=axis)
    if out is not None:
        return lambda: function(logits, axis, out=out)
    if axis == -1:
        return lambda: function(logits)
    return lambda: function(logits, axis)


def _torch(case, logits, labels, out):
    import torch

    torch.set_num_threads(pylogits.get_num_threads())
    axis = case.axis
    if logits.dtype == ml_dtypes.bfloat16:

        def wrap(array):
            return (
                torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if array.itemsize == 2 else torch.from_numpy(array)
            )

        def unwrap(tensor):
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    else:
        wrap, unwrap = torch.from_numpy, torch.Tensor.numpy
    if labels is not None:
        loss = torch.nn.functional.cross_entropy
        return lambda: unwrap(loss(wrap(logits), wrap(labels), reduction="none"))
    function = getattr(torch, case.op)
    if out is None:
        return lambda: unwrap(function(wrap(logits), axis))
    x, target = wrap(logits), wrap(out)

    def call():
        function(x, axis, out=target)
        return out

    return call


def _jax(case, logits, labels, out):
    import jax
    from jax import numpy as jnp

    jax.config.update("jax_enable_x64", True)
    axis = case.axis
    if case.op == SPARSE:

        def function(x, labels):
            picked = jnp.take_along_axis(x, jnp.expand_dims(labels, axis), axis).squeeze(axis)
            return jax.nn.logsumexp(x, axis) - picked
    elif labels is not None:

        def function(x, labels):
            return -(labels * jax.nn.log_softmax(x, axis)).sum(axis)
    else:

        def function(x):
            return getattr(jax.nn, case.op)(x, axis)

    compiled = jax.jit(function)
    given = [jax.device_put(array) for array in (logits, labels) if array is not None]
    return lambda: np.asarray(compiled(*given))


def _scipy(case, logits, labels, out):
    from scipy import special

    if logits.dtype == ml_dtypes.bfloat16:
        raise ImportError("SciPy does not know bfloat16")
    axis = case.axis
    if case.op == SPARSE:
        picks = np.expand_dims(labels, axis)
        return lambda: special.logsumexp(logits, axis) - np.take_along_axis(logits, picks, axis).squeeze(axis)
    if labels is not None:
        return lambda: -(labels * special.log_softmax(logits, axis)).sum(axis)
    function = getattr(special, case.op)
    return lambda: function(logits, axis)


def _numpy(case, logits, labels, out):
    """As it is written down when there is no library: safe from overflow, and no more."""
    axis = case.axis
    picks = np.expand_dims(labels, axis) if case.op == SPARSE else None

    def call():
        x = logits - logits.max(axis, keepdims=True)
        terms = np.exp(x)
        total = terms.sum(axis, keepdims=True)
        match case.op:
            case "softmax":
                return np.divide(terms, total, out=out)
            case "log_softmax":
                return np.subtract(x, np.log(total), out=out)
            case "logsumexp":
                return (np.log(total) + logits.max(axis, keepdims=True)).squeeze(axis)
            case "softmax_cross_entropy_with_logits":
                return (labels * (np.log(total) - x)).sum(axis)
        return (np.log(total) - np.take_along_axis(x, picks, axis)).squeeze(axis)

    return call


def _onnxruntime(case, logits, labels, out):
    import onnx
    import onnxruntime
    from onnx import helper

    if logits.dtype == ml_dtypes.bfloat16:
        raise ImportError("ONNX Runtime has no bfloat16 kernels for a CPU")
    axis = case.axis % logits.ndim
    real = helper.np_dtype_to_tensor_dtype(logits.dtype)
    feed = {"logits": logits} if labels is None else {"logits": logits, "labels": labels}
    if case.op == SPARSE:
        node = helper.make_node("SoftmaxCrossEntropyLoss", [*feed], ["result"], reduction="none")
    elif labels is not None:
        raise ImportError(f"ONNX has no {case.op}")
    elif case.op in FULL_OPS:
        kind = {"softmax": "Softmax", "log_softmax": "LogSoftmax"}[case.op]
        node = helper.make_node(kind, [*feed], ["result"], axis=axis)
    else:
        node = helper.make_node("ReduceLogSumExp", [*feed], ["result"], axes=[axis], keepdims=0)
    info = helper.make_tensor_value_info
    inputs = [info("logits", real, logits.shape), info("labels", onnx.TensorProto.INT64, ["rows"])]
    graph = helper.make_graph([node], "one", inputs[: len(feed)], [info("result", real, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = pylogits.get_num_threads()
    # Else its threads spin on, on the cores of whoever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    if out is None:
        return lambda: session.run(None, feed)[0]
    binding = session.io_binding()
    binding.bind_input("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)
    binding.bind_output("result", "cpu", 0, out.dtype, out.shape, out.ctypes.data)

    def call():
        session.run_with_iobinding(binding)
        return out

    return call
