"""Is training on a ring of devices the same training?

Ask     The losses of 20 steps on rings of 2, 4 and 8 devices beside those of one, MLA and QK-Clip.
Run     python -m experiments.ablations.ring --out runs/ring
Cost    5 pairs of runs of 20 steps; 6 minutes on two cores, other work running.
Answer  Yes. Over 20 steps of MuonClip with tau = 10, on 2, 4 and 8 devices, zigzag, and striped on
        data=2,seq=4: losses within 2.7e-7 of those of one device, norms of gradients within 1.5e-6,
        largest logits within 5.3e-7 (commit f883192).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from kimijax.sweep import Done, Settings, Sweep, main, product, together

STEPS, RATE, TAU = 20, 0.024, 10.0


def runs(done: Sequence[Done]) -> Iterator[Settings]:
    """Rings of three sizes; other orders and a mixed mesh."""
    yield from product(mesh=["seq=2", "seq=4", "seq=8"], order=["contiguous"])
    yield from together(mesh=["seq=8", "data=2,seq=4"], order=["zigzag", "striped"])


def run(settings: Settings, out: Path) -> dict:
    """Train on one device, then on the mesh."""
    import argparse

    import numpy as np

    from experiments.ablations.small import model_of, train
    from kimijax.commands.mesh import plan_of
    from kimijax.optim import muon
    from kimijax.train import read_log

    plan = plan_of(
        argparse.Namespace(mesh=settings["mesh"], order=settings["order"], processes=None),
        train=True,
    )
    cfg, how = model_of(), dict(seed=0, lr=RATE, steps=STEPS, tau=TAU)
    train(cfg, out / "one", muon, **how)

    def dealt(boxed, rate):
        return muon(boxed, rate, shardings=plan.shardings(cfg))

    _, result = train(cfg, out / "mesh", dealt, plan=plan, **how)
    one, mesh = (read_log(out / name / "metrics.jsonl") for name in ("one", "mesh"))
    return {
        f"largest_difference_of_{name}": float(np.max(np.abs(
            [a[name] / b[name] - 1 for a, b in zip(one, mesh, strict=True)]
        )))
        for name in ("loss", "grad_norm", "max_logit")
    } | {"loss": result["train_loss"]}


if __name__ == "__main__":
    main(Sweep(runs, run), __doc__)
