"""Fine-tune a released model on conversations: all of its weights, or low-rank adapters.

  python -m experiments.finetune --checkpoint DIR --data CHATS.jsonl --out runs/mine --lora 16
  python -m experiments.finetune --checkpoint DIR --data CHATS.jsonl --out runs/mine   (all weights)

CHATS.jsonl holds a conversation a line, {"messages": [{"role": "user", "content": ...}, ...]}; they
are rendered by the checkpoint's own chat template, packed into rows, and what the assistant says is
learned. The model is written to OUT/model in the checkpoint's format, tokenizer included:
`kimijax generate --checkpoint OUT/model --chat` talks to it. Interrupted, the same command goes on.
"""

import argparse
import hashlib
import shutil
from pathlib import Path

from kimijax.cli import run_module
from kimijax.commands.checkpoint import DTYPES, add_weights, load_checkpoint
from kimijax.commands.paths import path, writable
from kimijax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of fine-tuning."""
    add = parser.add_argument
    add("--checkpoint", type=path, required=True, metavar="DIR", help="a Hugging Face directory")
    add("--data", type=path, required=True, metavar="JSONL")
    add("--out", type=path, required=True, metavar="DIR")
    add("--lora", type=int, metavar="RANK", help="train adapters of this rank alone")
    add("--alpha", type=float, default=16.0, help="adapters count alpha / rank (default: 16)")
    add("--lr", type=float, help="default: 1e-4 with --lora, 1e-5 without")
    add("--epochs", type=int, default=1)
    add("--length", type=int, default=4096, help="tokens of a row (default: 4096)")
    add("--rows", type=int, default=8, help="of a step (default: 8)")
    add("--parts", type=int, default=1, help="in which a step reads its rows, to save memory")
    add("--long", choices=("split", "drop", "refuse"), default="split",
        help="of conversations longer than a row (default: split)")
    add("--bad_lines", choices=("fail", "skip"), default="fail")
    add("--seed", type=int, default=0)
    add("--dtype", choices=DTYPES, default="float32", help="of weights and activations")
    add("--tensorboard", action="store_true")
    add_weights(parser)


def main(args: argparse.Namespace) -> int:
    """Train, resuming if interrupted, and write the model."""
    for name, least in (("epochs", 1), ("length", 2), ("rows", 1), ("parts", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} must be {least} or more, got {getattr(args, name)}")
    if args.lora is not None and args.lora < 1:
        raise UserError(f"--lora must be a rank of 1 or more, got {args.lora}")
    if args.rows % args.parts:
        raise UserError(f"--rows {args.rows} cannot be read in --parts {args.parts}")
    return _train(args)


def _train(args: argparse.Namespace) -> int:
    from kimijax.convert.run import export
    from kimijax.convert.to_store import beside
    from kimijax.data.tokenizer import load_tokenizer
    from kimijax.model import Model
    from kimijax.ops.attend import local, usual_impl
    from kimijax.train import Interrupted

    out = writable(args.out)
    tokenizer = load_tokenizer(args.checkpoint)
    loaded = load_checkpoint(args)
    if loaded.hub is None:
        raise UserError(f"{args.checkpoint}: is no Hugging Face directory; convert it --to hf")
    if args.lora is None and args.weights == "keep":
        raise UserError("--weights keep: quantised weights cannot be trained; give --lora RANK")
    model = Model(loaded.cfg, local(usual_impl()), args.dtype)
    try:
        params = _fitted(args, model, loaded.params, tokenizer, out)
    except Interrupted as stopped:
        print(f"{stopped}; the same command goes on")
        return 130
    new, final = out / "model.new", out / "model"
    shutil.rmtree(new, ignore_errors=True)
    export(loaded.cfg, params, new, None, loaded.hub)
    for name, file in beside(Path(args.checkpoint)):  # the tokenizer goes along
        shutil.copyfile(file, new / name)
    shutil.rmtree(final, ignore_errors=True)
    new.rename(final)
    print(f"model written to {final}")
    return 0


def _fitted(args, model, base, tokenizer, out: Path):
    """The parameters after training."""
    import jax
    import optax

    from kimijax.cache import run_length
    from kimijax.data.rows import batches, packed_rows, read_chats
    from kimijax.metrics import prefill_flops
    from kimijax.model import abstract_params
    from kimijax.optim import adamw, cosine
    from kimijax.train import Phase, fit, make_step
    from kimijax.train.lora import fresh_adapters, loss_of_adapters, merged
    from kimijax.train.loss import language_model
    from kimijax.train.rows import LanguageRows
    from kimijax.train.state import fresh

    boxed, cfg = abstract_params(model), model.cfg
    rows = packed_rows(
        read_chats(args.data, tokenizer, args.bad_lines), args.length, args.seed, run_length(cfg),
        args.epochs, args.long,
    )
    steps = len(rows) // args.rows
    if tokenizer.vocab > cfg.vocab:
        raise UserError(f"{args.checkpoint}: its tokenizer has {tokenizer.vocab:,} tokens, the "
                        f"model {cfg.vocab:,}; put the model's own beside it")
    if steps == 0:
        raise UserError(f"{args.data}: makes {len(rows)} rows of {args.length} tokens, fewer than "
                        f"--rows {args.rows}; lower it, or give more --epochs")
    rate = args.lr if args.lr is not None else (1e-4 if args.lora else 1e-5)
    rate = cosine(rate, min(steps // 10, 100), steps, rate / 10)
    loss = language_model(model)
    if args.lora:
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, 0.9, 0.95))
        start = jax.jit(lambda: fresh_adapters(boxed, args.lora, args.seed))()
        made = make_step(loss_of_adapters(loss, boxed, args.alpha), optimizer, parts=args.parts)
        step = lambda state, batch: made(state, batch, base)  # noqa: E731
    else:
        optimizer, start = adamw(boxed, rate), base
        step = make_step(loss, optimizer, parts=args.parts)
    flops = 3 * args.rows * sum(prefill_flops(cfg, args.length).values())
    phase = Phase("chats", steps, step, lambda: LanguageRows(batches(rows, args.rows)),
                  args.rows * args.length, flops)
    kept = ("checkpoint", "data", "lora", "alpha", "lr", "epochs", "length", "rows", "parts",
            "long", "seed", "dtype", "weights")
    run = {name: getattr(args, name) for name in kept}
    with open(args.data, "rb") as file:
        run["digest"] = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    state = fit(jax.jit(lambda: fresh(start, optimizer))() if args.lora else
                fresh(start, optimizer), [phase], out, run, tensorboard=args.tensorboard)
    merge = jax.jit(lambda base, adapters: merged(base, adapters, boxed, args.alpha))
    return merge(base, state.params) if args.lora else state.params


if __name__ == "__main__":
    run_module(add_arguments, main, __doc__)
