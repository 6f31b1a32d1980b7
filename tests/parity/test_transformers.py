"""transformers loads what we export and gives our logits. Run by `make parity`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import unflatten_dict

from kimijax import presets
from kimijax.config_tree import override
from kimijax.convert.load import load
from kimijax.convert.run import convert, export
from kimijax.model import Model, parameter_shapes
from kimijax.ops.attend import local

ABSOLUTE = 2e-4


def grouped():
    """Experts in groups, the best groups chosen first."""
    return override(presets.kimi_k2_tiny(), {
        "groups.1.layers.0.ffn.groups": 4, "groups.1.layers.0.ffn.top_groups": 2,
    })


def plain():
    """Another shape: no dim is that of a preset."""
    mla = {"heads": 3, "kv_rank": 24, "nope_dim": 12, "rope_dim": 6, "v_dim": 10, "rope.dim": 6}
    changes = {f"groups.{i}.layers.0.mixer.{k}": v for i in (0, 1) for k, v in mla.items()}
    return override(presets.moonlight_tiny(), changes | {"width": 40, "vocab": 300})


CONFIGS = {
    "moonlight": presets.moonlight_tiny, "k2": presets.kimi_k2_tiny,
    "thinking": presets.kimi_k2_thinking_tiny, "linear": presets.kimi_linear_tiny,
    "grouped": grouped, "another shape": plain,
}


@functools.cache
def random_params(name: str):
    """Weights that make every part matter."""
    rng = np.random.default_rng(0)

    def draw(leaf, x):
        last = leaf.rsplit(".", 1)[-1]
        if last in ("bias", "A_log", "dt_bias"):
            return rng.normal(size=x.shape).astype(np.float32) * 0.3
        norm = "norm" in leaf
        scale = 0.1 if norm else (x.shape[-2] if len(x.shape) > 1 else 1) ** -0.5
        return (rng.normal(size=x.shape) * scale + norm).astype(np.float32)

    shapes = parameter_shapes(CONFIGS[name]())
    return {"params": unflatten_dict({n: draw(n, x) for n, x in shapes.items()}, sep=".")}


def reference(directory, ids, dtype):
    """Logits of transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager"
    )
    with torch.no_grad():
        return model(torch.tensor(np.asarray(ids, np.int64))).logits.float().numpy()


def ours(cfg, params, ids):
    """Our logits."""
    net = Model(cfg, local())
    return jax.jit(functools.partial(net.apply, method="logits"))(params, ids)


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_gives_our_logits(name, tmp_path):
    cfg, params = CONFIGS[name](), random_params(name)
    export(cfg, params, tmp_path / "hf")
    ids = np.random.default_rng(1).integers(3, cfg.vocab, (2, 90))
    got = ours(cfg, params, jnp.asarray(ids, jnp.int32))
    want = reference(tmp_path / "hf", ids, torch.float32)
    assert want.std() > 0.1
    assert np.abs(got - want).max() < ABSOLUTE


def test_a_conversion_there_and_back_still_loads(tmp_path):
    cfg = CONFIGS["linear"]()
    export(cfg, random_params("linear"), tmp_path / "hf", "bfloat16")
    convert(tmp_path / "hf", tmp_path / "ours", "orbax", None, False, lambda *_: None)
    convert(tmp_path / "ours", tmp_path / "back", "hf", "float32", False, lambda *_: None)
    model = load(tmp_path / "ours")
    ids = np.random.default_rng(1).integers(3, cfg.vocab, (1, 70))
    got = ours(model.cfg, model.params, jnp.asarray(ids, jnp.int32))
    assert np.abs(got - reference(tmp_path / "back", ids, torch.float32)).max() < ABSOLUTE
