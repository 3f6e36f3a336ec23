"""The largest errors of the CUDA kernels in float32, in ulp, beside torch in float64 on the same GPU.

Run as ``python bench/gpu_accuracy.py``, for half a minute. Exits with 1 where an error is above what is promised.
"""

import argparse
import itertools
import sys

import torch

import pylogits

CLASSES = (2, 3, 10, 33, 100, 1000, 4097, 10233, 32000, 128256)
TEMPERATURES = (1, 0.75, 2.25)  # as float32 has them
BOUNDS = {"softmax": 2, "log_softmax": 2, "logsumexp": 1, "cross_entropy": 2, "gradient": 2}  # docs/numerics.md
DIGITS, TINY = 24, torch.finfo(torch.float32).tiny


def normal(rows, classes):
    """Standard deviations from 0.1 to 30."""
    spread = torch.tensor([0.1, 1, 3, 10, 30], device="cuda")
    return torch.randn(rows, classes, device="cuda") * spread[torch.randint(5, (rows, 1), device="cuda")]


def offset(rows, classes):
    """A common offset up to millions."""
    return normal(rows, classes) + torch.randn(rows, 1, device="cuda") * 1e6


def confident(rows, classes):
    """One logit ahead of all others by 1 to 100."""
    x = torch.randn(rows, classes, device="cuda")
    ahead = torch.rand(rows, 1, device="cuda") * 99 + 1
    return x.scatter_(1, torch.randint(classes, (rows, 1), device="cuda"), x.amax(1, keepdim=True) + ahead)


def ascending(rows, classes):
    """A maximum that rises to the end."""
    return normal(rows, classes).sort()[0]


def ties(rows, classes):
    """Few different values."""
    return normal(rows, classes).round() / 2


def underflow(rows, classes):
    """Every other logit lower by up to 110."""
    return normal(rows, classes) - torch.rand(rows, 1, device="cuda") * 110 * (torch.arange(classes, device="cuda") % 2)


FAMILIES = (normal, offset, confident, ascending, ties, underflow)


def ulp(got, expected, scale=None):
    """Return the largest error, in ulp of the scale."""
    scale = (expected if scale is None else scale).abs().clamp(min=TINY)
    unit = torch.ldexp(torch.ones_like(scale), torch.frexp(scale)[1] - DIGITS)
    return ((got.double() - expected).abs() / unit).max().item()


def errors(x, labels, temperature):
    """Yield each quantity, its largest error, and the number of results."""
    scaled = x.double() / temperature
    maximum, best = scaled.max(1, keepdim=True)
    terms = torch.exp(scaled - maximum)
    others = terms.scatter(1, best, 0).sum(1, keepdim=True)
    log_sum, total = torch.log1p(others), 1 + others
    probabilities, logs = terms / total, scaled - maximum - log_sum
    losses, log_sums = -logs.gather(1, labels[:, None]), maximum + log_sum
    labels_hot = torch.zeros_like(logs).scatter_(1, labels[:, None], 1)
    slopes = probabilities - labels_hot
    slopes.scatter_(1, best, torch.where(labels[:, None] == best, -others / total, 1 / total))
    options = {} if temperature == 1 else {"temperature": temperature}
    with pylogits.deferred_checks():
        loss, grad = pylogits.cross_entropy_value_and_grad(x, labels, reduction="none", **options)
    size = torch.maximum(torch.maximum(maximum.abs(), log_sums.abs()), log_sum)
    yield "softmax", ulp(pylogits.softmax(x, **options), probabilities), x.numel()
    yield "log_softmax", ulp(pylogits.log_softmax(x, **options), logs), x.numel()
    yield "logsumexp", ulp(pylogits.logsumexp(x, keepdims=True, **options), log_sums, size), len(x)
    yield "cross_entropy", ulp(loss[:, None], losses), len(x)
    yield "gradient", ulp(grad, slopes / temperature, torch.maximum(probabilities, labels_hot) / temperature), x.numel()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--logits", type=float, default=3e9, help="how many, of all kinds together")
    options = parser.parse_args()
    torch.manual_seed(5)
    cases = list(itertools.product(CLASSES, TEMPERATURES, FAMILIES))
    worst, counts = dict.fromkeys(BOUNDS, (0.0, "")), dict.fromkeys(BOUNDS, 0)
    for classes, temperature, family in cases:
        rows = max(1, int(options.logits / len(cases) / classes))
        labels = torch.randint(classes, (rows,), device="cuda")
        for quantity, error, count in errors(family(rows, classes), labels, temperature):
            counts[quantity] += count
            if not error <= worst[quantity][0]:
                worst[quantity] = error, f"{family.__name__}, {classes} classes, temperature {temperature}"
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n\n| | largest error | promised | of | where |\n"
        + "| --- " * 5
        + "|"
    )
    for quantity, (error, where) in worst.items():
        print(f"| {quantity} | {error:.3f} | {BOUNDS[quantity]} | {counts[quantity]:.1e} | {where} |")
    sys.exit(not all(error <= BOUNDS[quantity] for quantity, (error, _) in worst.items()))


if __name__ == "__main__":
    main()
