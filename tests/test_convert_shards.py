"""Loading straight onto devices: the same numbers, each read once and held once."""

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kimijax import presets
from kimijax.checkpoint import save_model
from kimijax.config_tree import override
from kimijax.convert import shards
from kimijax.convert.load import load
from kimijax.convert.run import convert
from kimijax.convert.shards import Shards
from kimijax.convert.source import Source, open_source
from kimijax.convert.store import Reader
from kimijax.errors import UserError
from kimijax.model import Model, abstract_params
from kimijax.ops.attend import local
from tests.test_convert import GOLDENS, quantised, quiet, write

ROOT = Path(__file__).parents[1]
# A dim's name -> the axis of the mesh that divides it, where it can be divided.
LAYOUTS = {
    "experts": {"expert": "y"},
    "inner dims over two axes": {"embed": "y", "ffn": "x", "heads": "x", "vocab": "x"},
    "one dim over both axes": {"embed": ("x", "y")},
    "layers and experts": {"layers": "x", "expert": "y"},
    "replicated": {},
}


def mesh() -> Mesh:
    """Two by four devices."""
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))


def by_name(rules):
    """Shardings from the names of dims, as a plan makes them."""

    def shardings(cfg):
        boxes = abstract_params(Model(cfg, local()))["params"]
        shapes, specs = nn.unbox(boxes), nn.get_partition_spec(boxes)
        specs = flatten_dict(specs, sep=".")
        return {n: sharding(x.shape, specs[n]) for n, x in flatten_dict(shapes, sep=".").items()}

    def sharding(shape, names):
        axes = [rules.get(n) for n in names]
        sizes = [np.prod([mesh().shape[a] for a in np.atleast_1d(x or [])]) for x in axes]
        fit = [a if n % s == 0 else None for n, a, s in zip(shape, axes, sizes, strict=True)]
        return NamedSharding(mesh(), PartitionSpec(*fit))

    return shardings


def same_and_sharded(got, want, shardings):
    """Equal numbers and dtypes, laid out as asked for; shards may be of more than one leaf."""
    wanted = shardings(want.cfg)
    want = flatten_dict(want.params["params"], sep=".")
    found = flatten_dict(got.params["params"], sep=".")
    assert found.keys() == want.keys()
    for name, x in found.items():
        assert x.dtype == want[name].dtype and x.sharding == wanted[name], name
        shape = wanted[name].shard_shape(x.shape)
        assert {s.data.shape for s in x.addressable_shards} == {shape}
        assert len({s.device for s in x.addressable_shards}) == 8
        np.testing.assert_array_equal(np.asarray(x), np.asarray(want[name]))


@pytest.fixture
def on_devices(monkeypatch):
    """All but the smallest shards are written to where they lie."""
    monkeypatch.setattr(shards, "SMALL", 2**14)


@pytest.fixture
def counted(monkeypatch):
    """How often every tensor of the hub is read."""
    counts, read = Counter(), Source.read

    def counting(source, rule):
        counts[rule.name] += 1
        return read(source, rule)

    monkeypatch.setattr(Source, "read", counting)
    return counts


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Stores of the goldens."""
    root = tmp_path_factory.mktemp("stores")
    for name in ("k2_tiny", "kimi_linear_tiny"):
        convert(GOLDENS / name, root / name, "orbax", None, False, quiet)
    return root


@pytest.mark.usefixtures("on_devices")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["k2_tiny", "kimi_linear_tiny"])
def test_sharded_is_unsharded_and_read_once(name, layout, counted):
    want = load(GOLDENS / name)
    once = Counter(dict(counted))
    counted.clear()
    shardings = by_name(LAYOUTS[layout])
    same_and_sharded(load(GOLDENS / name, shardings=shardings), want, shardings)
    with open_source(GOLDENS / name) as source:
        assert counted == once == Counter(rule.name for rule in source.rules())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["k2_tiny", "kimi_linear_tiny"])
@pytest.mark.parametrize("piece", [2**12, 2**28])
def test_a_store_is_read_shard_by_shard(name, layout, piece, converted, monkeypatch):
    monkeypatch.setattr(shards, "PIECE", piece)
    want, sizes, read = load(converted / name), [], Reader.read
    monkeypatch.setattr(
        Reader, "read", lambda *args: sizes.append(read(*args).size) or read(*args)
    )
    shardings = by_name(LAYOUTS[layout])
    same_and_sharded(load(converted / name, shardings=shardings), want, shardings)
    assert sum(sizes) == sum(x.size for x in jax.tree.leaves(want.params))


@pytest.mark.usefixtures("on_devices")
@pytest.mark.parametrize("layout", ["layers and experts", "inner dims over two axes"])
@pytest.mark.parametrize("form", ["int4", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kept_experts_are_sharded_too(form, layout, dtype, tmp_path):
    source, shardings = quantised(tmp_path / "hub", form), by_name(LAYOUTS[layout])
    want = load(source, dtype, keep=True)
    same_and_sharded(load(source, dtype, True, shardings), want, shardings)
    convert(source, tmp_path / "ours", "orbax", None, True, quiet)
    want = load(tmp_path / "ours", dtype, keep=True)  # what is not kept is bfloat16 in it
    same_and_sharded(load(tmp_path / "ours", dtype, True, shardings), want, shardings)


def test_a_model_of_ours_is_sharded_too(tmp_path):
    cfg = override(presets.needle_2m(), {"groups.1.repeat": 1})
    shapes = nn.unbox(abstract_params(Model(cfg, local())))["params"]
    save_model(tmp_path, cfg, jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes))
    shardings = by_name({"embed": "x", "ffn": "y"})
    same_and_sharded(load(tmp_path, shardings=shardings), load(tmp_path), shardings)


def test_a_dim_that_does_not_divide_is_one_line(counted):
    def shardings(cfg):
        spec = PartitionSpec(None, ("x", "y"))
        names = by_name({})(cfg)
        return names | {"group_1.layer_0.ffn.down": NamedSharding(mesh(), spec)}

    with pytest.raises(UserError, match=r"ffn.down \(2, 12, 32, 64\) cannot be laid") as error:
        load(GOLDENS / "k2_tiny", shardings=shardings)
    assert "\n" not in str(error.value) and not counted


def test_a_leaf_that_is_not_of_this_process_is_not_needed():
    """Its part of a mesh of several hosts: two of four devices along the first dim."""

    class Other:
        def shard_shape(self, shape):
            return shape[0] // 4, *shape[1:]

        def addressable_devices_indices_map(self, shape):
            pairs = zip((1, 2), "ab", strict=True)
            return {d: (slice(2 * i, 2 * i + 2), slice(None)) for i, d in pairs}

    leaf = Shards("w", (8, 3), np.float32, Other())
    assert [leaf.holds((i,)) for i in range(8)] == [False, False, *[True] * 4, False, False]
    assert leaf.holds(())


SLICE = """
import sys
import jax
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from kimijax.convert.load import load
from kimijax.convert.source import Source
from kimijax.model import parameter_shapes
mesh = Mesh(np.array(jax.devices()), ("x",))
def shardings(cfg):
    spec = {n: PartitionSpec(*(None, "x") if n.endswith(("ffn.up", "ffn.gate", "ffn.down")) else ())
            for n in parameter_shapes(cfg)}
    return {n: NamedSharding(mesh, s) for n, s in spec.items()}
names, read = [], Source.read
Source.read = lambda source, rule: names.append(rule.name) or read(source, rule)
model = load(sys.argv[1], shardings=shardings)
up = model.params["params"]["group_1"]["layer_0"]["ffn"]["up"]
assert not up.is_fully_addressable and up.shape == (2, 12, 64, 32)
assert {s.data.shape for s in up.addressable_shards} == {(2, 3, 64, 32)}
print(*sorted(n for n in names if ".experts." in n))
"""


def test_each_of_several_hosts_reads_what_its_devices_hold():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", SLICE, str(GOLDENS / "k2_tiny"), address, str(i)], cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"XLA_FLAGS": flags},
        )
        for i in range(2)
    ]
    done = [host.communicate(timeout=120) for host in hosts]
    assert not any(host.returncode for host in hosts), done
    read = [set(out.split()) for out, _ in done]
    with open_source(GOLDENS / "k2_tiny") as source:
        experts = {rule.name for rule in source.rules() if ".experts." in rule.name}
    assert read[0] | read[1] == experts and not read[0] & read[1]
    assert len(read[0]) == len(read[1]) == len(experts) // 2


PEAK = """
import re, sys
import jax, numpy as np, tensorstore
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from kimijax.convert import shards
from kimijax.convert.load import load
shards.PIECE = 2**23  # small beside the weights of the test, as it is beside a model's
from kimijax.model import parameter_shapes
mesh = Mesh(np.array(jax.devices()), ("x",))
def shardings(cfg):
    return {n: NamedSharding(mesh, PartitionSpec(*(None, "x") if x.shape[1:2] == (96,) else ()))
            for n, x in parameter_shapes(cfg).items()}
# Not getrusage: its peak is at least that of the process that started this one.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
jax.block_until_ready(jax.numpy.zeros(3))
before = peak()
model = load(sys.argv[1], "bfloat16", shardings=shardings if sys.argv[2] == "sharded" else None)
print((peak() - before) / sum(x.nbytes for x in jax.tree.leaves(model.params)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_no_leaf_is_held_twice(tmp_path):
    """Peak memory over that of the weights: the host's copy of one tensor, and the programs."""
    config = json.loads((GOLDENS / "k2_tiny" / "config_hub.json").read_text())
    config |= {"hidden_size": 512, "moe_intermediate_size": 512, "n_routed_experts": 96}
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "config.json").write_text(json.dumps(config))
    from kimijax.convert.load import read_config
    from kimijax.convert.names import rules

    arrays = {r.name: np.zeros(r.shape, jnp.bfloat16)
              for r in rules(read_config(tmp_path / "plan"))}
    source = write(tmp_path / "hub", arrays, config)
    assert sum(x.nbytes for x in arrays.values()) > 280e6
    convert(source, tmp_path / "ours", "orbax", None, False, quiet)
    # Programs as users compile them: the tests' flags make in-place updates slow.
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    for directory in (source, tmp_path / "ours"):
        for layout in ("whole", "sharded"):
            done = subprocess.run(
                [sys.executable, "-c", PEAK, str(directory), layout], cwd=ROOT, check=False,
                capture_output=True, text=True, env=os.environ | flags,
            )
            assert done.returncode == 0, done.stderr
            print(directory.name, layout, done.stdout)
            # A chunk of ours is decoded whole beside the shards that are cut from it.
            assert 1.0 < float(done.stdout) < (1.6 if directory.name == "ours" else 1.4)


@pytest.mark.parametrize("layout, said", [
    ({}, "there is no sharding for embed"),
    ({"embed": PartitionSpec(None, None, None, "y")}, "embed .* cannot be laid out"),
])
def test_layouts_that_do_not_fit_are_refused(layout, said):
    def shardings(cfg):
        if not layout:
            return {}
        names = flatten_dict(abstract_params(Model(cfg, local()))["params"], sep=".")
        return {n: NamedSharding(mesh(), layout.get(n, PartitionSpec())) for n in names}

    with pytest.raises(UserError, match=said):
        load(GOLDENS / "k2_tiny", shardings=shardings)
