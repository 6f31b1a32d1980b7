"""A cache that is dealt over devices and forked continues as one on one device does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimijax.cache import empty_cache
from kimijax.fork import fork
from kimijax.infer import Step
from kimijax.model import Model
from kimijax.ops.attend import local
from kimijax.parallel.mesh import make_mesh
from kimijax.parallel.plan import Plan
from tests.conftest import CONFIGS, assert_close, model_and_params

DOCUMENT, CUT, NEW = 1024, 900, 70  # behind the cut a run is open; the new tokens fill it and more


def continued(name, ops, params, ids, chunk):
    """Hidden states of tokens behind a fork: `chunk` of them at once, the others one by one."""
    cfg = CONFIGS[name]()
    model, live = Model(cfg, ops), (np.arange(DOCUMENT) < CUT)[None].repeat(2, 0)

    @jax.jit
    def document(params):
        cache = ops.deal(empty_cache(cfg, 2, DOCUMENT, ways=ops.ways))
        seg = np.where(live, 0, -1).astype(np.int32)
        read = model.apply(params, ids[:, :DOCUMENT], None, seg, cache=cache, aligned=True)
        return ops.deal(read.cache)

    @functools.partial(jax.jit, donate_argnums=2)
    def extend(params, frozen, cache, piece):
        fresh = jnp.ones(piece.shape, bool)
        out = model.apply(params, piece, cache=cache.replace(frozen=frozen), fresh=fresh)
        return ops.deal(out.cache.replace(frozen=None)), ops.whole(out.hidden)

    frozen, found = document(params), []
    cache = jax.jit(lambda c: ops.deal(fork(cfg, c, NEW, ops.rows).replace(frozen=None)))(frozen)
    first = [(0, chunk)] if chunk else []
    for start, stop in (*first, *((i, i + 1) for i in range(chunk, NEW))):
        cache, hidden = extend(params, frozen, cache, ids[:, CUT + start : CUT + stop])
        found.append(np.asarray(hidden))
    return np.concatenate(found, 1)


@pytest.mark.parametrize(
    "name, sizes, chunk",
    [
        ("needle", {"seq": 8}, NEW - 3),
        pytest.param("kimi", {"data": 2, "seq": 2, "expert": 2}, 0, marks=pytest.mark.slow),
    ],
)
def test_a_fork_of_a_dealt_cache_is_that_of_a_local_one(name, sizes, chunk):
    ids = np.random.default_rng(0).integers(0, 64, (2, DOCUMENT)).astype(np.int32)
    _, params = model_and_params(name)
    plan = Plan(make_mesh(sizes))
    want = continued(name, local(), params, ids, chunk)
    dealt = jax.device_put(params, plan.shardings(CONFIGS[name]()))
    assert_close(continued(name, plan.ops(), dealt, ids, chunk), want)


def test_a_question_copies_nothing_of_a_dealt_document():
    """Neither the fork nor a step behind it: temporaries do not grow with the document."""
    cfg, plan = CONFIGS["needle"](), Plan(make_mesh({"seq": 8}))
    step, where = Step(cfg, plan.ops()), plan.cache_shardings
    shapes = lambda tree, at: jax.tree.map(  # noqa: E731
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, at
    )
    frozen = jax.eval_shape(lambda: step.empty(1, 1 << 20))
    frozen = shapes(frozen, where(frozen))
    branch = jax.eval_shape(lambda cache: step.fork(cache, 64), frozen)
    params = jax.eval_shape(lambda: model_and_params("needle")[1])
    one = jax.ShapeDtypeStruct((1, 1), np.int32), jax.ShapeDtypeStruct((), np.int32)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(frozen)) / plan.ways
    for program in (
        step.fork.lower(frozen, 64),
        step.extend.lower(shapes(params, plan.shardings(cfg)), frozen,
                          shapes(branch, where(branch)), *one),
    ):
        used = program.compile().memory_analysis()
        assert used.temp_size_in_bytes + used.output_size_in_bytes < 0.02 * size
