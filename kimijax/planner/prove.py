"""A job compiled ahead of time for chips that are not there, and what their compiler says of it.

Needs libtpu and no TPU. Nothing runs: that the program compiles and the bytes it takes are facts.
"""

import re
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from kernels_pallas import aot
from kimijax.metrics import peak_rss_gib
from kimijax.parallel.mesh import topology_mesh
from kimijax.parallel.plan import Plan
from kimijax.planner import hlo, programs
from kimijax.planner.estimate import Estimate
from kimijax.planner.job import Job, layout

LARGEST = 8  # buffers that are named


class Buffer(NamedTuple):
    """Temporary memory, and the arrays that lie there one after the other."""

    bytes: float
    shapes: str


class Collective(NamedTuple):
    """Of one kind; `count` as the program is written: what a loop repeats counts once."""

    kind: str
    asynchronous: bool
    count: int
    bytes: int  # of their results on a device


@dataclass(frozen=True)
class Proof:
    """Bytes are those of a device; None where the compiler refused for lack of memory."""

    arguments: int | None
    outputs: int | None
    donated: int | None  # of the outputs: they lie where arguments did
    temporaries: int | None
    needed: float  # arguments, temporaries and outputs that lie elsewhere
    buffers: tuple[Buffer, ...]
    collectives: tuple[Collective, ...]
    compile_seconds: float  # lowering included
    cpu_seconds: float  # the same, of all cores: what other programs hardly change
    rss_gib: float
    refused: str | None  # by the compiler: its words

    @property
    def fits(self) -> bool:
        """The compiler found room for everything."""
        return self.refused is None


def prove(e: Estimate) -> Proof:
    """Compile the job of an estimate on its mesh. UserError: there is no compiler for it."""
    plan = layout(e.job, topology_mesh(e.pod.topology, e.mesh))
    return compiled(e.job, replace(plan, strategy=e.strategy))


def compiled(job: Job, plan: Plan) -> Proof:
    """Compile a job where a plan on a topology says."""
    began = time.perf_counter(), time.process_time()
    lowered = programs.lower(job, plan)
    with tempfile.TemporaryDirectory(prefix="kimijax_plan_") as folder:
        try:
            memory = lowered.compile(compiler_options={"xla_dump_to": folder}).memory_analysis()
        except Exception as error:  # libtpu raises several kinds
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return _refused(str(error), Path(folder), *_since(began))
        seconds = _since(began)
        sizes = [
            getattr(memory, f"{what}_size_in_bytes")
            for what in ("argument", "output", "alias", "temp")
        ]
        found = buffers(_report(Path(folder)))
        sends = collectives(aot.program_text(folder))
    needed = sizes[0] + sizes[1] - sizes[2] + sizes[3]
    return Proof(*sizes, needed, found, sends, *seconds, peak_rss_gib(), None)


def _since(began: tuple[float, float]) -> tuple[float, float]:
    return time.perf_counter() - began[0], time.process_time() - began[1]


_TOTAL = re.compile(r"\((\d[\d.]*)([KMGT])\) exceeds available HBM")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _refused(text: str, folder: Path, *seconds: float) -> Proof:
    total = _TOTAL.search(text)
    needed = float(total[1]) * UNITS[total[2]] if total else float("nan")
    found = buffers(_report(folder))
    why = " ".join(text.split())[:300]
    return Proof(*(None,) * 4, needed, found, (), *seconds, peak_rss_gib(), why)


def _report(folder: Path) -> str:
    """The compiler's list of buffers, which it leaves of what it refuses too."""
    paths = list(folder.glob("*memory-usage-report.txt"))
    return max((path.read_text() for path in paths), key=len, default="")


_ROW = re.compile(r"^\s*[\d.]+\w*\(\s*\d+%\);\s*([\d.]+)([KMGT])iB;[^;]*;[^;]*; (.*)$", re.M)


def buffers(report: str) -> tuple[Buffer, ...]:
    """The largest temporaries: the arrays of the block of memory that holds most of them."""
    hbm = re.split(r"^Memory Space: (?!default)", report, flags=re.M)[0]  # VMEM is another
    blocks = [_ROW.findall(block) for block in hbm.split("cumulative_size;")]
    rows = max(blocks, key=len, default=[])
    return tuple(
        Buffer(float(size) * UNITS[unit], shapes) for size, unit, shapes in rows[:LARGEST]
    )


def collectives(text: str) -> tuple[Collective, ...]:
    """Of a program's text, by kind."""
    count, size = Counter(), Counter()
    for found in hlo.collectives(hlo.parse(text)):
        key = found.kind, found.asynchronous
        count[key] += 1
        size[key] += found.bytes
    return tuple(Collective(*key, count[key], size[key]) for key in sorted(count))
