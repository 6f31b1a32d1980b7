"""A dataset is believed in nothing; raw text is tokenized once and found again."""

import json
import os
import shutil

import numpy as np
import pytest

from kimijax.data.dataset import open_dataset, tokenize
from kimijax.data.dataset.cached import dataset_of
from kimijax.data.dataset.format import open_array
from kimijax.data.rows.packed import packed_rows
from kimijax.errors import UserError
from tests.data.files import contents, texts, write


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A dataset of bytes with two sources."""
    root, rng = tmp_path_factory.mktemp("good"), np.random.default_rng(0)
    for name in ("books", "code"):
        write(root / name / "a.jsonl", [{"text": x} for x in texts(rng, 20)])
    tokenize([root / "books", root / "code"], root / "out")
    return root / "out"


def say(**changes):
    """Change what dataset.json says."""

    def act(path):
        data = json.loads((path / "dataset.json").read_text())
        (path / "dataset.json").write_text(json.dumps(data | changes))

    return act


def put(name, dtype, change):
    """Rewrite an array of the dataset after `change` of its numbers."""

    def act(path):
        length = open_dataset(path).info.documents
        numbers = open_array(path, name, length, dtype).read().result().copy()
        change(numbers)
        shutil.rmtree(path / name)
        open_array(path, name, length, dtype, create=True).write(numbers).result()

    return act


def flip(path):
    shard = path / "tokens/c/0"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)


def swap_ends(numbers):
    numbers[3], numbers[4] = numbers[4], numbers[3]


def shorten(path):
    os.truncate(path / "tokens/c/0", 50)


def other_metadata(path):
    spec = path / "ends/zarr.json"
    spec.write_text(spec.read_text().replace('"int64"', '"uint64"'))


@pytest.mark.parametrize(
    "act, fault",
    [
        (lambda p: (p / "dataset.json").unlink(), "is no dataset, it has no dataset.json"),
        (lambda p: (p / "dataset.json").write_text("{"), "cannot be read as JSON"),
        (say(version=2), "is not of format version 1"),
        (say(extra=1), "is no description of a dataset"),
        (say(sources=3), "is no description of a dataset"),
        (say(documents="4"), "documents is '4'"),
        (say(documents=10**14), "it says 10{14} documents of"),
        (say(tokens=10**14), "the tokens of its sources are 55084, not 10{14}"),
        (say(vocab=100_000), "'uint16' is not the dtype of a vocabulary of 100000"),
        (say(eos=300), "eos 300 is not an id below 256"),
        (say(sources=[]), "the documents of its sources are 0"),
        (lambda p: shutil.rmtree(p / "ends"), "ends: has 0 bytes, too few"),
        (lambda p: shutil.rmtree(p / "tokens"), "tokens: has 0 bytes, too few"),
        (shorten, "tokens: has 50 bytes, too few"),
        (other_metadata, "ends: cannot be read"),
        (put("ends", "int64", swap_ends), "ends must increase to .* document 4 has"),
        (put("ends", "int64", lambda x: np.add(x, -1, out=x)), "the last is"),
        (put("ends", "int64", lambda x: x.__setitem__(0, -5)), "document 0 has 0 and then -5"),
        (put("source", "uint16", lambda x: x.__setitem__(0, 2)), "holds 2, but there are 2"),
        (put("language", "uint16", lambda x: x.__setitem__(9, 7)), "holds 7, but there are 1"),
    ],
)
def test_a_dataset_that_lies_is_refused(good, tmp_path, act, fault):
    path = shutil.copytree(good, tmp_path / "out")
    act(path)
    with pytest.raises(UserError, match=fault) as caught:
        open_dataset(path)
    said = str(caught.value)
    assert "\n" not in said and ("kimijax tokenize" in said or "fetch it again" in said)


def test_tokens_that_lie_are_refused_when_read(good, tmp_path):
    path = shutil.copytree(good, tmp_path / "flipped")
    flip(path)
    with pytest.raises(UserError, match="tokens: cannot be read: .*make it anew"):
        open_dataset(path).read([(0, 0, 5)])
    path = shutil.copytree(good, tmp_path / "moved")  # as many bytes, but not where they belong
    (path / "tokens/c/0").rename(path / "tokens/c/9")
    with pytest.raises(UserError, match="tokens: cannot be read: .*missing"):
        open_dataset(path).read([(0, 0, 5)])
    path = shutil.copytree(good, tmp_path / "foreign")
    info = open_dataset(path).info
    ids = open_array(path, "tokens", info.tokens, "uint16").read().result().copy()
    ids[7] = 300
    shutil.rmtree(path / "tokens")
    open_array(path, "tokens", info.tokens, "uint16", create=True).write(ids).result()
    rows = packed_rows(open_dataset(path), 4096, 0)
    with pytest.raises(UserError, match="holds the id 300 .* outside the vocabulary of 256"):
        [rows[i] for i in range(len(rows))]


def test_raw_text_is_tokenized_once(tmp_path, monkeypatch, good, model_dir):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    books = good.parent / "books"
    made = []
    first = dataset_of([books], on_part=lambda *x: made.append(x))
    assert made and first.path.parent == tmp_path / "cache/kimijax/datasets"
    tokenize([books], tmp_path / "out")
    assert contents(first.path) == contents(tmp_path / "out")
    made.clear()
    assert dataset_of([books], on_part=lambda *x: made.append(x)).path == first.path and not made
    other = dataset_of([books], model_dir)
    assert other.path != first.path and other.info.eos == 0
    write(tmp_path / "books/a.jsonl", [{"text": "other"}])
    assert dataset_of([tmp_path / "books"]).path not in (first.path, other.path)


def test_a_dataset_is_itself_and_of_one_tokenizer(good, model_dir):
    assert dataset_of([good]).path == good
    with pytest.raises(UserError, match="was made with the tokenizer 'bytes', not with"):
        dataset_of([good], model_dir)
    with pytest.raises(UserError, match="no text is named"):
        dataset_of([])
