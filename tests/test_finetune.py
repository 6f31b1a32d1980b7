"""Fine-tuning: a checkpoint goes in, one of the same format comes out and has learned."""

import base64
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import finetune
from kimijax.config_tree import override
from kimijax.convert.load import load, read_config
from kimijax.convert.run import export
from kimijax.errors import UserError
from kimijax.model import Model, abstract_params
from kimijax.ops.attend import local
from kimijax.train.lora import adapted, fresh_adapters, merged
from tests.conftest import array, assert_close, model_and_params

MARKS = ("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>")
VOCAB = 512  # of the tokenizer, which reserves names


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A model directory with a tokenizer of bytes and marks."""
    directory = tmp_path_factory.mktemp("model")
    golden = load(Path(__file__).parent / "goldens" / "k2_tiny")
    cfg = override(golden.cfg, {"vocab": VOCAB})
    rng, shapes = np.random.default_rng(0), nn.unbox(abstract_params(Model(cfg, local())))
    params = jax.tree.map(
        lambda x: array(rng.normal(size=x.shape) * max(x.shape[-2:]) ** -0.5)
        if x.ndim > 2 or VOCAB in x.shape else jnp.ones(x.shape), shapes,
    )
    export(cfg, params, directory)
    lines = [base64.b64encode(bytes([i])) + b" %d" % i for i in range(256)]
    (directory / "tiktoken.model").write_bytes(b"\n".join(lines))
    added = {str(256 + i): {"content": name} for i, name in enumerate(MARKS)}
    config = {"added_tokens_decoder": added, "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    turns = ({"role": "user", "content": "hm?"}, {"role": "assistant", "content": "yes"})
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(16)))
    return path


def run(checkpoint, chats, out, *args):
    import argparse

    parser = argparse.ArgumentParser()
    finetune.add_arguments(parser)
    common = ("--checkpoint", checkpoint, "--data", chats, "--out", out, "--length", "128")
    args = parser.parse_args([*map(str, common), *args])
    return finetune.main(args)


def test_adapters_learn_and_the_result_is_a_model_directory(checkpoint, chats, tmp_path):
    how = ("--lora", "2", "--rows", "1", "--epochs", "1", "--lr", "0.03")
    assert run(checkpoint, chats, tmp_path, *how) == 0
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    before, after = load(checkpoint), load(tmp_path / "model")
    assert after.cfg == before.cfg and read_config(tmp_path / "model") == before.cfg
    assert (tmp_path / "model" / "tiktoken.model").exists()
    sides = (jax.device_get(x.params) for x in (before, after))
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), *sides)
    paths = {jax.tree_util.keystr(p) for p, c in jax.tree_util.tree_leaves_with_path(changed) if c}
    names = adapted(abstract_params(Model(before.cfg, local())))
    assert paths and paths <= names.keys()  # nothing else was touched
    assert run(checkpoint, chats, tmp_path, *how) == 0  # done before: written again, not trained
    with pytest.raises(UserError, match="holds another run"):
        run(checkpoint, chats, tmp_path, *how[:-1], "0.01")


def test_fresh_adapters_change_nothing_and_trained_ones_what_they_say(rng):
    model, params = model_and_params("kimi")
    boxed = abstract_params(model)
    adapters = fresh_adapters(boxed, 3, 0)
    assert_close(merged(params, adapters, boxed, 16.0), params)
    path = "['params']['group_0']['layer_0']['mixer']['q']['w']"  # l d h k
    b = array(rng.normal(size=adapters[path]["b"].shape))
    adapters[path] = {**adapters[path], "b": b}
    got = merged(params, adapters, boxed, 6.0)["params"]["group_0"]["layer_0"]["mixer"]["q"]["w"]
    w = params["params"]["group_0"]["layer_0"]["mixer"]["q"]["w"]
    change = np.einsum("ldr,lrc->ldc", adapters[path]["a"], b) * 2.0
    assert_close(got, w + change.reshape(w.shape))


def test_bad_input(checkpoint, chats, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": []}\nnot json\n')
    for args, message in (
        ((checkpoint, bad), "line 1"),
        ((checkpoint, chats, "--lora", "0"), "rank of 1 or more, got 0"),
        ((checkpoint, chats, "--rows", "3", "--parts", "2"), "cannot be read in --parts 2"),
        ((checkpoint, chats, "--rows", "100"), "fewer than --rows 100"),
        ((checkpoint, chats, "--weights", "keep"), "cannot be kept quantised"),
    ):
        source, data, *more = args
        with pytest.raises(UserError, match=message):
            run(source, data, tmp_path / "out", *more)
