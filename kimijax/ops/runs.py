"""Looking at neighbours: shifts and tiles along a row, right across calls and documents.

Array order is slot order. A neighbour counts only if positions and segment say so, so packed
documents never see one another and padding never leaks.
"""

import jax
import jax.numpy as jnp

from kimijax.cache import Tokens, keep_last


def shifts(
    x: jax.Array, past: jax.Array | None, tokens: Tokens, n: int
) -> tuple[list[jax.Array], jax.Array | None]:
    """[x one token earlier, two earlier, ... n earlier], zero where there is none; the new past.

    x b t d; past b n d holds the last n tokens of earlier calls (None: there are none).
    """
    if n == 0:
        return [], past
    b, t, d = x.shape
    before = jnp.zeros((b, n, d), x.dtype) if past is None else past.astype(x.dtype)
    row = jnp.concatenate([before, x], 1)
    pos, seg = _history(tokens, n)
    out = []
    for j in range(1, n + 1):
        cut = slice(n - j, n - j + t)
        near = (pos[:, cut] == tokens.pos - j) & (seg[:, cut] == tokens.seg)
        out.append(jnp.where(near[..., None], row[:, cut], 0))
    return out, None if past is None else keep_last(past, x, tokens.used)


def begins(tokens: Tokens) -> jax.Array:
    """b t: the token before this one in the row is not the one before it in its document."""
    pos, seg = _history(tokens, 1)
    follows = (pos[:, :-1] == tokens.pos - 1) & (seg[:, :-1] == tokens.seg)
    return ~follows & (tokens.seg >= 0)


def _history(tokens: Tokens, n: int) -> tuple[jax.Array, jax.Array]:
    """Positions and segments of the n slots before the call and of the call, b n+t."""
    short = max(0, n - tokens.past_pos.shape[1])
    pad = ((0, 0), (short, 0))
    past_pos = jnp.pad(tokens.past_pos, pad, constant_values=-1)[:, -n:]
    past_seg = jnp.pad(tokens.past_seg, pad, constant_values=-1)[:, -n:]
    return (
        jnp.concatenate([past_pos, tokens.pos], 1),
        jnp.concatenate([past_seg, tokens.seg], 1),
    )


def tile(x: jax.Array, length: int) -> jax.Array:
    """b t ... -> b*m length ..."""
    return x.reshape(-1, length, *x.shape[2:])


def tile_with_halo(past: jax.Array, x: jax.Array, length: int, halo: int) -> jax.Array:
    """Each tile behind the `halo` (at most `length`) tokens before it: b*m halo+length ...

    past b n ... (n >= halo) is what lies before the call.
    """
    b, t = x.shape[:2]
    row = jnp.concatenate([past[:, past.shape[1] - halo :].astype(x.dtype), x], 1)[:, :t]
    halos = row.reshape(b, t // length, length, *x.shape[2:])[:, :, :halo]
    tiles = x.reshape(b, t // length, length, *x.shape[2:])
    return jnp.concatenate([halos, tiles], 2).reshape(-1, halo + length, *x.shape[2:])
