"""Named shapes of the ring, to compile for several devices. One device has nothing to time.

CASES, AOT: see kernels_pallas.latent.cases and kernels_pallas.aot.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.aot import Case
from kernels_pallas.attention import Queries
from kernels_pallas.latent import Latents
from kernels_pallas.latent.cases import AFTER, AHEAD, KIMI, MOVED_AFTER, MOVED_AHEAD
from kernels_pallas.ring import ring_attention, ring_attention_grads

CASES = {}


def _inputs(mesh: Mesh, *, tokens, h, r, n, p, v, dtype=jnp.bfloat16):
    """Queries, latents, weights, and rows of the backward; `tokens` of a device."""
    share, everywhere = P(None, mesh.axis_names), P()

    def array(*shape, dtype=dtype, spec=share):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    length = tokens * mesh.size
    where, row = array(1, length, dtype=jnp.int32), array(1, length, h, dtype=jnp.float32)
    q = Queries(array(1, length, h, n), array(1, length, h, p), where, where, where)
    kv = Latents(array(1, length, r), array(1, length, p), where, where)
    up = tuple(array(r, h, size, spec=everywhere) for size in (n, v))
    return q, kv, up, row, array(1, length, h, v, dtype=jnp.float32), row


def _local(mesh: Mesh, f, args: tuple, out):
    """f on every device, (P() or shares) -> `out`, and its arguments."""
    specs = tuple(jax.tree.map(lambda x: x.sharding.spec, x) for x in args)
    call = functools.partial(f, scale=0.1, axes=mesh.axis_names, impl="pallas")
    return jax.shard_map(
        call, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False
    ), args


def _forward(mesh: Mesh, **shape):
    return _local(mesh, ring_attention, _inputs(mesh, **shape)[:3], P(None, mesh.axis_names))


def _gradients(mesh: Mesh, **shape):
    """Those of the weights are not summed over devices: each shows its own."""
    share = P(None, mesh.axis_names)
    return _local(mesh, ring_attention_grads, _inputs(mesh, **shape), (share, share, share))


CI, BENCH, K2 = frozenset({"ci"}), frozenset({"bench"}), frozenset({"k2"})
FEW = {**KIMI, "h": 2, "tokens": 4096}
RAGGED = {**KIMI, "h": 2, "tokens": 700}
HOP = {**KIMI, "h": 64, "tokens": 8192}
LONG = {**KIMI, "h": 16, "tokens": 2**15}  # 2M tokens, heads dealt out over four
NEEDED = AHEAD * (192 + 128) + AHEAD // 2048 * 512 * (128 + 128)  # as in latent/cases.py
AOT = {
    ("4 devices", "pallas"): Case(
        functools.partial(_forward, **FEW), BENCH, "192/128", NEEDED, MOVED_AHEAD, "ring",
        pairs=AHEAD, devices=4,
    ),
    ("4 devices, gradients", "pallas"): Case(
        functools.partial(_gradients, **FEW), BENCH, "192/128", AFTER * (3 * 192 + 2 * 128),
        MOVED_AFTER, "ring", pairs=AFTER, devices=4,
    ),
    **{
        (f"{name}{what}", "pallas"): Case(
            functools.partial(make, **shape), tags, kernel="ring", devices=devices
        )
        for name, shape, tags, devices in (
            ("ragged, 4 devices", RAGGED, CI, 4), ("K2, 4 devices", HOP, K2, 4),
            ("K2, 64 devices", HOP, K2, 64), ("2M tokens, 64 devices", LONG, K2, 64),
        )
        for what, make in (("", _forward), (", gradients", _gradients))
    },
}
