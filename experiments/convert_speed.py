"""How fast and in how much memory is a large checkpoint converted, next to copying its files?

Ask     Rate of `kimijax convert --to orbax` relative to `cp` plus fsync; peak RSS.
Run     python -m experiments.convert_speed --work DIR [--gigabytes 8] [--pairs 3]
Cost    about four minutes and three times the size in disk space.
Answer  see the README's results.

The checkpoint is synthetic: Moonlight's layers in bfloat16, as many as fill the size, in shards of
1 GB. Each pair copies, then converts, every file evicted from the page cache before both where the
machine allows it. Conversion runs in a process of its own, whose peak RSS is reported.
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

MEASURE = "import sys; from kimijax.cli import run; sys.argv[0] = 'kimijax'; run()"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the measurement."""
    parser.add_argument("--work", required=True, metavar="DIR", help="an empty directory to use")
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--pairs", type=int, default=3, help="measurements, one after the other")


def synthesize(directory: Path, size: float) -> int:
    """Write a sharded checkpoint of about `size` bytes; its true size in bytes."""
    import dataclasses

    import ml_dtypes
    import numpy as np

    from kimijax.config import group_layers
    from kimijax.convert.export_config import to_hub
    from kimijax.convert.names import rules
    from kimijax.convert.write import ShardWriter
    from kimijax.presets import moonlight_16b

    whole = moonlight_16b()
    per_layer = 2 * sum(int(np.prod(r.shape)) for r in rules(whole) if ".layers.1." in r.name)
    fixed = 2 * 2 * whole.vocab * whole.width
    count = max(2, round((size - fixed) / per_layer) + 1)
    cfg = dataclasses.replace(whole, groups=group_layers(whole.layers[:count]))
    plan = {r.name: ("BF16", r.shape) for r in rules(cfg)}
    noise = np.random.default_rng(0).normal(size=1 << 24).astype(ml_dtypes.bfloat16)
    with ShardWriter(directory, plan, shard_bytes=2**30) as writer:
        for name, (_, shape) in plan.items():
            writer.put(name, np.resize(noise, shape))
    (directory / "config.json").write_text(json.dumps(to_hub(cfg)))
    return sum(f.stat().st_size for f in directory.iterdir())


def forget(directory: Path) -> None:
    """Drop the files of a directory from the page cache: both sides start from the disk."""
    os.sync()
    for path in directory.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def copy(source: Path, target: Path) -> float:
    """Seconds of cp -r and fsync of what it wrote."""
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    sync(target)
    return time.perf_counter() - began


def sync(directory: Path) -> None:
    """fsync of every file."""
    for path in directory.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)


def convert(source: Path, target: Path) -> float:
    """Seconds of the command from start to end, and fsync of what it wrote."""
    began = time.perf_counter()
    command = [sys.executable, "-c", MEASURE, "convert", str(source), str(target), "--to", "orbax"]
    subprocess.run(command, check=True)
    sync(target)
    return time.perf_counter() - began


def main(args: argparse.Namespace) -> int:
    """Make the checkpoint, measure in turn, print every pair."""
    work = Path(args.work)
    source, copied, converted = (work / name for name in ("source", "copied", "converted"))
    size = synthesize(source, args.gigabytes * 1e9)
    print(f"{size / 1e9:.2f} GB in {len(list(source.glob('*.safetensors')))} shards")
    ratios = []
    for _ in range(args.pairs):
        seconds = []
        for act, target in ((copy, copied), (convert, converted)):
            shutil.rmtree(target, ignore_errors=True)
            forget(work)
            seconds.append(act(source, target))
        ratios.append(seconds[0] / seconds[1])
        print(f"cp + fsync {seconds[0]:.1f} s, convert {seconds[1]:.1f} s: {ratios[-1]:.2f} of cp")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"median {sorted(ratios)[len(ratios) // 2]:.2f} of cp, peak RSS {peak:.2f} GiB")
    return 0


if __name__ == "__main__":
    run_module(add_arguments, main, __doc__)
