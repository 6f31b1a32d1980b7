"""Every matrix of an FP8 checkpoint, kept: the same bytes there and back, the numbers of floats."""

import functools
import json
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from kimijax import cli
from kimijax.config import (
    Fp8Config,
    GroupConfig,
    KDAConfig,
    LayerConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
)
from kimijax.config_tree import expanded
from kimijax.convert.config import from_hub
from kimijax.convert.load import load
from kimijax.convert.names import rules
from kimijax.convert.quant import quantize_fp8
from kimijax.convert.run import convert, export
from kimijax.errors import UserError
from kimijax.metrics import describe
from kimijax.model import Model, abstract_params
from kimijax.ops.attend import local
from kimijax.ops.fp8 import expand
from tests.conftest import assert_close
from tests.test_convert import GOLDENS, quantised, quiet, same, tensors, write
from tests.test_convert_quant import assert_bits

FP8, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
# Two blocks or more on a side, none of them whole, and borders between blocks among the rotary
# channels of a query head and of the shared key.
SHAPES = {
    "hidden_size": 150, "num_attention_heads": 3, "num_key_value_heads": 3, "q_lora_rank": 140,
    "kv_lora_rank": 250, "qk_nope_head_dim": 45, "qk_rope_head_dim": 26, "qk_head_dim": 71,
    "head_dim": 26, "v_head_dim": 52, "intermediate_size": 200, "moe_intermediate_size": 130,
    "n_shared_experts": 2, "n_routed_experts": 3, "num_experts_per_tok": 2, "vocab_size": 40,
}
QUANT = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
         "weight_block_size": [128, 128]}
OUT = "model.layers.1.self_attn.o_proj.weight"


def checkpoint(directory: Path, changes: dict | None = None, floats: tuple[str, ...] = ()) -> Path:
    """K2 as released, in small: every projection in fp8 except those with one of `floats`."""
    rng = np.random.default_rng(0)
    config = json.loads((GOLDENS / "k2_tiny" / "config.json").read_text())
    config |= SHAPES | {"dtype": "bfloat16", "quantization_config": QUANT} | (changes or {})
    arrays = {}
    for rule in rules(from_hub(config)):
        name, shape = rule.name, rule.shape
        if len(shape) == 1:
            x = 1 + 0.3 * rng.normal(size=shape)
            arrays[name] = x.astype(np.float32 if name.endswith("bias") else BF16)
        elif "_proj" not in name or any(part in name for part in floats):
            arrays[name] = (rng.normal(size=shape) * shape[1] ** -0.5).astype(BF16)
        else:
            codes = rng.integers(0, 127, shape, np.uint8)
            arrays[name] = (codes | rng.integers(0, 2, shape, np.uint8) << 7).view(FP8)
            scale = rng.uniform(0.2, 2, [-(-size // 128) for size in shape])
            scale = (scale * shape[1] ** -0.5 / 100).astype(np.float32)
            arrays[f"{name}_scale_inv"] = scale
    return write(directory, arrays, config)


@pytest.fixture(params=[140, None], ids=["q-lora", "direct"])
def source(request, tmp_path):
    """A checkpoint, its queries with and without a compressed form."""
    return checkpoint(tmp_path / "hub", {"q_lora_rank": request.param})


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def logits(model, ids):
    net = Model(model.cfg, local())
    return jax.jit(functools.partial(net.apply, method="logits"))(model.params, ids)


def test_every_matrix_survives_bit_for_bit(source, tmp_path):
    convert(source, tmp_path / "ours", "orbax", None, True, quiet)
    convert(tmp_path / "ours", tmp_path / "back", "hf", None, False, quiet)
    convert(source, tmp_path / "direct", "hf", None, True, quiet)
    kept = load(source, keep=True)
    export(kept.cfg, kept.params, tmp_path / "export", "bfloat16", kept.hub)
    for out in ("back", "direct", "export"):
        same(tensors(tmp_path / out), tensors(source))
        assert config_of(tmp_path / out) == config_of(source)
    stored = load(tmp_path / "ours")
    assert stored.cfg == kept.cfg
    jax.tree.map(np.testing.assert_array_equal, stored.params, kept.params)


def test_kept_weights_give_the_numbers_of_expanded_ones(source):
    """And they are held as they are stored: none of their leaves is of floats."""
    ids = np.random.default_rng(1).integers(0, 40, (2, 9)).astype(np.int32)
    kept, floats = load(source, keep=True), load(source)
    assert kept.expanded == floats.expanded == ()
    assert expanded(kept.cfg) == floats.cfg
    want = logits(floats, ids)
    assert np.isfinite(want).all() and np.std(want) > 0.1
    assert_close(logits(kept, ids), want)
    leaves, plain = (flatten_dict(x.params["params"], sep=".") for x in (kept, floats))
    wide = {n for n, x in plain.items() if x.size > 2000 and n not in ("embed", "head")}
    attention = 6 + (kept.cfg.layers[0].mixer.q_rank is not None)
    assert len(wide) == attention + 3 + attention + 3 + 3
    assert {n for n in plain if n not in leaves} == wide
    for name in wide:
        codes, scale = (leaves[f"{name}_{x}"] for x in ("codes", "scale"))
        assert (codes.dtype, codes.size, scale.dtype) == (np.uint8, plain[name].size, np.float32)
        if name.split(".")[-1] not in ("gate", "up", "down"):  # those of experts lie otherwise
            assert_bits(np.asarray(jax.jit(jax.vmap(expand))(codes, scale)), plain[name])
    bytes_of = [sum(x.nbytes for x in leaves.values()) for leaves in (leaves, plain)]
    assert bytes_of[0] < 0.35 * bytes_of[1]


@pytest.mark.parametrize("tokens", [1, 48])
def test_no_program_makes_floats_of_a_whole_stack(tokens):
    """What it needs beside its arguments is a few matrices, not the layers that are scanned."""
    mla = MLAConfig(heads=4, q_rank=128, kv_rank=128, nope_dim=64, rope_dim=32, v_dim=64,
                    rope=RopeConfig(dim=32), weights=Fp8Config())
    moe = MoEConfig(experts=8, top_k=2, width=256, shared_width=256, weights=Fp8Config(),
                    shared_weights=Fp8Config())
    layers = GroupConfig(layers=(LayerConfig(mixer=mla, ffn=moe),), repeat=20)
    net = Model(ModelConfig(vocab=16, width=256, groups=(layers,)), local())
    params = nn.unbox(abstract_params(net))
    ids = jax.ShapeDtypeStruct((1, tokens), np.int32)
    program = jax.jit(lambda p, x: net.apply(p, x).hidden).lower(params, ids).compile()
    codes = sum(x.size for x in jax.tree.leaves(params) if x.dtype.itemsize == 1)
    assert program.memory_analysis().temp_size_in_bytes < 0.2 * codes


@pytest.mark.parametrize("form", ["int4", "fp8"])
def test_parameters_are_counted_once_however_they_are_held(form, tmp_path):
    source = quantised(tmp_path / "hub", form)
    assert describe(load(source, keep=True).cfg) == describe(load(source).cfg)


@pytest.mark.parametrize(
    "floats, field",
    [((OUT,), "mixer.weights"), (("layers.2.mlp.shared_experts.up",), "ffn.shared_weights"),
     (("layers.2.mlp.experts.1.down",), "ffn.weights")],
    ids=["attention", "shared", "experts"],
)
def test_a_module_that_is_not_whole_is_expanded_and_named(floats, field, tmp_path):
    """And only it is; the config of an export lists it, and reads the same again."""
    source = checkpoint(tmp_path / "hub", floats=floats)
    whole = checkpoint(tmp_path / "whole")
    model, ids = load(source, keep=True), np.arange(6, dtype=np.int32)[None]
    part, name = field.split(".")
    group = model.cfg.groups[1].layers[0]
    held = {f"{p}.{n}": getattr(getattr(group, p), n) for p, n in
            (("mixer", "weights"), ("ffn", "weights"), ("ffn", "shared_weights"))}
    assert held == dict.fromkeys(held, Fp8Config()) | {field: None}
    assert model.cfg.groups[0] == load(whole, keep=True).cfg.groups[0]
    assert_close(logits(model, ids), logits(load(source), ids))
    report = convert(source, tmp_path / "out", "hf", None, True, quiet)
    assert report.expanded == model.expanded and len(report.expanded) > 0
    got, was = tensors(tmp_path / "out"), tensors(source)
    changed = {n for n in was if n not in got or got[n].tobytes() != was[n].tobytes()}
    assert changed == {*report.expanded, *(f"{n}_scale_inv" for n in report.expanded)}
    listed = {f"{n}.weight" for n in config_of(tmp_path / "out")["quantization_config"].pop(
        "modules_to_not_convert")}
    assert listed == {n for n, x in got.items() if "proj" in n and x.dtype == BF16} | {
        "lm_head.weight"}
    again = convert(tmp_path / "out", tmp_path / "again", "hf", None, True, quiet)
    assert again.expanded == ()
    same(tensors(tmp_path / "again"), got)
    assert config_of(tmp_path / "again") == config_of(tmp_path / "out")


def test_attention_in_floats_beside_fp8_experts_stays_as_it_is(tmp_path):
    source = checkpoint(tmp_path / "hub", floats=("self_attn",))
    assert convert(source, tmp_path / "ours", "orbax", None, True, quiet).expanded == ()
    convert(tmp_path / "ours", tmp_path / "back", "hf", None, False, quiet)
    same(tensors(tmp_path / "back"), tensors(source))


def test_commands_say_what_they_expand(tmp_path, monkeypatch, capsys):
    source = checkpoint(tmp_path / "hub", floats=(OUT,))
    np.save(tmp_path / "ids.npy", np.zeros((1, 3), np.int32))
    reading = ["--checkpoint", source, "--tokens", tmp_path / "ids.npy", "--out"]
    for args in (
        ["convert", source, tmp_path / "out", "--to", "orbax"],
        ["logits", *reading, tmp_path / "out.npy"],
        ["generate", *reading, tmp_path / "new.npy", "--max_new", "1"],
    ):
        monkeypatch.setattr("sys.argv", ["kimijax", *map(str, args), "--weights", "keep"])
        with pytest.raises(SystemExit) as stop:
            cli.run()
        out, errors = capsys.readouterr()
        assert not stop.value.code, errors
        assert "9 quantised matrices were expanded, such as model.layers.1.self_attn." in (
            out if args[0] == "convert" else errors
        )


def test_kda_is_expanded_and_what_is_beside_it_kept(tmp_path):
    arrays, config = tensors(GOLDENS / "kimi_linear_tiny"), config_of(GOLDENS / "kimi_linear_tiny")
    for name in [n for n in arrays if "_proj" in n or ".experts." in n]:
        arrays[name], arrays[f"{name}_scale_inv"] = quantize_fp8(arrays[name])
    source = write(tmp_path / "hub", arrays, config | {"quantization_config": QUANT})
    kept, floats = load(source, keep=True), load(source)
    for layer in kept.cfg.layers:
        assert layer.ffn.weights == Fp8Config()
        assert getattr(layer.mixer, "weights", Fp8Config()) == Fp8Config()
    kda = [i for i, x in enumerate(kept.cfg.layers) if isinstance(x.mixer, KDAConfig)]
    assert set(kept.expanded) == {
        n for n in arrays if f"{n}_scale_inv" in arrays
        and any(n.startswith(f"model.layers.{i}.self_attn.") for i in kda)
    }
    ids = np.arange(20, dtype=np.int32)[None]
    assert_close(logits(kept, ids), logits(floats, ids))


def spoiled(source: Path, name: str, value: float) -> Path:
    """The checkpoint with a number of a tensor changed."""
    arrays, config = tensors(source), config_of(source)
    arrays[name][-1, -1] = value
    shutil.rmtree(source)
    return write(source, arrays, config)


@pytest.mark.parametrize("end", ["", "_scale_inv"])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", ["kv_b_proj", "shared_experts.up_proj", "0.mlp.down_proj"])
def test_numbers_that_are_not_finite_are_refused(name, end, keep, tmp_path):
    source = checkpoint(tmp_path / "hub")
    whole = next(n for n in tensors(source) if n.endswith(f"{name}.weight{end}"))
    spoiled(source, whole, np.nan)
    for call in (
        functools.partial(load, source, keep=keep),
        functools.partial(convert, source, tmp_path / "ours", "orbax", None, keep, quiet),
        functools.partial(convert, source, tmp_path / "copy", "hf", None, keep, quiet),
    ):
        with pytest.raises(UserError, match=whole.removesuffix("_scale_inv")) as error:
            call()
        assert "\n" not in str(error.value)
    assert [x.name for x in tmp_path.iterdir()] == ["hub"]


def test_scales_that_no_block_can_have_are_not_exported(tmp_path):
    model = load(checkpoint(tmp_path / "hub"), keep=True)
    leaves = model.params["params"]["group_0"]["layer_0"]["mixer"]["out"]
    leaves["w_scale"] = leaves["w_scale"].at[0, 1, 7].mul(2)
    with pytest.raises(UserError, match="o_proj.weight_scale_inv: scales differ within a block"):
        export(model.cfg, model.params, tmp_path / "out", None, model.hub)
