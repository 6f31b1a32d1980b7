"""Files of text made a dataset of tokens.

  kimijax tokenize DIR... --out DATASET --tokenizer MODEL_DIR

Read are *.jsonl (also .jsonl.gz), *.parquet, and every other file as one text (also .gz). The last
component of each DIR is the source of its documents. Interrupted, the same command goes on.
"""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager

from kimijax.commands.paths import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kimijax tokenize`."""
    add = parser.add_argument
    add("inputs", metavar="DIR", nargs="+", type=path, help="directories or files")
    add("--out", metavar="DATASET", type=path, required=True,
        help="a directory that does not exist yet")
    add("--tokenizer", metavar="DIR", type=path, help="a model directory; default: bytes")
    add("--jobs", type=int, metavar="N", default=len(os.sched_getaffinity(0)),
        help="processes; the dataset does not depend on it. Default: one for every core")
    add("--text_field", default="text", help="of JSON objects and Parquet rows (default: text)")
    add("--lang_field", default="lang", help="the language, where there is one (default: lang)")
    add("--bad_lines", choices=("fail", "skip"), default="fail",
        help="what to do about a line that is no JSON object with that field, or a text that is "
        "not UTF-8; skip: leave it out and count it")


def main(args: argparse.Namespace) -> int:
    """Tokenize, with a progress bar."""
    from kimijax.data.dataset import Options, tokenize
    from kimijax.data.documents.read import Fields

    options = Options(
        fields=Fields(text=args.text_field, language=args.lang_field), bad_lines=args.bad_lines
    )
    with progress("tokenize") as on_part:
        info = tokenize(args.inputs, args.out, args.tokenizer, args.jobs, options, on_part)
    print(f"{info.documents:,} documents, {info.tokens:,} tokens of a vocabulary of {info.vocab:,}")
    for what, count in (("empty", info.empty), ("faulty", info.bad)):
        if count:
            print(f"{count:,} {what} documents were left out")
    print(f"written to {args.out}")
    return 0


@contextmanager
def progress(title: str) -> Iterator:
    """on_part of `tokenize`, which shows a bar from its first call: a refusal stands alone."""
    import time

    from tqdm import tqdm

    bar, tokens, began = None, 0, time.monotonic()

    def on_part(size: int, count: int, total: int, new: bool) -> None:
        nonlocal bar, tokens
        if bar is None:
            bar = tqdm(total=total, unit="B", unit_scale=True, desc=title)
        if not new:
            bar.initial += size  # done by an earlier run: no part of the rate
        bar.update(size)
        tokens += count * new
        rate = tokens / max(time.monotonic() - began, 1e-9)
        bar.set_postfix_str(f"{rate:,.0f} tokens/s")

    try:
        yield on_part
    finally:
        if bar is not None:
            bar.close()
