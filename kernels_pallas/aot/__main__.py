"""Compile the kernels of every op for TPUs that are not there; the exit code is 1 if one fails.

    python -m kernels_pallas.aot [--chips v5e,v5p,v6e,tpu7x] [--tag ci] [OP ...]

A line per case and chip: seconds to trace and lower it (host time to build the call; the first of
a process includes imports), seconds to compile it, and the VMEM it takes; or the compiler's reason.
"""

import argparse
import sys

from kernels_pallas import aot
from kernels_pallas.aot import child
from kernels_pallas.bench import OPS, choose


def main(argv: list[str]) -> int:
    """0: everything compiled. 1: a case did not. 2: there is none, or none can be tried."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; all of them")
    parser.add_argument("--chips", default=",".join(aot.CHIPS), type=lambda s: s.split(","))
    parser.add_argument("--tag", help="cases with this tag alone, of ci, bench, k2")
    args = parser.parse_args(argv)
    try:
        names = choose(args.ops, OPS, "op")
        chips = choose(args.chips, aot.CHIPS, "chip")
        jobs = child.jobs({op: [OPS[op].__name__] for op in names}, chips, args.tag)
        if not jobs:  # nothing tried is nothing shown
            tagged = f" tagged {args.tag}" if args.tag else ""
            raise ValueError(f"no case{tagged} in AOT of cases.py of {', '.join(names)}")
        print(HEAD)
        results = list(map(show, child.run(jobs, schedules=False)))
    except (ValueError, aot.CompileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = [r for r in results if r.error]
    print(f"{len(results) - len(failed)} of {len(results)} compiled")
    return 1 if failed else 0


NAME = "{:5} {:14} {:28} {:15}"
HEAD = f"{NAME.format('chip', 'op', 'case', 'impl')} lower s compile s VMEM MiB"


def show(result: child.Result) -> child.Result:
    """Print a line about it."""
    job, figures = result.job, result.figures
    name = NAME.format(job.chip, job.op, job.case, job.impl)
    said = f"FAILED {result.error}, after {result.seconds:.1f} s" if result.error else (
        "{lower_seconds:7.2f} {compile_seconds:9.2f} ".format(**figures)
        + f"{figures['vmem_bytes'] / 2**20:8.1f}")
    print(f"{name} {said}", flush=True)
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
