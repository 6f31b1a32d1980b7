"""Continue a prompt, a file, or token arrays.

  kimijax generate --checkpoint DIR --prompt TEXT --max_new 100
  kimijax generate --checkpoint DIR --tokens IN.npy --out OUT.npy --max_new 16
IN is int32 [B, T]; OUT is int32 [B, T + N], the prompt first. Text is printed as it comes, until
an end token of the checkpoint or a --stop. Without --temperature the likeliest token is taken.
With --mesh the prompt and its cache lie on several devices.
"""

import argparse

from kimijax.commands.checkpoint import DTYPES, add_cache, add_weights, load_checkpoint
from kimijax.commands.mesh import add_impl, add_mesh, ops_of, plan_of
from kimijax.commands.paths import path
from kimijax.commands.processes import job_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kimijax generate`."""
    add = parser.add_argument
    add("--checkpoint", required=True, type=path, metavar="DIR")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--tokens", type=path, metavar="IN.npy", help="int32 [B, T]; needs --out")
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--file", type=path, metavar="F", help="a text file")
    add("--out", type=path, metavar="OUT.npy", help="int32 [B, T + N], with --tokens")
    add("--chat", action="store_true", help="the text is a user's message, answered as one")
    add("--chunk", type=int, default=2048, metavar="N",
        help="read the prompt in calls of N tokens, rounded up to a run of the model on every "
             "device (default: %(default)s)")
    add("--max_new", type=int, required=True, metavar="N", help="tokens to add")
    add("--temperature", type=float, default=0.0, help="0 (default): the likeliest token")
    add("--top_k", type=int, default=0, metavar="K", help="choose among the K likeliest")
    add("--top_p", type=float, default=1.0, metavar="P",
        help="choose among the likeliest that sum to P")
    add("--min_p", type=float, default=0.0, metavar="P",
        help="leave out what is below P times the likeliest")
    add("--repetition_penalty", type=float, default=1.0, help="above 1: repeat less")
    add("--seed", type=int, default=0, help="the same seed gives the same tokens")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this; repeatable")
    add("--stop_ids", type=_ids, default=(), metavar="ID[,ID...]", help="end at these tokens")
    add("--dtype", choices=DTYPES, default="float32", help="of weights and activations")
    add_cache(parser)
    add_weights(parser)
    add_mesh(parser)
    add_impl(parser)


def _ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers") from error


def main(args: argparse.Namespace) -> int:
    """Load, read the prompt, print or write what follows."""
    from kimijax.errors import UserError
    from kimijax.sampling import Sampling

    if args.max_new < 1:
        raise UserError(f"--max_new must be at least 1, got {args.max_new}")
    if args.chunk < 1:
        raise UserError(f"--chunk must be at least 1, got {args.chunk}")
    if (args.tokens is None) != (args.out is None):
        raise UserError("--tokens and --out go together: arrays in, arrays out")
    if args.tokens is not None and (args.chat or args.stop):
        given = "--chat" if args.chat else "--stop"
        raise UserError(f"{given} is about text: it needs --prompt or --file, not --tokens")
    sampling = Sampling(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p,
        repetition_penalty=args.repetition_penalty, seed=args.seed,
    )
    with job_of(args):
        if args.cache:
            _check_cache(args)
        (_text if args.tokens is None else _arrays)(args, sampling, plan_of(args))
    return 0


def _check_cache(args: argparse.Namespace) -> None:
    """UserError, before weights are read: the model's latents are not kept as --cache says."""
    from pathlib import Path

    from kimijax.cache import check_latents
    from kimijax.convert.load import read_config
    from kimijax.ops.attend import check_kernels, usual_impl

    cfg = read_config(Path(args.checkpoint))
    check_latents(cfg, args.cache)
    check_kernels(cfg, args.cache, args.impl or usual_impl())


def _arrays(args: argparse.Namespace, sampling, plan) -> None:
    """Token arrays in, token arrays out; a row that met a stop id repeats it to its end."""
    from contextlib import nullcontext
    from pathlib import Path

    import numpy as np
    from tqdm import tqdm

    from kimijax.commands.arrays import new_array, read_tokens
    from kimijax.convert.load import read_config
    from kimijax.generate import check_room, generate
    from kimijax.parallel.processes import is_first

    ids = read_tokens(args.tokens, read_config(Path(args.checkpoint)).vocab)
    rows, length = ids.shape
    check_room(length, args.max_new)
    shape = (rows, length + args.max_new)
    file = new_array(args.out, shape, np.int32) if is_first() else nullcontext(np.empty(shape))
    with file as out:
        loaded = load_checkpoint(args, plan)
        programs, params = _programs(args, loaded, plan)
        out[:, :length] = ids
        tokens = generate(programs, params, list(ids), args.max_new, sampling, args.chunk)
        stopped = np.zeros(rows, bool)
        for i, token in enumerate(tqdm(tokens, total=args.max_new, unit="tok")):
            out[:, length + i] = np.where(stopped, out[:, length + i - 1], token)
            stopped |= np.isin(token, args.stop_ids)
            if stopped.all():
                out[:, length + i + 1 :] = out[:, length + i, None]
                break


def _text(args: argparse.Namespace, sampling, plan) -> None:
    """Text in, text on the terminal as it comes."""
    from kimijax.data.tokenizer import StreamDecoder, load_tokenizer
    from kimijax.generate import generate
    from kimijax.sampling import StopStream

    tokenizer = load_tokenizer(args.checkpoint)
    prompt = _encoded(args, tokenizer)
    loaded = load_checkpoint(args, plan)
    programs, params = _programs(args, loaded, plan)
    ends = {*args.stop_ids, *tokenizer.eos}
    pieces, stops = StreamDecoder(tokenizer), StopStream(args.stop)
    for token in generate(
        programs, params, [prompt], args.max_new, sampling, args.chunk
    ):
        if int(token[0]) in ends:
            break
        print(stops.push(pieces.push(int(token[0]))), end="", flush=True)
        if stops.stopped:
            break
    if not stops.stopped:
        print(stops.push(pieces.finish()) + stops.finish(), end="")
    print()


def _programs(args: argparse.Namespace, loaded, plan):
    """(compiled programs, params) of a loaded model, on one device or where the plan says."""
    import jax.numpy as jnp

    from kimijax.generate import decoder

    dtype = jnp.dtype(args.dtype)
    return decoder(loaded.cfg, ops_of(args, plan), dtype, args.cache), loaded.params


def _encoded(args: argparse.Namespace, tokenizer):
    """The prompt's tokens, known to suit the model before its weights are read."""
    from pathlib import Path

    import numpy as np

    from kimijax.convert.load import read_config
    from kimijax.data.chat import encode_chat
    from kimijax.generate import check_room
    from kimijax.infer import check_tokens

    text = _prompt(args)
    if args.chat:
        ids = encode_chat(tokenizer, [{"role": "user", "content": text}],
                          template=tokenizer.chat_template)
    else:
        ids = tokenizer.encode(text)
    prompt = np.array(ids, np.int32)
    check_tokens(read_config(Path(args.checkpoint)), prompt)
    check_room(len(prompt), args.max_new)
    return prompt


def _prompt(args: argparse.Namespace) -> str:
    from kimijax.errors import UserError

    if args.file is None:
        return args.prompt
    try:
        with open(args.file, encoding="utf-8", errors="strict") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--file {args.file}: cannot be read as text: {error}") from error
