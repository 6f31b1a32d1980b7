"""What attention of a sharded row costs in each way, and which way is the cheapest.

Of one row, forward, on the busiest device, with latents that travel (MLA). S tokens on N devices,
H heads, w bytes a number; n, p, v, r numbers of a key, its rotary part, a value, a latent; F FLOP/s
of a device, L bytes/s of the link that it sends over; u the work of the busiest over the mean.

    latents   c = S/N (w (r + p) + 8) bytes                of a device, with position and segment
    attend    a = S^2/N H (n + p + v) / F                  half of all pairs see each other
    project   m = 2 S H r (n + v) / F                      every latent, to every head
    gather    (N-1) c/L + u a + m                          all sends, then all the work
    hybrid    (G-1) (c + x + y)/L                          groups of G share heads: G divides N, H
                + (R-1) max(h, G c/L) + h                  R = N/G groups; latents of a group travel
              h = (e a + m/G) / R                          the work on a visitor hides a send
              x = 12 S/N                                   where the queries lie: three int32
              y = S/N H/G (w (n + p) + 4 (v + 2))          queries there, float32 Partials back
              e = 1 + (u - 1) (N - G)/(N - 1)              groups are more even than devices
    ring      hybrid with G = 1                            any heads
    ulysses   hybrid with G = N                            only where N divides H

A backward has the same terms with larger factors. Ring never loses to gather in this count, which
knows neither latencies nor the work of merging; gather is there to be chosen by name.
"""

from typing import NamedTuple

from kimijax.errors import UserError


class Work(NamedTuple):
    """Attention of one row; `heads` are those of one device where heads are dealt out as well."""

    tokens: int
    ways: int
    heads: int
    key: int
    rope: int
    value: int
    latent: int
    bytes: int = 2  # of a number that travels
    balance: float = 1.0  # work of the busiest device / mean, in the order of the tokens


class Rates(NamedTuple):
    """Of one device."""

    flops: float  # FLOP/s
    link: float  # bytes/s of one link in one direction, which is what a ring uses


# Peak bfloat16 and the published bandwidth of a chip over its 4, 6, 4 and 6 links; of
# tpu7x a device is half a chip. A CPU roughly: the devices made of it share cores and memory.
DEVICES = {
    "v5e": Rates(197e12, 1600e9 / 8 / 4),
    "v5p": Rates(459e12, 4800e9 / 8 / 6),
    "v6e": Rates(918e12, 3584e9 / 8 / 4),
    "tpu7x": Rates(2307e12 / 2, 9600e9 / 8 / 2 / 6),  # both directions are published
    "cpu": Rates(1e10, 5e8),
}
KINDS = {
    "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
    "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x", "cpu": "cpu",
}


def rates_of(kind: str) -> Rates:
    """Of a device by its `device_kind` in JAX. UserError: it is not in the table."""
    if kind not in KINDS:
        raise UserError(
            f"strategy auto knows {', '.join(DEVICES)} and not {kind!r:.40}; name a strategy"
        )
    return DEVICES[KINDS[kind]]


def groups(work: Work) -> dict[str, int]:
    """Devices that share heads among them, of every strategy in which latents travel."""
    ways = work.ways
    sizes = [g for g in range(2, ways) if ways % g == 0 and work.heads % g == 0]
    found = {"ring": 1} | {f"hybrid:{g}": g for g in sizes}
    return found | ({"ulysses": ways} if work.heads % ways == 0 else {})


def _sends(work: Work, group: int) -> tuple[float, float]:
    """Bytes that a device sends within its group, and in one hop of the ring of groups."""
    own = work.tokens / work.ways
    latents = own * (work.bytes * (work.latent + work.rope) + 8)
    a_head = work.bytes * (work.key + work.rope) + 4 * (work.value + 2)
    moved = own * (12 + work.heads / group * a_head)
    return (group - 1) * (latents + moved), group * latents


def sent(work: Work) -> dict[str, float]:
    """Bytes that a device sends by strategy; those that share heads only where they divide."""
    total = {}
    for name, group in groups(work).items():
        within, hop = _sends(work, group)
        total[name] = within + (work.ways // group - 1) * hop
    return total | {"gather": total["ring"]}


def seconds(work: Work, rates: Rates) -> dict[str, float]:
    """Of each strategy that can be: the formulas above."""
    s, ways, heads = work.tokens, work.ways, work.heads
    attend = s * s / ways * heads * (work.key + work.rope + work.value) / rates.flops
    project = 2 * s * heads * work.latent * (work.key + work.value) / rates.flops
    cost = {}
    for name, group in groups(work).items():
        within, hop = (x / rates.link for x in _sends(work, group))
        rings = ways // group
        uneven = 1 + (work.balance - 1) * (ways - group) / max(ways - 1, 1)
        work_here = (uneven * attend + project / group) / rings
        cost[name] = within + (rings - 1) * max(work_here, hop) + work_here
    cost["gather"] = sent(work)["gather"] / rates.link + work.balance * attend + project
    return cost


def choose(work: Work, rates: Rates) -> tuple[str, dict[str, float]]:
    """The strategy of least cost, ring where it is as good as another; seconds of each."""
    cost = seconds(work, rates)
    return min(cost, key=cost.get), cost


def explain(work: Work, strategy: str, cost: dict[str, float]) -> str:
    """One line: what was chosen and what each would take."""
    each = ", ".join(f"{name} {1e3 * t:.3g} ms" for name, t in cost.items())
    return f"attention of {work.tokens} tokens, {work.ways} ways: {strategy} (estimates: {each})"
