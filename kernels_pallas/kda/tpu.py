"""The delta rule in chunks as a TPU kernel, forward and backward.

Grid: row, heads, chunk; the chunks of a head come one after the other and the state between them
stays in VMEM, as the block of an output that does not move. What a chunk computes is in chunk.py.
The forward of a gradient keeps the state before every chunk; the backward goes from the last chunk
to the first, computes each again (jax.vjp of it, within the kernel), and carries the gradient of
the state.

Static cycles of a chunk of 64 tokens and a head, key and value 128, by the compiler of libtpu
0.0.52; `busy` is the matrix unit, `useful` what triangles as squares need, six bfloat16 products
for one of float32 (of the gradient three times the forward, as it computes the chunk again):

              v5e           v5p           v6e           tpu7x
    forward   2578          2579          2719          2761          a step of 4 heads
      busy    0.34 (0.19)   0.33 (0.19)   0.16 (0.04)   0.16 (0.04)
    gradient  7665          7697          7997          8541          a step of 2 heads
      busy    0.34 (0.19)   0.34 (0.19)   0.16 (0.05)   0.15 (0.04)

No unit is full: products wait for one another, and heads of a step do not overlap enough. Eight
heads a step take 2340 on v5p. Not in it: XLA turns what goes in and what comes out in HBM.

VMEM, bfloat16, 4 heads: q, k, v 3 x 64 KiB, g 128, out 128, states in and out 2 x 256, all twice:
1.9 MiB of the 2.6 that the compiler takes. Gradient, 2 heads: blocks are 1.5 MiB of 8.9.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import limits
from kernels_pallas.attention.tile import VMEM, pad
from kernels_pallas.kda import ref
from kernels_pallas.kda.chunk import CHUNK, HEADS, LANES, chunk
from kernels_pallas.kda.xla import RECURRENT

PAIRS = 2  # of heads in a step of the grid, if there are so many; the backward has one
FORGET = -1e30  # log decay where a document starts: its exponential is zero


class Tokens(NamedTuple):
    """What kernels read, p pairs of heads, c chunks of LANES: a pair's heads side by side."""

    q: jax.Array  # b p k (c l)
    k: jax.Array  # b p k (c l)
    v: jax.Array  # b p v (c l)
    g: jax.Array  # b p k (c l)   float32, as all below
    beta: jax.Array  # b p 1 (c l)


def unsupported(q, k, v) -> str | None:
    """Why the kernels do not run the rule, or None; each input may have its own dtype."""
    return limits.numbers(q=q) or limits.numbers(k=k) or limits.numbers(v=v)


def kda(q, k, v, g, beta, state, start, *, interpret: bool = False):
    """The op's TPU form; up to RECURRENT tokens are the recurrence, in XLA.

    See the package docstring for the contract.
    """
    b, t, h, _ = q.shape
    if t <= RECURRENT:
        return ref.kda(q, k, v, g, beta, state, start)
    f32 = jnp.float32
    g = jnp.where(start[..., None, None], FORGET, g.astype(f32))
    x = Tokens(*map(_across, (q, k, v, g, beta.astype(f32)[..., None])))
    state = pad(state.astype(f32), HEADS, 1)
    state = state.reshape(b, -1, HEADS, *state.shape[2:]).swapaxes(3, 4)
    out, state = _rule(x, state, interpret)
    state = state.swapaxes(3, 4)
    return _back(out)[:, :t, :h], state.reshape(b, -1, *state.shape[3:])[:, :h]


def _across(x):
    """b t h n -> b p n (c l). Padding neither decays nor writes."""
    x = pad(pad(x, CHUNK, 1), HEADS, 2)
    b, t, h, n = x.shape
    x = x.reshape(b, t // CHUNK, CHUNK, h // HEADS, HEADS, n)
    return x.transpose(0, 3, 5, 1, 4, 2).reshape(b, h // HEADS, n, -1)


def _back(x):
    """b p n (c l) -> b t h n."""
    b, p, n, length = x.shape
    x = x.reshape(b, p, n, length // LANES, HEADS, CHUNK).transpose(0, 3, 5, 1, 4, 2)
    return x.reshape(b, -1, p * HEADS, n)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rule(x: Tokens, state, interpret: bool):
    """(out b p v (c l), state b p heads v k) of tokens and the state before them."""
    return _forward(x, state, interpret, keep=False)


def _rule_fwd(x, state, interpret):
    *out, before = _forward(x, state, interpret, keep=True)
    return tuple(out), (x, before)


def _rule_bwd(interpret, kept, d):
    return _backward(*kept, *d, interpret)


_rule.defvjp(_rule_fwd, _rule_bwd)


def _forward(x: Tokens, state, interpret: bool, keep: bool):
    """(out, state) and, to be kept, the states before each chunk, b p c heads v k."""
    (b, p, n), size = state.shape[:2] + x.q.shape[2:3], x.v.shape[2]
    chunks, pairs = x.q.shape[3] // LANES, PAIRS if p % PAIRS == 0 else 1
    across, still, each = _specs(pairs, chunks, size, n, lambda c: c)

    def kernel(x, first, out, state, *before):
        @pl.when(pl.program_id(2) == 0)
        def _():
            state[...] = first[...]

        for at in range(pairs):
            states = [state[at, m] for m in range(HEADS)]
            for held in before:
                held[at, 0] = state[at]
            after, out[at] = chunk(states, *_read(x, at))
            for m in range(HEADS):
                state[at, m] = after[m]

    f32 = jnp.float32
    made = [
        (across(size), jax.ShapeDtypeStruct((b, p, size, chunks * LANES), f32)),
        (still, jax.ShapeDtypeStruct(state.shape, f32)),
        (each, jax.ShapeDtypeStruct((b, p, chunks, *state.shape[2:]), f32)),
    ][: 3 if keep else 2]
    return _call(
        kernel, (b, p // pairs, chunks), (Tokens(*(across(a.shape[2]) for a in x)), still),
        made, interpret, "kda",
    )(x, state)


def _backward(x: Tokens, before, d_out, d_state, interpret: bool):
    """Gradients of tokens and of the state before them."""
    (b, p, chunks), (size, n) = before.shape[:3], before.shape[4:]
    across, still, each = _specs(1, chunks, size, n, lambda c: chunks - 1 - c)

    def kernel(x, before, d_out, d_last, d_x, d_state):
        @pl.when(pl.program_id(2) == 0)
        def _():
            d_state[...] = d_last[...]

        states = [before[0, 0, m] for m in range(HEADS)]
        _, vjp = jax.vjp(chunk, states, *_read(x, 0))
        d_states, *d = vjp(([d_state[0, m] for m in range(HEADS)], d_out[0]))
        for grown, value in zip(d_x, d, strict=True):
            grown[0] = value.astype(grown.dtype)
        for m in range(HEADS):
            d_state[0, m] = d_states[m]

    specs = Tokens(*(across(a.shape[2]) for a in x))
    made = [
        (specs, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), x)),
        (still, jax.ShapeDtypeStruct(d_state.shape, jnp.float32)),
    ]
    return _call(
        kernel, (b, p, chunks), (specs, each, across(size), still), made, interpret, "kda_grads"
    )(x, before, d_out, d_state)


def _read(x: Tokens, at: int):
    """The tokens of one pair of heads, float32."""
    return (a[at].astype(jnp.float32) for a in x)


def _specs(pairs: int, chunks: int, size: int, n: int, order):
    """Of arrays b p rows (c l), of a state, and of a state for each chunk."""
    across = lambda rows: pl.BlockSpec(  # noqa: E731
        (None, pairs, rows, LANES), lambda b, p, c: (b, p, 0, order(c))
    )
    still = pl.BlockSpec((None, pairs, HEADS, size, n), lambda b, p, c: (b, p, 0, 0, 0))
    each = pl.BlockSpec(
        (None, pairs, 1, HEADS, size, n), lambda b, p, c: (b, p, order(c), 0, 0, 0)
    )
    return across, still, each


def _call(kernel, grid: tuple, in_specs: tuple, made: list, interpret: bool, name: str):
    """The kernel, with what it makes as (specs, shapes)."""
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=[spec for spec, _ in made],
        out_shape=[shape for _, shape in made],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=interpret,
        name=name,
    )
