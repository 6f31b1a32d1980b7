"""What a person reads of a needle run: a table, and a picture of depth by length."""

from pathlib import Path


def table(results: dict) -> str:
    """The table that the job prints."""
    lines = ["", f"{'depth':>9} " + " ".join(f"{r['context']:>11,}" for r in results["by_context"])]
    for tenth in range(10):
        cells = [r["exact_match_by_depth"][tenth] for r in results["by_context"]]
        row = " ".join(f"{_cell(c):>11}" for c in cells)
        lines.append(f"{tenth * 10:>3}..{tenth * 10 + 10:>3}% {row}")
    lines.append("")
    for r in results["by_context"]:
        recall = f", text at {r['bits_per_token']:.2f} bits/token"
        recall += "" if r["block_recall"] is None else f", block recall {r['block_recall']:.3f}"
        lines += [
            f"{r['context']:,} tokens, {r['attention']}: exact match {r['exact_match']:.3f} "
            f"of {r['needles']}{recall}",
            f"  prefill {r['prefill_seconds']:.1f} s = {r['prefill_tokens_per_second']:,.0f} "
            f"tokens/s, {r['flops'] / 1e12:.2f} TFLOP = {r['fraction_of_peak']:.2f} of the matmul "
            f"peak{_decode(r['decode_ms_per_token'])}",
        ]
    lines.append(
        f"compilation {results['compile_seconds']:.1f} s, peak RSS {results['peak_rss_gib']:.2f} "
        f"GiB, matmul peak {results['matmul_peak_flops'] / 1e9:.0f} GFLOP/s"
    )
    if len(results["questions"]) == 1:
        q = results["questions"][0]
        lines.append(f"{q['word']}: answered {q['answer']}, stated {q['digits']}")
    return "\n".join(lines)


def _decode(milliseconds: float | None) -> str:
    return "" if milliseconds is None else f"; decode {milliseconds:.2f} ms/token"


def _cell(tenth: dict) -> str:
    return f"{tenth['right']}/{tenth['asked']}" if tenth["asked"] else "-"


def heatmap(results: dict, path: Path) -> None:
    """Exact match by depth (down) and context (across), written as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    runs = results["by_context"]
    asked = np.array([[t["asked"] for t in r["exact_match_by_depth"]] for r in runs]).T
    right = np.array([[t["right"] for t in r["exact_match_by_depth"]] for r in runs]).T
    share = np.where(asked > 0, right / np.maximum(asked, 1), np.nan)
    fig, ax = plt.subplots(figsize=(2.2 + 1.1 * len(runs), 4.6), layout="constrained")
    image = ax.imshow(share, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    ax.set_xticks(range(len(runs)), [_short(r["context"]) for r in runs])
    ax.set_yticks(range(10), [f"{t * 10}-{t * 10 + 10}%" for t in range(10)])
    ax.set_xlabel("context, tokens")
    ax.set_ylabel("depth of the needle")
    for (row, column), n in np.ndenumerate(asked):
        ax.text(column, row, f"{right[row, column]}/{n}" if n else "", ha="center", va="center")
    title = f"exact match, {runs[-1]['needles']} needles, {runs[-1]['attention']}"
    ax.set_title(title, fontsize=10)
    fig.colorbar(image, ax=ax, label="share answered exactly")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def _short(n: int) -> str:
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if n % size == 0:
            return f"{n // size}{unit}"
    return f"{n:,}"
