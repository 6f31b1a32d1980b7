"""The commands on files: logits, generate, describe and convert, and what they refuse."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from kimijax.commands.arrays import read_tokens
from kimijax.convert.load import load
from kimijax.errors import UserError
from kimijax.generate import decoder, generate, read_prompts
from kimijax.ops.attend import local

GOLDENS = Path(__file__).parent / "goldens"
K2 = str(GOLDENS / "k2_tiny")
ABSOLUTE = 2e-4


@pytest.fixture
def answers():
    with np.load(GOLDENS / "k2_tiny" / "io.npz") as held:
        return dict(held)


def test_logits_of_an_array(kimijax, answers, tmp_path):
    np.save(tmp_path / "in.npy", answers["input_ids"])
    code, _, errors = kimijax("logits", "--checkpoint", K2, "--tokens", tmp_path / "in.npy",
                              "--out", tmp_path / "out.npy")
    assert code == 0, errors
    got = np.load(tmp_path / "out.npy")
    assert got.dtype == np.float32 and np.abs(got - answers["logits"]).max() < ABSOLUTE
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.npy", "out.npy"]


def test_kernels_of_a_tpu_interpreted_give_the_same(kimijax, answers, tmp_path):
    np.save(tmp_path / "in.npy", answers["input_ids"][:1])
    np.save(tmp_path / "prompt.npy", answers["gen_prompt"][:1])
    reading = "--checkpoint", K2, "--impl", "pallas_interpret"
    code, _, errors = kimijax("logits", *reading, "--tokens", tmp_path / "in.npy", "--out",
                              tmp_path / "out.npy")
    assert code == 0, errors
    assert np.abs(np.load(tmp_path / "out.npy") - answers["logits"][:1]).max() < ABSOLUTE
    code, _, errors = kimijax("generate", *reading, "--tokens", tmp_path / "prompt.npy", "--out",
                              tmp_path / "tokens.npy", "--max_new", 4)
    assert code == 0, errors
    want = answers["gen_tokens"][:1, :4]
    np.testing.assert_array_equal(np.load(tmp_path / "tokens.npy")[:, -4:], want)


@pytest.mark.slow
def test_kernels_of_the_delta_rule_interpreted_give_the_same(kimijax, tmp_path):
    linear = GOLDENS / "kimi_linear_tiny"
    with np.load(linear / "io.npz") as held:
        ids, want = held["input_ids"][:1], held["logits"][:1]
    np.save(tmp_path / "in.npy", ids)
    code, _, errors = kimijax("logits", "--checkpoint", linear, "--impl", "pallas_interpret",
                              "--tokens", tmp_path / "in.npy", "--out", tmp_path / "out.npy")
    assert code == 0, errors
    assert np.abs(np.load(tmp_path / "out.npy") - want).max() < ABSOLUTE


def test_bfloat16_logits_are_near(kimijax, answers, tmp_path):
    np.save(tmp_path / "in.npy", answers["input_ids"][:1])
    code, _, errors = kimijax("logits", "--checkpoint", K2, "--tokens", tmp_path / "in.npy",
                              "--out", tmp_path / "out.npy", "--dtype", "bfloat16")
    assert code == 0, errors
    off = np.abs(np.load(tmp_path / "out.npy") - answers["logits"][:1])
    assert np.median(off) < 0.05 * answers["logits"].std()


def test_a_cache_in_int8_generates_what_its_programs_do(kimijax, answers, tmp_path):
    np.save(tmp_path / "in.npy", answers["gen_prompt"])
    code, _, errors = kimijax("generate", "--checkpoint", K2, "--tokens", tmp_path / "in.npy",
                              "--out", tmp_path / "out.npy", "--max_new", 4, "--cache", "int8")
    assert code == 0, errors
    model = load(K2)
    programs = decoder(model.cfg, local(), np.dtype(np.float32), "int8")
    assert programs.empty(1, 64).latents == "int8"
    want = list(generate(programs, model.params, list(answers["gen_prompt"]), 4))
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy")[:, -4:], np.stack(want, 1))


def test_a_cache_that_kernels_do_not_read_is_refused_before_weights_are(kimijax):
    model = GOLDENS.parents[1] / "experiments" / "checkpoints" / "needle_2m"
    code, _, errors = kimijax("generate", "--checkpoint", model, "--prompt", "x", "--max_new", 1,
                              "--cache", "int8", "--impl", "pallas_interpret")
    assert code == 2 and errors.count("\n") == 1
    assert errors.startswith("error: cache int8: kernels of a TPU read no chosen blocks")


def test_generated_tokens_of_an_array_of_a_conversion_and_in_chunks(kimijax, answers, tmp_path):
    np.save(tmp_path / "in.npy", answers["gen_prompt"])
    assert kimijax("convert", K2, tmp_path / "ours", "--to", "orbax")[0] == 0
    for n, (checkpoint, chunk) in enumerate(((K2, 2048), (tmp_path / "ours", 3))):
        code, _, errors = kimijax(
            "generate", "--checkpoint", checkpoint, "--tokens", tmp_path / "in.npy",
            "--out", tmp_path / f"out{n}.npy", "--max_new", 16, "--chunk", chunk,
        )
        assert code == 0, errors
        want = np.concatenate([answers["gen_prompt"], answers["gen_tokens"]], 1)
        got = np.load(tmp_path / f"out{n}.npy")
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, want)


def test_rows_end_at_a_stop_id(kimijax, answers, tmp_path):
    np.save(tmp_path / "in.npy", answers["gen_prompt"])
    stop = int(answers["gen_tokens"][0, 3])
    code, _, errors = kimijax(
        "generate", "--checkpoint", K2, "--tokens", tmp_path / "in.npy", "--out",
        tmp_path / "out.npy", "--max_new", 16, "--stop_ids", stop,
    )
    assert code == 0, errors
    first = np.load(tmp_path / "out.npy")[0, -16:]
    at = list(answers["gen_tokens"][0]).index(stop)
    np.testing.assert_array_equal(first[: at + 1], answers["gen_tokens"][0, : at + 1])
    assert (first[at:] == stop).all()


def test_text_is_continued_the_same_for_the_same_seed(kimijax, tmp_path):
    (tmp_path / "prompt.txt").write_text("def f(x):")
    sampled = ("--checkpoint", K2, "--max_new", 12, "--temperature", 0.9, "--top_k", 40)
    a = kimijax("generate", "--prompt", "def f(x):", *sampled, "--seed", 5)
    b = kimijax("generate", "--file", tmp_path / "prompt.txt", *sampled, "--seed", 5)
    c = kimijax("generate", "--prompt", "def f(x):", *sampled, "--seed", 6)
    assert a[0] == 0, a[2]
    assert a[1] == b[1] != c[1]


def test_a_description_for_people_and_for_programs(kimijax):
    code, text, _ = kimijax("describe", "kimi_k2")
    assert code == 0 and "60 x MLA + MoE" in text and "cache 70,272 bytes per token" in text
    facts = json.loads(kimijax("describe", K2, "--json")[1])
    assert facts["parameters"] > facts["active_parameters"] > 0
    assert facts["cache_bytes_per_token"] == 3 * 2 * (32 + 16)


PROMPT = ["generate", "--checkpoint", K2, "--prompt", "x"]
FILE = ["generate", "--checkpoint", K2, "--max_new", "2", "--file"]
ARRAY = ["generate", "--checkpoint", K2, "--out", "{out}", "--tokens"]


@pytest.mark.parametrize(
    "args, message",
    [
        (["describe", "kimi_k3"], "'kimi_k3' is neither a directory nor a preset"),
        (["describe", "{tmp}"], "lacks config.json"),
        (["logits", "--checkpoint", "{tmp}/none", "--tokens", "{ids}", "--out", "{out}"], "none"),
        (["logits", "--checkpoint", K2, "--tokens", "{tmp}/x.npy", "--out", "{out}"], "x.npy"),
        (["logits", "--checkpoint", K2, "--tokens", "{pickle}", "--out", "{out}"], "no .npy"),
        (["logits", "--checkpoint", K2, "--tokens", "{flat}", "--out", "{out}"], "[B, T]"),
        (["logits", "--checkpoint", K2, "--tokens", "{large}", "--out", "{out}"],
         "token 256 at row 0, position 2 is outside the vocabulary of 256"),
        (["logits", "--checkpoint", K2, "--tokens", "{ids}", "--out", "{tmp}/out.txt"],
         "must name an .npy file"),
        (["logits", "--checkpoint", K2, "--tokens", "{ids}", "--out", "{tmp}/no/out.npy"],
         "cannot be written"),
        (["logits", "--checkpoint", K2, "--tokens", "{ids}", "--out", "{out}", "--weights", "keep"],
         "cannot be kept quantised"),
        (["generate", "--checkpoint", K2, "--prompt", "x", "--max_new", "0"], "--max_new"),
        (["generate", "--checkpoint", K2, "--tokens", "{ids}", "--max_new", "2"], "go together"),
        (["generate", "--checkpoint", K2, "--prompt", "x", "--max_new", "2", "--top_p", "7"],
         "top_p 7.0 must be"),
        (["generate", "--checkpoint", K2, "--prompt", "", "--max_new", "2"], "no tokens to read"),
        (["generate", "--checkpoint", K2, "--file", "{pickle}", "--max_new", "2"], "as text"),
        ([*PROMPT, "--max_new", "8388608"], "1 tokens and 8388608 new ones exceed the 8388608"),
        ([*PROMPT, "--max_new", "1" + "0" * 40], "exceed"),
        ([*ARRAY, "{ids}", "--max_new", "8388605"], "4 tokens and 8388605 new ones exceed"),
        ([*ARRAY, "", "--max_new", "2"], "a path is empty"),
        ([*ARRAY, "{ids}", "--max_new", "2", "--stop", "x"], "--stop is about text"),
        ([*ARRAY, "{ids}", "--max_new", "2", "--chat"], "--chat is about text"),
        ([*FILE, "a\0b"], "is no path: embedded null byte"),
        ([*FILE, "{tmp}/a\nb"], r"a\nb: cannot be read"),
        ([*FILE, "x" * 300], "File name too long"),
        (["describe", "x" * 300], "File name too long"),
        (["describe", "a\0b"], "is no path"),
        (["describe", "a\nb"], r"'a\nb' is neither"),
        (["convert", K2, "{tmp}/\0", "--to", "hf"], "is no path"),
        (["convert", K2, "{tmp}/" + "x" * 300, "--to", "hf"], "File name too long"),
        (["logits", "--checkpoint", "a\0", "--tokens", "{ids}", "--out", "{out}"], "is no path"),
        (["logits", "--checkpoint", K2, "--tokens", "{ids}", "--out", "{tmp}/\0.npy"], "no path"),
        (["convert", K2, "{tmp}", "--to", "orbax"], "exists"),
        (["convert", "{tmp}/none", "{tmp}/b", "--to", "hf"], "does not exist"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, message, kimijax, tmp_path):
    np.save(tmp_path / "ids.npy", np.zeros((1, 4), np.int32))
    np.save(tmp_path / "flat.npy", np.zeros(4, np.int32))
    np.save(tmp_path / "large.npy", np.array([[1, 2, 256]], np.int32))
    np.save(tmp_path / "pickle.npy", np.array([{"a": 1}], object), allow_pickle=True)
    places = {name: tmp_path / f"{name}.npy" for name in ("ids", "flat", "large", "pickle", "out")}
    before = sorted(tmp_path.iterdir())
    code, _, errors = kimijax(*(a.format(tmp=tmp_path, **places) for a in args))
    assert code == 2
    lines = [line for line in errors.splitlines() if "error:" in line]
    assert len(lines) == 1 and message in lines[0], errors
    assert "Traceback" not in errors and sorted(tmp_path.iterdir()) == before


def test_a_refused_conversion_is_one_line_alone(kimijax, tmp_path):
    _, _, errors = kimijax("convert", tmp_path / "none", tmp_path / "b", "--to", "hf")
    assert errors.startswith("error: ") and errors.count("\n") == 1


def test_positions_are_counted_before_anything_is_allocated():
    with pytest.raises(UserError, match="3 tokens and 8388608 new ones exceed the 8388608 pos"):
        read_prompts(None, {}, [np.zeros(2, np.int32), np.zeros(3, np.int32)], 8388608)


def npy(shape, descr="'<i4'", data=b""):
    head = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + data


@pytest.mark.parametrize(
    "content, fault",
    [
        (b"", "no .npy"),
        (b"PK\x03\x04 and no archive", "no .npy"),
        (b"\x93NUMPY\x01\x00", "no .npy"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{", "no .npy"),
        (b"\x93NUMPY\x03\x00\x01\x00\x00\x00{", "format version"),
        (npy("(1, 10**12)"), "no .npy"),
        (npy(f"(1, {10**12})"), "needs more than the 0 bytes"),
        (npy(f"(1, {'9' * 400})"), "needs more than"),
        (npy(f"(1, {'9' * 5000})"), "no .npy"),
        (npy("(1, 4)", data=b"123"), "needs more than the 3 bytes"),
        (npy("(True, 4)", data=bytes(16)), r"shape \(True, 4\)"),
        (npy("(1, -4)", data=bytes(16)), r"shape \(1, -4\)"),
        (npy("(1, 4)", "'<m8[s]'", bytes(32)), "whole numbers"),
        (npy("(1, 4)", "'|b1'", bytes(4)), "whole numbers"),
        (npy("(1, 4", data=bytes(16)), "no .npy"),
        (npy("(" * 3000), "no .npy"),
        (npy("-" * 3500 + "1"), "no .npy"),
        (npy("(1, '\\d')"), "no .npy"),
    ],
)
def test_a_hostile_array_is_refused(content, fault, tmp_path, recwarn):
    path = tmp_path / "in.npy"
    path.write_bytes(content)
    with pytest.raises(UserError, match=fault) as error:
        read_tokens(str(path), 256)
    assert "\n" not in str(error.value) and not recwarn.list


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.npy")  # opening it would wait for a writer
    for name, fault in (("pipe.npy", "no regular file"), (".", "no regular file"), ("no", "no .n")):
        with pytest.raises(UserError, match=fault):
            read_tokens(str(tmp_path / name), 256)


@pytest.mark.parametrize("dtype", ["int8", "uint64", ">i4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_every_layout_are_read(dtype, order, tmp_path):
    np.save(tmp_path / "in.npy", np.arange(6).reshape(2, 3).astype(dtype, order=order))
    got = read_tokens(str(tmp_path / "in.npy"), 163840)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, [[0, 1, 2], [3, 4, 5]])
