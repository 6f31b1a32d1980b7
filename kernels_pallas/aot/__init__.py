"""Compile kernels for TPUs that are not there, and say what the compiler says of them.

Needs the package libtpu and no TPU. Nothing is run: that a kernel compiles, the VMEM it takes and
its static schedule (`schedule.py`) are facts of one compiler version; seconds, waits on memory and
numbers on the chip are not shown.

    compiled = compile_for("v5p", f, jax.ShapeDtypeStruct((512, 512), jnp.bfloat16))

An op lists what is to be compiled as `AOT: dict[(case, impl), Case]` in its `cases.py`; `child.py`
compiles many of them, in a process of its own; `python -m kernels_pallas.aot` compiles all.
"""

import functools
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np


class Chip(NamedTuple):
    """A chip as jax names it, and its figures; those of one TensorCore say so.

    Sources: peak, bandwidth and cores from Google's page of each chip (cloud.google.com/tpu/docs);
    MXUs from the capacities that the compiler prints; MACs measured: it counts a product of 512^3
    in bfloat16 as 512^3 / macs busy MXU cycles. From v6e on that is twice 256 x 256, which is what
    the peak asks for as well. The clock is peak / (2 macs mxus cores).
    """

    topology: str  # the smallest that the compiler knows, of four chips
    large: str  # one of 64
    cores: int
    mxus: int  # of a core
    macs: int  # bfloat16, of one MXU in a cycle, as the compiler counts cycles
    peak: float  # bfloat16 FLOP/s of a chip
    bandwidth: float  # HBM bytes/s of a chip

    @property
    def macs_per_cycle(self) -> int:
        """Of one core."""
        return self.mxus * self.macs

    @property
    def clock(self) -> float:
        """Hertz."""
        return self.peak / (2 * self.macs_per_cycle * self.cores)

    @property
    def bytes_per_cycle(self) -> float:
        """Of HBM, a core's share."""
        return self.bandwidth / (self.cores * self.clock)


CHIPS = {
    "v5e": Chip("v5e:2x2", "v5e:8x8", 1, 4, 2**14, 197e12, 819e9),
    "v5p": Chip("v5p:2x2x1", "v5p:4x4x4", 2, 4, 2**14, 459e12, 2765e9),
    "v6e": Chip("v6e:2x2", "v6e:8x8", 1, 2, 2**17, 918e12, 1638e9),
    "tpu7x": Chip("tpu7x:2x2x1", "tpu7x:4x4x4", 2, 2, 2**17, 2307e12, 7380e9),
}


BLOCK_PAIRS = 512 * 512  # cycles are also given per so many pairs of a query and a key


class Case(NamedTuple):
    """A function to compile, and what one inner block of its kernel has to compute.

    The inner block is the branch or loop body that does the matrix products of one grid step (see
    `schedule.Kernel.blocks`). Where a kernel has several, as a whole block without a mask and a
    piece of one with it, `largest` picks by products, and then `block` by vector work: 0 the least,
    -1 the most. Of a loop within a grid step one turn is the block, as the schedule shows it: macs
    are those of the turn.

        def _make():
            q, kv = ...  # ShapeDtypeStructs
            return functools.partial(attention, scale=1.0, impl="pallas"), (q, kv)

        AOT = {("192/128", "pallas"): Case(_make, frozenset({"ci", "bench"}), "192/128", macs)}
    """

    make: Callable[..., tuple[Callable, tuple]]  # () -> (f, args): trees of ShapeDtypeStruct
    tags: frozenset[str] = frozenset()  # of "ci", "bench", "k2"
    dims: str = ""  # as "192/128": of queries and keys / of values
    macs: int | None = None  # needed by a block: no padding, nothing twice
    moved: float | None = None  # HBM bytes a block brings, and its share of what stays for several
    kernel: str = ""  # part of its name; "" is the kernel with the most work for the MXU
    block: int = 0
    largest: bool = True
    pairs: int = BLOCK_PAIRS  # of queries and keys in a block, to compare blocks of other sizes
    devices: int = 1  # more: make(mesh) of so many on one axis, and args say where they lie


class CompileError(RuntimeError):
    """A function that does not compile for a chip, the reason in one line."""


def available() -> str | None:
    """Why nothing can be compiled here, or None."""
    if importlib.util.find_spec("libtpu") is None and not os.environ.get("TPU_LIBRARY_PATH"):
        return "libtpu is not installed: make aot, or pip install libtpu (the extra [aot])"
    return None


# libtpu would ask a metadata server what machine this is, and let no second process load it.
ALONE = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def environment(dumps: str | None = None) -> dict[str, str]:
    """Variables of a process that only compiles, to be set before it loads jax.

    dumps  a folder that libtpu fills with the schedules of what it compiles
    """
    settings = ALONE | {"JAX_PLATFORMS": "cpu"}
    if dumps:
        flags = f"--xla_jf_dump_to={dumps} --xla_jf_dump_llo_text=true"
        settings["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()
    return settings


@functools.cache
def mesh_of(chip: str, devices: int = 1) -> jax.sharding.Mesh:
    """So many, of up to 64, that are not there, on one axis."""
    from jax.experimental import topologies

    if chip not in CHIPS:
        raise ValueError(f"unknown {chip=}, there are {sorted(CHIPS)}")
    if why := available():
        raise CompileError(why)
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    topology = CHIPS[chip].topology if devices <= 4 else CHIPS[chip].large
    known = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return jax.sharding.Mesh(np.array(known.devices)[:devices], ("chip",))


def lower_for(chip: str, f: Callable, *args) -> jax.stages.Lowered:
    """`f` of abstract arguments (trees of ShapeDtypeStruct), traced and lowered for one chip, or
    for the mesh that they name. What `f` raises passes through; CompileError: libtpu is missing.
    """
    named = [x.sharding.mesh for x in jax.tree.leaves(args) if x.sharding]
    mesh = named[0] if named else mesh_of(chip)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or place), args
    )
    # Some kernels ask at trace time what chip they are for: without a mesh, jax names the host.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(f).lower(*args)


def build(lowered: jax.stages.Lowered, dump: str | None = None) -> jax.stages.Compiled:
    """What `lower_for` made, compiled. CompileError: the compiler refuses.

    dump  a folder for what XLA says of the program, such as `program_text` reads
    """
    try:
        return lowered.compile(compiler_options=dump and {"xla_dump_to": dump})
    except Exception as error:  # libtpu raises several kinds
        raise CompileError(reason(str(error))) from error


def compile_for(chip: str, f: Callable, *args, dump: str | None = None) -> jax.stages.Compiled:
    """`lower_for` and `build`."""
    return build(lower_for(chip, f, *args), dump)


_SCOPED = re.compile(
    r"Scoped allocation with size (\S+) and limit (\S+) exceeded|"
    r"Ran out of memory in memory space vmem\. Used (\S+) of (\S+) vmem"
)
_MEMORY = re.compile(r"Allocation \(size=(\d+)\) would exceed memory \(size=(\d+)\)(.*)", re.DOTALL)
_WHERE = re.compile(r"shape = '(.*?)', space=(\w+).*?tag = '(.*?)'")


def reason(text: str) -> str:
    """What the compiler says, in a line: of VMEM what is wanted and what there is."""
    if m := _SCOPED.search(text):
        wants, limit = filter(None, m.groups())
        return f"VMEM overflow: the kernel wants {wants}, its limit is {limit}: smaller blocks"
    if m := _MEMORY.search(text):
        where = _WHERE.search(m[3])
        what = f"the {where[3]} {where[1]} in {where[2]}" if where else "an allocation"
        return f"VMEM overflow: {what} wants {_mib(m[1])}, there are {_mib(m[2])}"
    return " ".join(text.split())[:300]


def _mib(size: str) -> str:
    return f"{int(size) / 2**20:.1f} MiB"


_CALL = re.compile(r'%([\w.\-]+) = .*custom_call_target="tpu_custom_call"')
_SCOPE = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1",[^]]*?"size":"(\d+)"')


def program_text(dump: str) -> str:
    """The final HLO of a program compiled into a folder.

    `compiled.as_text()` parses it once more, and stumbles over some of libtpu's own instructions.
    """
    paths = list(Path(dump).glob("*.after_codegen.txt"))
    return max((path.read_text() for path in paths), key=len)


def kernels(text: str) -> dict[str, int]:
    """VMEM bytes of the Pallas kernels of a program, by name; 0 where the compiler names none.

    Blocks, their second buffers and scratch; not operands that XLA itself has put into VMEM.
    """
    calls = list(_CALL.finditer(text))
    ends = [c.start() for c in calls] + [len(text)]  # a call may take many lines
    found = {}
    for call, end in zip(calls, ends[1:], strict=True):
        size = _SCOPE.search(text, call.end(), end)
        found[call[1]] = int(size[1]) if size else 0
    return found
