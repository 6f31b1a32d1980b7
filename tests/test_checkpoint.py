"""What is restored is what was saved, bit for bit; what is damaged or foreign is named."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file as save_bf16
from safetensors.numpy import load_file, save_file

from kimijax import presets
from kimijax.checkpoint import load_model, save_model
from kimijax.config_tree import override
from kimijax.errors import UserError
from kimijax.model import Model
from kimijax.ops.attend import local
from tests.conftest import array

CONFIG, WEIGHTS, MANIFEST = "config.json", "model.safetensors", "manifest.json"
CFG = override(
    presets.needle_2m(),
    {
        "vocab": 16,
        "width": 32,
        "groups.0.layers.0.mixer.heads": 2,
        "groups.0.layers.0.ffn.width": 16,
        "groups.1.layers.0.mixer.kv_rank": 32,
        "groups.1.layers.0.mixer.nope_dim": 8,
        "groups.1.layers.0.mixer.v_dim": 8,
        "groups.1.layers.0.ffn.width": 16,
        "groups.1.layers.0.ffn.shared_width": 16,
    },
)


@pytest.fixture(scope="module")
def params():
    """Random, in the shapes of the model's own: compiling its init would take 8 s."""
    ids = jnp.zeros((1, 8), jnp.int32)
    init = partial(Model(CFG, local()).init, method="logits")
    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0), ids))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: array(rng.normal(size=x.shape), x.dtype), shapes)


@pytest.fixture
def saved(tmp_path, params):
    save_model(tmp_path / "model", CFG, params)
    return tmp_path / "model"


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert type(g) is type(w)
        g, w = np.asarray(g), np.asarray(w)
        assert (g.dtype, g.shape, g.tobytes()) == (w.dtype, w.shape, w.tobytes())


def refusal(directory):
    """The message load_model refuses with: one line."""
    with pytest.raises(UserError) as caught:
        load_model(directory)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 600
    return message


def rewrite(path, change, **options):
    """The weights again, after `change` of the dict of tensors, without the config they carry."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, **options)


def test_a_model_comes_back_bit_for_bit(saved, params):
    cfg, got = load_model(saved)
    assert cfg == CFG
    assert_same(got, {"params": params})
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, WEIGHTS]
    assert (saved / WEIGHTS).stat().st_mode == (saved / CONFIG).stat().st_mode
    first = [(saved / name).read_bytes() for name in (CONFIG, WEIGHTS)]
    save_model(saved, cfg, got["params"])
    assert [(saved / name).read_bytes() for name in (CONFIG, WEIGHTS)] == first


def test_strided_arrays_are_saved_as_they_read(tmp_path, params):
    strided = jax.tree.map(lambda x: np.asfortranarray(x), params)
    save_model(tmp_path, CFG, strided)
    assert_same(load_model(tmp_path)[1]["params"], params)


def test_bfloat16_weights_are_cast(saved, params):
    tensors = load_file(saved / WEIGHTS)
    save_bf16({name: x.astype(jnp.bfloat16) for name, x in tensors.items()}, saved / WEIGHTS)
    want = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16).astype(np.float32), params)
    assert_same(load_model(saved)[1]["params"], jax.tree.map(jnp.asarray, want))


def test_parameters_of_another_config_are_not_saved(tmp_path, params):
    with pytest.raises(ValueError, match=r"embed as float32 \(16, 32\), not float32 \(17, 32\)"):
        save_model(tmp_path, override(CFG, {"vocab": 17}), params)
    assert not list(tmp_path.iterdir())


def test_a_model_that_diverged_does_not_replace_a_good_one(saved, params):
    broken = params | {"head": np.full_like(params["head"], np.nan)}
    with pytest.raises(UserError, match="head holds 512 of 512 numbers that are not finite"):
        save_model(saved, CFG, broken)
    assert_same(load_model(saved)[1]["params"], params)


@pytest.mark.parametrize("stop_at", [WEIGHTS, CONFIG])
def test_a_save_that_fails_leaves_the_old_model(saved, params, monkeypatch, stop_at):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    replace = type(saved).replace

    def stop(source, target):
        if target.name == stop_at:
            raise KeyboardInterrupt
        return replace(source, target)

    monkeypatch.setattr(type(saved), "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save_model(saved, CFG, params | {"embed": params["embed"] + 1})
    assert {path.name for path in saved.iterdir()} == before.keys()
    got = load_model(saved)[1]["params"]["embed"]
    assert np.array_equal(got, params["embed"] + (stop_at == CONFIG))


def test_weights_beside_the_config_of_another_model_are_refused(saved):
    text = (saved / CONFIG).read_text()
    (saved / CONFIG).write_text(text.replace('"theta": 1000.0', '"theta": 2000.0'))
    assert f"{CONFIG}: is not the config that {WEIGHTS} was saved with" in refusal(saved)


def test_a_directory_that_cannot_be_written_is_named(tmp_path, params):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file.*cannot save"):
        save_model(tmp_path / "file" / "run", CFG, params)


def test_missing_files_are_named(saved):
    assert "does not exist" in refusal(saved / "elsewhere")
    assert "is not a directory" in refusal(saved / CONFIG)
    (saved / WEIGHTS).unlink()
    assert f"{saved}: lacks {WEIGHTS};" in refusal(saved)
    (saved / CONFIG).unlink()
    assert f"{saved}: lacks {CONFIG} and {WEIGHTS};" in refusal(saved)


@pytest.mark.parametrize(
    "old, new, why",
    [
        ('"width": 32', '"widht": 32', "no field 'widht', did you mean 'width'?"),
        ('"ModelConfig"', '"ModelConfog"', "config.type must be one of ['ModelConfig']"),
        ('"ModelConfig"', "[]", "config.json: "),
        ('"width": 32', '"width": "wide"', "config.width must be of type"),
        ('"width": 32', '"width": 1' + "0" * 30, "ModelConfig.width must be from 0 to 2.1"),
        ('"vocab": 16', '"vocab": 17', "has embed as float32 (16, 32), not float32 (17, 32)"),
        ('"repeat": 2', '"repeat": 90000', "repeat 90000, but the weights have no dim"),
        ('"taps": 2', '"taps": 900000000', "taps 900000000, but the weights have no dim"),
        ('"embed_std": 1.0', '"embed_std": 1e999', "cannot be read as JSON"),
        ("{", "", "cannot be read as JSON"),
    ],
)
def test_a_config_that_is_wrong_is_explained(saved, old, new, why):
    text = (saved / CONFIG).read_text()
    assert old in text
    (saved / CONFIG).write_text(text.replace(old, new, 1))
    message = refusal(saved)
    assert str(saved) in message and why in message


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"[" * 100_000, b"[]", b"", b"null"])
def test_a_config_that_is_no_object_is_refused(saved, content):
    (saved / CONFIG).write_bytes(content)
    assert str(saved / CONFIG) in refusal(saved)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_weights_are_refused(saved, size):
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(data[:size])
    assert f"{saved / WEIGHTS}: is truncated or no safetensors file" in refusal(saved)


@pytest.mark.parametrize("header", [b"\xff" * 8, (2**40).to_bytes(8, "little"), b"\0" * 8])
def test_a_header_that_lies_is_refused(saved, header):
    (saved / WEIGHTS).write_bytes(header + (saved / WEIGHTS).read_bytes()[8:])
    assert f"{saved / WEIGHTS}: is truncated or no safetensors file" in refusal(saved)


def test_weights_of_another_project_are_refused(saved):
    foreign = {f"model.layers.{i}.mlp.weight\n": np.ones((4, 4), np.float32) for i in range(3)}
    save_file(foreign, saved / WEIGHTS)
    message = refusal(saved)
    assert "lacks 'embed' and" in message and "has 'model.layers.0.mlp.weight" in message


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda t: t.pop("head"), "lacks 'head'"),
        (lambda t: t.update(extra=t["head"]), "has 'extra', which nothing takes"),
        (lambda t: t.update(embed=t["embed"][:, :-1].copy()), "(16, 31), not float32 (16, 32)"),
        (lambda t: t.update(embed=t["embed"].astype(np.float16)), "embed as F16 (16, 32), not"),
        (lambda t: t["embed"].put(5, np.nan), "embed holds 1 of 512 numbers that are"),
        (lambda t: t["head"].put([1, 2], -np.inf), "head holds 2 of 512 numbers that are"),
    ],
)
def test_weights_that_do_not_fit_are_explained(saved, change, why):
    rewrite(saved / WEIGHTS, change)
    message = refusal(saved)
    assert str(saved / WEIGHTS) in message and why in message
