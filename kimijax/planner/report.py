"""An estimate and a proof as JSON values and as text. Sizes are those of one device."""

from kimijax.planner import links
from kimijax.planner.chips import GIB
from kimijax.planner.estimate import Estimate, plan_for
from kimijax.planner.prove import Proof


def as_json(e: Estimate, dollars: float, watts: float) -> dict:
    """The closed form. `bytes_per_chip` and what follows it are of one device of jax."""
    price, energy = e.costs(dollars, watts)
    rate = e.job.tokens / e.time
    return {
        "job": e.job.kind, "context": e.job.context, "chunk": e.job.chunk,
        "batch": e.job.batch, "dtype": e.job.dtype, "cache": e.job.latents,
        "topology": e.pod.topology, "chips": e.pod.chips,
        "devices_per_chip": e.pod.chip.devices, "mesh": e.mesh, "strategy": e.strategy,
        "exchange": e.exchanges,
        "closed_form": {
            "bytes_per_chip": round(e.bytes),
            "memory_per_chip": round(e.pod.chip.memory),
            "fits": e.fits,
            "parts": {part: round(size) for part, size in e.parts.items()},
            "flops_per_token": e.flops_per_token,
            "flops_per_chip": e.flops,
            "hbm_bytes_per_chip": e.hbm,
            "link_bytes_per_chip": e.links,
            "link_bytes_per_layer": _layers(e),
            "seconds": e.seconds,
            "bound": e.bound,
            "seconds_to_first_token" if e.job.kind == "prefill" else "seconds_per_step": e.time,
            "tokens_per_second": rate,
            "dollars_per_million_tokens": price,
            "joules_per_token": energy,
        },
    }


def _layers(e: Estimate) -> dict[str, dict[str, float]]:
    """By kind of layer; of several of one kind the last."""
    plan = plan_for(e.job, e.pod, e.mesh, e.strategy)
    return {_kind(layer): links.layer_links(e.job, plan, layer) for layer in e.job.cfg.layers}


def _kind(layer) -> str:
    return " + ".join(
        type(x).__name__.removesuffix("Config") for x in (layer.mixer, layer.ffn)
    )


def proof_json(e: Estimate, proof: Proof) -> dict:
    """What the compiler said, and how far the closed form is from it."""
    found = {
        "fits": proof.fits,
        "bytes_per_chip": proof.needed,
        "arguments": proof.arguments, "outputs": proof.outputs, "donated": proof.donated,
        "temporaries": proof.temporaries,
        "compile_seconds": proof.compile_seconds,
        "compile_cpu_seconds": proof.cpu_seconds,
        "peak_rss_gib": proof.rss_gib,
        "closed_form_over_proven": proof.needed and e.bytes / proof.needed,
        "largest_buffers": [b._asdict() for b in proof.buffers],
        "collectives": [c._asdict() for c in proof.collectives],
    }
    return found | ({} if proof.fits else {"refused": proof.refused})


def as_text(e: Estimate, facts: dict) -> str:
    """Some lines for people."""
    form = facts["closed_form"]
    mesh = ",".join(f"{axis}={size}" for axis, size in e.mesh.items() if size > 1) or "one device"
    unit = "chip" if e.pod.chip.devices == 1 else f"device ({e.pod.chip.devices} a chip)"
    parts = sorted(((s, p) for p, s in e.parts.items() if s >= 1e-3 * e.bytes), reverse=True)
    bounds = ", ".join(f"{name} {_seconds(t)}" for name, t in e.seconds.items())
    flops = ", ".join(f"{part} {x:.3g}" for part, x in e.flops_per_token.items() if x)
    sends = ", ".join(f"{part} {_size(x)}" for part, x in e.links.items())
    tokens = f", experts' tokens {' and '.join(e.exchanges)}" if e.exchanges else ""
    what = "to the first token" if e.job.kind == "prefill" else "a step"
    return "\n".join([
        f"{e.job.kind} of {e.job.batch} x {e.job.context:,} tokens on {e.pod.topology} "
        f"({e.pod.chips} chips), mesh {mesh}, {e.strategy}{tokens}",
        f"  bytes per {unit}: {_size(e.bytes)} of {_size(e.pod.chip.memory)}: "
        f"{'fits' if e.fits else 'does not fit'}",
        "    " + ", ".join(f"{part} {_size(size)}" for size, part in parts),
        f"  FLOPs per token: {sum(e.flops_per_token.values()):.4g}: {flops}",
        f"  sent per {unit}: {sends or 'nothing'}",
        f"  at least {_seconds(e.time)} {what}, {form['tokens_per_second']:.4g} tokens/s: "
        f"bound by {e.bound} ({bounds})",
        f"  ${form['dollars_per_million_tokens']:.4g} per million tokens, "
        f"{form['joules_per_token']:.4g} J per token",
    ])


def proof_text(e: Estimate, proof: Proof) -> str:
    """The same of a proof; of a refusal what to change."""
    lines = [
        f"  compiled in {proof.compile_seconds:.1f} s ({proof.cpu_seconds:.1f} s of CPU time), "
        f"peak RSS {proof.rss_gib:.2f} GiB: "
        f"{_size(proof.needed)} per device, closed form {e.bytes / proof.needed - 1:+.1%}"
    ]
    if proof.fits:
        lines.append(
            f"    arguments {_size(proof.arguments)}, outputs {_size(proof.outputs)} "
            f"({_size(proof.donated)} of them donated), temporaries {_size(proof.temporaries)}"
        )
    else:
        lines[0] = f"  does not fit, said the compiler after {proof.compile_seconds:.1f} s: " + (
            f"{_size(proof.needed)} of {_size(e.pod.chip.memory)}"
        )
        lines.append(f"    {proof.refused}")
        lines.append("    change: fewer --context or --batch, more chips, a mesh with more "
                     "seq or expert, narrower --weights")
    lines += [f"    buffer {_size(b.bytes):>10}  {b.shapes[:80]}" for b in proof.buffers]
    for c in proof.collectives:
        how = "asynchronous" if c.asynchronous else "synchronous"
        lines.append(f"    {c.count:>3} x {c.kind}, {how}, {_size(c.bytes)} (loops count once)")
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit, size in (("GiB", GIB), ("MiB", 2**20)):
        if count >= size / 10:
            return f"{count / size:.2f} {unit}"
    return f"{count / 2**10:.1f} KiB"


def _seconds(t: float) -> str:
    return f"{t:.3g} s" if t >= 1 else f"{1e3 * t:.3g} ms"
