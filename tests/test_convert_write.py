"""Weights in shards: what was put comes back, and what is not whole leaves nothing behind."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file

from kimijax.convert import tensors, write
from kimijax.convert.tensors import INDEX, SINGLE, open_directory
from kimijax.convert.write import ShardWriter
from kimijax.errors import UserError
from tests.test_convert_files import (
    SHARDS,
    assert_read,
    plan_of,
    random_tensors,
    refusal,
    write_all,
)


@pytest.mark.parametrize("size, count", [(1, 42), (200, 3), (10**9, 1)])
def test_shards_come_back(tmp_path, rng, monkeypatch, size, count):
    monkeypatch.setattr(tensors, "CHUNK", 7)  # bytes, so that reads and writes take several
    monkeypatch.setattr(write, "CHUNK", 7)
    arrays = {x: v for x, v in random_tensors(rng).items() if v.size or size > 1}
    arrays |= {f"w{i}": rng.normal(size=8).astype(np.float32) for i in range(9)}
    write_all(tmp_path / "new", arrays, shard_bytes=size)
    assert_read(tmp_path / "new", arrays)
    files = sorted(path.name for path in (tmp_path / "new").iterdir())
    if size == 10**9:
        assert files == [SINGLE]
        return
    assert len(files) >= count and files[-1] == INDEX
    assert files[0] == f"model-00001-of-{len(files) - 1:05d}.safetensors"
    index = json.loads((tmp_path / "new" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in arrays.values())
    assert index["weight_map"].keys() == arrays.keys()
    (tmp_path / "new" / INDEX).unlink()
    assert_read(tmp_path / "new", arrays)  # all the files there are


def test_strided_arrays_are_written_as_they_read(tmp_path):
    want = np.arange(12, dtype=np.float32).reshape(3, 4)
    arrays = {"w": want.T, "r": want[::-1, ::2], "line": want[1, ::2]}
    write_all(tmp_path, arrays)
    assert_read(tmp_path, arrays)
    assert np.array_equal(load_file(tmp_path / SINGLE)["w"], want.T)


def test_a_model_that_is_not_whole_leaves_nothing(tmp_path):
    arrays = {name: np.full(3, 1, np.float32) for name in "abc"}
    plan = plan_of(arrays)
    with pytest.raises(ValueError, match="1 tensors were never put, such as b"):
        with ShardWriter(tmp_path, plan, shard_bytes=12) as writer:
            writer.put("c", arrays["c"])
            writer.put("a", arrays["a"])
            assert len(list(tmp_path.glob("*.tmp"))) == 3 == len(list(tmp_path.iterdir()))
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        with ShardWriter(tmp_path, plan) as writer:
            raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    for call in (writer.close, lambda: writer.put("a", arrays["a"])):
        with pytest.raises(ValueError, match="nothing is written|are discarded"):
            call()


@pytest.mark.parametrize("stop_at", [*SHARDS, INDEX])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_stop_between_the_renames_leaves_nothing(tmp_path, monkeypatch, stop_at, error):
    replace = type(tmp_path).replace

    def stop(source, target):
        if target.name == stop_at:
            raise error
        return replace(source, target)

    monkeypatch.setattr(type(tmp_path), "replace", stop)
    arrays = {name: np.zeros(3) for name in "ab"}
    with pytest.raises(UserError if isinstance(error, OSError) else error) as caught:
        write_all(tmp_path, arrays, shard_bytes=1)
    assert not list(tmp_path.iterdir())
    if isinstance(error, OSError):
        assert f"{tmp_path}: cannot be written: No space left" in str(caught.value)


def test_bytes_reach_the_disk_before_their_name(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, type(tmp_path).replace

    def record_sync(file):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}")))
        fsync(file)

    def record_name(source, target):
        events.append(target.name)
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(type(tmp_path), "replace", record_name)
    write_all(tmp_path, {"a": np.zeros(1), "b": np.zeros(1)}, shard_bytes=8)
    there = [tmp_path.name]
    want = [f"{SHARDS[1]}.tmp", f"{SHARDS[0]}.tmp", *SHARDS, *there, f"{INDEX}.tmp", INDEX, *there]
    assert events == want


def test_a_full_disk_is_named_and_nothing_stays(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    writer = ShardWriter(tmp_path, {"w": ("F64", (3,))})
    assert "No space left on device" in refusal(writer.put, "w", np.zeros(3))
    assert not list(tmp_path.iterdir())


def test_a_finished_model_is_kept(tmp_path):
    arrays = {"w": np.zeros(3)}
    with pytest.raises(KeyboardInterrupt):
        with ShardWriter(tmp_path, plan_of(arrays)) as writer:
            writer.put("w", arrays["w"])
            writer.close()
            raise KeyboardInterrupt
    writer.close()
    assert_read(tmp_path, arrays)
    message = refusal(ShardWriter, tmp_path, plan_of(arrays))
    assert f"{tmp_path}: holds {SINGLE}; name a new directory" in message
    (tmp_path / "file").touch()
    assert "cannot be written" in refusal(ShardWriter, tmp_path / "file" / "x", plan_of(arrays))
    assert_read(tmp_path, arrays)


def test_a_put_that_is_not_planned_is_a_mistake(tmp_path):
    with ShardWriter(tmp_path, {"w": ("F32", (3,))}) as writer:
        good = np.zeros(3, np.float32)
        for name, array, why in [
            ("x", good, "x is not in the plan of 1 tensors"),
            ("w", np.zeros(3), r"w is float64 \(3,\), but the plan has float32 \(3,\)"),
            ("w", good[None], r"w is float32 \(1, 3\), but the plan has float32 \(3,\)"),
        ]:
            with pytest.raises(ValueError, match=why):
                writer.put(name, array)
        writer.put("w", good)
        with pytest.raises(ValueError, match="w was put before"):
            writer.put("w", good)
    with pytest.raises(ValueError, match="the files are written"):
        writer.put("w", good)


@pytest.mark.parametrize(
    "plan",
    [{}, {"w": ("float32", (3,))}, {"w": ("F32", (-3,))}, {"__metadata__": ("F32", (3,))}],
)
def test_a_plan_that_no_file_can_hold_is_a_mistake(tmp_path, plan):
    with pytest.raises(ValueError, match="nothing to write|cannot be written"):
        ShardWriter(tmp_path / "new", plan)
    assert not list(tmp_path.iterdir())


def test_rows_one_after_the_other_are_the_tensor(tmp_path):
    whole = np.arange(35, dtype=np.float32).reshape(7, 5)
    with ShardWriter(tmp_path, {"a": ("F32", (7, 5)), "b": ("F32", (2,))}) as writer:
        writer.put_rows("a", 0, whole[:3])
        with pytest.raises(ValueError, match="do not follow"):
            writer.put_rows("a", 4, whole[4:])
        writer.put("b", np.ones(2, np.float32))
        writer.put_rows("a", 3, whole[3:])
    with open_directory(tmp_path) as files:
        np.testing.assert_array_equal(files.read("a"), whole)
