"""One layer between an embedding and a head, read in a way of its own, and on one device.

What is compared: hidden states, max_logit, chosen blocks or experts, and the gradient of every
weight.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kimijax.cache import empty_cache
from kimijax.config import (
    CompressedConfig,
    GroupConfig,
    IndexConfig,
    KDAConfig,
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
from kimijax.parallel.plan import Plan

TOKENS, ROWS, CHUNK, DECODED, GAP, SHARP = 1024, 2, 512, 4, 1e-4, 4.0

MLA = MLAConfig(heads=8, q_rank=16, kv_rank=16, nope_dim=8, rope_dim=8, v_dim=8,
                rope=RopeConfig(theta=1e4, dim=8))
NOPE = dataclasses.replace(MLA, q_rank=None, rope=None)
GQA = WindowConfig(heads=8, kv_heads=2, head_dim=8, window=None, sink=0.5,
                   rope=RopeConfig(theta=1e4, dim=8))
WINDOW = dataclasses.replace(GQA, window=48)
KDA = KDAConfig(heads=2, head_dim=8, conv=4, gate_rank=8)
COMPRESSED = CompressedConfig(heads=2, kv_rank=16, nope_dim=8, v_dim=8, window=32, sink=0.5,
                              index=IndexConfig(dim=8, keys=2, block=32, top_k=3, group=64))
DENSE = SwiGLUConfig(width=32)
MOE = MoEConfig(experts=4, top_k=2, width=16, shared_width=16)
LAYERS = {
    "MLA": ((MLA, DENSE),),
    "GQA": ((GQA, DENSE),),
    "KDA hybrid": ((KDA, DENSE), (NOPE, DENSE)),
    "compressed": ((COMPRESSED, DENSE),),
    "window": ((WINDOW, DENSE),),
    "MLA and experts": ((MLA, MOE),),
}
CHOOSE = ("compressed", "MLA and experts")  # layers whose choices are compared
SEEDS = {"MLA and experts": 3}  # others than 1 where choices would be closer than GAP


def config(layer: str) -> ModelConfig:
    """The layers of a row of the table between an embedding and a head."""
    layers = tuple(LayerConfig(mixer=mixer, ffn=ffn) for mixer, ffn in LAYERS[layer])
    return ModelConfig(vocab=64, width=32, groups=(GroupConfig(layers=layers),), embed_std=1.0)


@functools.cache
def weights(layer: str):
    """Random weights, none of them zero.

    Queries are large: where attention is nearly uniform its gradient is a difference of nearly
    equal numbers, and the rounding of float32 alone is above the limit (two ways on one device
    differ as much).
    """
    rng = np.random.default_rng(SEEDS.get(layer, 1))

    def draw(path, x):
        gain = SHARP if [key.key for key in path[-2:]] == ["q", "w"] else 1.0
        if len(x.shape) > 2:
            return rng.normal(size=x.shape).astype(np.float32) * gain * max(x.shape[-2:]) ** -0.5
        return (1 + 0.3 * rng.normal(size=x.shape)).astype(np.float32)

    shapes = nn.unbox(abstract_params(Model(config(layer), local())))
    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def rows(packed: bool) -> dict[str, np.ndarray]:
    """Tokens; packed: three documents a row, the last with padding behind it."""
    ids = np.random.default_rng(2).integers(0, 64, (ROWS, TOKENS)).astype(np.int32)
    at = np.arange(TOKENS)
    starts = np.array([0, 320, 704]) if packed else np.array([0])
    seg = np.searchsorted(starts, at, side="right") - 1
    pos = at - starts[seg]
    seg = np.where(at < 1000, seg, -1) if packed else seg
    wide = lambda x: np.broadcast_to(x.astype(np.int32), (ROWS, TOKENS))  # noqa: E731
    return {"ids": ids, "pos": wide(pos), "seg": wide(seg)}


def reports(aux) -> dict[str, list]:
    """What layers report that must be the same: largest logits, choices."""
    mixers = [layer["mixer"] for group in aux for layer in group.values()]
    ffns = [layer["ffn"] for group in aux for layer in group.values()]
    return {
        "max_logit": [m["max_logit"] for m in mixers if "max_logit" in m],
        "load": [f["load"] for f in ffns if "load" in f],
    }


def whole(layer: str, packed: bool, plan: Plan | None):
    """(value and gradient of one pass over the row, its choices)."""
    cfg, given = config(layer), rows(packed)
    live = given["seg"] >= 0
    model = Model(cfg, plan.ops() if plan else local())
    call, back = plan.arrange(cfg, **given) if plan else (given | {"runs": 1}, None)
    runs = call.pop("runs")
    order = back.restore if back else (lambda x: x)
    cotangent = jax.random.normal(jax.random.key(3), (ROWS, TOKENS, cfg.width))

    @jax.jit
    def run(params, call):
        def loss(params):
            out = model.apply(params, **call, runs=runs)
            hidden = jnp.where(live[..., None], order(out.hidden), 0)
            return jnp.sum(hidden * cotangent), (hidden, out.aux)

        (_, (hidden, aux)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        experts = [order(x[0]) for x in _choices(aux, "ffn", "experts")]
        return {"hidden": hidden, "grads": grads, **reports(aux)}, experts, aux

    params = jax.device_put(weights(layer), plan.shardings(cfg)) if plan else weights(layer)
    found, experts, aux = run(params, call)
    group = COMPRESSED.index.group
    chosen = [_per_group(x[0], back, group) for x in _choices(aux, "mixer", "chosen")]
    return found, [np.where(live[..., None], x, -1) for x in map(np.asarray, experts)] + chosen


def _choices(aux, part: str, name: str) -> list:
    return [layer[part][name] for group in aux for layer in group.values() if name in layer[part]]


def _per_group(chosen, back, group: int) -> np.ndarray:
    """Choices b m k in the order of the row, without those of padding behind it."""
    chosen = np.asarray(chosen)
    if back is None:
        return chosen
    first = back.order.places.reshape(-1, group)[:, 0] // group
    return chosen[:, np.argsort(first)][:, : TOKENS // group]


def chunked(layer: str, packed: bool, plan: Plan | None):
    """Value and gradient of reading the row in chunks into a cache."""
    cfg, given = config(layer), rows(packed)
    live = given["seg"] >= 0
    model = Model(cfg, plan.ops() if plan else local())
    cotangent = jax.random.normal(jax.random.key(3), (ROWS, TOKENS, cfg.width))

    @jax.jit
    def run(params, given):
        def loss(params):
            def read(cache, piece):
                out = model.apply(params, **piece, cache=cache, aligned=True)
                chosen = _choices(out.aux, "mixer", "chosen")
                return out.cache, (out.hidden, reports(out.aux), chosen)

            pieces = {k: jnp.stack(jnp.split(x, TOKENS // CHUNK, 1)) for k, x in given.items()}
            _, (hidden, aux, chosen) = jax.lax.scan(read, _cache(cfg, plan), pieces)
            hidden = jnp.concatenate(hidden, 1)
            hidden = jnp.where(live[..., None], hidden, 0)
            return jnp.sum(hidden * cotangent), (hidden, aux, chosen)

        (_, (hidden, aux, chosen)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return {"hidden": hidden, "grads": grads, "aux": aux}, chosen

    params = jax.device_put(weights(layer), plan.shardings(cfg)) if plan else weights(layer)
    found, chosen = run(params, given)
    return found, [np.asarray(x) for x in chosen]


def decode(layer: str, packed: bool, plan: Plan | None):
    """Single tokens behind a chunk; the last document goes on."""
    cfg, given = config(layer), rows(False)
    model = Model(cfg, plan.ops() if plan else local())
    start = {k: x[:, : CHUNK] for k, x in given.items()}
    if packed:
        seg = np.where(np.arange(CHUNK) < 320, 0, 1)
        start |= {"seg": np.broadcast_to(seg, (ROWS, CHUNK)).astype(np.int32)}
        start |= {"pos": start["pos"] - 320 * start["seg"]}

    @functools.partial(jax.jit, donate_argnums=1, static_argnames="aligned")
    def step(params, cache, piece, aligned):
        fresh = None if aligned else jnp.ones(piece["ids"].shape, bool)
        out = model.apply(params, **piece, cache=cache, fresh=fresh, aligned=aligned)
        return out.cache, out.hidden, reports(out.aux) | {"chosen": _choices(
            out.aux, "mixer", "chosen")}

    params = jax.device_put(weights(layer), plan.shardings(cfg)) if plan else weights(layer)
    cache, _, _ = step(params, _cache(cfg, plan), start, True)
    found, chosen = [], []
    for i in range(DECODED):
        piece = {"ids": given["ids"][:, CHUNK + i : CHUNK + i + 1],
                 "pos": start["pos"][:, -1:] + 1 + i, "seg": start["seg"][:, -1:]}
        cache, hidden, aux = step(params, cache, piece, False)
        chosen += [np.asarray(x) for x in aux.pop("chosen")]
        found.append((hidden, aux))
    return found, chosen


def _cache(cfg: ModelConfig, plan: Plan | None):
    cache = empty_cache(cfg, ROWS, TOKENS, ways=plan.ways if plan else 1)
    if plan is None:
        return cache
    place = jax.lax.with_sharding_constraint if _traced() else jax.device_put
    return place(cache, plan.cache_shardings(cache))


def _traced() -> bool:
    return isinstance(jnp.zeros(()), jax.core.Tracer)


RUN = {"whole": whole, "chunked": chunked, "decode": decode}


@functools.cache
def reference(layer: str, packed: bool, mode: str):
    """The answer of one device; its gaps are wide enough for choices to be compared."""
    if layer in CHOOSE:
        assert gap(layer, packed) > GAP, f"{layer}: choices closer than {GAP}"
    return jax.tree.map(np.asarray, RUN[mode](layer, packed, None))


@functools.cache
def gap(layer: str, packed: bool) -> float:
    """The smallest distance between a chosen and a rejected score, of blocks or of experts."""
    seen = []
    ops = local()

    def spy(*args, k):
        scores, ids = ops.top_blocks(*args, k=k + 1)
        jax.debug.callback(lambda s: seen.append(_smallest(np.asarray(s))), scores)
        return scores[..., :k], ids[..., :k]

    model = Model(config(layer), dataclasses.replace(ops, top_blocks=spy))
    out, kept = model.apply(
        weights(layer), **rows(packed),
        capture_intermediates=lambda module, _: module.name == "ffn_norm",
    )
    jax.block_until_ready(out.hidden)
    jax.effects_barrier()
    params = weights(layer)["params"]["group_0"]
    for name, part in kept["intermediates"]["group_0"].items():
        ffn = params[name]["ffn"]
        if "router" in ffn:
            x = part["ffn_norm"]["__call__"][0][0]
            logits = np.einsum("btd,de->bte", np.asarray(x, np.float64), ffn["router"][0])
            scores = np.sort(1 / (1 + np.exp(-logits)) + ffn["bias"][0], -1)[..., ::-1]
            scores = scores[rows(packed)["seg"] >= 0]
            seen.append(_smallest(scores[..., : MOE.top_k + 1]))
    return min(seen, default=np.inf)


def _smallest(best_first: np.ndarray) -> float:
    known = np.isfinite(best_first[..., -1])
    return float(np.min(-np.diff(best_first[known][:, -2:]), initial=np.inf))


def difference(got, want) -> float:
    """The largest over all tensors of max|got - want| / max|want|."""
    worst = 0.0
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        if g.shape != w.shape or not (np.isfinite(g) == np.isfinite(w)).all():
            return np.inf
        finite = np.isfinite(w)
        scale = np.abs(w[finite]).max(initial=0.0)
        off = np.abs(g[finite] - w[finite]).max(initial=0.0)
        worst = max(worst, off / scale if scale > 0 else off)
    return float(worst)
