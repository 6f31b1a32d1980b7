"""The attention kernels of other packages at one shape, to compare cycles with.

4096 causal tokens, two heads, 512 queries x 512 keys a block. jax's own kernels mask every block;
tokamax's has a variant without. tokamax comes with the extra [bench].
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas.aot import Case

TOKENS, HEADS, BLOCK = 4096, 2, 512
BENCH = frozenset({"bench"})


def _arrays(n: int, v: int, batch: tuple[int, ...] = ()):
    """Queries, keys and values, heads first."""
    shapes = [(*batch, HEADS, TOKENS, d) for d in (n, n, v)]
    return tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)


def _jax_flash(n: int, v: int):
    from jax.experimental.pallas.ops.tpu.flash_attention import (
        BlockSizes,
        flash_attention,
    )

    sizes = BlockSizes(block_q=BLOCK, block_k_major=BLOCK, block_k=BLOCK, block_b=1)
    call = functools.partial(flash_attention, causal=True, block_sizes=sizes)
    return call, _arrays(n, v, (1,))


def _jax_splash(n: int, v: int):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    mask = masks.MultiHeadMask([masks.CausalMask((TOKENS, TOKENS)) for _ in range(HEADS)])
    sizes = kernel.BlockSizes(block_q=BLOCK, block_kv=BLOCK, block_kv_compute=BLOCK)
    made = kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    return made, _arrays(n, v)


def _tokamax(n: int, v: int, backward: bool = False):
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as kernel
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    sizes = {"block_q": BLOCK, "block_kv": BLOCK, "block_kv_compute": BLOCK}
    if backward:
        sizes |= {f"{name}_dkv": BLOCK for name in ("block_q", "block_kv")}
        sizes["block_kv_dkv_compute"] = BLOCK
    mask = masks.CausalMask((TOKENS, TOKENS))
    made = kernel.make_splash_mha(mask, config=kernel.SplashConfig(**sizes), q_seq_shards=1)
    if not backward:
        return made, _arrays(n, v)
    total = lambda q, k, v: made(q, k, v).astype(jnp.float32).sum()  # noqa: E731
    return jax.grad(total, (0, 1, 2)), _arrays(n, v)


def _case(make, n: int, v: int, products: int | None = None, **how) -> Case:
    """products: the dims of a pair's products together; n + v forward."""
    macs = BLOCK * BLOCK * (products or n + v)
    moved = None if products else 2 * BLOCK * (n + v)  # keys and values
    return Case(functools.partial(make, n, v), BENCH, f"{n}/{v}", macs, moved, **how)


def _forward(n: int, v: int) -> dict[tuple[str, str], Case]:
    """The kernels that compile at these dims, both of tokamax's blocks."""
    masked, free = f"{n}/{v} masked", f"{n}/{v}"
    found = {
        (masked, "jax_splash"): _case(_jax_splash, n, v),
        (masked, "tokamax_splash"): _case(_tokamax, n, v, block=-1),
        (free, "tokamax_splash"): _case(_tokamax, n, v),
    }
    if n == v:
        found[masked, "jax_flash"] = _case(_jax_flash, n, v)
    return found


def _backward(n: int, v: int) -> dict[tuple[str, str], Case]:
    """All three gradients in one kernel: S, dP = dO V^T, dV = P^T dO, dK = dS^T Q, dQ = dS K."""
    make = functools.partial(_tokamax, backward=True)
    case = functools.partial(_case, make, n, v, 3 * n + 2 * v, kernel="dkv")
    return {
        (f"{n}/{v} gradients", "tokamax_splash"): case(),
        (f"{n}/{v} gradients masked", "tokamax_splash"): case(block=-1),
    }


DIMS = ((128, 128), (192, 128), (256, 256), (576, 512))
AOT = {
    key: case
    for n, v in DIMS
    for key, case in {**_forward(n, v), **(_backward(n, v) if n < 256 else {})}.items()
}
