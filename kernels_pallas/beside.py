"""Implementations of an op side by side on this machine's device, other packages' among them.

Each runs once a round, and every other round goes through them backwards, so that what drifts
(clocks, heat, other programs) falls on all alike. Ratios are taken within a round; of all rounds
the median counts. Two more run with them: a matrix product and a copy, large enough to show what
the device does at best, and what an implementation is a fraction of.

An op lists what is compared as `SHAPES: dict[case, Callable[[], Shape]]` in its `gpu_peers.py`.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MATMUL, COPY = 8192, 2**28  # rows of a square, numbers
ROUNDS, LEAST = 11, 0.02  # seconds of one implementation in a round, at least
AGREE = 0.03  # of the largest number: what bfloat16 results may differ by


class Contender(NamedTuple):
    """An implementation with its arguments, ready to run."""

    start: Callable[[], Any]  # one call; may return before it is done
    wait: Callable[[Any], Any]  # until this result is there, and what was started before it
    read: Callable[[Any], np.ndarray]  # the result in float32


class Shape(NamedTuple):
    """What is compared at one shape, ours first, and what it needs at least."""

    makers: dict[str, Callable[[], Contender]]
    flops: float
    moved: float  # bytes of inputs and result, once


class Best(NamedTuple):
    """Something that shows what the device does at best, and how much of it."""

    contender: Contender
    work: float
    unit: str  # FLOP or B


class Absent(RuntimeError):
    """Why an implementation cannot be compared here."""


def of_jax(f: Callable, *args) -> Contender:
    """A function of arrays, compiled."""
    call = jax.jit(f)
    return Contender(
        lambda: call(*args), jax.block_until_ready, lambda x: np.asarray(x, np.float32)
    )


def of_torch(f: Callable, *arrays: jax.Array) -> Contender:
    """f(torch, *tensors) of copies of the arrays, on the device that jax has.

    ImportError, Absent: torch is missing, or finds no GPU.
    """
    import torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise Absent(f"torch {torch.__version__} finds no GPU: install a build with CUDA")

    def tensor(x):
        if jnp.issubdtype(x.dtype, jnp.floating):  # numpy has no bfloat16 that torch knows
            x = torch.from_numpy(np.array(x, np.float32)).to(getattr(torch, x.dtype.name))
        else:
            x = torch.from_numpy(np.array(x))
        return x.to(device)

    def wait(x):
        if device == "cuda":
            torch.cuda.synchronize()
        return x

    call = functools.partial(f, torch, *map(tensor, arrays))
    return Contender(call, wait, lambda x: x.float().cpu().numpy())


def rates(matmul: int = MATMUL, copy: int = COPY) -> dict[str, Best]:
    """A bfloat16 product with its FLOPs, and a copy with the bytes that it reads and writes."""
    square, long = jnp.ones((matmul, matmul), jnp.bfloat16), jnp.ones(copy, jnp.bfloat16)
    return {
        "matmul": Best(of_jax(jnp.matmul, square, square), 2.0 * matmul**3, "FLOP"),
        # Negated: XLA leaves out a plain copy.
        "copy": Best(of_jax(jnp.negative, long), 2.0 * long.nbytes, "B"),
    }


def seconds(
    contenders: dict[str, Contender], rounds: int = ROUNDS, least: float = LEAST
) -> dict[str, np.ndarray]:
    """Seconds of a call in each round, each of them the mean of as many calls as take `least`."""

    def run(contender, count):
        began = time.perf_counter()
        for _ in range(count):
            result = contender.start()
        contender.wait(result)
        return (time.perf_counter() - began) / count

    counts = {}
    for name, contender in contenders.items():
        run(contender, 1)  # compiles
        counts[name] = int(np.clip(np.ceil(least / run(contender, 1)), 1, 1000))
    found = {name: [] for name in contenders}
    for n in range(rounds):
        for name in list(contenders)[:: -1 if n % 2 else 1]:
            found[name].append(run(contenders[name], counts[name]))
    return {name: np.array(of) for name, of in found.items()}


def _why(error: Exception) -> str:
    """In a line."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, Absent):
        return text
    kind = "not installed" if isinstance(error, ImportError) else type(error).__name__
    return f"{kind}: {text or 'without a word'}"


def rows(
    op: str, case: str, shape: Shape, best: dict[str, Best], **how
) -> Iterator[dict]:
    """Of `best` (of `rates`) op, case, impl, ms, rate a second, unit; then of each implementation
    op, case, impl, ms, times (that of ours), of_matmul, of_copy, off.

    how   rounds and least of `seconds`

    off is the largest difference from ours as a fraction of its largest number; more than AGREE is
    an `error`. One that cannot run has `absent` instead: the reason in a line.
    """
    ready, results, absent = {}, {}, {}
    for name, make in shape.makers.items():
        try:
            contender = make()
            results[name] = contender.read(contender.wait(contender.start()))
            ready[name] = contender
        except Exception as error:  # a kernel may refuse by any
            absent[name] = _why(error)
    took = seconds({name: of.contender for name, of in best.items()} | ready, **how)
    median = lambda name: float(np.median(took[name]))  # noqa: E731
    for name, of in best.items():
        yield {"op": op, "case": case, "impl": f"({name})", "ms": median(name) * 1e3,
               "rate": of.work / median(name), "unit": of.unit}
    ours = next(iter(shape.makers))
    for name in shape.makers:
        row = {"op": op, "case": case, "impl": name}
        if name in absent:
            yield row | {"error" if name == ours else "absent": absent[name]}
            continue
        row |= {"ms": median(name) * 1e3, "times": None, "off": None}
        for what, need in (("matmul", shape.flops), ("copy", shape.moved)):
            row[f"of_{what}"] = float(np.median(took[what] / took[name])) * need / best[what].work
        if ours in ready:
            off = np.abs(results[name] - results[ours]).max() / np.abs(results[ours]).max()
            row |= {"times": float(np.median(took[name] / took[ours])), "off": float(off)}
            if not off <= AGREE:
                row["error"] = f"differs from {ours} by {off:.3g} of its largest number"
        yield row
