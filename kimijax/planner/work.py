"""What a call or a step of a job computes and moves, on one device, in closed form.

FLOPs are those that are needed (kimijax.metrics) and, apart, those done again: layers in training,
latents that every device of a ring projects for itself. Bytes of HBM are weights and caches that
are read, and the arrays of every stage written and read. What is sent is in links.py.
"""

import functools
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.tree_util import tree_flatten_with_path

from kimijax.cache import LATENT
from kimijax.config import (
    CompressedConfig,
    LayerConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    WindowConfig,
)
from kimijax.metrics import decode_flops, prefill_flops
from kimijax.optim.matrices import matrices_of
from kimijax.optim.muon import STEPS
from kimijax.parallel.cost import DEVICES, Work, choose, groups
from kimijax.parallel.plan import Plan
from kimijax.planner import job as jobs
from kimijax.planner.chips import Pod
from kimijax.planner.job import Job
from kimijax.planner.memory import (
    copied_experts,
    is_expert,
    kept,
    leaf_bytes,
    moments,
    stages,
    tokens_of_device,
)

# Of forwards in a step: the forward, the same again but exact attention, which is kept, and
# gradients of inputs and of weights.
NEEDED, AGAIN = 3, 1


def flops_per_token(job: Job) -> dict[str, float]:
    """By part, of all devices together."""
    needed = _needed(job.cfg, job.kind, job.context)
    if job.kind != "train":
        return needed
    found = {part: NEEDED * x for part, x in needed.items()}
    again = AGAIN * (sum(needed.values()) - _kept(job.cfg, job.context) / job.context)
    return found | {"again": again, "optimizer": _newton_schulz(job.cfg) / job.tokens}


@functools.lru_cache(maxsize=64)
def _kept(cfg: ModelConfig, n: int) -> float:
    """FLOPs of attention whose outcome is kept where layers are computed again, forward."""
    only = [(g, tuple(layer for layer in g.layers if kept(layer, 1, 1))) for g in cfg.groups]
    groups = tuple(replace(g, layers=layers) for g, layers in only if layers)
    return prefill_flops(replace(cfg, groups=groups), n)["attention"] if groups else 0.0


@functools.lru_cache(maxsize=64)
def _needed(cfg: ModelConfig, kind: str, n: int) -> dict[str, float]:
    if kind == "decode":
        return decode_flops(cfg, n)
    return {part: x / n for part, x in prefill_flops(cfg, n).items()}


@functools.lru_cache(maxsize=16)
def _newton_schulz(cfg: ModelConfig) -> float:
    """FLOPs of Muon's products in a step: of r x c matrices 4 r^2 c + 2 r^3, five times."""
    names = jax.tree.leaves(
        nn.get_partition_spec(jobs.boxed(cfg)), is_leaf=lambda x: isinstance(x, tuple)
    )
    shapes = jax.tree.leaves(nn.unbox(jobs.boxed(cfg)))
    total = 0.0
    for name, x, arrays in zip(names, shapes, moments(cfg), strict=True):
        if arrays == 1:
            n, rows, columns = matrices_of(tuple(name)).sizes(x.shape)
            r, c = min(rows, columns), max(rows, columns)
            total += n * STEPS * (4.0 * r * r * c + 2.0 * r**3)
    return total


def device_flops(job: Job, plan: Plan) -> float:
    """Of all calls or a step on one device, latents projected again included."""
    each = flops_per_token(job)
    devices = plan.mesh.size
    if job.kind != "decode":
        return job.tokens * sum(each.values()) / devices + _projected(job, plan)
    # Every device of a row has its tokens: attention, the index of blocks and routed experts alone
    # are dealt out.
    rows, tensor = tokens_of_device(job, plan), plan.mesh.shape["tensor"]
    routed = sum(
        6.0 * job.cfg.width * f.top_k * f.width
        for f in (layer.ffn for layer in job.cfg.layers) if isinstance(f, MoEConfig)
    )
    cached = each["attention"] + each["index"]
    dealt = cached / plan.ways + routed / plan.mesh.shape["expert"]
    whole = sum(each.values()) - cached - routed
    return rows * (dealt + whole) / tensor


def _projected(job: Job, plan: Plan) -> float:
    """FLOPs of latents that others have projected too; those that share heads divide them."""
    times = NEEDED + AGAIN if job.kind == "train" else 1  # gradients project them again

    def one(layer: LayerConfig) -> float:
        if not isinstance(layer.mixer, MLAConfig):
            return 0.0
        w = attention_of(job, plan, layer.mixer)
        once = 2.0 * w.tokens * w.heads * w.latent * (w.key + w.value)
        if job.chunk:  # every call projects what is there: half of the slots in the mean
            return once / w.ways * job.calls / 2
        return once * (1 / groups(w).get(plan.strategy, 1) - 1 / w.ways)

    total = sum(job.cfg.of_layers(one))
    return times * total * job.batch / plan.mesh.shape["data"]


def attention_of(job: Job, plan: Plan, mla: MLAConfig) -> Work:
    """Of a row of a layer, for the cost of a strategy; zigzag gives all devices the same."""
    return Work(
        jobs.row(job, plan)[0], plan.ways, mla.heads // plan.mesh.shape["tensor"], mla.nope_dim,
        mla.rope_dim, mla.v_dim, mla.kv_rank, jnp.dtype(job.dtype).itemsize,
    )


def strategy_of(job: Job, plan: Plan, pod: Pod) -> str:
    """The cheapest for the largest attention of the model; ring where nothing else can be."""
    mixers = {layer.mixer for layer in job.cfg.layers}
    plain = any(isinstance(m, WindowConfig) and m.window is None for m in mixers)
    mla = [m for m in mixers if isinstance(m, MLAConfig)]
    if job.cached or plan.ways == 1 or plain or not mla:
        return "ring"
    largest = max(mla, key=lambda m: m.heads)
    return choose(attention_of(job, plan, largest), DEVICES[pod.name])[0]


def hbm_bytes(job: Job, plan: Plan) -> dict[str, float]:
    """That a device reads and writes in all calls or a step."""
    params = jobs.weights(job, plan)
    passes = NEEDED + AGAIN - 1 if job.kind == "train" else 1
    rows = tokens_of_device(job, plan)
    dense, routed = 0.0, _experts_read(job, plan, params)
    for path, x in tree_flatten_with_path(params)[0]:
        if path[-1].key == "embed":
            dense += rows * job.cfg.width * x.dtype.itemsize
        elif not is_expert(path, x):
            dense += leaf_bytes(x)
    passes *= job.calls
    found = {"weights": passes * dense, "experts": passes * routed}
    if job.cached:
        # Slots are dealt in stripes: of all devices' as many are filled.
        found["cache"] = _cache_read(job, plan) * (job.calls / 2 if job.chunk else 1)
    if job.kind == "decode":
        return found
    arrays = sum(job.cfg.of_layers(lambda layer: sum(stages(job, plan, layer))))
    found["arrays"] = 2.0 * passes * arrays
    if job.kind == "train":
        state = sum(
            (2 + n) * leaf_bytes(x)
            for n, x in zip(moments(job.cfg), jax.tree.leaves(params), strict=True)
        )
        found["optimizer"] = 2.0 * state
    return found


def _cache_read(job: Job, plan: Plan) -> float:
    """Bytes of the cache that a token reads: all, but of compressed layers' latents the chosen."""
    cache = jobs.cache(job, plan)
    total = float(sum(map(leaf_bytes, jax.tree.leaves(cache))))
    for group, states in zip(job.cfg.groups, cache.states, strict=True):
        for layer, state in zip(group.layers, states, strict=True):
            if isinstance(c := layer.mixer, CompressedConfig):
                seen = c.index.top_k * c.index.block + c.index.group + c.window
                unseen = 1 - min(1.0, seen / state["latent"].shape[2])
                kept = [state[name] for name in LATENT if name in state]
                total -= unseen * sum(map(leaf_bytes, kept))
    return total


def _experts_read(job: Job, plan: Plan, params) -> float:
    """Bytes of experts in a pass: read as they lie, or copied first.

    A token asks some experts alone: with even routing the mean, and one on the busiest device.
    """
    moe = [layer.ffn for layer in job.cfg.layers if isinstance(layer.ffn, MoEConfig)]
    held = sum(leaf_bytes(x) for p, x in tree_flatten_with_path(params)[0] if is_expert(p, x))
    if not moe:
        return 0.0
    m, rows = moe[0], tokens_of_device(job, plan)
    if job.kind != "decode":
        rows = rows * plan.mesh.shape["expert"]
    asked = 1 - (1 - m.top_k / m.experts) ** rows
    asked = max(asked, plan.mesh.shape["expert"] / m.experts)
    return asked * held + 2 * copied_experts(job, params)[1]
