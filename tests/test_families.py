"""The Kimi family: ours = the reference implementation, config = config, count = count."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from kimijax import presets
from kimijax.cache import Tokens, empty_cache
from kimijax.config import KDAConfig, MLAConfig, MoEConfig, RopeConfig, YarnConfig
from kimijax.convert.config import from_hub
from kimijax.convert.export_config import to_hub
from kimijax.convert.load import load
from kimijax.convert.names import rules
from kimijax.errors import UserError
from kimijax.generate import decoder, generate
from kimijax.layers.ffn import MoE
from kimijax.layers.layer import Layer
from kimijax.metrics import describe
from kimijax.model import Model
from kimijax.ops.attend import local
from kimijax.ops.norm import unit
from kimijax.ops.rope import frequencies
from tests.conftest import array, assert_close

GOLDENS = Path(__file__).parent / "goldens"
MODELS = (
    "k2_tiny", "moonlight_tiny", "dsv3_grouped_tiny", "kimi_k25_text_tiny", "kimi_linear_tiny"
)
ABSOLUTE = 2e-4  # on logits of standard deviation 1.6: ten times the noise between two backends


@functools.cache
def loaded(name: str):
    """The golden checkpoint and its answers."""
    with np.load(GOLDENS / name / "io.npz") as answers:
        return load(GOLDENS / name), dict(answers)


@pytest.mark.parametrize("name", MODELS)
def test_logits_layers_and_experts_are_the_reference(name):
    model, want = loaded(name)

    @jax.jit
    def run(params, ids):
        net = Model(model.cfg, local())
        out, seen = net.apply(
            params, ids, mutable=["intermediates"],
            capture_intermediates=lambda module, _: isinstance(module, Layer),
        )
        return net.apply(params, out.hidden, method="head"), out.aux, seen["intermediates"]

    logits, aux, seen = run(model.params, want["input_ids"])
    assert np.abs(logits - want["logits"]).max() < ABSOLUTE
    for n in range(len(model.cfg.layers)):
        group, repeat, at = model.cfg.place(n)
        got = seen[f"group_{group}"][f"layer_{at}"]["__call__"][0][0][repeat]
        assert np.abs(got - want[f"layer_out_{n}"]).max() < ABSOLUTE
        if f"router_idx_{n}" in want:
            experts = aux[group][f"layer_{at}"]["ffn"]["experts"][repeat]
            experts = np.sort(experts.reshape(-1, experts.shape[-1]), -1)
            np.testing.assert_array_equal(experts, want[f"router_idx_{n}"])


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_the_reference(name):
    model, want = loaded(name)
    programs = decoder(model.cfg, local(), np.dtype(np.float32))
    tokens = list(generate(programs, model.params, list(want["gen_prompt"]), 16))
    np.testing.assert_array_equal(np.stack(tokens, 1), want["gen_tokens"])


@pytest.mark.parametrize(
    "name", ["k2_tiny", pytest.param("kimi_linear_tiny", marks=pytest.mark.slow)]
)
def test_a_ragged_batch_is_every_prompt_alone(name):
    model, want = loaded(name)
    programs = decoder(model.cfg, local(), np.dtype(np.float32))
    prompts = [want["gen_prompt"][0][:n] for n in (1, 33, 48)]
    batch = np.stack(list(generate(programs, model.params, prompts, 6)), 1)
    for prompt, got in zip(prompts, batch, strict=True):
        alone = np.concatenate(list(generate(programs, model.params, [prompt], 6)))
        np.testing.assert_array_equal(got, alone)


@pytest.mark.parametrize("name", MODELS)
def test_a_config_in_any_spelling_and_back(name):
    cfg = from_hub(json.loads((GOLDENS / name / "config.json").read_text()))
    assert from_hub(to_hub(cfg)) == cfg
    hub = GOLDENS / name / "config_hub.json"
    assert not hub.exists() or from_hub(json.loads(hub.read_text())) == cfg


@pytest.mark.parametrize("name", [n for n in presets.PRESETS if n != "needle_2m"])
def test_every_preset_has_a_hub_form(name):
    cfg = presets.PRESETS[name]()
    assert from_hub(to_hub(cfg)) == cfg


@pytest.mark.parametrize(
    "name, tensors, parameters, active, cache, state",
    [
        ("moonlight_16b", 5_317, 15_960_110_208, None, 31_104, 0),
        ("kimi_k2", 69_975, 1_026_408_232_448, 32.86e9, 70_272, 0),
        ("kimi_linear_48b", 20_493, 49_122_681_728, 3.48e9, 8_064, 43_417_600),
    ],
)
def test_released_sizes(name, tensors, parameters, active, cache, state):
    cfg = presets.PRESETS[name]()
    facts = describe(cfg)
    listed = list(rules(cfg))
    assert len({r.name for r in listed}) == len(listed) == tensors
    assert facts["parameters"] == sum(int(np.prod(r.shape)) for r in listed) == parameters
    assert active is None or abs(facts["active_parameters"] / active - 1) < 2e-3
    assert (facts["cache_bytes_per_token"], facts["state_bytes_per_sequence"]) == (cache, state)


def test_yarn_of_k2_by_hand():
    """Its betas of 1 make a step: channels 0..19 keep their speed, the others are 32x slower."""
    rope = presets.kimi_k2().layers[0].mixer.rope
    base = frequencies(RopeConfig(theta=50_000.0, dim=64))
    np.testing.assert_allclose(frequencies(rope)[:20], base[:20], rtol=1e-12)
    np.testing.assert_allclose(frequencies(rope)[20:], base[20:] / 32, rtol=1e-12)
    assert rope.yarn.amplitude == 1.0
    assert abs(presets.kimi_k2().layers[0].mixer.scale - 192**-0.5 * 1.81326) < 1e-6
    assert abs(presets.kimi_k2_0905().layers[0].mixer.scale - 192**-0.5 * 2.00474) < 1e-6


def test_yarn_amplitude_without_mscales_and_given():
    assert abs(YarnConfig(factor=4.0, original=32).amplitude - 1.1386294) < 1e-6
    assert YarnConfig(factor=4.0, original=32, attention_factor=0.7).amplitude == 0.7


def test_small_latents_are_normed_with_1e_6():
    """Where the latent is small the epsilon decides: 1e-6, whatever rms_norm_eps is."""
    model, want = loaded("moonlight_tiny")
    flat = flatten_dict(model.params["params"], sep=".") | {}
    name = "group_0.layer_0.mixer."
    flat[f"{name}kv.w"] = flat[f"{name}kv.w"] * 1e-3
    net, ids = Model(model.cfg, local()), want["input_ids"][:1]
    params = {"params": unflatten_dict(flat, sep=".")}
    cache = jax.jit(net.apply)(params, ids, cache=empty_cache(model.cfg, 1, ids.shape[1])).cache
    got = cache.states[0][0]["latent"][0, 0, : ids.shape[1]]
    h = np.asarray(flat["embed"], np.float64)[ids[0]]
    h = h / np.sqrt((h * h).mean(-1, keepdims=True) + 1e-5)
    latent = (h * flat["group_0.layer_0.norm.w"][0]) @ flat[f"{name}kv.w"][0]
    scale = np.sqrt((latent * latent).mean(-1, keepdims=True) + 1e-6)
    assert_close(got, latent / scale * flat[f"{name}kv_norm.w"][0])


def test_unit_length_has_its_epsilon_inside_the_root():
    x = np.full((1, 4), 1e-3, np.float32)
    assert_close(unit(jnp.asarray(x)), x / np.sqrt(4e-6 + 1e-6))


def test_masked_groups_are_never_chosen_though_scores_are_negative():
    """A masked score is -inf: with 0 in its place it would win over biased scores below 0."""
    cfg = MoEConfig(experts=8, top_k=3, width=4, shared_width=4, groups=4, top_groups=2)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 32, 6)).astype(np.float32)
    router, bias = rng.normal(size=(6, 8)), rng.normal(size=8) * 0.1 - 5
    zero = {n: np.zeros((8, *s)) for n, s in (("gate", (6, 4)), ("up", (6, 4)), ("down", (4, 6)))}
    shared = {n: {"w": np.zeros((4, 6) if n == "down" else (6, 4))} for n in zero}
    params = zero | {"router": router, "bias": bias, "shared": shared}
    params = jax.tree.map(lambda a: array(a), params)
    pos = jnp.arange(32)[None]
    none = jnp.zeros((1, 0), jnp.int32)
    count = jnp.zeros(1, jnp.int32)
    tokens = Tokens(pos, jnp.zeros_like(pos), none, none, count, count + 32)
    _, report = jax.jit(MoE(cfg, local()).apply)({"params": params}, x, tokens)
    biased = 1 / (1 + np.exp(-x[0].astype(np.float64) @ router)) + bias
    groups = biased.reshape(32, 4, 2).sum(-1)
    kept = np.argsort(-groups, 1)[:, :2]
    for got, row, groups in zip(np.asarray(report["experts"][0]), biased, kept, strict=True):
        allowed = [e for e in range(8) if e // 2 in groups]
        assert sorted(got.tolist()) == sorted(sorted(allowed, key=lambda e: -row[e])[:3])


def test_latent_norms_have_their_own_epsilon():
    """1e-6 whatever rms_norm_eps is; the output norm of KDA takes rms_norm_eps."""
    moonlight, linear = (loaded(n)[0].cfg for n in ("moonlight_tiny", "kimi_linear_tiny"))
    assert moonlight.norm_eps == linear.norm_eps == 1e-5
    for layer in (*moonlight.layers, *linear.layers):
        match layer.mixer:
            case MLAConfig(latent_eps=eps):
                assert eps == 1e-6
            case KDAConfig(norm_eps=eps):
                assert eps == 1e-5


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"scoring_func": "softmax"}, "scoring_func 'softmax'"),
        ({"num_key_value_heads": 2}, "num_key_value_heads 2 differs"),
        ({"model_type": "llama"}, "model_type 'llama' is not supported"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number from 1"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers must be"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be"),
        ({"rope_scaling": {"type": "longrope"}}, "rope type 'longrope'"),
        ({"n_group": 5}, "groups 5 must divide experts 12"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings True"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a number"),
        ({"vocab_size": 2**31}, "vocab_size must be a whole number from 1 to 16777216"),
        ({"n_routed_experts": 10**6}, "experts must be from 0 to 65536"),
        ({"n_group": None}, "n_group must be"),
        ({"routed_scaling_factor": None}, "routed_scaling_factor must be"),
        ({"rope_theta": None}, "rope_theta must be given"),
        ({"rope_theta": 1}, "theta must be from 1.001"),
        ({"rope_parameters": {}}, "contradict one another"),
        ({"rope_parameters": {"rope_theta": 10_000.0}}, "rope_theta must be given, and once"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "default"}}, "rope type 'default'"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "factor must be from 1"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 1e308}}, "must be a number"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": False}}, "truncate False"),
        ({"sliding_window": 512}, "sliding_window 512"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"mlp_layer_types": ["dense"] * 3}, "mlp_layer_types"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
    ],
)
def test_a_config_that_is_not_supported_is_refused_by_name(change, message):
    hub = json.loads((GOLDENS / "k2_tiny" / "config_hub.json").read_text())
    with pytest.raises(UserError, match=message):
        from_hub(hub | change)


@pytest.mark.parametrize(
    "full, kda", [([4], [1, 2]), ([4], [1, 2, 3, 4]), ([0, 4], [1, 2, 3]), ([1, 2, 3, 4], [])]
)
def test_layer_lists_must_hold_every_layer_once(full, kda):
    hub = json.loads((GOLDENS / "kimi_linear_tiny" / "config_hub.json").read_text())
    hub["linear_attn_config"] |= {"full_attn_layers": full, "kda_layers": kda}
    with pytest.raises(UserError, match="must hold every layer|both need a layer"):
        from_hub(hub)
