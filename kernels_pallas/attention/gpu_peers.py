"""Attention on a GPU beside the kernels of other packages, at the shapes of cases.py.

One causal row in order, bfloat16; the others get keys that hold the rotary part once more for every
head. jax's own want values as wide as keys: theirs are padded, as a caller would have to. torch and
tokamax are optional, as is the GPU: a row says what is missing.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention import Keys, Queries, attention
from kernels_pallas.attention.cases import GPU
from kernels_pallas.beside import Contender, Shape, of_jax, of_torch
from kernels_pallas.partial import finish


def _inputs(*, t, h, n, p, v) -> tuple[Queries, Keys]:
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(  # noqa: E731
        rng.standard_normal((1, *shape), "float32"), jnp.bfloat16
    )
    pos = jnp.arange(t, dtype=jnp.int32)[None]
    q = Queries(normal(t, h, n), normal(t, h, p) if p else None, pos, pos * 0, pos * 0)
    return q, Keys(normal(t, h, n), normal(t, h, v), normal(t, p) if p else None, pos, pos * 0)


def _whole(q: Queries, kv: Keys) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values, b t h ..., the rotary part within."""
    if q.rope is None:
        return q.nope, kv.key, kv.value
    rope = jnp.broadcast_to(kv.rope[:, :, None], q.rope.shape)
    return (
        jnp.concatenate([q.nope, q.rope], -1), jnp.concatenate([kv.key, rope], -1), kv.value
    )


def _padded(f, q, k, v, **how):
    """f with values as wide as keys."""
    wide = jnp.pad(v, [(0, 0)] * 3 + [(0, k.shape[-1] - v.shape[-1])])
    return f(q, k, wide, **how)[..., : v.shape[-1]]


def _triton(q, k, v, *, scale):
    from jax.experimental.pallas.ops.gpu.attention import mha

    return mha(q, k, v, None, sm_scale=scale, causal=True)


def _mosaic(q, k, v, *, scale):
    from jax.experimental.pallas.ops.gpu import attention_mgpu as kernel

    config = kernel.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=True)
    return kernel.attention(q * jnp.asarray(scale, q.dtype), k, v, config)


def _tokamax(q, k, v, *, scale, implementation):
    import tokamax

    return tokamax.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, implementation=implementation
    )


def _torch(torch, q, k, v, *, scale):
    call = torch.nn.functional.scaled_dot_product_attention
    out = call(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, scale=scale)
    return out.transpose(1, 2)


def shape_of(*, t: int, h: int, n: int, p: int, v: int) -> Shape:
    """All that there are for t causal tokens in h heads of n + p and v dims."""
    q, kv = _inputs(t=t, h=h, n=n, p=p, v=v)
    scale, whole = (n + p) ** -0.5, _whole(q, kv)

    def ours(q, kv):
        return finish(attention(q, kv, scale=scale, impl="xla"), q.nope.dtype)

    def peer(f, **how) -> Callable[[], Contender]:
        return lambda: of_jax(functools.partial(f, scale=scale, **how), *whole)

    def padded(f, **how) -> Callable[[], Contender]:
        return peer(functools.partial(_padded, f), **how)

    dot_product = functools.partial(padded, jax.nn.dot_product_attention, is_causal=True)
    out = t * h * v * q.nope.dtype.itemsize
    return Shape(
        {
            "xla": lambda: of_jax(ours, q, kv),
            "jax_nn_xla": dot_product(implementation="xla"),
            "jax_nn_cudnn": dot_product(implementation="cudnn"),
            "jax_triton": padded(_triton),
            "jax_mosaic": padded(_mosaic),
            "tokamax_triton": peer(_tokamax, implementation="triton"),
            "tokamax_mosaic": peer(_tokamax, implementation="mosaic"),
            "torch_sdpa": lambda: of_torch(functools.partial(_torch, scale=scale), *whole),
        },
        flops=2.0 * h * (n + p + v) * t * (t + 1) / 2,
        moved=float(sum(x.nbytes for x in jax.tree.leaves((q, kv))) + out),
    )


SHAPES = {name: functools.partial(shape_of, **dims) for name, dims in GPU.items()}
