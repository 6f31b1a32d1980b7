"""What keeps an op's kernels from a call, said before a compiler says it in its own words.

An op's tpu.py has `unsupported(...) -> str | None`: the first reason, or None. It knows what can
never be; what passes may still want more VMEM than a chip has.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp

KERNELS = ("pallas", "pallas_interpret")
SMEM = (1 << 20) - 4096  # bytes of scalars on every chip, less what the compiler takes of them


def check(op: str, impl: str, unsupported: Callable[..., str | None], *args) -> None:
    """NotImplementedError with the reason, if impl is a kernel and there is one."""
    if impl in KERNELS and (why := unsupported(*args)):
        raise NotImplementedError(f"{op}[{impl}]: {why}")


def numbers(**arrays) -> str | None:
    """Why arrays (None: left out), by name, are not what a kernel multiplies: one of two dtypes."""
    dtypes = {name: jnp.dtype(x.dtype) for name, x in arrays.items() if x is not None}
    for name, dtype in dtypes.items():
        if dtype not in (jnp.bfloat16, jnp.float32):
            return f"{name} is {dtype}, kernels read bfloat16 or float32: cast it"
    if len(set(dtypes.values())) > 1:
        said = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        return f"kernels multiply one dtype, here are {said}: cast them to one"
    return None


def scalars(count: int, what: str) -> str | None:
    """Why so many int32 do not fit where the scalar core reads; `what` is to be made smaller."""
    if (size := 4 * count) > SMEM:
        return f"{what} take {size / 2**20:.2f} MiB of scalars, there is 1 MiB: split the call"
    return None


def windows(limit: int, what: str, *blocks: tuple) -> str | None:
    """Why blocks, (sizes ..., bytes of a number), two of each, do not fit `limit` bytes of VMEM."""
    if (size := sum(2 * math.prod(block) for block in blocks)) > limit:
        said = f"{what} take {size >> 20} MiB of VMEM at least"
        return f"{said}, the kernel has {limit >> 20}: split them"
    return None
