"""The needle job: a trained model finds, an untrained one does not, bad input is one clear line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimijax import metrics, presets
from kimijax.checkpoint import save_model
from kimijax.cli import run_module
from kimijax.evals.needle_cli import CHECKPOINT, add_arguments, main
from kimijax.model import Model
from kimijax.ops.attend import local

CONTEXT = 12_000  # not a multiple of the chunk, of a run or of a block


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A haystack of the project's own source: real text, whatever the machine."""
    path = tmp_path_factory.mktemp("text") / "haystack.txt"
    sources = sorted(Path(__file__).parents[1].glob("kimijax/**/*.py"))
    path.write_bytes(b"".join(p.read_bytes() for p in sources)[:40_000])
    return path


def _run(monkeypatch, capsys, *args):
    """(exit code, stdout, stderr) of the job's command line in this process."""
    monkeypatch.setattr(sys, "argv", ["needle", *map(str, args)])
    with pytest.raises(SystemExit) as exit:
        run_module(add_arguments, main, None)
    return exit.value.code or 0, *capsys.readouterr()


def _results(monkeypatch, capsys, out, *args):
    code, printed, errors = _run(monkeypatch, capsys, "--out", out, *args)
    assert code == 0, errors
    return json.loads((out / "results.json").read_text()), printed


@pytest.mark.parametrize("options", [(), ("--cache", "int8")], ids=["floats", "int8"])
def test_the_shipped_model_finds_what_is_hidden(options, monkeypatch, capsys, tmp_path, text):
    args = ("--context", CONTEXT, "--needles", 30, "--haystack", text, "--seed", 11, *options)
    results, printed = _results(monkeypatch, capsys, tmp_path, *args)
    assert results["exact_match"] >= 0.95 and results["block_recall"] >= 0.95
    assert results["context"] == CONTEXT and results["needles"] == 30
    assert sum(d["asked"] for d in results["exact_match_by_depth"]) == 30
    assert f"{CONTEXT:,} tokens" in printed
    assert results["job"]["cache"] == (options[1] if options else None)
    assert (tmp_path / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.tmp*"))


@pytest.fixture
def unmeasured(monkeypatch):
    """The machine's peak is not what a test is about, and measuring it takes seconds."""
    monkeypatch.setattr(metrics, "matmul_peak", lambda: 1.0)


@pytest.mark.slow
@pytest.mark.usefixtures("unmeasured")
def test_an_untrained_model_finds_nothing(monkeypatch, capsys, tmp_path, text):
    model = Model(presets.needle_2m(), local())
    init = jax.jit(lambda k: model.init(k, jnp.zeros((1, 1), jnp.int32), method="logits"))
    save_model(tmp_path / "model", presets.needle_2m(), nn.unbox(init(jax.random.key(3)))["params"])
    args = ("--context", CONTEXT, "--needles", 30, "--haystack", text, "--seed", 11)
    results, _ = _results(
        monkeypatch, capsys, tmp_path / "out", *args, "--checkpoint", tmp_path / "model"
    )
    assert results["exact_match"] <= 0.05


@pytest.mark.usefixtures("unmeasured")
def test_a_key_that_the_files_state_is_answered(monkeypatch, capsys, tmp_path, text):
    own = text.read_bytes()
    own = own[:5000] + b" The pass key for walnut is 40917. " + own[5000 : CONTEXT - 100]
    (tmp_path / "own.txt").write_bytes(own)
    results, printed = _results(
        monkeypatch, capsys, tmp_path, "--haystack", tmp_path / "own.txt", "--ask", "walnut"
    )
    assert results["context"] == len(own) and results["exact_match"] == 1.0
    assert "walnut: answered 40917" in printed


def _foreign(directory):
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"\x00" * 4)
    return directory


@pytest.mark.parametrize(
    "args, message",
    [
        (["--haystack", "{tmp}/absent"], "absent"),
        (["--haystack", "{tmp}/empty"], "empty"),
        (["--haystack", "{text}", "--context", 8_000_000], "40,000 bytes"),
        (["--haystack", "{text}", "--context", 10**20], "exceeds 8388608 positions"),
        (["--haystack", "{text}", "--needles", 10**9], "at most 100000"),
        (["--haystack", "{text}", "--ask", "zebra"], "zebra"),
        (["--haystack", "{text}", "--needles", 0], "needles must be at least 1, got 0"),
        (["--haystack", "{text}", "--question", "Well?"], "must contain {word}"),
        (["--context", "many"], "'many' is not a list"),
        (["--context", "0"], "at least 1"),
        (["--seed", "-1"], "--seed"),
        (["--checkpoint", "{tmp}/nothing", "--haystack", "{text}"], "nothing"),
        (["--checkpoint", "{foreign}", "--haystack", "{text}"], "foreign"),
        (["--haystack", "a\0b"], "'a\\x00b': is no path"),
        (["--checkpoint", "x" * 5000, "--haystack", "{text}"], "File name too long"),
        (["--out", "", "--haystack", "{text}"], "a path is empty"),
        (["--out", "/proc/nowhere", "--haystack", "{text}"], "--out /proc/nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, message, monkeypatch, capsys, tmp_path, text):
    (tmp_path / "empty").mkdir()
    places = {"tmp": tmp_path, "text": text, "foreign": _foreign(tmp_path / "foreign")}
    args = [a.format(**places) if isinstance(a, str) and a != "Well?" else a for a in args]
    if "--out" not in args:
        args += ["--out", tmp_path / "out"]
    code, _, errors = _run(monkeypatch, capsys, *args)
    assert code == 2
    lines = [line for line in errors.splitlines() if "error:" in line]
    assert len(lines) == 1 and message in lines[0], errors
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("out/*"))


def test_tokens_outside_the_vocabulary_are_refused(text):
    from kimijax.errors import UserError
    from kimijax.infer import check_tokens

    with pytest.raises(UserError, match="token 300 at position 2 is outside the vocabulary of 256"):
        check_tokens(presets.needle_2m(), np.array([1, 2, 300]))


def test_the_command_exits_2_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "experiments.needle_2m", "--haystack", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_the_shipped_checkpoint_is_small_and_is_the_preset():
    from kimijax.checkpoint import load_model

    assert load_model(CHECKPOINT)[0] == presets.needle_2m()
    assert sum(f.stat().st_size for f in CHECKPOINT.iterdir()) <= 5 * 2**20
