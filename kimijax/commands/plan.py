"""What a job needs on a pod of TPUs: bytes, FLOPs, traffic, time and price; nothing is run.

  kimijax plan --model kimi_k2 --job decode --context 2097152 --topology v5p:8x8x8
  kimijax plan --model kimi_k2 --job prefill --chip v5p            # the longest context
  kimijax plan --model DIR --job train --context 131072 --chip v5p # the smallest topology
Without --prove all is closed form: times are bounds, the largest of matmul, HBM and links, and know
no latency. --prove compiles the program of a run with libtpu (the extra [aot]) and says what that
says; exit code 3: it does not fit. On tpu7x sizes are those of a device, half a chip.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from kimijax.commands.checkpoint import DTYPES, add_cache
from kimijax.commands.paths import path

if TYPE_CHECKING:
    from kimijax.planner.estimate import Estimate
    from kimijax.planner.job import Job

DOES_NOT_FIT = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `kimijax plan`."""
    add = parser.add_argument
    add("--model", required=True, type=path, metavar="NAME|DIR",
        help="a preset, or a checkpoint directory, of which the config is read")
    add("--job", required=True, choices=("prefill", "decode", "train"),
        help="prefill: a row is read. decode: one token behind a cache. train: a step of MuonClip")
    add("--context", metavar="N[,N...]", help="tokens of a row. Default: the longest that fits")
    add("--chunk", type=int, metavar="N",
        help="tokens of a call of prefill, behind a cache. Default: rows are read whole, without")
    add("--topology", metavar="KIND:AxBxC",
        help="such as v5p:8x8x8 or v5e:4x4. Default: the smallest of --chip that fits")
    add("--chip", default="v5p",
        help="v5e, v5p (default), v6e or tpu7x, where no topology is named")
    add("--mesh", metavar="AXIS=N[,AXIS=N...]",
        help="over axes data, seq, expert and tensor. Default: the fastest that fits")
    add("--strategy", help="of attention over devices, as of `kimijax logits`; default: by cost")
    add("--batch", type=int, default=1, metavar="B", help="rows")
    add_cache(parser)
    add("--dtype", choices=DTYPES, default="bfloat16",
        help="of activations, caches and float weights (those in training are float32)")
    add("--weights", choices=("bf16", "fp8", "int4"),
        help="how matrices are held. Default: as the config says")
    add("--dollars", type=float, metavar="D",
        help="a chip-hour. Default: assumed, 1.20 v5e, 4.20 v5p, 2.70 v6e, 12.00 tpu7x")
    add("--watts", type=float, metavar="W",
        help="of a chip. Default: assumed, 170 v5e, 450 v5p, 300 v6e, 900 tpu7x")
    add("--prove", action="store_true", help="compile it; nothing is run")
    add("--json", metavar="FILE", help="write all of it there: an object, of several a list")


def main(args: argparse.Namespace) -> int:
    """Print a plan for each context; 3: the compiler says that one does not fit."""
    # Read once, when jax and libtpu are loaded: planning takes no accelerator.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from kernels_pallas import aot
    from kimijax.errors import UserError
    from kimijax.planner import report
    from kimijax.planner.prove import prove

    for name, value in aot.ALONE.items():
        os.environ.setdefault(name, value)
    if args.prove and (why := aot.available()):
        raise UserError(f"--prove: {why}")
    plans, code = [], 0
    for e in _estimates(args):
        dollars = e.pod.chip.dollars if args.dollars is None else args.dollars
        watts = e.pod.chip.watts if args.watts is None else args.watts
        facts = {"model": args.model} | report.as_json(e, dollars, watts)
        print(report.as_text(e, facts), flush=True)
        if args.prove:
            proof = prove(e)
            facts["proven"] = report.proof_json(e, proof)
            print(report.proof_text(e, proof), flush=True)
            code = code if proof.fits else DOES_NOT_FIT
        plans.append(facts)
    if args.json:
        _write(args.json, plans[0] if len(plans) == 1 else plans)
    return code


def _estimates(args: argparse.Namespace) -> list[Estimate]:
    """One for each context, or that of the longest."""
    from kimijax.errors import UserError
    from kimijax.parallel.mesh import parse_mesh
    from kimijax.planner import search
    from kimijax.planner.chips import pod_of
    from kimijax.planner.estimate import estimate

    mesh = None if args.mesh is None else parse_mesh(args.mesh)
    if args.topology is None and (mesh or not args.context):
        raise UserError(
            f"{'--mesh' if mesh else 'no --context'} needs --topology: name one, as v5p:8x8x8"
        )
    for name in ("dollars", "watts"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < float("inf"):
            raise UserError(f"--{name} {getattr(args, name)}: must be above 0")
    pod = args.topology and pod_of(args.topology)
    if not args.context:
        least = _job(args, max(search.LEAST, args.chunk or 0))
        return [search.longest(least, pod, mesh, args.strategy)]
    jobs = [_job(args, _context(text)) for text in args.context.split(",")]
    if pod is None:
        return [search.smallest(job, args.chip, args.strategy) for job in jobs]
    if mesh and args.prove:  # asked in so many words: the compiler decides
        search.check_product(mesh, pod)
        return [estimate(job, pod, mesh, args.strategy) for job in jobs]
    return [search.best(job, pod, mesh, args.strategy) for job in jobs]


def _context(text: str) -> int:
    from kimijax.errors import UserError

    if not text.strip().isdecimal():
        raise UserError(f"--context {text!r:.40} is no number of tokens; write it as 131072")
    return int(text[:40])


def _job(args: argparse.Namespace, context: int) -> Job:
    from kimijax.commands.describe import config_of
    from kimijax.planner.job import Job, held

    cfg = config_of(args.model)
    if args.weights:
        cfg = held(cfg, args.weights)
    return Job(cfg, args.job, context, args.batch, args.dtype, args.chunk, args.cache)


def _write(target: str, facts: dict | list) -> None:
    """The whole file, or none."""
    import json
    import tempfile
    from pathlib import Path

    from kimijax.errors import UserError

    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=Path(target).absolute().parent, prefix=".", suffix=".json", delete=False
        ) as file:
            json.dump(facts, file, indent=1)
        os.chmod(file.name, 0o644)
        os.replace(file.name, target)
    except OSError as error:
        raise UserError(f"--json {target}: cannot be written: {error.strerror}") from error
