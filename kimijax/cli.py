"""The `kimijax` command and what every command line of the project shares: exits and errors."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable

from absl import app, flags
from absl.flags import argparse_flags

from kimijax.errors import UserError

# (name, help, module). A module gives add_arguments(parser) and main(args) -> int, and its
# docstring is the long help; it is imported only once its subcommand is chosen, and leaves jax to
# its main, so that help and wrong arguments answer at once.
COMMANDS = (
    ("describe", "layers, parameters and cache of a preset or a checkpoint",
     "kimijax.commands.describe"),
    ("logits", "logits of token arrays", "kimijax.commands.logits"),
    ("generate", "continue a prompt, a file or token arrays", "kimijax.commands.generate"),
    ("convert", "Hugging Face weights to an orbax checkpoint, or back", "kimijax.commands.convert"),
    ("tokenize", "text, JSONL and Parquet files made a dataset to train on",
     "kimijax.commands.tokenize"),
    ("plan", "what a model needs on a pod of TPUs, in closed form or by their compiler",
     "kimijax.commands.plan"),
    ("needle", "hide needles in up to millions of tokens and ask for them",
     "kimijax.evals.needle_cli"),
)


def run() -> None:
    """The console script `kimijax`. Does not return: it exits with the subcommand's code."""
    parser = _Parser(prog="kimijax", description="Long-context models in JAX.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, text, module in COMMANDS:
        commands.add_parser(name, help=text, module=module)
    _run(parser)


def run_module(
    add_arguments: Callable[[argparse.ArgumentParser], None],
    main: Callable[[argparse.Namespace], int | None],
    description: str | None,
) -> None:
    """The command line of a file started with `python -m`. Does not return: it exits."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    parser = _Parser(prog=spec and f"python -m {spec.name}", description=description)
    add_arguments(parser)
    parser.set_defaults(main=main)
    _run(parser)


class _Parser(argparse_flags.ArgumentParser):
    """A parser that may take its arguments from a module, imported when the parser is used."""

    def __init__(self, *, module: str | None = None, **options):
        # An abbreviation that works today would break or change its meaning with the next flag.
        options |= {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(**options)
        self.module = module

    def error(self, message: str):
        super().error(_one_line(message))

    def parse_known_args(self, args=None, namespace=None):
        if self.module is not None:
            module = importlib.import_module(self.module)
            self.description = module.__doc__
            module.add_arguments(self)
            self.set_defaults(main=module.main)
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:  # said here, the usage line is the subcommand's and not the command's
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown


def _run(parser: argparse.ArgumentParser) -> None:
    """Parse, run `main` and exit: one line for a UserError and its code, a traceback for a bug."""

    def parse(argv: list[str]) -> argparse.Namespace:
        try:
            args = parser.parse_args(argv[1:])
        except flags.Error as error:  # of absl's own flags: --flagfile, --verbosity, ...
            parser.error(str(error))
        if flags.FLAGS["verbosity"].using_default_value:
            # absl would now switch to INFO, where libraries log every file they touch.
            flags.FLAGS.verbosity = -1
        return args

    try:
        try:
            app.run(lambda args: args.main(args), flags_parser=parse)
        except UserError as error:
            print(f"error: {_one_line(str(error))}", file=sys.stderr)
            sys.exit(error.code)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        finally:
            sys.stdout.flush()  # a reader that has gone is met here and not at shutdown
    except BrokenPipeError:
        # `| head` has read enough: no traceback, and nothing left to fail in the last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _one_line(text: str) -> str:
    """The text with line breaks and other control characters escaped: a path may hold them."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
