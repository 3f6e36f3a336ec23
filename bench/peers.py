"""Who is timed: each backend of pylogits, and the same operation in other libraries.

All get the same NumPy memory. A case with `out` has its result written to memory that is there
before the call, by all who can; any other call goes the whole way, from NumPy array to NumPy array.
"""

from contextlib import nullcontext

import numpy as np
from timed import arguments

import pylogits

BACKENDS = ("c", "numba")
PEERS = ("torch", "scipy", "onnxruntime")


def prepare(name, case):
    """Return a function that runs a case and returns its result; ImportError where it can't."""
    given = arguments(case)
    logits, labels = given["logits"], given.get("labels")
    out = np.empty_like(logits) if case.out else None
    if name in BACKENDS:
        return _ours(name, case.op, logits, labels, out)
    return {"torch": _torch, "scipy": _scipy, "onnxruntime": _onnxruntime}[name](logits, labels, out)


def active(name):
    """Return a context in which the calls of `name` run: choosing a backend is not timed."""
    return pylogits.use_backend(name) if name in BACKENDS else nullcontext()


def _ours(name, op, logits, labels, out):
    try:
        with active(name):
            pass
    except ValueError as error:
        raise ImportError(error) from None
    if op != "softmax":
        loss = pylogits.sparse_softmax_cross_entropy_with_logits
        return lambda: loss(labels=labels, logits=logits)
    if out is None:
        return lambda: pylogits.softmax(logits)
    return lambda: pylogits.softmax(logits, out=out)


def _torch(logits, labels, out):
    import torch

    torch.set_num_threads(pylogits.get_num_threads())
    wrap = torch.from_numpy
    if labels is not None:
        loss = torch.nn.functional.cross_entropy
        return lambda: loss(wrap(logits), wrap(labels), reduction="none").numpy()
    if out is None:
        return lambda: torch.softmax(wrap(logits), 1).numpy()
    x, target = wrap(logits), wrap(out)
    return lambda: torch.softmax(x, 1, out=target).numpy()


def _scipy(logits, labels, out):
    from scipy.special import logsumexp, softmax

    if labels is None:
        return lambda: softmax(logits, axis=1)
    rows = np.arange(len(labels))
    return lambda: logsumexp(logits, axis=1) - logits[rows, labels]


def _onnxruntime(logits, labels, out):
    import onnx
    import onnxruntime
    from onnx import helper

    real = helper.np_dtype_to_tensor_dtype(logits.dtype)
    feed = {"logits": logits} if labels is None else {"logits": logits, "labels": labels}
    if labels is None:
        node = helper.make_node("Softmax", [*feed], ["result"], axis=1)
    else:
        node = helper.make_node("SoftmaxCrossEntropyLoss", [*feed], ["result"], reduction="none")
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
