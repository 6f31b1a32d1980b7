"""The planner: closed forms against what arrays and programs are measured to take."""

import dataclasses
import math
import re
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimijax import presets
from kimijax.cache import empty_cache
from kimijax.config import (
    CompressedConfig,
    GroupConfig,
    KDAConfig,
    LayerConfig,
    MLAConfig,
    ModelConfig,
    SwiGLUConfig,
)
from kimijax.errors import UserError
from kimijax.metrics import decode_flops
from kimijax.model import Model, abstract_params
from kimijax.ops.attend import local
from kimijax.optim import muon
from kimijax.parallel.cost import DEVICES
from kimijax.parallel.mesh import make_mesh
from kimijax.planner import hlo, links, memory, search, work
from kimijax.planner.chips import CHIPS, pod_of, pods
from kimijax.planner.estimate import estimate, plan_for
from kimijax.planner.job import Job, abstract_mesh, held, layout
from kimijax.planner.programs import lower
from kimijax.train.state import init_shapes, state_shardings
from tests.conftest import small_kimi

SIZES = {"data": 2, "seq": 2, "expert": 2}


def on_first_device(tree) -> int:
    """Bytes of live arrays that lie on one device."""
    first = jax.devices()[0]
    return sum(
        shard.data.nbytes for x in jax.tree.leaves(tree)
        for shard in x.addressable_shards if shard.device == first
    )


def test_bytes_of_a_training_state_are_those_of_its_arrays():
    cfg = small_kimi()
    job = Job(cfg, "train", 64, batch=2, dtype="float32")
    plan = layout(job, make_mesh(SIZES))
    model = Model(cfg, plan.ops())
    optimizer = muon(abstract_params(model), 1e-3, shardings=plan.shardings(cfg))
    state = jax.tree.map(
        lambda x, place: jax.device_put(np.zeros(x.shape, x.dtype), place),
        init_shapes(model, optimizer), state_shardings(model, optimizer, plan),
    )
    parts = memory.bytes_per_device(job, layout(job, abstract_mesh(SIZES)))
    assert parts["weights"] == on_first_device(state.params)
    got = on_first_device(state.opt_state)
    assert parts["optimizer"] == pytest.approx(got, rel=0.001)  # but for counts of steps
    assert parts["gradients"] == parts["weights"]


@pytest.mark.parametrize("latents", [None, "int8"])
def test_bytes_of_a_served_model_are_those_of_its_arrays(latents):
    cfg = held(presets.kimi_k2_tiny(), "int4")
    job = Job(cfg, "decode", 1000, batch=2, latents=latents)
    plan = layout(job, make_mesh(SIZES))
    cache = plan.ops().deal(empty_cache(cfg, 2, 1000, jnp.bfloat16, plan.ways, latents))
    shapes = nn.unbox(abstract_params(Model(cfg, local())))
    params = jax.tree.map(
        lambda x, place: jax.device_put(np.zeros(x.shape, x.dtype), place), shapes,
        plan.shardings(cfg),
    )
    parts = memory.bytes_per_device(job, layout(job, abstract_mesh(SIZES)))
    whole = on_first_device(cache)
    assert parts["latents"] + parts["state"] == pytest.approx(whole, rel=0.01)
    packed = [x for x in jax.tree.leaves(params) if x.dtype != jnp.float32]
    floats = [x for x in jax.tree.leaves(params) if x.dtype == jnp.float32]
    want = on_first_device(packed) + on_first_device(floats) / 2  # served in bfloat16
    assert parts["weights"] == pytest.approx(want, rel=0.05)  # but for what stays float32


def dense_model() -> ModelConfig:
    """Layers that do not repeat: a compiler counts the body of a loop once."""
    mla = MLAConfig(heads=4, q_rank=64, kv_rank=64, nope_dim=32, rope_dim=32, v_dim=32, rope=None)
    layer = LayerConfig(mixer=mla, ffn=SwiGLUConfig(width=512))
    return ModelConfig(vocab=512, width=256, groups=(GroupConfig(layers=(layer,)),) * 2)


def test_flops_are_those_that_a_compiler_counts():
    cfg, n = dense_model(), 128
    model = Model(cfg, local("ref"))
    params = nn.unbox(abstract_params(model))
    ids = jax.ShapeDtypeStruct((1, n), jnp.int32)
    run = jax.jit(lambda params, ids: model.apply(params, ids, method="logits"))
    got = run.lower(params, ids).compile().cost_analysis()["flops"]
    parts = work.flops_per_token(Job(cfg, "prefill", n))
    parts["attention"] *= 2 * n / (n + 1)  # the reference multiplies masked pairs too
    assert n * sum(parts.values()) == pytest.approx(got, rel=0.05)


def test_flops_of_a_token_are_those_of_absorbed_attention():
    n, got = 2**20, decode_flops(presets.kimi_k2(), 2**20)
    assert got["attention"] == pytest.approx(61 * n * 64 * 2 * (2 * 512 + 64), rel=1e-4)
    active = 31.5e9  # parameters that a token multiplies, README of the release: 32 B activated
    rest = sum(got.values()) - got["attention"]
    assert rest == pytest.approx(2 * active, rel=0.05)


def test_devices_are_those_of_the_table_of_strategies():
    for name in CHIPS:
        pod = pods(name)[-1]
        assert pod.flops == DEVICES[name].flops
        assert pod.links == pytest.approx(
            DEVICES[name].link * 2 * pod.chip.dims / pod.chip.devices
        )
        assert pod_of(pod.topology) == pod


@pytest.mark.parametrize("topology", ["v5p:3x3x3", "v5p:8x8", "v9:2x2", "v5e:32x16", "", "v5p:"])
def test_a_topology_that_is_none_is_refused_with_near_ones(topology):
    with pytest.raises(UserError, match="near ones are v"):
        pod_of(topology)


def test_the_longest_context_fits_and_one_step_more_does_not():
    job = Job(presets.moonlight_16b(), "prefill", search.LEAST)
    pod = pod_of("v5e:4x4")
    e = search.longest(job, pod)
    assert e.fits and search.best(e.job, pod).fits
    more = dataclasses.replace(job, context=e.job.context * (search.FINE + 1) // search.FINE)
    with pytest.raises(UserError, match="does not fit v5e:4x4"):
        search.best(more, pod)


def test_the_smallest_topology_fits_and_the_one_before_does_not():
    job = Job(presets.moonlight_16b(), "decode", 131_072)
    e = search.smallest(job, "v5e")
    names = [p.topology for p in pods("v5e")]
    before = pod_of(names[names.index(e.pod.topology) - 1])
    with pytest.raises(UserError, match=r"does not fit .* of them weights"):
        search.best(job, before)


def test_the_best_mesh_is_as_fast_as_any_that_fits():
    job, pod = Job(presets.moonlight_16b(), "prefill", 65_536, batch=2), pod_of("v5p:2x2x2")
    e = search.best(job, pod)
    found = search.candidates(job, pod, search.meshes(job, pod))
    fastest = min(x.time for x in found if x.fits)
    assert len(found) > 10 and e.time <= search.SAME * fastest
    assert all(x.bytes >= e.bytes for x in found if x.time <= search.SAME * fastest)
    assert all(math.prod(x.mesh.values()) == pod.devices for x in found)


def test_a_ring_sends_what_its_strategy_costs():
    """K2's latents, 576 numbers and two int32, to the next of 512 devices 511 times, 61 layers."""
    job, pod = Job(presets.kimi_k2(), "prefill", 2**21), pod_of("v5p:8x8x8")
    e = estimate(job, pod, {"seq": 128, "expert": 4}, "ring")
    assert e.links["ring"] == 61 * 511 * 4096 * (576 * 2 + 8)
    plan = plan_for(job, pod, e.mesh, e.strategy)
    each = [links.layer_links(job, plan, layer)["ring"] for layer in job.cfg.layers]
    assert sum(each) == e.links["ring"]


def test_devices_that_share_heads_project_fewer_latents_again():
    job, pod = Job(presets.kimi_k2(), "prefill", 2**21), pod_of("v5p:8x8x8")
    alone, shared = (
        estimate(job, pod, {"seq": 8, "expert": 64}, name).flops for name in ("ring", "hybrid:32")
    )
    again = 61 * 2.0 * 2**21 * 64 * 512 * 256  # of one device that projects every latent
    needed = 2**21 * sum(work.flops_per_token(job).values()) / 512
    assert alone == pytest.approx(needed + again * 511 / 512)
    assert shared == pytest.approx(needed + again * (1 / 32 - 1 / 512))


def chosen_model() -> ModelConfig:
    """One layer that reads chosen blocks."""
    layer = LayerConfig(mixer=CompressedConfig(), ffn=SwiGLUConfig(width=64))
    return ModelConfig(vocab=64, width=64, groups=(GroupConfig(layers=(layer,)),))


def test_a_ring_of_blocks_sends_what_its_program_sends():
    job = Job(chosen_model(), "prefill", 2048, dtype="float32")
    plan = layout(job, make_mesh({"seq": 4}))
    program = hlo.parse(lower(job, plan).compile().as_text())
    assert links.link_bytes(job, plan)["ring"] == hlo.sent_bytes(program)


def test_a_token_reads_of_a_compressed_cache_the_chosen_blocks_and_the_index():
    """Behind twice the slots as many latents; the keys and positions of twice as many blocks."""
    short, long = (
        work.hbm_bytes(job, layout(job, abstract_mesh({"seq": 4})))["cache"]
        for job in (Job(chosen_model(), "decode", n) for n in (2**20, 2**21))
    )
    keys, positions = 2 * 32 * 2 / 32 / 4, 8 / 32 + 8  # keys are dealt; positions lie whole
    assert long - short == pytest.approx(2**20 * (keys + positions), rel=0.001)


def test_a_prefill_in_chunks_stands_behind_its_cache_and_works_on_a_chunk():
    pod, mesh = pod_of("v6e:8x16"), {"data": 1, "seq": 1, "expert": 32, "tensor": 4}
    jobs = [Job(presets.kimi_k2(), "prefill", 2**21, chunk=c) for c in (None, 8192, 16_384)]
    whole, short, long = (estimate(job, pod, mesh) for job in jobs)
    token = estimate(dataclasses.replace(jobs[0], kind="decode"), pod, mesh)
    for e in (short, long):
        assert e.fits and e.parts["latents"] == token.parts["latents"]
        assert e.job.tokens == 2**21 and e.flops_per_token == whole.flops_per_token
    assert not whole.fits and "latents" not in whole.parts
    assert long.parts["activations"] == pytest.approx(2 * short.parts["activations"], rel=0.01)
    # Twice as many calls read all weights twice as often, and send as much in all.
    assert short.hbm["weights"] == pytest.approx(2 * long.hbm["weights"], rel=0.01)
    for part in ("queries", "partials", "tensor"):
        assert short.links[part] == pytest.approx(long.links[part], rel=1e-6)


def test_a_chunk_behind_a_dealt_cache_gathers_no_input_of_a_convolution():
    cfg = presets.kimi_linear_tiny()
    job = Job(cfg, "prefill", 1024, dtype="float32", chunk=256)
    text = lower(job, layout(job, make_mesh({"seq": 8}))).compile().as_text()
    sent = re.findall(r"= \w+\[([0-9,]*)\]\S* (?:all-gather|all-reduce|all-to-all)", text)
    kda = next(x.mixer for x in cfg.layers if isinstance(x.mixer, KDAConfig))
    whole = 256 * 3 * kda.heads * kda.head_dim  # query, key and value of all tokens
    assert sent and max(math.prod(map(int, s.split(","))) for s in sent if s) < whole / 2


def test_planning_k2_takes_a_moment():
    """Of CPU, the model traced once before: every mesh of 512 chips, for three jobs."""
    cfg, pod = presets.kimi_k2(), pod_of("v5p:8x8x8")
    abstract_params(Model(cfg, local()))
    began = time.process_time()
    for kind in ("prefill", "decode", "train"):
        search.best(Job(cfg, kind, 2**21), pod)
    assert time.process_time() - began < 1.0


def test_costs_are_chips_times_seconds():
    job, pod = Job(presets.kimi_linear_48b(), "decode", 2**20, batch=16), pod_of("v5e:4x4")
    e = estimate(job, pod, {"data": 2, "seq": 1, "expert": 8})
    dollars, joules = e.costs(3.6, 100.0)
    assert joules == pytest.approx(16 * e.time * 100 / 16)
    assert dollars == pytest.approx(1e6 * 16 * e.time / 16 * 3.6 / 3600)
    assert e.time == max(e.seconds.values()) == e.seconds[e.bound]
    assert e.seconds["matmul"] == e.flops / 197e12
    assert e.seconds["hbm"] == sum(e.hbm.values()) / 819e9
    assert e.seconds["links"] == pytest.approx(sum(e.links.values()) / 200e9)
