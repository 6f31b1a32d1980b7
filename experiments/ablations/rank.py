"""How small may the latent be?

Ask     Held-out loss of the byte model by the rank of its latents, which is what is cached.
Run     python -m experiments.ablations.rank --out runs/rank --jobs 2
Cost    8 runs of 0.25 M tokens; about 6 minutes with --jobs 2, other work running.
Answer  Nats/byte by rank, mean and deviation of two seeds, and bytes of cache a token (commit
        727db88): 4: 2.461 +- 0.015 (72), 8: 2.422 +- 0.024 (96), 16: 2.419 +- 0.006 (144),
        32: 2.439 +- 0.036 (240). Of so small a model nothing is lost down to 8, at 4 a little.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from kimijax.sweep import Done, Plot, Settings, Sweep, main, product

STEPS, RATE = 61, 0.024


def runs(done: Sequence[Done]) -> Iterator[Settings]:
    """Four ranks, two seeds."""
    yield from product(rank=[4, 8, 16, 32], seed=[0, 1])


def run(settings: Settings, out: Path) -> dict:
    """Train one model."""
    from experiments.ablations.small import LAYERS, mla, model_of, train
    from kimijax.metrics import describe
    from kimijax.optim import muon

    cfg = model_of(*(mla(kv_rank=settings["rank"]),) * LAYERS)
    _, result = train(cfg, out, muon, seed=settings["seed"], lr=RATE, steps=STEPS)
    size = describe(cfg)
    return result | {"parameters": size["parameters"],
                     "cache_bytes_per_token": size["cache_bytes_per_token"]}


if __name__ == "__main__":
    main(Sweep(runs, run, (Plot(x="rank", y="loss"),)), __doc__)
