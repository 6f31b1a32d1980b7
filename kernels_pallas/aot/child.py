"""Many compilations in a process of their own, which may die without harm.

What libtpu dumps is set once per process, before it is loaded, and its checks end the process. So
`run` starts a child, hands it one job after the other as lines of JSON, and starts another when
one dies. Dumps, tens of megabytes a program, are read and deleted after each job.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from kernels_pallas import aot
from kernels_pallas.aot import schedule

LIMIT = 600  # seconds for a job; a compiler that takes longer is ended


class Job(NamedTuple):
    """One case of a module's `AOT`, for one chip."""

    op: str
    module: str
    case: str
    impl: str
    chip: str


class Result(NamedTuple):
    """What came of a job: `figures` (of `measure`), or why there are none."""

    job: Job
    error: str | None
    seconds: float
    figures: dict


def jobs(modules: dict[str, list[str]], chips: Iterable[str], tag: str | None = None) -> list[Job]:
    """All cases with a tag (None: all) of the modules of each op that list any, for each chip."""
    found = []
    for op, names in modules.items():
        for module in names:
            cases = getattr(importlib.import_module(module), "AOT", {})
            for (case, impl), made in cases.items():
                if tag is None or tag in made.tags:
                    found += [Job(op, module, case, impl, chip) for chip in chips]
    return found


def run(jobs: Iterable[Job], schedules: bool = True) -> Iterator[Result]:
    """The results in order, each as it comes. CompileError: libtpu is missing.

    schedules  dump and read schedules too, which takes about three times as long
    """
    if why := aot.available():
        raise aot.CompileError(why)
    child = None
    with tempfile.TemporaryDirectory(prefix="kernels_aot_") as folder:
        try:
            for job in jobs:
                child = child or _start(folder, schedules)
                began = time.perf_counter()
                line = _ask(child, job)
                seconds = time.perf_counter() - began
                if line:
                    answer = json.loads(line)
                    yield Result(job, answer["error"], seconds, answer["figures"])
                else:
                    child.communicate()
                    why = f"the compiler died ({child.returncode}): {_last_words(folder)}"
                    if seconds >= LIMIT:
                        why = f"not compiled after {LIMIT} s"
                    child = None
                    yield Result(job, why, seconds, {})
        finally:
            if child is not None:
                child.kill()
                child.communicate()


def _start(folder: str, schedules: bool) -> subprocess.Popen:
    # Flags of XLA that tests set for the CPU would reach the TPU's compiler too.
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    dumps = f"{folder}/dumps" if schedules else None
    env |= aot.environment(dumps) | {"PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)}
    command = [sys.executable, "-m", "kernels_pallas.aot.child", dumps or ""]
    with open(f"{folder}/stderr", "wb") as stderr:
        return subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
            text=True,
        )


def _ask(child: subprocess.Popen, job: Job) -> str:
    """A line of JSON, or nothing from a child that died."""
    end = threading.Timer(LIMIT, child.kill)
    end.start()
    try:
        child.stdin.write(json.dumps(job) + "\n")
        child.stdin.flush()
        return child.stdout.readline()
    except BrokenPipeError:
        return ""
    finally:
        end.cancel()


def _last_words(folder: str) -> str:
    lines = Path(folder, "stderr").read_text(errors="replace").split("\n")
    checks = [line for line in lines if line.startswith("F0") or "Check failed" in line]
    return (checks or [line for line in lines if line.strip()] or ["no message"])[-1][:300]


def measure(case: aot.Case, chip: str, dumps: str | None) -> dict:
    """Compile a case; the figures of its kernel, those of the schedule if there are dumps.

    lower_seconds (tracing and lowering, host time to build the call) and compile_seconds;
    vmem_bytes. Without dumps temp_bytes, of the program. With them bundles of the kernel; of its
    inner block cycles, cycles_per_512 (of 512 x 512 pairs of a query and a key), mxu_occupancy,
    valu_occupancy, eup_occupancy, spills [stores, loads] and useful_mxu, which is needed MACs /
    (MACs a cycle x cycles); roofline and bound (see `roofline`); block_cycles of all the blocks
    there are. CompileError: it does not compile, or has no such kernel.
    """
    f, args = case.make(*[aot.mesh_of(chip, case.devices)] if case.devices > 1 else [])
    aot.mesh_of(chip, case.devices)  # made once a process, no part of the first case's time
    with tempfile.TemporaryDirectory(prefix="kernels_aot_hlo_") as folder:
        times = [time.perf_counter()]
        lowered = aot.lower_for(chip, f, *args)
        times.append(time.perf_counter())
        compiled = aot.build(lowered, dump=folder)
        times.append(time.perf_counter())
        found = aot.kernels(aot.program_text(folder))
    seconds = {"lower_seconds": times[1] - times[0], "compile_seconds": times[2] - times[1]}
    vmem = {k: v for k, v in found.items() if case.kernel in k}
    if not vmem:
        raise aot.CompileError(f"the program has no Pallas kernel named {case.kernel!r}")
    if dumps is None:
        temporaries = compiled.memory_analysis().temp_size_in_bytes
        return seconds | {"vmem_bytes": max(vmem.values()), "temp_bytes": temporaries}
    found = {k: v for k, v in schedule.read(dumps).items() if k in vmem}
    if not found:
        raise aot.CompileError(f"libtpu left no schedule of {sorted(vmem)}")
    kernel = max(found.values(), key=lambda k: max(r.own for r in k.regions))
    busy = case.macs and case.macs / aot.CHIPS[chip].macs
    if not (blocks := kernel.blocks(busy or 0, case.largest)):
        found = sorted({r.own for r in kernel.regions if r.own})
        raise aot.CompileError(f"{kernel.name}: {case.macs=} keep an MXU busy for {busy:.0f} cycles"
                               f", its blocks do for {found}: none is the block of these MACs")
    block, ideal = blocks[case.block], busy and busy / aot.CHIPS[chip].mxus
    return seconds | {
        "kernel": kernel.name,
        "cycles": block.cycles,
        "cycles_per_512": block.cycles * aot.BLOCK_PAIRS / case.pairs,
        "block_cycles": [b.cycles for b in blocks],
        "mxu_occupancy": kernel.occupancy(block),
        "useful_mxu": ideal and ideal / block.cycles,
        **roofline(case, aot.CHIPS[chip], block.cycles),
        "valu_occupancy": kernel.occupancy(block, schedule.VALU),
        "eup_occupancy": kernel.occupancy(block, schedule.EUP),
        "spills": [block.busy[schedule.STORES], block.busy[schedule.LOADS]],
        "vmem_bytes": vmem[kernel.name],
        "bundles": kernel.bundles,
    }


def roofline(case: aot.Case, chip: aot.Chip, cycles: int) -> dict:
    """How near a block is to what binds it, and what that is: `roofline` and `bound`, MXU or HBM.

    The cycles that its needed MACs or its HBM bytes take at the chip's best, whichever are more, of
    those that the schedule has. Above 1 the memory is slower than the schedule, which does not
    count its waits. None where a case gives neither.
    """
    least = {
        "MXU": (case.macs or 0) / chip.macs_per_cycle,
        "HBM": (case.moved or 0) / chip.bytes_per_cycle,
    }
    bound = max(least, key=least.get)
    known = least[bound] > 0
    return {"roofline": least[bound] / cycles if known else None, "bound": bound if known else None}


def _answer(job: Job, dumps: str | None) -> dict:
    """One line of the child."""
    for path in Path(dumps).iterdir() if dumps else ():
        path.unlink()
    try:
        case = importlib.import_module(job.module).AOT[job.case, job.impl]
        return {"error": None, "figures": measure(case, job.chip, dumps)}
    except Exception as error:  # a kernel may refuse by any
        name = "" if isinstance(error, aot.CompileError) else f"{type(error).__name__}: "
        return {"error": name + " ".join(str(error).split())[:300], "figures": {}}


def main(dumps: str | None) -> None:
    """Answer jobs until there are no more. Whatever else prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if dumps:
        Path(dumps).mkdir(exist_ok=True)
    for line in sys.stdin:
        print(json.dumps(_answer(Job(*json.loads(line)), dumps)), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1] or None)
