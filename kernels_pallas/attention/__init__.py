"""Attention with positions as data, returned as a Partial.

One op for multi-head, grouped and multi-query heads, and for MLA in both forms: expanded (a key
and value per head, one rotary key shared by all heads) and absorbed (the latent is key and value
of a single KV head). Masks come from positions and segments and from nothing else.
"""

import functools
from typing import NamedTuple

import jax

from kernels_pallas import limits
from kernels_pallas.attention import ref, tpu, tpu_bwd, xla
from kernels_pallas.attention.vjp import at_once, differentiable, summed
from kernels_pallas.attention.xla import overlap as overlap
from kernels_pallas.partial import Partial

# b batch, t query, s key, g KV head, h query head, n key dim, p rotary dim, v value dim
BACKWARD = {
    "ref": summed(ref.attention_grads),
    "xla": summed(xla.grads),
    "pallas": tpu_bwd.backward(),
    "pallas_interpret": tpu_bwd.backward(interpret=True),
}
GRADS = {name: at_once(backward) for name, backward in BACKWARD.items()}
IMPLS = {
    "ref": ref.attention,
    "xla": differentiable(xla.forward, GRADS["xla"]),
    "pallas": differentiable(tpu.forward, GRADS["pallas"]),
    "pallas_interpret": differentiable(
        functools.partial(tpu.forward, interpret=True), GRADS["pallas_interpret"]
    ),
}


class Queries(NamedTuple):
    """Query heads and what they may see: keys of the same segment in [since, pos]."""

    nope: jax.Array  # b t h n
    rope: jax.Array | None  # b t h p   already rotated; None without rotary part
    pos: jax.Array  # b t       int32
    seg: jax.Array  # b t       int32, -1 is padding: sees nothing
    since: jax.Array  # b t       int32, the earliest position in sight (0: all of the past)


class Keys(NamedTuple):
    """Keys and values of g heads (g divides h); the rotary key is shared by all heads."""

    key: jax.Array  # b s g n
    value: jax.Array  # b s g v
    rope: jax.Array | None  # b s p
    pos: jax.Array  # b s       int32; an unwritten slot is int32 max, in the future of everyone
    seg: jax.Array  # b s       int32, -1 is padding: never seen


def attention(q: Queries, kv: Keys, *, scale: float, impl: str) -> Partial:
    """Causal attention of `q` to `kv` by position; out b t h v, lse and max_logit b t h.

    Sequence order is free. `impl` is named by the caller: "ref", "xla", "pallas" (a TPU) or
    "pallas_interpret" (the same kernels, interpreted on any device). A wrong name or shapes that do
    not fit raise ValueError, what a kernel cannot do NotImplementedError. Differentiable in all
    float inputs, through out and lse.
    """
    if impl not in IMPLS:
        raise ValueError(f"attention: unknown {impl=}, there are {sorted(IMPLS)}")
    (b, _, h, n), (bk, s, g, nk) = q.nope.shape, kv.key.shape
    if (b, n) != (bk, nk) or h % g or kv.value.shape[:3] != (b, s, g):
        raise ValueError(
            f"attention: queries b t h n {q.nope.shape} do not fit keys b s g n {kv.key.shape} "
            f"and values {kv.value.shape}: b and n must agree, g divide h"
        )
    if (q.rope is None) != (kv.rope is None):
        raise ValueError("attention: queries and keys must both have a rotary part, or neither")
    limits.check("attention", impl, tpu.unsupported, q, kv)
    return IMPLS[impl](q, kv, scale=scale)


def attention_grads(
    q: Queries,
    kv: Keys,
    lse: jax.Array,
    d_out: jax.Array,
    delta: jax.Array,
    *,
    scale: float,
    impl: str,
) -> tuple[tuple[jax.Array, jax.Array | None], Keys]:
    """Gradients of one set of keys within attention over many: (of nope and rope), of the keys.

    lse    b t h     over all keys, of which `kv` are some
    d_out  b t h v   cotangent of the output over all keys
    delta  b t h     sum(out * d_out) - d_lse

    Summed over disjoint sets of keys they are the gradient of the whole: what a ring's backward
    computes at each hop. float32, None for positions and where there is no rotary part; ValueError
    for an unknown impl.
    """
    if impl not in GRADS:
        raise ValueError(f"attention_grads: unknown {impl=}, there are {sorted(GRADS)}")
    sizes = tpu_bwd.BLOCK_Q, tpu_bwd.BLOCK_K
    limits.check("attention_grads", impl, tpu.unsupported, q, kv, *sizes)
    return GRADS[impl](q, kv, lse, d_out, delta, scale=scale)
