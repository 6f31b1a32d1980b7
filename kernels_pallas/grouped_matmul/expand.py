"""Packed matrices in VMEM, widened piece by piece for the matrix unit.

A piece is all outputs of a block x `chunk` inputs. Eight inputs of int4 share a word, and a lane
cannot be spread over eight: instead the inputs of x are permuted within chunks of 1024, so that the
first bits of 128 words stand beside each other, then the second. A scale belongs to the same lanes
of all eight. Inputs are padded by zeros to whole chunks, and scales behind the end are blanked, as
what stands there may be no number.

The scale of an output multiplies a result (int8); that of a square block comes by the scalar core.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.tile import LANE, pad, up
from kernels_pallas.grouped_matmul.weights import BLOCK, Fp8, Int4, Int8, Packed, Weights

WORDS = 8  # inputs of a word
CHUNK = 1536  # inputs of a piece, at most


class Form(NamedTuple):
    """How what is contracted is cut into pieces."""

    inputs: int
    chunk: int  # of a piece
    group: int  # inputs that share a scale of int4

    @property
    def pieces(self) -> int:
        """Of a block."""
        return pl.cdiv(self.inputs, self.chunk)


def form_of(weights: Weights, inputs: int) -> Form:
    """Of weights with so many inputs; of floats they may be outputs, what is contracted."""
    if isinstance(weights, Int4):
        group, chunk = inputs // weights.scale.shape[-1], WORDS * LANE
        if chunk % group:
            raise ValueError(f"grouped_matmul: int4 scales of {group} inputs do not divide {chunk}")
        return Form(inputs, chunk, group)
    fit = [d for d in range(LANE, CHUNK + 1, LANE) if inputs % d == 0]
    return Form(inputs, max(fit, default=inputs), 0)


def permuted(x: jax.Array) -> jax.Array:
    """Inputs ... a as int4 is widened: padded to whole chunks."""
    x = pad(x, WORDS * LANE, x.ndim - 1)
    chunks = x.reshape(*x.shape[:-1], -1, LANE, WORDS)
    return chunks.swapaxes(-1, -2).reshape(x.shape)


def restored(x: jax.Array, a: int) -> jax.Array:
    """`permuted` undone."""
    chunks = x.reshape(*x.shape[:-1], -1, WORDS, LANE)
    return chunks.swapaxes(-1, -2).reshape(x.shape)[..., :a]


def stacked(weights: Packed, block: int) -> Packed:
    """Weights of a stack l g ..., scales so that a block of outputs is one of theirs.

    Of int4 outputs come last: inputs / 32 is no multiple of 128 in K2, and where that is so XLA has
    them so in memory. The other way about the compiler would copy the scales of the whole stack.
    """
    if isinstance(weights, Int8):
        return weights._replace(scale=weights.scale[:, :, None])
    if isinstance(weights, Int4):
        return weights._replace(scale=weights.scale.swapaxes(-1, -2))
    if isinstance(weights, Fp8):
        blocks = pl.cdiv(block, BLOCK)
        scale = pad(weights.scale, blocks, weights.scale.ndim - 2)
        *lead, _, inputs = scale.shape
        return weights._replace(scale=scale.reshape(*lead, -1, blocks, inputs))
    return weights


def specs(weights: Packed, form: Form, block: int, at) -> Packed:
    """Blocks of all inputs; at(*grid) -> (layer, group, block of outputs)."""
    inputs = weights[0].shape[-1]

    def spec(dims, where, **how):
        return pl.BlockSpec(dims, lambda *grid: where(*at(*grid)), **how)

    whole = lambda width: spec(  # noqa: E731
        (None, None, block, width), lambda layer, group, j: (layer, group, j, 0)
    )
    match weights:
        case Int8():
            return Int8(whole(inputs), spec(
                (None, None, 1, block), lambda layer, group, j: (layer, group, 0, j)
            ))
        case Int4():
            rows = up(weights.scale.shape[2], WORDS * LANE // form.group)
            return Int4(whole(up(inputs, LANE)), spec(
                (None, None, rows, block), lambda layer, group, j: (layer, group, 0, j)
            ))
    rows, columns = weights.scale.shape[-2:]
    return Fp8(whole(inputs), spec(
        (None, None, None, rows, columns), lambda layer, group, j: (layer, group, j, 0, 0),
        memory_space=pltpu.SMEM,
    ))


def piece(weights: Packed, c, form: Form, dtype) -> jax.Array:
    """Piece c of a block: outputs x chunk."""
    match weights:
        case Int8(values=values):
            return values[:, columns(c, form.chunk)].astype(dtype)
        case Int4():
            return _int4(weights, c, form, dtype)
    return _fp8(weights, c, form.chunk, dtype)


def columns(c, chunk: int):
    """Lanes of piece c."""
    return pl.ds(c * chunk if isinstance(c, int) else pl.multiple_of(c * chunk, chunk), chunk)


def each(pieces: int, use: Callable) -> None:
    """use(c) of all pieces; of one alone without a loop, as its lanes may be no multiple of 128."""
    if pieces == 1:
        use(0)
    else:
        pl.loop(0, pieces)(use)


def _int4(weights: Int4, c, form: Form, dtype) -> jax.Array:
    words = weights.packed[:, columns(c, LANE)]
    count = form.chunk // form.group  # scales of a piece
    at = c * count if isinstance(c, int) else pl.multiple_of(c * count, count)
    scale = weights.scale[pl.ds(at, count)].astype(jnp.float32)
    # A row for each word of a group, then turned: a lane for each word.
    repeated = (form.group // WORDS, scale.shape[1])
    scale = jnp.concatenate(
        [jnp.broadcast_to(scale[i : i + 1], repeated) for i in range(count)], 0
    ).T
    if form.inputs % form.chunk:
        lane = jax.lax.broadcasted_iota(jnp.int32, words.shape, 1)
        scale = jnp.where(lane < form.inputs // WORDS - c * LANE, scale, 0.0)
    words = words ^ jnp.int32(-0x77777778)  # value + 8 as a signed number of four bits
    signed = [(words << (28 - 4 * i) if i < WORDS - 1 else words) >> 28 for i in range(WORDS)]
    # Rounded all at once: of 128 lanes alone, Mosaic packs a register of bfloat16 in five steps.
    return jnp.concatenate([x.astype(jnp.float32) * scale for x in signed], 1).astype(dtype)


def _fp8(weights: Fp8, c, chunk: int, dtype) -> jax.Array:
    first, codes = c * pl.cdiv(chunk, BLOCK), weights.codes[:, columns(c, chunk)]
    # Whole registers of codes are widened at once: squares alone would be packed and unpacked.
    x = pltpu.bitcast(codes, jnp.float8_e4m3fn).astype(jnp.float32)
    rows, lanes = (range(0, size, BLOCK) for size in codes.shape)
    return jnp.concatenate([
        jnp.concatenate([
            x[i : i + BLOCK, j : j + BLOCK] * weights.scale[i // BLOCK, first + j // BLOCK]
            for j in lanes
        ], 1) for i in rows
    ], 0).astype(dtype)
