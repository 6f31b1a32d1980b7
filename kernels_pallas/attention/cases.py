"""Named shapes of attention: (call, arguments, needed FLOPs, logits of the dense reference)."""

import functools

import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention import Keys, Queries, attention


def _case(rng, *, b, t, s, h, g, n, v, reach):
    """Queries at the end of s keys, each seeing `reach` of them (None: all of its past)."""

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    pos = np.tile(np.arange(s, dtype=np.int32), (b, 1))
    seg = np.zeros_like(pos)
    since = np.maximum(pos - reach + 1, 0) if reach else np.zeros_like(pos)
    q = Queries(normal(b, t, h, n), None, pos[:, -t:], seg[:, -t:], since[:, -t:])
    kv = Keys(normal(b, s, g, n), normal(b, s, g, v), None, pos, seg)
    pairs = b * float((pos[0, -t:] - since[0, -t:] + 1).sum())
    call = functools.partial(attention, scale=n**-0.5)
    return call, (q, kv), 2 * pairs * h * (n + v), b * t * s * h


CASES = {
    "window tiles 64x96": functools.partial(
        _case, b=64, t=64, s=96, h=4, g=1, n=32, v=32, reach=32
    ),
    "local tiles of latents": functools.partial(
        _case, b=64, t=64, s=96, h=2, g=1, n=64, v=64, reach=64
    ),
    "causal 4096, 8 heads": functools.partial(
        _case, b=1, t=4096, s=4096, h=8, g=8, n=64, v=64, reach=None
    ),
    "latents, chunk at 32K": functools.partial(
        _case, b=1, t=4096, s=32768, h=2, g=1, n=64, v=64, reach=None
    ),
}
