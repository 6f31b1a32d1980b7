"""Weights there and back, quantised or not, interrupted or not: the same bits."""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimijax.config import Fp8Config, Int4Config
from kimijax.convert import to_store
from kimijax.convert.load import load
from kimijax.convert.quant import quantize_fp8, quantize_int4
from kimijax.convert.run import convert
from kimijax.convert.source import open_source
from kimijax.convert.tensors import open_directory
from kimijax.convert.write import ShardWriter
from kimijax.errors import UserError
from kimijax.model import Model
from kimijax.ops.attend import experts_by, local
from tests.conftest import assert_close

GOLDENS = Path(__file__).parent / "goldens"
KINDS = {"float32": "F32", "bfloat16": "BF16", "int32": "I32", "int64": "I64",
         "float8_e4m3fn": "F8_E4M3"}


def tensors(directory: Path) -> dict[str, np.ndarray]:
    """Everything a directory holds."""
    with open_directory(directory) as files:
        return {name: files.read(name) for name in files.names()}


def write(directory: Path, arrays: dict[str, np.ndarray], config: dict, shard: int = 2**30) -> Path:
    """A hub checkpoint of these tensors."""
    plan = {n: (KINDS[x.dtype.name], x.shape) for n, x in arrays.items()}
    with ShardWriter(directory, plan, shard_bytes=shard) as writer:
        for name, array in arrays.items():
            writer.put(name, array)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def quiet(*_):
    """No progress."""


def same(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    """Equal names, dtypes and bits."""
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype, name
        assert got[name].tobytes() == want[name].tobytes(), name


def text_tensors(name: str) -> dict[str, np.ndarray]:
    """What of a golden is the language model."""
    vision = ("vision_tower.", "mm_projector.", "model.mm_projector.")
    return {n: x for n, x in tensors(GOLDENS / name).items() if not n.startswith(vision)}


@pytest.mark.parametrize("name", ["k2_tiny", "kimi_linear_tiny", "kimi_k25_text_tiny"])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_there_and_back_is_bit_identical(name, dtype, tmp_path):
    exact = ("e_score_correction_bias", "A_log", "dt_bias")
    config = json.loads((GOLDENS / name / "config.json").read_text())
    given = {
        n: x if n.endswith(exact) else x.astype(dtype) for n, x in text_tensors(name).items()
    }
    source = write(tmp_path / "hub", given, config, shard=200_000)
    assert (source / "model.safetensors.index.json").exists()
    convert(source, tmp_path / "ours", "orbax", None, False, quiet)
    convert(tmp_path / "ours", tmp_path / "back", "hf", None, False, quiet)
    same(tensors(tmp_path / "back"), given)
    a, b = load(source), load(tmp_path / "ours")
    assert a.cfg == b.cfg
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


def quantised(directory: Path, form: str) -> Path:
    """k2_tiny as K2-Thinking is stored (experts in int4), or as K2 is (all matrices in fp8)."""
    config = json.loads((GOLDENS / "k2_tiny" / "config.json").read_text())
    arrays = {}
    for name, x in tensors(GOLDENS / "k2_tiny").items():
        if form == "int4" and ".experts." in name:
            packed, scale = quantize_int4(x)
            arrays |= {f"{name}_packed": packed, f"{name}_scale": scale,
                       f"{name}_shape": np.array(x.shape, np.int32)}
        elif form == "fp8" and "_proj" in name:
            arrays[name], arrays[f"{name}_scale_inv"] = quantize_fp8(x)
        else:
            arrays[name] = x.astype(jnp.bfloat16) if x.ndim > 1 else x
    group = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
             "group_size": 32}
    config["quantization_config"] = {
        "int4": {"quant_method": "compressed-tensors", "format": "pack-quantized",
                 "config_groups": {"group_0": {"weights": group}}},
        "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }[form]
    return write(directory, arrays, config)


@pytest.mark.parametrize("form, kind", [("int4", Int4Config), ("fp8", Fp8Config)])
def test_experts_kept_quantised_give_the_logits_of_expanded_ones(form, kind, tmp_path):
    """By tiles, and by the kernels of a TPU, interpreted."""
    source = quantised(tmp_path / "hub", form)
    ids = np.random.default_rng(0).integers(0, 256, (1, 40)).astype(np.int32)
    kernels = dataclasses.replace(local(), experts=experts_by("grouped", "pallas_interpret"))
    logits = []
    for keep, ops in ((False, local()), (True, local()), (True, kernels)):
        model = load(source, keep=keep)
        net = Model(model.cfg, ops)
        logits.append(jax.jit(functools.partial(net.apply, method="logits"))(model.params, ids))
    assert isinstance(model.cfg.layers[1].ffn.weights, kind)
    assert_close(logits[1], logits[0])
    assert_close(logits[2], logits[0])


def test_int4_experts_survive_bit_for_bit(tmp_path):
    source = quantised(tmp_path / "hub", "int4")
    convert(source, tmp_path / "ours", "orbax", None, True, quiet)
    convert(tmp_path / "ours", tmp_path / "back", "hf", None, False, quiet)
    same(tensors(tmp_path / "back"), tensors(source))
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_an_interrupted_conversion_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(to_store, "NOTE_EVERY", 50_000)
    source = GOLDENS / "moonlight_tiny"
    convert(source, tmp_path / "whole", "orbax", None, False, quiet)
    seen = 0

    def stop(done, total):
        nonlocal seen
        seen += done
        if seen > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "cut", "orbax", None, False, stop)
    assert not (tmp_path / "cut").exists()
    noted = (tmp_path / "cut.partial" / to_store.DONE).read_text().count("\n")
    read = []
    pieces = to_store._pieces

    def noting(source, rule, leaves):
        read.append(rule.name)
        return pieces(source, rule, leaves)

    monkeypatch.setattr(to_store, "_pieces", noting)
    convert(source, tmp_path / "cut", "orbax", None, False, quiet)
    whole, resumed = load(tmp_path / "whole"), load(tmp_path / "cut")
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)
    assert 0 < noted and len(read) + noted == len(text_tensors("moonlight_tiny"))


RESTORE = """
import sys, jax, numpy as np, orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from kimijax.convert.load import load
from kimijax.model import parameter_shapes
model = load(sys.argv[1])
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
def target(x):
    axis = next((i for i, n in enumerate(x.shape) if n % 4 == 0), None)
    spec = [None] * len(x.shape) if axis is None else [*[None] * axis, "x"]
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
wanted = {n: target(x) for n, x in parameter_shapes(model.cfg).items()}
with ocp.StandardCheckpointer() as checkpointer:
    got = checkpointer.restore(sys.argv[1] + "/params", unflatten_dict(wanted, sep="."))
jax.tree.map(np.testing.assert_array_equal, got, model.params["params"])
assert len(got["embed"].sharding.device_set) == 4
"""


def test_orbax_restores_it_onto_another_mesh(tmp_path):
    convert(GOLDENS / "kimi_linear_tiny", tmp_path / "ours", "orbax", None, False, quiet)
    done = subprocess.run(
        [sys.executable, "-c", RESTORE, str(tmp_path / "ours")], capture_output=True, text=True,
        env={"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu",
             "PATH": ""}, cwd=Path(__file__).parents[1], check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_flipped_bits_are_found(tmp_path):
    convert(GOLDENS / "moonlight_tiny", tmp_path / "ours", "orbax", None, False, quiet)
    data = max((tmp_path / "ours" / "params" / "d").iterdir(), key=lambda f: f.stat().st_size)
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 4
    data.write_bytes(raw)
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "ours")


def _broken(tmp_path, change=None, config=None):
    arrays = tensors(GOLDENS / "k2_tiny")
    hub = json.loads((GOLDENS / "k2_tiny" / "config.json").read_text())
    return write(tmp_path / "hub", (change or (lambda x: x))(arrays), hub | (config or {}))


QUERY = "model.layers.1.self_attn.q_b_proj.weight"


@pytest.mark.parametrize(
    "change, config, message",
    [
        (lambda x: {n: a for n, a in x.items() if n != QUERY}, None, QUERY),
        (lambda x: x | {QUERY: x[QUERY][:-1]}, None, r"shape \(127, 40\), its config makes it"),
        (lambda x: x | {"model.extra": x[QUERY]}, None, "'model.extra', which nothing"),
        (lambda x: x | {QUERY: x[QUERY] * np.float32("inf")}, None, "not finite"),
        (None, {"quantization_config": {"quant_method": "gptq"}}, "'gptq' is not supported"),
        (None, {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
         "is not \\[128, 128\\]"),
        (None, {"num_hidden_layers": 2}, "which nothing in this model takes"),
        (None, {"num_hidden_layers": 4}, "model.layers.3"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(change, config, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        load(_broken(tmp_path, change, config))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form, part", [("int4", "_scale"), ("fp8", "_scale_inv")])
@pytest.mark.parametrize("keep", [False, True])
def test_scales_that_are_not_finite_are_refused(form, part, keep, tmp_path):
    source = quantised(tmp_path / "hub", form)
    arrays = tensors(source)
    config = json.loads((source / "config.json").read_text())
    name = next(n for n in arrays if ".experts." in n and n.endswith(part))
    arrays[name][0, 0] = np.nan
    shutil.rmtree(source)
    with pytest.raises(UserError, match="experts"):
        load(write(source, arrays, config), keep=keep)


def test_a_slot_of_multi_token_prediction_is_left_out(tmp_path):
    source = _broken(tmp_path, lambda x: x | {
        f"model.layers.3.{n}.weight": x[QUERY] for n in ("eh_proj", "enorm", "self_attn.q_b_proj")
    })
    with open_source(source) as opened:
        assert opened.skipped == 3


def test_the_cache_of_the_hub_is_read(tmp_path):
    """Its snapshots are links to blobs; a link to anywhere else is refused."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDENS / "moonlight_tiny" / name, blobs / name)
        (snapshot / name).symlink_to(blobs / name)
    assert load(snapshot).cfg == load(GOLDENS / "moonlight_tiny").cfg
    (tmp_path / "elsewhere").mkdir()
    (blobs / "model.safetensors").rename(tmp_path / "elsewhere" / "model.safetensors")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "elsewhere" / "model.safetensors")
    with pytest.raises(UserError, match="symbolic link"):
        load(snapshot)


def test_nothing_quantised_cannot_be_kept():
    with pytest.raises(UserError, match="cannot be kept quantised"):
        load(GOLDENS / "k2_tiny", keep=True)


def test_an_existing_destination_is_left_alone(tmp_path):
    with pytest.raises(UserError, match="exists"):
        convert(GOLDENS / "k2_tiny", tmp_path, "orbax", None, False, quiet)
    assert not list(tmp_path.iterdir())
