"""What the implementations of every op cost: time on this machine, or cycles by the TPU's compiler.

    python -m kernels_pallas.bench [OP ...]
    python -m kernels_pallas.bench --aot v5p [OP ...] [--json FILE]

One row per op, case and impl. Timed: milliseconds (best of several), needed GFLOP/s, and the
fraction of the matmul rate of the same process. Ratios within a run carry over; milliseconds do
not. On a GPU, ops that other packages have too stand beside theirs (see `beside`).

Compiled (needs libtpu and no TPU, see `aot`): cycles of the inner block, beside the kernels of
other packages at the same shape. They belong to one version of libtpu, and are no time: nothing
waits for memory in them.
"""

import argparse
import functools
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import (
    aot,
    attention,
    beside,
    grouped_matmul,
    indexer,
    kda,
    latent,
    latent_decode,
    ring,
    select,
)
from kernels_pallas.aot import child
from kernels_pallas.attention import cases as attention_cases
from kernels_pallas.grouped_matmul import cases as grouped_matmul_cases
from kernels_pallas.indexer import cases as indexer_cases
from kernels_pallas.kda import cases as kda_cases
from kernels_pallas.latent import cases as latent_cases
from kernels_pallas.latent_decode import cases as latent_decode_cases
from kernels_pallas.ring import cases as ring_cases
from kernels_pallas.select import cases as select_cases

OPS = {
    "attention": attention_cases,
    "latent": latent_cases,
    "latent_decode": latent_decode_cases,
    "ring": ring_cases,
    "select": select_cases,
    "indexer": indexer_cases,
    "kda": kda_cases,
    "grouped_matmul": grouped_matmul_cases,
}
PEERS = {  # other packages' kernels, see there
    "attention": ["kernels_pallas.attention.peers"],
    "grouped_matmul": ["kernels_pallas.grouped_matmul.peers"],
}
GPU_PEERS = {
    "attention": "kernels_pallas.attention.gpu_peers",
    "grouped_matmul": "kernels_pallas.grouped_matmul.gpu_peers",
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


def timed(names: list[str]) -> Iterator[dict]:
    """Rows of times: op, case, impl, ms, gflops, of_peak (of the matmul rate)."""
    a = jnp.ones((2048, 2048), jnp.float32)
    peak = 2 * 2048**3 / best_seconds(jax.jit(jnp.matmul), (a, a))
    impls = {
        "attention": attention.IMPLS,
        "latent": latent.IMPLS,
        "latent_decode": latent_decode.IMPLS,
        "ring": ring.IMPLS,
        "select": select.IMPLS,
        "indexer": indexer.IMPLS,
        "kda": kda.IMPLS,
        "grouped_matmul": grouped_matmul.IMPLS,
    }
    on_tpu = jax.default_backend() == "tpu"
    for name in names:
        for case, made in OPS[name].CASES.items():
            call, args, flops, logits = made(np.random.default_rng(0))
            for impl in impls[name]:
                if impl == "pallas_interpret" or (impl == "pallas" and not on_tpu):
                    continue  # interpreted, its time would say nothing
                if impl == "ref" and logits > LARGEST_REF:
                    continue
                seconds = best_seconds(jax.jit(functools.partial(call, impl=impl)), args)
                rate = flops / seconds
                yield {"op": name, "case": case, "impl": impl, "ms": seconds * 1e3,
                       "gflops": rate / 1e9, "of_peak": rate / peak}


def compared(names: list[str]) -> Iterator[dict]:
    """Rows of `beside.rows` of those ops that other packages have on a GPU."""
    best = beside.rates()
    for name in names:
        for case, made in importlib.import_module(GPU_PEERS[name]).SHAPES.items():
            yield from beside.rows(name, case, made(), best)


def compiled(names: list[str], chip: str) -> Iterator[dict]:
    """Rows of compiled cases tagged bench: op, case, impl, dims, chip, and `child.measure`'s.

    A case that does not compile has `error` instead. Sorted by what a block computes, so that
    those that compare stand together.
    """
    modules = {op: [OPS[op].__name__, *PEERS.get(op, [])] for op in names}
    jobs = child.jobs(modules, [chip], "bench")
    for job, error, _, figures in child.run(sorted(jobs, key=lambda j: (j.op, j.case))):
        dims = importlib.import_module(job.module).AOT[job.case, job.impl].dims
        row = {"op": job.op, "case": job.case, "impl": job.impl, "dims": dims, "chip": chip}
        yield row | (figures if error is None else {"error": error})


def choose(names: list[str], known: Iterable[str], what: str) -> list[str]:
    """The names, or all that are known if there are none. ValueError: one is not."""
    if unknown := set(names) - set(known):
        raise ValueError(f"no {what} {sorted(unknown)}, there are {sorted(known)}")
    return names or list(known)


def time_line(row: dict) -> str:
    """A row of `timed`."""
    return "{op:13} {case:28} {impl:5} {ms:9.3f} {gflops:9.1f} {of_peak:8.2f}".format(**row)


def cycle_line(row: dict) -> str:
    """A row of `compiled`."""
    name = "{op:13} {case:28} {impl:14} {dims:8}".format(**row)
    if "error" in row:
        return f"{name} FAILED {row['error']}"
    useful = "" if row["useful_mxu"] is None else f"{row['useful_mxu']:.3f}"
    limit = "" if row["bound"] is None else f"{row['roofline']:.3f} {row['bound']}"
    spills = "/".join(map(str, row["spills"]))
    vmem = row["vmem_bytes"] / 2**20
    rest = "{cycles:7} {cycles_per_512:7.0f} {mxu_occupancy:5.2f}".format(**row)
    built = "{bundles:8} {lower_seconds:7.2f} {compile_seconds:9.2f}".format(**row)
    return f"{name} {rest} {useful:>6} {limit:>9} {spills:>11} {vmem:8.1f} {built}"


def beside_line(row: dict) -> str:
    """A row of `compared`."""
    name = "{op:14} {case:28} {impl:16}".format(**row)
    if "rate" in row:
        return f"{name} {row['ms']:9.3f} {row['rate'] / 1e12:9.3f} T{row['unit']}/s"
    if "ms" in row:
        name += " {ms:9.3f} {of_matmul:9.3f} {of_copy:7.3f}".format(**row)
        name += "" if row["times"] is None else f" {row['times']:8.2f} {row['off']:7.4f}"
    if "error" in row:
        return f"{name} FAILED {row['error']}"
    return f"{name} {row['absent']}" if "absent" in row else name


HEADS = {
    beside_line: f"{'op':14} {'case':28} {'impl':16} {'ms':>9} {'of matmul':>9} {'of copy':>7} "
                 f"{'/ ours':>8} {'differs':>7}",
    time_line: f"{'op':13} {'case':28} {'impl':5} {'ms':>9} {'GFLOP/s':>9} {'of peak':>8}",
    cycle_line: f"{'op':13} {'case':28} {'impl':14} {'dims':8} {'cycles':>7} {'of 512':>7} "
                f"{'MXU':>5} {'useful':>6} {'roofline':>9} {'spill/fill':>11} "
                f"{'VMEM MiB':>8} {'bundles':>8} {'lower s':>7} {'compile s':>9}",
}


def tables(names: list[str], chip: str | None) -> Iterator[tuple[Iterator[dict], Callable]]:
    """Rows and how a row is printed: compiled for a chip, or timed on what this machine has."""
    if chip:
        yield compiled(names, chip), cycle_line
        return
    here = [name for name in names if name in GPU_PEERS and jax.default_backend() == "gpu"]
    if here:
        yield compared(here), beside_line
    if rest := [name for name in names if name not in here]:
        yield timed(rest), time_line


def main(argv: list[str]) -> int:
    """Print the table, write the file. 1: a case failed; 2: wrong names, no libtpu."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; all of them")
    parser.add_argument("--aot", metavar="CHIP", help=f"compile for one of {', '.join(aot.CHIPS)}")
    parser.add_argument("--json", metavar="FILE", help='write {"rows": [...]}')
    args = parser.parse_args(argv)
    found = []
    try:
        names = choose(args.ops, OPS, "op")
        if args.aot:
            choose([args.aot], aot.CHIPS, "chip")
        for rows, line in tables(names, args.aot):
            print(HEADS[line])
            for row in rows:
                found.append(row)
                print(line(row), flush=True)
    except (ValueError, aot.CompileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        part = Path(f"{args.json}.part")
        part.write_text(json.dumps({"rows": found}, indent=1))
        part.replace(args.json)
    return 1 if any("error" in row for row in found) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
