"""Shared fixtures: small models that still select, and one tolerance per dtype."""

import dataclasses
import functools
import gc
import sys

import tests.devices  # noqa: F401

# isort: split

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimijax import cli, presets
from kimijax.config import (
    GroupConfig,
    KDAConfig,
    LayerConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    SwiGLUConfig,
)
from kimijax.config_tree import override
from kimijax.model import Model, abstract_params
from kimijax.ops.attend import local

# Largest difference over largest value, per dtype. Set once, never loosened.
TOLERANCE = {jnp.dtype(jnp.float32): 2e-5, jnp.dtype(jnp.bfloat16): 2e-2}


def pytest_collection_finish():
    """Collect garbage less often: it is looked for in all that jax keeps, 6% of the tests' time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def assert_close(got, want, dtype=jnp.float32):
    """Trees equal within the tolerance of a dtype, relative to the largest wanted value."""
    got, want = (jax.tree.leaves(jax.tree.map(np.asarray, x)) for x in (got, want))
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        g, w = (x.astype(np.float64) for x in (g, w))
        assert (np.isneginf(g) == np.isneginf(w)).all()
        finite = np.isfinite(w)
        assert np.isfinite(g[finite]).all()
        scale = max(1e-3, np.abs(w[finite]).max(initial=0.0))
        worst = np.abs(g[finite] - w[finite]).max(initial=0.0) / scale
        assert worst <= TOLERANCE[jnp.dtype(dtype)], f"off by {worst:.2e} of the largest value"


def array(x, dtype=jnp.float32) -> jax.Array:
    """Numbers of the host as an array, cast there: jax would compile a program for every shape."""
    return jax.device_put(np.asarray(x).astype(jnp.dtype(dtype)))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def kimijax(monkeypatch, capsys):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["kimijax", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.run()
        return stop.value.code or 0, *capsys.readouterr()

    return run


def small_needle() -> ModelConfig:
    """The needle model's layers at width 32; 2 of up to 5 blocks are chosen in 256 tokens."""
    return override(
        presets.needle_2m(),
        {
            "width": 32,
            "groups.0.layers.0.mixer.heads": 2,
            "groups.0.layers.0.mixer.head_dim": 16,
            "groups.0.layers.0.mixer.rope.dim": 16,
            "groups.0.layers.0.ffn.width": 32,
            "groups.1.layers.0.mixer.kv_rank": 16,
            "groups.1.layers.0.mixer.nope_dim": 8,
            "groups.1.layers.0.mixer.v_dim": 8,
            "groups.1.layers.0.mixer.index.dim": 8,
            "groups.1.layers.0.mixer.index.top_k": 2,
            "groups.1.layers.0.ffn.width": 16,
            "groups.1.layers.0.ffn.shared_width": 16,
        },
    )


def small_kimi() -> ModelConfig:
    """MLA with q-LoRA and rope; then KDA and NoPE MLA with a direct query, both with MoE."""
    mla = MLAConfig(
        heads=4, q_rank=16, kv_rank=16, nope_dim=8, rope_dim=8, v_dim=8,
        rope=RopeConfig(theta=1e4, dim=8),
    )
    nope = dataclasses.replace(mla, q_rank=None, rope=None)
    kda = KDAConfig(heads=2, head_dim=8, conv=4, gate_rank=8)
    moe = MoEConfig(experts=4, top_k=2, width=16, shared_width=16)
    return ModelConfig(
        vocab=64,
        width=32,
        groups=(
            GroupConfig(
                layers=(LayerConfig(mixer=mla, ffn=SwiGLUConfig(width=32), conv=3),), repeat=2
            ),
            GroupConfig(layers=tuple(LayerConfig(mixer=mixer, ffn=moe) for mixer in (kda, nope))),
        ),
        embed_std=1.0,
    )


CONFIGS = {"needle": small_needle, "kimi": small_kimi}


def random_params(model: Model):
    """Fixed random weights, none of them zero.

    Not the model's own initial values: tied and zero ones hide mistakes (and take seconds).
    """
    rng = np.random.default_rng(0)

    def draw(x):
        x = rng.normal(size=x.shape) * max(x.shape[-2:]) ** -0.5 if x.ndim > 2 else (
            1 + 0.3 * rng.normal(size=x.shape))
        return array(x)

    return jax.tree.map(draw, nn.unbox(abstract_params(model)))


@functools.cache
def model_and_params(name: str, exact: bool = False):
    """(Model, params) of a small config with `random_params`."""
    model = Model(CONFIGS[name](), local(exact=exact))
    return model, random_params(model)


@functools.cache
def apply_of(name: str, exact: bool = False):
    """jit of the model's apply with `aligned` static; cached, so that tests share compilations."""
    model, params = model_and_params(name, exact)

    @functools.partial(jax.jit, static_argnames="aligned")
    def apply(ids, pos=None, seg=None, slots=None, cache=None, fresh=None, aligned=None):
        return model.apply(
            params, ids, pos, seg, slots, cache, fresh=fresh, aligned=aligned
        )

    return apply
