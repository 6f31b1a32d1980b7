"""Time the implementations of every op on this machine.

    python -m kernels_pallas.bench [OP ...]

One row per op, case and impl: milliseconds (best of several), needed GFLOP/s, and the fraction of
the matmul rate of the same process. Ratios within a run carry over; milliseconds do not.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import attention, indexer, kda, select
from kernels_pallas.attention import cases as attention_cases
from kernels_pallas.indexer import cases as indexer_cases
from kernels_pallas.kda import cases as kda_cases
from kernels_pallas.select import cases as select_cases

OPS = {
    "attention": attention_cases,
    "select": select_cases,
    "indexer": indexer_cases,
    "kda": kda_cases,
}
LARGEST_REF = 2**28  # logits; the dense reference of a larger case is not run


def best_seconds(f, args, repeats: int = 8) -> float:
    """Seconds of the fastest of `repeats` calls after one that compiles."""
    jax.block_until_ready(f(*args))
    best = np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        best = min(best, time.perf_counter() - start)
    return best


def rows(names: list[str]):
    """(op, case, impl, milliseconds, GFLOP/s, fraction of the matmul rate)."""
    a = jnp.ones((2048, 2048), jnp.float32)
    peak = 2 * 2048**3 / best_seconds(jax.jit(jnp.matmul), (a, a))
    impls = {
        "attention": attention.IMPLS,
        "select": select.IMPLS,
        "indexer": indexer.IMPLS,
        "kda": kda.IMPLS,
    }
    for name in names:
        for case, made in OPS[name].CASES.items():
            call, args, flops, logits = made(np.random.default_rng(0))
            for impl in impls[name]:
                if impl == "ref" and logits > LARGEST_REF:
                    continue
                seconds = best_seconds(jax.jit(lambda *x, c=call, i=impl: c(*x, impl=i)), args)
                rate = flops / seconds
                yield name, case, impl, seconds * 1e3, rate / 1e9, rate / peak


def main(names: list[str]) -> int:
    """Print the table; unknown names are an error."""
    if unknown := set(names) - set(OPS):
        print(f"error: no op {sorted(unknown)}, there are {sorted(OPS)}", file=sys.stderr)
        return 2
    print(f"{'op':10} {'case':28} {'impl':5} {'ms':>9} {'GFLOP/s':>9} {'of peak':>8}")
    for op, case, impl, ms, rate, fraction in rows(names or list(OPS)):
        print(f"{op:10} {case:28} {impl:5} {ms:9.3f} {rate:9.1f} {fraction:8.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
