"""How much of the tokenizer library's own rate is left when `kimijax tokenize` makes a dataset?

Ask     Bytes of text a second and core, next to the library `tokenizers` encoding the same texts.
Run     python -m experiments.tokenize_speed --work DIR [--megabytes 100]
Cost    about six minutes on two idle cores and 500 MB of disk space.
Answer  100 MB, two cores (commit 04e2b8d): with two processes 1.03 of the library a core by the
        clock and 1.04 by seconds of the processor; with one 0.95 by the latter (0.69 by the clock,
        tests running beside it). Bytes: 40.8 MB a second with two.

The text is this environment's Python files as JSONL; a BPE of 32,768 tokens is trained on a part of
them. The library's side is `encode_batch_fast` of all texts in one thread, the time of that call
alone, before and after each of ours; ours is the whole command, from the start of Python to the
dataset's last rename, with one process and with two, so divided by two. Bytes, which no library
encodes, come last. On a machine with other work the clock says little; seconds of the processor
count then.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from kimijax.cli import run_module

COMMAND = "import sys; from kimijax.cli import run; sys.argv[0] = 'kimijax'; run()"
SAMPLE, VOCAB = 10_000_000, 32_768  # bytes and tokens of the BPE that is trained
BATCH = 256  # texts that the library encodes at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the measurement."""
    parser.add_argument("--work", required=True, metavar="DIR", help="an empty directory to use")
    parser.add_argument("--megabytes", type=float, default=100.0)


def take_texts(size: float) -> list[str]:
    """Python files of about `size` bytes in all, some of them again if there are too few."""
    from kimijax.data import corpus

    texts = [text.decode("utf-8", "replace") for text in corpus.load_documents("train")]
    taken, total = [], 0
    while total < size:
        taken.append(texts[len(taken) % len(texts)])
        total += len(taken[-1].encode())
    return taken


def train_tokenizer(texts: list[str], directory: Path) -> None:
    """A byte-level BPE as a model directory has it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, show_progress=False, special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    step = max(1, sum(map(len, texts)) // SAMPLE)
    tokenizer.train_from_iterator(texts[::step], trainer)
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))


def library_seconds(texts: list[str], directory: Path) -> tuple[float, float]:
    """Seconds by the clock and of the processor, of the library's fastest call in one thread."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    began, used = time.perf_counter(), time.process_time()
    for i in range(0, len(texts), BATCH):
        tokenizer.encode_batch_fast(texts[i : i + BATCH], add_special_tokens=False)
    return time.perf_counter() - began, time.process_time() - used


def command_seconds(texts: Path, work: Path, jobs: int, *options: str) -> tuple[float, float]:
    """Seconds of `kimijax tokenize` from start to end, as above."""
    shutil.rmtree(work / "out", ignore_errors=True)
    began, used = time.perf_counter(), _children_seconds()
    subprocess.run(
        [sys.executable, "-c", COMMAND, "tokenize", str(texts), "--out",
         str(work / "out"), "--jobs", str(jobs), *options], check=True, capture_output=True,
    )
    return time.perf_counter() - began, _children_seconds() - used


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main(args: argparse.Namespace) -> int:
    """Write the texts, train, measure in turn, print every piece and the sums."""
    import numpy as np

    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    work, model = Path(args.work), Path(args.work) / "model"
    work.mkdir(parents=True, exist_ok=True)
    texts = take_texts(args.megabytes * 1e6)
    train_tokenizer(texts, model)
    path = work / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    size = sum(len(text.encode()) for text in texts) / 1e6
    before = np.array(library_seconds(texts, model))
    for jobs in (1, 2):
        clock, used = command_seconds(path, work, jobs, "--tokenizer", str(model))
        after = np.array(library_seconds(texts, model))
        seconds = np.stack([before, after, [clock * jobs, used]])
        shares, before = (before + after) / 2 / seconds[2], after
        for name, (rate, by_cpu) in zip(("library", "again", f"jobs {jobs}"), size / seconds,
                                        strict=True):
            print(f"{name}: {rate:.2f} MB/s a core by the clock, {by_cpu:.2f} by the CPU")
        print(f"  {shares[0]:.2f} and {shares[1]:.2f} of the library", flush=True)
    for jobs in (1, 2):
        clock, used = command_seconds(path, work, jobs)
        print(f"bytes, jobs {jobs}: {size / clock:.1f} MB/s in all, {size / used:.1f} by the CPU")
    return 0


if __name__ == "__main__":
    run_module(add_arguments, main, __doc__)
