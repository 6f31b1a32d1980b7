"""Which slice of TPUs do the Kimi models need for 128K to 4M tokens, how fast, and at what price?

Ask     The smallest slice of v5e, v5p, v6e and tpu7x on which a row is read (prefill), whole or in
        chunks behind a cache, or one more token is made behind it (decode); bytes of a chip, bounds
        of time, dollars. Against a cache of the keys and values of all heads, and against attention
        to chosen blocks.
Run     python -m experiments.plan_2m --out DIR [--models NAME,...] [--contexts N,...] [--json]
Cost    half a minute of one core; closed form, nothing is compiled.
Answer  experiments/plans/plan_2m/results.md; in short, README, "Plan a pod".

expanded  The same model; its decode step keeps keys and values of all heads instead of latents, and
          deals them over `tensor` as well. Nothing in kimijax keeps such a cache.
chosen    Every MLA layer becomes one of compressed attention of the same heads and latents, which
          reads 32 blocks of 64 tokens and its neighbourhood. No such weights are released: it is
          what the architecture would cost. Its rows are planned whole alone.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from kimijax.cli import run_module
from kimijax.commands.paths import writable

if TYPE_CHECKING:
    from kimijax.config import MLAConfig, ModelConfig
    from kimijax.planner.chips import Pod
    from kimijax.planner.estimate import Estimate
    from kimijax.planner.job import Job

# How a preset's weights are held, as by `kimijax plan --weights`, and its name on the page.
MODELS = {
    "kimi_k2": ("bf16", "Kimi K2"),
    "kimi_k2_thinking": ("int4", "K2-Thinking, int4"),
    "kimi_linear_48b": ("bf16", "Kimi Linear 48B"),
    "moonlight_16b": ("bf16", "Moonlight 16B"),
}
CONTEXTS = tuple(2**n for n in (17, 19, 20, 21, 22))
CHUNKS = (4096, 16_384, 65_536)  # tokens of a call, as of `kimijax generate --chunk`
KINDS = (  # (attention, job)
    ("exact", "prefill"), ("exact", "decode"), ("expanded", "decode"), ("chosen", "prefill"),
    ("chosen", "decode"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the page."""
    parser.add_argument("--out", required=True, metavar="DIR",
                        help="where results.json, results.md and the pictures are written")
    parser.add_argument("--models", default=",".join(MODELS), metavar="NAME[,NAME...]")
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)), metavar="N[,N...]")
    parser.add_argument("--json", action="store_true", help="print results.json, not a table")


def main(args: argparse.Namespace) -> int:
    """Plan everything, write the page, print what it says of the longest context."""
    out = writable(args.out)
    models, contexts = _names(args.models), _numbers(args.contexts)
    # Read once, when jax is loaded: planning takes no accelerator.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import json

    from experiments import plan_page
    from kimijax.sweep.table import write

    facts = {"models": {name: about(name) for name in models}, "rows": []}
    for model in models:
        facts["rows"] += rows(model, contexts)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(facts | {"rows": []}, indent=1).replace(
        '"rows": []', '"rows": [\n' + ",\n".join(map(json.dumps, facts["rows"])) + "\n]"
    )
    write(out / "results.json", text + "\n")
    plan_page.pictures(facts, out)
    write(out / "results.md", plan_page.page(facts))
    print(text if args.json else plan_page.table(
        facts, [(m, contexts[-1]) for m in models], KINDS
    ))
    return 0


def _names(text: str) -> list[str]:
    from kimijax.errors import UserError

    names = text.split(",")
    for name in names:
        if name not in MODELS:
            raise UserError(f"--models {name!r:.40}: there are {', '.join(MODELS)}")
    return list(dict.fromkeys(names))


def _numbers(text: str) -> list[int]:
    from kimijax.errors import UserError

    if not all(part.isdecimal() and len(part) < 20 for part in text.split(",")):
        raise UserError(f"--contexts {text!r:.60}: write numbers of tokens, as 131072,2097152")
    return sorted({int(part) for part in text.split(",")})


def model_of(name: str, attention: str = "exact") -> "ModelConfig":
    """The config of a preset, its weights in the form in which they are held."""
    from kimijax.planner.job import held
    from kimijax.presets import PRESETS

    cfg = held(PRESETS[name](), MODELS[name][0])
    return chosen(cfg) if attention == "chosen" else cfg


def chosen(cfg: "ModelConfig") -> "ModelConfig":
    """The same with compressed attention in the place of MLA; it knows no rotary positions."""
    from kimijax.config import CompressedConfig, IndexConfig, MLAConfig
    from kimijax.config_tree import override

    index = IndexConfig(dim=128, keys=2, block=64, top_k=32, group=64)
    return override(cfg, {
        f"groups.{i}.layers.{j}.mixer": CompressedConfig(
            heads=m.heads, kv_rank=m.kv_rank, nope_dim=m.nope_dim, v_dim=m.v_dim, window=64,
            index=index,
        )
        for i, group in enumerate(cfg.groups)
        for j, layer in enumerate(group.layers) if isinstance(m := layer.mixer, MLAConfig)
    })


def about(name: str) -> dict:
    """What the page says of a model: bytes of cache a token, in each form."""
    from kimijax.config import MLAConfig
    from kimijax.metrics import describe

    cfg = model_of(name)
    facts = describe(cfg)
    bytes_of = {"exact": facts["cache_bytes_per_token"],
                "chosen": describe(chosen(cfg))["cache_bytes_per_token"]}
    bytes_of["expanded"] = sum(
        2 * m.heads * (m.nope_dim + m.rope_dim + m.v_dim)
        for m in (layer.mixer for layer in cfg.layers) if isinstance(m, MLAConfig)
    )
    return {
        "title": MODELS[name][1], "weights": MODELS[name][0], "trained_for": cfg.context,
        "parameters": facts["parameters"], "layers": facts["layers"],
        "state_bytes_per_sequence": facts["state_bytes_per_sequence"],
        "cache_bytes_per_token": bytes_of,
    }


def rows(model: str, contexts: list[int]) -> Iterator[dict]:
    """A row of results for every context, kind of attention, job and chip."""
    from kimijax.planner.chips import CHIPS
    from kimijax.planner.job import Job

    for context in contexts:
        for attention, kind in KINDS:
            job = Job(model_of(model, attention), kind, context)
            jobs = [job] if attention == "chosen" else in_chunks(job)
            for chip in CHIPS:
                change = with_all_heads if attention == "expanded" else lambda e: e
                e = slice_of(jobs, chip, change)
                what = {"model": model, "context": context, "attention": attention, "job": kind}
                yield what | _row(e, chip)


def in_chunks(job: "Job") -> list["Job"]:
    """The job; where a row is read, it is also read in chunks no longer than it."""
    if job.kind != "prefill":
        return [job]
    return [job, *(replace(job, chunk=n) for n in CHUNKS if n <= job.context)]


def slice_of(
    jobs: list["Job"], chip: str, change: Callable[["Estimate"], "Estimate"]
) -> "Estimate":
    """The best way to do one of `jobs` on the smallest slice on which one fits, once changed.

    Where none fits: that which needs least memory on the largest.
    """
    from kimijax.planner.chips import pods
    from kimijax.planner.search import fastest

    found = []
    for pod in pods(chip):
        found = [change(e) for job in jobs for e in _on(job, pod)] or found
        if any(e.fits for e in found):
            return fastest(found)
    return min(found, key=lambda e: e.bytes)


def _on(job: "Job", pod: "Pod") -> list["Estimate"]:
    """Of every mesh that holds the job and divides its chunk; so few chips may be none."""
    from kimijax.errors import UserError
    from kimijax.planner.search import candidates, meshes

    try:
        return candidates(job, pod, meshes(job, pod))
    except UserError:
        return []


def wider(m: "MLAConfig") -> float:
    """Keys and values of all heads over the latent of a token."""
    return m.heads * (m.nope_dim + m.rope_dim + m.v_dim) / (m.kv_rank + m.rope_dim)


def with_all_heads(e: "Estimate") -> "Estimate":
    """The same decode step behind a cache of all heads' keys and values.

    Its products, which are fewer, are left as they are: they are not what takes longest.
    """
    from kimijax.config import MLAConfig
    from kimijax.planner import job as jobs
    from kimijax.planner.estimate import plan_for
    from kimijax.planner.memory import leaf_bytes

    cache = jobs.cache(e.job, plan_for(e.job, e.pod, e.mesh, e.strategy))
    more = sum(
        (wider(layer.mixer) / e.mesh["tensor"] - 1)
        * sum(leaf_bytes(state[name]) for name in ("latent", "k_rope") if name in state)
        for group, states in zip(e.job.cfg.groups, cache.states, strict=True)
        for layer, state in zip(group.layers, states, strict=True)
        if isinstance(layer.mixer, MLAConfig)
    )
    hbm = e.hbm | {"cache": e.hbm["cache"] + more}
    return replace(
        e, parts=e.parts | {"latents": e.parts["latents"] + more}, hbm=hbm,
        seconds=e.seconds | {"hbm": sum(hbm.values()) / e.pod.bandwidth},
    )


def _row(e: "Estimate", chip: str) -> dict:
    """Sizes are those of a whole chip, also where a chip is two devices."""
    from kimijax.parallel.mesh import named
    from kimijax.planner.estimate import estimate

    each = e.pod.chip.devices
    found = {
        "chip": chip, "fits": e.fits, "topology": e.pod.topology, "chips": e.pod.chips,
        "bytes_per_chip": round(each * e.bytes), "memory_per_chip": each * e.pod.chip.memory,
        "mesh": named(e.mesh), "strategy": e.strategy, "chunk": e.job.chunk,
    }
    if not e.fits:
        return found
    if e.job.kind == "prefill" and not e.job.cached:  # what it would leave behind
        left = estimate(replace(e.job, kind="decode"), e.pod, e.mesh).parts
        found["cache_bytes_per_chip"] = round(each * (left["latents"] + left["state"]))
    dollars, joules = e.costs(e.pod.chip.dollars, e.pod.chip.watts)
    return found | {
        "seconds": e.time, "bound": e.bound, "tokens_per_second": e.job.tokens / e.time,
        "dollars_per_million_tokens": dollars, "joules_per_token": joules,
    }


if __name__ == "__main__":
    run_module(add_arguments, main, __doc__)
