"""Tasks are functions of seed and index, and their answers follow from what they state."""

import re

import numpy as np
import pytest

from kimijax.data.rows.batch import batches, mixture
from kimijax.data.rows.tasks import CopyTask, KeyTask, VariableTask, score, task_rows
from kimijax.data.tokenizer import load_tokenizer
from kimijax.errors import UserError

HAY = np.frombuffer(b"The grass is green. The sky is blue. " * 200, np.uint8)
TASKS = {
    "needle": KeyTask(length=1000, hay=HAY),
    "keys": KeyTask(length=2000, hay=HAY, keys=9, asked=4, twins=True),
    "variables": VariableTask(length=1500, hay=HAY, chains=3, hops=3),
    "copy": CopyTask(length=100, vocab=300),
}


def answers(row):
    """The answers of a row, as lists of ids, found by weight."""
    at = np.flatnonzero(row.weight) + 1
    return [x.tolist() for x in np.split(row.ids[at], np.flatnonzero(np.diff(at) > 1) + 1)]


def text_answers(row):
    return [bytes(x).decode() for x in answers(row)]


def from_text(name, text):
    """The answers, worked out from the text alone."""
    if name == "variables":
        said = re.findall(r"VAR (\w+) = (\w+)\.", text)
        value = re.search(r"assigned the value (\d+)", text)[1]
        found = [value]
        for _ in range(4):
            found.append(next(left for left, right in said if right == found[-1]))
        return [" ".join(found[1:])]
    stated = dict(re.findall(r"The pass key for (\w+) is (\d+)\. ", text))
    return [stated[word] for word in re.findall(r"What is the pass key for (\w+)\?", text)]


@pytest.mark.parametrize("name", ["needle", "keys", "variables"])
def test_answers_follow_from_the_text(name):
    rows = task_rows(TASKS[name], 5, 6)
    for i in range(6):
        row = rows[i]
        assert row.ids.shape == (TASKS[name].length,)
        text = bytes(row.ids.astype(np.uint8)).decode()
        want = from_text(name, text)
        assert text_answers(row) == want and len(want) == {"keys": 4}.get(name, 1)


def test_what_is_copied_was_there_before():
    for length in (100, 101):
        row = task_rows(CopyTask(length=length, vocab=300), 0, 1)[0]
        (answer,) = answers(row)
        said = row.ids[: -len(answer) - 1].tolist()[-len(answer):]
        assert answer == said and row.ids[-len(answer) - 1] == 299 and max(said) < 299


def test_rows_take_other_stretches_of_the_text():
    rows = task_rows(KeyTask(length=500, hay=np.arange(7400)), 0, 6)
    assert len({int(rows[i].ids[:400].max()) for i in range(6)}) == 6


@pytest.mark.parametrize("name", TASKS)
def test_rows_are_functions_of_seed_and_index(name):
    rows, again = (task_rows(TASKS[name], 1, 8) for _ in range(2))
    assert rows[5].ids.tolist() == again[5].ids.tolist()
    assert rows[5].ids.tolist() != rows[6].ids.tolist()
    assert rows[5].ids.tolist() != task_rows(TASKS[name], 2, 8)[5].ids.tolist()


def test_score_counts_answers_that_are_right_throughout():
    row = task_rows(TASKS["keys"], 0, 1)[0]
    predicted = np.append(row.ids[1:], 0)
    assert score(row, predicted) == (4, 4)
    predicted[row.weight == 0] = -1  # what is not asked for does not count
    assert score(row, predicted) == (4, 4)
    predicted[np.flatnonzero(row.weight)[[0, 2, -1]]] += 1  # two of the first, one of the last
    assert score(row, predicted) == (2, 4)


def test_tasks_over_other_vocabularies_and_in_mixtures(model_dir):
    tokenizer = load_tokenizer(model_dir)
    hay = np.array(tokenizer.encode("the lazy dog " * 500), np.int32)
    task = KeyTask(length=600, hay=hay, keys=3, encode=tokenizer.encode)
    row = task_rows(task, 0, 4)[2]
    text = tokenizer.decode(row.ids)
    assert [tokenizer.decode(x) for x in answers(row)] == from_text("needle", text)
    copies = task_rows(CopyTask(length=600, vocab=tokenizer.vocab), 0, 8)
    mixed = mixture({"keys": task_rows(task, 0, 8), "copy": copies}, {"keys": 1, "copy": 1})
    assert next(batches(mixed, 4)).ids.shape == (4, 600)


@pytest.mark.parametrize(
    "make, fault",
    [
        (lambda: KeyTask(length=100, hay=HAY, keys=1, asked=2), "2 of 1 keys cannot be asked for"),
        (lambda: VariableTask(length=100, hay=HAY, chains=0), "0 chains of 4 hops"),
        (lambda: CopyTask(length=2), "nothing can be copied in 2 tokens"),
        (lambda: task_rows(KeyTask(length=50, hay=HAY), 0, 1)[0], "a row of 50 tokens takes -"),
        (lambda: task_rows(KeyTask(length=9000, hay=HAY), 0, 1)[0], "which has 7400"),
        (lambda: task_rows(VariableTask(length=9, hay=HAY, chains=9999), 0, 1)[0], "variables"),
    ],
)
def test_tasks_that_cannot_be(make, fault):
    with pytest.raises(UserError, match=fault):
        make()
