"""The checkpoint that a command reads: how its weights are held, and what could not be kept."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kimijax.convert.load import Loaded
    from kimijax.parallel.plan import Plan

DTYPES = ("float32", "bfloat16")


def add_weights(parser: argparse.ArgumentParser) -> None:
    """The option --weights."""
    parser.add_argument(
        "--weights", choices=("expand", "keep"), default="expand",
        help="keep: quantised weights stay as stored and are expanded where they are used",
    )


def add_cache(parser: argparse.ArgumentParser) -> None:
    """The option --cache: how latents are kept."""
    parser.add_argument(
        "--cache", choices=("int8",),
        help="int8: a latent of the cache in 8 bits a number and a float32 scale. Default: as "
        "activations",
    )


def load_checkpoint(args: argparse.Namespace, plan: "Plan | None" = None) -> "Loaded":
    """The model of --checkpoint, --dtype and --weights; stderr says what was not kept quantised.

    plan  where its parameters are put as they are read; None: the default device
    """
    from kimijax.convert.load import load

    shardings = plan and plan.placements
    loaded = load(args.checkpoint, args.dtype, args.weights == "keep", shardings)
    if loaded.expanded:
        print(not_kept(loaded.expanded), file=sys.stderr)
    return loaded


def not_kept(names: Sequence[str]) -> str:
    """A line about quantised tensors that were expanded though they were to be kept."""
    return (
        f"{len(names)} quantised matrices were expanded, such as {names[0]}: MLA, an MLP or the "
        "experts are kept where all of their matrices are stored alike, in all layers of a group"
    )
