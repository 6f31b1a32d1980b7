"""Weights from Hugging Face to an orbax checkpoint, or back.

  kimijax convert HF_DIR DST --to orbax      streamed: memory does not grow with the model
  kimijax convert DIR DST --to hf            safetensors under hub names, which transformers loads
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kimijax.commands.checkpoint import DTYPES, add_weights, not_kept
from kimijax.commands.paths import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kimijax convert`."""
    add = parser.add_argument
    add("source", metavar="SRC", type=path, help="a Hugging Face directory, or one of ours")
    add("destination", metavar="DST", type=path,
        help="a directory that does not exist yet")
    add("--to", choices=("orbax", "hf"), required=True)
    add("--dtype", choices=DTYPES, help="default: as stored")
    add_weights(parser)


def main(args: argparse.Namespace) -> int:
    """Convert, with a progress bar."""
    from pathlib import Path

    from kimijax.convert.run import convert

    with _progress(f"convert to {args.to}") as on_bytes:
        report = convert(
            Path(args.source), Path(args.destination), args.to, args.dtype,
            args.weights == "keep", on_bytes,
        )
    if report.skipped:
        print(f"{report.skipped} tensors that are no part of the language model were left out")
    if report.expanded:
        print(not_kept(report.expanded))
    print(f"written to {args.destination}")
    return 0


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """on_bytes(done, total), which shows a bar from its first call: a refusal stands alone."""
    from tqdm import tqdm

    bar = None

    def on_bytes(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, unit="B", unit_scale=True, desc=title)
        bar.update(done)

    try:
        yield on_bytes
    finally:
        if bar is not None:
            bar.close()
