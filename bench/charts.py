"""Draws docs/charts/ from the JSON of `make bench-peers`.

Run as ``python bench/charts.py bench-peers.json``, with matplotlib.
"""

import json
import sys
from pathlib import Path

from matplotlib import pyplot as plt
from peers import BACKENDS, PEERS, SPARSE
from side_by_side import cell
from timed import OVER_CLASSES, OVER_ROWS, SHAPES

plt.rcParams["svg.hashsalt"] = "pylogits"  # else names in the file are random

FOLDER = Path(__file__).parents[1] / "docs" / "charts"
COMMAND = "make peers bench-peers charts"
NAMES = (*BACKENDS, *PEERS)
COLOURS = dict(zip(NAMES, ["#d62728", "#ff7f0e", "#7f4fc9", "#2ca02c", "#1f77b4", "#17a2b8", "#7f7f7f"], strict=True))
SWEEPS = {"classes, of four million logits": (OVER_CLASSES, 1), "rows of a thousand classes": (OVER_ROWS, 0)}


class Results:
    """Benchmarks on all threads, and what they ran on."""

    def __init__(self, path):
        data = json.loads(path.read_text())
        benchmarks = [(each["extra_info"], each["stats"]["median"]) for each in data["benchmarks"]]
        self.threads = max(facts["threads"] for facts, _ in benchmarks)
        self.all = [(facts, seconds) for facts, seconds in benchmarks if facts["threads"] == self.threads]
        isa = next(facts["isa"] for facts, _ in benchmarks if facts["isa"])
        machine = data["machine_info"]
        self.machine = f"{machine['cpu']['brand_raw']}, {isa}, {self.threads} threads; {', '.join(machine['libraries'])}"

    @property
    def ops(self):
        """The operations that were timed over classes, in order."""
        return list(dict.fromkeys(facts["op"] for facts, _ in self.all if tuple(facts["shape"]) in OVER_CLASSES))

    def of(self, op, shape):
        """Return facts and seconds by name, of float32 without options."""
        return {
            facts["by"]: (facts, seconds)
            for facts, seconds in self.all
            if (facts["op"], tuple(facts["shape"]), facts["dtype"], facts["option"]) == (op, shape, "float32", "")
        }


def save(figure, name, results):
    """Write a chart twice, with the command and the machine under it."""
    figure.text(0.01, 0.01, f"{COMMAND}: {results.machine}", fontsize=7)
    for kind in ("svg", "png"):
        figure.savefig(FOLDER / f"{name}.{kind}", dpi=120, metadata={"Date": None} if kind == "svg" else None)
    plt.close(figure)


def draw_speed(op, results):
    """Draw the speed of an operation over the number of classes and of rows."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for axis, (title, (shapes, size)) in zip(axes, SWEEPS.items(), strict=True):
        timed = {shape[size]: results.of(op, shape) for shape in shapes}
        for name in NAMES:
            points = {n: by[name][0]["GB/s"] for n, by in timed.items() if name in by}
            if points:
                axis.plot(
                    points.keys(), points.values(), "o-", color=COLOURS[name], label=name, lw=2 if name == "c" else 1.2, ms=4
                )
        facts = {n: by["c"][0] for n, by in timed.items() if "limit" in by.get("c", [{}])[0]}
        if facts:
            label = f"{next(iter(facts.values()))['limit']}, the limit"
            limits = [each["GB/s"] * each["of the limit"] for each in facts.values()]
            axis.plot(facts.keys(), limits, "k--", label=label, lw=1)
        axis.set(xscale="log", yscale="log", xlabel=title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("GB/s of logits and results")
    axes[1].legend(fontsize=8)
    figure.suptitle(f"{op}, float32")
    figure.get_layout_engine().set(rect=(0, 0.04, 1, 0.96))
    save(figure, op, results)


def draw_accuracy(results):
    """Draw the worst error of each operation, by who computes it."""
    worst = {}
    for facts, _ in results.all:
        if facts["dtype"] == "float32" and "worst ulp" in facts:
            key = facts["op"], facts["by"]
            worst[key] = max(worst.get(key, 0), facts["worst ulp"])
    ops = list(dict.fromkeys(op for op, _ in worst))
    figure, axis = plt.subplots(figsize=(11, 4.5), layout="constrained")
    width = 0.8 / len(NAMES)
    for i, name in enumerate(NAMES):
        places = [(place, worst[op, name]) for place, op in enumerate(ops) if (op, name) in worst]
        axis.bar(
            [place + (i - len(NAMES) / 2) * width for place, _ in places],
            [ulp for _, ulp in places],
            width,
            label=name,
            color=COLOURS[name],
        )
    axis.set(yscale="log", ylabel="worst error in ulp")
    axis.set_xticks(range(len(ops)), [op.replace("_cross", "\ncross") for op in ops], fontsize=8)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8, ncols=len(NAMES))
    figure.suptitle("worst error of the results that were timed, float32")
    figure.get_layout_engine().set(rect=(0, 0.04, 1, 0.96))
    save(figure, "accuracy", results)


def table(results):
    """Yield a table in Markdown: median milliseconds and, in brackets, the ratio to torch."""
    yield ["median ms (of torch's)", *NAMES]
    yield ["---"] * (1 + len(NAMES))
    for op in ("softmax", SPARSE):
        for shape in SHAPES:
            by = results.of(op, shape)
            of = by["torch"][1] if "torch" in by else None
            yield [
                f"{op} {' x '.join(map(str, shape))}",
                *(cell(by[name][1], of) if name in by else "missing" for name in NAMES),
            ]


def main(path):
    """Write a page with the table and all charts."""
    results = Results(Path(path))
    FOLDER.mkdir(exist_ok=True)
    names = [*results.ops, "accuracy"]
    for op in results.ops:
        draw_speed(op, results)
    draw_accuracy(results)
    parts = ["# Charts", f"`{COMMAND}`: {results.machine}."]
    parts.append("\n".join("| " + " | ".join(cells) + " |" for cells in table(results)))
    parts += [f"## {name}\n\n![{name}]({name}.svg)\n\n`{COMMAND}`: {results.machine}." for name in names]
    (FOLDER / "README.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
