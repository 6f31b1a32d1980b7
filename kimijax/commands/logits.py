"""Logits of every position of token arrays.

  kimijax logits --checkpoint DIR --tokens IN.npy --out OUT.npy [--mesh data=1,seq=4,expert=2]
IN is int32 [B, T]; OUT is float32 [B, T, V]. DIR is a Hugging Face directory or one of ours.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from kimijax.commands.checkpoint import DTYPES, add_weights, load_checkpoint
from kimijax.commands.mesh import add_impl, add_layout, add_mesh, ops_of, plan_of
from kimijax.commands.paths import path
from kimijax.commands.processes import job_of

if TYPE_CHECKING:
    import numpy as np

    from kimijax.config import ModelConfig
    from kimijax.parallel.plan import Plan

PIECE = 1024  # tokens whose logits are held at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kimijax logits`."""
    add = parser.add_argument
    add("--checkpoint", required=True, type=path, metavar="DIR")
    add("--tokens", required=True, type=path, metavar="IN.npy", help="int32 [B, T]")
    add("--out", required=True, type=path, metavar="OUT.npy", help="float32 [B, T, V]")
    add("--dtype", choices=DTYPES, default="float32", help="of weights and activations")
    add_weights(parser)
    add_mesh(parser)
    add_layout(parser)
    add_impl(parser)


def main(args: argparse.Namespace) -> int:
    """Read a row at a time (on a mesh one for each of `data`), write its logits piece by piece."""
    with job_of(args):
        _write_logits(args)
    return 0


def _write_logits(args: argparse.Namespace) -> None:
    from contextlib import nullcontext
    from pathlib import Path

    import jax.numpy as jnp
    import numpy as np
    from tqdm import tqdm

    from kimijax.commands.arrays import new_array, read_tokens
    from kimijax.convert.load import read_config
    from kimijax.generate import check_room
    from kimijax.model import Model
    from kimijax.parallel.processes import is_first

    plan = plan_of(args)
    vocab = read_config(Path(args.checkpoint)).vocab
    ids = read_tokens(args.tokens, vocab)
    check_room(ids.shape[1], 0)
    file = new_array(args.out, (*ids.shape, vocab), np.float32) if is_first() else nullcontext()
    with file as out:
        loaded = load_checkpoint(args, plan)
        ops, params = ops_of(args, plan), loaded.params
        model = Model(loaded.cfg, ops, jnp.dtype(args.dtype))
        hidden = ops.jit(lambda p, call, runs: model.apply(p, **call, runs=runs).hidden,
                         static_argnums=2)
        head = ops.jit(lambda p, x: ops.whole(model.apply(p, x, method="head")))
        step = 1 if plan is None else plan.mesh.shape["data"]
        for first in tqdm(range(0, len(ids), step), unit="row", unit_scale=step):
            rows = ids[first : first + step]
            call, runs, places = _call(plan, loaded.cfg, rows)
            states = hidden(params, call, runs)
            for row in range(len(rows)):
                for at in range(0, len(places), PIECE):
                    piece = places[at : at + PIECE]
                    real = piece < ids.shape[1]
                    logits = np.asarray(head(params, states[row, at : at + PIECE]))
                    if out is not None:
                        out[first + row, piece[real]] = logits[real]


def _call(plan: Plan | None, cfg: ModelConfig, rows: np.ndarray):
    """(arrays of the model's call, runs, the place in the row of each token of the call).

    On a mesh the last rows are filled up with rows of padding to one for each of `data`.
    """
    import numpy as np

    if plan is None:
        return {"ids": rows}, None, np.arange(rows.shape[1])
    missing = ((0, plan.mesh.shape["data"] - len(rows)), (0, 0))
    seg = np.pad(np.zeros_like(rows), missing, constant_values=-1)
    call, arranged = plan.arrange(cfg, np.pad(rows, missing), seg=seg)
    runs = call.pop("runs")
    return call, runs, arranged.order.places
