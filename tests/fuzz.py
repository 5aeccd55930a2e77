"""`make fuzz`: random graphs, rewritten and compared with the definition, for a given time.

    python -m tests.fuzz --seconds 600 [--seed 0] [--workers 2]

Prints how many graphs were checked. A failure prints its seed, which `--seed N --count 1` repeats.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
import traceback

import torch

from lynx_compile import passes
from tests.agreement import check
from tests.strategies import random_graph


def check_seed(seed: int) -> None:
    """One graph, the passes in their own order or in a random one. Raises AssertionError on a mismatch."""
    draw = random.Random(seed)
    drawn = random_graph(draw, steps=draw.choice((2, 4, 8, 12)))
    fusions = list(passes.FUSIONS)
    if draw.random() < 0.5:
        fusions = draw.choices(fusions, k=draw.randint(0, 2 * len(fusions)))
    check(drawn, fusions)


def _work(first: int, step: int, count: int, deadline: float) -> tuple[int, list[tuple[int, str]]]:
    torch.set_num_threads(1)
    checked, failures = 0, []
    for seed in range(first, first + step * count, step):
        if time.monotonic() > deadline or len(failures) >= 5:
            break
        try:
            check_seed(seed)
        except Exception:
            failures.append((seed, traceback.format_exc(limit=-4)))
        checked += 1
    return checked, failures


def main() -> int:
    """Run until the time is over; the exit status says whether every graph agreed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10**9, help="graphs per worker at most")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    arguments = parser.parse_args()
    start = time.monotonic()
    workers = 1 if arguments.count == 1 else arguments.workers
    tasks = [
        (arguments.seed + i, workers, arguments.count, start + arguments.seconds) for i in range(workers)
    ]
    if workers == 1:
        results = [_work(*tasks[0])]
    else:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            results = pool.starmap(_work, tasks)
    failures = [failure for _, found in results for failure in found]
    for seed, text in failures:
        print(f"seed {seed}\n{text}", file=sys.stderr)
    checked, seconds = sum(count for count, _ in results), time.monotonic() - start
    print(f"{checked} graphs checked in {seconds:.0f} s, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
