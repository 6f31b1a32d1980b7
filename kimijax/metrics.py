"""What a computation needs and what the machine gives: FLOPs, peak, memory, compile time."""

import math
import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from kimijax.cache import empty_cache, run_length
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
from kimijax.config_tree import expanded
from kimijax.model import parameter_shapes
from kimijax.rows import PAGE


def prefill_flops(cfg: ModelConfig, n: int, exact: bool = False) -> dict[str, float]:
    """FLOPs that reading n tokens from empty needs, by part; matrix products only.

    A multiplication and an addition count two. A query counts the keys it sees, the index the
    summary keys of the past, a selection the keys of its chosen blocks. What is masked, padded
    or recomputed counts nothing, nor do norms, softmax, convolutions and embedding. The head
    counts: reading predicts every next token.
    """
    total = {"linear": 0.0, "window": 0.0, "attention": 0.0, "index": 0.0, "ffn": 0.0}
    total["head"] = 2.0 * n * cfg.width * cfg.vocab
    for parts in cfg.of_layers(lambda layer: _layer_macs(cfg, layer, n, exact)):
        for part, macs in parts.items():
            total[part] += 2.0 * macs
    return total


def decode_flops(cfg: ModelConfig, n: int) -> dict[str, float]:
    """FLOPs of one more token behind a cache of n, by the parts of `prefill_flops`.

    What a token adds to a prefill, but latents are attended to as they lie (absorbed): MLA
    multiplies 2 r + p numbers a pair and not n + p + v.
    """
    step = run_length(cfg)  # groups of queries share a choice: the mean over one
    more, less = prefill_flops(cfg, n + step), prefill_flops(cfg, n)
    total = {part: (more[part] - less[part]) / step for part in more}
    for layer in cfg.layers:
        match layer.mixer:
            case MLAConfig(heads=h, kv_rank=r, nope_dim=k, v_dim=v) as a:
                total["attention"] += 2.0 * min(a.window or n, n) * h * (2 * r - k - v)
    return total


def _layer_macs(cfg: ModelConfig, layer: LayerConfig, n: int, exact: bool) -> dict[str, float]:
    d = cfg.width
    match layer.ffn:
        case SwiGLUConfig(width=f):
            macs = {"ffn": n * 3 * d * f}
        case MoEConfig() as m:
            macs = {"ffn": n * d * (3 * m.top_k * m.width + 3 * m.shared_width + m.experts)}
    match layer.mixer:
        case WindowConfig() as w:
            macs["linear"] = n * d * w.head_dim * 2 * (w.heads + w.kv_heads)
            pairs = _window_pairs(n, w.window or n)
            macs["window" if w.window else "attention"] = pairs * w.heads * 2 * w.head_dim
        case MLAConfig() as a:
            macs["linear"], macs["attention"] = _mla_macs(d, a, n)
        case KDAConfig() as k:
            macs["linear"], macs["attention"] = _kda_macs(d, k, n)
        case CompressedConfig() as c:
            macs |= _compressed_macs(d, c, n, exact)
    return macs


def _window_pairs(n: int, w: int) -> float:
    """Pairs of a query and one of the last w keys, itself included."""
    short = min(n, w)
    return short * (short + 1) / 2 + (n - short) * w


def _mla_macs(d: int, a: MLAConfig, n: int) -> tuple[float, float]:
    rope = a.rope_dim
    query = d * a.q_rank + a.q_rank * a.heads * (a.nope_dim + rope) if a.q_rank else (
        d * a.heads * (a.nope_dim + rope)
    )
    latent = d * (a.kv_rank + rope) + a.kv_rank * a.heads * (a.nope_dim + a.v_dim)
    pairs = _window_pairs(n, a.window or n)
    linear = n * (query + latent + a.heads * a.v_dim * d)
    return linear, pairs * a.heads * (a.nope_dim + rope + a.v_dim)


def _kda_macs(d: int, k: KDAConfig, n: int) -> tuple[float, float]:
    """Projections and gates; the state's decay, correction, update and reading per token."""
    size = k.heads * k.head_dim
    low_rank = 2 * k.gate_rank * (d + size)
    return n * (4 * d * size + low_rank + d * k.heads), n * k.heads * 3 * k.head_dim**2


def _compressed_macs(d: int, c: CompressedConfig, n: int, exact: bool) -> dict[str, float]:
    i, per_pair = c.index, c.heads * 2 * c.kv_rank
    absorb = c.heads * c.kv_rank * (c.nope_dim + c.v_dim)
    linear = n * (d * c.heads * (c.nope_dim + c.v_dim) + c.taps * d * c.kv_rank + absorb)
    if exact:
        return {"linear": linear, "attention": n * (n + 1) / 2 * per_pair}
    starts = np.arange(0, n, i.group, dtype=np.int64)  # groups of queries, one choice each
    sizes = np.minimum(i.group, n - starts).astype(np.float64)
    local = np.maximum(starts - c.window, 0)
    blocks = local // i.block  # candidates of the group's choice
    near = (starts - local) * sizes + sizes * (sizes + 1) / 2
    chosen = np.minimum(blocks, i.top_k) * i.block * sizes
    whole = n // i.block
    summary = whole * i.keys * (2 * i.block * c.kv_rank + c.kv_rank * i.dim)
    query = len(starts) * d * i.dim
    return {
        "linear": linear,
        "window": float(near.sum()) * per_pair,
        "attention": float(chosen.sum()) * per_pair,
        "index": float(blocks.sum()) * i.keys * i.dim + summary + query,
    }


def matmul_peak(size: int = 2048, repeats: int = 10) -> float:
    """FLOP/s of the best of `repeats` float32 products of two size x size matrices under jit."""
    a = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), jnp.float32)
    f = jax.jit(jnp.matmul)
    jax.block_until_ready(f(a, a))
    best = np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(f(a, a))
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_rss_gib() -> float:
    """The largest resident set this process has had, GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class CompileClock:
    """Seconds that JAX spent tracing, lowering and compiling since the clock was made."""

    EVENTS = (
        "/jax/core/compile/jaxpr_trace_duration",
        "/jax/core/compile/jaxpr_to_mlir_module_duration",
        "/jax/core/compile/backend_compile_duration",
    )

    def __init__(self):
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, seconds: float, **_) -> None:
        if event in self.EVENTS:
            self.seconds += seconds


def describe(cfg: ModelConfig, dtype: jnp.dtype = jnp.bfloat16) -> dict:
    """What a model is and costs: layers by kind, parameters, bytes of cache and state.

    A token uses all parameters but those of the experts it is not routed to. The cache is what
    grows with the tokens read, the state what does not, both for one sequence in `dtype`.
    """
    kinds: dict[str, int] = {}
    for layer in cfg.layers:
        kind = " + ".join(type(x).__name__.removesuffix("Config") for x in (layer.mixer, layer.ffn))
        kinds[kind] = kinds.get(kind, 0) + 1
    # However weights are held, each is one parameter, and scales are none.
    total = sum(x.size for x in parameter_shapes(expanded(cfg)).values())
    idle = sum(
        (f.experts - f.top_k) * 3 * f.width * cfg.width
        for f in (layer.ffn for layer in cfg.layers) if isinstance(f, MoEConfig)
    )
    per_token, state = _cache_bytes(cfg, dtype)
    return {
        "layers": kinds,
        "width": cfg.width,
        "vocab": cfg.vocab,
        "context": cfg.context,
        "parameters": total,
        "active_parameters": total - idle,
        "active_parameters_without_embedding": total - idle - 2 * cfg.vocab * cfg.width,
        "cache_dtype": jnp.dtype(dtype).name,
        "cache_bytes_per_token": per_token,
        "state_bytes_per_sequence": state,
    }


def _cache_bytes(cfg: ModelConfig, dtype: jnp.dtype) -> tuple[float, int]:
    """Bytes of layer states: per slot, and what is there whatever the number of slots."""
    step = math.lcm(PAGE, run_length(cfg))

    def sizes(slots):
        cache = jax.eval_shape(lambda: empty_cache(cfg, 1, slots, dtype))
        return [x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.states)]

    short, long = sizes(step), sizes(2 * step)
    growing = sum(b - a for a, b in zip(short, long, strict=True)) / step
    return (
        int(growing) if growing == int(growing) else growing,
        sum(a for a, b in zip(short, long, strict=True) if a == b),
    )
