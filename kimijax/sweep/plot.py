"""Pictures of a sweep: a result over a setting, a line for each value of another."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kimijax.sweep.settings import Done
from kimijax.sweep.table import by_settings


@dataclass(frozen=True, kw_only=True)
class Plot:
    """`y` (a result) over `x` (a setting), a line per value of `line`; error bars over seeds."""

    x: str
    y: str
    line: str | None = None
    log_x: bool = False
    log_y: bool = False


def draw(plot: Plot, done: Sequence[Done], path: Path) -> None:
    """Written as PNG. Settings that are neither x nor line are averaged like seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kept = [name for name in (plot.x, plot.line) if name is not None]
    runs = [
        Done({k: v for k, v in run.settings.items() if k in kept}, run.result)
        for run in done if plot.x in run.settings and plot.y in run.result
    ]
    lines: dict[str, list[tuple]] = {}
    for settings, means in by_settings(runs):
        if plot.y in means:
            label = "" if plot.line is None else f"{plot.line} = {settings.get(plot.line)}"
            lines.setdefault(label, []).append((settings[plot.x], means[plot.y]))
    fig, ax = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
    places = _places([x for points in lines.values() for x, _ in points])
    for label, points in lines.items():
        points.sort(key=lambda point: places[json.dumps(point[0])])
        ax.errorbar(
            [places[json.dumps(x)] for x, _ in points], [m.mean for _, m in points],
            [m.deviation for _, m in points], marker="o", capsize=3, label=label or None,
        )
    ax.set_xscale("log" if plot.log_x else "linear")
    if len(places) <= 10:  # what was run, and not what lies between
        ax.set_xticks(list(places.values()), [str(json.loads(x)) for x in places])
        ax.minorticks_off()
    ax.set_yscale("log" if plot.log_y else "linear")
    ax.set_xlabel(plot.x)
    ax.set_ylabel(plot.y)
    if plot.line is not None:
        ax.legend(fontsize=8)
    temporary = path.with_name(f"{path.stem}.tmp.png")
    fig.savefig(temporary, dpi=120)
    temporary.replace(path)
    plt.close(fig)


def _places(values: list) -> dict[str, float]:
    """Numbers where they are, names side by side; by their JSON."""
    if all(isinstance(x, int | float) and not isinstance(x, bool) for x in values):
        return {json.dumps(x): x for x in sorted(values)}
    return {name: i for i, name in enumerate(dict.fromkeys(json.dumps(x) for x in values))}
