"""Reading long documents and continuing them: chunked prefill into a cache, then decode.

Three programs serve any length: `read` (one chunk of a document), `fork` and `extend` (a few
tokens behind a document that is shared and never copied). Cache lengths are data, so nothing
recompiles as the document grows.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from kimijax.cache import Cache, empty_cache, run_length
from kimijax.config import ModelConfig
from kimijax.errors import UserError
from kimijax.fork import fork
from kimijax.model import Model
from kimijax.ops.attend import Ops
from kimijax.ops.rope import MAX_POSITION

CHUNK = 2048  # activations stay in cache; larger ones are slower on a CPU


@dataclass(frozen=True)
class Chunk:
    """Progress of a prefill: what the last chunk read and the seconds it took."""

    tokens: int
    seconds: float
    nats: float  # sum over the chunk's predictions of the token that follows


class Step:
    """Compiled programs of one model. Params and caches go in and come out as values.

    latents  how its caches keep them, as of kimijax.cache.empty_cache
    """

    def __init__(
        self, cfg: ModelConfig, ops: Ops, chunk: int = CHUNK, latents: str | None = None
    ):
        run = run_length(cfg)
        if chunk % run:
            raise UserError(f"chunk {chunk} must be a multiple of {run}, the run of this model")
        self.cfg, self.ops, self.chunk, self.latents = cfg, ops, chunk, latents
        self.model = Model(cfg, ops)
        self.read = ops.jit(self._read, donate_argnums=1)
        self.extend = ops.jit(self._extend, donate_argnums=2)
        self.fork = ops.jit(self._fork, static_argnums=1)
        self.empty = ops.jit(self._empty, static_argnums=(0, 1))

    def _empty(self, rows, capacity):
        ways, latents = self.ops.ways, self.latents
        return self.ops.deal(empty_cache(self.cfg, rows, capacity, ways=ways, latents=latents))

    def _read(self, params, cache, ids, live):
        """`live` tokens of a document from ids b chunk+1: (cache, nats of each next token's code).

        The last id is not read; it only is what the one before it predicts. The prediction is
        asked of every token, so that no layer of any token can be optimised away.
        """
        ids = ids.astype(jnp.int32)
        inputs, targets = ids[:, :-1], ids[:, 1:]
        seg = jnp.broadcast_to(jnp.where(jnp.arange(self.chunk) < live, 0, -1), inputs.shape)
        out = self.model.apply(params, inputs, None, seg, cache=cache, aligned=True)
        logits = self.model.apply(params, out.hidden, method="head")
        right = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        nats = jax.nn.logsumexp(logits, -1) - right
        return self.ops.deal(out.cache), self.ops.whole(nats)

    def _extend(self, params, frozen, cache, ids, live):
        """Fresh tokens behind a frozen document: (next token b, cache, chosen blocks of the last).

        The choice is b k first positions per compressed layer, stacked; -1 is none.
        """
        t = ids.shape[1]
        fresh = jnp.ones(ids.shape, bool)
        seg = jnp.broadcast_to(jnp.where(jnp.arange(t) < live, 0, -1), ids.shape)
        cache = cache.replace(frozen=frozen)
        out = self.model.apply(params, ids, None, seg, cache=cache, fresh=fresh)
        last = jax.lax.dynamic_index_in_dim(out.hidden, live - 1, 1, keepdims=False)
        logits = self.model.apply(params, last, method="head")
        chosen = [
            jax.lax.dynamic_index_in_dim(layer["mixer"]["chosen"], live - 1, 2, keepdims=False)
            for group in out.aux for layer in group.values() if "chosen" in layer["mixer"]
        ]
        chosen = jnp.concatenate(chosen) if chosen else jnp.zeros((0, ids.shape[0], 0), jnp.int32)
        token = logits.argmax(-1).astype(jnp.int32)
        cache = self.ops.deal(out.cache.replace(frozen=None))
        return self.ops.whole(token), cache, self.ops.whole(chosen)

    def _fork(self, cache, room):
        return self.ops.deal(fork(self.cfg, cache, room, self.ops.rows).replace(frozen=None))


@functools.cache
def programs(
    cfg: ModelConfig, ops: Ops, chunk: int = CHUNK, latents: str | None = None
) -> Step:
    """The Step of these arguments, made once: a second job in a process compiles nothing."""
    return Step(cfg, ops, chunk, latents)


def check_tokens(cfg: ModelConfig, tokens: np.ndarray) -> None:
    """UserError for tokens that the model cannot read."""
    if len(tokens) == 0:
        raise UserError("there are no tokens to read")
    if len(tokens) > MAX_POSITION:
        raise UserError(f"{len(tokens)} tokens exceed the {MAX_POSITION} positions of this build")
    if int(tokens.max()) >= cfg.vocab:
        at = int(tokens.argmax())
        raise UserError(
            f"token {int(tokens[at])} at position {at} is outside the vocabulary of {cfg.vocab}"
        )


def prefill(
    step: Step,
    params,
    cache: Cache,
    tokens: np.ndarray,
    on_chunk: Callable[[Chunk], None] = lambda chunk: None,
) -> Cache:
    """Read `tokens` (n) into an empty one-row cache, which is consumed: its memory is reused."""
    check_tokens(step.cfg, tokens)
    if int(cache.count.max()) > 0:
        raise ValueError("prefill: the cache must be empty; go on from a filled one with generate")
    if len(tokens) > cache.capacity:
        raise UserError(f"{len(tokens)} tokens do not fit a cache of {cache.capacity} slots")
    for start in range(0, len(tokens), step.chunk):
        piece = tokens[start : start + step.chunk + 1]
        ids = np.zeros((1, step.chunk + 1), tokens.dtype)
        ids[0, : len(piece)] = piece
        live = min(step.chunk, len(piece))
        began = time.perf_counter()
        cache, nats = step.read(params, cache, ids, np.int32(live))
        nats = float(np.asarray(nats)[0, : len(piece) - 1].sum())
        on_chunk(Chunk(live, time.perf_counter() - began, nats))
    return cache


def generate(
    step: Step,
    params,
    frozen: Cache,
    prompt: np.ndarray,
    new: int,
    width: int,
    on_step: Callable[[float], None] = lambda seconds: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy continuation of `prompt` (n <= width) behind a document: (new tokens, choices).

    Returns int32 [new] and the first positions of the blocks chosen for each, [new, layers, k].
    `width` is the padded length of a prompt, so that prompts share a program. `on_step` gets the
    seconds of every single-token step.
    """
    if len(prompt) > width:
        raise UserError(f"a prompt of {len(prompt)} tokens exceeds the width {width}")
    check_tokens(step.cfg, prompt)
    ids = np.zeros((1, width), np.int32)
    ids[0, : len(prompt)] = prompt
    run = run_length(step.cfg)
    cache = step.fork(frozen, -(-(width + new) // run) * run)  # few sizes, few programs
    out, choices = [], []
    live = np.int32(len(prompt))
    for i in range(new):
        began = time.perf_counter()
        token, cache, chosen = step.extend(params, frozen, cache, ids, live)
        out.append(int(token[0]))
        if i:  # the first step reads the prompt
            on_step(time.perf_counter() - began)
        choices.append(np.asarray(chosen[:, 0]))
        ids, live = np.array([[out[-1]]], np.int32), np.int32(1)
    return np.array(out, np.int32), np.stack(choices)
