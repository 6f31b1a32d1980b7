"""Results of a sweep as JSON, CSV and Markdown; seeds are averaged."""

import csv
import io
import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kimijax.sweep.settings import Done

SEED = "seed"


class Mean(NamedTuple):
    """Of a number over seeds."""

    mean: float
    deviation: float  # of a seed, n - 1 in the denominator; 0 of one seed
    seeds: int


def is_number(value: Any) -> bool:
    """Whether it can be averaged; NaN and infinities can."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def by_settings(done: Sequence[Done]) -> list[tuple[dict[str, Any], dict[str, Mean]]]:
    """(settings without the seed, means of the numbers that every seed has), in order."""
    groups: dict[str, tuple[dict, list[dict]]] = {}
    for run in done:
        settings = {k: v for k, v in run.settings.items() if k != SEED}
        groups.setdefault(json.dumps(settings), (settings, []))[1].append(run.result)
    return [
        (settings, {
            name: _mean([r[name] for r in results]) for name in results[0]
            if all(is_number(r.get(name)) for r in results)
        })
        for settings, results in groups.values()
    ]


def _mean(values: list[float]) -> Mean:
    deviation = statistics.stdev(values) if len(values) > 1 and all(
        map(math.isfinite, values)) else 0.0
    return Mean(sum(values) / len(values), deviation, len(values))


def write_tables(done: Sequence[Done], out: Path) -> str:
    """results.json, results.csv and results.md, each at once; returns the Markdown."""
    groups = by_settings(done)
    text = markdown(groups)
    values = {
        "runs": [run._asdict() for run in done],
        "means": [
            {"settings": settings, "means": {k: m._asdict() for k, m in means.items()}}
            for settings, means in groups
        ],
    }
    write(out / "results.json", json.dumps(values, indent=1) + "\n")
    write(out / "results.csv", _csv(done))
    write(out / "results.md", text + "\n")
    return text


def markdown(groups: Sequence[tuple[dict[str, Any], dict[str, Mean]]]) -> str:
    """A row for each of the settings: mean ± deviation over so many seeds."""
    settings = list(dict.fromkeys(k for group, _ in groups for k in group))
    results = list(dict.fromkeys(k for _, means in groups for k in means))
    lines = ["| " + " | ".join([*settings, *results, "seeds"]) + " |",
             "|" + "---|" * (len(settings) + len(results) + 1)]
    for group, means in groups:
        cells = [_short(group.get(k, "")) for k in settings]
        cells += [_cell(means.get(k)) for k in results]
        seeds = max((m.seeds for m in means.values()), default=0)
        lines.append("| " + " | ".join([*cells, str(seeds)]) + " |")
    return "\n".join(lines)


def _cell(mean: Mean | None) -> str:
    if mean is None:
        return ""
    return f"{mean.mean:.4g}" + (f" ± {mean.deviation:.2g}" if mean.seeds > 1 else "")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def _csv(done: Sequence[Done]) -> str:
    rows = [run.settings | {k: v for k, v in run.result.items() if not isinstance(v, list | dict)}
            for run in done]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(dict.fromkeys(k for row in rows for k in row)))
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def write(path: Path, text: str) -> None:
    """A file, whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
