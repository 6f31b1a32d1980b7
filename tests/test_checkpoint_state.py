"""A state is restored as it was saved, on any mesh; what is damaged or foreign is named."""

import json
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kimijax.checkpoint import Saver, restore_latest, save_state
from kimijax.errors import UserError
from kimijax.model import Model
from kimijax.ops.attend import local
from kimijax.parallel.mesh import make_mesh
from kimijax.parallel.plan import Plan
from kimijax.train import init_state, state_shardings
from tests.conftest import small_needle
from tests.test_checkpoint import MANIFEST, assert_same

STATE = {
    "params": {"w": jnp.arange(12, dtype=jnp.float32).reshape(3, 4) / 7, "none": jnp.zeros((0, 3))},
    "half": jnp.array([1.5, -0.0, jnp.nan, jnp.inf], jnp.bfloat16),
    "flags": jnp.array([True, False]),
    "key": jax.random.key_data(jax.random.key(7)),
    "host": np.arange(5, dtype=np.int64) << 40,
    "seen": 2**40 + 1,
    "best": 0.1,
}


def test_a_state_comes_back_bit_for_bit(tmp_path):
    save_state(tmp_path, 123, STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000123"]
    step, got, _ = restore_latest(tmp_path, STATE)
    assert step == 123
    assert_same(got, STATE)


def test_an_optimiser_comes_back_from_its_shapes(tmp_path):
    optimiser = optax.multi_transform(
        {"adam": optax.adam(1e-3), "sgd": optax.sgd(1e-2)},
        lambda tree: {name: "sgd" if name == "head" else "adam" for name in tree},
    )

    params = {name: jnp.arange(12.0).reshape(3, 4) for name in ("embed", "head")}

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
    assert {MANIFEST, "leaves.json", "beside_00000.json", "_METADATA"} < {f.name for f in files}
    for path in files:
        data = path.read_bytes()
        places = {0, len(data) - 1, *rng.integers(len(data), size=40).tolist()} if data else ()
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


def test_what_lies_beside_the_state_comes_back(tmp_path):
    beside = {"phase": 2, "batches": {"next_index": 2**70, "rng": [1.5, None]}}
    save_state(tmp_path, 1, {"w": 1.0}, beside=beside)
    assert restore_latest(tmp_path, {"w": 0.0}) == (1, {"w": 1.0}, beside)


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file.*cannot save"):
        save_state(tmp_path / "file" / "run", 1, STATE)


def test_without_verifying_names_and_sizes_are_still_compared(two_steps, tmp_path, capsys):
    run = shutil.copytree(two_steps, tmp_path / "run")
    file = run / "step_00000002" / "arrays" / "_METADATA"
    data = file.read_bytes()
    file.write_bytes(data + b" ")  # JSON that says the same
    assert restore_latest(run, STATE, verify=False).step == 1
    assert f"differs from its {MANIFEST} in 'arrays/_METADATA'" in capsys.readouterr().err
    file.write_bytes(data.replace(b": ", b":\t", 1))
    assert restore_latest(run, STATE, verify=False).step == 2
    assert restore_latest(run, STATE).step == 1


def test_training_goes_on_while_a_state_is_written(tmp_path, monkeypatch):
    """The step takes the memory of the state that is being written, and the file does not care."""
    from kimijax.checkpoint import saver

    grow = jax.jit(lambda w: w * 1.5 + 1, donate_argnums=0)
    write, gate = saver.write_manifest, threading.Event()
    monkeypatch.setattr(saver, "write_manifest", lambda path: (gate.wait(20), write(path)))
    w = jnp.asarray(np.random.default_rng(0).normal(size=1_000_000), jnp.float32)
    want = np.array(w)
    with Saver(tmp_path) as writing:
        writing.save(1, {"w": w})
        for _ in range(5):
            w = jax.block_until_ready(grow(w))
        assert [path.name for path in tmp_path.iterdir()] == ["step_00000001.tmp"]
        threading.Timer(0.1, gate.set).start()
        second = np.array(w)
        writing.save(2, {"w": w})  # waits for the first
        assert (tmp_path / "step_00000001").is_dir()
    for at, value in ((2, second), (1, want)):
        step, got, _ = restore_latest(tmp_path, {"w": want})
        assert step == at
        assert_same(got, {"w": value})
        shutil.rmtree(tmp_path / f"step_{at:08d}")


def test_a_fault_in_the_background_is_raised_once_and_spares_what_is_there(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    save_state(tmp_path, 1, {"w": 1})
    monkeypatch.setattr("kimijax.checkpoint.saver.write_manifest", full)
    fault = "step_00000002: cannot save the state: .*No space left on device; make room"
    with pytest.raises(UserError, match=fault), Saver(tmp_path) as saver:
        saver.save(2, {"w": 2})
        saver.save(3, {"w": 3})
    with Saver(tmp_path) as saver:
        saver.save(2, {"w": 2})
        saver._writing.join()
        with pytest.raises(UserError, match=fault):
            saver.check()
        monkeypatch.undo()
        saver.save(3, {"w": 3})
    assert restore_latest(tmp_path, {"w": 0}) == (3, {"w": 3}, None)
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["1", "3"]


def test_a_state_moves_from_a_mesh_to_one_device_and_back(tmp_path):
    plan = Plan(make_mesh({"data": 2, "seq": 2}), train=True)
    model, optimizer = Model(small_needle(), local()), optax.adam(1e-3)
    where = state_shardings(model, optimizer, plan)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_state(model, optimizer, 0))
    host = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)
    dealt = jax.device_put(host, where)
    assert sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(dealt)) > 20
    save_state(tmp_path / "mesh", 1, dealt)
    alone = restore_latest(tmp_path / "mesh", shapes).state
    assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(alone))
    save_state(tmp_path / "one", 1, alone)
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    back = restore_latest(tmp_path / "one", jax.tree.map(place, shapes, where)).state
    for got in (alone, back):
        jax.tree.map(np.testing.assert_array_equal, got, host)
    assert jax.tree.map(lambda x: x.sharding, back) == jax.tree.map(lambda x: x.sharding, dealt)
