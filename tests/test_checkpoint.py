"""What is restored is what was saved, bit for bit; what is damaged or foreign is named."""

import json
import shutil
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.flax import save_file as save_bf16
from safetensors.numpy import load_file, save_file

from kimijax import presets
from kimijax.checkpoint import load_model, restore_latest, save_model, save_state
from kimijax.config_tree import override
from kimijax.errors import UserError
from kimijax.model import Model
from kimijax.ops.attend import local

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
STATE = {
    "params": {"w": jnp.arange(12, dtype=jnp.float32).reshape(3, 4) / 7, "none": jnp.zeros((0, 3))},
    "half": jnp.array([1.5, -0.0, jnp.nan, jnp.inf], jnp.bfloat16),
    "flags": jnp.array([True, False]),
    "key": jax.random.key_data(jax.random.key(7)),
    "host": np.arange(5, dtype=np.int64) << 40,
    "seen": 2**40 + 1,
    "best": 0.1,
}


@pytest.fixture(scope="module")
def params():
    """Random, in the shapes of the model's own: compiling its init would take 8 s."""
    ids = jnp.zeros((1, 8), jnp.int32)
    init = partial(Model(CFG, local()).init, method="logits")
    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0), ids))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)


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
    for write in (lambda at: save_model(at, CFG, params), lambda at: save_state(at, 1, STATE)):
        with pytest.raises(UserError, match="file.*cannot save"):
            write(tmp_path / "file" / "run")


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


def test_a_state_comes_back_bit_for_bit(tmp_path):
    save_state(tmp_path, 123, STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000123"]
    step, got, _ = restore_latest(tmp_path, STATE)
    assert step == 123
    assert_same(got, STATE)


def test_an_optimiser_comes_back_from_its_shapes(tmp_path, params):
    optimiser = optax.multi_transform(
        {"adam": optax.adam(1e-3), "sgd": optax.sgd(1e-2)},
        lambda tree: {name: "sgd" if name == "head" else "adam" for name in tree},
    )

    @jax.jit
    def start(params):
        state = optimiser.init(params)
        return params, optimiser.update(jax.tree.map(jnp.sin, params), state, params)[1]

    state = start(params)
    save_state(tmp_path, 1, state)
    step, got, _ = restore_latest(tmp_path, jax.eval_shape(start, params))
    assert step == 1
    assert_same(got, state)


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 3):
        save_state(tmp_path, step, {"step": step}, keep=2)
    # Step 10 is of a run that went further: its successor has not come that far yet.
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step_{s:08d}" for s in (2, 3, 10)]
    save_state(tmp_path, 10, {"step": -10}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000010"]
    assert restore_latest(tmp_path, {"step": 0}) == (10, {"step": -10}, None)


@pytest.mark.parametrize(
    "other, why",
    [
        ({"w": jnp.ones((3, 5))}, r"\['w'\] as float32 \(3, 4\), not float32 \(3, 5\)"),
        ({"w": jnp.ones((3, 4), jnp.int32)}, r"\['w'\] as float32 \(3, 4\), not int32 \(3, 4\)"),
        ({"v": jnp.ones((3, 4))}, "lacks .*'v'.* and has .*'w'"),
    ],
)
def test_a_state_of_another_configuration_is_refused(tmp_path, other, why):
    save_state(tmp_path, 5, {"w": jnp.ones((3, 4))})
    with pytest.raises(UserError, match=f"step_00000005: was made with another .*{why}"):
        restore_latest(tmp_path, other)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    directory = tmp_path_factory.mktemp("states")
    for step in (1, 2):
        save_state(directory, step, STATE | {"seen": step})
    return directory


def assert_first_is_used(directory, capsys, reason):
    step, got, _ = restore_latest(directory, STATE)
    assert step == 1
    assert_same(got, STATE | {"seen": 1})
    assert f"{directory / 'step_00000002'}: {reason}" in capsys.readouterr().err


def test_any_flipped_bit_is_found(two_steps, capsys, monkeypatch):
    # Restoring is tested below; here every damage has only to send it to the first checkpoint.
    monkeypatch.setattr("kimijax.checkpoint.train._read_state", lambda path, _: path.name)
    rng = np.random.default_rng(0)
    files = [path for path in (two_steps / "step_00000002").rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        data = path.read_bytes()
        places = {0, len(data) - 1, *rng.integers(len(data), size=8).tolist()} if data else ()
        for place in places:
            flipped = bytearray(data)
            flipped[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(flipped)
            assert restore_latest(two_steps, STATE) == (1, "step_00000001", None), (path, place)
            assert path.name in capsys.readouterr().err
        for changed in (data[:-1], data + b"\n"):
            path.write_bytes(changed)
            assert restore_latest(two_steps, STATE) == (1, "step_00000001", None), path
        path.write_bytes(data)
    assert restore_latest(two_steps, STATE) == (2, "step_00000002", None)


def test_a_damaged_state_is_named_and_the_one_before_it_used(two_steps, tmp_path, capsys):
    run = shutil.copytree(two_steps, tmp_path / "run")
    (run / "step_00000002" / "leaves.json").unlink()
    assert_first_is_used(run, capsys, f"differs from its {MANIFEST} in 'leaves.json'")
    (run / "step_00000001" / MANIFEST).write_text(json.dumps({"leaves.json": 1}))
    with pytest.raises(UserError, match="no checkpoint is whole: step_00000002 .*step_00000001 "):
        restore_latest(run, STATE)


def test_an_interrupted_save_is_ignored(two_steps, tmp_path, capsys, monkeypatch):
    run = shutil.copytree(two_steps, tmp_path / "run")
    assert restore_latest(tmp_path / "nothing", STATE) is None
    (run / "step_00000002").rename(run / "step_00000003.tmp")
    assert restore_latest(run, STATE)[0] == 1
    assert not capsys.readouterr().err
    shutil.copytree(run / "step_00000001", run / "step_00000002")
    (run / "step_00000002" / MANIFEST).unlink()
    assert_first_is_used(run, capsys, f"has no {MANIFEST}")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("kimijax.checkpoint.saver.write_manifest", stop)
    with pytest.raises(KeyboardInterrupt):
        save_state(run, 4, STATE)
    monkeypatch.undo()
    assert not list(run.glob("step_00000004*"))
    save_state(run, 5, STATE)
    assert not list(run.glob("*.tmp"))


def test_a_step_saved_again_is_never_without_a_whole_checkpoint(tmp_path, monkeypatch):
    save_state(tmp_path, 1, {"run": 1})
    rename = type(tmp_path).rename

    def stop(source, target):
        if target.name == "step_00000001":
            raise KeyboardInterrupt
        return rename(source, target)

    monkeypatch.setattr(type(tmp_path), "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        save_state(tmp_path, 1, {"run": 2})
    monkeypatch.undo()
    assert restore_latest(tmp_path, {"run": 0}) == (1, {"run": 1}, None)
    save_state(tmp_path, 1, {"run": 3})
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert restore_latest(tmp_path, {"run": 0}) == (1, {"run": 3}, None)
