"""The ring in one kernel = attention to all latents on one device, on simulated TPUs; no race.

Other orders and meshes of several axes: tests/parallel/test_dma.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels_pallas.attention import Queries, tile
from kernels_pallas.latent import Latents, ref
from kernels_pallas.partial import Partial
from kernels_pallas.ring import hops, ring_attention, ring_attention_grads, tpu, tpu_bwd
from tests.conftest import array, assert_close

SCALE, LOCAL, WHOLE = 0.3, P(None, "ring"), P()
SHARE = 128  # tokens of a device where they are one block


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """One block in 128 tokens."""
    monkeypatch.setattr(tile, "LANES", 128)
    monkeypatch.setattr(tile, "PIECE", 128)
    for module in (tpu, tpu_bwd):
        monkeypatch.setattr(module, "BLOCK_Q", 128)
        monkeypatch.setattr(module, "BLOCK_K", 128)


def _inputs(tokens, heads, packed, rows, dtype):
    """Queries, latents and weights; packed: two documents and some padding."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: array(rng.normal(size=shape), dtype)  # noqa: E731
    at = np.arange(tokens)
    starts = np.array([0, tokens * 3 // 8]) if packed else np.array([0])
    seg = np.searchsorted(starts, at, side="right") - 1
    pos = at - starts[seg]
    seg = np.where(at < tokens - 9, seg, -1) if packed else seg
    pos, seg = (array(np.stack([x] * rows), jnp.int32) for x in (pos, seg))
    of_q, of_k = (rows, tokens, heads), (rows, tokens)
    q = Queries(normal(*of_q, 8), normal(*of_q, 4), pos, seg, 0 * pos)
    kv = Latents(normal(*of_k, 12), normal(*of_k, 4), pos, seg)
    return q, kv, tuple(0.3 * normal(12, heads, size) for size in (8, 5))


@functools.cache
def _want(dtype, *case):
    """(inputs, Partial, rest of the backward's, gradients) of one device, computed in float32."""
    inputs = _inputs(*case, dtype)
    wide = jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, inputs
    )
    p = jax.jit(functools.partial(ref.forward, scale=SCALE))(*wide)
    d_out = array(np.random.default_rng(2).normal(size=p.out.shape))
    rows = (p.lse, d_out, jnp.sum(p.out * d_out, -1))
    return inputs, p, rows, jax.jit(functools.partial(ref.grads, scale=SCALE))(*wide, *rows)


def _on_ring(ways, f, args, specs, out):
    """f on each of some devices, with its share of the arguments."""
    mesh = Mesh(np.array(jax.devices()[:ways]), ("ring",))
    return jax.jit(jax.shard_map(
        f, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False
    ))(*args)


def _forward(ways, inputs, params) -> Partial:
    f = functools.partial(tpu.forward, scale=SCALE, axes=("ring",), interpret=params)
    return _on_ring(ways, f, inputs, (LOCAL, LOCAL, WHOLE), LOCAL)


def _backward(ways, inputs, rows, params):
    def f(*args):
        d_q, d_kv, d_up = tpu_bwd.grads(*args, scale=SCALE, axes=("ring",), interpret=params)
        return d_q, d_kv, jax.lax.psum(d_up, "ring")

    specs = (LOCAL, LOCAL, WHOLE, LOCAL, LOCAL, LOCAL)
    return _on_ring(ways, f, (*inputs, *rows), specs, (LOCAL, LOCAL, WHOLE))


def _checked(ways, case, params, dtype=jnp.float32) -> None:
    """Forward and backward give the wanted, and no race."""
    inputs, want, rows, d_want = _want(dtype, *case)
    assert_close(_forward(ways, inputs, params), want, dtype)
    assert not simulator.races.races_found
    assert_close(_backward(ways, inputs, rows, params), d_want, dtype)
    assert not simulator.races.races_found


@pytest.mark.parametrize(
    "execution", ["on_wait", pytest.param("eager", marks=pytest.mark.slow)]
)
def test_eight_devices(execution):
    """All that the first is sent lies in its future; the last three see none of the first three."""
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode=execution)
    _checked(8, (8 * SHARE, 1, True, 1), params)


@pytest.mark.slow
def test_two_devices_of_two_cores_in_bfloat16():
    """Cores share the heads out, and meet before a slot is free and when the next has come."""
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    _checked(2, (2 * SHARE, 2, True, 1), params, jnp.bfloat16)


@pytest.mark.slow
def test_rows_and_blocks():
    """What a hop reads and writes in place, it does block by block."""
    _checked(2, (4 * SHARE, 1, False, 2), pltpu.InterpretParams(detect_races=True))


@pytest.mark.parametrize("direction, without, ways, cores", [
    ("forward", ("wait_for_room", "give_room"), 3, 1),
    ("backward", ("wait_for_room", "give_room"), 2, 1),
    pytest.param("forward", ("join",), 1, 2, marks=pytest.mark.slow),
])
def test_what_keeps_races_away(direction, without, ways, cores, monkeypatch):
    """Without it there is one, and it is found, even where the numbers are right."""
    for name in without:
        monkeypatch.setattr(hops.Link, name, lambda self: None)
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=cores)
    inputs, _, rows, _ = _want(jnp.float32, ways * SHARE, cores, False, 1)
    jax.block_until_ready(
        _forward(ways, inputs, params) if direction == "forward"
        else _backward(ways, inputs, rows, params)
    )
    assert simulator.races.races_found


def test_an_unknown_impl_is_named():
    for call in (ring_attention, functools.partial(ring_attention_grads, lse=0, d_out=0, delta=0)):
        with pytest.raises(ValueError, match="unknown impl='xla'.*pallas.*pallas_interpret"):
            call(None, None, None, scale=1.0, axes=("ring",), impl="xla")
