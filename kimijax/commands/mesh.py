"""The options that put a model on several devices, shared by the commands that run one."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from kimijax.commands.processes import add_processes

if TYPE_CHECKING:
    from kimijax.ops.attend import Ops
    from kimijax.parallel.plan import Plan

VIRTUAL = 512  # devices a CPU host stands in for at most; each costs threads and memory


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """--mesh and what makes several processes, of a command that runs a model."""
    parser.add_argument(
        "--mesh", metavar="AXIS=N[,AXIS=N...]",
        help="devices by axis, as data=1,seq=4,expert=2 (axes data, seq, expert, tensor); a CPU "
        "host stands in for as many as are asked for. Default: one device",
    )
    add_processes(parser)


def add_impl(parser: argparse.ArgumentParser) -> None:
    """--impl, of a command that has a use for slow implementations."""
    parser.add_argument(
        "--impl", choices=("ref", "xla", "pallas", "pallas_interpret"),
        help="of the ops: pallas are kernels of a TPU, pallas_interpret the same on any device, "
        "slowly. Default: pallas on a TPU, xla elsewhere",
    )


def add_layout(parser: argparse.ArgumentParser) -> None:
    """--order and --strategy, of a command that reads whole rows without a cache."""
    add = parser.add_argument
    add("--order", help="of a row's tokens over the devices of --mesh: contiguous (default), "
        "zigzag or striped")
    add("--strategy", help="of attention on --mesh: ring (default), gather, ulysses, hybrid "
        "(ulysses along the axis expert, a ring along seq), hybrid:N (ulysses in groups of N), "
        "ring_dma (one kernel, of TPUs) or auto")


def plan_of(args: argparse.Namespace, **fixed) -> Plan | None:
    """The Plan that the options ask for; None: one device. UserError: it cannot be had here.

    fixed  fields of the Plan that the command sets, such as train=True
    """
    from kimijax.errors import UserError
    from kimijax.parallel.mesh import make_mesh, parse_mesh
    from kimijax.parallel.plan import Plan

    asked = {name: getattr(args, name, None) for name in ("order", "strategy")}
    asked = {name: value for name, value in asked.items() if value is not None}
    if args.mesh is None:
        if asked:
            raise UserError(f"--{min(asked)} is about several devices: it needs --mesh")
        return None
    sizes = parse_mesh(args.mesh)
    _show_cpu_devices(-(-math.prod(sizes.values()) // (args.processes or 1)))
    return Plan(make_mesh(sizes), impl=getattr(args, "impl", None), **asked, **fixed)


def ops_of(args: argparse.Namespace, plan: Plan | None) -> Ops:
    """The operations for a model on one device, or where the plan says."""
    from kimijax.ops.attend import local, usual_impl

    return local(args.impl or usual_impl()) if plan is None else plan.ops()


def _show_cpu_devices(count: int) -> None:
    """Let a CPU host show so many devices; other platforms show their own, whatever this says."""
    import jax

    if jax.config.jax_num_cpu_devices < count <= VIRTUAL:
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError:
            pass  # jax has begun: the mesh is made of the devices it has, or refused
