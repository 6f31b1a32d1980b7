"""From logits to the next token, and the end of a text: filters, draws and stops.

The filters and their order are those of transformers: repetition penalty, temperature, top-k,
top-p, min-p. Among equal logits the lower id comes first, so that top-k keeps exactly k.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kimijax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one text is continued. Defaults draw from the model's own distribution."""

    temperature: float = 1.0         # 0: the likeliest token, whatever the filters
    top_k: int = 0                   # the likeliest k tokens; 0: all
    top_p: float = 1.0               # the fewest likeliest tokens with this mass; 1: all
    min_p: float = 0.0               # tokens with this share of the likeliest one's mass; 0: all
    repetition_penalty: float = 1.0  # what the text holds is this much less likely; 1: no change
    seed: int = 0

    def __post_init__(self):
        for name, low, high in (("top_k", 0, 2**31 - 1), ("seed", 0, 2**32 - 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise UserError(f"{name} {value!r:.60} must be a whole number from {low} to {high}")
        for name, low, high in (
            ("temperature", 1e-6, 1e6),
            ("top_p", 1e-6, 1),
            ("min_p", 0, 1),
            ("repetition_penalty", 0.01, 100),
        ):
            value = getattr(self, name)
            zero = name == "temperature" and value == 0
            if not _is_number(value) or not (zero or low <= value <= high):
                or_zero = " or 0, the likeliest token" if name == "temperature" else ""
                raise UserError(f"{name} {value!r:.60} must be from {low:g} to {high:g}{or_zero}")


class Knobs(NamedTuple):
    """The numbers of `Sampling` as arrays b: data, so that all settings share one program."""

    temperature: jax.Array | np.ndarray
    top_k: jax.Array | np.ndarray
    top_p: jax.Array | np.ndarray
    min_p: jax.Array | np.ndarray
    repetition_penalty: jax.Array | np.ndarray


def knobs(rows: Sequence[Sampling]) -> Knobs:
    """The settings of each row of a batch, one array b per number; seeds go to `row_keys`."""
    columns = {
        field.name: [getattr(row, field.name) for row in rows]
        for field in dataclasses.fields(Sampling)
        if field.name != "seed"
    }
    return Knobs(
        **{
            name: np.array(column, np.int32 if name == "top_k" else np.float32)
            for name, column in columns.items()
        }
    )


def row_keys(seed: jax.Array | int, row: jax.Array, step: jax.Array | int) -> jax.Array:
    """The random keys b of one step: fold_in(fold_in(key(seed), row), step).

    seed  uint32, or uint32 b
    row   int32 b, the number of a sample of one prompt, not its place in the batch
    step  int32, or int32 b: the tokens drawn before
    """
    rows = jnp.asarray(row, jnp.uint32)
    seeds = jnp.broadcast_to(jnp.asarray(seed, jnp.uint32), rows.shape)
    steps = jnp.broadcast_to(jnp.asarray(step, jnp.uint32), rows.shape)

    def one(seed, row, step):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), step)

    return jax.vmap(one)(seeds, rows, steps)


def sample(
    logits: jax.Array,
    seen: jax.Array | None,
    sampling: Sampling | Knobs,
    keys: jax.Array,
) -> jax.Array:
    """The next token of every row: int32 b.

    logits    b v float32
    seen      b v bool: what the text holds already, for the repetition penalty; None: nothing
    sampling  `Knobs` are data under jit, a row each. One `Sampling` for all rows is static:
              jit(sample, static_argnames="sampling") compiles anew for every setting.
    keys      random keys b, from `row_keys`: a row's token depends on its own logits and key alone
    """
    if logits.ndim != 2 or keys.shape != logits.shape[:1]:
        raise ValueError(f"logits {logits.shape} must be b v, and keys {keys.shape} b")
    if isinstance(sampling, Sampling):
        sampling = knobs([sampling] * len(logits))
    k = Knobs(*(jnp.asarray(x)[:, None] for x in sampling))                       # b 1 each
    logits = logits.astype(jnp.float32)
    if seen is not None:
        penalised = jnp.where(logits > 0, logits / k.repetition_penalty,
                              logits * k.repetition_penalty)
        logits = jnp.where(seen, penalised, logits)
    likeliest = logits.argmax(-1).astype(jnp.int32)                               # b
    greedy = k.temperature[:, 0] == 0
    return jax.lax.cond(
        greedy.all(),  # spares the sort
        lambda: likeliest,
        lambda: jnp.where(greedy, likeliest, _draw(logits, k, keys)),
    )


def _draw(logits: jax.Array, k: Knobs, keys: jax.Array) -> jax.Array:
    """A token of every row among those that the filters leave: int32 b."""
    # The largest is taken off first, or a small temperature overflows.
    logits = logits - logits.max(-1, keepdims=True)
    logits = logits / jnp.where(k.temperature > 0, k.temperature, 1.0)            # b v
    order = jnp.argsort(-logits, axis=-1, stable=True)                            # b v
    ranked = jnp.take_along_axis(logits, order, -1)                               # b v
    kept = _kept(ranked, k)
    # Noise belongs to ids, not to ranks: two close logits that change places keep theirs.
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)  # b v
    noisy = jnp.where(kept, ranked + jnp.take_along_axis(noise, order, -1), -jnp.inf)
    best = noisy.argmax(-1, keepdims=True)
    return jnp.take_along_axis(order, best, -1)[:, 0].astype(jnp.int32)           # b


def _kept(ranked: jax.Array, k: Knobs) -> jax.Array:
    """b v bool: which of the logits, in falling order, the filters leave; always the first."""
    rank = jnp.arange(ranked.shape[-1])
    kept = (rank < k.top_k) | (k.top_k == 0)
    probs = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), -1)
    before = jnp.cumsum(probs, -1) - probs
    kept &= (before < k.top_p) | (k.top_p >= 1)  # rounding may take the sum past 1
    kept &= jnp.exp(ranked - ranked[:, :1]) >= k.min_p
    return kept | (rank == 0)


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the stop that is complete first, and whether there is one.

    Of two that end together the longer counts, so that the cut does not depend on how the text
    arrives.
    """
    starts = ((text.find(stop), stop) for stop in stops)
    ends = [(at + len(stop), at) for at, stop in starts if at >= 0]
    return (text[: min(ends)[1]], True) if ends else (text, False)


@dataclass(frozen=True)
class Stops:
    """What ends a text: ids, which are no part of it, and strings, before which it is cut."""

    ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()

    def __post_init__(self):
        for stop in self.strings:
            if not isinstance(stop, str) or not stop:
                raise UserError(f"the stop {stop!r:.60} must be text of at least one character")


class StopStream:
    """Cuts text that comes in pieces at the first stop; never shows what may begin one.

    Joined, the pieces are what `cut_at_stop` leaves of the whole text.
    """

    def __init__(self, stops: Iterable[str]):
        self._stops = Stops(strings=tuple(stops)).strings
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What can be shown now that `text` has come; "" after a stop."""
        if self.stopped:
            return ""
        text, self.stopped = cut_at_stop(self._held + text, self._stops)
        held = 0 if self.stopped else self._begun(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """The rest of a text that ended without a stop."""
        rest, self._held = self._held, ""
        return rest

    def _begun(self, text: str) -> int:
        """Length of the longest end of the text that a stop begins with."""
        longest = max(map(len, self._stops), default=1) - 1
        return next(
            (n for n in range(min(longest, len(text)), 0, -1)
             if any(stop.startswith(text[len(text) - n :]) for stop in self._stops)),
            0,
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
