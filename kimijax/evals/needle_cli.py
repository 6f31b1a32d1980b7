"""Hide pass keys in real text, read all of it, ask for each, and print what was found.

  kimijax needle                                    2,097,152 tokens of held-out Python files
  kimijax needle --context 32768 --needles 20       a quick look
  kimijax needle --haystack DIR                     your own files, as long as they are
  kimijax needle --haystack DIR --ask WORD          a key that your files state themselves, as
                                                    "The pass key for WORD is 12345."
Writes results.json and heatmap.png into --out. With --mesh the text lies on several devices.
"""

import argparse
from pathlib import Path

from kimijax.commands.checkpoint import add_cache
from kimijax.commands.mesh import add_mesh, plan_of
from kimijax.commands.paths import path, writable
from kimijax.commands.processes import job_of
from kimijax.errors import UserError

CONTEXTS = (32768, 131072, 524288, 2097152)
CHECKPOINT = Path(__file__).parents[2] / "experiments" / "checkpoints" / "needle_2m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the needle job."""
    add = parser.add_argument
    add("--context", type=lengths, metavar="N[,N...]",
        help="tokens to read; several are read in turn (default: "
        f"{','.join(map(str, CONTEXTS))}; with --haystack: all of it)")
    add("--needles", type=int, default=100, help="pass keys to hide (default: %(default)s)")
    add("--seed", type=int, default=0, help="of words, digits and the order of files")
    add("--haystack", type=path, metavar="DIR|FILE",
        help="your own text (default: held-out Python files)")
    add("--ask", metavar="WORD", help="ask for a key that the haystack states; hide none")
    add("--question", metavar="TEXT", help="other words to ask with; must contain {word}")
    add("--twins", action="store_true", help="give every word a twin that differs in one letter")
    add("--attention", choices=("compressed", "exact"), default="compressed",
        help="exact reads every key of the past, at quadratic cost")
    add("--yes", action="store_true", help="run exact attention however long it takes")
    add("--checkpoint", type=path, metavar="DIR", default=str(CHECKPOINT),
        help="default: the one shipped")
    add("--out", type=path, metavar="DIR", default="runs/needle_2m", help="default: %(default)s")
    add_cache(parser)
    add_mesh(parser)


def numbers(text: str, least: int) -> tuple[int, ...]:
    """Whole numbers from `least`, ascending, as in 1024,2_097_152."""
    try:
        found = tuple(sorted({int(part.replace("_", "")) for part in text.split(",")}))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers") from error
    if found[0] < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {found[0]}")
    return found


def lengths(text: str) -> tuple[int, ...]:
    """Contexts in tokens."""
    return numbers(text, least=1)


def main(args: argparse.Namespace) -> int:
    """Run the job of parsed arguments."""
    if args.seed < 0:
        raise UserError(f"--seed must not be negative, got {args.seed}")
    with job_of(args):
        _run(args)
    return 0


def _run(args: argparse.Namespace) -> None:
    from kimijax.data.haystack import QUESTION
    from kimijax.evals.needle import NeedleJob, run
    from kimijax.parallel.processes import is_first

    contexts = args.context or (() if args.haystack else CONTEXTS)
    job = NeedleJob(
        checkpoint=args.checkpoint, contexts=contexts, needles=args.needles, seed=args.seed,
        haystack=args.haystack, ask=args.ask,
        question=QUESTION if args.question is None else args.question,
        twins=args.twins, exact=args.attention == "exact", yes=args.yes, cache=args.cache,
    )
    plan = plan_of(args, exact=job.exact)
    run(job, writable(args.out) if is_first() else Path(args.out), plan)
