"""What a compiled program says about itself: how much it sends, and what runs meanwhile."""

import math
import re
from typing import NamedTuple

SENDS = ("collective-permute", "collective-permute-start")
COLLECTIVES = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute)"
    r"(-start)?"
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_OP = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


class Op(NamedTuple):
    """One instruction. `called` are the computations it runs: bodies, branches, fusions."""

    name: str
    kind: str
    shape: str
    operands: tuple[str, ...]
    called: tuple[str, ...]
    trips: int | None  # of a while, where the compiler knows them; 1 of everything else


class Program(NamedTuple):
    """Computations by name, their instructions by name in the order in which they run."""

    entry: str
    computations: dict[str, dict[str, Op]]


def parse(text: str) -> Program:
    """The program of `compiled.as_text()`."""
    entry, at, found = "", {}, {}
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            at = found[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif match := _OP.match(line):
            at[match[1]] = match.groups()
    return Program(
        entry, {c: {n: _op(found, *m) for n, m in ops.items()} for c, ops in found.items()}
    )


def _op(computations, name: str, shape: str, kind: str, rest: str) -> Op:
    end = _closing(rest)
    known = _TRIPS.search(rest)
    called = tuple(c for c in re.findall(r"%([\w.\-]+)", rest[end:]) if c in computations)
    trips = (int(known[1]) if known else None) if kind == "while" else 1
    return Op(name, kind, shape, tuple(re.findall(r"%([\w.\-]+)", rest[:end])), called, trips)


def _closing(text: str) -> int:
    """Where the parenthesis closes that was opened before the text."""
    depth = 1
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if not depth:
            return i
    return len(text)


def array_bytes(shape: str) -> int:
    """Bytes of all arrays of a shape, padding of layouts not counted."""
    bits = lambda kind: 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])  # noqa: E731
    return sum(
        bits(kind) * math.prod(map(int, filter(None, dims.split(",")))) // 8
        for kind, dims in _ARRAY.findall(shape)
    )


class Collective(NamedTuple):
    """An instruction by which devices meet, and the loops around it, the innermost last."""

    op: Op
    kind: str
    asynchronous: bool  # begun in one place and waited for in another, or run on a SparseCore
    bytes: int  # of its result on a device
    loops: tuple[str, ...]  # their bodies


def collectives(program: Program) -> list[Collective]:
    """All of a program, each once, however often its loops run."""
    found, seen = [], set()

    def visit(name: str, asynchronous: bool, loops: tuple[str, ...]) -> None:
        if name in seen:
            return
        seen.add(name)
        ops = program.computations[name]
        for op in ops.values():
            if match := COLLECTIVES.fullmatch(op.kind):
                # The shape of a start holds operands, results and flags: operands travel.
                moved = "".join(ops[x].shape for x in op.operands[:1] if x in ops)
                size = array_bytes(moved if match[2] else op.shape)
                late = asynchronous or bool(match[2])
                found.append(Collective(op, match[1], late, size, loops))
            inner = op.kind == "async-start"
            for called in op.called:
                within = (*loops, called) if op.kind == "while" else loops
                visit(called, asynchronous or inner, within)

    visit(program.entry, False, ())
    return found


def sent_bytes(program: Program, computation: str | None = None) -> int:
    """Bytes that a device sends in collective permutes, each as often as its loops run.

    CPUs send bfloat16 as float32: what is converted only to be sent counts as it was before.
    """
    total = 0
    ops = program.computations[computation or program.entry]
    for op in ops.values():
        if op.kind in SENDS:
            total += sum(array_bytes(_unconverted(program, ops, ops[x]).shape) for x in op.operands)
        if inner := sum(sent_bytes(program, c) for c in op.called):
            if op.trips is None:
                raise ValueError(f"{op.name} sends, and how often it runs is not known")
            total += op.trips * inner
    return total


def _unconverted(program: Program, ops: dict[str, Op], op: Op) -> Op:
    """The operand of a conversion; anything else as it is."""
    inside = {x.kind for c in op.called for x in program.computations[c].values()}
    conversion = op.kind == "convert" or (
        op.kind == "fusion" and "convert" in inside <= {"parameter", "convert"}
    )
    return ops[op.operands[0]] if conversion else op


class Flight(NamedTuple):
    """One array on its way, and the instructions between its start and its arrival."""

    shape: str
    bytes: int
    start: int
    done: int
    meanwhile: tuple[Op, ...]


def flights(ops: dict[str, Op]) -> list[Flight]:
    """The asynchronous sends of a computation. ValueError: it has a synchronous one."""
    order, begun, found = list(ops.values()), {}, []
    for i, op in enumerate(order):
        if op.kind == "collective-permute":
            raise ValueError(f"{op.name} is synchronous")
        if op.kind == "collective-permute-start":
            begun[op.name] = i
        elif op.kind == "collective-permute-done":
            start = begun.pop(op.operands[0])
            between = tuple(order[start + 1 : i])
            found.append(Flight(op.shape, array_bytes(op.shape), start, i, between))
    return found
