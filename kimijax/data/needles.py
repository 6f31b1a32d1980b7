"""Training rows for retrieval: real text, pass keys hidden in it, questions at its end.

Rows are built so that what decides is the whole word: some words of a row have a twin that
differs in one letter, and every row asks for some of its words and not for others.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kimijax.data.haystack import NEEDLE, QUESTION, draw_digits, draw_words


@dataclass(frozen=True, kw_only=True)
class NeedleTask:
    """Rows of `length` tokens with `needles` pass keys, of which `questions` are asked for."""

    length: int
    rows: int
    needles: int
    questions: int
    twins: float = 0.5  # share of rows whose words come in pairs
    watched: int = 32  # further positions per row on which the block index is trained


class NeedleBatch(NamedTuple):
    """Arrays of one batch. A position predicts the token after it."""

    ids: np.ndarray  # b length     int32
    weight: np.ndarray  # b length     of the language-model loss
    answers: np.ndarray  # b n          positions that predict an answer digit
    watch_at: np.ndarray  # b n+watched  positions on which the index is trained
    watch_weight: np.ndarray  # b n+watched


HAYSTACK_WEIGHT, NEEDLE_WEIGHT, QUESTION_WEIGHT = 1.0, 0.0, 0.1
ANSWER_WATCH = 20.0  # weight of an answer position against any other
DIGITS = 5


def batch(task: NeedleTask, text: np.ndarray, seed: int, step: int) -> NeedleBatch:
    """The batch of a step: a function of (task, text, seed, step), so that a run can resume."""
    rng = np.random.default_rng([seed, step])
    rows = [_row(task, text, rng) for _ in range(task.rows)]
    return NeedleBatch(*(np.stack(x) for x in zip(*rows, strict=True)))


def _row(task: NeedleTask, text: np.ndarray, rng: np.random.Generator):
    words = draw_words(rng, task.needles, twins=rng.random() < task.twins)
    digits = draw_digits(rng, task.needles)
    order = rng.permutation(task.needles)
    needles = [NEEDLE.format(word=words[i], digits=digits[i]).encode() for i in order]
    asked = rng.permutation(task.needles)[: task.questions]
    questions = [
        (QUESTION.format(word=words[i]).encode(), digits[i].encode() + b".") for i in asked
    ]
    tail = sum(len(q) + len(a) for q, a in questions)
    hay = task.length - tail - sum(map(len, needles))
    if hay < 0:
        raise ValueError(f"{task.length=} is too short for its needles and questions by {-hay}")
    start = rng.integers(0, len(text) - hay)
    cuts = np.sort(rng.integers(0, hay + 1, task.needles))
    ids, weight = _weave(text[start : start + hay], cuts, needles)
    answers = []
    for question, answer in questions:
        at = sum(map(len, ids)) + len(question) - 1
        answers += range(at, at + DIGITS)
        ids += [np.frombuffer(question + answer, np.uint8)]
        weight += [np.full(len(question) + len(answer), QUESTION_WEIGHT, np.float32)]
    ids, weight = np.concatenate(ids).astype(np.int32), np.concatenate(weight)
    weight = np.append(weight[1:], 0.0).astype(np.float32)  # of the token that is predicted
    weight[answers] = 0.0  # counted apart
    answers = np.array(answers, np.int32)
    others = rng.integers(0, task.length, task.watched, dtype=np.int32)
    watch_weight = np.append(np.full(len(answers), ANSWER_WATCH), np.ones(task.watched))
    return ids, weight, answers, np.append(answers, others), watch_weight.astype(np.float32)


def _weave(hay: np.ndarray, cuts: np.ndarray, needles: list[bytes]):
    """Pieces of text with needles between them, and the weight of each token."""
    ids, weight, last = [], [], 0
    for cut, needle in zip([*cuts, len(hay)], [*needles, b""], strict=True):
        ids += [hay[last:cut], np.frombuffer(needle, np.uint8)]
        weight += [np.full(cut - last, HAYSTACK_WEIGHT, np.float32)]
        weight += [np.full(len(needle), NEEDLE_WEIGHT, np.float32)]
        last = cut
    return ids, weight
