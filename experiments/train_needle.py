"""How little training does a 1 M-parameter byte model need to retrieve from two million tokens?

Ask     Steps and minutes on two cores to an exact match of 0.99 over 100 needles at 2M tokens.
Run     python -m experiments.train_needle --out runs/train_needle [--seed S] [--mesh data=2,seq=4]
Cost    see the log beside the checkpoint in experiments/checkpoints/needle_2m.
Answer  see the README's results.

Real Python files with pass keys in them, then questions. All of a row is read with exact attention
(rows are short); a loss of its own teaches the index where that attention looks.
"""

import argparse
from dataclasses import asdict
from functools import partial

from kimijax.cli import run_module
from kimijax.commands.mesh import add_mesh, plan_of
from kimijax.commands.processes import job_of
from kimijax.errors import UserError

BALANCE_RATE = 3e-3
PEAK_LR, WARMUP, FINAL = 0.02, 20, 0.1
TWINS = 0.7  # share of rows whose words come in pairs that differ in one letter
INDEX_LOSS = 1.0


def phases():
    """(steps, task): short rows to learn to copy, then longer rows with many rivals."""
    from kimijax.data.needles import NeedleTask

    return (
        (140, NeedleTask(length=512, rows=32, needles=5, questions=3, twins=TWINS)),
        (60, NeedleTask(length=2048, rows=8, needles=24, questions=12, twins=TWINS)),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the training run."""
    parser.add_argument("--out", metavar="DIR", default="runs/train_needle")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data")
    add_mesh(parser)


def optimizer_of(boxed, learning_rate):
    """optax's own Muon, for embedding and head as well: the published model was trained with it."""
    import flax.linen as nn
    import jax
    import optax
    from optax.contrib import MuonDimensionNumbers, muon

    from kimijax.optim.matrices import matrices_of

    def numbers_of(names):
        found = matrices_of(names)
        return found and MuonDimensionNumbers(*found)

    names = nn.get_partition_spec(boxed)
    numbers = jax.tree.map(numbers_of, names, is_leaf=lambda x: isinstance(x, tuple))
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(learning_rate, adam_b2=0.95, muon_weight_dimension_numbers=lambda _: numbers),
    )


def loss_of(model):
    """loss(params, batch) -> (scalar, (metrics, aux)) for a NeedleBatch."""
    import jax.numpy as jnp
    import optax

    from kimijax.cache import Watch

    def loss(params, batch):
        watch = Watch(batch.watch_at, batch.watch_weight)
        out = model.apply(params, batch.ids, watch=watch)
        logits = model.apply(params, out.hidden[:, :-1], method="head")
        labels = batch.ids[:, 1:]
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        text = jnp.sum(entropy * batch.weight[:, :-1]) / jnp.sum(batch.weight)
        answer = jnp.take_along_axis(entropy, batch.answers, 1).mean()
        right = jnp.take_along_axis(logits.argmax(-1) == labels, batch.answers, 1).mean()
        index = _index_losses(out.aux)
        metrics = {"text": text, "answer": answer, "digits": right, "index": index}
        return text + answer + INDEX_LOSS * index, (metrics, out.aux)

    return loss


def _index_losses(aux):
    return sum(
        layer["mixer"]["index_loss"].sum()
        for group in aux for layer in group.values() if "index_loss" in layer["mixer"]
    )


def _check_rows(plan) -> None:
    """UserError: a phase's rows cannot be dealt over the mesh."""
    data = plan.mesh.shape["data"]
    for _, task in phases():
        if task.rows % data or task.length % plan.ways:
            raise UserError(
                f"--mesh: {task.rows} rows of {task.length} tokens are no multiples of data = "
                f"{data} and seq x expert = {plan.ways}; choose powers of two"
            )


def _phases(step, text, seed: int) -> list:
    """`phases` for the loop; batches are numbered over all of them."""
    from kimijax.data.needles import batch
    from kimijax.train import Numbered, Phase

    def batches(task, first: int):
        return Numbered(lambda i: batch(task, text, seed, first + i))

    found, first = [], 0
    for steps, task in phases():
        begin, tokens = partial(batches, task, first), task.rows * task.length
        found.append(Phase(f"{task.length} tokens", steps, step, begin, tokens))
        first += steps
    return found


def main(args: argparse.Namespace) -> int:
    """Train, resuming if interrupted, and write the model."""
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed must be between 0 and {2**32 - 1}, got {args.seed}")
    with job_of(args):
        return _train(args)


def _train(args: argparse.Namespace) -> int:
    import optax

    from kimijax import presets
    from kimijax.checkpoint import save_model
    from kimijax.checkpoint.places import locate
    from kimijax.commands.paths import writable
    from kimijax.config_tree import to_dict
    from kimijax.data import corpus
    from kimijax.model import Model, abstract_params
    from kimijax.ops.attend import local, usual_impl
    from kimijax.parallel.processes import is_first, on_first
    from kimijax.train import Interrupted, fit, init_state, make_step, state_shardings

    if (plan := plan_of(args, train=True, exact=True)) is not None:
        _check_rows(plan)
    out = writable(args.out, bucket=True) if is_first() else locate(args.out)
    cfg = presets.needle_2m()
    model = Model(cfg, local(usual_impl(), exact=True) if plan is None else plan.ops())
    text = corpus.concatenate(corpus.load_documents("train"), seed=0)
    total = sum(steps for steps, _ in phases())
    lr = optax.warmup_cosine_decay_schedule(0.0, PEAK_LR, WARMUP, total, PEAK_LR * FINAL)
    optimizer = optimizer_of(abstract_params(model), lr)
    where = None if plan is None else state_shardings(model, optimizer, plan)
    try:
        state = fit(
            init_state(model, optimizer, args.seed, where),
            _phases(
                make_step(loss_of(model), optimizer, balance_rate=BALANCE_RATE, where=where),
                text, args.seed,
            ),
            out,
            {
                "seed": args.seed,
                "model": to_dict(cfg),
                "phases": [[steps, asdict(task)] for steps, task in phases()],
            },
        )
    except Interrupted as stopped:
        print(f"{stopped}; the same command goes on")
        return 130
    params = on_first(state.params["params"])
    if is_first():
        save_model(out / "model", cfg, params)
    print(f"model written to {out}/model")
    return 0


if __name__ == "__main__":
    run_module(add_arguments, main, __doc__)
