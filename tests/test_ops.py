"""Operations that have one right answer: rope, MLA's two forms, experts, FLOPs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import Queries
from kimijax import presets
from kimijax.config import CompressedConfig, RopeConfig, WindowConfig
from kimijax.config_tree import override
from kimijax.metrics import prefill_flops
from kimijax.ops.attend import Latents, attend
from kimijax.ops.moe import combine, dispatch, expert_mlp, grouped_experts, tile_rows
from kimijax.ops.rope import cos_sin, rotate
from tests.conftest import CONFIGS, array, assert_close


@pytest.mark.parametrize("pos", [0, 1, 2047, 2048, 131_071, 2_097_151, 4_194_303])
def test_rope_is_exact_at_any_position(pos):
    cos, sin = cos_sin(jnp.array([pos]), RopeConfig(theta=50_000.0, dim=64))
    angle = pos * 50_000.0 ** (-np.arange(0, 64, 2, dtype=np.float64) / 64)
    assert np.abs(np.asarray(cos, np.float64) - np.cos(angle)).max() < 1e-5
    assert np.abs(np.asarray(sin, np.float64) - np.sin(angle)).max() < 1e-5


def test_rope_scores_depend_on_the_distance_alone(rng):
    q, k = (array(rng.normal(size=(1, 16))) for _ in range(2))

    rope = RopeConfig(theta=1000.0, dim=16)

    def score(a, b):
        turned = [rotate(x, *cos_sin(p, rope)) for x, p in ((q, a), (k, b))]
        return jnp.sum(turned[0] * turned[1])

    score, at = jax.jit(score), lambda p: np.array([p], np.int32)
    assert_close(score(at(2_097_151), at(2_097_140)), score(at(11), at(0)))


@pytest.mark.parametrize("rope", [True, False], ids=["rope", "NoPE"])
def test_expanded_is_absorbed_forward_and_gradient(rope, rng):
    b, t, s, h, n, v, r, p = 2, 12, 20, 3, 8, 6, 16, 4

    def normal(*shape):
        return array(rng.normal(size=shape))

    pos = jnp.broadcast_to(jnp.arange(s), (b, s))
    seg = jnp.zeros((b, s), jnp.int32)
    q = Queries(
        normal(b, t, h, n), normal(b, t, h, p) if rope else None, pos[:, -t:], seg[:, -t:],
        jnp.zeros((b, t), jnp.int32),
    )
    kv = Latents(normal(b, s, r), normal(b, s, p) if rope else None, pos, seg)
    up = (normal(r, h, n), normal(r, h, v))
    cotangent = normal(b, t, h, v)

    def loss(floats, form):
        nope, latent, up = floats
        out = attend(
            q._replace(nope=nope), kv._replace(latent=latent), up, scale=0.2, impl="xla", form=form
        )
        return jnp.sum(out.out * cotangent), out

    got, want = (
        jax.jit(lambda f, form=form: jax.value_and_grad(loss, has_aux=True)(f, form))(
            (q.nope, kv.latent, up)
        )
        for form in ("absorbed", "expanded")
    )
    assert_close(got, want)


@pytest.mark.parametrize("t, s", [(1, 64), (64, 64), (64, 2048), (512, 512)])
def test_attend_takes_the_form_of_fewer_flops(t, s):
    h, n, r = 4, 8, 32
    shape = lambda *dims, dtype=jnp.float32: jax.ShapeDtypeStruct(dims, dtype)  # noqa: E731
    at = lambda n: shape(1, n, dtype=jnp.int32)  # noqa: E731
    q = Queries(shape(1, t, h, n), None, at(t), at(t), at(t))
    kv = Latents(shape(1, s, r), None, at(s), at(s))

    def flops(form):
        call = jax.jit(lambda q, kv, up: attend(q, kv, up, scale=0.2, impl="ref", form=form))
        return call.lower(q, kv, (shape(r, h, n), shape(r, h, n))).cost_analysis()["flops"]

    assert flops(None) == min(flops("expanded"), flops("absorbed"))


@pytest.mark.parametrize("k", [1, 2])
def test_experts_by_tiles_are_experts_one_by_one(k, rng):
    n, d, f, e = 50, 8, 6, 5

    def normal(*shape):
        return array(rng.normal(size=shape))

    x, gate, up, down = normal(n, d), normal(e, d, f), normal(e, d, f), normal(e, f, d)
    ids = np.stack([rng.permutation(4)[:k] for _ in range(n)])  # expert 4 gets nothing
    weight = normal(n, k)

    def tiled(x, gate, up, down, weight):
        plan = dispatch(jnp.asarray(ids), e, 8)
        return combine(expert_mlp(x, plan, gate, up, down), plan, weight)

    def dense(x, gate, up, down, weight):
        h = jax.nn.silu(jnp.einsum("nd,edf->nef", x, gate)) * jnp.einsum("nd,edf->nef", x, up)
        y = jnp.einsum("nef,efd->ned", h, down)
        return jnp.einsum("nkd,nk->nd", jnp.take_along_axis(y, ids[..., None], 1), weight)

    def grouped(x, gate, up, down, weight):
        return grouped_experts(x, jnp.asarray(ids), weight, gate, up, down, impl="pallas_interpret")

    args = (x, gate, up, down, weight)
    cotangent = normal(n, d)
    for f in (
        lambda fn: jax.jit(fn)(*args),
        lambda fn: jax.jit(jax.grad(lambda *a: jnp.sum(fn(*a) * cotangent), range(5)))(*args),
    ):
        want = f(dense)
        assert_close(f(tiled), want)
        assert_close(f(grouped), want)


@pytest.mark.parametrize(
    "tokens, experts, top_k",
    [(1, 384, 8), (7, 32, 4), (100, 64, 6), (2048, 32, 4), (2048, 384, 8), (4096, 64, 6)],
)
def test_rows_computed_are_at_most_1_3_times_those_needed(tokens, experts, top_k, rng):
    """For tokens that choose at random; each row is where its token finds it."""
    ids = np.argsort(rng.random((tokens, experts)), 1)[:, :top_k]
    tile = tile_rows(ids.size, experts)
    plan = dispatch(jnp.asarray(ids), experts, tile)
    assert int(plan.live.sum()) * tile <= 1.3 * ids.size
    assert (np.sort(np.asarray(plan.source)[np.asarray(plan.slot)], 0)
            == np.arange(tokens)[:, None]).all()


def test_executed_expert_tiles_are_few():
    """At most one tile per expert more than the rows need; the others are skipped."""
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 4, (4096, 1)))
    plan = dispatch(ids, 4, 256)
    assert int(plan.live.sum()) * 256 <= 1.3 * 4096


def _brute_force_macs(cfg, n):
    """Visit every query of every layer and count what it multiplies."""
    d, total = cfg.width, n * cfg.width * cfg.vocab
    for layer in cfg.layers:
        if isinstance(layer.mixer, WindowConfig):
            w = layer.mixer
            total += n * d * w.head_dim * (2 * w.heads + 2 * w.kv_heads)
            for t in range(n):
                seen = sum(1 for s in range(max(0, t - w.window + 1), t + 1))
                total += seen * w.heads * w.head_dim * 2
        if isinstance(layer.mixer, CompressedConfig):
            c, i = layer.mixer, layer.mixer.index
            total += n * (d * c.heads * c.nope_dim + c.taps * d * c.kv_rank)
            total += n * c.heads * (c.nope_dim * c.kv_rank + c.kv_rank * c.v_dim + c.v_dim * d)
            blocks_done = 0
            for t in range(n):
                local = max(0, t // i.group * i.group - c.window)
                candidates = local // i.block
                keys = (t - local + 1) + min(candidates, i.top_k) * i.block
                total += keys * c.heads * c.kv_rank * 2
                if t % i.group == 0:
                    total += d * i.dim + candidates * i.keys * i.dim
                if (t + 1) % i.block == 0:
                    blocks_done += 1
                    total += i.block * c.kv_rank * i.keys * 2 + i.keys * c.kv_rank * i.dim
            assert blocks_done == n // i.block
        f = layer.ffn
        if hasattr(f, "experts"):
            total += n * (d * f.experts + 3 * d * (f.top_k * f.width + f.shared_width))
        else:
            total += n * 3 * d * f.width
    return total


@pytest.mark.parametrize("n", [4096, 4000, 50])
def test_flops_formula_equals_a_brute_force_count(n):
    cfg = presets.needle_2m()
    assert sum(prefill_flops(cfg, n).values()) == 2 * _brute_force_macs(cfg, n)


def test_exact_flops_grow_with_the_square():
    cfg = CONFIGS["kimi"]()
    a, b = (prefill_flops(cfg, n)["attention"] for n in (1000, 2000))
    assert 3.99 < b / a < 4.01
    windows = ("groups.0.layers.0.mixer.window", "groups.1.layers.1.mixer.window")
    cfg = override(cfg, dict.fromkeys(windows, 100))
    a, b = (prefill_flops(cfg, n)["attention"] for n in (1000, 2000))
    assert 2.0 < b / a < 2.1  # a window grows with the length alone
