"""Instructions of the C kernels, counted by Valgrind: the same at any load, and so a gate that needs no quiet machine.

Run by ``make bench-instructions``. Fails where a call takes more than 2 % more instructions than `instructions.json` says,
which ``UPDATE=1`` rewrites. Valgrind has no AVX-512.
"""

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

COUNTS = Path(__file__).with_suffix(".json")
ISAS = ("avx2", "scalar")
MOST = 1.02
CALL = "pl_run"


def count(program, isa):
    """Return the compiler and the instructions of each call, by its name."""
    with tempfile.TemporaryDirectory() as folder:
        options = [f"--toggle-collect={CALL}", f"--dump-after={CALL}", f"--callgrind-out-file={folder}/out"]
        done = subprocess.run(
            ["valgrind", "--tool=callgrind", *options, program, isa],
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        compiler, *names = done.stdout.splitlines()
        dumps = [Path(folder, f"out.{n}").read_text() for n in range(1, len(names) + 1)]
    totals = [int(re.search(r"^(?:summary|totals): (\d+)", dump, re.MULTILINE)[1]) for dump in dumps]
    return compiler, dict(zip(names, totals, strict=True))


def compare(counts, kept):
    """Print what differs, and return whether something is above the limit or not known."""
    failed = False
    for isa, calls in counts.items():
        for name, instructions in calls.items():
            before = kept.get(isa, {}).get(name)
            ratio = instructions / before if before else float("inf")
            too_many = ratio > MOST
            failed |= too_many
            if ratio != 1:
                print(f"{isa} {name}: {instructions:,}, kept {before}, ratio {ratio:.4f}" + " MORE" * too_many)
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("program", help="c/count.c, built")
    parser.add_argument("--update", action="store_true", help=f"rewrite {COUNTS.name}")
    options = parser.parse_args()
    if not shutil.which("valgrind"):
        print("SKIPPED: no instructions counted, valgrind is not installed")
        return
    counts = {}
    for isa in ISAS:
        compiler, counts[isa] = count(options.program, isa)
    valgrind = subprocess.run(["valgrind", "--version"], check=True, capture_output=True, text=True).stdout.strip()
    counted_with = f"{compiler}, {' '.join(platform.libc_ver())}, {valgrind}"
    if options.update:
        COUNTS.write_text(json.dumps({"counted with": counted_with, "counts": counts}, indent=2) + "\n")
        return
    kept = json.loads(COUNTS.read_text())
    if counted_with != kept["counted with"]:
        print(f"NOTE: counted with {counted_with}, kept of {kept['counted with']}: other code, other counts")
    if compare(counts, kept["counts"]):
        sys.exit(f"more than {MOST:g} times the instructions of {COUNTS.name}; make bench-instructions UPDATE=1 keeps them")
    print(f"{sum(map(len, counts.values()))} calls take no more instructions than before")


if __name__ == "__main__":
    main()
