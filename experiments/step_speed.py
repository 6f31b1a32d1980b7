"""Is a training step as fast as one written by hand, and does the data hide behind it?

Ask     Time of our step of a small model with experts over that of a plain jax function of the same
        matrix products: dense causal attention over expanded heads, experts of fixed capacity by
        gathers and one einsum, AdamW by optax. And the loop's time per step, data, log and all,
        over the step alone.
Run     python -m experiments.step_speed [--rounds 9] [--out DIR]
Cost    two minutes on two cores.
Answer  555 ms, 1.07 of the step by hand; in the loop 0.97 of the step alone (commit e53573b, quiet;
        with other work running 1.09 and 0.94, 1.05 and 0.84).

The peer keeps no statistics of logits, balances nothing, guards nothing, and drops tokens above an
expert's capacity (1.25 of its share); ours drops none.
"""

import argparse
import tempfile
from pathlib import Path

from kimijax.cli import run_module

ROWS, LENGTH, VOCAB, WIDTH = 8, 512, 256, 128
HEADS, RANK, NOPE, ROPE = 4, 64, 32, 16
EXPERTS, CHOICES, FFN, LAYERS = 8, 2, 128, 2
CAPACITY, RATE = 1.25, 1e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the measurement."""
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", metavar="DIR", help="of the loop; default: a temporary one")


def main(args: argparse.Namespace) -> int:
    """Measure in turn, print the ratios."""
    import jax

    from experiments.ablations.small import Texts
    from experiments.ring_speed import rounds
    from kimijax.data import corpus
    from kimijax.data.rows import batches, packed_rows
    from kimijax.metrics import prefill_flops
    from kimijax.train.rows import LanguageRows

    texts = Texts(corpus.load_documents("train")[:2000])
    source = packed_rows(texts, LENGTH, 0)
    rows = next(LanguageRows(batches(source, ROWS)))
    cfg, state, step = ours()
    theirs, params = by_hand()
    # Neither gives its memory away here, so that the same call can be repeated.
    calls = {
        "ours": (jax.jit(step.__wrapped__), (state, rows)),
        "by hand": (jax.jit(theirs), (*params, rows)),
    }
    found = rounds(calls, args.rounds)
    flops = 3 * ROWS * sum(prefill_flops(cfg, LENGTH).values())
    for name, seconds in found.items():
        print(f"{name}: {seconds * 1e3:.0f} ms a step, {flops / seconds / 1e9:.0f} GFLOP/s needed")
    print(f"ours over by hand: {found['ours'] / found['by hand']:.2f}")
    with tempfile.TemporaryDirectory() as directory:
        seconds, alone = looped(source, step, state, Path(args.out or directory), args.rounds)
    print(f"in the loop, data and log included: {seconds * 1e3:.0f} ms a step, "
          f"{seconds / alone:.2f} of the step alone ({alone * 1e3:.0f} ms)")
    return 0


def model():
    """The config of our side."""
    from kimijax.config import (
        GroupConfig,
        LayerConfig,
        MLAConfig,
        ModelConfig,
        MoEConfig,
        RopeConfig,
    )

    mla = MLAConfig(heads=HEADS, q_rank=None, kv_rank=RANK, nope_dim=NOPE, rope_dim=ROPE,
                    v_dim=NOPE, rope=RopeConfig(theta=1e4, dim=ROPE))
    moe = MoEConfig(experts=EXPERTS, top_k=CHOICES, width=FFN, shared_width=FFN)
    group = GroupConfig(layers=(LayerConfig(mixer=mla, ffn=moe),), repeat=LAYERS)
    return ModelConfig(vocab=VOCAB, width=WIDTH, groups=(group,))


def ours():
    """(config, state, step), with all that a step of ours does."""
    from kimijax.model import Model, abstract_params
    from kimijax.ops.attend import local
    from kimijax.optim import adamw, qk_clip
    from kimijax.train import init_state, make_step
    from kimijax.train.loss import language_model

    cfg = model()
    net = Model(cfg, local())
    optimizer = adamw(abstract_params(net), RATE)
    step = make_step(language_model(net), optimizer, balance_rate=1e-3,
                     qk_clip=qk_clip(cfg, 100.0), spike=10.0)
    return cfg, init_state(net, optimizer, 0), step


def by_hand():
    """(step, (params, optimizer state)): (params, state, rows) -> both, one after the update."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) * shape[-2] ** -0.5, jnp.float32)

    layers = [
        {"q": draw(WIDTH, HEADS * (NOPE + ROPE)), "kv": draw(WIDTH, RANK),
         "k_rope": draw(WIDTH, ROPE), "uk": draw(RANK, HEADS * NOPE),
         "uv": draw(RANK, HEADS * NOPE), "out": draw(HEADS * NOPE, WIDTH),
         "router": draw(WIDTH, EXPERTS), "gate": draw(EXPERTS, WIDTH, FFN),
         "up": draw(EXPERTS, WIDTH, FFN), "down": draw(EXPERTS, FFN, WIDTH),
         "shared": (draw(WIDTH, FFN), draw(WIDTH, FFN),
                                                       draw(FFN, WIDTH))}
        for _ in range(LAYERS)
    ]
    params = {"embed": draw(VOCAB, WIDTH), "head": draw(WIDTH, VOCAB), "layers": layers}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(RATE, 0.9, 0.95, weight_decay=0.1)
    )

    def loss(params, rows):
        x = params["embed"][rows.ids]
        for layer in params["layers"]:
            x = x + attention(layer, norm(x), rows)
            x = x + experts(layer, norm(x))
        logits = norm(x) @ params["head"]
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, rows.targets)
        return jnp.sum(entropy * rows.weight) / jnp.sum(rows.weight)

    def step(params, state, rows):
        grads = jax.grad(loss)(params, rows)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step, (params, optimizer.init(params))


def norm(x):
    """x / rms(x)"""
    import jax
    import jax.numpy as jnp

    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def attention(layer, x, rows):
    """Latent attention over expanded heads, all pairs of a row and a mask."""
    import jax
    import jax.numpy as jnp

    b, t, _ = x.shape
    q = (x @ layer["q"]).reshape(b, t, HEADS, NOPE + ROPE)
    latent, shared = norm(x @ layer["kv"]), turned(x @ layer["k_rope"], rows.pos)
    key = (latent @ layer["uk"]).reshape(b, t, HEADS, NOPE)
    value = (latent @ layer["uv"]).reshape(b, t, HEADS, NOPE)
    turned_q = turned(q[..., NOPE:], rows.pos[..., None])
    logits = jnp.einsum("bthn,bshn->bhts", q[..., :NOPE], key)
    logits = (logits + jnp.einsum("bthp,bsp->bhts", turned_q, shared)) * (NOPE + ROPE) ** -0.5
    seen = (rows.seg[:, :, None] == rows.seg[:, None]) & (rows.pos[:, :, None] >= rows.pos[:, None])
    weights = jax.nn.softmax(jnp.where(seen[:, None], logits, -1e30), -1)
    return jnp.einsum("bhts,bshn->bthn", weights, value).reshape(b, t, -1) @ layer["out"]


def turned(x, pos):
    """Rotary positions."""
    import jax.numpy as jnp

    half = x.shape[-1] // 2
    angle = pos[..., None] * 1e4 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def experts(layer, x):
    """A shared expert, and of the routed ones those with the best scores, within their capacity."""
    import jax
    import jax.numpy as jnp

    flat = x.reshape(-1, WIDTH)
    n, room = flat.shape[0], int(flat.shape[0] * CHOICES / EXPERTS * CAPACITY)
    weight, ids = jax.lax.top_k(jax.nn.sigmoid(flat @ layer["router"]), CHOICES)
    weight = (weight / weight.sum(-1, keepdims=True)).reshape(-1)
    ids = ids.reshape(-1)
    hot = jax.nn.one_hot(ids, EXPERTS, dtype=jnp.int32)
    place = jnp.take_along_axis(jnp.cumsum(hot, 0) - 1, ids[:, None], 1)[:, 0]
    slot = jnp.where(place < room, ids * room + place, EXPERTS * room)
    source = jnp.full(EXPERTS * room, n, jnp.int32)
    source = source.at[slot].set(jnp.arange(n * CHOICES) // CHOICES, mode="drop")
    taken = jnp.take(flat, source, axis=0, mode="fill", fill_value=0)
    taken = taken.reshape(EXPERTS, room, WIDTH)
    h = jax.nn.silu(jnp.einsum("ecd,edf->ecf", taken, layer["gate"]))
    h = h * jnp.einsum("ecd,edf->ecf", taken, layer["up"])
    out = jnp.einsum("ecf,efd->ecd", h, layer["down"]).reshape(-1, WIDTH)
    out = jnp.take(out, slot, axis=0, mode="fill", fill_value=0) * weight[:, None]
    gate, up, down = layer["shared"]
    shared = (jax.nn.silu(flat @ gate) * (flat @ up)) @ down
    return (shared + out.reshape(n, CHOICES, WIDTH).sum(1)).reshape(x.shape)


def looped(source, step, state, out: Path, steps: int) -> tuple[float, float]:
    """(seconds a step in the loop, of the same step alone right after): medians."""
    import jax
    import numpy as np

    from experiments.ring_speed import rounds
    from kimijax.data.rows import batches
    from kimijax.train import Phase, fit, read_log
    from kimijax.train.rows import LanguageRows

    rows = next(LanguageRows(batches(source, ROWS)))
    calls = {"alone": (jax.jit(step.__wrapped__), (state, rows))}
    before = rounds(calls, steps)["alone"]
    phase = Phase("speed", 3 * steps, step, lambda: LanguageRows(batches(source, ROWS)),
                  ROWS * LENGTH)
    fit(state, [phase], out, {})
    lines = read_log(out / "metrics.jsonl")[2:]
    _, fresh_state, _ = ours()
    calls = {"alone": (jax.jit(step.__wrapped__), (fresh_state, rows))}
    alone = np.mean([before, rounds(calls, steps)["alone"]])
    return float(np.median([line["seconds"] for line in lines])), float(alone)


if __name__ == "__main__":
    run_module(add_arguments, main, __doc__)
