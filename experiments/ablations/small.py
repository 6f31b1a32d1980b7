"""What the ablations share: a byte model of at most 0.4 M parameters, and its training.

Text is the standard library of this interpreter, Python files as bytes; one in five is held out.
"""

import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kimijax.config import (
    GroupConfig,
    LayerConfig,
    MLAConfig,
    ModelConfig,
    RopeConfig,
    SwiGLUConfig,
)

VOCAB, WIDTH, FFN, LAYERS = 256, 96, 256, 3
LENGTH, ROWS = 256, 16
STEPS = 244  # of LENGTH x ROWS tokens: one million
HELD_OUT = 64  # rows


def mla(**changes) -> MLAConfig:
    """Four heads over a latent of 32."""
    fields = dict(heads=4, q_rank=None, kv_rank=32, nope_dim=24, rope_dim=8, v_dim=24,
                  rope=RopeConfig(theta=1e4, dim=8))
    return MLAConfig(**fields | changes)


def model_of(*mixers, **fields) -> ModelConfig:
    """A model with these mixers, three MLA layers if none is given."""
    mixers = mixers or (mla(),) * LAYERS
    ffn = SwiGLUConfig(width=FFN)
    groups = tuple(GroupConfig(layers=(LayerConfig(mixer=m, ffn=ffn),)) for m in mixers)
    if len(set(mixers)) == 1:
        groups = (GroupConfig(layers=groups[0].layers, repeat=len(mixers)),)
    return ModelConfig(vocab=VOCAB, width=WIDTH, groups=groups, **fields)


class Texts:
    """Documents in memory, as `packed_rows` reads them."""

    def __init__(self, documents: Sequence[bytes]):
        self._documents = [np.frombuffer(text, np.uint8) for text in documents]
        self.lengths = np.array([len(text) for text in documents], np.int64)

    def read(self, spans) -> list[np.ndarray]:
        """Bytes of (document, offset, length)."""
        return [self._documents[d][at : at + n] for d, at, n in spans]

    def masks(self, spans) -> list[np.ndarray]:
        """Everything is learned."""
        return [np.ones(n, np.float32) for _, _, n in spans]


def texts(split: str) -> Texts:
    """One side of the standard library."""
    from kimijax.data import corpus

    return Texts(corpus.load_documents(split, roots=[Path(sysconfig.get_path("stdlib"))]))


def train(
    cfg: ModelConfig, out: Path, optimizer_of: Callable[[Any, Any], Any], *, seed: int, lr: float,
    steps: int = STEPS, length: int = LENGTH, rows: int = ROWS, tau: float | None = None,
    plan=None, exact: bool = False, start: Any = None, evaluate_at: Sequence[int] = (LENGTH,),
) -> tuple[Any, dict]:
    """Train, resumably, and measure on held-out text; (params, result).

    optimizer_of  (abstract params, schedule) -> optax transformation
    tau           of QK-Clip; None: without
    exact         compressed layers are trained on all of the past, and their index by its loss
    start         params to begin from; None: fresh ones
    evaluate_at   lengths of held-out rows: "loss" is of the first, "loss_N" of others; nats/byte
    """
    import jax

    from kimijax.cache import run_length
    from kimijax.config_tree import to_dict
    from kimijax.data.rows import batches, packed_rows
    from kimijax.metrics import prefill_flops
    from kimijax.model import Model, abstract_params
    from kimijax.ops.attend import local
    from kimijax.optim import cosine, qk_clip
    from kimijax.train import Phase, fit, init_state, make_step, read_log, state_shardings
    from kimijax.train.loss import language_model
    from kimijax.train.rows import LanguageRows, placed

    model = Model(cfg, local(exact=exact) if plan is None else plan.ops())
    optimizer = optimizer_of(abstract_params(model), cosine(lr, steps // 10, steps, lr / 10))
    where = None if plan is None else state_shardings(model, optimizer, plan)
    prepare, runs = (lambda x: x), None
    if plan is not None:
        prepare = lambda x: placed(plan, cfg, rows, x)  # noqa: E731
        runs = plan.layout(cfg, length).order.runs
    loss = language_model(model, runs=runs, index=float(exact))
    clip = None if tau is None else qk_clip(cfg, tau)
    state = init_state(model, optimizer, seed, where)
    if start is not None:
        state = state._replace(params=start)
    source = packed_rows(texts("train"), length, seed, run_length(cfg), epochs=1)
    phase = Phase(
        f"{length}", steps, make_step(loss, optimizer, qk_clip=clip, where=where),
        lambda: LanguageRows(batches(source, rows), prepare), rows * length,
        3 * rows * sum(prefill_flops(cfg, length).values()),
    )
    run = {"model": to_dict(cfg), "seed": seed, "lr": lr, "steps": steps, "length": length,
           "rows": rows, "tau": tau}
    state = fit(state, [phase], out, run)
    log = read_log(out / "metrics.jsonl")
    params = jax.device_get(state.params)
    held = {n: held_out(cfg, params, n) for n in evaluate_at}
    first, *others = evaluate_at
    return params, {
        "loss": held[first], **{f"loss_{n}": held[n] for n in others},
        "train_loss": float(np.mean([line["loss"] for line in log[-20:]])),
        "max_logit": max(line.get("max_logit") or 0.0 for line in log),
        "tokens": steps * rows * length,
        "seconds": sum(line["seconds"] for line in log),
        "skipped": int(state.skipped),
    }


def held_out(cfg: ModelConfig, params, length: int = LENGTH, rows: int = HELD_OUT) -> float:
    """Mean loss on held-out rows, nats/byte; the same number of bytes at every length."""
    import jax

    from kimijax.cache import run_length
    from kimijax.data.rows import batches, packed_rows
    from kimijax.model import Model
    from kimijax.ops.attend import local
    from kimijax.train.loss import language_model
    from kimijax.train.rows import rows_of

    loss = jax.jit(language_model(Model(cfg, local())))
    source = packed_rows(texts("held_out"), length, 0, run_length(cfg))
    rows, each = max(1, rows * LENGTH // length), max(1, 8 * LENGTH // length)
    batch, total, weight = batches(source, each), 0.0, 0.0
    for _ in range(rows // each):
        one = rows_of(*next(batch))
        total += float(loss(params, one)[0]) * one.weight.sum()
        weight += one.weight.sum()
    return float(total / weight)
