"""Which attention, at which context?

Ask     Held-out loss of the byte model by the kind of its layers and the length of its rows, at the
        same number of tokens.
Run     python -m experiments.ablations.attention --out runs/attention --jobs 2
Cost    10 runs of 0.25 M tokens; 8 minutes with --jobs 2, other work running.
Answer  Nats/byte at contexts 256 and 1,024, one seed (others differ by 0.03; commit 727db88), and
        bytes of cache a token: kda hybrid 1.938 and 2.371 (80), window 2.323 and 2.414 (none),
        blocks 2.330 and 2.434 (130), mla 2.414 and 2.742 (240), compressed 2.565 and 2.717 (130).
        So few tokens teach what is near: layers with a short convolution or window are ahead, and
        nothing here says what they do with a long context.

mla         exact, all three layers
window      of 64 tokens, all three
blocks      a window layer, then two that read 4 chosen blocks of 32 besides their neighbourhood,
            trained as they are read; nothing teaches the index, which starts tied to the keys (as
            MoBA's choice by mean keys, arXiv:2502.13189)
compressed  the same layers, trained with exact attention and a loss that teaches the index where it
            looks; read with chosen blocks
kda hybrid  two layers of delta attention and one of MLA without positions
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from kimijax.sweep import Done, Plot, Settings, Sweep, main, product

STEPS, TOKENS, RATE = 61, 4096, 0.024
KINDS = ("mla", "window", "blocks", "compressed", "kda hybrid")


def runs(done: Sequence[Done]) -> Iterator[Settings]:
    """Every kind at two contexts."""
    yield from product(attention=KINDS, context=[256, 1024], seed=[0])


def model(kind: str):
    """The layers of a kind."""
    from experiments.ablations.small import mla, model_of
    from kimijax.config import (
        CompressedConfig,
        IndexConfig,
        KDAConfig,
        RopeConfig,
        WindowConfig,
    )

    window = WindowConfig(heads=4, kv_heads=2, head_dim=24, window=64,
                          rope=RopeConfig(theta=1e4, dim=24))
    index = IndexConfig(dim=16, keys=1, block=32, top_k=4, group=64)
    chosen = CompressedConfig(heads=4, kv_rank=32, nope_dim=24, v_dim=24, window=32, index=index)
    kda = KDAConfig(heads=4, head_dim=24, gate_rank=24)
    nope = mla(rope=None)
    return model_of(*{
        "mla": (mla(),) * 3, "window": (window,) * 3, "blocks": (window, chosen, chosen),
        "compressed": (window, chosen, chosen), "kda hybrid": (kda, kda, nope),
    }[kind])


def run(settings: Settings, out: Path) -> dict:
    """Train one model."""
    from experiments.ablations.small import train
    from kimijax.metrics import describe
    from kimijax.optim import muon

    length, cfg = settings["context"], model(settings["attention"])
    _, result = train(
        cfg, out, muon, seed=settings["seed"], lr=RATE, steps=STEPS, length=length,
        rows=TOKENS // length, evaluate_at=(length,), exact=settings["attention"] == "compressed",
    )
    size = describe(cfg)
    return result | {"parameters": size["parameters"],
                     "cache_bytes_per_token": size["cache_bytes_per_token"]}


if __name__ == "__main__":
    main(Sweep(runs, run, (Plot(x="context", y="loss", line="attention", log_x=True),)), __doc__)
