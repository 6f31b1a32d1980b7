"""Learning rates over steps, as optax schedules."""

import optax

from kimijax.errors import UserError


def wsd(
    peak: float, warmup: int, stable: int, decay: int, final: float = 0.0
) -> optax.Schedule:
    """Linear warm-up, a plateau, then a cosine from `peak` to `final`; constant after that.

    Kimi K2: 500 steps to 2e-4, constant for 10T tokens, a cosine to 2e-5 over 5.5T.
    """
    _check(peak, warmup, stable, decay, final)
    fall = optax.cosine_decay_schedule(peak, max(decay, 1), final / peak)
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup) if warmup else optax.constant_schedule(peak),
         optax.constant_schedule(peak), fall if decay else optax.constant_schedule(peak)],
        [warmup, warmup + stable],
    )


def cosine(peak: float, warmup: int, steps: int, final: float = 0.0) -> optax.Schedule:
    """Linear warm-up within `steps`, then a cosine from `peak` to `final` over the rest."""
    if warmup > steps:
        raise UserError(f"warm-up of {warmup} steps is longer than the schedule of {steps}")
    return wsd(peak, warmup, 0, steps - warmup, final)


def _check(peak, warmup, stable, decay, final) -> None:
    if not 0 <= final <= peak or not peak > 0:
        raise UserError(f"a schedule from {peak!r} to {final!r}: it must end at or above 0, "
                        "and not above its peak, which is above 0")
    if min(warmup, stable, decay) < 0:
        raise UserError(f"a schedule of {warmup}, {stable} and {decay} steps: none may be below 0")
