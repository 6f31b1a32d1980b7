"""Conversions that fail or are cut short: one line, and nothing that is not of one whole model."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kimijax.convert import to_store
from kimijax.convert.load import load
from kimijax.convert.run import convert
from kimijax.convert.source import read_json
from kimijax.convert.write import ShardWriter
from kimijax.errors import UserError
from tests.test_convert import GOLDENS, quantised, quiet, same, tensors, write

PLAIN = "model.layers.1.self_attn.o_proj.weight"


def refused(source, out, to="orbax", keep=False, match="."):
    """The conversion is refused in one line."""
    with pytest.raises(UserError, match=match) as caught:
        convert(Path(source), Path(out), to, None, keep, quiet)
    assert "\n" not in str(caught.value)


def changed(directory, change):
    """A checkpoint with other tensors, in place."""
    config = json.loads((directory / "config.json").read_text())
    arrays = change(tensors(directory))
    shutil.rmtree(directory)
    return write(directory, arrays, config)


@pytest.fixture
def plain(tmp_path):
    """A hub checkpoint, in a directory of its own."""
    shutil.copytree(GOLDENS / "k2_tiny", tmp_path / "hub")
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A store that must not be changed."""
    out = tmp_path_factory.mktemp("converted") / "ours"
    convert(GOLDENS / "k2_tiny", out, "orbax", None, False, quiet)
    return out


@pytest.fixture
def ours(converted, tmp_path):
    """A store."""
    shutil.copytree(converted, tmp_path / "ours")
    return tmp_path / "ours"


def cut(source, out, monkeypatch):
    """A conversion that was interrupted half-way."""
    monkeypatch.setattr(to_store, "NOTE_EVERY", 50_000)
    seen = 0

    def stop(done, total):
        nonlocal seen
        seen += done
        if seen > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, "orbax", None, False, stop)
    return out.with_name(f"{out.name}.partial")


def test_other_weights_do_not_go_on_where_these_stopped(plain, tmp_path, monkeypatch):
    partial = cut(plain, tmp_path / "ours", monkeypatch)
    assert (partial / to_store.DONE).read_text()
    changed(plain, lambda x: x | {PLAIN: x[PLAIN] + 1})
    refused(plain, tmp_path / "ours", match="its source has changed; remove it")
    assert (partial / to_store.DONE).read_text() and not (tmp_path / "ours").exists()


def test_what_a_killed_process_was_writing_does_no_harm(tmp_path, monkeypatch):
    partial = cut(GOLDENS / "k2_tiny", tmp_path / "ours", monkeypatch)
    (partial / "params" / "manifest.ocdbt.__lock").write_bytes(b"x" * 10_000)
    convert(GOLDENS / "k2_tiny", tmp_path / "ours", "orbax", None, False, quiet)
    load(tmp_path / "ours")


@pytest.mark.parametrize("left", [(), ("config.json",), ("config.json", "lock", "source.json.tmp")])
def test_a_claim_cut_short_starts_anew(left, tmp_path, converted):
    (tmp_path / "ours.partial").mkdir()
    for name in left:
        (tmp_path / "ours.partial" / name).write_text("{")
    convert(GOLDENS / "k2_tiny", tmp_path / "ours", "orbax", None, False, quiet)
    assert {x.name for x in (tmp_path / "ours").iterdir()} >= {"config.json", "params"}
    assert not {to_store.CLAIM, to_store.DONE, to_store.LOCK} & set(os.listdir(tmp_path / "ours"))
    assert os.listdir(tmp_path) == ["ours"]


KILLED = """
import os, signal, sys
from pathlib import Path
from kimijax.convert.run import convert
def stop(done, total):
    os.kill(os.getpid(), signal.SIGKILL)
convert(Path(sys.argv[1]), Path(sys.argv[2]), "hf", None, False, stop)
"""


def test_after_a_kill_weights_are_exported_anew(converted, tmp_path):
    out = tmp_path / "hf"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(converted), str(out)], check=False,
        cwd=Path(__file__).parents[1],
    )
    assert killed.returncode == -signal.SIGKILL
    assert sorted(os.listdir(out)) == ["config.json.tmp", "model.safetensors.tmp"]
    (out / "model-00001-of-00002.safetensors.tmp").touch()  # of a run with other shards
    convert(converted, out, "hf", None, False, quiet)
    same(tensors(out), tensors(GOLDENS / "k2_tiny"))
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    "name",
    ["thesis.tmp", "thesis.tex", "config.json", "model.safetensors", "model-1.safetensors.tmp"],
)
def test_only_what_a_kill_left_is_removed(name, converted, tmp_path):
    files = {"config.json.tmp", "model.safetensors.tmp", name}
    for file in files:
        (tmp_path / file).write_text(file)
    refused(converted, tmp_path, to="hf", match="exists; name another directory or remove it")
    assert {x.name: x.read_text() for x in tmp_path.iterdir()} == {n: n for n in files}


def test_links_and_directories_are_not_what_a_kill_left(converted, tmp_path):
    (tmp_path / "out" / "config.json.tmp").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    for name in ("out", "link", "empty"):
        refused(converted, tmp_path / name, to="hf", match="exists")
    (tmp_path / "out" / "config.json.tmp").rmdir()
    (tmp_path / "out" / "config.json.tmp").symlink_to("/etc/hostname")
    refused(converted, tmp_path / "out", to="hf", match="exists")


def test_what_another_process_is_writing_is_left_alone(converted, tmp_path):
    with ShardWriter(tmp_path / "hf", {"w": ("F32", (1,))}) as writer:
        refused(converted, tmp_path / "hf", to="hf", match="exists")
        writer.put("w", np.ones(1, np.float32))
    assert os.listdir(tmp_path / "hf") == ["model.safetensors"]


def test_a_foreign_directory_is_left_alone(tmp_path):
    thesis = tmp_path / "ours.partial" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.touch()
    refused(GOLDENS / "k2_tiny", tmp_path / "ours", match="'thesis.tex'")
    assert thesis.exists()


def test_repeats_that_no_memory_holds_are_refused(ours):
    config = json.loads((ours / "config.json").read_text())
    config["groups"][1]["repeat"] = 10**9
    (ours / "config.json").write_text(json.dumps(config))
    match = r"config.json: a model of 1000000001 layers is above 100000"
    with pytest.raises(UserError, match=match) as error:
        load(ours)
    assert "\n" not in str(error.value)
    refused(ours, ours.with_name("hf"), to="hf", match=match)


def test_notes_that_a_kill_left_do_not_keep_it_from_loading(ours, converted):
    for name in (to_store.CLAIM, to_store.DONE, to_store.LOCK):
        (ours / name).write_text("x")
    assert load(ours).cfg == load(converted).cfg


def test_two_conversions_at_once(tmp_path):
    def second(*_):
        refused(GOLDENS / "k2_tiny", tmp_path / "ours", match="another conversion is writing")

    convert(GOLDENS / "k2_tiny", tmp_path / "ours", "orbax", None, False, second)
    load(tmp_path / "ours")

    def second_hf(*_):
        refused(GOLDENS / "k2_tiny", tmp_path / "hf", "hf", match="exists")

    convert(GOLDENS / "k2_tiny", tmp_path / "hf", "hf", None, False, second_hf)


@pytest.mark.parametrize("to", ["orbax", "hf"])
@pytest.mark.parametrize("name", [PLAIN, "model.embed_tokens.weight", "model.norm.weight"])
def test_conversions_refuse_what_is_not_finite(plain, tmp_path, to, name):
    def change(arrays):
        arrays[name][-1:] = np.nan
        return arrays

    changed(plain, change)
    refused(plain, tmp_path / "out", to, match=f"model.safetensors: {name} is not finite")
    assert os.listdir(tmp_path) == ["hub"]


def test_numbers_too_large_for_the_dtype_are_refused(plain, tmp_path):
    changed(plain, lambda x: x | {PLAIN: np.full_like(x[PLAIN], 3.4e38)})
    for to in ("orbax", "hf"):
        with pytest.raises(UserError, match=f"{PLAIN} as bfloat16 is not finite"):
            convert(plain, tmp_path / "out", to, "bfloat16", False, quiet)
    assert os.listdir(tmp_path) == ["hub"]


def test_a_store_that_is_not_finite_is_refused(tmp_path, monkeypatch):
    for module in ("source", "to_store"):
        monkeypatch.setattr(f"kimijax.convert.{module}.check_finite", lambda *_: None)
    arrays = tensors(GOLDENS / "k2_tiny")
    arrays[PLAIN][0, 0] = np.nan
    hub = json.loads((GOLDENS / "k2_tiny" / "config.json").read_text())
    convert(write(tmp_path / "hub", arrays, hub), tmp_path / "ours", "orbax", None, False, quiet)
    with pytest.raises(UserError, match="params: .*mixer.out.w is not finite"):
        load(tmp_path / "ours")
    refused(tmp_path / "ours", tmp_path / "back", "hf", match="mixer.out.w is not finite")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("key, value", [
    ("width", 32), ("experts", 6), ("heads", 2), ("rope_dim", 3), ("vocab", 10**18), ("vocab", 0),
    ("kv_rank", 8),
])
@pytest.mark.parametrize("described", [True, False])
def test_a_store_of_another_config_is_refused(ours, tmp_path, key, value, described):
    text = re.sub(rf'"{key}": \d+', f'"{key}": {value}', (ours / "config.json").read_text())
    (ours / "config.json").write_text(text)
    if not described:
        (ours / "hub_config.json").unlink()
    with pytest.raises(UserError, match=f"^{ours}") as caught:
        load(ours)
    assert "\n" not in str(caught.value)
    refused(ours, tmp_path / "back", "hf", match=f"^{ours}")
    assert os.listdir(tmp_path) == ["ours"]


def test_arrays_of_another_store_are_refused(ours, tmp_path):
    convert(GOLDENS / "moonlight_tiny", tmp_path / "other", "orbax", None, False, quiet)
    shutil.rmtree(ours / "params")
    shutil.copytree(tmp_path / "other" / "params", ours / "params")
    refused(ours, tmp_path / "back", "hf", match="params: ")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("value", ["F32", None, 3, ["I64"]])
def test_the_dtype_of_shapes_is_one_of_two(ours, tmp_path, value):
    (ours / "notes.json").write_text(json.dumps({"weight_shape": value}))
    refused(ours, tmp_path / "back", "hf", match="weight_shape must be I32 or I64, got")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("keep", [False, True])
def test_shapes_beside_packed_weights_are_those_of_the_config(tmp_path, keep):
    def change(arrays):
        name = next(n for n in arrays if n.endswith("_shape"))
        arrays[name] = arrays[name][::-1] + 1
        return arrays

    source = changed(quantised(tmp_path / "hub", "int4"), change)
    refused(source, tmp_path / "out", keep=keep, match=r"_shape' says \(\d+, \d+\), its config")


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError("x")])
def test_an_export_that_fails_leaves_nothing(tmp_path, error):
    def stop(*_):
        assert (tmp_path / "new" / "hf" / "config.json.tmp").exists()
        raise error

    for _ in range(2):
        with pytest.raises(type(error) if isinstance(error, UserError) else error):
            convert(GOLDENS / "k2_tiny", tmp_path / "new" / "hf", "hf", None, False, stop)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["file/x", "link", "x/..", "n" * 250, "/proc/x"])
@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_destination_that_cannot_be_is_one_line(tmp_path, name, to):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    if to == "hf" and len(name) == 250:
        name *= 2
    refused(GOLDENS / "k2_tiny", tmp_path / name, to)
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_a_full_disk_is_one_line_and_can_go_on(tmp_path, monkeypatch):
    partial = cut(GOLDENS / "k2_tiny", tmp_path / "ours", monkeypatch)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(to_store, "_claim", full)
        refused(GOLDENS / "k2_tiny", tmp_path / "ours", match="No space left on device; check")
    assert (partial / to_store.DONE).read_text()
    convert(GOLDENS / "k2_tiny", tmp_path / "ours", "orbax", None, False, quiet)
    assert os.listdir(tmp_path) == ["ours"]


def test_links_out_of_a_store_are_refused(ours, tmp_path):
    (ours / "params").rename(tmp_path / "elsewhere")
    (ours / "params").symlink_to(tmp_path / "elsewhere")
    for call in (lambda: load(ours), lambda: convert(ours, tmp_path / "b", "hf", None, 0, quiet)):
        with pytest.raises(UserError, match="symbolic link"):
            call()


def test_configs_that_readers_take_differently_are_refused(tmp_path):
    path = tmp_path / "config.json"
    for text, match in [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is twice"), ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"), ('{"a": 1e999}', "1e999"), ("[]", "must be a JSON"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=match):
            read_json(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="not a regular file"):
        read_json(path)
    path.unlink()
    (tmp_path / "in").mkdir()
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "in" / "config.json").symlink_to(tmp_path / "other.json")
    with pytest.raises(UserError, match="symbolic link"):
        read_json(tmp_path / "in" / "config.json")
