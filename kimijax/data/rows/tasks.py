"""Synthetic long-context tasks: row i is a function of (task, seed, i), and answers are known.

Answers are the runs of tokens with weight; `score` compares them with what a model predicts.
"""

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from kimijax.data.haystack import NEEDLE, QUESTION, draw_digits, draw_words
from kimijax.data.rows.batch import Batch, grain, next_weights
from kimijax.errors import UserError

Encode = Callable[[str], Sequence[int]]


class Example(NamedTuple):
    """Tokens of one row, and which of them are an answer."""

    ids: np.ndarray  # int32 [length]
    answer: np.ndarray  # bool [length]


def encode_bytes(text: str) -> list[int]:
    """The bytes of a text: ids below 256."""
    return list(text.encode())


@dataclass(frozen=True, kw_only=True, eq=False)
class KeyTask:
    """Pass keys stated in a text, some asked for at its end: one needle, or several with rivals.

    hay     ids of text to hide them in; a row takes a random stretch of it
    twins   words come in pairs that differ in one letter
    encode  of what is written into the text; by default bytes
    """

    length: int
    hay: np.ndarray
    keys: int = 1
    asked: int = 1
    twins: bool = False
    encode: Encode = encode_bytes

    def __post_init__(self):
        if not 1 <= self.asked <= self.keys:
            raise UserError(f"{self.asked} of {self.keys} keys cannot be asked for")

    def example(self, rng: np.random.Generator) -> Example:
        """A row drawn by `rng`."""
        words, digits = draw_words(rng, self.keys, self.twins), draw_digits(rng, self.keys)
        stated = [NEEDLE.format(word=words[i], digits=digits[i])
                  for i in rng.permutation(self.keys)]
        asked = [(QUESTION.format(word=words[i]), f"{digits[i]}")
                 for i in rng.permutation(self.keys)[: self.asked]]
        return _hide(self, rng, stated, asked)


@dataclass(frozen=True, kw_only=True, eq=False)
class VariableTask:
    """Chains of assignments in a text; asked is for every variable of one chain, in order.

    VAR XQD = 12345, VAR PLM = XQD, ...: as the variable tracking of RULER (arXiv:2404.06654).
    """

    length: int
    hay: np.ndarray
    chains: int = 1
    hops: int = 4
    encode: Encode = encode_bytes

    def __post_init__(self):
        if self.chains < 1 or self.hops < 0:
            raise UserError(f"{self.chains} chains of {self.hops} hops cannot be tracked")

    def example(self, rng: np.random.Generator) -> Example:
        """A row drawn by `rng`."""
        size = self.hops + 1
        names = _draw_names(rng, self.chains * size)
        values = draw_digits(rng, self.chains)
        chains = [names[i * size : (i + 1) * size] for i in range(self.chains)]
        # A chain's assignments stay in order; chains are interleaved.
        turns = rng.permutation(np.repeat(np.arange(self.chains), size))
        stated, at = [], [0] * self.chains
        for i in turns:
            source = chains[i][at[i] - 1] if at[i] else values[i]
            stated.append(f" VAR {chains[i][at[i]]} = {source}. ")
            at[i] += 1
        chosen = int(rng.integers(self.chains))
        question = (f" Find all variables that are assigned the value {values[chosen]}, in order."
                    " They are: ")
        return _hide(self, rng, stated, [(question, " ".join(chains[chosen]))])


@dataclass(frozen=True, kw_only=True)
class CopyTask:
    """Random tokens, a separator (the last id of the vocabulary), and the same tokens again."""

    length: int
    vocab: int = 256

    def __post_init__(self):
        if self.length < 3 or self.vocab < 3:
            raise UserError(f"nothing can be copied in {self.length} tokens of a vocabulary of "
                            f"{self.vocab}: both must be at least 3")

    def example(self, rng: np.random.Generator) -> Example:
        """A row drawn by `rng`; with an even length it begins with a separator."""
        size = (self.length - 1) // 2
        said = rng.integers(0, self.vocab - 1, size)
        ids = np.full(self.length, self.vocab - 1, np.int32)
        ids[-size:] = ids[-2 * size - 1 : -size - 1] = said
        return Example(ids, np.arange(self.length) >= self.length - size)


def task_rows(task: KeyTask | VariableTask | CopyTask, seed: int, rows: int) -> Any:
    """grain.MapDataset of `rows` rows (Batch of the task's length)."""

    def row(index: int) -> Batch:
        ids, answer = task.example(np.random.default_rng([seed, index]))
        seg = np.zeros(len(ids), np.int32)
        pos = np.arange(len(ids), dtype=np.int32)
        return Batch(ids, pos, seg, next_weights(seg, answer.astype(np.float32)))

    return grain().MapDataset.range(rows).map(row)


def score(row: Batch, predicted: np.ndarray) -> tuple[int, int]:
    """(answers that are right to the last token, answers) of one row.

    predicted  int [L]: the token that a model expects after each
    """
    asked = row.weight > 0
    right = np.append(predicted[:-1] == row.ids[1:], False)
    begins = np.flatnonzero(asked & ~np.append(False, asked[:-1]))
    ends = np.flatnonzero(asked & ~np.append(asked[1:], False)) + 1
    return sum(bool(right[a:b].all()) for a, b in zip(begins, ends, strict=True)), len(begins)


def _draw_names(rng: np.random.Generator, count: int) -> list[str]:
    """Distinct names of three capital letters."""
    if count > 26**3:
        raise UserError(f"{count:,} variables, but only {26**3:,} names have three letters; ask "
                        "for fewer chains or hops")
    letters = string.ascii_uppercase
    drawn = rng.choice(26**3, size=count, replace=False)
    return [letters[i // 676] + letters[i // 26 % 26] + letters[i % 26] for i in drawn]


def _hide(
    task: KeyTask | VariableTask, rng: np.random.Generator, stated: Sequence[str],
    asked: Sequence[tuple[str, str]],
) -> Example:
    """A stretch of the hay with sentences in it in their order, then questions and answers."""
    sentences = [np.array(task.encode(text), np.int32) for text in stated]
    tail = [(np.array(task.encode(text), np.int32), is_answer)
            for pair in asked for text, is_answer in zip((*pair, "."), (False, True, False),
                                                         strict=True)]
    room = task.length - sum(map(len, sentences)) - sum(len(x) for x, _ in tail)
    if not 0 <= room <= len(task.hay):
        raise UserError(
            f"a row of {task.length} tokens takes {room} of its text beside what is stated and "
            f"asked, which has {len(task.hay)}: change the length, or give more text"
        )
    begin = int(rng.integers(0, len(task.hay) - room + 1))
    hay = task.hay[begin : begin + room].astype(np.int32)
    pieces = np.split(hay, np.sort(rng.integers(0, room + 1, len(sentences))))
    body = [x for pair in zip(pieces, sentences, strict=False) for x in pair] + pieces[-1:]
    flags = [np.full(sum(map(len, body)), False)]
    flags += [np.full(len(x), is_answer) for x, is_answer in tail]
    return Example(np.concatenate([*body, *(x for x, _ in tail)]), np.concatenate(flags))
