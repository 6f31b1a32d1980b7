"""What select costs on a chip, beside dense attention to as many pairs: cycles and HBM bytes.

    python -m kernels_pallas.select.cost [CHIP ...]

A tile of 64 queries in 64 heads to 64 of 16,384 blocks of 64 tokens, latents of 512, bfloat16; a
row that is as long as the store, 2^20 tokens, has 16,384 such tiles. Cycles are those of the inner
block by the compiler (needs libtpu), times how often it runs; bytes are those of the blocks whose
index changes from one step of the grid to the next, and of the kernels' own copies. What takes
longer decides. Nothing is run.
"""

import sys

from kernels_pallas import aot
from kernels_pallas.aot import child
from kernels_pallas.attention import tpu as attention_tpu
from kernels_pallas.attention import tpu_bwd as attention_bwd
from kernels_pallas.bench import choose
from kernels_pallas.select import cases, tpu

HALF, FULL = 2, 4  # bytes of bfloat16 and float32


def select_bytes(d: dict, gradient: bool) -> int:
    """HBM bytes of a tile; d as `cases.K2`."""
    rows, chosen = d["t"] * d["h"], d["k"] * d["j"] * d["r"]
    pieces = -(-rows // tpu.ROWS)  # every piece brings the chosen blocks once
    if not gradient:
        return rows * d["r"] * (HALF + FULL) + 2 * rows * FULL + pieces * chosen * HALF
    of_rows = rows * d["r"] * (HALF + FULL + HALF) + 2 * rows * FULL  # q, d_out, d_q; lse, delta
    return of_rows + pieces * chosen * (HALF + 2 * FULL)  # dC is read and written


def dense_bytes(d: dict, gradient: bool) -> int:
    """The same of the attention kernels, for as many pairs: the tile's queries, k j keys of all."""
    rows, keys = d["t"] * d["h"], d["k"] * d["j"]
    if not gradient:
        blocks = -(-rows // attention_tpu.BLOCK_Q)
        return rows * d["r"] * (HALF + FULL) + 2 * rows * FULL + blocks * keys * d["r"] * 2 * HALF
    blocks = -(-keys // attention_bwd.BLOCK_K)  # queries come by, cotangents too, in both orders
    of_rows = rows * d["r"] * (2 * HALF + 2 * HALF + 2 * FULL) + 2 * rows * FULL
    # Keys, values and their gradients once for every head and row of queries of the whole call.
    return blocks * of_rows


def rows(chip: str) -> list[dict]:
    """Of forward and gradients, select and dense: cycles, mib, and microseconds of both."""
    what = aot.CHIPS[chip]
    names = [("64 of 16,384" + g, i) for g in ("", " gradients") for i in ("pallas", "dense")]
    jobs = [child.Job("select", cases.__name__, case, impl, chip) for case, impl in names]
    d, found = cases.K2, []
    for job, error, _, figures in child.run(jobs):
        if error:
            raise aot.CompileError(f"{chip} {job.case} {job.impl}: {error}")
        gradient = job.case.endswith("gradients")
        of = cases.AOT[job.case, job.impl]
        macs = d["t"] * d["h"] * d["k"] * d["j"] * d["r"] * (5 if gradient else 2)
        cycles = figures["cycles"] * macs / of.macs
        size = (select_bytes if job.impl == "pallas" else dense_bytes)(d, gradient)
        found.append({
            "case": job.case, "impl": job.impl, "cycles": cycles, "mib": size / 2**20,
            "busy": cycles / what.clock / what.cores * 1e6, "moved": size / what.bandwidth * 1e6,
        })
    return found


def main(argv: list[str]) -> int:
    """Print the table. 1: it does not compile; 2: wrong names."""
    print("chip  case                     impl      cycles      us    MiB      us of dense")
    try:
        for chip in choose(argv, aot.CHIPS, "chip"):
            found = rows(chip)
            dense = {r["case"]: max(r["busy"], r["moved"]) for r in found if r["impl"] == "dense"}
            for r in found:
                r["ratio"] = max(r["busy"], r["moved"]) / dense[r["case"]]
                print(f"{chip:5} " + "{case:24} {impl:7} {cycles:8.0f} {busy:7.1f} {mib:6.1f} "
                      "{moved:7.1f} {ratio:8.2f}".format(**r), flush=True)
    except (ValueError, aot.CompileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
