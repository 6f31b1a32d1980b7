"""Which rotary scaling extends the context?

Ask     Held-out loss at 4 times the length of training: as it is, with a larger theta, and with
        YaRN; before and after 20 steps at that length.
Run     python -m experiments.ablations.rope --out runs/rope --jobs 2
Cost    6 runs of 0.33 M tokens; 7 minutes with --jobs 2, other work running.
Answer  None that this model tells apart. Nats/byte at 1,024 before and after, mean and deviation of
        two seeds (commit 727db88): none 2.686 +- 0.005 and 2.667 +- 0.004, theta 2.672 +- 0.026 and
        2.654 +- 0.026, YaRN 2.686 +- 0.009 and 2.664 +- 0.015. A model this small reads little of
        what is far; at 256 it has 2.439 on other rows.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from kimijax.sweep import Done, Settings, Sweep, main, product

STEPS, MORE, RATE, FACTOR = 61, 20, 0.024, 4
SHORT = 256
SCALINGS = ("none", "theta", "yarn")


def runs(done: Sequence[Done]) -> Iterator[Settings]:
    """Three scalings, two seeds."""
    yield from product(scaling=SCALINGS, seed=[0, 1])


def model(scaling: str):
    """The byte model with its rotary positions scaled."""
    from experiments.ablations.small import LAYERS, mla, model_of
    from kimijax.config import RopeConfig, YarnConfig

    rope = {
        "none": RopeConfig(theta=1e4, dim=8),
        "theta": RopeConfig(theta=1e4 * FACTOR ** (8 / 6), dim=8),  # NTK-aware: slow channels / 4
        "yarn": RopeConfig(theta=1e4, dim=8, yarn=YarnConfig(factor=FACTOR, original=SHORT)),
    }[scaling]
    return model_of(*(mla(rope=rope),) * LAYERS)


def run(settings: Settings, out: Path) -> dict:
    """Train short without scaling, then long with it."""
    from experiments.ablations.small import held_out, train
    from kimijax.optim import muon

    seed, long = settings["seed"], SHORT * FACTOR
    params, short = train(model("none"), out / "short", muon, seed=seed, lr=RATE, steps=STEPS)
    cfg = model(settings["scaling"])
    _, extended = train(
        cfg, out / "long", muon, seed=seed, lr=RATE / 4, steps=MORE, length=long, rows=4,
        start=params, evaluate_at=(long, SHORT),
    )
    return {
        "short": short["loss"], "long_untrained": held_out(cfg, params, long),
        "long_trained": extended["loss"], "short_after": extended[f"loss_{SHORT}"],
    }


if __name__ == "__main__":
    main(Sweep(runs, run), __doc__)
