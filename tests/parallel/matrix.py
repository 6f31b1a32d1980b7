"""Every layer, in every way over eight devices, is what it is on one.

    python -m tests.parallel.matrix [--sample]        prints the table; exit code 1 if a cell fails

A cell compares with the local answer (compare.py): hidden states, max_logit, chosen blocks or
experts, and the gradient of every weight; the figure is the largest difference over the largest
value of any of them. Cells without a meaning say why. `--sample` runs cells that cover every pair
of values. Cells mostly compile, on one core: as many processes share them as there are cores.
"""

import argparse
import concurrent.futures
import itertools
import multiprocessing
import os
import sys

import tests.devices  # noqa: F401

# isort: split

import numpy as np

from kimijax.parallel.mesh import make_mesh
from kimijax.parallel.plan import Plan
from tests.parallel.compare import LAYERS, RUN, difference, reference

LIMIT = 2e-5
WAYS = {  # mesh and fields of the Plan
    "ring": ({"seq": 8}, {}),
    "ring zigzag": ({"seq": 8}, {"order": "zigzag"}),
    "ring striped": ({"seq": 8}, {"order": "striped"}),
    "all-gather": ({"seq": 8}, {"strategy": "gather"}),
    "Ulysses": ({"seq": 8}, {"strategy": "ulysses"}),
    "hybrid": ({"seq": 4, "expert": 2}, {"strategy": "hybrid", "exchange": "padded"}),
    "mixed mesh": ({"data": 2, "seq": 2, "expert": 2}, {"order": "zigzag"}),
}
CACHED = ("ring", "mixed mesh")  # ways that differ where a cache is read
ATTENDS = ("MLA", "GQA", "KDA hybrid", "MLA and experts")  # layers that look at all of the past


def without_meaning(layer: str, way: str, mode: str) -> str | None:
    """Why a cell says nothing that another does not."""
    if mode != "whole" and way not in CACHED:
        return "a cache is read in one way: queries come to its slots"
    if layer not in ATTENDS and "strategy" in WAYS[way][1]:
        return "exchanges neighbours or chosen blocks, whatever the strategy"
    return None


def cell(layer: str, way: str, packed: bool, mode: str) -> float:
    """The largest difference from one device; infinite where choices differ."""
    sizes, fields = WAYS[way]
    plan = Plan(make_mesh(sizes), **fields)
    got, chosen = RUN[mode](layer, packed, plan)
    want, wanted = reference(layer, packed, mode)
    if len(chosen) != len(wanted) or not all(
        np.array_equal(a, b) for a, b in zip(chosen, wanted, strict=True)
    ):
        return np.inf
    return difference(got, want)


def cells(sample: bool) -> list[tuple[str, str, bool, str]]:
    """All cells, or a few in which every two values of different columns meet.

    Of cells with as many new pairs, one whose answer of one device is known is taken.
    """
    every = list(itertools.product(LAYERS, WAYS, (False, True), RUN))
    meant = [x for x in every if without_meaning(x[0], x[1], x[3]) is None]
    if not sample:
        return every
    pairs = {p for x in meant for p in _pairs(x)}
    chosen, known = [], set()
    while pairs:
        best = max(meant, key=lambda x: (len(pairs & set(_pairs(x))), (x[0], *x[2:]) in known))
        pairs -= set(_pairs(best))
        known.add((best[0], *best[2:]))
        chosen.append(best)
    return chosen


def _pairs(x):
    return itertools.combinations(enumerate(x), 2)


def of_rows(layer: str, packed: bool, asked: set) -> tuple[list[str], int, list[str]]:
    """(rows of the table, cells that fail, reasons in them) of one layer and kind of documents."""
    lines, failed, reasons = [], 0, []
    for mode in RUN:
        texts = []
        for way in WAYS:
            if (layer, way, packed, mode) not in asked:
                texts.append("")
            elif why := without_meaning(layer, way, mode):
                reasons.append(why)
                texts.append("n/a")
            else:
                found = cell(layer, way, packed, mode)
                failed += found > LIMIT
                texts.append(f"{found:.1e}" + (" FAILS" if found > LIMIT else ""))
        if any(texts):
            lines.append(f"| {' | '.join((layer, 'packed' if packed else 'one', mode, *texts))} |")
    return lines, failed, reasons


def main(sample: bool) -> int:
    """Print the table, rows of a layer when they are done; 1 if a cell does not hold."""
    asked, failed, reasons = set(cells(sample)), 0, {}
    print(f"| layer | documents | read | {' | '.join(WAYS)} |\n{'|---' * (3 + len(WAYS))}|")
    fresh = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), fresh) as processes:
        tasks = [
            processes.submit(of_rows, layer, packed, asked)
            for layer, packed in itertools.product(LAYERS, (False, True))
        ]
        for task in tasks:
            lines, wrong, why = task.result()
            print("\n".join(lines), flush=True)
            failed, reasons = failed + wrong, reasons | dict.fromkeys(why)
    for why in reasons:
        print(f"n/a: {why}")
    print(f"{failed} cells fail" if failed else f"every cell is within {LIMIT:.0e}")
    return min(failed, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", action="store_true")
    sys.exit(main(parser.parse_args().sample))
