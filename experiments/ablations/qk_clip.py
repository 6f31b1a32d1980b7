"""Do attention logits explode at a high learning rate, and does QK-Clip hold them?

Ask     The largest attention logit of every step, with and without QK-Clip (tau = 10), by MuonClip
        and by AdamW, at learning rates where it grows. What a clip leaves on the same batch.
Run     python -m experiments.ablations.qk_clip --out runs/qk_clip --jobs 2
Cost    10 runs of 0.25 M tokens; 5 minutes with --jobs 2.
Answer  The largest logit of any step, without and with the clip (commit 727db88; one seed):

            Muon   0.02    14.4    11.7        AdamW  0.01     24.9    11.6
            Muon   0.04    26.7    13.6        AdamW  0.04    249.9    18.0
            Muon   0.08    87.9    14.3

        Held, with slightly better losses (Muon 0.08: 2.479 for 2.508), but not to tau: the clip
        goes by the logits before its step's update, so that an update that makes them grow by 40%
        is seen a step late. On the same batch a clip leaves 10.0 in the first layer; above it,
        where the input has changed as well, up to 11.0.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from kimijax.sweep import Done, Settings, Sweep, main, product

TAU = 10.0
STEPS = 61
RATES = {"muon": (0.02, 0.04, 0.08), "adamw": (0.01, 0.04)}


def runs(done: Sequence[Done]) -> Iterator[Settings]:
    """Both optimizers, two rates, with and without the clip."""
    for optimizer, rates in RATES.items():
        yield from product(optimizer=[optimizer], lr=rates, tau=[None, TAU], seed=[0])


def run(settings: Settings, out: Path) -> dict:
    """Train one model; draw its largest logit by step."""
    from experiments.ablations.small import model_of, train
    from kimijax.optim import adamw, muon
    from kimijax.train import read_log

    cfg, tau = model_of(), settings["tau"]
    build = {"adamw": adamw, "muon": muon}[settings["optimizer"]]
    params, result = train(
        cfg, out, build, seed=settings["seed"], lr=settings["lr"], steps=STEPS, tau=tau
    )
    logits = [line["max_logit"] for line in read_log(out / "metrics.jsonl")]
    picture(logits, out / "max_logit.png")
    first = next((i for i, logit in enumerate(logits) if logit > TAU), None)
    if first is not None:
        result["first_step_above"] = first + 1
        result["max_logit_after"] = max(logits[first + 1 :], default=0.0)
    return result | clipped_once(cfg, params)


def clipped_once(cfg, params) -> dict:
    """The largest logits of a batch before and after a clip: of the first layer, and of all.

    A clip changes what the layers above read, so theirs are not exactly held on the same batch.
    """
    import numpy as np

    from experiments.ablations.small import LENGTH, texts
    from kimijax.data.rows import batches, packed_rows
    from kimijax.model import Model
    from kimijax.ops.attend import local
    from kimijax.optim import qk_clip

    model = Model(cfg, local())
    rows = next(batches(packed_rows(texts("held_out"), LENGTH, 0), 16))

    def logits(params):
        aux = model.apply(params, rows.ids, rows.pos, rows.seg).aux
        return {(i, name): report["mixer"]["max_logit"]
                for i, group in enumerate(aux) for name, report in group.items()}

    before = logits(params)
    after = logits(qk_clip(cfg, TAU)(params, before))
    first = lambda found: float(np.max(found[0, "layer_0"][0]))  # noqa: E731
    return {
        "first_layer": first(before), "first_layer_clipped": first(after),
        "all_layers_clipped": float(max(x.max() for x in after.values())),
    }


def picture(logits: list[float], path: Path) -> None:
    """The largest logit of every step, and tau."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(5.6, 3.2), layout="constrained")
    ax.plot(range(1, len(logits) + 1), logits)
    ax.axhline(TAU, color="gray", linestyle="--", label=f"tau = {TAU:g}")
    ax.set(xlabel="step", ylabel="largest attention logit", yscale="log")
    ax.legend()
    fig.savefig(path, dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    main(Sweep(runs, run), __doc__)
