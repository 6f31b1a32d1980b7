"""Orders, meshes and rules: what they promise, and what they refuse."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from kimijax import presets
from kimijax.config_tree import override
from kimijax.errors import UserError
from kimijax.model import Model, abstract_params
from kimijax.ops.attend import local
from kimijax.parallel import rules
from kimijax.parallel.attend import check
from kimijax.parallel.axes import Axes
from kimijax.parallel.mesh import AXES, make_mesh, parse_mesh
from kimijax.parallel.order import device_work, make_order
from kimijax.parallel.plan import Plan
from tests.conftest import CONFIGS


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("tokens, devices, run", [(1024, 8, 16), (1000, 8, 64), (7, 4, 1)])
def test_an_order_is_a_permutation_of_whole_runs(kind, tokens, devices, run):
    order = make_order(kind, tokens, devices, run)
    assert order.length >= tokens and order.length % (order.runs * run) == 0
    assert order.runs % devices == 0
    np.testing.assert_array_equal(np.sort(order.places), np.arange(order.length))
    pieces = order.places.reshape(order.runs, -1)
    assert (np.diff(pieces, axis=1) == 1).all()


def test_a_run_is_as_long_as_layers_look_back():
    assert make_order("striped", 100, 4, 8, least=20).length // make_order(
        "striped", 100, 4, 8, least=20).runs >= 20


def test_zigzag_gives_every_device_the_same_work():
    work = {k: device_work(make_order(k, 8192, 8, 1), 8) for k in ("contiguous", "zigzag")}
    assert work["zigzag"].max() == work["zigzag"].min()
    assert work["contiguous"].max() / work["contiguous"].mean() > 1.8
    striped = device_work(make_order("striped", 8192, 8, 64), 8)
    assert striped.max() / striped.mean() < 1.06


def test_arranged_rows_come_back():
    cfg, rng = CONFIGS["needle"](), np.random.default_rng(0)
    ids = rng.integers(0, 64, (2, 900)).astype(np.int32)
    call, back = Plan(make_mesh({"seq": 4}), order="zigzag").arrange(cfg, ids)
    assert call["ids"].shape == call["seg"].shape and call["ids"].shape[1] % 4 == 0
    np.testing.assert_array_equal(back.restore(call["ids"]), ids)
    assert (call["seg"] >= 0).sum() == ids.size


@pytest.mark.parametrize("text, said", [
    ("seq=8,model=2", "axes of data, seq, expert, tensor"),
    ("seq", "write it as"),
    ("seq=0", "write it as"),
    ("seq=2,seq=4", "seq is there twice"),
])
def test_a_mesh_that_is_none(text, said):
    with pytest.raises(UserError, match=said):
        parse_mesh(text)


def test_a_mesh_by_name():
    assert parse_mesh("data=1, seq=8,expert=2") == {"data": 1, "seq": 8, "expert": 2, "tensor": 1}


def test_more_devices_than_there_are():
    with pytest.raises(UserError, match=f"seq=64 needs 64 devices, there are {len(jax.devices())}"):
        make_mesh({"seq": 64})


def test_two_dims_on_one_axis_are_refused():
    mesh = make_mesh({"seq": 4})
    with pytest.raises(UserError, match="'embed' and 'ffn' would both lie on the mesh axis 'seq'"):
        rules.spec(("embed", "ffn"), mesh, rules.TRAIN | {"ffn": ("seq",)}, "gate")
    with pytest.raises(UserError, match="no rule says where its dim 'colour' lies"):
        rules.spec(("colour",), mesh, rules.TRAIN, "gate")


def test_an_axis_that_does_not_divide_is_refused():
    boxed = abstract_params(Model(CONFIGS["kimi"](), local()))
    with pytest.raises(UserError, match=r"'heads' of 4 is no multiple of tensor = 8"):
        rules.shardings(boxed, make_mesh({"tensor": 8}), rules.SERVE)
    axes = Axes(make_mesh({"seq": 8}))
    with pytest.raises(UserError, match="100 tokens are no multiple of seq x expert = 8"):
        check(axes, "ring", 8, 100)
    with pytest.raises(UserError, match="4 heads are no multiple of 8 for ulysses"):
        check(axes, "ulysses", 4, 128)
    with pytest.raises(UserError, match="3 rows are no multiple of the mesh axis data = 2"):
        Plan(make_mesh({"data": 2})).arrange(CONFIGS["kimi"](), np.zeros((3, 64), np.int32))
    with pytest.raises(UserError, match="order 'spiral'"):
        Plan(make_mesh({"seq": 2}), order="spiral")


@pytest.mark.parametrize("preset", ["kimi_k2", "kimi_linear_48b", "needle_2m"])
@pytest.mark.parametrize("train", [False, True])
def test_every_weight_of_a_preset_has_a_place(preset, train):
    """By shapes alone, on a described mesh: K2 is never allocated."""
    cfg = getattr(presets, preset)()
    device = jax.devices()[0]
    mesh = jax.sharding.Mesh(np.array([device] * 1).reshape(1, 1, 1, 1), AXES)
    boxed = abstract_params(Model(cfg, local()))
    names = {n for x in jax.tree.leaves(boxed, is_leaf=lambda x: hasattr(x, "names"))
             for n in x.names}
    table = rules.TRAIN if train else rules.SERVE
    assert names <= table.keys()
    assert jax.tree.structure(rules.shardings(boxed, mesh, table)) is not None


def test_pieces_of_a_dealt_weight_are_whole_tiles_of_a_tpu():
    """Of K2's largest weights and of its queries; a rank that has too few for the axes is whole."""
    mesh = jax.sharding.AbstractMesh((1, 128, 4, 1), AXES)
    cfg = presets.kimi_k2()

    def last_dims(cfg):
        boxed = abstract_params(Model(cfg, local()))
        layer = rules.shardings(boxed, mesh, rules.TRAIN)["params"]["group_1"]["layer_0"]
        shape = nn.unbox(boxed)["params"]["group_1"]["layer_0"]
        at = lambda part, name: layer[part][name].shard_shape(shape[part][name].shape)  # noqa: E731
        return at("ffn", "gate"), at("ffn", "down"), layer["mixer"]["q"]["w"].spec

    gate, down, q = last_dims(cfg)
    assert (gate, down) == ((60, 96, 56, 2048), (60, 96, 16, 7168))
    assert q[1] == "seq"
    assert not any(last_dims(override(cfg, {"groups.1.layers.0.mixer.q_rank": 1500}))[2])
