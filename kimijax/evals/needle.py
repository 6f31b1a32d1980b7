"""Needle retrieval: hide pass keys in real text, read all of it once, ask for each key.

Every needle is the distractor of all others. Words and digits are drawn anew for each seed.
"""

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from kimijax import metrics
from kimijax.checkpoint import load_model
from kimijax.config import CompressedConfig, ModelConfig
from kimijax.convert.load import load
from kimijax.data.haystack import (
    NEEDLE,
    QUESTION,
    Needle,
    draw_digits,
    draw_words,
    find_needle,
    hide,
    read_haystack,
)
from kimijax.errors import UserError
from kimijax.evals.report import heatmap, table
from kimijax.infer import CHUNK, Step, check_tokens, generate, prefill, programs
from kimijax.ops.attend import check_kernels, local, usual_impl
from kimijax.ops.blocks import local_start
from kimijax.ops.rope import MAX_POSITION
from kimijax.parallel.plan import Plan
from kimijax.parallel.processes import is_first

TENTHS = 10
MOST_NEEDLES = 100_000  # there are no more keys of five digits
PROBE_CHUNKS, ASK_SECONDS = 8, 600.0  # of the estimate for exact attention
PROMPT_STEP = 64  # prompts are padded to a multiple of this


@dataclass(frozen=True, kw_only=True)
class NeedleJob:
    """What to hide where and how to read it. Contexts ascend; none: as long as the haystack."""

    checkpoint: str
    contexts: tuple[int, ...]
    needles: int = 100
    seed: int = 0
    haystack: str | None = None
    ask: str | None = None
    question: str = QUESTION
    twins: bool = False
    exact: bool = False
    yes: bool = False
    chunk: int = CHUNK  # tokens that a device reads at a time
    cache: str | None = None  # how it keeps latents, as of kimijax.cache.empty_cache

    def __post_init__(self):
        for name, value in (("context", min(self.contexts, default=1)), ("needles", self.needles)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if max(self.contexts, default=1) > MAX_POSITION:
            raise UserError(f"context {max(self.contexts)} exceeds {MAX_POSITION} positions")
        if self.needles > MOST_NEEDLES:
            raise UserError(f"needles must be at most {MOST_NEEDLES}, got {self.needles}")
        if "{word}" not in self.question:
            raise UserError(f"the question {self.question!r} must contain {{word}}")
        try:
            self.question.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the question {self.question!r} is not valid text") from error


@dataclass
class Reading:
    """One context read and questioned."""

    context: int
    needles: list[Needle]
    answers: list[str] = field(default_factory=list)
    recalled: list[float] = field(default_factory=list)  # share of digits; empty when exact
    chunk_seconds: list[float] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)
    nats: float = 0.0  # of the text itself


def hidden(job: NeedleJob) -> list[tuple[np.ndarray, list[Needle]]]:
    """The documents to read, one per context, with their needles. Nothing is compiled yet."""
    rng = np.random.default_rng(job.seed)
    limit = max(job.contexts, default=MAX_POSITION + 1)
    text = read_haystack(job.haystack, seed=job.seed, limit=limit)
    if job.ask is not None:
        contexts = job.contexts or (len(text),)
        _enough(text, contexts[-1])
        return [(text[:n], [find_needle(text[:n], job.ask)]) for n in contexts]
    words = draw_words(rng, job.needles, twins=job.twins)
    words = [words[i] for i in rng.permutation(len(words))]
    digits = draw_digits(rng, job.needles)
    contexts = job.contexts or (len(text) + _needle_bytes(words, digits),)
    return [hide(text, n, words, digits) for n in contexts]


def _needle_bytes(words, digits) -> int:
    return sum(len(NEEDLE.format(word=w, digits=d)) for w, d in zip(words, digits, strict=True))


def _enough(text: np.ndarray, context: int) -> None:
    if len(text) < context:
        raise UserError(
            f"the haystack has {len(text)} tokens, fewer than --context {context}; give a "
            "shorter context, or none to read all of it"
        )


def run(job: NeedleJob, out: Path, plan: Plan | None = None) -> dict:
    """Do the job, write results.json and heatmap.png into `out`, print the table; the results.

    plan  where the text and its questions lie, `exact` as the job is; None: on one device
    """
    documents = hidden(job)
    clock = metrics.CompileClock()
    cfg, params = load_model(Path(job.checkpoint))
    if job.cache:
        check_kernels(cfg, job.cache, usual_impl())
    ops = local(usual_impl(), exact=job.exact)
    if plan is not None:
        ops, params = plan.ops(), load(job.checkpoint, shardings=plan.placements).params
    for tokens, _ in documents:
        check_tokens(cfg, tokens)
    step = programs(cfg, ops, job.chunk * ops.ways, job.cache)
    capacity = max(len(tokens) for tokens, _ in documents)
    capacity = -(-capacity // step.chunk) * step.chunk
    width = _prompt_width(job, documents)
    warm_up(step, params, capacity, width)
    peak = [_peak(plan)]
    if job.exact:
        _estimate(job, step, params, capacity, width, documents)
    readings = [
        _read(job, step, params, capacity, width, tokens, needles) for tokens, needles in documents
    ]
    peak.append(_peak(plan))
    results = _results(job, step, readings, clock.seconds, float(np.mean(peak)))
    results["mesh"] = plan and dict(plan.mesh.shape)
    if is_first():
        _write(out, results)
    print(table(results))
    return results


def _peak(plan: Plan | None) -> float:
    """Matmul FLOP/s of all devices; those that a CPU host stands in for share its cores."""
    devices = [] if plan is None else list(plan.mesh.devices.flat)
    own = [d for d in devices if d.platform != "cpu"] or {d.process_index for d in devices}
    return metrics.matmul_peak() * max(1, len(own))


def _prompt_width(job: NeedleJob, documents) -> int:
    longest = max(len(_prompt(job, n)) for _, needles in documents for n in needles)
    return -(-longest // PROMPT_STEP) * PROMPT_STEP


def _prompt(job: NeedleJob, needle: Needle) -> np.ndarray:
    return np.frombuffer(job.question.replace("{word}", needle.word).encode(), np.uint8)


def warm_up(step: Step, params, capacity: int, width: int) -> None:
    """Compile everything a job runs, on a cache that stays empty."""
    cache = step.empty(1, capacity)
    cache, _ = step.read(params, cache, np.zeros((1, step.chunk + 1), np.uint8), np.int32(0))
    generate(step, params, cache, np.zeros(1, np.uint8), 2, width)


def _read(job, step, params, capacity, width, tokens, needles) -> Reading:
    """Prefill one document with a progress bar, then ask for every needle behind it."""
    reading = Reading(len(tokens), needles)
    with tqdm(total=len(tokens), unit="tok", unit_scale=True, desc=f"read {len(tokens):,}") as bar:

        def on_chunk(chunk):
            reading.chunk_seconds.append(chunk.seconds)
            reading.nats += chunk.nats
            bar.update(chunk.tokens)

        cache = prefill(step, params, step.empty(1, capacity), tokens, on_chunk)
    for needle in tqdm(needles, unit="question", desc="ask"):
        answer, chosen = generate(
            step, params, cache, _prompt(job, needle), len(needle.digits), width,
            reading.decode_seconds.append,
        )
        reading.answers.append(bytes(np.minimum(answer, 255).astype(np.uint8)).decode("latin-1"))
        if chosen.size:
            end = len(tokens) + len(_prompt(job, needle)) - 1
            reading.recalled.append(_recall(step.cfg, needle, chosen, end))
    return reading


def _recall(cfg: ModelConfig, needle: Needle, chosen: np.ndarray, query: int) -> float:
    """Share of digits whose block is chosen (or whose place is local) when they are predicted.

    chosen is digits x compressed layers x k first positions; a digit counts if any layer sees it.
    """
    c = next(m.mixer for m in cfg.layers if isinstance(m.mixer, CompressedConfig))
    hits = 0
    for j in range(len(needle.digits)):
        at = needle.digits_position + j
        near = at >= int(local_start(np.int32(query + j), c))
        hits += bool(near or (chosen[j] == at // c.index.block * c.index.block).any())
    return hits / len(needle.digits)


def _estimate(job: NeedleJob, step: Step, params, capacity: int, width: int, documents) -> None:
    """Print how long exact attention will take, from its first chunks; long ones need --yes."""
    longest, needles = max(documents, key=lambda d: len(d[0]))
    tokens, chunks = longest[: PROBE_CHUNKS * step.chunk], []
    cache = prefill(step, params, step.empty(1, capacity), tokens, chunks.append)
    began = time.perf_counter()
    generate(step, params, cache, _prompt(job, needles[0]), len(needles[0].digits), width)
    question = time.perf_counter() - began
    total = sum(
        _reading_seconds([c.seconds for c in chunks], -(-len(t) // step.chunk))
        + question * len(asked) * len(t) / len(tokens)
        for t, asked in documents
    )
    print(f"exact attention: about {total:,.0f} s for {sum(len(t) for t, _ in documents):,} tokens")
    if total > ASK_SECONDS and not job.yes:
        raise UserError(f"exact attention would take about {total:,.0f} s; add --yes to run it")


def _reading_seconds(probe: list[float], chunks: int) -> float:
    """Seconds of a document of `chunks`, where a chunk costs a constant and a part that grows."""
    if chunks <= len(probe) or len(probe) < 3:
        return float(np.mean(probe)) * chunks
    slope, start = np.polyfit(np.arange(len(probe)), probe, 1)
    return float(np.sum(np.maximum(start + slope * np.arange(chunks), 0)))


def _results(job, step, readings: list[Reading], compile_seconds: float, peak: float) -> dict:
    runs = [_summary(job, step, r, peak) for r in readings]
    return runs[-1] | {
        "compile_seconds": compile_seconds,
        "matmul_peak_flops": peak,
        "peak_rss_gib": metrics.peak_rss_gib(),
        "job": asdict(job),
        "by_context": runs,
    }


def _summary(job: NeedleJob, step: Step, r: Reading, peak: float) -> dict:
    right = [a == n.digits for a, n in zip(r.answers, r.needles, strict=True)]
    seconds = float(np.sum(r.chunk_seconds))
    flops = metrics.prefill_flops(step.cfg, r.context, job.exact)
    last = max(1, 65536 // step.chunk)
    return {
        "context": r.context,
        "needles": len(r.needles),
        "seed": job.seed,
        "attention": "exact" if job.exact else "compressed",
        "exact_match": float(np.mean(right)),
        "exact_match_by_depth": _by_depth(r.needles, right),
        "block_recall": float(np.mean(r.recalled)) if r.recalled else None,
        "prefill_seconds": seconds,
        "prefill_tokens_per_second": r.context / seconds,
        "seconds_per_token_last_64k": float(np.mean(r.chunk_seconds[-last:])) / step.chunk,
        "decode_ms_per_token": (
            1e3 * float(np.median(r.decode_seconds)) if r.decode_seconds else None
        ),
        "bits_per_token": r.nats / np.log(2) / max(1, r.context - 1),
        "flops": sum(flops.values()),
        "flops_by_part": flops,
        "fraction_of_peak": sum(flops.values()) / seconds / peak,
        "questions": [
            {"word": n.word, "digits": n.digits, "answer": a, "depth": n.depth,
             "position": n.position}
            for a, n in zip(r.answers, r.needles, strict=True)
        ],
    }


def _by_depth(needles: list[Needle], right: list[bool]) -> list[dict]:
    """Right and asked in each tenth of the depth."""
    tenth = [min(int(n.depth * TENTHS), TENTHS - 1) for n in needles]
    return [
        {
            "from": t / TENTHS,
            "right": sum(r for r, at in zip(right, tenth, strict=True) if at == t),
            "asked": tenth.count(t),
        }
        for t in range(TENTHS)
    ]


def _write(out: Path, results: dict) -> None:
    """Both files are complete before either takes its name."""
    out.mkdir(parents=True, exist_ok=True)
    numbers, picture = out / "results.tmp.json", out / "heatmap.tmp.png"
    numbers.write_text(json.dumps(results, indent=1, allow_nan=False))
    heatmap(results, picture)
    os.replace(picture, out / "heatmap.png")
    os.replace(numbers, out / "results.json")
