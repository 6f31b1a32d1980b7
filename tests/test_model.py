"""The model read in different ways gives the same hidden states."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimijax import presets
from kimijax.cache import empty_cache
from kimijax.config_tree import override
from kimijax.fork import fork
from kimijax.infer import Step
from kimijax.model import Model, abstract_params
from kimijax.ops.attend import local
from tests.conftest import CONFIGS, apply_of, assert_close, random_params, small_needle

T = 256
MODELS = ["needle", "kimi"]
RUNS, ANY = ((64,) * 4, True), ((50,) * 5 + (1,) * 6, False)  # sizes of pieces, aligned


@pytest.fixture
def ids(rng):
    return rng.integers(0, 64, (2, T)).astype(np.int32)


def _read(name, ids, sizes, aligned, fresh=None):
    """Hidden states of ids read piece by piece into a cache, and the cache.

    Pieces of any size have tokens that may choose for themselves: one program for all tests.
    """
    apply, cache = apply_of(name), empty_cache(CONFIGS[name](), ids.shape[0], T)
    fresh = np.zeros(ids.shape, bool) if fresh is None and not aligned else fresh
    hidden, start = [], 0
    for size in sizes:
        at = np.s_[:, start : start + size]
        chosen = None if fresh is None else fresh[at]
        out = apply(ids[at], cache=cache, aligned=aligned, fresh=chosen)
        hidden.append(np.asarray(out.hidden))
        cache, start = out.cache, start + size
    return np.concatenate(hidden, 1), cache


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sizes, aligned", [RUNS, ANY], ids=["runs", "any sizes"])
def test_chunked_is_one_pass(name, sizes, aligned, ids):
    want = apply_of(name)(ids).hidden
    assert_close(_read(name, ids, sizes, aligned)[0], want)


@pytest.mark.parametrize("name", MODELS)
def test_decode_is_prefill_where_tokens_choose_for_themselves(name, ids):
    fresh = np.zeros((2, T), bool)
    fresh[:, T - 6 :] = fresh[:, 130] = True
    want = apply_of(name)(ids, fresh=fresh).hidden
    got, cache = _read(name, ids, *ANY, fresh)
    assert_close(got, want)
    assert (cache.count == T).all()


@pytest.mark.parametrize("sizes, aligned", [((64,) * 3, True), ((50,) * 4, False)])
def test_a_fork_continues_the_document_and_leaves_it_alone(sizes, aligned, ids):
    apply, cut = apply_of("needle"), sum(sizes)
    fresh = np.ones((2, 1), bool)
    _, frozen = _read("needle", ids, sizes, aligned)
    before = jax.tree.map(np.asarray, frozen)
    cache, branch = frozen, fork(CONFIGS["needle"](), frozen, 128)
    for i in range(cut, cut + 10):
        token = ids[:, i : i + 1]
        want = apply(token, cache=cache, fresh=fresh, aligned=False)
        got = apply(token, cache=branch, fresh=fresh, aligned=False)
        assert_close(got.hidden, want.hidden)
        cache, branch = want.cache, got.cache
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, frozen))


def test_a_fork_of_a_full_cache_sees_its_end(ids):
    """The document may fill its cache to the last slot."""
    apply, cfg = apply_of("needle"), CONFIGS["needle"]()
    ids = np.concatenate([ids, ids[:, :64]], 1)
    full, roomy = (empty_cache(cfg, 2, n) for n in (ids.shape[1], 2 * ids.shape[1]))
    assert full.capacity == ids.shape[1] < roomy.capacity
    for i in range(0, ids.shape[1], 64):
        piece = ids[:, i : i + 64]
        full, roomy = (apply(piece, cache=c, aligned=True).cache for c in (full, roomy))
    token, fresh = ids[:, :1], np.ones((2, 1), bool)
    want, got = (
        apply(token, cache=fork(cfg, c, 128), fresh=fresh, aligned=False) for c in (roomy, full)
    )
    assert_close(got.hidden, want.hidden)


@pytest.mark.parametrize("name", MODELS)
def test_any_order_gives_the_permuted_answer(name, ids, rng):
    want = apply_of(name)(ids).hidden
    order = rng.permutation(T)
    slots = np.broadcast_to(order, (2, T))
    got = apply_of(name)(ids[:, order], slots=slots).hidden
    assert_close(got, np.asarray(want)[:, order])


@pytest.mark.parametrize("aligned", [True, False])
def test_documents_that_start_anywhere_never_see_one_another(aligned, ids):
    start = 150  # inside a group, a block and a tile
    at = np.arange(T, dtype=np.int32)
    pos, seg = np.where(at < start, at, at - start), (at >= start).astype(np.int32)
    where = [np.broadcast_to(x, (2, T)) for x in (pos, seg)]
    apply = apply_of("needle")
    other = np.where(at < start, (ids + 7) % 64, ids)
    a, b = (np.asarray(apply(x, *where, aligned=aligned).hidden) for x in (ids, other))
    np.testing.assert_array_equal(a[:, start:], b[:, start:])


def test_padding_is_no_load_of_the_experts(ids):
    at = np.broadcast_to(np.arange(T, dtype=np.int32), (2, T))
    where = at, np.where(at < 200, 0, -1).astype(np.int32)
    apply, other = apply_of("needle"), np.where(at < 200, ids, (ids + 7) % 64)
    out = [apply(x, *where, aligned=True) for x in (ids, other)]
    a, b = (x.aux[1]["layer_0"]["ffn"]["load"] for x in out)
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", MODELS)
def test_ragged_and_left_padded_rows_are_separate(name, ids):
    pad = 37
    seg = np.zeros((2, T), np.int32)
    seg[0, :pad] = seg[1, T - pad :] = -1
    slots = np.cumsum(seg >= 0, 1, dtype=np.int32) - 1
    cache = empty_cache(CONFIGS[name](), 2, T)
    got = apply_of(name)(ids, None, seg, slots, cache=cache, aligned=False)
    assert (got.cache.count == T - pad).all()
    parts = slice(pad, T), slice(0, T - pad)
    rows = np.stack([ids[row, part] for row, part in enumerate(parts)])
    alone = apply_of(name)(rows, aligned=False).hidden
    hidden = np.asarray(got.hidden)
    assert_close([hidden[row, part] for row, part in enumerate(parts)], list(np.asarray(alone)))


def test_exact_attention_in_chunks_and_behind_a_fork(ids):
    cfg, apply = CONFIGS["needle"](), apply_of("needle", exact=True)
    want = apply(ids).hidden
    first = apply(ids[:, :200], cache=empty_cache(cfg, 2, T))
    second = apply(ids[:, 200:], cache=fork(cfg, first.cache, 64))
    assert_close(np.concatenate([first.hidden, second.hidden], 1), want)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_depends_on_the_future(name, ids):
    """Not even the choice of blocks: later tokens change, earlier outputs do not move at all."""
    cut = 150
    other = np.where(np.arange(T) < cut, ids, (ids + 7) % 64)
    a, b = (jax.device_get(apply_of(name)(x)) for x in (ids, other))
    np.testing.assert_array_equal(a.hidden[:, :cut], b.hidden[:, :cut])
    assert np.abs(a.hidden[:, cut:] - b.hidden[:, cut:]).max() > 1e-3
    if name == "needle":
        chosen = [x.aux[1]["layer_0"]["mixer"]["chosen"][0] for x in (a, b)]
        np.testing.assert_array_equal(chosen[0][:, : -(-cut // 64)], chosen[1][:, : -(-cut // 64)])


def test_groups_share_the_choice_of_their_first_token(ids):
    """Blocks of the past, distinct, before the local region; as many as there are."""
    chosen = np.asarray(apply_of("needle")(ids).aux[1]["layer_0"]["mixer"]["chosen"])[0]
    for group, start in enumerate(range(0, T, 64)):
        candidates = max(0, start - 32) // 32
        for row in chosen[:, group]:
            picked = row[row >= 0]
            assert len(picked) == len(set(picked)) == min(2, candidates)
            assert (picked + 32 <= max(0, start - 32)).all()


def _prefill_memory(slots: int):
    """Compiled memory of the program that reads a chunk; nothing is allocated."""
    cfg = presets.needle_2m()
    step = Step(cfg, local())
    params = nn.unbox(abstract_params(step.model))
    cache = jax.eval_shape(lambda: empty_cache(cfg, 1, slots))
    ids = jax.ShapeDtypeStruct((1, step.chunk + 1), jnp.int32)
    live = jax.ShapeDtypeStruct((), jnp.int32)
    return step.read.lower(params, cache, ids, live).compile().memory_analysis()


def test_a_call_does_not_copy_its_cache():
    """Twice the cache adds next to nothing to what a call needs besides it."""
    two, four = _prefill_memory(2 * 2**20), _prefill_memory(4 * 2**20)
    grown = four.alias_size_in_bytes - two.alias_size_in_bytes
    assert grown > 2**29  # the cache is written in place
    assert four.temp_size_in_bytes - two.temp_size_in_bytes < 0.02 * grown
    assert four.temp_size_in_bytes < 0.02 * four.alias_size_in_bytes


def test_preset_sizes_without_allocating():
    params = nn.unbox(abstract_params(Model(presets.needle_2m(), local())))
    sizes = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in params["params"].items()}
    assert 700_000 <= sum(sizes.values()) <= 1_200_000
    experts = params["params"]["group_1"]["layer_0"]["ffn"]
    idle = sum(experts[k].size for k in ("gate", "up", "down")) * 3 // 4
    per_token = sum(sizes.values()) - idle - sizes["embed"] - sizes["head"]
    assert abs(per_token - 750_000) < 50_000


@pytest.mark.parametrize("eps", [None, 1e-9])
def test_normalised_queries_do_not_follow_the_scale_of_their_weights(eps):
    model = Model(override(small_needle(), {"groups.0.layers.0.mixer.qk_norm": eps}), local())
    ids, params = np.arange(64)[None], jax.device_get(random_params(model))
    logits = jax.jit(lambda params: model.apply(params, ids, method="logits"))
    want = np.asarray(logits(params))
    q = params["params"]["group_0"]["layer_0"]["mixer"]["q"]
    q["w"] = 3 * q["w"]
    got = np.asarray(logits(params))
    if eps is None:
        assert np.abs(got - want).max() > 1e-3
    else:
        assert_close(got, want)
