"""The static schedule of a compiled TPU kernel, from the files that libtpu dumps.

A bundle is one VLIW instruction; its place in the listing is the cycle in which it is issued, the
compiler's own stalls included. Not in it: waits on DMA, HBM and semaphores, and how often a region
runs. Two files of a kernel are read, NAME as HLO has it:

    *-NAME-*-packed-bundles-post-ra.txt                            bundles, with branches
    *-NAME-*-pre-delay_hlo-static-per-bundle-utilization.txt       busy units, a row per bundle
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

BUNDLE = re.compile(r"^\s*(?:0x)?([0-9a-f]+)\s+(?:[A-Z]{2})?\s*:\s*(?:>\s*)*\{")
BRANCH = re.compile(r"sbr\.rel (?:\(!?%?\w+\) )?target bundleno = (\d+)")
FILE = re.compile(r"^\d+-(.*)-\d+-packed-bundles-post-ra\.txt$")
DELAY = 5  # cycles from a branch to what follows it
MXU, VALU, EUP, STORES, LOADS = "MATMUL", "VALU", "EUP", "VSTORE:SPILL", "VLOAD:FILL"


class Region(NamedTuple):
    """Bundles [start, end): a loop's body, what a branch may skip, or the whole kernel."""

    kind: str  # "loop", "branch", "kernel"
    start: int
    end: int
    busy: dict[str, int]  # cycles of all units of a kind
    own: int  # busy MXU cycles that lie in no region within this one

    @property
    def cycles(self) -> int:
        """Of one execution, with all that it may skip."""
        return self.end - self.start


class Kernel(NamedTuple):
    """A kernel's regions, and how many units of each kind a core has."""

    name: str
    bundles: int
    units: dict[str, int]
    regions: tuple[Region, ...]

    def blocks(self, needed: float = 0, largest: bool = True) -> list[Region]:
        """The regions that do the matrix products themselves, that of least vector work first.

        Those that have, outside of regions within them, at least two thirds of the products of the
        one that has most; not `largest`: up to half as many again as the one that has fewest. They
        keep an MXU busy for `needed` cycles at least. So a grid's loop is none if its products
        stand behind a branch. Where a kernel has no products, the largest loop, or all of it.
        Masks are vector work, so what masks comes last; length does not tell: a masked block of
        tokamax's is a cycle shorter than the other.
        """
        fit = [r for r in self.regions if r.own and r.own >= needed]
        if fit:
            end = (max if largest else min)(r.own for r in fit)
            found = [r for r in fit if end <= 1.5 * r.own and r.own <= 1.5 * end]
        elif needed:
            found = []
        else:
            loops = [r for r in self.regions if r.kind == "loop"]
            found = [max(loops or self.regions, key=lambda r: r.cycles)]
        return sorted(found, key=lambda r: (r.busy[VALU], r.cycles))

    def occupancy(self, region: Region, unit: str = MXU) -> float:
        """The fraction of a region's cycles in which the units of a kind are busy."""
        return region.busy[unit] / (self.units[unit] * region.cycles)


def read(folder: str | Path) -> dict[str, Kernel]:
    """All kernels of a folder of dumps, fusions of XLA among them, by name."""
    found = {}
    for path in sorted(Path(folder).iterdir()):
        match = FILE.match(path.name)
        if not match or match[1].startswith(("<", "TLP")) or "schedule-analysis" in path.name:
            continue
        end = "-pre-delay_hlo-static-per-bundle-utilization.txt"
        start = path.name[: match.end(1) + 1]
        beside = [p for p in path.parent.iterdir()
                  if p.name.startswith(start) and re.fullmatch(r"\d+" + end, p.name[len(start) :])]
        if beside:  # what has no work for the vector unit has no such file
            found[match[1]] = kernel(match[1], path.read_text(), beside[0].read_text())
    return found


def kernel(name: str, listing: str, utilization: str) -> Kernel:
    """A kernel by its two files. ValueError: they do not fit together."""
    count, branches = _branches(listing)
    head, _, body = utilization.partition("== UTILIZATION:\n")
    names, capacity = head.splitlines()[1:3]
    units = dict(zip(map(str.strip, names.split(",")), map(int, capacity.split()), strict=True))
    rows = np.array([line.split() for line in body.splitlines() if line.strip()], np.int64)
    if rows.shape != (count, len(units)):
        raise ValueError(f"{name}: {count} bundles of {len(units)} units, but rows {rows.shape}: "
                         "another compiler's format?")
    spans = {("kernel", 0, count)}
    for at, target in branches:
        back = target <= at
        spans.add(("loop", target, at + DELAY) if back else ("branch", at + DELAY, target))
    spans = sorted((s for s in spans if s[1] < s[2] <= count), key=lambda s: (s[1], -s[2], s[0]))
    regions = tuple(_region(span, spans, rows, list(units)) for span in spans)
    return Kernel(name, count, units, regions)


def _branches(listing: str) -> tuple[int, list[tuple[int, int]]]:
    """How many cycles the bundles take, and (cycle, target) of every branch."""
    last, branches = -1, []
    for line in listing.splitlines():
        if bundle := BUNDLE.match(line):
            last = int(bundle[1], 16)
            branches += [(last, int(target)) for target in BRANCH.findall(line)]
    return last + 1, branches


def _region(span, spans, rows: np.ndarray, units: list[str]) -> Region:
    kind, start, end = span
    mine = np.ones(end - start, bool)
    for _, low, high in spans:
        if start <= low and high <= end and (low, high) != (start, end):
            mine[low - start : high - start] = False
    inside = rows[start:end]
    busy = dict(zip(units, inside.sum(0).tolist(), strict=True))
    return Region(kind, start, end, busy, int(inside[mine, units.index(MXU)].sum()))
