"""How fast is the same model here and in transformers, on the same two threads?

Ask     Forward of 2048 tokens, and decoding behind 2048 cached tokens, as a ratio of transformers'
        better of eager and sdpa; float32, a CPU, one row.
Run     make parity && .venv-parity/bin/python -m experiments.transformers_speed [--threads 2]
Cost    about four minutes.
Answer  see the README's results.

A K2-like model of width 512, 8 layers and 32 experts of which 4 work on a token, random weights,
exported by us and loaded by transformers. Measured in turn, the median of five rounds.
"""

import argparse
import functools
import os
import tempfile
import time
from pathlib import Path

from kimijax.cli import run_module

LENGTH, DECODED, ROUNDS = 2048, 16, 5
SHORT = 128  # tokens for a checkpoint, which may be tiny


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the measurement."""
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", metavar="DIR",
                        help="time a Hugging Face directory instead, such as tests/goldens/k2_tiny")


def model_config():
    """The model that is timed."""
    from kimijax.config import MLAConfig, MoEConfig, RopeConfig, SwiGLUConfig
    from kimijax.presets import decoder

    mla = MLAConfig(
        heads=8, q_rank=256, kv_rank=128, nope_dim=64, rope_dim=32, v_dim=64,
        rope=RopeConfig(theta=50_000.0, dim=32),
    )
    return decoder(
        vocab=8192, width=512, mixers=(mla,) * 8, dense=1, ffn=SwiGLUConfig(width=1536),
        moe=MoEConfig(experts=32, top_k=4, width=256, shared_width=256, scaling=2.5),
        norm_eps=1e-6, context=8192,
    )


def random_params(cfg):
    """Weights of unit gain."""
    import numpy as np
    from flax.traverse_util import unflatten_dict

    from kimijax.model import parameter_shapes

    rng = np.random.default_rng(0)

    def draw(name, x):
        if "norm" in name:
            return np.ones(x.shape, np.float32)
        return rng.normal(size=x.shape).astype(np.float32) * max(x.shape[-2:]) ** -0.5

    leaves = {n: draw(n, x) for n, x in parameter_shapes(cfg).items()}
    return {"params": unflatten_dict(leaves, sep=".")}


def ours(cfg, params, ids):
    """(forward, decode): functions that do the work and wait for it."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from kimijax.cache import empty_cache
    from kimijax.model import Model
    from kimijax.ops.attend import local

    net = Model(cfg, local())
    params = jax.device_put(params)
    forward = jax.jit(functools.partial(net.apply, method="logits"))

    @functools.partial(jax.jit, donate_argnums=1)
    def read(params, cache, ids):
        out = net.apply(params, ids, cache=cache)
        return net.apply(params, out.hidden[:, -1], method="head").argmax(-1), out.cache

    def run_forward():
        jax.block_until_ready(forward(params, ids))

    def run_decode():
        token, cache = read(params, empty_cache(cfg, 1, ids.shape[1] + DECODED), ids)
        jax.block_until_ready(cache)
        began = time.perf_counter()
        for _ in range(DECODED):
            token, cache = read(params, cache, token[:, None].astype(jnp.int32))
            np.asarray(token)
        return (time.perf_counter() - began) / DECODED

    return run_forward, run_decode


def theirs(directory, ids, attention):
    """The same of transformers."""
    import numpy as np
    import torch
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=attention
    ).eval()
    tokens = torch.tensor(np.asarray(ids, np.int64))

    @torch.no_grad()
    def run_forward():
        net(tokens, use_cache=False)

    @torch.no_grad()
    def run_decode():
        out = net(tokens, use_cache=True)
        began = time.perf_counter()
        for _ in range(DECODED):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = net(token, past_key_values=out.past_key_values, use_cache=True)
        return (time.perf_counter() - began) / DECODED

    return run_forward, run_decode


def seconds(run) -> float:
    """Of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main(args: argparse.Namespace) -> int:
    """Export, load, warm up, measure in turn, print medians and ratios."""
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=true " + os.environ.get("XLA_FLAGS", "")
    import numpy as np
    import torch

    from kimijax.convert.load import load
    from kimijax.convert.run import export

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as work:
        if args.checkpoint:
            directory, length = args.checkpoint, SHORT
            found = load(directory)
            cfg, params = found.cfg, found.params
        else:
            directory, length, cfg = f"{work}/hf", LENGTH, model_config()
            params = random_params(cfg)
            export(cfg, params, Path(directory))
        ids = np.random.default_rng(1).integers(0, cfg.vocab, (1, length)).astype(np.int32)
        sides = {"kimijax": ours(cfg, params, ids)}
        for attention in ("eager", "sdpa"):
            sides[attention] = theirs(directory, ids, attention)
    times = {name: ([], []) for name in sides}
    for measured in range(-1, ROUNDS):  # the first round compiles
        for name, (forward, decode) in sides.items():
            found = seconds(forward), decode()
            if measured >= 0:
                for held, new in zip(times[name], found, strict=True):
                    held.append(new)
    for i, what in enumerate(("forward", "decode, per token")):
        medians = {name: float(np.median(held[i])) for name, held in times.items()}
        best = min(medians["eager"], medians["sdpa"])
        row = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in medians.items())
        print(f"{what}: {row}; {best / medians['kimijax']:.2f}x the better of transformers")
    return 0


if __name__ == "__main__":
    run_module(add_arguments, main, __doc__)
