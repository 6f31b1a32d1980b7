"""Bytes of one device in closed form: what a job keeps, and the most it works on at one time.

Arguments are counted by the shapes and shardings of the run itself. Temporaries are formulas of a
device's tokens n: the compiler reuses memory, so of the stages of a layer the largest counts.

    layer input          2 n d w                            w bytes a number; itself and its norm
    kept inputs          layers n d w                       training: layers are computed twice,
    kept attention       layers n h (v w + 4)               but exact attention, which is kept
    attention            n h (4 (k + p) w + 6 v 4)          queries, float32 Partials, moved copies
      of a chunk         N h ((k + p) w + 2 (v + 1) 4)      N: of all devices of a row
    feed-forward         3 n f w
    experts              rows (d + 2 f) w, or (2 rows +     rows of tokens at experts here, rows'
                           rows') d w when they go back     with the choices of one in tiles
    a training's layer   twice the stage; its weights and   w bytes a number; gradients float32,
                           two thirds of their gradients    as they are summed
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, tree_flatten_with_path

from kimijax.cache import LARGE, run_length
from kimijax.config import (
    CompressedConfig,
    KDAConfig,
    LayerConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    SwiGLUConfig,
    WindowConfig,
)
from kimijax.errors import UserError
from kimijax.optim import muon
from kimijax.parallel.exchange import choose
from kimijax.parallel.plan import Plan
from kimijax.planner import job as jobs
from kimijax.planner.job import RATE, Job
from kimijax.train.loss import TOKENS

SLOTS = (*LARGE, "block_pos", "block_seg")  # states of a cache that grow with its slots
SUBLANES, LANES = 8, 128  # of a TPU's tile: what an array's last two dims are padded to


def device_bytes(tree) -> int:
    """Of abstract arrays at their places, on one device."""
    return sum(leaf_bytes(x) for x in jax.tree.leaves(tree))


def leaf_bytes(x: jax.ShapeDtypeStruct) -> int:
    """Of one of them."""
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def bytes_per_device(job: Job, plan: Plan) -> dict[str, float]:
    """By part; their sum is what has to fit. UserError: the mesh does not divide the job."""
    params = jobs.weights(job, plan)
    found = {"weights": device_bytes(params)}
    if job.kind == "train":
        found |= _training(job, params)
    if job.cached:
        found |= _cached(job, plan)
    found |= _working(job, plan, params)
    return found | {"experts copied": copied_experts(job, params)[0]}


def is_expert(path, x) -> bool:
    """Whether a parameter holds matrices of routed experts, l e i o."""
    return path[-2].key == "ffn" and x.ndim == 4


def copied_experts(job: Job, params) -> tuple[float, float]:
    """Bytes (at one time, in a pass) of expert matrices that are copied out of their stack.

    Behind a cache none is, but for packed ones whose last dim is no multiple of a tile's lanes:
    XLA has another dim last there, and turns all of them before the loop over layers. Elsewhere a
    scan over layers hands `grouped_matmul` a slice, which is a copy: one matrix after the other.
    """
    found = [(p[-1].key, x) for p, x in tree_flatten_with_path(params)[0] if is_expert(p, x)]
    if job.cached:
        turned = sum(
            leaf_bytes(x) * (-(-x.shape[-1] // LANES) * LANES / x.shape[-1]) for name, x in found
            if name.endswith("_packed") and x.shape[-1] % LANES
        )
        return turned, turned
    sizes = [(leaf_bytes(x), x.shape[0]) for _, x in found]
    return max((size / n for size, n in sizes), default=0.0), float(sum(s for s, _ in sizes))


def _cached(job: Job, plan: Plan) -> dict[str, float]:
    """What grows with the slots, and what does not."""
    cache = jobs.cache(job, plan)
    slots = device_bytes((cache.pos, cache.seg))
    state = 0
    for path, x in tree_flatten_with_path(cache.states)[0]:
        if path[-1].key in SLOTS:
            slots += leaf_bytes(x)
        else:
            state += leaf_bytes(x)
    return {"latents": slots, "state": state}


def _training(job: Job, params) -> dict[str, float]:
    """What the optimizer keeps, and the gradients, float32: they lie as the weights do."""
    leaves = jax.tree.leaves(params)
    kept = sum(n * leaf_bytes(x) for n, x in zip(moments(job.cfg), leaves, strict=True))
    return {"optimizer": kept, "gradients": sum(leaf_bytes(x) for x in leaves)}


@functools.lru_cache(maxsize=16)
def moments(cfg: ModelConfig) -> tuple[int, ...]:
    """How many arrays Muon, or the AdamW beside it, keeps of each parameter."""
    params = nn.unbox(jobs.boxed(cfg))
    state = jax.eval_shape(muon(jobs.boxed(cfg), RATE).init, params)
    keys = lambda path: tuple(k.key for k in path if isinstance(k, DictKey))  # noqa: E731
    kept = [keys(path) for path, _ in tree_flatten_with_path(state)[0]]
    names = [keys(path) for path, _ in tree_flatten_with_path(params)[0]]
    return tuple(sum(k[-len(name):] == name for k in kept) for name in names)


def _working(job: Job, plan: Plan, params) -> dict[str, float]:
    """Temporaries by part: of the stages of a layer, the largest."""
    n, d, layers = tokens_of_device(job, plan), job.cfg.width, job.cfg.layers
    width, train = jnp.dtype(job.dtype).itemsize, job.kind == "train"
    tensor = plan.mesh.shape["tensor"]
    # A backward holds the arrays of a stage and their cotangents.
    passes = 2 if train else 1
    largest = passes * max(max(stages(job, plan, layer)) for layer in set(layers))
    found = {}
    if train:
        found["gathered"] = _gathered(params, width)
        found["layer inputs"] = len(layers) * n * d * width
        found["attention kept"] = sum(kept(layer, n, width) for layer in layers) / tensor
    if not job.cached and plan.ways > 1:
        found["ring buffers"] = max(_ring(layer, n, width, train) for layer in set(layers))
    logits = (min(n, TOKENS) if train else job.batch) * job.cfg.vocab / tensor
    found["logits"] = passes * 4 * logits
    # They lie where a layer has worked.
    found["activations"] = 2 * n * d * width + max(largest - found["logits"], 0)
    return found


def kept(layer: LayerConfig, n: int, width: int) -> float:
    """Attention's outcome of a layer, and float32 lse, of n tokens: that of `Ops.attend`."""
    match layer.mixer:
        case MLAConfig(heads=h, v_dim=size) | WindowConfig(heads=h, head_dim=size, window=None):
            return n * h * (size * width + 4.0)
    return 0.0


def _gathered(params, width: int) -> float:
    """Weights of one layer that came whole from data and seq, cast, and gradients of them.

    As many arrays as 3 matrices of an expert and 2 gradients, float32, that are on their way home.
    """
    layers: dict[tuple, float] = {}
    for path, x in tree_flatten_with_path(params)[0]:
        ways = dealt_ways(x)
        if ways > 1 and len(path) > 2:
            key = tuple(k.key for k in path[:3])  # params, group, layer
            size = leaf_bytes(x) * ways / (x.shape[0] if x.ndim > 1 else 1)
            layers[key] = layers.get(key, 0.0) + size
    return (width / 4 + 2 / 3) * max(layers.values(), default=0.0)


def dealt_ways(x: jax.ShapeDtypeStruct) -> int:
    """Devices of data and seq over which a weight is dealt: it is gathered from them."""
    axes = [a for entry in x.sharding.spec if entry for a in np.atleast_1d(entry)]
    return math.prod(x.sharding.mesh.shape[a] for a in axes if a in ("data", "seq"))


def tokens_of_device(job: Job, plan: Plan) -> int:
    """Of a call: those of a decode step are on every device of a row. UserError: not so dealt."""
    data = plan.mesh.shape["data"]
    if job.kind != "decode" and job.batch % data:
        raise UserError(f"--batch {job.batch} is no multiple of data = {data}; add rows")
    rows = job.batch // data if job.batch % data == 0 else job.batch
    if job.kind == "decode":
        return rows
    if job.chunk is None:
        return rows * jobs.row(job, plan)[0] // plan.ways
    if job.chunk % (least := run_length(job.cfg) * plan.ways):
        raise UserError(f"--chunk {job.chunk} is no multiple of {least}, a run for each device")
    return rows * job.chunk // plan.ways


def stages(job: Job, plan: Plan, layer: LayerConfig) -> tuple[float, float]:
    """Of a layer's mixer and of its feed-forward part, forward."""
    n, width = tokens_of_device(job, plan), jnp.dtype(job.dtype).itemsize
    tensor = plan.mesh.shape["tensor"]
    match layer.mixer:
        case MLAConfig(heads=h, nope_dim=k, rope_dim=p, v_dim=v) if job.chunk:
            # Queries of all devices are here, and their Partials before and after they are merged.
            mixer = n * plan.ways * h / tensor * ((k + p) * width + 2 * (v + 1) * 4)
        case MLAConfig(heads=h, nope_dim=k, rope_dim=p, v_dim=v):
            mixer = n * h / tensor * (4 * (k + p) * width + 6 * v * 4)
        case KDAConfig(heads=h, head_dim=k):
            # Behind every value stand k columns that become the run's map, in and out, float32.
            mixer = n * h / tensor * k * (6 * 4 + 2 * 2 * 4)
        case WindowConfig(heads=h, head_dim=k):
            mixer = n * h / tensor * k * (4 * width + 6 * 4)
        case CompressedConfig(heads=h, kv_rank=r):
            mixer = n * h / tensor * r * (4 * width + 6 * 4)
    match layer.ffn:
        case SwiGLUConfig(width=f):
            ffn = 3.0 * n * f / tensor * width
        case MoEConfig() as moe:
            ffn = _experts(job, plan, moe, n, width)
    return mixer, ffn


def _experts(job: Job, plan: Plan, moe: MoEConfig, n: int, width: int) -> float:
    """Rows of tokens at experts here: in and out of the products, and brought back in order."""
    tokens, choices = at_experts(job, plan, moe, n)
    rows, d = tokens * choices, job.cfg.width
    inside = rows * (d + 2 * moe.width / plan.mesh.shape["tensor"])
    back = (2 * rows + tokens * _padded(choices)) * d
    return (max(inside, back) + tokens * d) * width


def _padded(choices: int) -> int:
    """Rows of a token's choices that come into tiles of their own; 0: they lie so already."""
    if choices % SUBLANES == 0:
        return 0
    whole = 1 << (choices - 1).bit_length()  # there are tiles of 1, 2 and 4 rows too
    return whole if choices < SUBLANES else -(-choices // SUBLANES) * SUBLANES


def at_experts(job: Job, plan: Plan, moe: MoEConfig, n: int) -> tuple[int, int]:
    """(tokens that come to a device at one time, rows of each): see parallel/exchange.py."""
    ways = plan.mesh.shape["expert"]
    if job.kind == "decode" or ways == 1:
        return n, moe.top_k
    if (plan.exchange or choose(plan.mesh, moe.top_k)) == "gather":
        return n * ways, moe.top_k
    rounds = max(1, min(ways // moe.top_k, n))
    return ways * -(-n // rounds), min(moe.top_k, moe.experts // ways)


def _ring(layer: LayerConfig, n: int, width: int, train: bool) -> float:
    """Latents that are here and those that come, and in training their float32 gradients."""
    match layer.mixer:
        case MLAConfig(kv_rank=r, rope_dim=p):
            return 2.0 * n * ((r + p) * (width + 4 * train) + 8)
        case WindowConfig(window=None, kv_heads=g, head_dim=k):
            return 2.0 * n * (2 * g * k * (width + 4 * train) + 8)
    return 0.0
