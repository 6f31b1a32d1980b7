"""The page of `experiments.plan_2m`: tables in Markdown and pictures of its results."""

from collections.abc import Callable, Sequence
from pathlib import Path

HEAD = """# The Kimi models on slices of TPUs, {first} to {last} tokens

Written by `python -m experiments.plan_2m --out experiments/plans/plan_2m` in half a minute;
`results.json`, written beside it, has every number with its mesh. All is closed form (`kimijax
plan`): **no time was measured on a TPU**. A time is the largest of three bounds, products at the
peak of a chip, bytes at the bandwidth of its memory, bytes over its links, without latencies: a run
is slower.

- A cell: the smallest slice on which the job fits, GiB of a chip, bounds of time, dollars per
  million tokens at batch 1. Slices have the usual shapes, each twice the one before; those of v5p
  and tpu7x begin at 4 chips. Each job has the slice and mesh that suit it. "none": on the largest
  slice a chip needs so much.
- prefill: one row read, seconds to its first token, tokens a second. "in 16K": in chunks of 16,384
  tokens (of 4,096, 16,384 and 65,536 and whole rows, the fastest on the smallest slice that fits
  any; of equals but for 5% the one with least memory) behind the cache that it leaves, which is
  counted (`kimijax generate --chunk`). Else whole, which keeps no cache (`kimijax logits`); †: with
  the one it would leave it does not fit. decode: one token behind as many, ms.
- Memory of a chip, GiB: {memory}. Assumed dollars of a chip-hour:
  {dollars}; `kimijax plan --dollars` takes yours.
- On v5e beyond 16 chips libtpu compiles no ragged all-to-all: where experts lie on more chips than
  a token has choices, 8 of K2, tokens go to them in one that has room for all (`exchange.py`).
- Matrices held as int4 are not cut along their channels, so `tensor` is 1: every chip has the rest
  of the weights whole, 22 GiB of K2, which no v5e holds, and reads them for every token: behind
  2,097,152 tokens on v6e:8x16 a token takes 14.3 ms against 7.66 ms in bf16.
- exact: as released. K2 and Moonlight attend to all that came before; of Kimi Linear 7 layers do,
  and 20 keep a state (KDA), which neither alternative changes.
- expanded: a cache of the keys and values of all heads, dealt over heads too, instead of latents.
  It is a matter of decoding alone. kimijax keeps none.
- chosen: attention to 32 chosen blocks of 64 tokens and the neighbourhood (`CompressedConfig`) in
  the place of MLA, with the same heads and latents. **No such weights are released**: it is what
  the architecture would cost, and what it would answer is not known. It is planned to read rows
  whole, not in chunks. Of its products those count
  that are needed; over a ring kimijax does up to devices / 4 times as many of chosen blocks. The
  compiler says of Moonlight on v5p:2x2x1, GiB: decode behind 2,097,152 66.9 (here 62.0), prefill of
  524,288 39.2 (here 49.5), with 8 minutes of compilation.
- Each model was trained for a context, named with it; beyond that a row says what a token costs and
  not that the answer is good.

![Dollars per million tokens by context on v5p](cost.png)

![Chips of the smallest slice by context](slices.png)
"""


def page(facts: dict) -> str:
    """All of results.md."""
    from kimijax.planner.chips import CHIPS, GIB

    contexts = sorted({row["context"] for row in facts["rows"]})
    memory = ", ".join(f"{n} {c.memory * c.devices / GIB:.2f}" for n, c in CHIPS.items())
    dollars = ", ".join(f"{n} {c.dollars:.2f}" for n, c in CHIPS.items())
    head = HEAD.format(
        first=f"{contexts[0]:,}", last=f"{contexts[-1]:,}", memory=memory, dollars=dollars
    )
    parts = [head.replace("\n  ", " ")]  # an item is a line
    for model, what in facts["models"].items():
        sizes = what["cache_bytes_per_token"]
        kinds = list(dict.fromkeys(
            (row["attention"], row["job"]) for row in facts["rows"] if row["model"] == model
        ))
        parts.append(
            f"## {what['title']}\n\n{what['parameters'] / 1e9:,.1f} B parameters, {what['weights']}"
            f", trained for {what['trained_for']:,} tokens. Cache of a token: {sizes['exact']:,} "
            f"bytes, expanded {sizes['expanded']:,} ({sizes['expanded'] / sizes['exact']:.1f} times"
            f" as many), chosen {sizes['chosen']:,.0f}; "
            f"whatever the length {what['state_bytes_per_sequence'] / 2**20:.1f} MiB.\n\n"
            + table(facts, [(model, n) for n in contexts], kinds)
        )
    return "\n".join(parts)


def table(
    facts: dict, which: Sequence[tuple[str, int]], kinds: Sequence[tuple[str, str]]
) -> str:
    """Markdown: a row for every model and context of `which` and kind, a column for every chip."""
    chips = list(dict.fromkeys(row["chip"] for row in facts["rows"]))
    by = {
        (row["model"], row["context"], row["attention"], row["job"], row["chip"]): row
        for row in facts["rows"]
    }
    several = len({model for model, _ in which}) > 1
    lines = [
        f"| {'model' if several else 'context'} | job | {' | '.join(chips)} |",
        "|---|---|" + "---|" * len(chips),
    ]
    for model, context in which:
        name = facts["models"][model]["title"] if several else f"{context:,}"
        for attention, job in kinds:
            cells = (cell(by[model, context, attention, job, chip]) for chip in chips)
            what = job if attention == "exact" else f"{job}, {attention}"
            lines.append(f"| {name} | {what} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(row: dict) -> str:
    """"8x16 in 16K: 26.7 GiB, 49.1 s, 42,700/s, $2.25"; without "in" a row is read whole."""
    size, shape = row["bytes_per_chip"] / 2**30, row["topology"].partition(":")[2]
    shape += f" in {_short(row['chunk'])}" if row["chunk"] else ""
    if not row["fits"]:
        return f"none ({shape}: {size:.1f} GiB)"
    whole = row["bytes_per_chip"] + row.get("cache_bytes_per_chip", 0)
    mark = "" if whole <= row["memory_per_chip"] else "†"
    price = f"${digits(row['dollars_per_million_tokens'])}"
    time = f"{digits(1e3 * row['seconds'])} ms" if row["job"] == "decode" else (
        f"{digits(row['seconds'])} s, {digits(row['tokens_per_second'])}/s"
    )
    return f"{shape}{mark}: {size:.1f} GiB, {time}, {price}"


def digits(x: float) -> str:
    """Three digits that count, not as a power of ten: 0.0123, 4.50, 21,800."""
    return f"{float(f'{x:.3g}'):,.0f}" if x >= 99.95 else f"{x:#.3g}"


LINES = {  # legible without colours
    "exact": {"color": "black", "ls": "-", "marker": "o", "label": "exact, latents"},
    "expanded": {"color": "0.35", "ls": "--", "marker": "s", "label": "exact, expanded cache"},
    "chosen": {"color": "0.55", "ls": ":", "marker": "^", "label": "chosen blocks"},
}
CHIP_LINES = {  # small and full ones are seen inside of large and empty ones
    "v5e": {"marker": "o", "mfc": "white", "ms": 10, "ls": "--", "zorder": 2},
    "v5p": {"marker": "o", "ms": 5, "ls": "-", "zorder": 4},
    "v6e": {"marker": "s", "mfc": "white", "ms": 8, "ls": "--", "zorder": 3},
    "tpu7x": {"marker": "x", "ms": 9, "ls": "-", "zorder": 5},
}
LEGEND = (*(style["label"] for style in LINES.values()), *CHIP_LINES)


def pictures(facts: dict, out: Path) -> None:
    """cost.png and slices.png, each whole or not at all."""
    _picture(facts, out / "cost.png", _cost, "dollars per million tokens",
             "Least price on the smallest slice of v5p, batch 1, at $4.20 a chip-hour (assumed)")
    _picture(facts, out / "slices.png", _slices, "chips",
             "Smallest slice that fits, exact attention to latents, batch 1")


def _picture(facts: dict, path: Path, draw: Callable, unit: str, title: str) -> None:
    """A panel for every model and job. draw(axes, rows that fit) plots over the context."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = facts["models"]
    fig, axes = plt.subplots(
        2, len(models), figsize=(2.9 * len(models) + 0.6, 5.6), squeeze=False, sharex=True,
        sharey="row", layout="constrained",
    )
    for panels, job in zip(axes, ("prefill", "decode"), strict=True):
        panels[0].set_ylabel(unit)
        for ax, model in zip(panels, models, strict=True):
            rows = [r for r in facts["rows"] if (r["model"], r["job"]) == (model, job)]
            draw(ax, [r for r in rows if r["fits"]])
            contexts = sorted({r["context"] for r in rows})
            ax.set_xscale("log", base=2)
            ax.set_xticks(contexts, [_short(n) for n in contexts])
            ax.set_title(f"{models[model]['title']}: {job}", fontsize=9)
            ax.grid(color="0.9")
            if job == "decode":
                ax.set_xlabel("tokens of context")
    lines = {line.get_label(): line for ax in axes.flat for line in ax.get_lines()}
    labels = sorted(lines, key=LEGEND.index)
    fig.legend([lines[x] for x in labels], labels, loc="outside lower center", ncols=4, fontsize=9)
    fig.suptitle(title, fontsize=11)
    temporary = path.with_name(f"{path.stem}.tmp.png")
    fig.savefig(temporary, dpi=110)
    temporary.replace(path)
    plt.close(fig)


def _cost(ax, rows: list[dict]) -> None:
    """A line for each kind of attention, on v5p."""
    for attention, style in LINES.items():
        points = [(r["context"], r["dollars_per_million_tokens"]) for r in rows
                  if (r["attention"], r["chip"]) == (attention, "v5p")]
        if points:
            ax.plot(*zip(*points, strict=True), **style)
    ax.set_yscale("log")


def _slices(ax, rows: list[dict]) -> None:
    """A line for each chip."""
    for chip, style in CHIP_LINES.items():
        points = [(r["context"], r["chips"]) for r in rows
                  if (r["attention"], r["chip"]) == ("exact", chip)]
        if points:
            ax.plot(*zip(*points, strict=True), color="black", label=chip, **style)
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")


def _short(n: int) -> str:
    return f"{n // 2**20}M" if n >= 2**20 else f"{n // 2**10}K"
