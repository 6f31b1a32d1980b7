"""Files of weights: ours are the library's, the library's are ours, a stranger's are refused."""

import copy
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from kimijax.convert import header, tensors
from kimijax.convert.header import DTYPES
from kimijax.convert.tensors import INDEX, SINGLE, open_directory
from kimijax.convert.write import ShardWriter
from kimijax.errors import UserError

SHARDS = [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
LAST = {"dtype": "U8", "shape": [3], "data_offsets": [16, 19]}


def random_tensors(rng):
    """One of each dtype, bits at random (NaN and all), of shapes with and without dims and rows."""
    shapes = [(), (5,), (0, 3), (2, 3, 4)]
    return {
        f"{kind}.{i}": rng.integers(0, 2, shape).astype(bool) if kind == "BOOL" else
        rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8).view(dtype).reshape(shape)
        for kind, dtype in DTYPES.items() for i, shape in enumerate(shapes)
    }


def plan_of(arrays):
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    return {name: (kinds[x.dtype], x.shape) for name, x in arrays.items()}


def write_all(directory, arrays, **options):
    with ShardWriter(directory, plan_of(arrays), **options) as writer:
        for name in sorted(arrays, reverse=True):  # any order
            writer.put(name, arrays[name])


def assert_read(directory, arrays):
    with open_directory(directory) as files:
        assert sorted(files.names()) == sorted(arrays)
        for name, want in arrays.items():
            got = files.read(name)
            assert (got.dtype, got.shape) == (want.dtype, want.shape)
            assert got.tobytes() == want.tobytes()


def craft(path, entries, data=b"", length=None):
    """A file with this header (bytes, or what JSON makes of it), true or not."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + data)


def refusal(call, *arguments):
    """The message of a UserError: one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 900
    return message


@pytest.fixture
def sharded(tmp_path):
    """Two shards with an index, of the tensors a and b."""
    for name, file in zip("ab", SHARDS, strict=True):
        save_file({name: np.arange(6, dtype=np.float32)}, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))}))
    return tmp_path


def test_the_library_reads_what_we_write(tmp_path, rng):
    arrays = random_tensors(rng)
    write_all(tmp_path, arrays)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    raw = (tmp_path / SINGLE).read_bytes()
    assert int.from_bytes(raw[:8], "little") % 8 == 0
    with safetensors.safe_open(tmp_path / SINGLE, "np") as file:
        assert file.metadata() == {"format": "pt"}
    got = dict(safetensors.deserialize(raw))
    assert got.keys() == arrays.keys()
    for name, want in arrays.items():
        kind, shape = plan_of(arrays)[name]
        assert (got[name]["dtype"], tuple(got[name]["shape"])) == (kind, shape)
        assert bytes(got[name]["data"]) == want.tobytes()
    with open_directory(tmp_path) as files:  # torch cannot view bytes that are not aligned
        assert all(files.info(x).start % DTYPES[files.info(x).dtype].itemsize == 0 for x in arrays)
    assert_read(tmp_path, arrays)


def test_we_read_what_the_library_writes(tmp_path, rng):
    arrays = random_tensors(rng)
    save_file(arrays, tmp_path / "weights.safetensors")
    assert_read(tmp_path, arrays)


def test_tensors_are_read_into_place(sharded):
    out = np.zeros((2, 6), np.float32)
    with open_directory(sharded) as files:
        files.read_into("b", out[1])
        for wrong in (out, out[1].astype(np.float64), np.zeros(12, np.float32)[::2]):
            with pytest.raises(ValueError, match="needs a C-contiguous array"):
                files.read_into("a", wrong)
    assert np.array_equal(out, [[0] * 6, range(6)])


def test_rows_are_read_alone(tmp_path, rng):
    arrays = random_tensors(rng)
    write_all(tmp_path, arrays)
    with open_directory(tmp_path) as files:
        for name, whole in arrays.items():
            rows = len(whole) if whole.ndim else 0
            for start in range(rows):
                got, want = files.read_rows(name, start, rows), whole[start:]
                assert (got.dtype, got.shape) == (want.dtype, want.shape)
                assert got.tobytes() == want.tobytes()
            for start, stop in [(0, rows + 1), (-1, 1), (1, 1), (2, 1)]:
                with pytest.raises(ValueError, match=f"has no rows {start} to {stop}"):
                    files.read_rows(name, start, stop)


def test_few_files_are_open_and_none_after_closing(tmp_path, rng):
    arrays = {f"w{i}": rng.normal(size=4) for i in range(20)}
    write_all(tmp_path, arrays, shard_bytes=1)
    before = set(os.listdir("/proc/self/fd"))
    with open_directory(tmp_path) as files:
        for name in arrays:
            files.read(name)
        assert len(set(os.listdir("/proc/self/fd")) - before) <= tensors.OPEN_FILES
    assert set(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ValueError, match="was closed"):
        files.read("w0")


def test_a_missing_tensor_is_named_with_its_place(sharded):
    with open_directory(sharded) as files:
        assert f"{sharded / INDEX}: lacks the tensor 'c'" in refusal(files.read, "c")
    (sharded / INDEX).unlink()
    with open_directory(sharded) as files:
        assert f"{sharded}: lacks the tensor 'c'" in refusal(files.info, "c")
    (sharded / SHARDS[0]).rename(sharded / SINGLE)
    with open_directory(sharded) as files:
        assert f"{sharded / SINGLE}: lacks the tensor 'b'" in refusal(files.info, "b")


def test_a_file_that_shrinks_after_it_was_opened_is_refused(sharded):
    with open_directory(sharded) as files:
        os.truncate(sharded / SHARDS[0], 70)
        assert "tensor 'a': the file ends at byte 70" in refusal(files.read, "a")
        (sharded / SHARDS[1]).unlink()
        assert "cannot be read: No such file" in refusal(files.read, "b")


@pytest.mark.parametrize(
    "entries, data, why",
    [
        ({"w": GOOD}, 15, "is truncated: tensor 'w'"),
        ({"w": GOOD}, 17, "1 bytes that belong to no tensor"),
        ({"w": GOOD, "x": {**LAST, "data_offsets": [17, 20]}}, 20, "'x' lies behind a gap"),
        ({"w": GOOD, "x": {**LAST, "data_offsets": [15, 18]}}, 18, "'x' overlaps"),
        ({"w": GOOD, "x": GOOD}, 16, "'x' overlaps"),
        ({"w": {**GOOD, "data_offsets": [16, 0]}}, 16, "are no byte range"),
        ({"w": {**GOOD, "data_offsets": [-16, 0]}}, 16, "are no byte range"),
        ({"w": {**GOOD, "data_offsets": [0, 16.0]}}, 16, "are no byte range"),
        ({"w": {**GOOD, "data_offsets": [0]}}, 16, "are no byte range"),
        ({"w": {**GOOD, "data_offsets": {}}}, 16, "are no byte range"),
        ({"w": {**GOOD, "data_offsets": [0, 10**400]}}, 16, "is truncated"),
        ({"w": {**GOOD, "shape": [2, 3]}}, 16, "F32 of shape [2, 3] has 24 bytes"),
        ({"w": {**GOOD, "dtype": "F16"}}, 16, "F16 of shape [2, 2] has 8 bytes"),
        ({"w": {**GOOD, "dtype": "Q4"}}, 16, "dtype 'Q4' is unknown"),
        ({"w": {**GOOD, "dtype": ["F32"]}}, 16, "dtype ['F32'] is unknown"),
        ({"w": {**GOOD, "shape": [-2, -2]}}, 16, "shape [-2, -2] is none"),
        ({"w": {**GOOD, "shape": [2.0, 2]}}, 16, "shape [2.0, 2] is none"),
        ({"w": {**GOOD, "shape": [True, 4]}}, 16, "shape [True, 4] is none"),
        ({"w": {**GOOD, "shape": "22"}}, 16, "shape '22' is none"),
        ({"w": {**GOOD, "shape": [1] * 33 + [4]}}, 16, "is none"),
        ({"w": {**GOOD, "shape": [2**62, 4]}}, 16, "absurdly large"),
        ({"w": {**GOOD, "shape": [10**4000, 10**4000]}}, 16, "absurdly large"),
        ({"w": {**GOOD, "shape": [0, 2**62], "data_offsets": [0, 0]}}, 0, "absurdly large"),
        ({"w": {"dtype": "F32", "shape": [4]}}, 16, "needs dtype, shape and data_offsets"),
        ({"w": None}, 16, "needs dtype, shape and data_offsets"),
        ({"w\n\x1b[2J" * 99: None}, 16, "needs dtype, shape and data_offsets"),
        ({"__metadata__": {"a": 1}, "w": GOOD}, 16, "must map names to strings"),
        ({"__metadata__": [], "w": GOOD}, 16, "must map names to strings"),
        (b'{"w": {}, "w": {}}', 0, "the name 'w' twice"),
        (b'{"w": {"dtype": "F32", "dtype": "F16"}}', 0, "the name 'dtype' twice"),
        ([GOOD], 16, "must be an object, not [{"),
        (b"{]", 0, "its JSON cannot be read"),
        (b'\xff\xfe{\x00}\x00', 0, "its JSON cannot be read"),
        (b"[" * 100_000, 0, "its JSON cannot be read"),
        (b'{"w": 1' + b"0" * 5000 + b"}", 0, "its JSON cannot be read"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, entries, data, why):
    craft(tmp_path / SINGLE, entries, bytes(data))
    message = refusal(open_directory, tmp_path)
    assert message.startswith(f"{tmp_path / SINGLE}: ") and why in message


@pytest.mark.parametrize("length", [0, 1, 3, 99_999, 100_000_001, 2**63, 2**64 - 1])
def test_a_header_of_absurd_length_is_refused(tmp_path, length):
    craft(tmp_path / SINGLE, b"{}", length=length)
    os.truncate(tmp_path / SINGLE, 200_000_000 if 99_999 < length < 2**63 else 10)  # sparse
    assert f"the length of its header is {length}" in refusal(open_directory, tmp_path)


@pytest.mark.parametrize("size", [0, 4, 7, 8, 40, -1])
def test_truncated_files_are_refused(tmp_path, size):
    save_file({"w": np.zeros(3)}, tmp_path / SINGLE)
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:size])
    assert f"{tmp_path / SINGLE}: is truncated" in refusal(open_directory, tmp_path)


def test_a_bool_is_0_or_1_and_memory_is_finite(tmp_path, monkeypatch):
    entry = {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}
    craft(tmp_path / SINGLE, {"w": entry}, b"\1\2")
    with open_directory(tmp_path) as files:
        assert "tensor 'w': BOOL holds a byte of 2" in refusal(files.read, "w")
        monkeypatch.setattr(np, "empty", lambda *_: (_ for _ in ()).throw(MemoryError()))
        assert "takes 2 bytes of memory" in refusal(files.read, "w")


def test_other_files_are_no_weights(tmp_path):
    assert "does not exist" in refusal(open_directory, tmp_path / "none")
    assert "holds no .safetensors file" in refusal(open_directory, tmp_path)
    (tmp_path / "a\n\x1b[2J.safetensors").touch()
    assert "a??[2J.safetensors: is truncated" in refusal(open_directory, tmp_path)
    (tmp_path / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in refusal(open_directory, tmp_path)
    assert "is not a directory" in refusal(open_directory, tmp_path / SINGLE)
    (tmp_path / SINGLE).unlink()
    os.mkfifo(tmp_path / SINGLE)
    assert "is not a regular file" in refusal(open_directory, tmp_path)


@pytest.mark.parametrize(
    "index, why",
    [
        ({"a": SHARDS[0], "b": "../b.safetensors"}, "maps 'b' to '../b.safetensors'; it must be"),
        ({"a": "/etc/a.safetensors"}, "without a directory"),
        ({"a": "x\\a.safetensors"}, "without a directory"),
        ({"a": "x\0.safetensors"}, "without a directory"),
        ({"a": "pytorch_model.bin"}, "without a directory"),
        ({"a": 1}, "maps 'a' to 1"),
        ({"a": SHARDS[1]}, "lacks 'a', which"),
        ({"a": SHARDS[1], "b": SHARDS[0]}, "lacks 'a', which"),
        ({"c": SHARDS[1]}, "lacks 'c', which"),
        ({"a": "gone.safetensors"}, "lacks 'gone.safetensors', to which"),
        ({"a": "\ud800.safetensors"}, "lacks '\\ud800.safetensors', to which"),
        ({"a": "x" * 999 + ".safetensors"}, "lacks 'xxx"),
        ({"a": "out.safetensors"}, "is a symbolic link that leaves the directory"),
        ({"a": "loop.safetensors"}, "Too many levels of symbolic links"),
        ({"a": "pipe.safetensors"}, "is not a regular file"),
        ({"a": SHARDS[0], "b": "twin.safetensors"}, "tensor 'a' is in"),
        ({}, "weight_map must map tensors to files, but is {}"),
        ([], "weight_map must map tensors to files, but is []"),
        (b"{}", "weight_map must map tensors to files, but is None"),
        (b"[]", "must be an object"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "the name 'a' twice"),
        (b"[" * 100_000, "its JSON cannot be read"),
    ],
)
def test_an_index_that_lies_is_refused(sharded, index, why):
    outside = sharded.parent / f"{sharded.name}.safetensors"
    save_file({"a": np.zeros(3)}, outside)
    (sharded / "out.safetensors").symlink_to(outside)
    (sharded / "loop.safetensors").symlink_to("loop.safetensors")
    (sharded / "twin.safetensors").symlink_to(SHARDS[0])
    os.mkfifo(sharded / "pipe.safetensors")
    text = index if isinstance(index, bytes) else json.dumps({"weight_map": index}).encode()
    (sharded / INDEX).write_bytes(text)
    message = refusal(open_directory, sharded)
    assert message.startswith(str(sharded)) and why in message


def test_an_index_is_small_alone_and_in_its_directory(sharded):
    (sharded / SINGLE).write_bytes((sharded / SHARDS[0]).read_bytes())
    assert "remove one" in refusal(open_directory, sharded)
    (sharded / SINGLE).unlink()
    os.truncate(sharded / INDEX, header.MAX_HEADER + 1)
    assert "an index has at most" in refusal(open_directory, sharded)
    (sharded / INDEX).rename(sharded.parent / "index")
    (sharded / INDEX).symlink_to(sharded.parent / "index")
    assert "leaves the directory" in refusal(open_directory, sharded)


def test_shards_without_an_index_are_complete_and_disjoint(sharded):
    (sharded / INDEX).unlink()
    (sharded / "x.safetensors").write_bytes((sharded / SHARDS[0]).read_bytes())
    assert "tensor 'a' is in" in refusal(open_directory, sharded)
    (sharded / SHARDS[0]).unlink()
    assert f"lacks '{SHARDS[0]}' beside '{SHARDS[1]}'" in refusal(open_directory, sharded)


NAMES = ["dtype", "shape", "data_offsets", "weight_map", "__metadata__", "F32", "BOOL", "a", "b"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=4) | st.sampled_from(NAMES)
    | st.integers(-2, 70) | st.integers(-(2**70), 2**70) | st.sampled_from(SHARDS),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), inner, max_size=4),
    max_leaves=6,
)


@st.composite
def mutants(draw):
    """(is it an index, its bytes): one kind of damage to a sound file, so that each gets deep."""
    is_index = draw(st.booleans())
    whole = copy.deepcopy({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}} if is_index else {
        "__metadata__": {"format": "pt"}, "a": GOOD, "c": {**LAST, "dtype": "BOOL"}
    })
    damage = draw(st.sampled_from(["value", "value", "bytes", "length", "end"]))
    for _ in range(draw(st.integers(1, 2)) if damage == "value" else 0):
        at = whole
        while True:  # somewhere in the tree
            key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
            if not (isinstance(at[key], dict | list) and at[key] and draw(st.integers(0, 3))):
                break
            at = at[key]
        at[key] = draw(VALUES)
    raw = bytearray(json.dumps(whole).encode())
    if not is_index:
        length = draw(st.integers(0, 300) | st.integers(0, 2**64 - 1))
        length = length if damage == "length" else len(raw)
        raw = bytearray(length.to_bytes(8, "little")) + raw + bytes(range(16)) + bytes([0, 1, 0])
    if damage == "bytes":
        for _ in range(draw(st.integers(1, 3))):
            raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    if damage == "end":
        raw = raw[: draw(st.integers(0, len(raw)))] + draw(st.binary(max_size=3))
    return is_index, bytes(raw)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(mutants())
def test_no_file_raises_anything_but_a_user_error(mutant):
    is_index, raw = mutant
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for tensor, file in zip("ab", SHARDS, strict=True):
            craft(directory / file, {tensor: GOOD}, bytes(16))
        (directory / (INDEX if is_index else SINGLE)).write_bytes(raw)
        try:
            with open_directory(directory) as files:
                for tensor in files.names():
                    assert files.read(tensor).shape == files.info(tensor).shape
            if not is_index:  # what we take, the library takes
                with safetensors.safe_open(directory / SINGLE, "np") as theirs:
                    assert sorted(theirs.keys()) == sorted(files.names())
        except UserError as error:
            assert str(error).isprintable() and len(str(error)) < 900
