"""`kimijax plan`: what it writes, and what it says of bad input."""

import json

import pytest


def test_the_command_writes_what_it_prints(kimijax, tmp_path):
    file = tmp_path / "plan.json"
    code, text, errors = kimijax(
        "plan", "--model", "kimi_k2_tiny", "--job", "train", "--context", "256,512", "--topology",
        "v5e:2x2", "--mesh", "seq=4", "--json", file,
    )
    assert code == 0, errors
    first, second = json.loads(file.read_text())
    form = first["closed_form"]
    assert form["bytes_per_chip"] == pytest.approx(sum(form["parts"].values()), abs=20)
    assert form["bytes_per_chip"] < second["closed_form"]["bytes_per_chip"]
    assert form["tokens_per_second"] == pytest.approx(256 / max(form["seconds"].values()))
    assert "train of 1 x 256 tokens on v5e:2x2 (4 chips), mesh seq=4" in text
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    "args, message",
    [
        ("--model kimi_k2 --context 4096 --topology v5p:7x8x8", "near ones are v5p:"),
        ("--model kimi_k2x --context 4096 --topology v5p:8x8x8", "did you mean kimi_k2?"),
        ("--model kimi_k2 --context 4096 --topology v5p:8x8x8 --mesh seq=8", "8 devices"),
        ("--model kimi_k2 --context 3000000000 --topology v5p:8x8x8", "int32"),
        ("--model kimi_k2 --context many --topology v5p:8x8x8", "no number of tokens"),
        ("--model kimi_k2 --context 4096 --topology v5p:2x2x1", "of them weights"),
        ("--model kimi_k2 --topology v5p:2x2x1", "of them weights"),
        ("--model kimi_k2 --context 4096 --chip v4", "there are v5e, v5p, v6e, tpu7x"),
        ("--model kimi_k2", "needs --topology"),
        ("--model kimi_k2 --context 4096 --mesh seq=8", "needs --topology"),
        ("--model needle_2m --context 4096 --topology v5p:2x2x1 --weights int4 --batch 0",
         "at least one row"),
        ("--model kimi_k2_tiny --context 4096 --topology v5e:2x2 --mesh expert=3,seq=2",
         "6 devices"),
        ("--model kimi_k2_tiny --context 4096 --topology v5e:2x4 --mesh seq=8 --strategy ulysses",
         "cannot deal 4 heads over 8 devices; choose one of ring"),
        ("--model kimi_k2_tiny --context 4096 --topology v5e:2x2 --mesh seq=4 --strategy star",
         "strategy 'star'"),
        ("--model kimi_k2_tiny --context 4096 --topology v5e:2x2 --mesh seq=4 --chunk 2",
         "--chunk 2 is no multiple of 4"),
        ("--model kimi_k2_tiny --context 4096 --topology v5e:2x2 --chunk 8192", "the context"),
        ("--model kimi_k2_tiny --context 4096 --topology v5e:2x2 --cache int8",
         "--cache int8: this job has none; leave it out, or plan --job decode"),
        ("--model needle_2m --context 4096 --topology v5e:2x2 --chunk 64", "are not planned"),
        ("--model kimi_k2_tiny --context 4096 --topology v5e:2x2 --mesh tensor=4 --json /no/x",
         "cannot be written"),
    ],
)
def test_errors_are_one_line(kimijax, args, message):
    code, _, errors = kimijax("plan", "--job", "prefill", *args.split())
    assert code == 2 and message in errors
    assert errors.startswith("error: ") and errors.count("\n") == 1


def test_quantised_weights_are_not_trained(kimijax):
    code, _, errors = kimijax(
        "plan", "--model", "kimi_k2_tiny", "--job", "train", "--context", 64, "--topology",
        "v5e:2x2", "--weights", "int4",
    )
    assert code == 2 and "have no gradients" in errors


def test_latents_in_int8_take_what_they_say(kimijax, tmp_path):
    found = []
    for name, options in (("floats", ()), ("int8", ("--cache", "int8"))):
        code, _, errors = kimijax(
            "plan", "--model", "kimi_k2", "--job", "decode", "--context", 2**20 - 1, "--topology",
            "v5p:4x4x8", "--mesh", "expert=128", "--json", tmp_path / name, *options,
        )
        assert code == 0, errors
        plan = json.loads((tmp_path / name).read_text())
        assert plan["cache"] == (None if name == "floats" else "int8")
        found.append(plan["closed_form"])
    floats, int8 = (form["parts"]["latents"] for form in found)  # 2^20 slots, none for rounding up
    where = 2 * 4 * 2**20  # positions and segments, whole on every chip
    assert (int8 - where) / (floats - where) == pytest.approx(644 / 1152, rel=0.01)
    floats, int8 = (form["hbm_bytes_per_chip"]["cache"] for form in found)
    assert int8 < 0.7 * floats


def test_a_chunk_is_of_prefill(kimijax):
    code, _, errors = kimijax(
        "plan", "--model", "kimi_k2_tiny", "--job", "decode", "--context", 64, "--topology",
        "v5e:2x2", "--chunk", 16,
    )
    assert code == 2 and "--chunk is of --job prefill" in errors
