"""Rotary positions, exact at any length.

A float32 angle near position 2M is off by 0.1 rad. Here a position is hi * 2048 + lo and the
angle of each part, reduced modulo 2 pi in float64 on the host, is looked up; the two are combined
by the addition theorem. The error stays at the float32 rounding of sine and cosine (below 1e-6).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from kimijax.config import RopeConfig

LOW = 2048
MAX_POSITION = LOW * 4096  # 8M: the table's reach


def frequencies(rope: RopeConfig) -> np.ndarray:
    """Radians per position of each channel pair, float64 [dim/2]; YaRN as in arXiv:2309.00071."""
    pair = np.arange(rope.dim // 2, dtype=np.float64)
    base = rope.theta ** (-2 * pair / rope.dim)
    if (y := rope.yarn) is None:
        return base

    def pair_that_turns(times: float) -> float:
        """The pair, as a real number, that turns so often within the original positions."""
        return rope.dim * math.log(y.original / (2 * math.pi * times)) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_that_turns(y.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(y.beta_slow)), rope.dim - 1)
    slowed = np.clip((pair - low) / (high - low if high != low else 0.001), 0, 1)
    return base * (slowed / y.factor + 1 - slowed)


@functools.lru_cache(maxsize=16)
def _tables(rope: RopeConfig) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, stacked, for hi * 2048 [4096, 2, dim/2] and lo [2048, 2, dim/2]."""
    inv_freq = frequencies(rope)
    tables = []
    for steps in (np.arange(MAX_POSITION // LOW) * float(LOW), np.arange(LOW, dtype=np.float64)):
        angle = np.outer(steps, inv_freq)
        tables.append(np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32))
    return tables[0], tables[1]


def cos_sin(pos: jax.Array, rope: RopeConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin of pos * frequency, times YaRN's amplitude, each [..., dim/2] float32.

    Positions outside [0, 8M), such as those of unwritten slots, get those of the nearest end:
    what they belong to is never seen.
    """
    high, low = _tables(rope)
    pos = jnp.clip(pos, 0, MAX_POSITION - 1)
    a, b = jnp.asarray(high)[pos // LOW], jnp.asarray(low)[pos % LOW]
    (cos_a, sin_a), (cos_b, sin_b) = (a[..., 0, :], a[..., 1, :]), (b[..., 0, :], b[..., 1, :])
    cos, sin = cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b
    gain = rope.yarn.amplitude if rope.yarn else 1.0
    return (cos, sin) if gain == 1.0 else (gain * cos, gain * sin)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the last axis of x by halves: (first, second) is the pair; float32 inside.

    cos and sin have the half width and broadcast against x without its last axis.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.astype(x.dtype)
