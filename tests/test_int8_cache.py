"""A cache of int8 latents read in different ways, beside one of floats, and what is refused."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.int8 import narrow, widen
from kimijax import presets, rows
from kimijax.cache import Memory, empty_cache
from kimijax.config_tree import override
from kimijax.errors import UserError
from kimijax.fork import fork
from kimijax.infer import Step
from kimijax.model import Model
from kimijax.ops.attend import check_kernels, local
from tests.conftest import CONFIGS, assert_close, model_and_params
from tests.test_families import loaded

# Few tokens, such that no number lies where the noise of float32 would round it another way.
T, SEEDS, MARGIN = {"needle": 256, "kimi": 64}, {"needle": 2, "kimi": 11}, 2e-4
MODELS = list(T)
rounded = lambda x: widen(*narrow(x), x.dtype)  # noqa: E731


def tokens_of(name):
    """Of one row."""
    rng = np.random.default_rng(SEEDS[name])
    return jnp.asarray(rng.integers(0, 64, (1, T[name])), jnp.int32)


def reader(name):
    """jit of a call behind a cache; a new one each time, as tests change what it traces."""
    model, params = model_and_params(name)
    return jax.jit(functools.partial(model.apply, params), static_argnames="aligned")


def read(name, sizes, aligned, latents="int8", fresh=None):
    """Hidden states of tokens read piece by piece into a cache, and the cache."""
    cache, hidden, start = empty_cache(CONFIGS[name](), 1, T[name], latents=latents), [], 0
    apply, ids = reader(name), tokens_of(name)
    for size in sizes:
        piece = slice(start, start + size)
        asked = None if fresh is None else fresh[:, piece]
        out = apply(ids[:, piece], cache=cache, fresh=asked, aligned=aligned)
        hidden.append(out.hidden)
        cache, start = out.cache, start + size
    return jnp.concatenate(hidden, 1), cache


@pytest.fixture
def margin(monkeypatch):
    """How far from a half the steps of all latents lay that were rounded, at least."""
    seen, kept = [], Memory.kept

    def spy(self, latent):
        scale = jnp.abs(latent).max(-1, keepdims=True) / 127
        steps = jnp.where(scale > 0, latent / scale, 0)
        off = jnp.abs(jnp.abs(steps - jnp.floor(steps)) - 0.5).min()
        jax.debug.callback(lambda x: seen.append(float(x)), off)
        return kept(self, latent)

    monkeypatch.setattr(Memory, "kept", spy)

    def least():
        jax.effects_barrier()
        return min(seen)

    return least


@pytest.mark.parametrize("name", MODELS)
def test_words_are_a_cache_of_the_floats_that_they_stand_for(name, monkeypatch):
    sizes = (T[name] - 10,) + (1,) * 10
    got, cache = read(name, sizes, False)
    monkeypatch.setattr(Memory, "kept", lambda self, latent: {"latent": rounded(latent)})
    want, floats = read(name, sizes, False, latents=None)
    np.testing.assert_array_equal(got, want)
    words = [(w, f) for group, other in zip(cache.states, floats.states, strict=True)
             for w, f in zip(group, other, strict=True) if "latent" in w]
    assert words
    for kept, plain in words:
        scale = kept["latent_scale"].reshape(kept["latent"].shape[:-1])
        wide, slots = widen(kept["latent"], scale, jnp.float32), plain["latent"].shape[2]
        np.testing.assert_array_equal(wide[:, :, :slots], plain["latent"])


@pytest.mark.parametrize("aligned", [True, False], ids=["runs", "any sizes"])
@pytest.mark.parametrize("name", MODELS)
def test_chunked_is_one_call(name, aligned, margin):
    t = T[name]
    sizes = (t // 4,) * 4 if aligned else (t // 5,) * 4 + (t - t // 5 * 4,)
    want, _ = read(name, (t,), True)
    got, _ = read(name, sizes, aligned)
    assert margin() > MARGIN
    assert_close(got, want)


@pytest.mark.parametrize("name", MODELS)
def test_decode_is_prefill_where_tokens_choose_for_themselves(name, margin):
    t = T[name]
    fresh = jnp.zeros((1, t), bool).at[:, t - 6 :].set(True)
    want, _ = read(name, (t,), False, fresh=fresh)
    got, _ = read(name, (t - 6, *(1,) * 6), False, fresh=fresh)
    assert margin() > MARGIN
    assert_close(got, want)


@pytest.mark.parametrize("name", MODELS)
def test_a_fork_continues_the_document_and_leaves_it_alone(name, margin):
    cut, ids = T[name] - 12, tokens_of(name)
    _, cache = read(name, (cut,), False)
    before = jax.tree.map(np.asarray, cache)
    apply, branch = reader(name), fork(CONFIGS[name](), cache, 64)
    assert branch.latents == "int8"
    frozen, fresh = cache, jnp.ones((1, 1), bool)
    for i in range(cut, cut + 5):
        want = apply(ids[:, i : i + 1], cache=cache, fresh=fresh, aligned=False)
        got = apply(ids[:, i : i + 1], cache=branch, fresh=fresh, aligned=False)
        assert_close(got.hidden, want.hidden)
        cache, branch = want.cache, got.cache
    assert margin() > MARGIN
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, frozen))


def test_the_end_of_a_document_is_copied_bit_for_bit():
    _, cache = read("needle", (200,), False)
    branch, start = fork(CONFIGS["needle"](), cache, 64), 200 // 64 * 64
    old, new = cache.states[1][0], branch.states[1][0]
    lead = slice(0, cache.lead + 200 - start)
    for name in ("latent", "latent_scale"):
        at = jnp.arange(lead.stop)[None]
        was, now = (rows.read(name, x[name], 0, at + o) for x, o in ((old, start), (new, 0)))
        np.testing.assert_array_equal(was, now)
        assert np.abs(was).max() > 0


@pytest.mark.parametrize("name", ["k2_tiny", "moonlight_tiny", "kimi_linear_tiny"])
def test_logits_move_as_latents_do(name, monkeypatch):
    """Of small errors logits are a linear function: those of int8 and of bfloat16 move them in
    proportion, within a factor of two. Where other experts are chosen they are not small.
    """
    model, want = loaded(name)
    ids, net, kept = want["input_ids"], Model(model.cfg, local()), Memory.kept

    def run(latents, rounding):
        """Logits, chosen experts by token, and how far off latents are, of their rms."""
        errors = []

        def spy(self, latent):
            off = jnp.sqrt(jnp.mean((rounding(latent) - latent) ** 2) / jnp.mean(latent**2))
            jax.debug.callback(lambda x: errors.append(float(x)), off)
            return kept(self, latent if latents else rounding(latent))

        monkeypatch.setattr(Memory, "kept", spy)
        cache = empty_cache(model.cfg, *ids.shape, latents=latents)
        out = jax.jit(lambda p: net.apply(p, ids, cache=cache))(model.params)
        logits = net.apply(model.params, out.hidden, method="head")
        jax.effects_barrier()
        chosen = [np.moveaxis(np.sort(layer["ffn"]["experts"], -1), -1, 1)  # repeat k b t
                  for group in out.aux for layer in group.values() if "experts" in layer["ffn"]]
        chosen = np.concatenate([x.reshape(-1, ids.size) for x in chosen])
        return np.asarray(logits).reshape(ids.size, -1), chosen, np.mean(errors)

    floats, experts, none = run(None, lambda x: x)
    brief, others, brief_error = run(None, lambda x: x.astype(jnp.bfloat16).astype(x.dtype))
    got, chosen, error = run("int8", rounded)
    assert none == 0 and 0.5 / 254 < error < 2 / 127
    same = np.all((chosen == experts) & (others == experts), 0)
    assert same.mean() > 0.8
    off, brief_off = (
        np.sqrt(np.mean((x[same] - floats[same]) ** 2) / np.mean(floats**2)) for x in (got, brief)
    )
    print(f"{name}: int8 latents off by {error:.4f}, logits by {off:.4f}; bfloat16 "
          f"{brief_error:.4f}, {brief_off:.4f}; {1 - same.mean():.3f} of tokens have other experts")
    assert 0.5 < off / error / (brief_off / brief_error) < 2


def test_bytes_of_a_token():
    """K2: 512 + 4 and the rotary key of 64 in bfloat16, where there were 576 in it."""
    def per_token(latents):
        make = functools.partial(empty_cache, presets.kimi_k2(), 1, 2**20, jnp.bfloat16)
        cache = jax.eval_shape(functools.partial(make, latents=latents))
        slots = cache.pos.shape[1] * 61
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache.states)
                   ) / slots

    assert (per_token(None), per_token("int8")) == (1152, 644)


@pytest.mark.slow
def test_the_cache_is_donated_and_never_copied():
    """A call that reads a chunk needs next to nothing besides a cache of 2M tokens."""
    cfg = presets.needle_2m()
    step = Step(cfg, local(), latents="int8")
    params = jax.eval_shape(lambda: model_params(cfg))
    cache = jax.eval_shape(lambda: step.empty(1, 2**21))
    chunk = jax.ShapeDtypeStruct((1, step.chunk + 1), jnp.uint8)
    live = jax.ShapeDtypeStruct((), jnp.int32)
    used = step.read.lower(params, cache, chunk, live).compile().memory_analysis()
    assert used.alias_size_in_bytes > 2**21 * (64 + 4)
    assert used.temp_size_in_bytes < 0.1 * used.alias_size_in_bytes


def model_params(cfg):
    """Of the shapes of a model's."""
    ids = jnp.zeros((1, 1), jnp.int32)
    return Model(cfg, local()).init(jax.random.key(0), ids, method="logits")


def test_what_cannot_be_is_refused():
    cfg = CONFIGS["kimi"]()
    with pytest.raises(UserError, match="cache 'int4': there is int8"):
        empty_cache(cfg, 1, 64, latents="int4")
    windows = dataclasses.replace(CONFIGS["needle"](), groups=CONFIGS["needle"]().groups[:1])
    with pytest.raises(UserError, match="caches no latents"):
        empty_cache(windows, 1, 64, latents="int8")
    odd = override(cfg, {"groups.0.layers.0.mixer.kv_rank": 18})
    with pytest.raises(UserError, match="latents of 18 numbers are no multiple of 4"):
        empty_cache(odd, 1, 64, latents="int8")
    with pytest.raises(UserError, match="kernels of a TPU read no chosen blocks"):
        check_kernels(CONFIGS["needle"](), "int8", "pallas")
    check_kernels(cfg, "int8", "pallas")
    words = empty_cache(cfg, 1, 64, latents="int8").states[0][0]["latent"]
    with pytest.raises(ValueError, match="float32 into words of int8"):
        rows.write("latent", words, 0, jnp.zeros((1, 1), int), jnp.ones((1, 1, 4)))
