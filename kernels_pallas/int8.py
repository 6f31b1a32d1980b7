"""Latents in 8 bits with a float32 scale for each token: the largest of its numbers over 127.

    q = round(x / scale),  |q scale - x| <= scale / 2

Four of them lie in a word: of r numbers, word k holds k, k + r/4, k + r/2 and k + 3r/4, the lowest
bits first. A kernel of a TPU then widens a quarter of a latent at a time without moving a lane, and
an array of words has one layout: XLA holds int8 by tiles of 32 rows, hands kernels tiles of 8, and
so would copy a cache twice in every layer, of which it writes a token by reading four.
"""

import jax
import jax.numpy as jnp

LEVELS = 127  # on either side of zero
WORD = 4  # numbers of a word
LANE = 128  # of a TPU


@jax.custom_jvp
def narrow(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens ... r -> (int32 words ... r/4, float32 scale ...). A token of zeros has scale 0.

    No gradient: asking for one raises. ValueError: r is no multiple of 4.
    """
    if x.shape[-1] % WORD:
        raise ValueError(f"narrow: {x.shape[-1]} numbers a token are no multiple of {WORD}")
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1) / LEVELS
    steps = jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None]).astype(jnp.int32)
    parts = jnp.split(steps & 255, WORD, -1)
    words = parts[0]
    for i, part in enumerate(parts[1:], 1):
        words |= part << 8 * i
    return words, scale


@narrow.defjvp
def _no_gradient(primals, tangents):
    raise NotImplementedError("rounding to int8 has no gradient: train with a cache of floats")


def widen(words: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """What `narrow` gave as numbers ... r of a dtype, rounded once."""
    wide = jnp.concatenate(_quarters(words), -1)
    return (wide * scale[..., None]).astype(dtype)


def widen_in_kernel(words: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`widen` of tokens n r/4 whose scales lie in lanes, 1 n, as a kernel of a TPU loads them."""
    n, r = words.shape
    down = jnp.broadcast_to(scale, (LANE, n)).T
    down = jnp.concatenate([down] * (-(-r // LANE)), 1)[:, :r]
    return jnp.concatenate([(part * down).astype(dtype) for part in _quarters(words)], 1)


def _quarters(words: jax.Array) -> list[jax.Array]:
    """The numbers of each place of a word, in order, float32."""
    left = (24 - 8 * i for i in range(WORD))
    return [((words << n) >> 24).astype(jnp.float32) for n in left]


def width(x: jax.Array, scale: jax.Array | None) -> int:
    """Numbers of a latent: x is words where there is a scale."""
    return x.shape[-1] * (1 if scale is None else WORD)


def check(op: str, x: jax.Array, scale: jax.Array | None) -> None:
    """ValueError: words without a scale for each token, or a scale of what are no words."""
    words = x.dtype == jnp.int32
    if words != (scale is not None) or words and scale.size * x.shape[-1] != x.size:
        have = None if scale is None else scale.shape
        raise ValueError(
            f"{op}: latents {x.dtype} {x.shape} and scales {have}: words of int8 have one for each "
            "token, others have none"
        )
