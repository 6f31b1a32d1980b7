"""Logits of every position of token arrays.

  kimijax logits --checkpoint DIR --tokens IN.npy --out OUT.npy
IN is int32 [B, T]; OUT is float32 [B, T, V]. DIR is a Hugging Face directory or one of ours.
"""

import argparse

from kimijax.commands.checkpoint import DTYPES, add_weights, load_checkpoint
from kimijax.commands.paths import path

PIECE = 1024  # tokens whose logits are held at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kimijax logits`."""
    add = parser.add_argument
    add("--checkpoint", required=True, type=path, metavar="DIR")
    add("--tokens", required=True, type=path, metavar="IN.npy", help="int32 [B, T]")
    add("--out", required=True, type=path, metavar="OUT.npy", help="float32 [B, T, V]")
    add("--dtype", choices=DTYPES, default="float32", help="of weights and activations")
    add_weights(parser)


def main(args: argparse.Namespace) -> int:
    """Read a row at a time, write its logits piece by piece."""
    from pathlib import Path

    import jax
    import jax.numpy as jnp
    import numpy as np
    from tqdm import tqdm

    from kimijax.commands.arrays import new_array, read_tokens
    from kimijax.convert.load import read_config
    from kimijax.generate import check_room
    from kimijax.model import Model
    from kimijax.ops.attend import local

    vocab = read_config(Path(args.checkpoint)).vocab
    ids = read_tokens(args.tokens, vocab)
    check_room(ids.shape[1], 0)
    with new_array(args.out, (*ids.shape, vocab), np.float32) as out:
        loaded = load_checkpoint(args)
        model = Model(loaded.cfg, local(), jnp.dtype(args.dtype))
        hidden = jax.jit(lambda p, x: model.apply(p, x).hidden)
        head = jax.jit(lambda p, x: model.apply(p, x, method="head"))
        for row in tqdm(range(len(ids)), unit="row"):
            states = hidden(loaded.params, ids[row : row + 1])
            for at in range(0, ids.shape[1], PIECE):
                out[row, at : at + PIECE] = head(loaded.params, states[0, at : at + PIECE])
    return 0
