"""Looking at neighbours: shifts and tiles along a row, right across calls, documents and runs.

A row is made of runs: equal pieces, each contiguous in slots, in any order (one run: the row is in
slot order). A neighbour counts only if positions and segment say so, so packed documents never see
one another and padding never leaks. What lies before a run is found by position, wherever it is:
with runs spread over devices, only the last tokens of each run are exchanged.
"""

import jax
import jax.numpy as jnp

from kimijax.cache import Tokens, keep_last


def previous_runs(pos: jax.Array, seg: jax.Array, runs: int) -> jax.Array:
    """b r: the run that ends where each run begins; -1: none in this call. pos and seg b t."""
    pos, seg = (x.reshape(x.shape[0], runs, -1) for x in (pos, seg))
    first, last = (pos[..., 0], seg[..., 0]), (pos[..., -1], seg[..., -1])
    ends_here = (last[0][:, None, :] == first[0][..., None] - 1) & (
        last[1][:, None, :] == first[1][..., None]
    )
    ends_here &= (first[1] >= 0)[..., None]
    return jnp.where(ends_here.any(-1), jnp.argmax(ends_here, -1), -1).astype(jnp.int32)


def split(x: jax.Array, tokens: Tokens) -> jax.Array:
    """b t ... -> b r t/r ..."""
    return x.reshape(x.shape[0], tokens.runs, -1, *x.shape[2:])


def before(x: jax.Array, past: jax.Array, tokens: Tokens) -> jax.Array:
    """The n tokens before each run: b r n ...; x b t ..., past b n ... lies before the call."""
    n = past.shape[1]
    past = past[:, None].astype(x.dtype)
    if tokens.runs == 1:
        return past
    if n > x.shape[1] // tokens.runs:
        raise ValueError(f"runs of {x.shape[1] // tokens.runs} tokens are shorter than {n} before")
    ends = split(x, tokens)[:, :, -n:]
    at = tokens.previous.reshape(*tokens.previous.shape, *(1,) * (ends.ndim - 2))
    return jnp.where(at >= 0, jnp.take_along_axis(ends, jnp.maximum(at, 0), 1), past)


def shifts(
    x: jax.Array, past: jax.Array | None, tokens: Tokens, n: int
) -> tuple[list[jax.Array], jax.Array | None]:
    """[x one token earlier, two earlier, ... n earlier], zero where there is none; the new past.

    x b t d; past b n d holds the last n tokens of earlier calls (None: there are none).
    """
    if n == 0:
        return [], past
    b, t, d = x.shape
    held = jnp.zeros((b, n, d), x.dtype) if past is None else past
    row = jnp.concatenate([before(x, held, tokens), split(x, tokens)], 2)
    pos, seg = _history(tokens, n)
    here_pos, here_seg = split(tokens.pos, tokens), split(tokens.seg, tokens)
    out = []
    for j in range(1, n + 1):
        cut = slice(n - j, n - j + t // tokens.runs)
        near = (pos[:, :, cut] == here_pos - j) & (seg[:, :, cut] == here_seg)
        out.append(jnp.where(near[..., None], row[:, :, cut], 0).reshape(b, t, d))
    return out, None if past is None else keep_last(past, x, tokens.used)


def begins(tokens: Tokens) -> jax.Array:
    """b t: the token before this one in the row is not the one before it in its document."""
    pos, seg = _history(tokens, 1)
    here_pos, here_seg = split(tokens.pos, tokens), split(tokens.seg, tokens)
    follows = (pos[:, :, :-1] == here_pos - 1) & (seg[:, :, :-1] == here_seg)
    return (~follows & (here_seg >= 0)).reshape(tokens.seg.shape)


def _history(tokens: Tokens, n: int) -> tuple[jax.Array, jax.Array]:
    """Positions and segments of the n slots before each run and of the run, b r n+t/r."""
    short = max(0, n - tokens.past_pos.shape[1])
    pad = ((0, 0), (short, 0))

    def row(x, past):
        past = jnp.pad(past, pad, constant_values=-1)[:, -n:]
        return jnp.concatenate([before(x, past, tokens), split(x, tokens)], 2)

    return row(tokens.pos, tokens.past_pos), row(tokens.seg, tokens.past_seg)


def tiles(x: jax.Array, tokens: Tokens, length: int) -> jax.Array:
    """Each run in tiles: b t ... -> b r m length ..."""
    return x.reshape(x.shape[0], tokens.runs, -1, length, *x.shape[2:])


def tiles_with_halo(x: jax.Array, past: jax.Array, tokens: Tokens, length: int) -> jax.Array:
    """Each tile behind the tokens before it: b r m n+length ...; past b n ... precedes the call.

    With several tiles in a run, n is at most `length`.
    """
    n = past.shape[1]
    row = jnp.concatenate([before(x, past, tokens), split(x, tokens)], 2)
    if row.shape[2] == n + length:
        return row[:, :, None]
    own = tiles(x, tokens, length)
    halos = row[:, :, :-n].reshape(own.shape)[:, :, :, :n]
    return jnp.concatenate([halos, own], 3)
