"""What a kernel cannot do it says itself, under both names, before anything is compiled."""

import functools
import importlib

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import bench, limits
from kernels_pallas.attention import cases as attention_cases
from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.indexer import cases as indexer_cases
from kernels_pallas.kda import cases as kda_cases
from kernels_pallas.latent import cases as latent_cases
from kernels_pallas.latent_decode import cases as decode_cases
from kernels_pallas.latent_decode import latent_decode
from kernels_pallas.ring import ring_attention, ring_attention_grads
from kernels_pallas.select import cases as select_cases

HALF = jnp.float16
KIMI = {"h": 1, "r": 512, "n": 128, "p": 64, "v": 128}
LONG = {"t": 2**23, "s": 2**23}


def _decode(**how):
    return functools.partial(latent_decode, scale=1.0, impl="pallas"), decode_cases._shapes(
        **{"b": 1, "t": 1, "n": 2, "layers": 1, "h": 4, "r": 64, "p": 32, "j": 256, **how})


def _grouped(x, w, k=128):
    array = jax.ShapeDtypeStruct
    args = array((64, k), x), array((4, k, 128), w), array((4,), jnp.int32)
    return functools.partial(grouped_matmul, impl="pallas"), args


def _ring(f, make, **shape):
    call, args = make(t=256, s=256, **KIMI, **shape)
    return functools.partial(f, scale=1.0, axes=("x",), impl="pallas"), args


def _mixed():
    call, (q, kv) = attention_cases._forward(t=8, s=8, h=1, g=1, n=8, p=0, v=8)
    wide = jax.ShapeDtypeStruct(kv.value.shape, jnp.float32)
    return call, (q, kv._replace(value=wide))


FEW = {"t": 8, "s": 8, "h": 1, "g": 1, "n": 8, "p": 0, "v": 8}
BAD = {
    "attention": (attention_cases._forward, FEW | {"dtype": HALF}, "q_nope is float16, kernels"),
    "attention, two dtypes": (_mixed, {}, "q_nope bfloat16, key bfloat16, value float32: cast"),
    "attention, long": (
        attention_cases._forward, LONG | {"h": 1, "g": 1, "n": 128, "p": 0, "v": 128},
        r"bounds of \(1, 8388608\) queries and .* take 1.11 MiB of scalars, there is 1 MiB"),
    "attention, gradients": (attention_cases._gradients, FEW | {"dtype": HALF}, "q_nope is float"),
    "latent": (latent_cases._forward, {**KIMI, **LONG}, "take 1.20 MiB of scalars"),
    "latent, gradients": (
        latent_cases._gradients, {**KIMI, "t": 8, "s": 8, "dtype": HALF}, "q_nope is float16"),
    "ring": (_ring, {"f": ring_attention, "make": latent_cases._forward, "dtype": HALF}, "float16"),
    "ring, gradients": (
        _ring, {"f": ring_attention_grads, "make": latent_cases._gradients, "dtype": HALF},
        "q_nope is float16"),
    "latent_decode": (_decode, {"dtype": HALF}, "q_nope is float16"),
    "latent_decode, long": (_decode, {"n": 2**17}, r"table \(1, 131072\) take 1.00 MiB of scalars"),
    "select": (
        select_cases._abstract, {**select_cases.NEEDLE, "dtype": HALF}, "q is float16, kernels"),
    "indexer": (
        indexer_cases._abstract,
        {"m": 8, "c": 128, "g": 1, "i": 8, "k": 2, "layers": 1, "dtype": HALF}, "q is float16"),
    "kda": (kda_cases._abstract, {"h": 2, "k": 64, "v": 64, "dtype": HALF}, "q is float16"),
    "grouped_matmul": (_grouped, {"x": HALF, "w": HALF}, "x is float16"),
    "grouped_matmul, weights": (_grouped, {"x": jnp.bfloat16, "w": HALF}, "weights is float16"),
    "grouped_matmul, wide": (
        _grouped, {"x": jnp.float32, "w": jnp.float32, "k": 65536},
        r"65536 numbers to contract take 96 MiB of VMEM at least, the kernel has 56"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("impl", limits.KERNELS)
def test_what_a_kernel_cannot_do_has_a_reason(name, impl):
    make, how, why = BAD[name]
    call, args = make(**how)
    call = functools.partial(call.func, *call.args, **{**call.keywords, "impl": impl})
    with pytest.raises(NotImplementedError, match=rf"\[{impl}\]: .*{why}"):
        jax.eval_shape(call, *args)


def test_every_op_has_a_reason_and_xla_needs_none():
    for op in bench.OPS:
        assert any(name.split(",")[0] == op for name in BAD), op
        assert importlib.import_module(f"kernels_pallas.{op}.tpu").unsupported
    call, args = _mixed()
    assert jax.eval_shape(functools.partial(call.func, scale=1.0, impl="xla"), *args)
