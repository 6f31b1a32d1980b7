"""Attention to chosen blocks as a TPU kernel, forward.

Rows are the queries of a tile in all heads, as they lie; a chosen block is key and value of them
all. Scores lie transposed as in attention/tile.py, keys down and rows across:

    S^T = C Q^T,  m' = max(m, max_k S),  P = 2^(S - m'),  O^T' = O^T 2^(m - m') + C^T P^T

A step of the grid is a block of rows with all that its tile chose. The chosen blocks are brought
from the stacked store by copies of the kernel's own, KEYS tokens to a chunk, the next chunk (or
the first of the next step) while this one is worked on; so cost follows the chosen pairs and the
store is neither sliced nor copied. A chunk x LANES rows is one stage of the schedule, and three
stages are in flight: scores of the next, exponentials of this one, values of the last. Blocks that
do not fill a chunk are taken one by one: whatever was chosen is visible whole, nothing is masked.

The list of a tile comes to SMEM with the tile, as the scalars of 2^20 tokens do not fit at once.
q and out are read and written as they lie. A latent that is no multiple of 128 wide lies otherwise
in HBM: the compiler copies the store, padded, before every call.

A stage of 512 keys x 256 rows: on v6e, where a unit takes long to be loaded, 0.78 of its cycles are
useful (1024 rows in flight) against 0.48 for 128 keys; on v5p 0.945 against 0.93. Queries turned
beforehand, or O in rows, are no faster. Around the stages a step of 2048 rows x 4096 keys takes 6%
of its cycles on v5p, 15% on v6e: to start and await copies, to turn O. Bytes: see cost.py.

VMEM, bfloat16, r 512, 2048 rows x 512 keys: queries 2 MiB and out 4, both twice; accumulator 4;
chunks 2 x 0.5; a stage has 0.5 MiB of scores: 18 MiB.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import limits
from kernels_pallas.attention.tile import LANE, LANES, LOG2E, VMEM, State, dot, pad, up
from kernels_pallas.partial import Partial

ROWS, KEYS = 2048, 512  # of bfloat16; of float32 half as many rows


class Sizes(NamedTuple):
    """How a call is cut."""

    lanes: int  # rows of a stage
    rows: int  # of a step
    pieces: int  # steps of a tile
    unroll: int  # blocks of a chunk
    parts: int  # for the cores of a chip that share one
    tiles: int  # of a part


def sizes(q, blocks, ids) -> Sizes:
    """For queries b m t h r, blocks l b c j r and ids b m k."""
    (b, m, k), rows = ids.shape, q.shape[2] * q.shape[3]
    lanes = LANE if rows <= LANE else LANES
    pieces = pl.cdiv(rows, ROWS // 2 if blocks.dtype == jnp.float32 else ROWS)
    parts = 2 if b == 1 and m % 2 == 0 else 1  # rows of a batch are parts of their own
    unroll = min(max(KEYS // blocks.shape[3], 1), k)
    return Sizes(lanes, up(pl.cdiv(rows, pieces), lanes), pieces, unroll, parts, m // parts)


def unsupported(q, blocks, ids) -> str | None:
    """Why the kernels do not attend q to the chosen blocks, or None."""
    if blocks.dtype == jnp.int32:
        return "blocks are words of int8, kernels do not widen them: name impl xla, or cache floats"
    why = limits.numbers(q=q, blocks=blocks)
    return why or limits.scalars(4 * (ids.shape[-1] + 1), f"{ids.shape[-1]} choices of a tile")


def flat(x, size: Sizes):
    """b m t h ... as b m rows ..., padded."""
    x = x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:])
    return pad(x, size.rows * size.pieces, 2)


def lists(ids) -> jax.Array:
    """Of each tile how many it chose, and which: b m 1 k+1."""
    live = ids >= 0
    first = jnp.sort(jnp.where(live, ids, jnp.iinfo(jnp.int32).max), -1)
    count = live.sum(-1, keepdims=True, dtype=jnp.int32)
    return jnp.concatenate([count, first], -1)[:, :, None]


class Specs(NamedTuple):
    """Blocks of a step, on a grid (row of the batch, part, step of the part)."""

    mine: pl.BlockSpec  # the list of the step's tile
    following: pl.BlockSpec  # that of the next step
    rows: pl.BlockSpec  # of b m rows r
    lanes: pl.BlockSpec  # of b m 1 rows


def specs(size: Sizes, k: int, r: int) -> Specs:
    """Those of a call."""
    steps = size.tiles * size.pieces

    def at(part, step):
        return part * size.tiles + jax.lax.div(step, size.pieces), jax.lax.rem(step, size.pieces)

    def of_list(ahead):
        def index(b, part, step, layer):
            return b, at(part, jnp.minimum(step + ahead, steps - 1))[0], 0, 0

        return pl.BlockSpec((None, None, 1, k + 1), index, memory_space=pltpu.SMEM)

    return Specs(
        of_list(0), of_list(1),
        pl.BlockSpec((None, None, size.rows, r), lambda b, p, s, _: (b, *at(p, s), 0)),
        pl.BlockSpec(
            (None, None, 1, size.rows), lambda b, p, s, _: (b, at(p, s)[0], 0, at(p, s)[1])
        ),
    )


class Chunks(NamedTuple):
    """Chosen blocks on their way to VMEM, a chunk ahead of the work."""

    mine: jax.Array  # 1 k+1, SMEM
    following: jax.Array
    store: jax.Array  # c j r, HBM
    buffer: jax.Array  # 2 keys r
    turn: jax.Array  # SMEM: the buffer of the step's first chunk
    arrived: jax.Array  # semaphores

    @property
    def unroll(self) -> int:
        """Blocks of a chunk."""
        return self.buffer.shape[1] // self.store.shape[1]

    def each(self, table, n, use) -> None:
        """use(place in the chunk, block) of the blocks of chunk n."""
        for u in range(self.unroll):
            @pl.when(n * self.unroll + u < table[0, 0])
            def _(u=u):
                use(u, table[0, 1 + n * self.unroll + u])

    def _copy(self, slot, u, block):
        j = self.store.shape[1]
        there = self.buffer.at[slot, pl.ds(u * j, j)]
        return pltpu.make_async_copy(self.store.at[block], there, self.arrived.at[slot])

    def _start(self, table, n, slot):
        self.each(table, n, lambda u, block: self._copy(slot, u, block).start())

    def run(self, step, steps, use) -> jax.Array:
        """use(n, its buffer, how many blocks are left) of every chunk n of a step; their number."""
        @pl.when(step == 0)
        def _():
            self.turn[0] = 0
            self._start(self.mine, 0, 0)

        turn, count = self.turn[0], self.mine[0, 0]
        chunks = jnp.maximum(jax.lax.div(count + self.unroll - 1, self.unroll), 1)
        self.turn[0] = jax.lax.rem(turn + chunks, 2)

        @pl.loop(0, chunks)
        def _(n):
            slot, last = jax.lax.rem(turn + n, 2), n == chunks - 1
            pl.when(~last)(lambda: self._start(self.mine, n + 1, 1 - slot))
            pl.when(last & (step < steps - 1))(lambda: self._start(self.following, 0, 1 - slot))
            self.each(self.mine, n, lambda u, block: self._copy(slot, u, block).wait())
            use(n, self.buffer.at[slot], count - n * self.unroll)

        return chunks


def by_chunk(chunk, left, j: int, use) -> None:
    """use(first key, keys) of a chunk at once if it is full, of each of its blocks if not."""
    keys = chunk.shape[0]
    pl.when(left * j >= keys)(lambda: use(0, keys))

    @pl.when(left * j < keys)
    def _():
        pl.loop(0, left)(lambda u: use(pl.multiple_of(u * j, j), j))


def attend(q, chunk, state: State, lanes: int, keys: tuple, scale: float) -> None:
    """Merge keys, (first, count), of a chunk into the state of all rows; one schedule."""
    key = chunk[pl.ds(*keys)]
    groups = [pl.ds(at, lanes) for at in range(0, q.shape[0], lanes)]

    def products(at):
        return dot(key, q[at], (1, 1)) * scale

    def values(at, p, shrink):
        state.acc[:, at] = state.acc[:, at] * shrink + dot(key, p.astype(key.dtype), (0, 0))

    made, waiting = products(groups[0]), None
    for at, ahead in zip(groups, [*groups[1:], None], strict=True):
        s, made = made, None if ahead is None else products(ahead)
        top = state.top[:, at]
        highest = jnp.maximum(top, s.max(0, keepdims=True))
        p, shrink = jnp.exp2(s - highest), jnp.exp2(top - highest)
        state.total[:, at] = state.total[:, at] * shrink + p.sum(0, keepdims=True)
        state.top[:, at] = highest
        if waiting is not None:
            values(*waiting)
        waiting = at, p, shrink
    values(*waiting)


def forward(q, blocks, layer, ids, *, scale: float, interpret: bool = False) -> Partial:
    """The op's TPU form. See the package docstring for the contract."""
    (b, m, t, h, r), (j, k) = q.shape, (blocks.shape[3], ids.shape[-1])
    size, table = sizes(q, blocks, ids), lists(ids)
    spec, length = specs(size, k, r), size.rows * size.pieces

    def kernel(layer, mine, following, q, store, *refs):
        (*out, acc, top, total), way = refs[:6], refs[6:]
        row, step, steps = pl.program_id(0), pl.program_id(2), pl.num_programs(2)
        state = State(acc, top, total)
        state.clear()

        def use(n, chunk, left):
            by_chunk(chunk, left, j, lambda at, keys: attend(
                q, chunk, state, size.lanes, (at, keys), scale * LOG2E
            ))

        Chunks(mine, following, store.at[layer[0], row], *way).run(step, steps, use)
        write(state, Partial(*out), size.lanes)

    f32 = lambda *shape: jax.ShapeDtypeStruct((b, m, *shape), jnp.float32)  # noqa: E731
    out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, size.parts, size.tiles * size.pieces),
            in_specs=[spec.mine, spec.following, spec.rows, pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=Partial(spec.rows, spec.lanes, spec.lanes),
            scratch_shapes=[
                *(pltpu.VMEM((n, size.rows), jnp.float32) for n in (r, 1, 1)),
                *scratch(size, blocks),
            ],
        ),
        out_shape=Partial(f32(length, r), f32(1, length), f32(1, length)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=interpret,
        name="select",
    )(jnp.reshape(layer, 1), table, table, flat(q, size), blocks)
    back = lambda x: x[:, :, : t * h].reshape(b, m, t, h, *x.shape[3:])  # noqa: E731
    return Partial(back(out.out), back(out.lse[:, :, 0]), back(out.max_logit[:, :, 0]))


def scratch(size: Sizes, blocks) -> list:
    """What Chunks needs behind the store."""
    j, r = blocks.shape[3:]
    return [
        pltpu.VMEM((2, size.unroll * j, r), blocks.dtype), pltpu.SMEM((1,), jnp.int32),
        pltpu.SemaphoreType.DMA((2,)),
    ]


def write(state: State, out: Partial, lanes: int) -> None:
    """The Partial of all that was seen, rows as they came."""
    @pl.loop(0, out.out.shape[0], step=lanes)
    def _(at):
        at = pl.ds(pl.multiple_of(at, lanes), lanes)
        seen = state.partial(at)
        out.out[at] = seen.out.T
        out.lse[:, at], out.max_logit[:, at] = seen.lse, seen.max_logit
