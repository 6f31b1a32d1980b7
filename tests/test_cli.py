"""Every command answers --help at once and without jax, and ends with the right exit code."""

import subprocess
import sys
from pathlib import Path

import pytest

from kimijax.cli import COMMANDS

ROOT = Path(__file__).parents[1]
EXPERIMENTS = [
    f"{folder}{path.stem}"
    for folder in ("", "pod.")
    for path in sorted((ROOT / "experiments" / folder.rstrip(".")).glob("*.py"))
    if "__main__" in path.read_text()
]
NO_JAX = "import sys; sys.modules['jax'] = None\n"  # now `import jax` raises ImportError
KIMIJAX = NO_JAX + "from kimijax import cli; cli.run()"
MODULE = "import runpy; runpy.run_module('experiments.{}', run_name='__main__', alter_sys=True)"
MAIN = """
from kimijax.cli import run_module
from kimijax.errors import UserError

def main(args):
    {}

run_module(lambda parser: parser.add_argument("--size", type=int), main, "A test.")
"""


def command(code: str, *args: str) -> subprocess.CompletedProcess:
    """Run a source text as a program of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    "code, args",
    [
        (KIMIJAX, ["--help"]),
        *((KIMIJAX, [name, "--help"]) for name, *_ in COMMANDS),
        *((NO_JAX + MODULE.format(name), ["--help"]) for name in EXPERIMENTS),
    ],
    ids=["kimijax", *(f"kimijax {name}" for name, *_ in COMMANDS), *EXPERIMENTS],
)
def test_help_answers_at_once_and_without_jax(code, args):
    got = command(code, *args)
    assert got.returncode == 0, got.stderr
    assert got.stdout.startswith("usage: ")


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "the following arguments are required: COMMAND"),
        (["--verbosity=loud", "needle"], "--verbosity=loud"),
        (["--flagfile=/nonexistent", "needle"], "/nonexistent"),
        (["describe", "a", "b\nc"], r"unrecognized arguments: b\nc"),
        (["haystack"], "invalid choice: 'haystack'"),
        (["needle", "--no_such_flag"], "unrecognized arguments: --no_such_flag"),
        (["convert", "a", "b", "--to", "hf", "--fast"], "unrecognized arguments: --fast"),
        (["generate"], "the following arguments are required: --checkpoint, --max_new"),
        (["logits", "--checkpoint", "a", "--tokens", "b"], "are required: --out"),
    ],
)
def test_wrong_arguments_exit_2(args, message):
    got = command(KIMIJAX, *args)
    assert got.returncode == 2
    assert message in got.stderr
    assert "Traceback" not in got.stderr


@pytest.mark.parametrize(
    "body, code, stderr",
    [
        ("assert args.size == 3; return 0", 0, ""),
        ("return 7", 7, ""),
        ("raise UserError('--size 3 is odd: give 2 or 4')", 2,
         "error: --size 3 is odd: give 2 or 4\n"),
        ("raise UserError('a\\nb: \\x1b[31m')", 2, "error: a\\nb: \\x1b[31m\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
    ],
)
def test_how_a_main_ends(body, code, stderr):
    got = command(MAIN.format(body), "--size", "3")
    assert (got.returncode, got.stderr) == (code, stderr)


def test_a_bug_keeps_its_traceback():
    got = command(MAIN.format("raise ValueError('a bug')"))
    assert got.returncode == 1
    assert "Traceback" in got.stderr and "ValueError: a bug" in got.stderr


def test_a_reader_that_has_gone_is_no_error():
    code = MAIN.format("print('x' * 1_000_000)")
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141
