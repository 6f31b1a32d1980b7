"""What attention of a sharded row costs in each way, and which way is the cheapest.

Of one row, forward, on the busiest device, with latents that travel (MLA). S tokens on N devices,
H heads, w bytes a number; n, p, v, r numbers of a key, its rotary part, a value, a latent; F FLOP/s
of a device, L bytes/s of the link that it sends over; u the work of the busiest over the mean.

    latents   c = S/N (w (r + p) + 8) bytes                of a device, with position and segment
    attend    a = u S^2/N H (n + p + v) / F                half of all pairs see each other
    project   m = 2 S H r (n + v) / F                      every latent, to every head
    ring      (N-1) max(h, c/L) + h,   h = (a + m) / N     each send behind the work on a visitor
    gather    (N-1) c/L + a + m                            all sends, then all the work
    ulysses   (N-1) (c + x + y)/L + a/u + m/N              only where N divides H
              x = 12 S/N                                   where the queries lie: three int32
              y = S/N H/N (w (n + p) + 4 (v + 2))          queries there, float32 Partials back

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


# Peak bfloat16 and the published bandwidth of a chip over its 4, 6 and 4 links; a CPU roughly, with
# its cores and its memory shared by the devices made of it.
DEVICES = {
    "v5e": Rates(197e12, 1600e9 / 8 / 4),
    "v5p": Rates(459e12, 4800e9 / 8 / 6),
    "v6e": Rates(918e12, 3584e9 / 8 / 4),
    "cpu": Rates(1e10, 5e8),
}
KINDS = {
    "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
    "TPU v6 lite": "v6e", "TPU v6e": "v6e", "cpu": "cpu",
}


def rates_of(kind: str) -> Rates:
    """Of a device by its `device_kind` in JAX. UserError: it is not in the table."""
    if kind not in KINDS:
        raise UserError(
            f"strategy auto knows {', '.join(DEVICES)} and not {kind!r:.40}; name a strategy"
        )
    return DEVICES[KINDS[kind]]


def sent(work: Work) -> dict[str, float]:
    """Bytes that a device sends by strategy; ulysses only where its heads can be dealt out."""
    ways, own = work.ways, work.tokens / work.ways
    latents = (ways - 1) * own * (work.bytes * (work.latent + work.rope) + 8)
    total = {"ring": latents, "gather": latents}
    if work.heads % ways == 0:
        a_head = work.bytes * (work.key + work.rope) + 4 * (work.value + 2)
        moved = own * (12 + work.heads / ways * a_head)
        total["ulysses"] = latents + (ways - 1) * moved
    return total


def seconds(work: Work, rates: Rates) -> dict[str, float]:
    """Of each strategy that can be: the formulas above."""
    s, ways, heads = work.tokens, work.ways, work.heads
    attend = s * s / ways * heads * (work.key + work.rope + work.value) / rates.flops
    project = 2 * s * heads * work.latent * (work.key + work.value) / rates.flops
    sends = {name: total / rates.link for name, total in sent(work).items()}
    total = work.balance * attend + project
    hop = total / ways
    send = sends["ring"] / max(ways - 1, 1)
    cost = {"ring": (ways - 1) * max(hop, send) + hop, "gather": sends["gather"] + total}
    if "ulysses" in sends:
        cost["ulysses"] = sends["ulysses"] + attend + project / ways
    return cost


def choose(work: Work, rates: Rates) -> tuple[str, dict[str, float]]:
    """The strategy of least cost, ring where it is as good as another; seconds of each."""
    cost = seconds(work, rates)
    return min(cost, key=cost.get), cost


def explain(work: Work, strategy: str, cost: dict[str, float]) -> str:
    """One line: what was chosen and what each would take."""
    each = ", ".join(f"{name} {1e3 * t:.3g} ms" for name, t in cost.items())
    return f"attention of {work.tokens} tokens, {work.ways} ways: {strategy} (estimates: {each})"
