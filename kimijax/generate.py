"""Continuing a batch of ragged prompts: chunked prefill of all rows at once, then token by token.

Rows are told apart by position and segment: what pads a short prompt is never cached or seen, so a
row's tokens do not depend on its neighbours.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from kimijax.cache import Cache, empty_cache, run_length
from kimijax.config import ModelConfig
from kimijax.errors import UserError
from kimijax.infer import check_tokens
from kimijax.model import Model
from kimijax.ops.attend import Ops
from kimijax.ops.rope import MAX_POSITION
from kimijax.sampling import Sampling, knobs, row_keys, sample

CHUNK = 2048
GREEDY = Sampling(temperature=0.0)


class Decoder:
    """Compiled programs of one model: a chunk of every prompt, and a token of every row.

    latents  how its caches keep them, as of kimijax.cache.empty_cache
    """

    def __init__(self, cfg: ModelConfig, ops: Ops, dtype: jnp.dtype, latents: str | None = None):
        self.cfg, self.ops, self.dtype, self.latents = cfg, ops, dtype, latents
        self.model = Model(cfg, ops, dtype)
        self.prefill = ops.jit(self._prefill, donate_argnums=1)
        self.step = ops.jit(self._step, donate_argnums=(1, 3))
        self.pick = ops.jit(self._pick, donate_argnums=1)
        self.empty = ops.jit(self._empty, static_argnums=(0, 1))

    def _empty(self, rows, capacity):
        ways, latents = self.ops.ways, self.latents
        return self.ops.deal(empty_cache(self.cfg, rows, capacity, self.dtype, ways, latents))

    def _prefill(self, params, cache, ids, live):
        """The first live[row] of ids b t of every row: (cache, logits b v of each row's last)."""
        t = ids.shape[1]
        seg = jnp.where(jnp.arange(t) < live[:, None], 0, -1)
        out = self.model.apply(params, ids, None, seg, cache=cache, aligned=True)
        last = jnp.maximum(live - 1, 0)[:, None, None]
        hidden = jnp.take_along_axis(out.hidden, last, 1)[:, 0]
        logits = self.ops.whole(self.model.apply(params, hidden, method="head"))
        return self.ops.deal(out.cache), logits

    def _step(self, params, cache, token, seen, how, seed, step):
        """Read a token of every row and choose the next: (token b, cache, seen)."""
        fresh = jnp.ones((token.shape[0], 1), bool)
        out = self.model.apply(params, token[:, None], cache=cache, fresh=fresh)
        logits = self.model.apply(params, out.hidden[:, 0], method="head")
        token, seen = self._pick(self.ops.whole(logits), seen, how, seed, step)
        return self.ops.whole(token), self.ops.deal(out.cache), seen

    def _pick(self, logits, seen, how, seed, step):
        """The next token of every row, marked in `seen` (b v bool; None: nothing asks for it)."""
        rows = jnp.arange(logits.shape[0])
        token = sample(logits, seen, how, row_keys(seed, rows, step))
        return token, None if seen is None else seen.at[rows, token].set(True)


@functools.cache
def decoder(
    cfg: ModelConfig, ops: Ops, dtype: jnp.dtype, latents: str | None = None
) -> Decoder:
    """The Decoder of these arguments, made once, so that its programs are compiled once."""
    return Decoder(cfg, ops, dtype, latents)


def generate(
    programs: Decoder,
    params: dict,
    prompts: list[np.ndarray],
    new: int,
    sampling: Sampling = GREEDY,
    chunk: int = CHUNK,
) -> Iterator[np.ndarray]:
    """Yield the next token of every row, int32 b, `new` times.

    prompts  1-D token arrays, each at least one long; UserError for tokens outside the vocabulary
             and where no position would be left for the last new token
    chunk    tokens of the prompts in a call, at most, before rounding up to a run of each device
    """
    for prompt in prompts:
        check_tokens(programs.cfg, np.asarray(prompt))
    asked = len(prompts)
    prompts = [*prompts, *[np.zeros(0, np.int32)] * (-asked % programs.ops.batch)]
    how, seed = knobs([sampling] * len(prompts)), np.uint32(sampling.seed)
    cache, logits = read_prompts(programs, params, prompts, new, chunk)
    seen = None
    if sampling.repetition_penalty != 1.0:
        marks = np.zeros((len(prompts), programs.cfg.vocab), bool)
        for row, prompt in enumerate(prompts):
            marks[row, prompt] = True
        seen = marks
    token, seen = programs.pick(logits, seen, how, seed, np.int32(0))
    for i in range(new):
        yield np.asarray(token)[:asked]
        if i + 1 < new:
            token, cache, seen = programs.step(
                params, cache, token, seen, how, seed, np.int32(i + 1)
            )


def read_prompts(
    programs: Decoder, params: dict, prompts: list[np.ndarray], room: int, chunk: int = CHUNK
) -> tuple[Cache, jax.Array]:
    """A cache that holds the prompts with `room` free slots a row, and the logits after each.

    A prompt of no tokens is a row of padding, whose logits mean nothing.
    """
    lengths = np.array([len(p) for p in prompts])
    check_room(int(lengths.max()), room)
    chunk = chunk_length(programs.cfg, int(lengths.max()), programs.ops.ways, chunk)
    capacity = max(chunk, int(lengths.max()) + room)
    cache, logits = programs.empty(len(prompts), capacity), None
    for start in range(0, int(lengths.max()), chunk):
        ids = np.zeros((len(prompts), chunk), np.int32)
        live = np.clip(lengths - start, 0, chunk).astype(np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : live[row]] = prompt[start : start + live[row]]
        cache, found = programs.prefill(params, cache, ids, live)
        logits = found if logits is None else jnp.where(live[:, None] > 0, found, logits)
    return cache, logits


def check_room(longest: int, new: int) -> None:
    """UserError where a prompt and its continuation have more tokens than there are positions."""
    if longest + new > MAX_POSITION:
        raise UserError(
            f"{longest} tokens and {new} new ones exceed the {MAX_POSITION} positions of this "
            "build: ask for fewer"
        )


def chunk_length(cfg: ModelConfig, longest: int, ways: int = 1, most: int = CHUNK) -> int:
    """Tokens of a prefill call: a multiple of a run for each device, near the prompt's length."""
    run = run_length(cfg) * ways
    size = min(most, 1 << max(4, (longest - 1).bit_length()))
    return -(-size // run) * run
