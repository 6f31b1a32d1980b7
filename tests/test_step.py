"""A training step: parts of a batch, what is left out, logits that are held."""


import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kimijax.config import (
    GroupConfig,
    LayerConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    SwiGLUConfig,
    WindowConfig,
)
from kimijax.model import Model, abstract_params
from kimijax.ops.attend import local
from kimijax.optim import muon, qk_clip
from kimijax.parallel.matrices import Held, axes_over
from kimijax.parallel.mesh import make_mesh
from kimijax.parallel.plan import Plan
from kimijax.train import init_state, make_step, state_shardings
from kimijax.train.loss import cross_entropy, language_model
from kimijax.train.rows import Rows, placed, rows_of
from kimijax.train.state import fresh
from tests.conftest import array, assert_close

TAU = 0.5  # below the logits of a fresh model, so that heads are clipped from the first step on


def config() -> ModelConfig:
    """MLA with experts and full attention of grouped queries."""
    mla = MLAConfig(heads=4, q_rank=None, kv_rank=16, nope_dim=8, rope_dim=8, v_dim=8,
                    rope=RopeConfig(theta=1e4, dim=8))
    gqa = WindowConfig(heads=4, kv_heads=2, head_dim=8, window=None, sink=None)
    moe = MoEConfig(experts=4, top_k=2, width=16, shared_width=16)
    return ModelConfig(vocab=64, width=32, embed_std=1.0, groups=(
        GroupConfig(layers=(LayerConfig(mixer=mla, ffn=moe),), repeat=2),
        GroupConfig(layers=(LayerConfig(mixer=gqa, ffn=SwiGLUConfig(width=32)),)),
    ))


def batch(i: int, rows: int = 4, length: int = 64) -> Rows:
    rng = np.random.default_rng(i)
    ids = rng.integers(0, 64, (rows, length)).astype(np.int32)
    pos = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
    weight = (rng.random(ids.shape) < 0.7).astype(np.float32)
    return rows_of(ids, pos, np.zeros_like(ids), weight)


def trained(plan: Plan | None, steps: int = 2):
    """(metrics, state) after some steps."""
    cfg, runs = config(), None
    model = Model(cfg, local() if plan is None else plan.ops())
    boxed = abstract_params(model)
    optimizer = muon(boxed, 0.02, shardings=None if plan is None else plan.shardings(cfg))
    where = None if plan is None else state_shardings(model, optimizer, plan)
    state = init_state(model, optimizer, 0, where)
    if plan is not None:
        runs = plan.layout(cfg, 64).order.runs
    step = make_step(
        language_model(model, z=1e-4, runs=runs, tokens=48), optimizer, balance_rate=1e-3,
        qk_clip=qk_clip(cfg, TAU), where=where,
    )
    for i in range(steps):
        rows = batch(i) if plan is None else placed(plan, cfg, 4, batch(i))
        state, metrics = step(state, rows)
    return jax.device_get(metrics), state


@pytest.fixture(scope="module")
def alone():
    return trained(None)


def test_on_a_mesh_weights_and_clips_are_those_of_one_device(alone):
    metrics, state = alone
    plan = Plan(make_mesh({"data": 2, "seq": 4}), order="zigzag", train=True)
    got, dealt = trained(plan)
    assert metrics["max_logit"] > TAU  # heads were clipped
    assert_close(got, metrics)
    assert_close(dealt.params, state.params)


@pytest.mark.parametrize("shape, names, spec", [
    ((3, 64, 128), ("layers", "embed", "ffn"), (None, ("data", "seq"))),
    ((12, 128, 64), ("layers", "ffn", "embed"), (None, "tensor", ("data", "seq"))),
    ((2, 4, 24, 40), ("layers", "expert", "embed", "ffn"), (None, "seq", "data")),
    ((24, 4, 8, 40), ("layers", "heads", "head_dim", "embed"), (None, "tensor", None, "seq")),
    ((1, 32, 64), ("layers", "embed", "ffn"), (None, ("data", "seq"))),
    ((1, 64, 32), ("layers", "embed", "ffn"), (None, ("data", "seq"))),
])
def test_matrices_are_dealt_out_and_never_gathered(rng, shape, names, spec):
    mesh = make_mesh({"data": 2, "seq": 2, "tensor": 2})
    where = NamedSharding(mesh, PartitionSpec(*spec))
    x = array(rng.normal(size=shape))
    boxed = {"w": nn.Partitioned(x, names)}

    def updated(optimizer, x):
        f = jax.jit(lambda g: optimizer.update({"w": g}, optimizer.init({"w": g}), {"w": g})[0])
        f = f.lower(x).compile()
        return f(x)["w"], f.as_text()

    want, _ = updated(muon(boxed, 0.1), x)
    got, text = updated(muon(boxed, 0.1, shardings={"w": where}), jax.device_put(x, where))
    assert got.sharding.is_equivalent_to(where, x.ndim)
    assert_close(got, want)
    assert "all-gather" not in text


def test_few_matrices_share_their_columns():
    mesh, held = make_mesh({"data": 2, "seq": 4}), (Held("data", 1), Held("seq", 1))
    assert axes_over(mesh, (24, 64, 64), held) == ("data", "seq")
    assert axes_over(mesh, (2, 64, 64), held) == ("data",)
    assert axes_over(mesh, (1, 64, 64), held) == ()
    assert axes_over(mesh, (1, 63, 65), held) == ("data", "seq")  # 65 columns cannot be shared


def test_parts_of_a_batch_are_the_batch():
    model = Model(config(), local())
    optimizer = optax.sgd(0.1)
    params = init_state(model, optimizer, 0).params
    results = []
    for parts in (1, 2):
        step = make_step(language_model(model), optimizer, balance_rate=1e-3, parts=parts)
        results.append(step(fresh(jax.tree.map(jnp.array, params), optimizer), batch(0)))
    (whole, said), (parted, told) = results
    assert_close(parted.params, whole.params)
    assert_close(told, said)


def test_a_step_that_is_not_finite_or_a_spike_leaves_the_weights_alone():
    loss = lambda p, b: (jnp.sum(p["params"]["w"] * b), ({}, ()))  # noqa: E731
    optimizer = optax.sgd(1.0, momentum=0.9)
    step = make_step(loss, optimizer, spike=3.0)
    state = fresh({"params": {"w": jnp.ones(2)}}, optimizer)
    for scale, skipped in ((1.0, 0), (np.nan, 1), (1.1, 0), (4.0, 1), (np.inf, 1), (2.0, 0)):
        before = jax.device_get(state)
        state, metrics = step(state, jnp.full(2, scale, jnp.float32))
        assert metrics["skipped"] == skipped, scale
        same = jax.tree.map(np.array_equal, before.params, jax.device_get(state.params))
        assert same["params"]["w"] == bool(skipped)
    assert (int(state.step), int(state.skipped)) == (6, 3)
    assert np.isfinite(jax.tree.leaves(state.opt_state)).all()


def test_pieces_of_the_vocabulary_loss_are_the_whole(rng):
    hidden, w = (array(rng.normal(size=s)) for s in ((2, 12, 8), (8, 16)))
    rows = batch(0, 2, 12)
    targets, head = rows.targets % 16, lambda w, h: h @ w

    def total(pieces, ways):
        def f(w, hidden):
            text, square = cross_entropy(
                lambda h: head(w, h), hidden, targets, rows.weight, ways, pieces
            )
            return text + 0.1 * square
        return jax.value_and_grad(f, (0, 1))(w, hidden)

    want = total(1000, 1)
    logits = hidden @ w
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    square = jax.nn.logsumexp(logits, -1) ** 2
    assert_close(want[0], jnp.sum((entropy + 0.1 * square) * rows.weight))
    for pieces, ways in ((4, 1), (6, 3), (10, 1)):
        assert_close(total(pieces, ways), want)


def test_right_after_a_clip_logits_are_at_most_tau():
    cfg = config()
    model = Model(cfg, local())
    params = init_state(model, optax.sgd(0.1), 0).params
    rows, clip = batch(0), qk_clip(cfg, TAU)

    def logits(params):
        aux = model.apply(params, rows.ids, rows.pos, rows.seg).aux
        return {(i, name): report["mixer"]["max_logit"]
                for i, group in enumerate(aux) for name, report in group.items()}

    before = logits(params)
    assert max(x.max() for x in before.values()) > 1.5 * TAU
    # Layer by layer: a clip changes what the layers above it read.
    after = logits(clip(params, {(0, "layer_0"): before[0, "layer_0"].at[1].set(0.0)}))
    assert after[0, "layer_0"][0].max() <= TAU * (1 + 1e-3)
    held = np.minimum(before[0, "layer_0"][0], TAU)
    np.testing.assert_allclose(after[0, "layer_0"][0], held, rtol=1e-4)
