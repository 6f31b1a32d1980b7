"""MuonClip: steps and clips of the published equations, one rule for every weight."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers
from optax.contrib import muon as optax_muon

from kimijax.config import MLAConfig, WindowConfig
from kimijax.config_tree import override
from kimijax.errors import UserError
from kimijax.model import Model, abstract_params
from kimijax.ops.attend import local
from kimijax.ops.matrices import Matrices
from kimijax.optim import adamw, cosine, muon, qk_clip, wsd
from kimijax.optim.matrices import matrices_of
from kimijax.optim.muon import _kind, orthogonal
from kimijax.optim.qk_clip import clipped
from tests.conftest import array, assert_close, small_kimi, small_needle

GOLDEN = np.load(Path(__file__).parent / "goldens" / "muonclip_steps.npz")
NAMES = {"square": 2, "tall": 2, "wide": 2, "experts": 3}


@pytest.mark.parametrize("nesterov", [False, True])
def test_steps_are_those_of_the_published_equations(nesterov):
    boxed = {
        name: nn.Partitioned(GOLDEN[f"{name}_w0"], ("expert", "ffn", "embed")[-dims:])
        for name, dims in NAMES.items()
    }
    optimizer = muon(
        boxed, float(GOLDEN["lr"]), decay=float(GOLDEN["weight_decay"]), clip=None,
        nesterov=nesterov,
    )
    params = nn.unbox(boxed)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for i in range(int(GOLDEN["steps"])):
        grads = {name: GOLDEN[f"{name}_grads"][i] for name in NAMES}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name in NAMES:
            want = GOLDEN[f"{name}_{'nesterov' if nesterov else 'plain'}_w"][i]
            np.testing.assert_allclose(params[name], want, atol=1e-5, rtol=0)


def test_without_nesterov_it_is_the_muon_of_optax(rng):
    w = {"w": array(rng.normal(size=(3, 8, 2, 6)))}
    numbers = {"w": MuonDimensionNumbers((1,), (2, 3))}
    ours = muon({"w": nn.Partitioned(w["w"], ("layers", "embed", "heads", "head_dim"))}, 0.1,
                clip=None)
    theirs = optax_muon(0.1, nesterov=False, weight_decay=0.1, consistent_rms=0.2,
                        muon_weight_dimension_numbers=numbers)
    states = [x.init(w) for x in (ours, theirs)]
    for _ in range(3):
        grads = {"w": array(rng.normal(size=w["w"].shape))}
        (got, states[0]), (want, states[1]) = (
            jax.jit(x.update)(grads, s, w) for x, s in zip((ours, theirs), states, strict=True)
        )
        assert_close(got, want)


def test_updates_are_nearly_orthogonal(rng):
    x = array(rng.normal(size=(3, 8, 2, 6)))
    matrices = Matrices((1,), (2, 3))
    full, half = (
        np.reshape(orthogonal(x, matrices, dtype=dtype), (3, 8, 12)) / (0.2 * 12**0.5)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    for got in (full, half):  # as near as five quintic steps come
        assert (np.abs(np.linalg.svd(got, compute_uv=False) - 1) < 0.5).all()
    cosine_of_both = np.sum(full * half) / np.linalg.norm(full) / np.linalg.norm(half)
    assert 0.99 < cosine_of_both < 1 - 1e-6


@pytest.mark.parametrize("names", [
    ("layers", "embed", "heads", "head_dim"), ("layers", "heads", "head_dim", "embed"),
    ("layers", "expert", "ffn", "embed"), ("tap", "embed", "latent"),
])
def test_matrices_come_back(rng, names):
    x = rng.normal(size=range(2, 2 + len(names))).astype(np.float32)
    matrices = matrices_of(names)
    stack = matrices.stack(jnp.asarray(x))
    assert stack.shape == matrices.sizes(x.shape)
    np.testing.assert_array_equal(matrices.unstack(stack, x.shape), x)


def test_every_weight_has_its_optimizer():
    kinds = {}
    for cfg in (small_kimi(), small_needle()):
        names = nn.get_partition_spec(abstract_params(Model(cfg, local())))["params"]
        found = jax.tree_util.tree_map_with_path(
            _kind, names, is_leaf=lambda x: isinstance(x, tuple)
        )
        for path, kind in jax.tree_util.tree_leaves_with_path(found):
            keys = [k.key for k in path]
            kinds.setdefault(kind, set()).add(keys[-2] if keys[-1] == "w" else keys[-1])
    assert kinds == {
        "muon": {"q", "k", "v", "key", "value", "q_down", "kv", "k_rope", "w_uk", "w_uv", "out",
                 "gate", "up", "down", "index_key", "index_query"},
        "adam": {"embed", "head", "norm", "q_norm", "kv_norm", "ffn_norm", "o_norm", "conv",
                 "conv_q", "conv_k", "conv_v", "router", "f_down", "f_up", "g_down", "g_up",
                 "beta", "index_gate", "index_bias"},
        "adam without decay": {"A_log", "dt_bias", "sink"},
        "moved by the load": {"bias"},
    }


@pytest.mark.parametrize("build", [muon, adamw])
def test_gradients_do_not_move_a_correction_bias(build):
    small = {"params": {"ffn": {"bias": jnp.ones(4)}, "mixer": {"A_log": jnp.ones(2)}}}
    boxed = {"params": {"ffn": {"bias": nn.Partitioned(jnp.ones(4), ("expert",))},
                        "mixer": {"A_log": nn.Partitioned(jnp.ones(2), ("heads",))}}}
    optimizer = build(boxed, 0.1)
    zero = jax.tree.map(jnp.zeros_like, small)
    updates, _ = optimizer.update(zero, optimizer.init(small), small)
    for x in jax.tree.leaves(updates):  # no decay either
        np.testing.assert_array_equal(x, 0)


def test_clip_is_that_of_the_published_equations():
    heads, nope, rope, v, q_rank, rank = GOLDEN["clip_dims"]
    cfg = MLAConfig(
        heads=int(heads), q_rank=int(q_rank), kv_rank=int(rank), nope_dim=int(nope),
        rope_dim=int(rope), v_dim=int(v), rope=None,
    )

    def mixer(q_b, kv_b):
        up = kv_b.reshape(heads, nope + v, rank).transpose(2, 0, 1)[None]
        q = q_b.reshape(heads, nope + rope, q_rank).transpose(2, 0, 1)[None]
        return {"q": {"w": jnp.asarray(q)}, "w_uk": jnp.asarray(up[..., :nope]),
                "w_uv": jnp.asarray(up[..., nope:])}

    tau, most = float(GOLDEN["clip_tau"]), jnp.asarray(GOLDEN["clip_smax"])[None]
    gamma = jnp.where(most > tau, tau / most, 1.0)
    np.testing.assert_allclose(gamma[0], GOLDEN["clip_gamma"], rtol=1e-6)
    got = clipped(cfg, mixer(GOLDEN["clip_q_b"], GOLDEN["clip_kv_b"]), gamma)
    want = mixer(GOLDEN["clip_q_b_after"], GOLDEN["clip_kv_b_after"])
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5), got, want)


def test_a_key_shared_by_heads_follows_the_largest_logit():
    cfg = WindowConfig(heads=4, kv_heads=2, head_dim=3)
    mixer = {"q": {"w": jnp.ones((1, 5, 4, 3))}, "key": {"w": jnp.ones((1, 5, 2, 3))}}
    got = clipped(cfg, mixer, jnp.array([[0.25, 1.0, 1.0, 1.0]]))
    np.testing.assert_array_equal(got["q"]["w"][0, 0, :, 0], [0.5, 0.5, 1, 1])
    np.testing.assert_array_equal(got["key"]["w"][0, 0, :, 0], [0.5, 1])


def test_what_cannot_be_clipped_is_refused():
    normed = override(small_needle(), {"groups.0.layers.0.mixer.qk_norm": 1e-6})
    with pytest.raises(UserError, match="layer 0 normalises its queries and keys"):
        qk_clip(normed)
    with pytest.raises(UserError, match="above 0, got -1"):
        qk_clip(small_needle(), -1)


def test_schedules():
    rate = wsd(2.0, 4, 3, 10, 0.5)
    np.testing.assert_allclose([rate(i) for i in (0, 2, 4, 7, 12, 17, 30)],
                               [0, 1, 2, 2, 1.25, 0.5, 0.5])
    want = optax.warmup_cosine_decay_schedule(0.0, 2.0, 4, 20, 0.2)
    np.testing.assert_allclose(
        [cosine(2.0, 4, 20, 0.2)(i) for i in range(21)], [want(i) for i in range(21)], rtol=1e-5
    )
    for bad in (lambda: wsd(1.0, 1, 1, 1, 2.0), lambda: cosine(1.0, 5, 4), lambda: wsd(0, 1, 1, 1)):
        with pytest.raises(UserError):
            bad()
