"""Configs: overrides, JSON and back, and the message for a name that does not exist."""

import pytest

from kimijax import presets
from kimijax.config import SwiGLUConfig
from kimijax.config_tree import from_dict, override, to_dict
from kimijax.errors import UserError
from tests.conftest import CONFIGS


@pytest.mark.parametrize("make", [*presets.PRESETS.values(), *CONFIGS.values()])
def test_json_and_back(make):
    assert from_dict(to_dict(make())) == make()


def test_override_replaces_nested_fields_and_nothing_else():
    cfg = presets.needle_2m()
    new = override(cfg, {"groups.1.layers.0.mixer.index.top_k": 16, "width": 64})
    assert new.groups[1].layers[0].mixer.index.top_k == 16 and new.width == 64
    back = {"groups.1.layers.0.mixer.index.top_k": 8, "width": 192}
    assert override(new, back) == cfg
    dense = override(cfg, {"groups.1.layers.0.ffn": SwiGLUConfig(width=8)})
    assert dense.groups[1].layers[0].ffn == SwiGLUConfig(width=8)


def test_changes_of_one_dataclass_are_checked_together():
    """Half of them alone would be refused: a rope wider than its head."""
    at = "groups.0.layers.0.mixer."
    override(presets.needle_2m(), {at + "head_dim": 8, at + "rope.dim": 8})


@pytest.mark.parametrize(
    "path, message",
    [
        ("widht", "no field 'widht', did you mean 'width'"),
        ("groups.0.layers.0.mixer.hedas", "WindowConfig has no field 'hedas'.*'heads'"),
        ("groups.7.repeat", "'7' is no index below 2"),
        ("vocab.size", "int has no field 'size'"),
    ],
)
def test_a_wrong_name_raises_with_the_nearest_right_one(path, message):
    with pytest.raises(UserError, match=message):
        override(presets.needle_2m(), {path: 1})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"width": 0}, "width must be a number above 0, got 0"),
        ({"groups.0.layers.0.mixer.rope.dim": 7}, "must be even"),
        ({"groups.0.layers.0.mixer.heads": 3, "groups.0.layers.0.mixer.kv_heads": 2}, "multiple"),
        ({"groups.1.layers.0.mixer.window": 48}, "must be a multiple of the index block 32"),
        ({"groups.1.layers.0.ffn.normalize": True}, "router cannot learn"),
        ({"groups.1.layers.0.conv": -3}, "0 or 2 to 64 taps"),
        ({"groups.0.repeat": 100_000}, "a model of 1000.. layers is above 100000; lower its"),
    ],
)
def test_values_that_cannot_be_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        override(presets.needle_2m(), change)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda d: d.update(heads=3), "config: ModelConfig has no field 'heads'"),
        (lambda d: d.pop("vocab"), "config lacks vocab"),
        (lambda d: d.update(vocab="many"), "config.vocab must be"),
        (lambda d: d.update(groups={}), "config.groups must be a list"),
        (lambda d: d["groups"][0]["layers"][0]["mixer"].update(type=[]), "mixer.type must be one"),
    ],
)
def test_foreign_json_is_refused_by_name(spoil, message):
    data = to_dict(presets.needle_2m())
    spoil(data)
    with pytest.raises(UserError, match=message):
        from_dict(data)
