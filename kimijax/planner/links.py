"""Bytes that a device sends in a call or a step of a job, in closed form."""

import jax
import jax.numpy as jnp

from kimijax.config import (
    CompressedConfig,
    KDAConfig,
    LayerConfig,
    MLAConfig,
    MoEConfig,
    WindowConfig,
)
from kimijax.errors import UserError
from kimijax.parallel.cost import sent
from kimijax.parallel.exchange import choose
from kimijax.parallel.plan import Plan
from kimijax.planner import job as jobs
from kimijax.planner.job import Job
from kimijax.planner.memory import dealt_ways, leaf_bytes, tokens_of_device
from kimijax.planner.work import AGAIN, NEEDED, attention_of

# Of the float32 bytes of a dealt weight: nearly all are of routed experts, which come twice as
# bfloat16 and go home as float32. Gradients of others go home as bfloat16, and are counted alike.
SENT = 2
# What a ring sends: latents forward, and backward with their float32 gradients.
RING_FLOATS = 2  # float32 numbers over those of the activations' two bytes


def link_bytes(job: Job, plan: Plan) -> dict[str, float]:
    """That a device sends in all calls or a step: "ring" over one link, the rest over all."""
    total: dict[str, float] = {}
    for parts in job.cfg.of_layers(lambda layer: layer_links(job, plan, layer)):
        for part, x in parts.items():
            total[part] = total.get(part, 0.0) + job.calls * x
    if job.kind == "train":
        total["weights"] = _gathered(job, plan)
    if job.kind == "decode":
        # Positions and segments lie whole on every device, and are summed over those of a row.
        cache = jobs.cache(job, plan)
        where = leaf_bytes(cache.pos) + leaf_bytes(cache.seg)
        total["positions"] = 2.0 * where * (1 - 1 / plan.ways)
    return {part: x for part, x in total.items() if x}


def layer_links(job: Job, plan: Plan, layer: LayerConfig) -> dict[str, float]:
    """Of one layer and call, all passes."""
    n, width = tokens_of_device(job, plan), jnp.dtype(job.dtype).itemsize
    ways, tensor = plan.ways, plan.mesh.shape["tensor"]
    train = job.kind == "train"
    times = NEEDED + AGAIN if train else 1
    all_reduce = lambda size, among: 2.0 * size * (1 - 1 / among)  # noqa: E731
    found = {"tensor": times * 2 * all_reduce(n * job.cfg.width * width, tensor)}
    rows = n / max(jobs.row(job, plan)[0] // ways, 1) if not job.cached else n
    match layer.mixer:
        case MLAConfig(heads=h, v_dim=v) if job.kind == "decode":
            found["partials"] = all_reduce(n * h / tensor * (v + 1) * 4, ways)
        case MLAConfig(heads=h, nope_dim=k, rope_dim=p, v_dim=v) if job.cached:
            # Queries of all devices come to the slots of each, a share of their Partials goes back.
            found["queries"] = n * (ways - 1) * h / tensor * (k + p) * width
            found["partials"] = n * (ways - 1) * h / tensor * (v + 1) * 4
        case MLAConfig() as mla if ways > 1:
            once = _sent(job, plan, mla) * rows
            found["ring"] = once * (1 + 1 + RING_FLOATS if train else 1)
        case WindowConfig(window=None, kv_heads=g, head_dim=k) if ways > 1:
            found["ring"] = (ways - 1) * n * (2 * g * k * width + 8) * (4 if train else 1)
        case CompressedConfig() as c:
            found |= _chosen_links(job, plan, c, n)
        case KDAConfig(heads=h, head_dim=k) if ways > 1 and job.kind != "decode":
            among, runs = (job.batch, ways) if job.cached else (rows, jobs.row(job, plan)[1])
            found["state"] = times * among * (ways - 1) / ways * runs * h / tensor * 2 * k * k * 4
    if isinstance(layer.ffn, MoEConfig):
        found["experts"] = times * _exchanged(job, plan, layer.ffn, n * job.cfg.width * width)
    return found


def _chosen_links(job: Job, plan: Plan, c: CompressedConfig, n: int) -> dict[str, float]:
    """Of compressed attention (parallel/blocks.py): choices are exchanged; in whole rows the
    blocks go around the ring, behind a cache the Partials of all heads are merged."""
    ways, width, choice = plan.ways, jnp.dtype(job.dtype).itemsize, 12 * c.index.top_k
    if job.kind == "decode":
        partials = 2.0 * n * c.heads * (c.kv_rank + 1) * 4 * (1 - 1 / ways)
        heads = n * c.heads * c.kv_rank * width * (1 - 1 / plan.mesh.shape["tensor"])
        return {"partials": partials, "heads": heads, "choices": float(n * choice * (ways - 1))}
    asking = n / c.index.group
    choices = asking * (ways - 1) * (c.index.dim * width + 8 + choice)
    return {"ring": (ways - 1.0) * n * c.kv_rank * width * (5 if job.kind == "train" else 1),
            "choices": choices * (NEEDED + AGAIN if job.kind == "train" else 1)}


def _sent(job: Job, plan: Plan, mla: MLAConfig) -> float:
    """Of a row, forward. UserError: its heads or the devices cannot be dealt so."""
    known = sent(attention_of(job, plan, mla))
    group = f"hybrid:{plan.mesh.shape['expert']}"
    name = {"ring_dma": "ring", "hybrid": group}.get(plan.strategy, plan.strategy)
    if name not in known:
        raise UserError(
            f"strategy {plan.strategy} cannot deal {mla.heads} heads over {plan.ways} devices; "
            f"choose one of {', '.join(known)}"
        )
    return known[name]


def _exchanged(job: Job, plan: Plan, moe: MoEConfig, size: float) -> float:
    """Of tokens of `size` bytes to their experts and back (parallel/exchange.py)."""
    ways = plan.mesh.shape["expert"]
    if job.kind == "decode":
        return 2.0 * size * (1 - 1 / ways)
    asked = 1.0  # of the devices, by a token
    if (plan.exchange or choose(plan.mesh, moe.top_k)) == "ragged":
        asked -= (1 - 1 / ways) ** moe.top_k
    return 2.0 * (ways - 1) * asked * size


def exchanges(job: Job, plan: Plan) -> tuple[str, ...]:
    """The exchanges of a call's layers: none for a token that every device has."""
    if job.kind == "decode" or plan.mesh.shape["expert"] == 1:
        return ()
    moe = {layer.ffn for layer in job.cfg.layers if isinstance(layer.ffn, MoEConfig)}
    return tuple(sorted({plan.exchange or choose(plan.mesh, m.top_k) for m in moe}))


def _gathered(job: Job, plan: Plan) -> float:
    """Weights dealt over data and seq come whole in every pass, and their gradients go home."""
    params = jax.tree.leaves(jobs.weights(job, plan))
    return float(sum(SENT * (dealt_ways(x) - 1) * leaf_bytes(x) for x in params))
