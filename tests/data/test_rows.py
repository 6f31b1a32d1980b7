"""Rows hold every document once, batches do not depend on hosts, and a run goes on exactly."""

import json

import jax
import numpy as np
import optax
import pytest

from kimijax.cache import run_length
from kimijax.data.rows.batch import Batch, batches, mixture
from kimijax.data.rows.chats import Chats
from kimijax.data.rows.packed import packed_rows, row_of
from kimijax.data.rows.packing import pack
from kimijax.errors import UserError
from tests.conftest import CONFIGS, apply_of, model_and_params


def documents(rng, lengths, vocab=64):
    """Random documents of given lengths, some of whose tokens are not learned."""
    total = int(np.sum(lengths))
    ids = rng.integers(0, vocab, total).astype(np.int32)
    learned = (rng.random(total) < 0.8).astype(np.float32)
    return Chats(ids, learned, np.cumsum(lengths), vocab, 0)


@pytest.fixture
def some(rng):
    return documents(rng, rng.integers(1, 90, 300))


def assert_same(got, want):
    """Batches are equal to the bit."""
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)


def placed(documents, rows):
    """(ids, learned) of every document in rows, sorted; each row's layout is checked."""
    found = []
    for row in rows:
        for i in range(row.seg.max() + 1):
            at = np.flatnonzero(row.seg == i)
            assert (np.diff(at) == 1).all() and (row.pos[at] == np.arange(len(at))).all()
            assert row.weight[at[-1]] == 0
            found.append((row.ids[at].tolist(), row.weight[at[:-1]].tolist()))
        assert (row.ids[row.seg < 0] == 0).all() and (row.weight[row.seg < 0] == 0).all()
    return sorted(found)


@pytest.mark.parametrize("align", [1, 16])
def test_every_document_lies_in_a_row_of_each_epoch_once(some, align):
    rows = packed_rows(some, 96, 3, align=align, epochs=3)
    spans = [(i, 0, n) for i, n in enumerate(some.lengths)]
    want = sorted((ids.tolist(), mask[1:].tolist())
                  for ids, mask in zip(some.read(spans), some.masks(spans), strict=True))
    at, orders = 0, []
    for epoch in range(3):
        packing = pack(some.lengths, 96, 3, epoch, align)
        assert (packing.start % align == 0).all()
        own = [rows[at + i] for i in range(packing.rows)]
        assert placed(some, own) == want
        at += packing.rows
        orders.append(packing.document.tolist())
    assert at == len(rows)
    assert orders[0] != orders[1] != orders[2]
    assert packed_rows(some, 96, 4, align=align)[0].ids.tolist() != rows[0].ids.tolist()


def test_little_is_wasted(rng):
    lengths = np.maximum(1, rng.lognormal(6, 1.2, 5000)).astype(np.int64)
    assert pack(lengths, 2048, 0, 0).fill(2048) > 0.97
    aligned = pack(lengths, 2048, 0, 0, 64)
    assert (-(-aligned.length // 64) * 64).sum() / (aligned.rows * 2048) > 0.97


def test_long_documents_are_split_cut_dropped_or_refused(rng):
    some = documents(rng, [5, 70, 64, 33])
    ids = [x.tolist() for x in some.read([(i, 0, n) for i, n in enumerate(some.lengths)])]
    wants = {
        "split": [ids[0], ids[1][:32], ids[1][32:64], ids[1][64:], ids[2][:32], ids[2][32:],
                  ids[3][:32], ids[3][32:]],
        "cut": [ids[0], *(x[:32] for x in ids[1:])],
        "drop": [ids[0]],
    }
    for long, want in wants.items():
        rows = packed_rows(some, 32, 0, long=long)
        assert [x for x, _ in placed(some, [rows[i] for i in range(len(rows))])] == sorted(want)
    with pytest.raises(UserError, match="document 1 has 70 tokens, more than a row of 32"):
        packed_rows(some, 32, 0, long="refuse")
    with pytest.raises(UserError, match="no document is left: all 4 are longer than 4 tokens"):
        packed_rows(some, 4, 0, long="drop")
    with pytest.raises(UserError, match="32 tokens must be a multiple of align = 5"):
        packed_rows(some, 32, 0, align=5)
    with pytest.raises(UserError, match="epochs = 0"):
        packed_rows(some, 32, 0, epochs=0)


def test_four_hosts_see_the_batches_of_one(some):
    rows = packed_rows(some, 96, 0, epochs=2)
    one, four = batches(rows, 8), [batches(rows, 8, host, 4) for host in range(4)]
    count = 0
    for want in one:
        shares = [next(host) for host in four]
        assert all(x.ids.shape == (2, 96) for x in shares)
        assert_same(Batch(*map(np.concatenate, zip(*shares, strict=True))), want)
        count += 1
    assert count == len(rows) // 8
    assert all(next(host, None) is None for host in four)


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_fresh_iterator_goes_on_from_any_step(some, hosts):
    rows = packed_rows(some, 96, 0, epochs=2)
    mixed = mixture({"a": rows, "b": packed_rows(some, 96, 1, epochs=2)}, {"a": 2, "b": 1})
    iterator, states, seen = batches(mixed, 8, hosts - 1, hosts), [], []
    for _ in range(9):
        states.append(json.loads(json.dumps(iterator.get_state())))
        seen.append(next(iterator))
    for step, state in enumerate(states):
        fresh = batches(mixed, 8, hosts - 1, hosts)
        fresh.set_state(state)
        for want in seen[step:]:
            assert_same(next(fresh), want)


def test_mixtures_have_their_proportions(rng):
    parts = {name: packed_rows(documents(rng, [8] * 900, vocab), 8, 0)
             for name, vocab in (("a", 2), ("b", 3), ("c", 4))}
    for i, name in enumerate(parts):  # rows tell by their ids where they are from
        parts[name] = parts[name].map(lambda x, i=i: x._replace(ids=x.ids * 0 + i))
    mixed = mixture(parts, {"a": 6, "b": 3.0, "c": 1})
    names = np.array([mixed[i].ids[0] for i in range(len(mixed))])
    assert len(mixed) == 1500  # six in ten of a's 900
    for end in (10, 100, 1000):
        assert np.abs(np.bincount(names[:end]) - np.array([0.6, 0.3, 0.1]) * end).max() <= 1
    assert [mixture(parts, {"b": 1, "a": 0})[i].ids[0] for i in range(9)] == [1] * 9
    for weights, fault in (
        ({"a": 1, "d": 1}, "a weight is given to 'd', but there are 'a', 'b', 'c'"),
        ({"a": -1, "b": 2}, "the weight of 'a' is -1: must be a number from 0"),
        ({"a": float("nan")}, "the weight of 'a' is nan"),
        ({"a": "1"}, "the weight of 'a' is '1'"),
        ({"a": 0, "b": 0.0}, "no weight is above 0: weigh some of 'a', 'b', 'c'"),
        ({}, "no weight is above 0"),
    ):
        with pytest.raises(UserError, match=fault):
            mixture(parts, weights)


def test_batches_that_cannot_be(some, monkeypatch):
    rows = packed_rows(some, 96, 0)
    for args, fault in (
        ((6, 0, 4), "a batch of 6 rows cannot be dealt to 4 hosts"),
        ((0,), "a batch of 0 rows"),
        ((8, 4, 4), "host 4 must be from 0 to 3"),
        ((10_000,), "fewer than a batch of 10000"),
    ):
        with pytest.raises(UserError, match=fault):
            batches(rows, *args)
    monkeypatch.setitem(__import__("sys").modules, "grain", None)
    with pytest.raises(UserError, match=r"pip install kimijax\[train\]"):
        packed_rows(some, 96, 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_batch_has_the_loss_of_its_documents_alone(name, rng):
    model, params = model_and_params(name)
    apply, cfg = apply_of(name), CONFIGS[name]()
    some = documents(rng, [100, 41, 7, 65, 130, 1, 90, 256], cfg.vocab)
    rows = packed_rows(some, 256, 0, align=run_length(cfg))

    @jax.jit
    def entropy(hidden, ids):
        logits = model.apply(params, hidden[:, :-1], method="head")
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])

    def loss(row):
        ids, pos, seg, weight = (x[None] for x in row)
        each = np.asarray(entropy(apply(ids, pos, seg).hidden, ids), np.float64)
        return float((each * weight[:, :-1]).sum())

    packed = sum(loss(rows[i]) for i in range(len(rows)))
    alone = 0.0
    for i, n in enumerate(some.lengths):
        packing = pack(np.array([n]), 256, 0, 0)
        one = Chats(*(x[some.ends[i] - n : some.ends[i]] for x in (some.ids, some.learned)),
                    np.array([n]), cfg.vocab, 0)
        alone += loss(row_of(one, packing, 0, 256))
    assert len(rows) < len(some.lengths)
    assert abs(packed - alone) <= 1e-5 * abs(alone)
