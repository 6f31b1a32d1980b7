"""Curricula of pre-training: phases of growing context, each with its rows, rate and rope."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A phase: `rows` of `length` tokens a step; its learning rate goes from `rate` to `final`."""

    length: int
    rows: int
    steps: int
    rate: float
    final: float
    warmup: int = 0
    yarn: float | None = None  # factor by which rotary positions are stretched; None: not


def k2() -> tuple[Stage, ...]:
    """Kimi K2 (arXiv:2507.20534): 67 M tokens a step, 15.5 T in all, then longer and longer rows.

    The last phase's tokens are not published; it has those of the second.
    """
    return (
        Stage(length=4096, rows=16384, steps=149_000, rate=2e-4, final=2e-4, warmup=500),
        Stage(length=4096, rows=16384, steps=82_000, rate=2e-4, final=2e-5),
        Stage(length=4096, rows=16384, steps=5_960, rate=2e-5, final=7e-6),
        Stage(length=32_768, rows=2048, steps=894, rate=7e-6, final=7e-6),
        Stage(length=131_072, rows=512, steps=894, rate=7e-6, final=7e-6, yarn=32.0),
    )


def tiny() -> tuple[Stage, ...]:
    """The same shape in two minutes on two cores."""
    return (
        Stage(length=128, rows=8, steps=40, rate=0.01, final=0.01, warmup=10),
        Stage(length=128, rows=8, steps=20, rate=0.01, final=0.001),
        Stage(length=512, rows=2, steps=10, rate=0.001, final=0.0005),
        Stage(length=1024, rows=1, steps=10, rate=0.0005, final=0.0005, yarn=8.0),
    )


CURRICULA = {"k2": k2, "tiny": tiny}


def learning_rate(stages: tuple[Stage, ...]):
    """One schedule through all phases: a cosine from each one's rate to its final one."""
    import optax

    parts, ends, total = [], [], 0
    for stage in stages:
        if stage.warmup:
            parts.append(optax.linear_schedule(0.0, stage.rate, stage.warmup))
            ends.append(total + stage.warmup)
        steps = stage.steps - stage.warmup
        parts.append(optax.cosine_decay_schedule(stage.rate, steps, stage.final / stage.rate))
        total += stage.steps
        ends.append(total)
    return optax.join_schedules(parts, ends[:-1])


def stretched(cfg, stages: tuple[Stage, ...], stage: Stage):
    """The model of a stage: YaRN on rotary positions, from the first stage's length, or none."""
    from kimijax.config import YarnConfig
    from kimijax.config_tree import override

    changes = {}
    for i, group in enumerate(cfg.groups):
        for j, layer in enumerate(group.layers):
            rope = getattr(layer.mixer, "rope", None)
            if rope is None:
                continue
            yarn, original = None, stages[0].length
            if stage.yarn is not None:
                yarn = rope.yarn or YarnConfig(factor=stage.yarn, original=original)
                yarn = replace(yarn, factor=stage.yarn, original=original)
            changes[f"groups.{i}.layers.{j}.mixer.rope"] = replace(rope, yarn=yarn)
    return override(cfg, changes)
