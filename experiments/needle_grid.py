"""Is it the recipe and not the luck: many seeds, lengths, twins, other texts, other words?

Ask     Exact match over training seeds x evaluation seeds x contexts.
Run     python -m experiments.needle_grid --checkpoints DIR[,DIR...] --out DIR
        [--seeds 0,1,2] [--context N,...] [--twins] [--haystack DIR] [--question TEXT]
Cost    about a minute per pair of seeds on 2 cores; what is done is not done again.
Answer  see the README's results.
"""

import argparse
import functools
import json
from dataclasses import asdict
from pathlib import Path

from kimijax.cli import run_module
from kimijax.errors import UserError
from kimijax.evals.needle_cli import CHECKPOINT, CONTEXTS, lengths, numbers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the grid."""
    add = parser.add_argument
    add("--checkpoints", default=str(CHECKPOINT), metavar="DIR[,DIR...]")
    add("--out", required=True, metavar="DIR")
    add("--seeds", type=functools.partial(numbers, least=0), default=(0, 1, 2), metavar="S[,S...]")
    add("--context", type=lengths, default=CONTEXTS, metavar="N[,N...]")
    add("--needles", type=int, default=100)
    add("--twins", action="store_true")
    add("--haystack", metavar="DIR|FILE")
    add("--question", metavar="TEXT")


def main(args: argparse.Namespace) -> int:
    """Run what is missing and print one table."""
    from kimijax.commands.paths import writable
    from kimijax.data.haystack import QUESTION
    from kimijax.evals.needle import NeedleJob, run

    rows: list[tuple[str, dict]] = []
    for checkpoint in map(Path, args.checkpoints.split(",")):
        for seed in args.seeds:
            out = writable(str(Path(args.out) / f"{checkpoint.parent.name}-{seed}"))
            job = NeedleJob(
                checkpoint=str(checkpoint), contexts=args.context, needles=args.needles, seed=seed,
                haystack=args.haystack, twins=args.twins,
                question=QUESTION if args.question is None else args.question,
            )
            if out.name in [name for name, _ in rows]:
                raise UserError(f"two checkpoints are both called {checkpoint.parent.name}")
            if not (out / "results.json").exists():
                run(job, out)
            results = _results(out / "results.json")
            if results.get("job") != json.loads(json.dumps(asdict(job))):
                raise UserError(f"{out} holds the results of another job; give another --out")
            rows.append((out.name, results))
    print(summary(rows))
    return 0


def _results(path: Path) -> dict:
    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); delete it to run its job again") from error
    return results if isinstance(results, dict) else {}


def summary(rows: list[tuple[str, dict]]) -> str:
    """Exact match by run and context, and misses per tenth of the depth pooled over runs."""
    contexts = [r["context"] for r in rows[0][1]["by_context"]]
    lines = ["| run | " + " | ".join(f"{c:,}" for c in contexts) + " |"]
    lines.append("|" + "---|" * (len(contexts) + 1))
    for name, results in rows:
        cells = [f"{r['exact_match']:.2f}" for r in results["by_context"]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for i, context in enumerate(contexts):
        depth = [
            [r["by_context"][i]["exact_match_by_depth"][t] for _, r in rows] for t in range(10)
        ]
        misses = [f"{sum(d['asked'] - d['right'] for d in tenth)}/{sum(d['asked'] for d in tenth)}"
                  for tenth in depth]
        lines.append(f"{context:,}: misses by tenth of the depth {' '.join(misses)}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_module(add_arguments, main, __doc__)
