"""Do Kimi K2 and Kimi Linear at two million tokens fit slices of TPUs? Their compiler's answer.

Ask     Bytes of a chip, all layers, one row of 2,097,152 tokens: reading it whole or in chunks, a
        token behind it, a step of MuonClip over it. What is sent, what is synchronous, and how far
        the closed form of `kimijax plan` is from it.
Run     python -m experiments.proofs --out DIR [--only NAME[,NAME...]] [--dry_run]
Cost    half an hour of two cores and 4 GiB, nothing else running. Needs libtpu (the extra [aot])
        and no TPU. What is proven already is not proven again: interrupted, the same command goes
        on.
Answer  experiments/plans/proofs/results.md; the short of it, README, "Plan a pod".

Each is `kimijax plan --prove` of what a run compiles, in a process of its own. Compiled, not run:
no time is measured but that of the compiler.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from kimijax.cli import run_module
from kimijax.commands.paths import writable
from kimijax.errors import UserError

CONTEXT = 2**21
PLAN = "from kimijax.cli import run; run()"
K2, LINEAR = "kimi_k2", "kimi_linear_48b"
DECODE, CHUNKS = "--job decode", "--job prefill --chunk 16384"
MESH = "--mesh seq=8,expert=64"
CASES = {
    "k2-v5p-8x8x8-prefill": f"{K2} v5p:8x8x8 --job prefill {MESH}",
    "k2-v5p-8x8x8-prefill-int4": f"{K2} v5p:8x8x8 --job prefill {MESH} --weights int4",
    "k2-v5p-8x8x8-decode": f"{K2} v5p:8x8x8 {DECODE} {MESH}",
    "k2-v5p-8x8x8-decode-int4": f"{K2} v5p:8x8x8 {DECODE} {MESH} --weights int4",
    "k2-v5p-4x4x8-prefill": f"{K2} v5p:4x4x8 --job prefill",
    "k2-v5p-4x4x8-prefill-int4": f"{K2} v5p:4x4x8 --job prefill --weights int4",
    "k2-v5p-4x4x8-decode": f"{K2} v5p:4x4x8 {DECODE}",
    "k2-v5p-4x4x8-decode-int4": f"{K2} v5p:4x4x8 {DECODE} --weights int4",
    "k2-v5p-4x4x8-decode-cache-int8": f"{K2} v5p:4x4x8 {DECODE} --cache int8",
    "k2-v6e-8x16-chunks": f"{K2} v6e:8x16 {CHUNKS}",
    "k2-v6e-8x16-chunks-int4": f"{K2} v6e:8x16 {CHUNKS} --weights int4",
    "k2-v6e-8x16-chunks-cache-int8": f"{K2} v6e:8x16 {CHUNKS} --cache int8",
    "k2-v6e-8x16-decode": f"{K2} v6e:8x16 {DECODE}",
    "k2-v6e-8x16-decode-int4": f"{K2} v6e:8x16 {DECODE} --weights int4",
    "k2-v6e-8x8-decode-int4-cache-int8": f"{K2} v6e:8x8 {DECODE} --weights int4 --cache int8",
    "k2-v5e-16x16-decode-cache-int8": f"{K2} v5e:16x16 {DECODE} --cache int8",
    "k2-tpu7x-2x2x4-chunks": f"{K2} tpu7x:2x2x4 {CHUNKS}",
    "k2-tpu7x-2x2x2-chunks-int4": f"{K2} tpu7x:2x2x2 {CHUNKS} --weights int4",
    "k2-tpu7x-2x2x4-decode": f"{K2} tpu7x:2x2x4 {DECODE}",
    "k2-tpu7x-2x2x2-decode-int4": f"{K2} tpu7x:2x2x2 {DECODE} --weights int4",
    "linear-v5e-4x4-chunks": f"{LINEAR} v5e:4x4 {CHUNKS}",
    "linear-v5e-4x4-decode": f"{LINEAR} v5e:4x4 {DECODE}",
    "linear-v5e-4x4-decode-int4": f"{LINEAR} v5e:4x4 {DECODE} --weights int4",
    "linear-v5e-2x4-decode-cache-int8": f"{LINEAR} v5e:2x4 {DECODE} --cache int8",
    "k2-v5p-8x8x8-train": f"{K2} v5p:8x8x8 --job train --mesh seq=128,expert=4",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the proofs."""
    parser.add_argument("--out", required=True, metavar="DIR",
                        help="where a JSON file of each proof and results.md are written")
    parser.add_argument("--only", metavar="NAME[,NAME...]", help="of those that --dry_run lists")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, run none")


def main(args: argparse.Namespace) -> int:
    """Prove what is not proven yet and write the table; 1: something does not fit or failed."""
    names = list(CASES) if args.only is None else args.only.split(",")
    if unknown := [name for name in names if name not in CASES]:
        raise UserError(f"--only {unknown[0]!r:.60}: there are {', '.join(CASES)}")
    if args.dry_run:
        for name in names:
            print(f"{name}: kimijax {shlex.join(command(name))}")
        return 0
    out, failed = writable(args.out), []
    out.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        if not (out / f"{name}.json").exists():
            print(f"[{i + 1}/{len(names)}] {name}", flush=True)
            done = subprocess.run(
                [sys.executable, "-c", PLAN, *command(name), "--json", str(out / f"{name}.json")],
                env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
            )
            failed += [name] if done.returncode else []
    table = page(out)
    temporary = out / "results.md.part"
    temporary.write_text(table)
    temporary.replace(out / "results.md")
    print(table)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def command(name: str) -> list[str]:
    """Arguments of `kimijax` for a case."""
    model, topology, *rest = CASES[name].split()
    return ["plan", "--prove", "--model", model, "--context", str(CONTEXT), "--topology", topology,
            *rest]


HEAD = """# Two million tokens, proven by the compiler of TPUs

Written by `python -m experiments.proofs --out DIR`: one row of 2,097,152 tokens, compiled by libtpu
for chips that were not there, and never run. GiB of a device (tpu7x has two a chip); "off" is the
closed form of `kimijax plan` against what is proven. Of the compiler: seconds, seconds of CPU time
(other programs lengthen the former alone), peak RSS.

| model, job | slice, mesh | closed form | proven | off | temp. | compile s | CPU s | RSS GiB |
|---|---|---|---|---|---|---|---|---|
"""


def page(out: Path) -> str:
    """The table of all that is proven in a directory."""
    rows = []
    for name in CASES:
        if (path := out / f"{name}.json").exists():
            rows.append(_row(name, json.loads(path.read_text())))
    return HEAD + "\n".join(rows) + "\n"


def _row(name: str, plan: dict) -> str:
    proven, form = plan["proven"], plan["closed_form"]["bytes_per_chip"] / 2**30
    mesh = ",".join(f"{axis}={n}" for axis, n in plan["mesh"].items() if n > 1)
    what = f"{plan['model']}, {plan['job']}"
    what += f" in {plan['chunk']:,}" if plan["chunk"] else ""
    what += ", int4" if "int4" in name else ""
    what += ", cache in int8" if plan.get("cache") else ""
    if not proven["fits"]:
        return f"| {what} | {plan['topology']}, {mesh} | {form:.2f} | does not fit | | | | | |"
    needed = proven["bytes_per_chip"] / 2**30
    return (
        f"| {what} | {plan['topology']}, {mesh} | {form:.2f} | {needed:.2f} | "
        f"{form / needed - 1:+.1%} | {proven['temporaries'] / 2**30:.2f} | "
        f"{proven['compile_seconds']:.0f} | {proven['compile_cpu_seconds']:.0f} | "
        f"{proven['peak_rss_gib']:.2f} |"
    )


if __name__ == "__main__":
    run_module(add_arguments, main, __doc__)
