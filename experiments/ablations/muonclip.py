"""How many tokens does MuonClip need for what AdamW reaches?

Ask     Final held-out loss of AdamW over 1.0 M tokens, and of MuonClip on 0.75 of them: each with
        its own full schedule, its learning rate the best of four by one seed, then three seeds.
        Muon with Nesterov momentum; what it leaves to AdamW has a learning rate of its own.
Run     python -m experiments.ablations.muonclip --out runs/muonclip --jobs 2
Cost    12 runs of a 0.37 M-parameter byte model; 24 minutes with --jobs 2, other work running.
Answer  As many as three quarters reach it: 2.116 +- 0.017 nats/byte (0.75 M tokens) against
        2.119 +- 0.033 (1.0 M tokens), mean and deviation of three seeds; commit 727db88.

            lr       AdamW                 lr       MuonClip
            0.004    2.133                 0.012    2.188
            0.008    2.117 2.087 2.153     0.024    2.097 2.131 2.120
            0.016    2.195                 0.048    2.169
            0.032    2.399                 0.096    2.327

        No more than a tie, and it took Nesterov, a batch of 8,192 tokens and a rate of its own for
        embedding, head and norms. With 4,096 tokens a step AdamW reached 1.886 (mean of three
        seeds) and MuonClip on 0.75 of the tokens, without Nesterov and with one rate, 1.995 at its
        best rate (one seed); with Nesterov and two rates 1.929 (one seed).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from kimijax.sweep import Done, Plot, Settings, Sweep, main, product

ROWS, STEPS = 32, 122  # of 256 tokens: one million
RATES = {"adamw": (0.004, 0.008, 0.016, 0.032), "muonclip": (0.012, 0.024, 0.048, 0.096)}
SHARE = {"adamw": 1.0, "muonclip": 0.75}  # of STEPS
ADAM_RATE = 0.008  # of embedding, head and norms beside Muon
TAU = 100.0
SEEDS = (0, 1, 2)


def runs(done: Sequence[Done]) -> Iterator[Settings]:
    """Four rates on the first seed; then the best one on the others."""
    for optimizer, rates in RATES.items():
        yield from product(optimizer=[optimizer], lr=rates, seed=SEEDS[:1])
    for optimizer, rates in RATES.items():
        tuned = [d for d in done if d.settings["optimizer"] == optimizer
                 and d.settings["seed"] == SEEDS[0]]
        if len(tuned) == len(rates):
            best = min(tuned, key=lambda d: d.result["loss"]).settings["lr"]
            yield from product(optimizer=[optimizer], lr=[best], seed=SEEDS[1:])


def run(settings: Settings, out: Path) -> dict:
    """Train one model."""
    from experiments.ablations.small import model_of, train
    from kimijax.optim import adamw, muon

    kind, lr = settings["optimizer"], settings["lr"]

    def muonclip(boxed, rate):
        rest = lambda step: rate(step) * (ADAM_RATE / lr)  # noqa: E731
        return muon(boxed, rate, nesterov=True, adam_rate=rest)

    _, result = train(
        model_of(), out, {"adamw": adamw, "muonclip": muonclip}[kind], seed=settings["seed"],
        lr=lr, steps=round(STEPS * SHARE[kind]), rows=ROWS,
        tau=TAU if kind == "muonclip" else None,
    )
    return result


if __name__ == "__main__":
    main(Sweep(runs, run, (Plot(x="lr", y="loss", line="optimizer", log_x=True),)), __doc__)
