"""Weights from Hugging Face to an orbax checkpoint, or back.

  kimijax convert HF_DIR DST --to orbax      streamed: memory does not grow with the model
  kimijax convert DIR DST --to hf            safetensors under hub names, which transformers loads
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kimijax convert`."""
    add = parser.add_argument
    add("source", metavar="SRC", help="a Hugging Face directory, or one of ours")
    add("destination", metavar="DST", help="a directory that does not exist yet")
    add("--to", choices=("orbax", "hf"), required=True)
    add("--dtype", choices=("float32", "bfloat16"), help="default: as stored")
    add("--weights", choices=("expand", "keep"), default="expand",
        help="keep: quantised experts stay as stored")


def main(args: argparse.Namespace) -> int:
    """Convert, with a progress bar."""
    from pathlib import Path

    from tqdm import tqdm

    from kimijax.convert.run import convert

    with tqdm(unit="B", unit_scale=True, desc=f"convert to {args.to}") as bar:

        def on_bytes(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)

        skipped = convert(
            Path(args.source), Path(args.destination), args.to, args.dtype,
            args.weights == "keep", on_bytes,
        )
    if skipped:
        print(f"{skipped} tensors that are no part of the language model were left out")
    print(f"written to {args.destination}")
    return 0
