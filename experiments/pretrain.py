"""Pre-train a model in phases of growing context, by MuonClip, on any mesh.

  python -m experiments.pretrain --model kimi_k2_tiny --curriculum tiny --data TEXTS --out runs/tiny
  python -m experiments.pretrain --model moonlight_16b --curriculum k2 --data WEB=7,CODE=3 \\
      --tokenizer DIR --mesh data=4,seq=32,expert=4 --dtype bfloat16 --out SHARED

--data names datasets of `kimijax tokenize` or files of text, each with a weight; text is tokenized
on first use. A phase has its own length, rows, rotary scaling and stretch of the learning rate; the
optimizer's state goes through all of them. Interrupted in any phase, the same command goes on.
"""

import argparse

from experiments.curricula import CURRICULA, Stage, learning_rate, stretched
from kimijax.cli import run_module
from kimijax.commands.checkpoint import DTYPES
from kimijax.commands.mesh import add_mesh, plan_of
from kimijax.commands.paths import path, writable
from kimijax.commands.processes import job_of
from kimijax.errors import UserError

BALANCE_RATE = 1e-3
TAU = 100.0
EVAL_STEPS = 4  # batches of held-out text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of pre-training."""
    add = parser.add_argument
    add("--model", required=True, help="a preset, or a checkpoint for its config")
    add("--curriculum", choices=sorted(CURRICULA), required=True)
    add("--data", required=True, metavar="PATH[=WEIGHT][,...]")
    add("--tokenizer", type=path, metavar="DIR", help="a model directory; default: bytes")
    add("--out", type=path, required=True, metavar="DIR")
    add("--seed", type=int, default=0)
    add("--dtype", choices=DTYPES, default="float32",
        help="of activations and of Newton-Schulz; weights are float32")
    add("--parts", type=int, default=1, help="in which a step reads its rows, to save memory")
    add("--tau", type=float, default=TAU, help="of QK-Clip (default: %(default)s)")
    add("--spike", type=float, default=10.0,
        help="skip a step whose gradient is so many times its running mean (default: %(default)s)")
    add("--save_minutes", type=float, default=10.0)
    add("--tensorboard", action="store_true")
    add("--eval", metavar="PATH[,...]", help="held-out text: its loss, after every phase")
    add("--eval_every", type=int, default=0, metavar="STEPS", help="and every so many steps")
    add("--profile", type=steps, default=range(0), metavar="FIRST-LAST",
        help="steps to trace into OUT/profile, as 10-12")
    add("--peak", type=float, metavar="FLOPS", help="of all devices, to log a fraction of it")
    add_mesh(parser)


def steps(text: str) -> range:
    """The steps of "10-12", both ends included."""
    first, _, last = text.partition("-")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r:.40} is no FIRST-LAST, as in 10-12")
    return range(int(first), int(last) + 1)


def main(args: argparse.Namespace) -> int:
    """Train, resuming if interrupted, and write the model."""
    for name, least in (("seed", 0), ("parts", 1), ("eval_every", 0), ("save_minutes", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} must be {least} or more, got {getattr(args, name)}")
    if not args.spike > 1:
        raise UserError(f"--spike must be above 1, got {args.spike}: it counts running means")
    with job_of(args):
        return _train(args)


def _train(args: argparse.Namespace) -> int:
    from kimijax.checkpoint import save_model
    from kimijax.checkpoint.places import locate
    from kimijax.commands.describe import config_of
    from kimijax.config_tree import to_dict
    from kimijax.model import Model, abstract_params
    from kimijax.ops.attend import local, usual_impl
    from kimijax.optim import muon
    from kimijax.parallel.processes import is_first, on_first
    from kimijax.train import Interrupted, Saves, fit, init_state, state_shardings

    plan = plan_of(args, train=True)
    out = writable(args.out, bucket=True) if is_first() else locate(args.out)
    stages, cfg = CURRICULA[args.curriculum](), config_of(args.model)
    model = Model(cfg, local(usual_impl()) if plan is None else plan.ops(), args.dtype)
    optimizer = muon(
        abstract_params(model), learning_rate(stages), dtype=args.dtype,
        shardings=None if plan is None else plan.shardings(cfg),
    )
    where = None if plan is None else state_shardings(model, optimizer, plan)
    datasets = datasets_of(args.data, args.tokenizer, cfg.vocab)
    phases = [
        _phase(f"{i}-{stage.length}", args, stage, datasets, stretched(cfg, stages, stage),
               optimizer, plan, where)
        for i, stage in enumerate(stages)
    ]
    kept = ("data", "seed", "dtype", "parts", "tau", "spike")
    run = {name: getattr(args, name) for name in kept}
    # A place in the data is a number: that it is the same data is for the run to say.
    run["tokens"] = {name: [x.info.digest, x.info.tokens] for name, x in datasets.items()}
    run |= {"model": to_dict(cfg), "stages": [vars(stage) for stage in stages]}
    try:
        state = fit(
            init_state(model, optimizer, args.seed, where), phases, out, run,
            saves=Saves(seconds=60 * args.save_minutes), peak=args.peak,
            tensorboard=args.tensorboard, profile=args.profile,
        )
    except Interrupted as stopped:
        print(f"{stopped}; the same command goes on")
        return 130
    params = on_first(state.params["params"])
    if is_first():
        save_model(out / "model", stretched(cfg, stages, stages[-1]), params)
    print(f"model written to {out}/model")
    return 0


def _phase(name, args, stage: Stage, datasets, cfg, optimizer, plan, where):
    """A phase of the loop: its model, step and data."""
    import jax

    from kimijax.data.rows import batches
    from kimijax.metrics import prefill_flops
    from kimijax.model import Model
    from kimijax.ops.attend import local, usual_impl
    from kimijax.optim import qk_clip
    from kimijax.train import Phase, make_step
    from kimijax.train.loss import language_model
    from kimijax.train.rows import LanguageRows, placed, share

    runs, prepare = None, lambda rows: rows
    if plan is not None:
        runs = plan.layout(cfg, stage.length).order.runs
        prepare = lambda rows: placed(plan, cfg, stage.rows, rows)  # noqa: E731
    model = Model(cfg, local(usual_impl()) if plan is None else plan.ops(), args.dtype)
    loss = language_model(model, runs=runs)
    step = make_step(
        loss, optimizer, balance_rate=BALANCE_RATE,
        qk_clip=qk_clip(cfg, args.tau), parts=args.parts, spike=args.spike, where=where,
    )

    part = (0, 1) if plan is None else share(plan, stage.rows)  # before the first phase begins

    def opened(rows):
        return LanguageRows(batches(rows, stage.rows, *part), prepare)

    def train():
        return opened(mixed_rows(args.data, stage, stage.steps, args.seed, datasets, cfg))

    evaluate = None
    if args.eval is not None:
        held = datasets_of(args.eval, args.tokenizer, cfg.vocab)
        rows = lambda: mixed_rows(args.eval, stage, EVAL_STEPS, 0, held, cfg)  # noqa: E731
        evaluate = evaluation(jax.jit(loss), lambda: opened(rows()))
    flops = 3 * stage.rows * sum(prefill_flops(cfg, stage.length).values())
    return Phase(name, stage.steps, step, train, stage.rows * stage.length, flops, evaluate,
                 args.eval_every)


def evaluation(loss, opened):
    """state -> the mean loss over EVAL_STEPS batches, by weight."""

    def evaluate(state) -> dict:
        batches, total, weight = opened(), 0.0, 0.0
        for _ in range(EVAL_STEPS):
            mean, (metrics, _) = loss(state.params, next(batches))
            total, weight = total + float(mean * metrics["weight"]), weight + metrics["weight"]
        return {"loss": total / weight}

    return evaluate


def datasets_of(data: str, tokenizer: str | None, vocab: int) -> dict:
    """By name, text tokenized where it is not yet; UserError: the model has too few tokens."""
    from kimijax.data.dataset import dataset_of
    from kimijax.parallel.processes import is_first, meet

    def opened():
        return {name: dataset_of([name], tokenizer) for name in weights_of(data)}

    datasets = opened() if is_first() else None
    meet()  # others find what the first has tokenized, where they share a cache
    datasets = datasets or opened()
    for name, dataset in datasets.items():
        if dataset.vocab > vocab:
            raise UserError(f"{name}: has a vocabulary of {dataset.vocab:,}, the model one of "
                            f"{vocab:,}; name the model's own --tokenizer")
    return datasets


def mixed_rows(data: str, stage: Stage, steps: int, seed: int, datasets: dict, cfg):
    """Rows of all datasets by weight, through as many epochs as so many steps need."""
    from kimijax.cache import run_length
    from kimijax.data.rows import mixture, packed_rows

    weights = weights_of(data)
    needed = steps * stage.rows * stage.length
    rows = {}
    for name, dataset in datasets.items():
        share = needed * weights[name] / sum(weights.values())
        epochs = int(share // max(int(dataset.lengths.sum()), 1)) + 2  # rows are not quite full
        rows[name] = packed_rows(dataset, stage.length, seed, run_length(cfg), epochs)
    return rows[name] if len(rows) == 1 else mixture(rows, weights)


def weights_of(text: str) -> dict[str, float]:
    """Weights by path of "a=2,b"; what has none has 1."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        try:
            found[name] = float(weight or 1)
        except ValueError as error:
            raise UserError(f"--data: {part!r:.80} is no PATH or PATH=WEIGHT") from error
        if not found[name] > 0 or not name:
            raise UserError(f"--data: {part!r:.80} needs a path and a weight above 0")
    return found


if __name__ == "__main__":
    run_module(add_arguments, main, __doc__)
