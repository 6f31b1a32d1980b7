"""The model read in different ways gives the same hidden states, forward and gradient."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimijax import presets
from kimijax.cache import empty_cache, fork, run_length
from kimijax.config import override
from kimijax.model import Model
from kimijax.ops.attend import local
from kimijax.train import abstract_params
from tests.conftest import CONFIGS, apply_of, assert_close, model_and_params

T = 256
MODELS = ["needle", "mla"]


@pytest.fixture
def ids(rng):
    return jnp.asarray(rng.integers(0, 64, (2, T)), jnp.int32)


def _read(name, ids, sizes, aligned, rows=None, **kwargs):
    """Hidden states of ids read piece by piece into a cache, and the cache."""
    apply = apply_of(name)
    cache = empty_cache(CONFIGS[name](), rows or ids.shape[0], T)
    hidden, start = [], 0
    for size in sizes:
        piece = {k: v[:, start : start + size] for k, v in kwargs.items()}
        out = apply(ids[:, start : start + size], cache=cache, aligned=aligned, **piece)
        hidden.append(out.hidden)
        cache, start = out.cache, start + size
    return jnp.concatenate(hidden, 1), cache


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "sizes, aligned",
    [((128, 128), True), ((100, 28, 100, 28), False), ((255, 1), False)],
    ids=["whole runs", "any sizes", "decode"],
)
def test_chunked_is_one_pass(name, sizes, aligned, ids):
    want = apply_of(name)(ids).hidden
    assert_close(_read(name, ids, sizes, aligned)[0], want)


@pytest.mark.parametrize("name", MODELS)
def test_token_by_token_is_one_pass_where_tokens_choose_for_themselves(name, ids):
    fresh = jnp.zeros((2, T), bool).at[:, T - 6 :].set(True).at[:, 130].set(True)
    want = apply_of(name)(ids, fresh=fresh).hidden
    got, cache = _read(name, ids, (128, 122, 1, 1, 1, 1, 1, 1), False, fresh=fresh)
    assert_close(got, want)
    assert (cache.count == T).all()


def test_a_fork_continues_the_document_and_leaves_it_alone(ids):
    apply = apply_of("needle")
    fresh = jnp.ones((2, T), bool)
    for cut in (192, 200, 130):
        _, frozen = _read("needle", ids, (cut,), False)
        before = jax.tree.map(np.asarray, frozen)
        _, cache = _read("needle", ids, (cut,), False)
        want, got = [], []
        branch = fork(CONFIGS["needle"](), frozen, 128)
        for i in range(cut, cut + 10):
            out = apply(ids[:, i : i + 1], cache=cache, fresh=fresh[:, :1], aligned=False)
            want, cache = [*want, out.hidden], out.cache
            out = apply(ids[:, i : i + 1], cache=branch, fresh=fresh[:, :1], aligned=False)
            got, branch = [*got, out.hidden], out.cache
        assert_close(jnp.concatenate(got, 1), jnp.concatenate(want, 1))
        jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, frozen))


def test_a_fork_of_a_full_cache_sees_its_end(ids):
    """The document may fill its cache to the last slot."""
    apply = apply_of("needle")
    _, full = _read("needle", ids, (256,), True)
    assert full.capacity == T
    roomy = empty_cache(CONFIGS["needle"](), 2, 2 * T)
    roomy = apply(ids, cache=roomy, aligned=True).cache
    token = ids[:, :1]
    fresh = jnp.ones((2, 1), bool)
    want = apply(token, cache=roomy, fresh=fresh, aligned=False).hidden
    got = apply(token, cache=fork(CONFIGS["needle"](), full, 64), fresh=fresh, aligned=False)
    assert_close(got.hidden, want)


@pytest.mark.parametrize("name", MODELS)
def test_any_order_gives_the_permuted_answer(name, ids, rng):
    want = apply_of(name)(ids).hidden
    order = jnp.asarray(rng.permutation(T))
    slots = jnp.broadcast_to(order, (2, T))
    got = apply_of(name)(ids[:, order], slots=slots).hidden
    assert_close(got, want[:, order])


def _packed(name):
    """Two documents in a row, the second at a run's start; lengths 100 and 90."""
    run = run_length(CONFIGS[name]())
    start = -(-100 // run) * run
    at = jnp.arange(T)
    seg = jnp.where(at < 100, 0, jnp.where((at >= start) & (at < start + 90), 1, -1))
    pos = jnp.where(at >= start, at - start, at)
    return start, *(jnp.broadcast_to(x, (2, T)) for x in (pos, seg))


@pytest.mark.parametrize("name", MODELS)
def test_packed_is_separate(name, ids):
    start, pos, seg = _packed(name)
    packed = apply_of(name)(ids, pos, seg).hidden
    first = apply_of(name)(ids[:, :100]).hidden
    second = apply_of(name)(ids[:, start : start + 90]).hidden
    assert_close(packed[:, :100], first)
    assert_close(packed[:, start : start + 90], second)


@pytest.mark.parametrize("name", MODELS)
def test_packed_gradient_is_the_sum_of_separate_gradients(name, ids):
    model, params = model_and_params(name)
    start, pos, seg = _packed(name)
    cotangent = jax.random.normal(jax.random.key(2), (2, T, 32))

    def loss(params, ids, part, *where):
        return jnp.sum(model.apply(params, ids, *where).hidden * cotangent[:, part])

    live = (seg >= 0)[..., None]
    whole = lambda p: jnp.sum(  # noqa: E731
        jnp.where(live, model.apply(p, ids, pos, seg).hidden * cotangent, 0)
    )
    parts = slice(0, 100), slice(start, start + 90)
    separate = lambda p: sum(loss(p, ids[:, s], s) for s in parts)  # noqa: E731
    got, want = (jax.jit(jax.grad(f))(params) for f in (whole, separate))
    assert_close(got, want)


@pytest.mark.parametrize("name", MODELS)
def test_ragged_and_left_padded_rows_are_separate(name, ids):
    seg = jnp.zeros((2, T), jnp.int32).at[0, :37].set(-1).at[1, 190:].set(-1)
    slots = jnp.cumsum(seg >= 0, 1) - 1
    cache = empty_cache(CONFIGS[name](), 2, T)
    got = apply_of(name)(ids, None, seg, slots, cache=cache, aligned=False)
    np.testing.assert_array_equal(got.cache.count, [T - 37, 190])
    for row, part in ((0, slice(37, T)), (1, slice(0, 190))):
        alone = apply_of(name)(ids[row : row + 1, part], aligned=False).hidden
        assert_close(got.hidden[row, part], alone[0])


def test_choosing_every_block_is_exact_attention(ids):
    cfg = override(CONFIGS["needle"](), {"groups.1.layers.0.mixer.index.top_k": T // 32})
    _, params = model_and_params("needle")

    def value_and_grad(exact):
        model = Model(cfg, local(exact=exact))
        loss = lambda p, i: jnp.sum(jnp.sin(model.apply(p, i).hidden))  # noqa: E731
        value, grads = jax.jit(jax.value_and_grad(loss))(params, ids)
        for name in ("index_query", "index_key", "index_gate", "index_bias"):
            del grads["params"]["group_1"]["layer_0"]["mixer"][name]  # no gradient either way
        return model.apply(params, ids).hidden, value, grads

    assert_close(value_and_grad(False), value_and_grad(True))


def test_exact_attention_in_chunks_and_behind_a_fork(ids):
    cfg = CONFIGS["needle"]()
    model, params = model_and_params("needle", exact=True)
    want = model.apply(params, ids).hidden
    cache = empty_cache(cfg, 2, T)
    first = model.apply(params, ids[:, :200], cache=cache)
    branch = fork(cfg, first.cache, 64)
    second = model.apply(params, ids[:, 200:], cache=branch)
    assert_close(jnp.concatenate([first.hidden, second.hidden], 1), want)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_depends_on_the_future(name, ids):
    """Not even the choice of blocks: later tokens change, earlier outputs do not move at all."""
    cut = 150
    other = ids.at[:, cut:].set((ids[:, cut:] + 7) % 64)
    a, b = apply_of(name)(ids), apply_of(name)(other)
    np.testing.assert_array_equal(a.hidden[:, :cut], b.hidden[:, :cut])
    assert np.abs(a.hidden[:, cut:] - b.hidden[:, cut:]).max() > 1e-3
    if name == "needle":
        chosen = [x.aux[1]["layer_0"]["mixer"]["chosen"][0] for x in (a, b)]
        np.testing.assert_array_equal(chosen[0][:, : -(-cut // 64)], chosen[1][:, : -(-cut // 64)])


def test_groups_share_the_choice_of_their_first_token(ids):
    """Blocks of the past, distinct, before the local region; as many as there are."""
    chosen = np.asarray(apply_of("needle")(ids).aux[1]["layer_0"]["mixer"]["chosen"][0])
    for group, start in enumerate(range(0, T, 64)):
        candidates = max(0, start - 32) // 32
        for row in chosen[:, group]:
            picked = row[row >= 0]
            assert len(picked) == len(set(picked)) == min(2, candidates)
            assert (picked + 32 <= max(0, start - 32)).all()


@functools.cache
def _prefill_memory(slots: int):
    """Compiled memory of one prefill chunk of the full preset; nothing is allocated."""
    cfg = presets.needle_2m()
    model = Model(cfg, local())
    params = nn.unbox(abstract_params(model))
    cache = jax.eval_shape(lambda: empty_cache(cfg, 1, slots))
    read = jax.jit(
        lambda p, c, i: model.apply(p, i, cache=c, aligned=True).cache, donate_argnums=1
    )
    ids = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    return read.lower(params, cache, ids).compile().memory_analysis()


def test_a_call_does_not_copy_its_cache():
    memory = _prefill_memory(4 * 2**20)
    assert memory.alias_size_in_bytes > 2**30  # the cache of 4M tokens is written in place
    assert memory.temp_size_in_bytes < 0.02 * memory.alias_size_in_bytes


def test_preset_sizes_without_allocating():
    params = nn.unbox(abstract_params(Model(presets.needle_2m(), local())))
    sizes = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in params["params"].items()}
    assert 700_000 <= sum(sizes.values()) <= 1_200_000
    experts = params["params"]["group_1"]["layer_0"]["ffn"]
    idle = sum(experts[k].size for k in ("gate", "up", "down")) * 3 // 4
    per_token = sum(sizes.values()) - idle - sizes["embed"] - sizes["head"]
    assert abs(per_token - 750_000) < 50_000
