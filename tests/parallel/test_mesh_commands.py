"""The commands with --mesh: one device's answers, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from kimijax import metrics
from kimijax.errors import UserError
from kimijax.parallel.mesh import make_mesh
from tests.conftest import assert_close
from tests.test_convert import quantised

GOLDENS = Path(__file__).parents[1] / "goldens"
K2, LINEAR = "k2_tiny", "kimi_linear_tiny"


def answers(name):
    with np.load(GOLDENS / name / "io.npz") as held:
        return dict(held)


@pytest.mark.parametrize(
    "name, rows, options",
    [  # an odd number of rows leaves one of padding; 150 tokens leave some too
        (K2, 1, ("--mesh", "data=2,seq=2,expert=2", "--order", "zigzag")),
        (LINEAR, 2, ("--mesh", "seq=4,tensor=2", "--order", "striped")),
    ],
)
def test_logits_are_those_of_one_device(name, rows, options, kimijax, tmp_path):
    known = answers(name)
    np.save(tmp_path / "in.npy", known["input_ids"][:rows])
    code, _, errors = kimijax("logits", "--checkpoint", GOLDENS / name, "--tokens",
                           tmp_path / "in.npy", "--out", tmp_path / "out.npy", *options)
    assert code == 0, errors
    assert_close(np.load(tmp_path / "out.npy"), known["logits"][:rows])


@pytest.mark.parametrize(
    "name, rows, mesh",
    [
        (K2, 2, "seq=4,expert=2"),
        pytest.param(LINEAR, 1, "data=2,seq=2,expert=2", marks=pytest.mark.slow),
    ],
)
def test_greedy_tokens_are_those_of_one_device(name, rows, mesh, kimijax, tmp_path):
    known = answers(name)
    np.save(tmp_path / "in.npy", known["gen_prompt"][:rows])
    code, _, errors = kimijax("generate", "--checkpoint", GOLDENS / name, "--tokens",
                           tmp_path / "in.npy", "--out", tmp_path / "out.npy", "--max_new", 16,
                           "--mesh", mesh)
    assert code == 0, errors
    got = np.load(tmp_path / "out.npy")[:, -16:]
    np.testing.assert_array_equal(got, known["gen_tokens"][:rows])


@pytest.mark.parametrize("form, mesh", [
    ("int4", "data=2,seq=2,expert=2"),
    ("fp8", "expert=6"),  # more than the 4 choices of a token: each goes to some
])
def test_weights_kept_quantised_are_dealt_out(form, mesh, kimijax, tmp_path):
    source, ids = quantised(tmp_path / "hub", form), answers(K2)["input_ids"][:1, :48]
    np.save(tmp_path / "in.npy", ids)
    reading = ("--checkpoint", source, "--tokens", tmp_path / "in.npy", "--weights", "keep")
    for name, more in (("one.npy", ()), ("many.npy", ("--mesh", mesh))):
        code, _, errors = kimijax("logits", *reading, "--out", tmp_path / name, *more)
        assert code == 0, errors
    assert_close(np.load(tmp_path / "many.npy"), np.load(tmp_path / "one.npy"))


@pytest.mark.parametrize("form", ["int4", "fp8"])
def test_scales_that_cannot_be_dealt_out_are_one_line(form, kimijax, tmp_path):
    """The 32 inputs of an expert's last matrix have one scale, whatever the form."""
    np.save(tmp_path / "in.npy", np.zeros((1, 4), np.int32))
    code, _, errors = kimijax(
        "logits", "--checkpoint", quantised(tmp_path / "hub", form), "--tokens",
        tmp_path / "in.npy", "--out", tmp_path / "out.npy", "--weights", "keep", "--mesh",
        "tensor=2",
    )
    assert code == 2 and "Traceback" not in errors and not (tmp_path / "out.npy").exists()
    (line,) = [line for line in errors.splitlines() if "error:" in line]
    assert "ffn.down_scale: its dim 'ffn' of 1 is no multiple of tensor = 2; choose a" in line


@pytest.mark.slow
def test_needles_are_found_as_on_one_device(kimijax, tmp_path, monkeypatch):
    """The document lies on eight devices; questions stand on it, and it is not copied."""
    monkeypatch.setattr(metrics, "matmul_peak", lambda: 1.0)
    found = []
    for name, options in (("one", ()), ("mesh", ("--mesh", "seq=4,expert=2"))):
        code, _, errors = kimijax(
            "needle", "--haystack", Path(metrics.__file__).parent / "config.py", "--context", 6000,
            "--needles", 4, "--out", tmp_path / name, *options,
        )
        assert code == 0, errors
        found.append(json.loads((tmp_path / name / "results.json").read_text()))
    want, got = found
    assert got["questions"] == want["questions"] and want["exact_match"] == 1.0
    assert got["block_recall"] == want["block_recall"]
    assert_close(np.float64(got["bits_per_token"]), np.float64(want["bits_per_token"]))
    assert want["mesh"] is None and got["mesh"] == {"data": 1, "seq": 4, "expert": 2, "tensor": 1}


def test_a_cpu_host_stands_in_for_the_devices_of_a_mesh(tmp_path):
    known = answers(K2)
    np.save(tmp_path / "in.npy", known["input_ids"][:1])
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    done = subprocess.run(
        [sys.executable, "-c", "from kimijax.cli import run; run()", "logits", "--checkpoint",
         GOLDENS / K2, "--tokens", "in.npy", "--out", "out.npy", "--mesh", "seq=2"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(GOLDENS.parents[1])},
    )
    assert done.returncode == 0, done.stderr
    assert_close(np.load(tmp_path / "out.npy"), known["logits"][:1])


@pytest.mark.parametrize(
    "options, message",
    [
        (("--mesh", "seq"), "mesh 'seq': 'seq' is no axis; write it as seq=8,expert=2"),
        (("--mesh", "seq=0"), "'seq=0' is no axis"),
        (("--mesh", "row=2"), "'row=2' is no axis"),
        (("--mesh", "seq=2,seq=2"), "seq is there twice"),
        (("--mesh", "tensor=3"), "no multiple of tensor = 3; choose a smaller axis"),
        (("--mesh", "expert=7"), "no multiple of expert = 7; choose a smaller axis"),
        (("--mesh", "seq=999999"), "needs 999999 devices"),
        (("--mesh", "seq=2", "--order", "x"), "order 'x': there are contiguous, zigzag, striped"),
        (("--mesh", "seq=2", "--strategy", "x"), "strategy 'x': there are ring, gather, ulysses"),
        (("--mesh", "seq=8", "--strategy", "ulysses"), "choose another strategy"),
        (("--order", "zigzag"), "--order is about several devices: it needs --mesh"),
        (("--mesh", "seq=2", "--coordinator", "here:80"),
         "--processes and --process missing: a process of several needs --coordinator"),
        (("--mesh", "seq=2", "--processes", "2", "--process", "0"), "--coordinator missing"),
        (("--coordinator", "here:80", "--processes", "2", "--process", "0"), "--mesh missing"),
        (("--mesh", "seq=2", "--coordinator", "here:80", "--processes", "2", "--process", "2"),
         "process 2 of 2: give the number of processes"),
    ],
)
def test_a_mesh_that_cannot_be_is_one_line_and_exit_code_2(options, message, kimijax, tmp_path):
    np.save(tmp_path / "in.npy", np.zeros((1, 4), np.int32))
    code, _, errors = kimijax("logits", "--checkpoint", GOLDENS / K2, "--tokens",
                              tmp_path / "in.npy", "--out", tmp_path / "out.npy", *options)
    assert code == 2
    lines = [line for line in errors.splitlines() if "error:" in line]
    assert len(lines) == 1 and message in lines[0], errors
    assert "Traceback" not in errors and [p.name for p in tmp_path.iterdir()] == ["in.npy"]


def test_devices_that_are_not_there_are_not_made_up():
    chips = [SimpleNamespace(platform="tpu")] * 4
    with pytest.raises(UserError, match=r"needs 8 devices, there are 4 \(tpu\); choose smaller"):
        make_mesh({"seq": 8}, chips)
    assert make_mesh({"seq": 4}, jax.devices()).size == 4


def test_a_mesh_that_leaves_a_process_out_is_refused(monkeypatch):
    chips = [SimpleNamespace(platform="tpu", process_index=i // 4) for i in range(8)]
    monkeypatch.setattr(jax, "devices", lambda: chips)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="the first 4 of 8 devices and none of process 1; choose"):
        make_mesh({"seq": 4})
