"""What do weights of 8 and 4 bits cost?

Ask     Held-out loss of the trained byte model, its matrices rounded: int8 (a scale per output),
        FP8 (blocks of 128 x 128) and INT4 (groups of 32 inputs), as released models are.
Run     python -m experiments.ablations.weights --out runs/weights --jobs 2
Cost    2 runs of 0.25 M tokens; 78 s with --jobs 2.
Answer  Next to nothing at this size: 2.439 nats/byte in float32, 2.439 int8, 2.440 FP8, 2.442 INT4
        (mean of two seeds, which are 0.036 apart; commit 727db88).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from kimijax.sweep import Done, Settings, Sweep, main, product

STEPS, RATE = 61, 0.024


def runs(done: Sequence[Done]) -> Iterator[Settings]:
    """Two seeds."""
    yield from product(seed=[0, 1])


def run(settings: Settings, out: Path) -> dict:
    """Train, then read held-out text with rounded weights."""
    from experiments.ablations.small import held_out, model_of, train
    from kimijax.optim import muon

    cfg = model_of()
    params, result = train(cfg, out, muon, seed=settings["seed"], lr=RATE, steps=STEPS)
    return {"float32": result["loss"]} | {
        name: held_out(cfg, rounded(cfg, params, round_matrix))
        for name, round_matrix in (("int8", int8), ("fp8", fp8), ("int4", int4))
    }


def rounded(cfg, params, round_matrix):
    """The parameters with every matrix (in x out) but embedding and head rounded."""
    import flax.linen as nn
    import jax

    from kimijax.model import Model, abstract_params
    from kimijax.ops.attend import local
    from kimijax.optim.matrices import matrices_of

    names = nn.get_partition_spec(abstract_params(Model(cfg, local())))

    def one(names, w):
        matrices = matrices_of(names)
        if matrices is None or "vocab" in names:
            return w
        return matrices.unstack(jax.vmap(round_matrix)(matrices.stack(w)), w.shape)

    return jax.tree.map(one, names, params, is_leaf=lambda x: isinstance(x, tuple))


def int8(w):
    """Codes of 8 bits, a scale for each output."""
    import jax.numpy as jnp

    scale = jnp.abs(w).max(0, keepdims=True) / 127
    return jnp.round(w / jnp.maximum(scale, 1e-30)) * scale


def int4(w):
    """Codes from -8 to 7, a scale for 32 inputs of an output."""
    import jax.numpy as jnp

    pad = -w.shape[0] % 32
    groups = jnp.pad(w, ((0, pad), (0, 0))).reshape(-1, 32, w.shape[1])
    scale = jnp.abs(groups).max(1, keepdims=True) / 7.5
    codes = jnp.clip(jnp.round(groups / jnp.maximum(scale, 1e-30)), -8, 7)
    return (codes * scale).reshape(-1, w.shape[1])[: w.shape[0]]


def fp8(w):
    """E4M3 codes, a scale for 128 x 128 of them."""
    import jax.numpy as jnp

    pads = [(0, -n % 128) for n in w.shape]
    rows, columns = ((n + p) // 128 for n, (_, p) in zip(w.shape, pads, strict=True))
    blocks = jnp.pad(w, pads).reshape(rows, 128, columns, 128)
    scale = jnp.maximum(jnp.abs(blocks).max((1, 3), keepdims=True) / 448, 1e-30)
    blocks = (blocks / scale).astype(jnp.float8_e4m3fn).astype(w.dtype) * scale
    return blocks.reshape(rows * 128, columns * 128)[: w.shape[0], : w.shape[1]]


if __name__ == "__main__":
    main(Sweep(runs, run), __doc__)
